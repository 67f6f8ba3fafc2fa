//! What a stream's forwarder is handed, and what it says.

use std::{fs::File, path::PathBuf, sync::Arc};

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;
use tonic::metadata::MetadataMap;

use crate::{
    builds::StreamEnd,
    journal::{FrameAt, RecordKind},
};

/// An event on its way.
pub(in crate::bes) struct OutgoingEvent {
    /// Its number in the stream.
    pub(in crate::bes) sequence: i64,
    /// What it is.
    pub(in crate::bes) kind: RecordKind,
    /// The encoded `PublishBuildToolEventStreamRequest`, as received.
    pub(in crate::bes) request: Bytes,
}

/// What a forwarder is handed, in order. Events may come again; they are known by their numbers.
pub(in crate::bes) enum Outgoing {
    /// What the client's newest connection said in its headers. Comes before that connection's events.
    Headers(MetadataMap),
    /// Events in memory.
    Events {
        events: Vec<OutgoingEvent>,
        /// Their room in the budget, until they are in the window or sent.
        room: Option<Arc<OwnedSemaphorePermit>>,
    },
    /// Events that are only in the journal.
    Journaled {
        file: Arc<File>,
        path: PathBuf,
        at: FrameAt,
    },
    /// No more events, see [`StreamEnd`].
    Ended(StreamEnd),
}

/// How far forwarding is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::bes) struct ForwardStatus {
    /// The highest number that upstream has acknowledged.
    pub(in crate::bes) acked: i64,
    /// Upstream has everything and the stream there is closed, or nothing more will be sent.
    pub(in crate::bes) finished: bool,
    /// The last try to reach upstream was no failure.
    pub(in crate::bes) healthy: bool,
}
