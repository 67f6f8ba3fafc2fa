//! The way to another build event service: what came in goes out again, byte for byte, in order, and nothing is lost.
//!
//! Each stream has two tasks. One (`supply`) takes what the stream's intake hands over, reads back what is only in the
//! journal, holds completions until they are true (`gate`), points them to files on disk if that is wanted (`rewrite`),
//! and lets events into a window of bounded size. The other one (`forward`) sends what is in the window over as many
//! connections as it takes (`call`), and lets go of it when it is acknowledged. A build's lifecycle calls have a task of
//! their own (`lifecycle`), which keeps them before or behind the build's streams.
//!
//! An outage costs nobody anything but time: intake never waits for upstream, and what does not fit into the window
//! stays in the journal.

mod backoff;
mod builds;
mod call;
mod channel;
mod forward;
#[cfg(any(test, fuzzing))]
mod fuzz;
mod gate;
mod headers;
mod health;
mod lifecycle;
mod outgoing;
mod peek;
mod rewrite;
mod supply;
#[cfg(test)]
mod tests;
mod window;

use std::{
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use tokio::sync::{mpsc, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::Status;

use self::{
    backoff::RetryDelays, builds::BuildCalls, channel::Channels, forward::Forwarder, health::Health,
    lifecycle::Caller, supply::Supply, window::Room,
};
use super::{counters::Counters, hold::HoldPolicy, server::Shared};
use crate::{
    builds::{Builds, StreamKey},
    remote::{Endpoint, Header, RemoteError, RemoteOptions, auth::Auth},
};

#[cfg(any(test, fuzzing))]
pub(super) use fuzz::{
    blobs as fuzz_blobs, file_uri as fuzz_file_uri, kind as fuzz_kind, rewritten as fuzz_rewritten,
};
pub(in crate::bes) use lifecycle::LifecycleEvent;
pub(in crate::bes) use outgoing::{ForwardStatus, Outgoing, OutgoingEvent};

/// How to reach the upstream service, and what it is sent.
#[derive(Debug, Clone)]
pub struct UpstreamOptions {
    /// Where it listens.
    pub endpoint: Endpoint,
    /// Headers for every call; they take the place of the client's headers of the same names.
    pub headers: Vec<Header>,
    /// PEM file of the authorities that may sign the server's certificate, instead of the system's.
    pub tls_certificate: Option<PathBuf>,
    /// PEM file of our certificate.
    pub tls_client_certificate: Option<PathBuf>,
    /// PEM file of its key.
    pub tls_client_key: Option<PathBuf>,
    /// Credential helpers, as `[SCOPE=]PATH`.
    pub credential_helpers: Vec<String>,
    /// Whether forwarded events name files on disk instead of blobs, where they are there.
    pub rewrite_uris: bool,
    /// How long connecting may take, and then TLS.
    pub connect_timeout: Duration,
    /// How often a connection in use is pinged; the answer may take a third of that.
    pub keepalive: Duration,
    /// How long a lifecycle call may take. Bazel allows 15 s.
    pub call_timeout: Duration,
    /// How long upstream may take to close a stream that it has acknowledged to the end.
    pub close_timeout: Duration,
    /// Bytes of one stream's events in memory that upstream has not acknowledged. An event that is larger goes alone.
    pub window_bytes: usize,
    /// The wait after a first failure; each further one is 1.6 times as long. Bazel's are the same.
    pub first_retry: Duration,
    /// The longest wait.
    pub longest_retry: Duration,
}

impl UpstreamOptions {
    /// The defaults, for an endpoint.
    #[must_use]
    pub const fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            headers: Vec::new(),
            tls_certificate: None,
            tls_client_certificate: None,
            tls_client_key: None,
            credential_helpers: Vec::new(),
            rewrite_uris: false,
            connect_timeout: Duration::from_secs(10),
            keepalive: Duration::from_secs(60),
            call_timeout: Duration::from_secs(15),
            close_timeout: Duration::from_secs(10),
            window_bytes: 8 << 20,
            first_retry: Duration::from_secs(1),
            longest_retry: Duration::from_secs(60),
        }
    }
}

/// Settings of the upstream service that can't work; names the flag.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(transparent)]
pub struct UpstreamError(#[from] RemoteError);

/// The client of an upstream service. Cheap to clone.
#[derive(Clone)]
pub struct Upstream {
    inner: Arc<Inner>,
}

/// What all streams share.
struct Inner {
    options: UpstreamOptions,
    /// The headers and the certificates of the options, or newer ones.
    credentials: RwLock<Arc<Credentials>>,
    delays: RetryDelays,
    health: Health,
    calls: BuildCalls,
}

/// How upstream is told who we are.
struct Credentials {
    channels: Channels,
    auth: Auth,
}

impl Credentials {
    fn new(options: &UpstreamOptions) -> Result<Self, UpstreamError> {
        let mut remote = RemoteOptions::new(options.endpoint.clone());
        remote.headers.clone_from(&options.headers);
        remote.credential_helpers.clone_from(&options.credential_helpers);
        remote.workspace = std::env::current_dir().ok();
        Ok(Self {
            channels: Channels::new(options)?,
            auth: Auth::new(&remote)?,
        })
    }

    /// The user's headers, and those of a credential helper.
    async fn headers(&self) -> Result<Vec<Header>, Status> {
        match self.auth.headers().await {
            Ok((headers, _)) => Ok(headers),
            Err(error) => Err(Status::unauthenticated(error.to_string())),
        }
    }
}

impl Inner {
    fn credentials(&self) -> Arc<Credentials> {
        self.credentials
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// What is around a stream's tasks.
struct Surroundings {
    builds: Arc<dyn Builds>,
    hold: HoldPolicy,
    counters: Arc<Counters>,
    shutdown: CancellationToken,
    forwards: TaskTracker,
    halt: CancellationToken,
}

impl Surroundings {
    fn of(shared: &Shared) -> Self {
        Self {
            builds: Arc::clone(&shared.builds),
            hold: shared.options.hold,
            counters: Arc::clone(&shared.counters),
            shutdown: shared.shutdown.clone(),
            forwards: shared.forwards.clone(),
            halt: shared.halt.clone(),
        }
    }
}

impl Upstream {
    /// Reads certificates and keys; connects nothing.
    ///
    /// # Errors
    /// When an option can't work, naming its flag.
    pub fn new(options: UpstreamOptions) -> Result<Self, UpstreamError> {
        let inner = Inner {
            credentials: RwLock::new(Arc::new(Credentials::new(&options)?)),
            delays: RetryDelays::new(options.first_retry, options.longest_retry),
            health: Health::new(options.endpoint.to_string()),
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
        self.inner.options.endpoint.to_string()
    }

    /// Whether the last try to reach upstream, on whichever stream, was no failure.
    pub(in crate::bes) fn is_healthy(&self) -> bool {
        self.inner.health.is_good()
    }

    /// Whether anything is on its way: a stream that has not ended, or that upstream has not got to its end, or a call.
    pub(in crate::bes) fn has_undelivered(&self) -> bool {
        self.inner.calls.any()
    }

    /// Starts forwarding one stream's events behind the number `acked`. `save` keeps a newly acknowledged number; it may
    /// block for a moment, and is called every 100 ms at most and at the end.
    ///
    /// The forwarder ends when its queue is closed and everything in it was delivered, or at `halt`.
    pub(in crate::bes) fn forward(
        &self,
        shared: &Shared,
        key: &StreamKey,
        acked: i64,
        save: Arc<dyn Fn(i64) + Send + Sync>,
    ) -> (mpsc::UnboundedSender<Outgoing>, watch::Receiver<ForwardStatus>) {
        let room = Arc::new(Room::new(self.inner.options.window_bytes));
        self.forward_in(&Surroundings::of(shared), key, acked, save, room)
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
    pub(in crate::bes) fn lifecycle(&self, shared: &Shared, build_id: &str, event: LifecycleEvent) {
        self.lifecycle_in(&Surroundings::of(shared), build_id, event);
    }

    fn lifecycle_in(&self, around: &Surroundings, build_id: &str, event: LifecycleEvent) {
        if self.inner.calls.add_call(build_id, event) {
            let caller = Caller::new(Arc::clone(&self.inner), build_id);
            let halt = around.halt.clone();
            around
                .forwards
                .spawn(halt.run_until_cancelled_owned(caller.run()));
        }
    }
}
