//! The connections to a cache.
//!
//! There are a few of them, since one connection is one flow to every queue and limit on the way, and each has large
//! fixed windows: a window divided by the round trip's time is the most that a stream can carry.

use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use parking_lot::Mutex;
use tonic::transport::Channel;

use super::RemoteOptions;
use crate::{
    digest::Digest,
    transport::{Connector, RemoteError},
};

/// Places in the table of who brought what.
const REMEMBERED: usize = 1 << 14;

/// A set of connections, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Connections(u64);

impl Connections {
    pub(crate) const fn insert(&mut self, index: usize) {
        self.0 |= 1 << index;
    }

    /// Every connection except for one.
    pub(crate) const fn all_but(line: Line) -> Self {
        Self(!(1 << line.index))
    }

    const fn contains(self, index: usize) -> bool {
        self.0 >> index & 1 == 1
    }
}

/// A connection that was picked, as it was then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) index: usize,
    generation: u32,
}

/// A place for a connection.
#[derive(Default)]
struct Slot {
    channel: Option<Channel>,
    /// Counts those that were given up.
    generation: u32,
}

/// The connections. Each is made when it is first needed, and again when it broke.
pub(crate) struct Pool {
    connector: Connector,
    slots: Vec<Mutex<Slot>>,
    next: AtomicUsize,
    /// Which connection last carried a digest, at the place that its hash says, plus one. Others fall on the same
    /// place and that does no harm: it is asked only after bytes that were wrong, and a wrong answer avoids a
    /// connection that need not be avoided.
    carried: Box<[AtomicU8]>,
}

impl Pool {
    /// Reads certificates and keys; connects nothing.
    ///
    /// # Errors
    /// As [`Connector::new`].
    pub(crate) fn new(options: &RemoteOptions) -> Result<Self, RemoteError> {
        Ok(Self {
            connector: Connector::new(&options.connect)?,
            slots: (0..options.connections().max(1))
                .map(|_| Mutex::default())
                .collect(),
            next: AtomicUsize::new(0),
            carried: (0..REMEMBERED).map(|_| AtomicU8::new(0)).collect(),
        })
    }

    /// The next connection in turn that is not to be avoided, or the next one when all are. Must be called within
    /// the runtime.
    pub(crate) fn pick(&self, avoid: Connections) -> (Line, Channel) {
        let count = self.slots.len();
        let start = self.next.fetch_add(1, Ordering::Relaxed);
        let index = (0..count)
            .map(|i| start.wrapping_add(i) % count)
            .find(|&i| !avoid.contains(i))
            .unwrap_or(start % count);
        let mut slot = self.slots[index].lock();
        let channel = slot.channel.get_or_insert_with(|| self.connector.channel());
        let channel = channel.clone();
        let generation = slot.generation;
        (Line { index, generation }, channel)
    }

    /// Gives a connection up on which nothing came in time: its peer may be gone without a word, and the next call on it
    /// would wait as long. What is under way on it may still end.
    pub(crate) fn give_up(&self, line: Line) {
        let mut slot = self.slots[line.index].lock();
        if slot.generation == line.generation {
            slot.channel = None;
            slot.generation = slot.generation.wrapping_add(1);
        }
    }

    /// Remembers who carried a digest.
    pub(crate) fn note(&self, digest: &Digest, index: usize) {
        // There are at most 64 connections.
        let stored = u8::try_from(index + 1).unwrap_or(0);
        self.carried[place(digest)].store(stored, Ordering::Relaxed);
    }

    /// The connections that last carried one of these digests.
    pub(crate) fn carriers<'a>(&self, digests: impl IntoIterator<Item = &'a Digest>) -> Connections {
        let mut found = Connections::default();
        for digest in digests {
            if let Some(index) = self.carried[place(digest)].load(Ordering::Relaxed).checked_sub(1) {
                found.insert(usize::from(index));
            }
        }
        found
    }
}

fn place(digest: &Digest) -> usize {
    match *digest.hash() {
        [a, b, ..] => usize::from(u16::from_le_bytes([a, b])) % REMEMBERED,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{digest::DigestFunction, transport::Endpoint};

    fn options(endpoint: &str) -> RemoteOptions {
        RemoteOptions::new(Endpoint::parse("--remote-cache", endpoint).unwrap())
    }

    #[tokio::test]
    async fn connections_take_turns_and_can_be_avoided() {
        let pool = Pool::new(&options("grpc://localhost:1")).unwrap();
        let turns: Vec<_> = (0..8)
            .map(|_| pool.pick(Connections::default()).0.index)
            .collect();
        assert_eq!(turns, [0, 1, 2, 3, 0, 1, 2, 3]);
        let digest = Digest::of(DigestFunction::Sha256, b"x");
        assert_eq!(pool.carriers([&digest]), Connections::default());
        pool.note(&digest, 0);
        let avoid = pool.carriers([&digest]);
        assert_eq!(pool.pick(avoid).0.index, 1);
        assert!((0..8).all(|_| pool.pick(avoid).0.index != 0));
    }

    #[tokio::test]
    async fn a_single_connection_serves_even_when_it_is_to_be_avoided() {
        let mut options = options("grpc://localhost:1");
        options.connections = Some(1);
        let pool = Pool::new(&options).unwrap();
        let mut avoid = Connections::default();
        avoid.insert(0);
        assert_eq!(pool.pick(avoid).0.index, 0);
    }

    #[tokio::test]
    async fn a_connection_is_given_up_once_and_the_next_one_is_new() {
        let pool = Pool::new(&options("grpc://localhost:1")).unwrap();
        let (line, _) = pool.pick(Connections::default());
        pool.give_up(line);
        let (fresh, _) = pool.pick(Connections::all_but(line));
        assert_eq!((fresh.index, fresh.generation), (line.index, line.generation + 1));
        // Others that waited on the old one don't take the new one away.
        pool.give_up(line);
        assert_eq!(pool.pick(Connections::all_but(line)).0, fresh);
    }
}
