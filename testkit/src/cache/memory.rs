//! Blobs in memory, spread over locks so that concurrent readers do not wait for one another.

use std::collections::HashMap;

use bytes::Bytes;
use parking_lot::RwLock;

use outhaul_digest::Digest;

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
        self.shard(&digest).write().insert(digest, bytes);
    }

    pub(super) fn get(&self, digest: &Digest) -> Option<Bytes> {
        self.shard(digest).read().get(digest).cloned()
    }

    pub(super) fn contains(&self, digest: &Digest) -> bool {
        self.shard(digest).read().contains_key(digest)
    }

    pub(super) fn remove(&self, digest: &Digest) -> bool {
        self.shard(digest).write().remove(digest).is_some()
    }

    pub(super) fn clear(&self) {
        for shard in &self.shards {
            shard.write().clear();
        }
    }

    pub(super) fn digests(&self) -> Vec<Digest> {
        self.shards
            .iter()
            .flat_map(|shard| shard.read().keys().cloned().collect::<Vec<_>>())
            .collect()
    }

    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.read().len()).sum()
    }
}
