//! Blobs in memory, spread over locks so that concurrent readers do not wait for one another.

use std::{
    collections::HashMap,
    sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use bytes::Bytes;

use crate::digest::Digest;

/// A power of two, well above the number of cores.
const SHARDS: usize = 64;

type Shard = RwLock<HashMap<Digest, Bytes>>;

/// A map from digest to bytes.
#[derive(Debug)]
pub(super) struct Memory {
    shards: Box<[Shard]>,
}

impl Memory {
    pub(super) fn new() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
        }
    }

    fn shard(&self, digest: &Digest) -> &Shard {
        // A hash's bytes are evenly spread already.
        &self.shards[usize::from(digest.hash()[0]) % SHARDS]
    }

    pub(super) fn put(&self, digest: Digest, bytes: Bytes) {
        write(self.shard(&digest)).insert(digest, bytes);
    }

    pub(super) fn get(&self, digest: &Digest) -> Option<Bytes> {
        read(self.shard(digest)).get(digest).cloned()
    }

    pub(super) fn contains(&self, digest: &Digest) -> bool {
        read(self.shard(digest)).contains_key(digest)
    }

    pub(super) fn remove(&self, digest: &Digest) -> bool {
        write(self.shard(digest)).remove(digest).is_some()
    }

    pub(super) fn clear(&self) {
        for shard in &self.shards {
            write(shard).clear();
        }
    }

    pub(super) fn digests(&self) -> Vec<Digest> {
        self.shards
            .iter()
            .flat_map(|shard| read(shard).keys().cloned().collect::<Vec<_>>())
            .collect()
    }

    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(|shard| read(shard).len()).sum()
    }
}

/// Takes a lock whose holder cannot leave the value half-changed, so that a panic elsewhere does no harm here.
pub(super) fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

/// The same for writing.
pub(super) fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}
