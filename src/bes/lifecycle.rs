//! Lifecycle calls on their way upstream.
//!
//! A build tool makes them one by one and fails when they fail, so they are answered at once. Upstream gets them as
//! long as this process lives: they are kept in memory only.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use bytes::Bytes;
use tokio::sync::watch;

use super::counters::Counters;
use crate::{
    bep::wire::{
        Malformed,
        bes::{build_event as event, publish_lifecycle_event_request},
    },
    journal::received::Ordered,
};

/// Counts the calls that upstream has not received.
pub(super) struct Lifecycle {
    /// Their weights, see [`Pending`].
    pending: watch::Sender<usize>,
    /// Whether the log says that there are too many.
    overflowing: AtomicBool,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self {
            pending: watch::Sender::new(0),
            overflowing: AtomicBool::new(false),
        }
    }
}

/// Held while a call waits for upstream.
pub(super) struct Pending {
    pending: watch::Sender<usize>,
    /// How many calls this one counts as. They are small; of large ones, fewer may wait.
    weight: usize,
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.pending.send_modify(|pending| *pending -= self.weight);
    }
}

impl Lifecycle {
    /// Counts a call until the answer is dropped.
    pub(super) fn count(&self, request: &Bytes) -> Pending {
        let (pending, weight) = (self.pending.clone(), 1 + request.len() / (4 << 10));
        pending.send_modify(|pending| *pending += weight);
        Pending { pending, weight }
    }

    /// Whether one more call may wait for upstream. If not, it is counted as dropped. The log reports the first one,
    /// and again after half of those that waited have gone.
    pub(super) fn has_room(&self, counters: &Counters, most: usize) -> bool {
        let waiting = *self.pending.borrow();
        if waiting <= most / 2 {
            self.overflowing.store(false, Relaxed);
        }
        if waiting < most {
            return true;
        }
        Counters::add(&counters.lifecycle_dropped);
        if !self.overflowing.swap(true, Relaxed) {
            tracing::warn!(
                "{most} lifecycle events are waiting for upstream: dropping further ones (raise the limit with \
                 --limit=lifecycle-calls=NUMBER)"
            );
        }
        false
    }

    /// Waits until upstream has all calls.
    pub(super) async fn drained(&self) {
        // The sender is ours, so it cannot be gone.
        let _ = self.pending.subscribe().wait_for(|pending| *pending == 0).await;
    }
}

/// A lifecycle call.
#[derive(Debug, Clone)]
pub(super) struct Call {
    pub(super) build_id: String,
    pub(super) invocation_id: String,
    /// For the log.
    pub(super) name: &'static str,
    /// Whether it goes before the build's streams.
    pub(super) opening: bool,
}

impl Call {
    pub(super) fn read(request: &[u8]) -> Result<Self, Malformed> {
        let event = Ordered::find(request, publish_lifecycle_event_request::BUILD_EVENT)?.unwrap_or_default();
        let id = event.stream_id.unwrap_or_default();
        let (name, opening) = match event.payload {
            event::BUILD_ENQUEUED => ("build enqueued", true),
            event::INVOCATION_ATTEMPT_STARTED => ("invocation attempt started", true),
            event::INVOCATION_ATTEMPT_FINISHED => ("invocation attempt finished", false),
            event::BUILD_FINISHED => ("build finished", false),
            _ => ("other", true),
        };
        Ok(Self {
            build_id: id.build_id,
            invocation_id: id.invocation_id,
            name,
            opening,
        })
    }
}
