//! The interface between the Build Event Service and the builds.

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::sync::watch;

use crate::{
    bep::{BepError, event::StreamEvent},
    digest::Digest,
    exec_path::ExecPath,
};

/// Names one invocation's stream of events: what `StreamId` says for the component `TOOL`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct StreamKey {
    /// Ties several invocations together; Bazel's build request id.
    pub build_id: String,
    /// One run of the build tool.
    pub invocation_id: String,
    /// How many streams have begun under these ids before: a retried step of CI, a fixed `--invocation_id`, and Bazel's
    /// own retries after an eviction begin again from the first event.
    pub attempt: u32,
}

impl StreamKey {
    /// Whether both are of one build and invocation, whichever attempt.
    pub(crate) fn has_ids_of(&self, other: &Self) -> bool {
        self.build_id == other.build_id && self.invocation_id == other.invocation_id
    }

    /// The next stream under the same ids.
    pub(crate) fn next_attempt(&self) -> Self {
        Self {
            attempt: self.attempt.saturating_add(1),
            ..self.clone()
        }
    }
}

impl fmt::Display for StreamKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.invocation_id)
    }
}

/// How a stream came to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamEnd {
    /// The build tool said that it had sent everything.
    Finished,
    /// Cancelled, or the connection was lost and nobody came back. It means "no more events", never "forget". A
    /// client that does come back later resumes the stream: more events may follow, and another end.
    Broken(String),
}

/// What became of a build's required outputs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Settlement {
    /// Required outputs that could not be materialised.
    pub failed: u64,
    /// What to tell the user about them; a few lines at most.
    pub messages: Vec<String>,
    /// Whether a newer build of the same output root took over before this one was done.
    pub superseded: bool,
}

/// How far a stream's build is settled, event by event.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Progress {
    /// Every required output that events up to this number call for is materialised or has failed. It may step back:
    /// a build tool can delete at its end what was there before.
    pub through: i64,
    /// The lowest number of an event of which it is not yet known what it calls for: a test's result before its summary,
    /// a target whose sets have not come. Waiting for it is waiting for the build, not for its outputs.
    pub open: Option<i64>,
    /// The lowest number of an event some of whose required outputs failed to download.
    pub failed_at: Option<i64>,
    /// What to tell the user about them; a few lines at most.
    pub messages: Vec<String>,
}

/// The engine behind the service. Calls for one stream come from one task at a time, in order.
pub trait Builds: Send + Sync + 'static {
    /// Takes some events, with their numbers. Events of one stream come in order, each once; but after a restart, and when
    /// a stream that broke off is resumed after [`crate::bes::BesOptions::linger`], the journal's events come again from the
    /// first. Waiting here delays no acknowledgement.
    fn events(&self, stream: &StreamKey, events: Vec<(i64, StreamEvent)>) -> BoxFuture<'_, ()>;

    /// The stream exceeded a limit, as a message: outputs that its next events name are not downloaded.
    fn limited(&self, stream: &StreamKey, reason: String) -> BoxFuture<'_, ()>;

    /// The client's connection was lost, and the client may come back: more events or an end follow. Of use only to let go
    /// of what can be opened again.
    fn lost(&self, _: &StreamKey) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }

    /// No more events, see [`StreamEnd`].
    fn ended(&self, stream: &StreamKey, end: StreamEnd) -> BoxFuture<'_, ()>;

    /// Resolves when every required output of the stream is materialised or has failed. Asked after
    /// [`Builds::ended`] returned, and dropped when nobody needs the answer any more.
    fn settled(&self, stream: &StreamKey) -> BoxFuture<'static, Settlement>;

    /// Whether everything that a stream's build wanted came to its end in an earlier life of the process, so that its
    /// events must not come again: what has been done to the outputs since is no business of theirs. Blocks for a moment.
    fn is_done(&self, stream: &StreamKey) -> bool;

    /// Follows how far a stream's build is settled; `None` if nothing is known of the build. The sender goes with the
    /// build's task, when nothing is on its way any more.
    fn progress(&self, stream: &StreamKey) -> BoxFuture<'static, Option<watch::Receiver<Progress>>>;

    /// Where files that a stream names are on disk, verified: at their exec path where the event names one, else
    /// wherever this build has the same bytes. `None` for what is not there.
    fn local_files(
        &self,
        stream: &StreamKey,
        files: Vec<(Option<ExecPath>, Digest)>,
    ) -> BoxFuture<'static, Vec<Option<PathBuf>>>;

    /// Resolves when everything that the stream's build wants came to its end, what is optional as well, and that is
    /// known for good: its events are never handed over again. Asked after [`Builds::settled`] has answered.
    fn done(&self, stream: &StreamKey) -> BoxFuture<'static, ()>;

    /// Resolves while nothing is downloaded on request, also nothing that is required: no client waits for outputs then.
    fn stopped(&self) -> BoxFuture<'static, ()> {
        Box::pin(std::future::pending())
    }

    /// A client waits for its last acknowledgement, by this limit for so long at the most.
    fn holds(&self, _: &StreamKey, _at_most: Duration, _limit: &str) {}

    /// A client that was kept waiting for its last acknowledgement is waiting no longer: how long it was, and whether
    /// the deadline ended it.
    fn held(&self, stream: &StreamKey, took: Duration, timed_out: bool);
}

/// Turns one `build_event_stream.BuildEvent`'s bytes into an event, or says why it cannot. It has the events of one
/// stream in order, and may learn from one how to read the next.
pub type Decoder = Box<dyn FnMut(&Bytes) -> Result<StreamEvent, BepError> + Send>;

/// Makes the decoder of a stream, whose first event comes next.
pub type Decoders = Arc<dyn Fn() -> Decoder + Send + Sync>;
