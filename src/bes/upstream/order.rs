//! Which calls of a build go before which of its streams, and after which.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;
use tonic::metadata::MetadataMap;

use super::outgoing::ForwardStatus;
use crate::bes::lifecycle::Pending;

/// A call about a build's life.
pub(in crate::bes) struct LifecycleEvent {
    /// Whether it goes before the streams that come after it (`BuildEnqueued`, `InvocationAttemptStarted`), or after
    /// those that came before it (`InvocationAttemptFinished`, `BuildFinished`).
    pub(in crate::bes) opening: bool,
    /// The encoded `PublishLifecycleEventRequest`, as received.
    pub(in crate::bes) request: Bytes,
    /// What the client said in its headers.
    pub(in crate::bes) headers: MetadataMap,
    /// Dropped with the call, when upstream has it.
    pub(in crate::bes) _pending: Pending,
}

/// Every build that has streams or calls on their way.
#[derive(Default)]
pub(super) struct BuildCalls {
    builds: Mutex<HashMap<String, Build>>,
}

#[derive(Default)]
struct Build {
    calls: VecDeque<Waiting>,
    /// A task works on the calls.
    worked_on: bool,
    /// Opening calls taken so far, and how many of them are done with.
    openings: u64,
    done: watch::Sender<u64>,
    streams: Vec<watch::Receiver<ForwardStatus>>,
}

/// A call that waits for its turn.
pub(super) struct Waiting {
    pub(super) event: LifecycleEvent,
    /// The streams that it goes after: those known when it came. Later ones may come after it.
    pub(super) streams: Vec<watch::Receiver<ForwardStatus>>,
}

/// Resolves when the calls are done with that a stream goes after.
pub(super) struct Opened {
    done: watch::Receiver<u64>,
    openings: u64,
}

impl Opened {
    pub(super) async fn wait(mut self) {
        // The sender goes only when there are no calls any more.
        let _ = self.done.wait_for(|done| *done >= self.openings).await;
    }
}

impl BuildCalls {
    /// A stream begins, after the opening calls so far.
    pub(super) fn add_stream(&self, build_id: &str, status: watch::Receiver<ForwardStatus>) -> Opened {
        let mut builds = self.builds.lock();
        let build = builds.entry(build_id.to_owned()).or_default();
        build.streams.retain(is_on_its_way);
        build.streams.push(status);
        Opened {
            done: build.done.subscribe(),
            openings: build.openings,
        }
    }

    /// A call comes. True if a task that works on the calls has to be started.
    pub(super) fn add_call(&self, build_id: &str, event: LifecycleEvent) -> bool {
        let mut builds = self.builds.lock();
        let build = builds.entry(build_id.to_owned()).or_default();
        let streams = if event.opening {
            build.openings += 1;
            Vec::new()
        } else {
            build.streams.retain(is_on_its_way);
            build.streams.clone()
        };
        build.calls.push_back(Waiting { event, streams });
        !std::mem::replace(&mut build.worked_on, true)
    }

    /// The next call; after `None` the caller stops working on them.
    pub(super) fn next(&self, build_id: &str) -> Option<Waiting> {
        let mut builds = self.builds.lock();
        let build = builds.get_mut(build_id)?;
        let next = build.calls.pop_front();
        if next.is_none() {
            build.worked_on = false;
            drop(builds);
            self.prune(build_id);
        }
        next
    }

    /// An opening call is done with.
    pub(super) fn opened(&self, build_id: &str) {
        let builds = self.builds.lock();
        if let Some(build) = builds.get(build_id) {
            build.done.send_modify(|done| *done += 1);
        }
    }

    /// Forgets a build with nothing on its way.
    pub(super) fn prune(&self, build_id: &str) {
        let mut builds = self.builds.lock();
        if let Some(build) = builds.get_mut(build_id) {
            build.streams.retain(is_on_its_way);
            if build.streams.is_empty() && build.calls.is_empty() && !build.worked_on {
                builds.remove(build_id);
            }
        }
    }

    /// Whether anything is on its way.
    pub(super) fn any(&self) -> bool {
        let builds = self.builds.lock();
        builds.values().any(|build| {
            build.worked_on || !build.calls.is_empty() || build.streams.iter().any(is_on_its_way)
        })
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.builds.lock().len()
    }
}

fn is_on_its_way(stream: &watch::Receiver<ForwardStatus>) -> bool {
    // The second is of a forwarder that is gone.
    !stream.borrow().finished && stream.has_changed().is_ok()
}
