//! What all connections and streams of the service have in common.

use std::{sync::Arc, time::Duration};

use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Code, Status};

use super::{
    budget::Budget,
    counters::Counters,
    hold::HoldPolicy,
    limits::BesLimits,
    streams::Streams,
    upstream::{Surroundings, Upstream},
};
use crate::{
    builds::{Builds, Decoders},
    journal::Journal,
};

/// How the service behaves.
#[derive(Debug, Clone, PartialEq)]
pub struct BesOptions {
    /// How acknowledgements are delayed.
    pub hold: HoldPolicy,
    /// How long a lost client may take to come back before the engine learns that no more events come. Bazel's
    /// retries wait 1, 1.6, 2.6 and 4.1 seconds.
    pub reconnect_grace: Duration,
    /// How long a settled stream's task stays, so that a late reconnection needs no look into the journal.
    pub linger: Duration,
    /// Bytes of one stream's events in memory.
    pub stream_bytes: usize,
    /// Without a journal to overflow into, how long a reader waits for an engine that takes nothing before it goes
    /// on beyond `stream_bytes`.
    pub stall: Duration,
    /// What clients may ask for.
    pub limits: BesLimits,
}

impl Default for BesOptions {
    fn default() -> Self {
        Self {
            hold: HoldPolicy::default(),
            reconnect_grace: Duration::from_secs(15),
            linger: Duration::from_secs(300),
            stream_bytes: 32 << 20,
            stall: Duration::from_secs(30),
            limits: BesLimits::default(),
        }
    }
}

/// What every connection and stream shares.
pub(super) struct Context {
    pub(super) builds: Arc<dyn Builds>,
    pub(super) decoders: Decoders,
    pub(super) journal: Option<Journal>,
    pub(super) options: BesOptions,
    pub(super) counters: Arc<Counters>,
    pub(super) streams: Streams,
    /// Connections, streams and deliveries; they end at `shutdown`.
    pub(super) tasks: TaskTracker,
    pub(super) shutdown: CancellationToken,
    /// Cancelled when no client is to wait for outputs any more.
    pub(super) hurry: CancellationToken,
    /// Cancelled when no client that has lost its connection comes back.
    pub(super) clients_ended: CancellationToken,
    /// What takes events and calls upstream, if anything does.
    pub(super) upstream: Option<Upstream>,
    /// Bytes of events that may wait in memory for upstream, for all streams.
    pub(super) outgoing: Arc<Semaphore>,
    /// The same of streams without a journal, which is all there is of them.
    pub(super) unjournaled: Arc<Semaphore>,
    /// Memory for what clients send, until it has gone on.
    pub(super) budget: Budget,
    /// Forwarders; they end at `halt`, which comes a moment after `shutdown`.
    pub(super) forwards: TaskTracker,
    pub(super) halt: CancellationToken,
}

/// Bytes of events in memory that wait for upstream; the others are in the journal.
const OUTGOING: usize = 32 << 20;

impl Context {
    pub(super) fn new(
        builds: Arc<dyn Builds>,
        decoders: Decoders,
        journal: Option<Journal>,
        upstream: Option<Upstream>,
        options: BesOptions,
    ) -> Self {
        let limits = options.limits;
        Self {
            budget: Budget::new(limits.queue),
            builds,
            decoders,
            journal,
            options,
            counters: Arc::default(),
            streams: Streams::default(),
            tasks: TaskTracker::new(),
            shutdown: CancellationToken::new(),
            hurry: CancellationToken::new(),
            clients_ended: CancellationToken::new(),
            upstream,
            outgoing: Arc::new(Semaphore::new(OUTGOING)),
            unjournaled: Arc::new(Semaphore::new(limits.queue)),
            forwards: TaskTracker::new(),
            halt: CancellationToken::new(),
        }
    }

    /// What the tasks need that pass events on upstream.
    pub(super) fn surroundings(&self) -> Surroundings {
        Surroundings {
            builds: Arc::clone(&self.builds),
            hold: self.options.hold,
            counters: Arc::clone(&self.counters),
            shutdown: self.shutdown.clone(),
            forwards: self.forwards.clone(),
            halt: self.halt.clone(),
        }
    }

    /// Refuses one client that asks for more than there is for all; it may try again.
    pub(super) fn refused(&self, limit: &str, most: usize, what: &str) -> Status {
        Counters::add(&self.counters.refused);
        tracing::warn!(
            "refused a client: limit of {most} {what} reached (raise it with --limit={limit}=NUMBER)"
        );
        Status::resource_exhausted(format!(
            "limit of {most} {what} reached (raise it with --limit={limit}=NUMBER)"
        ))
    }

    /// The status for a message that did not arrive. One that is too large will be so again: `INVALID_ARGUMENT` keeps a
    /// build tool from trying.
    pub(super) fn received(&self, status: Status) -> Status {
        if status.code() != Code::OutOfRange {
            return status;
        }
        Counters::add(&self.counters.refused);
        let most = self.options.limits.message;
        tracing::warn!(
            "refused a request of more than {most} bytes (raise the limit with \
                        --limit=message-size=SIZE)"
        );
        Status::invalid_argument(format!(
            "the request exceeds the limit of {most} bytes (raise it with --limit=message-size=SIZE)"
        ))
    }

    /// How long a settled stream's task stays.
    pub(super) fn linger(&self) -> Duration {
        if self.streams.is_crowded(self.options.limits.streams) {
            Duration::ZERO
        } else {
            self.options.linger
        }
    }

    /// Whether little is left of the memory for events.
    pub(super) fn is_crowded(&self) -> bool {
        self.budget.is_crowded()
    }
}

pub(super) fn shutting_down() -> Status {
    Status::unavailable("outhaul is shutting down")
}
