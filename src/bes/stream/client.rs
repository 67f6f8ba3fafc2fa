//! The client of a stream: its connections, and how long its last acknowledgement is held.

use bytes::Bytes;
use futures::FutureExt as _;
use tonic::Status;

use super::{
    super::{
        command::{Connection, Departure},
        counters::Counters,
        hold::{HoldMode, Release, Waited},
    },
    Phase, Stream, UPSTREAM_WAIT,
    waiting::{STOPPING, after},
};
use crate::builds::StreamEnd;

impl Stream {
    pub(super) fn attach(&mut self, connection: Connection) {
        if let Some(old) = &self.connection {
            Counters::add(&self.context.counters.takeovers);
            tracing::info!(stream = %self.key, old = old.id, new = connection.id, "another connection takes over");
            let _ = old
                .acks
                .send(Err(Status::aborted("another connection took over this stream")));
        }
        self.leave();
        self.intake.connected(connection.headers.clone());
        self.connection = Some(connection);
        self.had_client = true;
    }

    pub(super) fn gone(&mut self, id: u64, departure: Departure) {
        if self.connection.as_ref().is_none_or(|c| c.id != id) {
            return;
        }
        tracing::debug!(stream = %self.key, connection = id, ?departure, "connection's end");
        let open = matches!(self.phase, Phase::Open { .. });
        match departure {
            // Waits for what is held; without that, the client is done.
            Departure::HalfClosed if self.held.is_some() => {}
            Departure::HalfClosed => {
                self.leave();
                if open {
                    self.end(
                        StreamEnd::Broken("the client closed the stream without its last event".to_owned()),
                        None,
                    );
                }
            }
            Departure::Cancelled(why) => {
                self.leave();
                if open {
                    self.end(StreamEnd::Broken(why), None);
                }
            }
            Departure::Lost(lost) => {
                self.leave();
                if let Phase::Open { why, .. } = &mut self.phase {
                    *why = format!("the connection was lost: {lost}");
                    self.intake.let_go();
                }
            }
        }
    }

    /// The current connection is no more; what it waited for goes on without it.
    pub(super) fn leave(&mut self) {
        if let Some(connection) = self.connection.take() {
            connection.released.cancel();
        }
        if let Some(held) = self.held.take() {
            self.context.builds.held(&self.key, held.since.elapsed(), false);
        }
        match &mut self.phase {
            Phase::Open { give_up, .. } => *give_up = after(self.context.options.reconnect_grace),
            Phase::Settled { forget, .. } => *forget = after(self.context.linger()),
            Phase::Settling { .. } => {}
        }
    }

    /// Lets a waiting client go, if there is nothing more to wait for.
    pub(super) fn try_release(&mut self) {
        let Some(held) = &self.held else {
            // A connection may be there that has not sent its last event yet.
            return;
        };
        let policy = self.context.options.hold;
        let limit = self.intake.limit(&policy, held.counted_from);
        let overdue = held.counted_from.elapsed() >= limit.after;
        let is_hurried = self.context.hurry.is_cancelled();
        let may_stop = held.counted_from.elapsed() >= STOPPING;
        let is_stopped = may_stop && self.context.builds.stopped().now_or_never().is_some();
        let waited = match &self.phase {
            _ if policy.mode == HoldMode::None => None,
            Phase::Settled { settlement, .. } => {
                Some(settlement.as_ref().map_or(Waited::Unanswered, Waited::Settled))
            }
            Phase::Settling { .. } if is_hurried => None,
            Phase::Settling { .. } if overdue => Some(Waited::TimedOut(limit)),
            Phase::Settling { .. } if is_stopped => Some(Waited::Stopped),
            Phase::Settling { .. } => return,
            // Not reached: the event that finishes a stream ends this phase before it is acknowledged.
            Phase::Open { .. } => None,
        };
        let release = waited.as_ref().map_or(Release::Ack, |w| policy.release(w));
        let timed_out = matches!(waited, Some(Waited::TimedOut(_)));
        let stopped = matches!(waited, Some(Waited::Stopped));
        let goes_ahead = overdue || is_hurried || stopped;
        if waited.is_some() && release == Release::Ack && self.following.is_expected(held.ack.sequence_number)
        {
            if !goes_ahead && held.counted_from.elapsed() < UPSTREAM_WAIT {
                return;
            }
            if !stopped {
                tracing::warn!(
                    stream = %self.key,
                    "the upstream event service is slow; it gets the remaining events after the build has ended"
                );
            }
        }
        let (Some(held), Some(connection)) = (self.held.take(), self.connection.take()) else {
            return;
        };
        if timed_out {
            Counters::add(&self.context.counters.hold_timeouts);
            tracing::warn!(
                stream = %self.key,
                "stopped waiting for outputs after {limit}; downloads continue in the background"
            );
        }
        if stopped {
            tracing::info!(
                stream = %self.key,
                "the build does not wait for its outputs: downloads are paused (`outhaul pause --all`)"
            );
        }
        if waited.is_some() || is_hurried {
            self.context
                .builds
                .held(&self.key, held.since.elapsed(), timed_out);
        }
        let answer = match release {
            Release::Ack => Ok(held.ack),
            Release::Fail(message) => {
                Counters::add(&self.context.counters.strict_failures);
                Err(Status::failed_precondition(message))
            }
        };
        let _ = connection.acks.send(answer);
        connection.released.cancel();
    }

    /// The build tool has begun again under the same ids: no client comes back to this stream.
    pub(super) fn make_way(&mut self) {
        tracing::info!(stream = %self.key, attempt = self.key.attempt + 2, "the build tool started the stream \
                                                                            again with the same ids");
        if let Some(connection) = &self.connection {
            let _ = connection.acks.send(Err(Status::aborted(
                "another stream has started with the same ids",
            )));
        }
        self.leave();
        if matches!(self.phase, Phase::Open { .. }) {
            let why = "the build tool started the stream again with the same ids".to_owned();
            self.end(StreamEnd::Broken(why), None);
        }
    }

    /// Whether the stream has begun with another request of number 1 than this one. What is sent again after a lost
    /// connection is the same to the byte; a new attempt's has another time in it at least.
    pub(super) fn began_with_another(&self, request: &Bytes) -> bool {
        let first = self.first.or_else(|| self.intake.first());
        first.is_some_and(|first| first != blake3::hash(request))
    }
}
