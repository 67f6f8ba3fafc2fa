//! The way to another build event service: what came in goes out again, byte for byte, in order, and nothing is lost.
//!
//! Each stream has two tasks. One (`supply`) takes what the stream's intake hands over, reads back what is only in the
//! journal, holds completions until they are true (`gate`), points them to files on disk if that is wanted (`rewrite`),
//! and lets events into a window of bounded size. The other one (`forward`) sends what is in the window over as many
//! connections as it takes (`call`), and lets go of it when it is acknowledged. A build's lifecycle calls have a task
//! of their own (`lifecycle`), which keeps them before or after the build's streams.
//!
//! An outage costs nothing but time: intake never waits for upstream, and what does not fit into the window
//! stays in the journal.

mod backoff;
mod call;
mod forward;
#[cfg(any(test, fuzzing))]
mod fuzz;
mod gate;
mod headers;
mod health;
mod lifecycle;
mod options;
mod order;
mod outgoing;
mod peek;
mod rewrite;
mod shared;
mod supply;
#[cfg(test)]
mod tests;
mod window;

use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::{mpsc, watch};

use self::{
    backoff::RetryDelays,
    forward::Forwarder,
    health::Health,
    lifecycle::Caller,
    order::BuildCalls,
    shared::{Credentials, Inner},
    supply::Supply,
    window::Room,
};
use crate::{builds::StreamKey, transport::RemoteError};

#[cfg(any(test, fuzzing))]
pub(super) use fuzz::{
    blobs as fuzz_blobs, file_uri as fuzz_file_uri, kind as fuzz_kind, rewritten as fuzz_rewritten,
};
pub use options::UpstreamOptions;
pub(in crate::bes) use order::LifecycleEvent;
pub(in crate::bes) use outgoing::{ForwardStatus, Outgoing, OutgoingEvent};
pub(in crate::bes) use shared::Surroundings;

/// The client of an upstream service. Cheap to clone.
#[derive(Clone)]
pub struct Upstream {
    inner: Arc<Inner>,
}

impl Upstream {
    /// Reads certificates and keys; connects nothing.
    ///
    /// # Errors
    /// When an option cannot work, naming its flag.
    pub fn new(options: UpstreamOptions) -> Result<Self, RemoteError> {
        let inner = Inner {
            credentials: RwLock::new(Arc::new(Credentials::new(&options)?)),
            delays: RetryDelays::new(options.first_retry, options.longest_retry),
            health: Health::new(options.connect.endpoint.to_string()),
            calls: BuildCalls::default(),
            options,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Takes over the headers and certificates of another client of the same service, for connections and calls from now
    /// on. Nothing else of it.
    pub fn take_credentials(&self, other: &Self) {
        *self
            .inner
            .credentials
            .write()
            .unwrap_or_else(PoisonError::into_inner) = other.inner.credentials();
    }

    /// What tells this service from another one.
    pub(crate) fn name(&self) -> String {
        self.inner.options.connect.endpoint.to_string()
    }

    /// Whether the last try to reach upstream, on whichever stream, was no failure.
    pub(in crate::bes) fn is_healthy(&self) -> bool {
        self.inner.health.is_good()
    }

    /// Whether anything is on its way: a stream that has not ended, or that upstream has not got to its end, or a call.
    pub(in crate::bes) fn has_undelivered(&self) -> bool {
        self.inner.calls.any()
    }

    /// Starts forwarding one stream's events after the number `acked`. `save` keeps a newly acknowledged number; it may
    /// block for a moment, and is called every 100 ms at most and at the end.
    ///
    /// The forwarder ends when its queue is closed and everything in it was delivered, or at `halt`.
    pub(in crate::bes) fn forward(
        &self,
        around: &Surroundings,
        key: &StreamKey,
        acked: i64,
        save: Arc<dyn Fn(i64) + Send + Sync>,
    ) -> (mpsc::UnboundedSender<Outgoing>, watch::Receiver<ForwardStatus>) {
        let room = Arc::new(Room::new(self.inner.options.window_bytes));
        self.forward_in(around, key, acked, save, room)
    }

    fn forward_in(
        &self,
        around: &Surroundings,
        key: &StreamKey,
        acked: i64,
        save: Arc<dyn Fn(i64) + Send + Sync>,
        room: Arc<Room>,
    ) -> (mpsc::UnboundedSender<Outgoing>, watch::Receiver<ForwardStatus>) {
        let (queue, outgoing) = mpsc::unbounded_channel();
        let (status, following) = watch::channel(ForwardStatus {
            acked,
            finished: false,
            healthy: self.is_healthy(),
        });
        let opened = self.inner.calls.add_stream(&key.build_id, following.clone());
        let (supply, ready) = Supply::new(around, &self.inner, key, acked, outgoing, Arc::clone(&room));
        let forwarder = Forwarder::new(around, &self.inner, key, status, save, ready, room);
        let halt = around.halt.clone();
        around
            .forwards
            .spawn(halt.run_until_cancelled_owned(supply.run()));
        around.forwards.spawn(forwarder.run(opened, around.halt.clone()));
        (queue, following)
    }

    /// Takes one of a build's lifecycle calls, in order, and drops it when upstream has it or will never take it.
    pub(in crate::bes) fn lifecycle(&self, around: &Surroundings, build_id: &str, event: LifecycleEvent) {
        if self.inner.calls.add_call(build_id, event) {
            let caller = Caller::new(Arc::clone(&self.inner), build_id);
            let halt = around.halt.clone();
            around
                .forwards
                .spawn(halt.run_until_cancelled_owned(caller.run()));
        }
    }
}
