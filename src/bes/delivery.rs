//! Hands a stream's events to the engine, in order, at the engine's pace.
//!
//! The queue is unbounded in items but bounded in memory: an item either holds room of the stream's byte budget, or
//! is only the place of a frame in the journal, from where the events are read when their turn comes.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::{
    budget::{Budget, Reserved},
    counters::Counters,
    hold::Patience,
};
use crate::{
    bep::event::{Event, StreamEvent},
    builds::{Builds, Decoder, StreamEnd, StreamKey},
    journal::StoredFrame,
};

/// An event's number and the bytes of its `build_event_stream.BuildEvent`.
pub(super) type RawEvent = (i64, Bytes);

pub(super) enum Work {
    /// Events in memory, with their room in the budget.
    Events {
        events: Vec<RawEvent>,
        room: Option<Reserved>,
    },
    /// Events in the journal.
    Journaled(StoredFrame),
    /// What comes next is beyond a limit, for this reason.
    Limited(String),
    /// Events before this number, from the other one on, did not come.
    Missing { from: i64, before: i64 },
    /// The client's connection was lost.
    Lost,
    /// No more events. The answer comes once the engine knows.
    Ended {
        end: StreamEnd,
        done: oneshot::Sender<()>,
    },
}

/// One stream's delivery task.
pub(super) struct Delivery {
    pub(super) key: StreamKey,
    pub(super) builds: Arc<dyn Builds>,
    pub(super) decoder: Decoder,
    pub(super) patience: Patience,
    pub(super) counters: Arc<Counters>,
    /// Memory for what is read back.
    pub(super) budget: Budget,
    /// Undecodable events of this stream so far.
    pub(super) undecodable: u64,
}

/// Events that the engine is handed at once, at most; fewer if they come to this many bytes.
const AT_ONCE: usize = 64;
const BYTES_AT_ONCE: usize = 256 << 10;
/// How many undecodable events of a stream are logged.
const LOGGED: u64 = 3;

impl Delivery {
    /// Works until the queue is closed and empty, or `stop`.
    pub(super) async fn run(mut self, mut queue: mpsc::UnboundedReceiver<Work>, stop: CancellationToken) {
        stop.run_until_cancelled(async {
            while let Some(work) = queue.recv().await {
                self.handle(work).await;
            }
        })
        .await;
    }

    async fn handle(&mut self, work: Work) {
        match work {
            Work::Events { events, room } => {
                self.deliver(events).await;
                drop(room);
            }
            Work::Limited(reason) => self.builds.limited(&self.key, reason).await,
            Work::Missing { from, before } => {
                let last = before.saturating_sub(1);
                let reason = format!("events {from} to {last} did not come; they may name outputs");
                self.builds.events(&self.key, vec![(last, skipped(reason))]).await;
            }
            Work::Journaled(place) => {
                // Until its events are handed over.
                let _room = self.budget.read_back(place.at.weight()).await;
                let read = tokio::task::spawn_blocking(move || {
                    place.read().map(|records| {
                        let events = records.into_iter();
                        let events = events.filter_map(|r| Some((r.sequence, r.build_event()?)));
                        events.collect::<Vec<_>>()
                    })
                });
                match read.await {
                    Ok(Ok(events)) => self.deliver(events).await,
                    Ok(Err(error)) => {
                        tracing::error!(stream = %self.key, %error, "failed to read events back from the \
                                                                     journal; they are lost");
                        let reason = format!("failed to read events back from the journal: {error}");
                        self.builds.limited(&self.key, reason).await;
                    }
                    Err(error) => tracing::error!(stream = %self.key, %error, "failed to read the journal"),
                }
            }
            Work::Lost => self.builds.lost(&self.key).await,
            Work::Ended { end, done } => {
                self.builds.ended(&self.key, end).await;
                let _ = done.send(());
            }
        }
    }

    /// Decoded events hold no room of the budget, and one may name thousands of files: they are handed over in pieces
    /// of which the engine's queue takes only a few.
    async fn deliver(&mut self, events: Vec<RawEvent>) {
        let mut events = events.into_iter();
        loop {
            let piece = piece(&mut events);
            if piece.is_empty() {
                return;
            }
            let mut decoded = Vec::with_capacity(piece.len());
            for (sequence, bytes) in piece {
                match (self.decoder)(&bytes) {
                    Ok(event) => {
                        self.patience.learn(&event.event);
                        decoded.push((sequence, event));
                    }
                    Err(error) => decoded.push((sequence, self.skipped(sequence, &error))),
                }
            }
            if !decoded.is_empty() {
                self.builds.events(&self.key, decoded).await;
            }
        }
    }

    /// Counts an event that cannot be decoded, and logs the first of them.
    fn skipped(&mut self, sequence: i64, error: &dyn std::fmt::Display) -> StreamEvent {
        Counters::add(&self.counters.undecodable);
        self.undecodable += 1;
        if self.undecodable <= LOGGED {
            tracing::warn!(stream = %self.key, sequence, %error, "skipped an event that cannot be decoded");
        }
        skipped(format!(
            "event {sequence} cannot be decoded ({error}); it may name outputs"
        ))
    }
}

/// What stands for events that the engine does not get.
const fn skipped(reason: String) -> StreamEvent {
    StreamEvent {
        event: Event::Skipped(reason),
        last: false,
    }
}

/// Takes what is handed over at once; nothing when nothing is left.
fn piece(events: &mut impl Iterator<Item = RawEvent>) -> Vec<RawEvent> {
    let mut piece = Vec::new();
    let mut size = 0;
    while piece.len() < AT_ONCE && size < BYTES_AT_ONCE {
        let Some(event) = events.next() else { break };
        size += event.1.len();
        piece.push(event);
    }
    piece
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_bounded_in_events_and_in_bytes() {
        let pieces = |sizes: &[usize]| {
            let mut events = (1..).zip(sizes.iter().map(|&size| Bytes::from(vec![0; size])));
            let mut lengths = Vec::new();
            loop {
                match piece(&mut events).len() {
                    0 => return lengths,
                    length => lengths.push(length),
                }
            }
        };
        assert!(pieces(&[]).is_empty());
        assert_eq!(pieces(&[100; 150]), [64, 64, 22]);
        // One that is larger than all of it goes as well.
        let half = BYTES_AT_ONCE / 2;
        assert_eq!(
            pieces(&[half, half, 10 * half, 1, half - 1, half, 1]),
            [2, 1, 3, 1]
        );
    }
}
