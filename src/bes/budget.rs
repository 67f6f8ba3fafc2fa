//! Memory for what clients send: one budget for the whole process.
//!
//! Room is taken before a byte of a message is kept, and is given back when its bytes are. There are three shares, so
//! that what waits for one kind never waits for another: few large messages that never end must not hold back the many
//! small ones, and what is read back from the journal must not wait for clients.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How long an unfinished message may keep its room while others wait for some, beside a second for each mebibyte.
const PATIENCE: Duration = Duration::from_secs(10);

/// The budget. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Budget {
    shares: Arc<Shares>,
}

#[derive(Debug)]
struct Shares {
    small: Share,
    large: Share,
    again: Share,
}

#[derive(Debug)]
struct Share {
    free: Arc<Semaphore>,
    size: usize,
    /// Messages that wait for room.
    waiting: AtomicUsize,
}

/// Room that something takes; given back when this is dropped.
#[derive(Debug, Default)]
pub(crate) struct Room {
    small: Option<OwnedSemaphorePermit>,
    large: Option<OwnedSemaphorePermit>,
}

impl Share {
    fn new(size: usize) -> Self {
        let size = size.clamp(1, u32::MAX as usize);
        Self {
            free: Arc::new(Semaphore::new(size)),
            size,
            waiting: AtomicUsize::new(0),
        }
    }

    /// What is larger than the whole share takes all of it, so that it is alone.
    fn permits(&self, bytes: usize) -> u32 {
        u32::try_from(bytes.min(self.size)).unwrap_or(u32::MAX)
    }

    fn try_take(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let permits = self.permits(bytes);
        Arc::clone(&self.free).try_acquire_many_owned(permits).ok()
    }

    async fn take(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        if let Some(permit) = self.try_take(bytes) {
            return Some(permit);
        }
        let _waiting = Waiting::new(&self.waiting);
        // Never closed.
        let free = Arc::clone(&self.free);
        free.acquire_many_owned(self.permits(bytes)).await.ok()
    }
}

struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl Budget {
    /// A budget of this many bytes.
    pub(crate) fn new(bytes: usize) -> Self {
        Self {
            shares: Arc::new(Shares {
                small: Share::new(bytes / 4),
                large: Share::new(bytes / 2),
                again: Share::new(bytes / 4),
            }),
        }
    }

    fn share(&self, bytes: usize) -> &Share {
        if self.is_small(bytes) {
            &self.shares.small
        } else {
            &self.shares.large
        }
    }

    fn is_small(&self, bytes: usize) -> bool {
        bytes <= self.shares.small.size / 16
    }

    fn room(&self, bytes: usize, permit: Option<OwnedSemaphorePermit>) -> Room {
        if self.is_small(bytes) {
            Room {
                small: permit,
                large: None,
            }
        } else {
            Room {
                small: None,
                large: permit,
            }
        }
    }

    /// Room for a message, if there is some.
    pub(super) fn try_enter(&self, bytes: usize) -> Option<Room> {
        let permit = self.share(bytes).try_take(bytes)?;
        Some(self.room(bytes, Some(permit)))
    }

    /// Room for a message, as soon as there is some: first come, first served.
    pub(super) async fn enter(&self, bytes: usize) -> Room {
        let permit = self.share(bytes).take(bytes).await;
        self.room(bytes, permit)
    }

    /// Makes the room of a message larger: whether that can be done at once. Who has a whole share is alone in it, and
    /// needs no more.
    pub(super) fn grow(&self, room: &mut Room, bytes: usize) -> bool {
        let (share, permit) = match (&mut room.small, &mut room.large) {
            (Some(permit), _) => (&self.shares.small, permit),
            (None, Some(permit)) => (&self.shares.large, permit),
            (None, None) => return false,
        };
        let missing = bytes.min(share.size).saturating_sub(permit.num_permits());
        if missing == 0 {
            return true;
        }
        match share.try_take(missing) {
            Some(more) => {
                permit.merge(more);
                true
            }
            None => false,
        }
    }

    /// Room for what is read back from the journal.
    pub(super) async fn read_back(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        self.shares.again.take(bytes).await
    }

    /// Resolves when an unfinished message of this size that began now has kept its room for too long, and others wait
    /// for some. Its client may come again; who sends nothing must not keep others from it.
    pub(super) async fn overstayed(&self, bytes: usize) {
        let patience = PATIENCE + Duration::from_secs((bytes >> 20) as u64);
        tokio::time::sleep(patience).await;
        while self.share(bytes).waiting.load(Relaxed) == 0 {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// Whether little of it is left for small messages: what waits then does so in the journal.
    pub(super) fn is_crowded(&self) -> bool {
        let small = &self.shares.small;
        small.free.available_permits() < small.size / 2
    }

    /// Bytes that are taken now.
    #[cfg(test)]
    pub(crate) fn taken(&self) -> usize {
        let shares = [&self.shares.small, &self.shares.large, &self.shares.again];
        let taken = shares
            .iter()
            .map(|share| share.size.saturating_sub(share.free.available_permits()));
        taken.sum()
    }
}

impl Room {
    /// Whether some of it is of the share for large messages. None of that is kept by what could wait in the journal: who
    /// waits for all of it would wait for the engine.
    pub(super) const fn is_large(&self) -> bool {
        self.large.is_some()
    }

    pub(super) fn merge(&mut self, other: Self) {
        let join = |held: &mut Option<OwnedSemaphorePermit>, more| match (held.as_mut(), more) {
            (Some(held), Some(more)) => held.merge(more),
            (None, more) => *held = more,
            (Some(_), None) => {}
        };
        join(&mut self.small, other.small);
        join(&mut self.large, other.large);
    }
}

/// Room for events: in the budget of their connection, and in that of all.
pub(super) struct Reserved {
    pub(super) stream: Option<OwnedSemaphorePermit>,
    pub(super) all: Room,
}

impl Reserved {
    /// See [`Room::is_large`].
    pub(super) const fn is_large(&self) -> bool {
        self.all.is_large()
    }

    pub(super) fn merge(&mut self, other: Self) {
        match (&mut self.stream, other.stream) {
            (Some(held), Some(more)) => held.merge(more),
            (held, more) => *held = held.take().or(more),
        }
        self.all.merge(other.all);
    }
}

/// Bytes that a request of this size takes in memory, roughly.
pub(super) const fn weight(len: usize) -> usize {
    len + 256
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn room_is_counted_until_it_is_given_back_and_large_messages_leave_some_to_small_ones() {
        let budget = Budget::new(1 << 20);
        let first = budget.enter(300 << 10).await;
        assert_eq!(budget.taken(), 300 << 10);
        assert!(budget.try_enter(300 << 10).is_none(), "there is no more");
        let mut small: Vec<Room> = (0..16).filter_map(|_| budget.try_enter(16 << 10)).collect();
        assert_eq!(small.len(), 16);
        assert!(budget.try_enter(1).is_none());
        assert!(budget.is_crowded());
        let mut all = small.pop().unwrap();
        small.into_iter().for_each(|room| all.merge(room));
        all.merge(first);
        drop(all);
        assert_eq!(budget.taken(), 0);
        assert!(!budget.is_crowded());
    }

    #[tokio::test]
    async fn what_is_larger_than_the_budget_comes_in_alone() {
        let budget = Budget::new(1 << 20);
        let mut huge = budget.enter(100 << 20).await;
        assert!(budget.grow(&mut huge, 200 << 20), "it has all there is");
        assert!(budget.try_enter(1 << 20).is_none());
        assert!(
            budget.read_back(100 << 20).await.is_some(),
            "that waits for nobody"
        );
        drop(huge);
        let mut one = budget.enter(200 << 10).await;
        let two = budget.enter(200 << 10).await;
        assert!(!budget.grow(&mut one, 400 << 10));
        drop(two);
        assert!(budget.grow(&mut one, 400 << 10));
        assert_eq!(budget.taken(), 400 << 10);
    }

    #[tokio::test(start_paused = true)]
    async fn an_unfinished_message_keeps_its_room_until_others_wait() {
        let budget = Budget::new(1 << 20);
        let held = budget.enter(512 << 10).await;
        let day = Duration::from_secs(86_400);
        assert!(
            tokio::time::timeout(day, budget.overstayed(512 << 10))
                .await
                .is_err()
        );
        let waits = tokio::spawn({
            let budget = budget.clone();
            async move { budget.enter(512 << 10).await }
        });
        tokio::time::timeout(Duration::from_secs(20), budget.overstayed(512 << 10))
            .await
            .unwrap();
        drop(held);
        waits.await.unwrap();
    }
}
