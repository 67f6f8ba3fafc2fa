//! The handle on an upstream service.

use std::{sync::Arc, time::Duration};

use parking_lot::RwLock;
use tokio::sync::{mpsc, watch};
use tonic::metadata::MetadataMap;

use super::{
    backoff::RetryDelays,
    forward::Forwarder,
    health::Health,
    lifecycle::Caller,
    options::UpstreamOptions,
    order::{BuildCalls, LifecycleEvent},
    outgoing::{ForwardStatus, Outgoing},
    shared::{Credentials, Inner, Surroundings},
    supply::Supply,
    window::Room,
};
use crate::{builds::StreamKey, transport::RemoteError};

/// How long a connection may take that is only made to look at the service's certificate.
const CHECK: Duration = Duration::from_secs(3);

/// The client of an upstream service. Cheap to clone.
#[derive(Clone)]
pub struct Upstream {
    pub(super) inner: Arc<Inner>,
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
    pub(crate) fn take_credentials(&self, other: &Self) {
        *self.inner.credentials.write() = other.inner.credentials();
    }

    /// What distinguishes this service from another one.
    pub(crate) fn name(&self) -> String {
        self.inner.options.connect.endpoint.to_string()
    }

    /// Whether events can get there at all, as far as that shows without a call. A service that is not reached now may be later.
    ///
    /// # Errors
    /// When there are no credentials for it, or its certificate is not trusted; in words.
    pub(crate) async fn check(&self) -> Result<(), String> {
        let credentials = self.inner.credentials();
        let known = credentials.headers(&MetadataMap::new()).await;
        known.map_err(|status| status.message().to_owned())?;
        let refusal = tokio::time::timeout(CHECK, credentials.connector.refuses()).await;
        refusal.ok().flatten().map_or(Ok(()), Err)
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

    pub(super) fn forward_in(
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
