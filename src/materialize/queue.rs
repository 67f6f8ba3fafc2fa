//! Which blob is fetched next: two lanes, and packing of small blobs into batches. Plain data, no effects.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    hash::Hash,
};

use crate::{digest::Digest, output::Class};

/// One blob of one cache. `K` distinguishes caches.
type Key<K> = (K, Digest);

/// Blobs that wait to be fetched. A blob is in it once, however many outputs want it.
#[derive(Debug)]
pub(super) struct BlobQueue<K> {
    required: VecDeque<Key<K>>,
    optional: VecDeque<Key<K>>,
    /// The lane that each waiting blob counts in; an entry of a lane that disagrees is stale and skipped.
    lanes: HashMap<Key<K>, Class, foldhash::fast::RandomState>,
    /// How many of them count in the required lane.
    required_len: usize,
    /// Nothing of this class, or below, comes out.
    paused: Option<Class>,
}

impl<K: Copy + Eq + Hash> BlobQueue<K> {
    pub(super) fn new() -> Self {
        Self {
            required: VecDeque::new(),
            optional: VecDeque::new(),
            lanes: HashMap::default(),
            required_len: 0,
            paused: None,
        }
    }

    /// Keeps what is of this class, or below, until further notice.
    pub(super) fn pause(&mut self, up_to: Option<Class>) {
        self.paused = up_to;
    }

    /// Adds a blob, or moves it to the required lane if it waits in the optional one.
    pub(super) fn push(&mut self, cache: K, digest: &Digest, class: Class) {
        let key = (cache, digest.clone());
        let class = class.max(Class::Optional);
        match self.lanes.entry(key.clone()) {
            Entry::Occupied(lane) if *lane.get() >= class => return,
            Entry::Occupied(mut lane) => *lane.get_mut() = class,
            Entry::Vacant(lane) => {
                lane.insert(class);
            }
        }
        if class == Class::Required {
            self.required_len += 1;
        }
        match class {
            Class::Required => self.required.push_back(key),
            _ => self.optional.push_back(key),
        }
    }

    /// Takes a blob out, wherever it is.
    pub(super) fn remove(&mut self, cache: K, digest: &Digest) {
        self.take(&(cache, digest.clone()));
    }

    fn take(&mut self, key: &Key<K>) {
        if self.lanes.remove(key) == Some(Class::Required) {
            self.required_len -= 1;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lanes.is_empty()
    }

    /// Waiting blobs in each lane: required, optional.
    pub(super) fn depths(&self) -> (usize, usize) {
        (self.required_len, self.lanes.len() - self.required_len)
    }

    pub(super) fn len(&self) -> usize {
        self.lanes.len()
    }

    /// Takes the next blob that `fits`. Every look into the map is a miss of the processor's caches, so there is one
    /// for each blob.
    fn pop_if(&mut self, fits: impl Fn(&Key<K>) -> bool) -> Option<Key<K>> {
        for (class, queue) in [
            (Class::Required, &mut self.required),
            (Class::Optional, &mut self.optional),
        ] {
            if self.paused >= Some(class) {
                continue;
            }
            while let Some(key) = queue.pop_front() {
                let lane = match self.lanes.entry(key) {
                    Entry::Occupied(lane) if *lane.get() == class => lane,
                    // It was taken out, or moved up.
                    _ => continue,
                };
                if !fits(lane.key()) {
                    queue.push_front(lane.key().clone());
                    return None;
                }
                if class == Class::Required {
                    self.required_len -= 1;
                }
                return Some(lane.remove_entry().0);
            }
        }
        None
    }

    /// The next blob by itself.
    pub(super) fn pop(&mut self) -> Option<Key<K>> {
        self.pop_if(|_| true)
    }

    /// The next blobs of one cache, in the order in which they came, up to a sum of sizes and a count. At least one
    /// if any waits. Optional blobs fill up a batch only when no required ones are left.
    pub(super) fn pop_batch(&mut self, max_bytes: u64, max_count: usize) -> Option<(K, Vec<Digest>)> {
        let (cache, first) = self.pop()?;
        let mut bytes = first.size();
        let mut batch = vec![first];
        while batch.len() < max_count {
            let fits = |(of, next): &Key<K>| *of == cache && bytes + next.size() <= max_bytes;
            let Some((_, digest)) = self.pop_if(fits) else {
                break;
            };
            bytes += digest.size();
            batch.push(digest);
        }
        Some((cache, batch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DigestFunction;
    use proptest::prelude::*;

    fn digest(n: u32, size: u64) -> Digest {
        let hash = Digest::of(DigestFunction::Sha256, &n.to_le_bytes());
        Digest::new(DigestFunction::Sha256, hash.hash(), size).unwrap()
    }

    #[test]
    fn required_goes_before_optional_and_a_blob_can_move_up() {
        let mut queue = BlobQueue::new();
        queue.push((), &digest(1, 1), Class::Optional);
        queue.push((), &digest(2, 1), Class::Optional);
        queue.push((), &digest(3, 1), Class::Required);
        queue.push((), &digest(2, 1), Class::Required);
        queue.push((), &digest(3, 1), Class::Optional);
        assert_eq!(queue.depths(), (2, 1));
        let order: Vec<_> = std::iter::from_fn(|| queue.pop()).map(|(_, d)| d).collect();
        assert_eq!(order, [digest(3, 1), digest(2, 1), digest(1, 1)]);
        assert!(queue.is_empty());
    }

    #[test]
    fn what_is_paused_waits_and_moves_up_as_it_always_does() {
        let mut queue = BlobQueue::new();
        queue.push((), &digest(1, 1), Class::Optional);
        queue.push((), &digest(2, 1), Class::Required);
        queue.push((), &digest(3, 1), Class::Optional);
        let all = |queue: &mut BlobQueue<()>| {
            let batch = queue.pop_batch(10, 10);
            batch.map_or(Vec::new(), |(_, digests)| digests)
        };
        queue.pause(Some(Class::Required));
        assert_eq!(all(&mut queue), []);
        queue.pause(Some(Class::Optional));
        assert_eq!(all(&mut queue), [digest(2, 1)]);
        queue.push((), &digest(3, 1), Class::Required);
        assert_eq!(all(&mut queue), [digest(3, 1)]);
        assert_eq!((all(&mut queue), queue.len()), (Vec::new(), 1));
        queue.pause(None);
        assert_eq!(all(&mut queue), [digest(1, 1)]);
    }

    #[test]
    fn batches_stay_within_bytes_count_and_cache() {
        let mut queue = BlobQueue::new();
        for n in 0..5 {
            queue.push('a', &digest(n, 40), Class::Required);
        }
        queue.push('b', &digest(9, 1), Class::Required);
        let sizes: Vec<_> = std::iter::from_fn(|| queue.pop_batch(100, 10))
            .map(|(cache, batch)| (cache, batch.len()))
            .collect();
        assert_eq!(sizes, [('a', 2), ('a', 2), ('a', 1), ('b', 1)]);
        queue.push('a', &digest(1, 1000), Class::Required);
        assert_eq!(queue.pop_batch(100, 10).unwrap().1.len(), 1);
        for n in 0..5 {
            queue.push('a', &digest(n, 1), Class::Required);
        }
        assert_eq!(queue.pop_batch(100, 3).unwrap().1.len(), 3);
    }

    proptest! {
        /// Whatever is pushed comes out once; whatever is removed does not.
        #[test]
        fn nothing_is_lost_or_doubled(ops in prop::collection::vec((0u32..20, 0u8..3), 0..200)) {
            let mut queue = BlobQueue::new();
            let mut inside = std::collections::BTreeSet::new();
            for (n, op) in ops {
                match op {
                    0 => { queue.push(0, &digest(n, 1), Class::Optional); inside.insert(n); }
                    1 => { queue.push(0, &digest(n, 1), Class::Required); inside.insert(n); }
                    _ => { queue.remove(0, &digest(n, 1)); inside.remove(&n); }
                }
                prop_assert_eq!(queue.len(), inside.len());
            }
            let mut out = Vec::new();
            while let Some((_, batch)) = queue.pop_batch(7, 4) { out.extend(batch); }
            out.sort();
            let mut expected: Vec<_> = inside.into_iter().map(|n| digest(n, 1)).collect();
            expected.sort();
            prop_assert_eq!(out, expected);
        }
    }
}
