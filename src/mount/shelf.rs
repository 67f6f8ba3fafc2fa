//! Which blobs the store holds, and which of them make way for others. Plain data: nothing here touches the disk.

use std::collections::{BTreeMap, HashMap};

use crate::digest::Digest;

/// What a file takes on disk is a multiple of this.
const BLOCK: u64 = 4096;

/// What is known of a blob's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kept {
    /// There is none as yet.
    Nothing,
    /// One that was there when the store was opened: its bytes are not known to be right.
    Found,
    /// A verified one, which looked like this.
    Whole {
        /// Its inode.
        inode: u64,
        /// When it or its attributes were changed last, in nanoseconds. Nobody can set that.
        ctime_ns: i64,
    },
}

#[derive(Debug)]
struct Item {
    kept: Kept,
    /// How many need it now: readers, and the one that fetches it.
    held: u32,
    /// When it was used last.
    used_at: u64,
}

/// The store's contents.
#[derive(Debug)]
pub(super) struct Shelf {
    bound: u64,
    used: u64,
    /// Counts uses.
    clock: u64,
    items: HashMap<Digest, Item>,
    /// Those that nobody needs now, least recently used first.
    idle: BTreeMap<u64, Digest>,
}

/// What a blob takes on disk.
pub(super) const fn cost(digest: &Digest) -> u64 {
    let size = if digest.size() == 0 { 1 } else { digest.size() };
    size.div_ceil(BLOCK).saturating_mul(BLOCK)
}

impl Shelf {
    /// An empty one for this many bytes.
    pub(super) fn new(bound: u64) -> Self {
        Self {
            bound,
            used: 0,
            clock: 0,
            items: HashMap::new(),
            idle: BTreeMap::new(),
        }
    }

    /// Bytes that are taken, of how many.
    pub(super) const fn filled(&self) -> (u64, u64) {
        (self.used, self.bound)
    }

    /// Takes in a file that is there; the ones that make way for it.
    pub(super) fn found(&mut self, digest: Digest) -> Vec<Digest> {
        let evicted = self.hold(&digest).unwrap_or_default();
        if self.items.contains_key(&digest) {
            self.set(&digest, Kept::Found);
            self.release(&digest);
            return evicted;
        }
        vec![digest]
    }

    /// Holds a blob, for which others make way if it is not here yet: their files are to be removed. `None` if even then
    /// there is no room for it.
    pub(super) fn hold(&mut self, digest: &Digest) -> Option<Vec<Digest>> {
        if let Some(item) = self.items.get_mut(digest) {
            if item.held == 0 {
                self.idle.remove(&item.used_at);
            }
            item.held += 1;
            return Some(Vec::new());
        }
        let cost = cost(digest);
        let fits = |used: u64| used.saturating_add(cost) <= self.bound;
        let mut left = self.used;
        let mut evicted = Vec::new();
        for idle in self.idle.values() {
            if fits(left) {
                break;
            }
            left -= self::cost(idle);
            evicted.push(idle.clone());
        }
        if !fits(left) {
            return None;
        }
        for digest in &evicted {
            self.remove(digest);
        }
        self.used += cost;
        let item = Item {
            kept: Kept::Nothing,
            held: 1,
            used_at: 0,
        };
        self.items.insert(digest.clone(), item);
        Some(evicted)
    }

    /// What is known of the file of a blob.
    pub(super) fn kept(&self, digest: &Digest) -> Kept {
        self.items.get(digest).map_or(Kept::Nothing, |item| item.kept)
    }

    /// Notes what is known of the file of a blob that is held.
    pub(super) fn set(&mut self, digest: &Digest, kept: Kept) {
        if let Some(item) = self.items.get_mut(digest) {
            item.kept = kept;
        }
    }

    /// Lets go of a blob. It stays as long as there is room, if it has a file.
    pub(super) fn release(&mut self, digest: &Digest) {
        let Some(item) = self.items.get_mut(digest).filter(|item| item.held > 0) else {
            return;
        };
        item.held -= 1;
        if item.held > 0 {
            return;
        }
        self.clock += 1;
        item.used_at = self.clock;
        let is_kept = item.kept != Kept::Nothing;
        self.idle.insert(self.clock, digest.clone());
        if !is_kept {
            self.remove(digest);
        }
    }

    /// Makes room for this many bytes on a full disk: the ones that make way, whose files are to be removed. None if all of
    /// them would not be enough.
    pub(super) fn make_way(&mut self, bytes: u64) -> Vec<Digest> {
        let (mut evicted, mut freed) = (Vec::new(), 0);
        for idle in self.idle.values() {
            if freed >= bytes {
                break;
            }
            freed += cost(idle);
            evicted.push(idle.clone());
        }
        if freed < bytes {
            return Vec::new();
        }
        for digest in &evicted {
            self.remove(digest);
        }
        evicted
    }

    fn remove(&mut self, digest: &Digest) {
        if let Some(item) = self.items.remove(digest) {
            self.idle.remove(&item.used_at);
            self.used -= cost(digest);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::digest::DigestFunction;

    const WHOLE: Kept = Kept::Whole {
        inode: 1,
        ctime_ns: 1,
    };

    /// One of this many blocks.
    fn blob(n: u8, blocks: u64) -> Digest {
        Digest::new(DigestFunction::Md5, &[n; 16], blocks * BLOCK).unwrap()
    }

    fn put(shelf: &mut Shelf, digest: &Digest) -> Option<Vec<Digest>> {
        let evicted = shelf.hold(digest)?;
        shelf.set(digest, WHOLE);
        shelf.release(digest);
        Some(evicted)
    }

    #[test]
    fn the_least_recently_used_make_way() {
        let [a, b, c, d] = [blob(1, 1), blob(2, 1), blob(3, 1), blob(4, 2)];
        let mut shelf = Shelf::new(3 * BLOCK);
        for digest in [&a, &b, &c, &a] {
            assert_eq!(put(&mut shelf, digest), Some(Vec::new()));
        }
        assert_eq!(put(&mut shelf, &d), Some(vec![b.clone(), c]));
        assert_eq!((shelf.kept(&a), shelf.kept(&b)), (WHOLE, Kept::Nothing));
        assert_eq!(shelf.filled(), (3 * BLOCK, 3 * BLOCK));
    }

    #[test]
    fn what_is_needed_stays_and_nothing_goes_in_vain() {
        let [open, idle, large] = [blob(1, 2), blob(2, 1), blob(3, 2)];
        let mut shelf = Shelf::new(3 * BLOCK);
        put(&mut shelf, &open);
        put(&mut shelf, &idle);
        assert_eq!(shelf.hold(&open), Some(Vec::new()));
        assert_eq!(shelf.hold(&large), None);
        assert_eq!(shelf.kept(&idle), WHOLE);
        assert_eq!(shelf.make_way(2 * BLOCK), []);
        assert_eq!(shelf.kept(&idle), WHOLE);
        assert_eq!(shelf.make_way(BLOCK), [idle]);
        assert_eq!(shelf.kept(&open), WHOLE);
        shelf.release(&open);
        assert_eq!(shelf.hold(&large), Some(vec![open]));
    }

    #[test]
    fn what_failed_to_come_takes_no_room() {
        let mut shelf = Shelf::new(2 * BLOCK);
        let digest = blob(1, 2);
        for _ in 0..3 {
            assert_eq!(shelf.hold(&digest), Some(Vec::new()));
            assert_eq!(shelf.hold(&digest), Some(Vec::new()));
            shelf.release(&digest);
            shelf.release(&digest);
            assert_eq!(shelf.filled().0, 0);
        }
    }

    #[test]
    fn what_is_found_beyond_the_bound_makes_way() {
        let mut shelf = Shelf::new(2 * BLOCK);
        assert!(shelf.found(blob(1, 1)).is_empty());
        assert!(shelf.found(blob(2, 1)).is_empty());
        assert_eq!(shelf.found(blob(3, 1)), [blob(1, 1)]);
        assert_eq!(shelf.found(blob(4, 5)), [blob(4, 5)]);
        assert_eq!(shelf.kept(&blob(2, 1)), Kept::Found);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Hold(u8),
        Release(usize),
        Fail(u8),
        MakeWay(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0..12_u8).prop_map(Step::Hold),
            3 => any::<usize>().prop_map(Step::Release),
            1 => (0..12_u8).prop_map(Step::Fail),
            1 => (0..20 * BLOCK).prop_map(Step::MakeWay),
        ];
        proptest::collection::vec(step, 0..200)
    }

    proptest! {
        #[test]
        fn the_bound_holds_and_what_is_held_stays(steps in steps(), bound in 1..20_u64) {
            let mut shelf = Shelf::new(bound * BLOCK);
            let mut held: Vec<Digest> = Vec::new();
            for step in steps {
                match step {
                    Step::Hold(n) => {
                        let digest = blob(n, u64::from(n % 5));
                        if let Some(evicted) = shelf.hold(&digest) {
                            prop_assert!(evicted.iter().all(|gone| !held.contains(gone)));
                            shelf.set(&digest, WHOLE);
                            held.push(digest);
                        } else {
                            let needed: u64 = held.iter().collect::<std::collections::HashSet<_>>()
                                .into_iter().map(cost).sum();
                            prop_assert!(needed + cost(&digest) > bound * BLOCK);
                        }
                    }
                    Step::Release(n) if !held.is_empty() => {
                        let digest = held.swap_remove(n % held.len());
                        shelf.release(&digest);
                    }
                    Step::Release(_) => {}
                    Step::Fail(n) => {
                        let digest = blob(n, u64::from(n % 5));
                        if !held.contains(&digest) && shelf.hold(&digest).is_some() {
                            shelf.set(&digest, Kept::Nothing);
                            shelf.release(&digest);
                            prop_assert_eq!(shelf.kept(&digest), Kept::Nothing);
                        }
                    }
                    Step::MakeWay(bytes) => {
                        let evicted = shelf.make_way(bytes);
                        prop_assert!(evicted.iter().all(|gone| !held.contains(gone)));
                    }
                }
                let (used, most) = shelf.filled();
                prop_assert!(used <= most);
                prop_assert_eq!(used, shelf.items.keys().map(cost).sum::<u64>());
                prop_assert!(held.iter().all(|digest| shelf.kept(digest) == WHOLE));
                let idle = shelf.items.values().filter(|item| item.held == 0).count();
                prop_assert_eq!(idle, shelf.idle.len());
            }
        }
    }
}
