//! What the tasks of all invocations share.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::{Mutex, RwLock};
use tokio::sync::{broadcast, mpsc, watch};

use super::{
    feed::{Change, InvocationChange, Report},
    message::Message,
    policy::Policy,
};
use crate::{
    action_cache::State,
    builds::StreamKey,
    exec_path::ExecPath,
    materialize::Materializer,
    metrics::Metrics,
    record::{Record, RootId},
    roots::Roots,
    sources::Sources,
    telemetry::Traces,
};

/// What was read of an output root's action cache last, and recorded.
#[derive(Clone)]
pub(super) struct Remembered {
    pub(super) state: Arc<State>,
    /// The identity of the record.
    pub(super) recorded_in: String,
    pub(super) trees: Trees,
}

/// The files of trees that programs need.
pub(super) type Trees = Arc<HashMap<ExecPath, Vec<ExecPath>>>;

/// The task of one invocation.
#[derive(Clone)]
pub(super) struct Task {
    pub(super) inbox: mpsc::Sender<Message>,
    /// Whether the record has all of it, and nothing more comes: from then on there is no need to ask.
    pub(super) is_recorded: Arc<AtomicBool>,
}

impl Task {
    pub(super) fn is_recorded(&self) -> bool {
        self.is_recorded.load(Ordering::Acquire)
    }
}

/// What all invocations share.
pub(super) struct Shared {
    pub(super) policy: RwLock<Policy>,
    pub(super) record: Record,
    pub(super) materializer: Materializer,
    pub(super) roots: Arc<Roots>,
    pub(super) sources: Arc<Sources>,
    pub(super) metrics: Metrics,
    /// By invocation id, which may be used again for another build.
    pub(super) live: Mutex<HashMap<String, HashMap<StreamKey, Task>>>,
    pub(super) reports: broadcast::Sender<Report>,
    /// The receivers of every change.
    pub(super) subscribers: Mutex<Vec<mpsc::UnboundedSender<InvocationChange>>>,
    /// Set again with each change.
    pub(super) changed: watch::Sender<()>,
    /// Whether the outputs of a set are settled as of the event that brings the set.
    pub(super) holds_sets: bool,
    /// How long a task stays after its end.
    pub(super) linger: OnceLock<Duration>,
    /// Where traces go, if anywhere.
    pub(super) traces: OnceLock<Traces>,
    /// What was read of the build tool's action caches last.
    pub(super) action_caches: Mutex<HashMap<RootId, Remembered>>,
    /// Why they are not read, as it was said.
    pub(super) said: Mutex<HashSet<String>>,
}

/// How long a task stays after its end, for a client that comes back to the same stream, unless told otherwise. Longer
/// than the event service remembers the stream ([`crate::bes::BesOptions`]), so that one which resumes it finds the task
/// that has heard its beginning.
const LINGER: Duration = Duration::from_secs(330);

impl Shared {
    /// How long a task stays after its end.
    pub(super) fn linger(&self) -> Duration {
        self.linger.get().copied().unwrap_or(LINGER)
    }

    /// Where traces go, if anywhere.
    pub(super) fn traces(&self) -> Traces {
        self.traces.get().cloned().unwrap_or_default()
    }

    /// Whether this was not said before.
    pub(super) fn is_first(&self, message: &str) -> bool {
        let mut said = self.said.lock();
        said.insert(message.to_owned())
    }

    /// Unless the record has started again since, and has nothing of it.
    pub(super) fn action_cache(&self, root: RootId) -> Option<Remembered> {
        let caches = self.action_caches.lock();
        let read = caches.get(&root).cloned();
        read.filter(|read| read.recorded_in == self.record.identity())
    }

    pub(super) fn remember_action_cache(&self, root: RootId, read: Option<Remembered>) {
        let mut caches = self.action_caches.lock();
        match read {
            Some(read) => caches.insert(root, read),
            None => caches.remove(&root),
        };
    }

    pub(super) fn forget(&self, stream: &StreamKey) {
        let mut live = self.live.lock();
        if let Entry::Occupied(mut of_id) = live.entry(stream.invocation_id.clone()) {
            of_id
                .get_mut()
                .retain(|key, task| key != stream || !task.inbox.is_closed());
            if of_id.get().is_empty() {
                of_id.remove();
            }
        }
    }

    pub(super) fn report(&self, report: Report) {
        // There may be no listener.
        let _ = self.reports.send(report);
    }

    pub(super) fn notify(&self, invocation_id: &str, change: &Change) {
        self.changed.send_replace(());
        let mut listeners = self.subscribers.lock();
        listeners.retain(|listener| {
            // Receivers that are gone get no more.
            let change = InvocationChange {
                invocation_id: invocation_id.to_owned(),
                change: change.clone(),
            };
            listener.send(change).is_ok()
        });
    }
}
