//! What the cache holds: blobs and action results.

use std::{collections::HashMap, sync::Arc};

use bazel_remote_apis::build::bazel::remote::execution::v2::ActionResult;
use bytes::Bytes;
use parking_lot::RwLock;

use super::memory::Memory;
use outhaul_digest::{Digest, DigestFunction};

/// The cache's content. A handle: clones share it, with one another and with the running server.
#[derive(Debug, Clone)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    function: DigestFunction,
    memory: Memory,
    actions: RwLock<HashMap<Digest, ActionResult>>,
}

impl Store {
    /// An empty store, whose [`Store::put`] uses this digest function.
    pub fn in_memory(function: DigestFunction) -> Self {
        Self(Arc::new(Inner {
            function,
            memory: Memory::new(),
            actions: RwLock::default(),
        }))
    }

    /// Puts a blob in, under the store's own digest function.
    pub fn put(&self, bytes: impl Into<Bytes>) -> Digest {
        self.put_with(self.0.function, bytes)
    }

    /// Puts a blob in, under a digest function of the caller's choice.
    pub fn put_with(&self, function: DigestFunction, bytes: impl Into<Bytes>) -> Digest {
        let bytes = bytes.into();
        let digest = Digest::of(function, &bytes);
        self.put_unverified(digest.clone(), bytes);
        digest
    }

    /// Puts bytes in under a digest that need not be theirs: a cache whose content went bad.
    pub fn put_unverified(&self, digest: Digest, bytes: impl Into<Bytes>) {
        self.0.memory.put(digest, bytes.into());
    }

    /// The blob's bytes, if the store has them. The empty blob is always there.
    pub fn get(&self, digest: &Digest) -> Option<Bytes> {
        if digest.is_empty() {
            return Some(Bytes::new());
        }
        self.0.memory.get(digest)
    }

    /// Whether the store has the blob.
    pub fn contains(&self, digest: &Digest) -> bool {
        digest.is_empty() || self.0.memory.contains(digest)
    }

    /// Takes a blob out, as an eviction would. Whether it was there.
    pub fn remove(&self, digest: &Digest) -> bool {
        self.0.memory.remove(digest)
    }

    /// Takes out every blob and every action result.
    pub fn clear(&self) {
        self.0.memory.clear();
        self.0.actions.write().clear();
    }

    /// Digests of all blobs, in no order.
    pub fn digests(&self) -> Vec<Digest> {
        self.0.memory.digests()
    }

    /// Number of blobs.
    pub fn len(&self) -> usize {
        self.0.memory.len()
    }

    /// Whether there is no blob.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Puts an action's result in, replacing an earlier one. Its outputs are not looked at.
    pub fn put_action(&self, action: Digest, result: ActionResult) {
        self.0.actions.write().insert(action, result);
    }

    /// An action's result, if the store has it.
    pub fn action(&self, action: &Digest) -> Option<ActionResult> {
        self.0.actions.read().get(action).cloned()
    }

    /// Takes an action's result out. Whether it was there.
    pub fn remove_action(&self, action: &Digest) -> bool {
        self.0.actions.write().remove(action).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> Store {
        Store::in_memory(DigestFunction::Sha256)
    }

    #[test]
    fn what_is_put_is_there_until_it_is_removed() {
        let store = store();
        let digest = store.put(&b"hello"[..]);
        assert_eq!(digest, Digest::of(DigestFunction::Sha256, b"hello"));
        let other = store.put_with(DigestFunction::Blake3, &b"hello"[..]);
        assert_ne!(digest, other);
        assert_eq!(store.get(&digest).unwrap(), &b"hello"[..]);
        assert_eq!(store.len(), 2);
        let mut all = store.digests();
        all.sort();
        let mut expected = vec![digest.clone(), other.clone()];
        expected.sort();
        assert_eq!(all, expected);
        assert!(store.remove(&digest));
        assert!(!store.remove(&digest));
        assert!(!store.contains(&digest));
        assert!(store.contains(&other));
        store.clear();
        assert!(store.is_empty());
    }

    #[test]
    fn the_empty_blob_is_always_there() {
        let store = store();
        let empty = Digest::of(DigestFunction::Sha256, b"");
        assert!(store.contains(&empty));
        assert_eq!(store.get(&empty).unwrap(), Bytes::new());
    }

    #[test]
    fn a_hash_with_another_size_is_another_blob() {
        let store = store();
        let digest = store.put(&b"hello"[..]);
        let longer = Digest::new(digest.function(), digest.hash(), 6).unwrap();
        assert!(!store.contains(&longer));
        assert_eq!(store.get(&longer), None);
    }

    #[test]
    fn action_results_read_back() {
        let store = store();
        let action = Digest::of(DigestFunction::Sha256, b"action");
        assert_eq!(store.action(&action), None);
        let result = ActionResult {
            exit_code: 3,
            ..ActionResult::default()
        };
        store.put_action(action.clone(), result.clone());
        assert_eq!(store.action(&action), Some(result));
        assert!(store.remove_action(&action));
        assert_eq!(store.action(&action), None);
    }
}
