//! What upstream has not acknowledged: the events that are kept to be sent again, within bounds.

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use bytes::Bytes;
use tokio::sync::Notify;

/// What an event takes besides its bytes, roughly.
const OVERHEAD: usize = 128;

/// Until upstream has taken something, there is room for this many bytes only: many streams may wait for one that is
/// down.
const UNTRIED: usize = 256 << 10;

/// The bytes of one stream's window.
pub(super) struct Room {
    most: usize,
    limit: AtomicUsize,
    held: AtomicUsize,
    /// The most that ever was in it, without the overhead of one event that is too large and goes alone.
    #[cfg(test)]
    pub(super) peak: AtomicUsize,
    freed: Notify,
    /// A forwarder waits for room.
    wanted: AtomicBool,
}

impl Room {
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            limit: AtomicUsize::new(most.min(UNTRIED)),
            held: AtomicUsize::new(0),
            #[cfg(test)]
            peak: AtomicUsize::new(0),
            freed: Notify::new(),
            wanted: AtomicBool::new(false),
        }
    }

    /// Gives twice as much room, if a forwarder waits for it. For a service that acknowledges nothing before it has
    /// everything, as some do: what does not get in would never be acknowledged.
    pub(super) fn grow(&self) {
        if self.wanted.load(Ordering::Acquire) {
            let limit = self.limit.load(Ordering::Acquire);
            self.limit.store(limit.saturating_mul(2), Ordering::Release);
            self.freed.notify_one();
        }
    }

    pub(super) const fn weight(request: &Bytes) -> usize {
        request.len() + OVERHEAD
    }

    /// Takes room if there is enough, or if all of it is free: what is too large goes alone. Only one task enters.
    pub(super) fn try_enter(&self, weight: usize) -> bool {
        let held = self.held.load(Ordering::Acquire);
        if held > 0 && held + weight > self.limit.load(Ordering::Acquire) {
            return false;
        }
        let _held = self.held.fetch_add(weight, Ordering::AcqRel) + weight;
        #[cfg(test)]
        self.peak.fetch_max(_held, Ordering::AcqRel);
        true
    }

    /// Waits for room.
    pub(super) async fn enter(&self, weight: usize) {
        loop {
            // Registered by `notify_one`, which keeps a permit for anyone who comes a moment late.
            if self.try_enter(weight) {
                self.wanted.store(false, Ordering::Release);
                return;
            }
            self.wanted.store(true, Ordering::Release);
            self.freed.notified().await;
        }
    }

    pub(super) fn leave(&self, weight: usize) {
        self.held.fetch_sub(weight, Ordering::AcqRel);
        self.freed.notify_one();
    }

    /// Upstream takes events, or does not.
    pub(super) fn widen(&self, works: bool) {
        let limit = if works { self.most } else { self.most.min(UNTRIED) };
        if self.limit.swap(limit, Ordering::AcqRel) < limit {
            self.freed.notify_one();
        }
    }
}

/// An event in the window.
pub(super) struct Kept {
    pub(super) sequence: i64,
    pub(super) request: Bytes,
    /// Whether it is the stream's last.
    pub(super) last: bool,
    /// What it takes of the room.
    pub(super) weight: usize,
}

/// An acknowledgement that is not of the oldest event that was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum AckError {
    #[error("upstream acknowledged event {sequence}, expected {due}")]
    OutOfOrder { sequence: i64, due: i64 },
    #[error("upstream acknowledged event {0}, but no acknowledgement was expected")]
    Unexpected(i64),
}

/// The events that upstream has not acknowledged, in order.
#[derive(Default)]
pub(super) struct Window {
    events: VecDeque<Kept>,
    /// How many of them were sent on this connection.
    sent: usize,
}

impl Window {
    pub(super) fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    pub(super) fn push(&mut self, event: Kept) {
        self.events.push_back(event);
    }

    /// A new connection: everything is to be sent again.
    pub(super) const fn rewind(&mut self) {
        self.sent = 0;
    }

    /// The next one to send on this connection.
    pub(super) fn unsent(&self) -> Option<&Kept> {
        self.events.get(self.sent)
    }

    /// Whether all of them were sent on this connection, and none is acknowledged.
    pub(super) fn is_all_sent(&self) -> bool {
        !self.events.is_empty() && self.sent == self.events.len()
    }

    pub(super) fn sent(&mut self) {
        self.sent = self.events.len().min(self.sent + 1);
    }

    /// Takes an acknowledgement, which must be of the oldest event that was sent.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn ack(&mut self, sequence: i64) -> Result<Kept, AckError> {
        match self.events.front().filter(|_| self.sent > 0).map(|e| e.sequence) {
            Some(due) if due == sequence => {}
            Some(due) => return Err(AckError::OutOfOrder { sequence, due }),
            None => return Err(AckError::Unexpected(sequence)),
        }
        self.sent -= 1;
        self.events.pop_front().ok_or(AckError::Unexpected(sequence))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn kept(sequence: i64) -> Kept {
        Kept {
            sequence,
            request: Bytes::new(),
            last: false,
            weight: 1,
        }
    }

    #[test]
    fn acknowledgements_are_in_order_and_of_what_was_sent() {
        let mut window = Window::default();
        for sequence in [5, 6, 7] {
            window.push(kept(sequence));
        }
        assert!(window.ack(5).is_err(), "not sent");
        window.sent();
        window.sent();
        assert!(window.ack(6).is_err() && window.ack(4).is_err(), "out of order");
        assert_eq!(window.ack(5).unwrap().sequence, 5);
        assert_eq!(window.unsent().unwrap().sequence, 7);
        window.rewind();
        assert_eq!(window.unsent().unwrap().sequence, 6);
        assert!(window.ack(6).is_err(), "not sent on this connection");
        for sequence in [6, 7] {
            window.sent();
            assert_eq!(window.ack(sequence).unwrap().sequence, sequence);
        }
        assert!(window.is_empty() && window.ack(7).is_err());
    }

    #[tokio::test]
    async fn what_is_too_large_goes_alone() {
        let room = Arc::new(Room::new(100));
        assert!(room.try_enter(500) && !room.try_enter(1));
        let waiting = tokio::spawn({
            let room = Arc::clone(&room);
            async move {
                room.enter(60).await;
                room.enter(60).await;
            }
        });
        room.leave(500);
        while room.held.load(Ordering::Acquire) == 0 {
            tokio::task::yield_now().await;
        }
        room.leave(60);
        waiting.await.unwrap();
        assert_eq!(room.peak.load(Ordering::Acquire), 500);
    }

    #[test]
    fn there_is_little_room_until_upstream_has_taken_something() {
        let room = Room::new(16 << 20);
        assert!(room.try_enter(UNTRIED - 10) && !room.try_enter(20));
        room.widen(true);
        assert!(room.try_enter(20));
        room.widen(false);
        assert!(!room.try_enter(20));
    }
}
