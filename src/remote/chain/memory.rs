//! Which stores of a chain gave a blob its bytes, and which of them gave wrong ones.

use std::collections::HashMap;

use parking_lot::Mutex;

use crate::digest::Digest;

/// Blobs of which it is known who gave them last. More are not between a store and the disk at once.
const GIVEN: usize = 1 << 16;
/// Blobs of which it is known who gave them wrong: all that are on their way may be.
const WRONG: usize = GIVEN;

/// Stores of a chain, a bit for each.
pub(super) type Stores = u64;

/// The bit of the store with this number.
pub(super) const fn bit(store: usize) -> Stores {
    // There are never as many: `Chain::MOST` says so.
    1_u64 << (store % 64)
}

/// Bounded: the oldest is forgotten.
#[derive(Debug, Default)]
pub(super) struct Memory {
    given: Mutex<Recent<Given>>,
    wrong: Mutex<Recent<Wrong>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Given {
    by: Stores,
    last: usize,
    /// The bytes have been found to be wrong.
    is_blamed: bool,
}

#[derive(Debug, Clone, Copy, Default)]
struct Wrong {
    once: Stores,
    twice: Stores,
}

/// What a store is to be asked for a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trust {
    /// As usual.
    Full,
    /// Once more, on another connection.
    Doubted,
    /// Not at all.
    None,
}

impl Memory {
    /// A blob's bytes came from these, and the rest of them from `last`.
    pub(super) fn gave(&self, digest: &Digest, by: Stores, last: usize) {
        let given = Given {
            by: by | bit(last),
            last,
            is_blamed: false,
        };
        self.given.lock().put(digest, given, GIVEN);
    }

    /// Who gave a blob's bytes, or the last of them.
    pub(super) fn last(&self, digest: &Digest) -> Option<usize> {
        self.given.lock().get(digest).map(|given| given.last)
    }

    /// No store has given a blob whole: nobody is to blame any more, and asking again brings nothing.
    pub(super) fn gave_up(&self, digest: &Digest) {
        let mut recent = self.given.lock();
        recent.newer.remove(digest);
        recent.older.remove(digest);
    }

    /// The bytes that were given last are wrong. Gives those that are to blame, which is nobody if that was known; `None`
    /// when it is not known any more who gave them.
    pub(super) fn blame(&self, digest: &Digest) -> Option<Stores> {
        let mut recent = self.given.lock();
        let given = recent.get(digest)?;
        if given.is_blamed {
            return Some(0);
        }
        let blamed = Given {
            is_blamed: true,
            ..given
        };
        recent.put(digest, blamed, GIVEN);
        drop(recent);
        self.doubt(digest, given.by);
        Some(given.by)
    }

    /// These stores gave something that is not the blob.
    pub(super) fn doubt(&self, digest: &Digest, stores: Stores) {
        let mut recent = self.wrong.lock();
        let wrong = recent.get(digest).unwrap_or_default();
        let wrong = Wrong {
            once: wrong.once | stores,
            twice: wrong.twice | (wrong.once & stores),
        };
        recent.put(digest, wrong, WRONG);
    }

    /// What is known of a store's bytes for a blob.
    pub(super) fn trust(&self, digest: &Digest, store: usize) -> Trust {
        match self.wrong.lock().get(digest) {
            Some(wrong) if wrong.twice & bit(store) != 0 => Trust::None,
            Some(wrong) if wrong.once & bit(store) != 0 => Trust::Doubted,
            _ => Trust::Full,
        }
    }
}

/// A map that forgets: when the newer half is full, the older one goes.
#[derive(Debug, Default)]
struct Recent<T> {
    newer: HashMap<Digest, T>,
    older: HashMap<Digest, T>,
}

impl<T: Copy> Recent<T> {
    fn get(&self, digest: &Digest) -> Option<T> {
        // Mostly there is nothing at all that is wrong.
        if self.newer.is_empty() && self.older.is_empty() {
            return None;
        }
        let found = self.newer.get(digest).or_else(|| self.older.get(digest));
        found.copied()
    }

    fn put(&mut self, digest: &Digest, value: T, most: usize) {
        if self.newer.len() >= most && !self.newer.contains_key(digest) {
            self.older = std::mem::take(&mut self.newer);
        }
        self.newer.insert(digest.clone(), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DigestFunction;

    fn digest(number: usize) -> Digest {
        Digest::of(DigestFunction::Sha256, &number.to_le_bytes())
    }

    #[test]
    fn who_gave_wrong_bytes_is_doubted_and_then_not_asked() {
        let memory = Memory::default();
        let blob = digest(0);
        assert_eq!(memory.blame(&blob), None, "nobody gave it");
        for trust in [Trust::Doubted, Trust::None] {
            memory.gave(&blob, bit(2), 1);
            assert_eq!(memory.last(&blob), Some(1));
            assert_eq!(memory.blame(&blob), Some(bit(1) | bit(2)));
            assert_eq!(
                memory.blame(&blob),
                Some(0),
                "several may wait for the same bytes"
            );
            assert_eq!(memory.trust(&blob, 1), trust);
            assert_eq!(memory.trust(&blob, 2), trust);
        }
        assert_eq!(memory.trust(&blob, 0), Trust::Full);
        assert_eq!(memory.trust(&digest(1), 1), Trust::Full);
    }

    #[test]
    fn the_oldest_is_forgotten() {
        let memory = Memory::default();
        for number in 0..3 * WRONG {
            memory.doubt(&digest(number), bit(0));
        }
        assert_eq!(memory.trust(&digest(0), 0), Trust::Full);
        assert_eq!(memory.trust(&digest(3 * WRONG - 1), 0), Trust::Doubted);
        let recent = memory.wrong.lock();
        assert!(recent.newer.len() + recent.older.len() <= 2 * WRONG);
    }
}
