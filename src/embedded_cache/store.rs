//! What the cache holds: blobs and action results.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read as _},
    os::unix::fs::FileExt as _,
    path::PathBuf,
    sync::Arc,
};

use bazel_remote_apis::build::bazel::remote::execution::v2::ActionResult;
use bytes::Bytes;
use parking_lot::RwLock;
use prost::Message as _;

use super::{
    directory::{Directory, Kind},
    memory::Memory,
};
use crate::digest::{Digest, DigestFunction};

/// The cache's content. A handle: clones share it, with one another and with the running server.
///
/// With a directory, the methods do blocking file I/O.
#[derive(Debug, Clone)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    function: DigestFunction,
    /// All blobs, or with a directory those that are not its files.
    memory: Memory,
    directory: Option<Directory>,
    /// All action results, or with a directory those whose file could not be written.
    actions: RwLock<HashMap<Digest, ActionResult>>,
}

/// A blob that can be read piece by piece.
#[derive(Debug, Clone)]
pub(super) enum Blob {
    Memory(Bytes),
    File(Arc<File>),
}

impl Store {
    /// An empty store in memory, whose [`Store::put`] uses this digest function.
    pub fn in_memory(function: DigestFunction) -> Self {
        Self(Arc::new(Inner {
            function,
            memory: Memory::new(),
            directory: None,
            actions: RwLock::default(),
        }))
    }

    /// A store of files below a directory, which is made if it is missing. What an earlier store left there is in it.
    ///
    /// # Errors
    /// When the directory cannot be made or written to.
    pub(crate) fn in_directory(function: DigestFunction, directory: PathBuf) -> io::Result<Self> {
        Ok(Self(Arc::new(Inner {
            function,
            memory: Memory::new(),
            directory: Some(Directory::open(directory)?),
            actions: RwLock::default(),
        })))
    }

    /// Puts a blob in, under the store's own digest function.
    pub fn put(&self, bytes: impl Into<Bytes>) -> Digest {
        self.put_with(self.0.function, bytes)
    }

    /// Puts a blob in, under a digest function of the caller's choice.
    ///
    /// If the directory cannot take it, it is held in memory.
    pub(crate) fn put_with(&self, function: DigestFunction, bytes: impl Into<Bytes>) -> Digest {
        let bytes = bytes.into();
        let digest = Digest::of(function, &bytes);
        if let Err(error) = self.try_put(&digest, &bytes) {
            tracing::warn!(%digest, %error, "embedded cache holds a blob in memory that it could not write");
            self.put_unverified(digest.clone(), bytes);
        }
        digest
    }

    /// Puts bytes in under a digest that need not be theirs: a cache whose content went bad. They are held in memory
    /// even by a store in a directory.
    pub fn put_unverified(&self, digest: Digest, bytes: impl Into<Bytes>) {
        self.0.memory.put(digest, bytes.into());
    }

    /// Puts a blob in whose digest the caller has checked.
    pub(super) fn try_put(&self, digest: &Digest, bytes: &Bytes) -> io::Result<()> {
        match &self.0.directory {
            Some(directory) => directory.put(Kind::Blob, digest, bytes),
            None => {
                self.0.memory.put(digest.clone(), bytes.clone());
                Ok(())
            }
        }
    }

    /// The blob's bytes, if the store has them. The empty blob is always there.
    pub fn get(&self, digest: &Digest) -> Option<Bytes> {
        let blob = self.blob(digest)?;
        blob.read(0, usize::try_from(blob.size(digest)).ok()?).ok()
    }

    pub(super) fn blob(&self, digest: &Digest) -> Option<Blob> {
        if digest.is_empty() {
            return Some(Blob::Memory(Bytes::new()));
        }
        if let Some(bytes) = self.0.memory.get(digest) {
            return Some(Blob::Memory(bytes));
        }
        let file = self.0.directory.as_ref()?.open_file(Kind::Blob, digest)?;
        Some(Blob::File(Arc::new(file)))
    }

    /// Whether the store has the blob.
    pub fn contains(&self, digest: &Digest) -> bool {
        digest.is_empty()
            || self.0.memory.contains(digest)
            || self.0.directory.as_ref().is_some_and(|d| d.contains(digest))
    }

    /// Takes a blob out, as an eviction would. Whether it was there.
    pub fn remove(&self, digest: &Digest) -> bool {
        let from_memory = self.0.memory.remove(digest);
        let directory = self.0.directory.as_ref();
        directory.is_some_and(|d| d.remove(Kind::Blob, digest)) || from_memory
    }

    /// Takes out every blob and every action result.
    pub fn clear(&self) {
        self.0.memory.clear();
        self.0.actions.write().clear();
        if let Some(directory) = &self.0.directory {
            directory.clear(Kind::Blob);
            directory.clear(Kind::Action);
        }
    }

    /// Digests of all blobs, in no order.
    pub fn digests(&self) -> Vec<Digest> {
        let mut all = self.0.memory.digests();
        all.extend(self.0.directory.iter().flat_map(Directory::digests));
        all
    }

    /// Number of blobs.
    pub fn len(&self) -> usize {
        self.0.memory.len() + self.0.directory.as_ref().map_or(0, |d| d.digests().len())
    }

    /// Whether there is no blob.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Puts an action's result in, replacing an earlier one. Its outputs are not looked at.
    pub fn put_action(&self, action: Digest, result: ActionResult) {
        if let Some(directory) = &self.0.directory {
            match directory.put(Kind::Action, &action, &result.encode_to_vec()) {
                Ok(()) => return,
                Err(error) => {
                    tracing::warn!(%action, %error, "embedded cache holds a result in memory that it could not write");
                }
            }
        }
        self.0.actions.write().insert(action, result);
    }

    /// An action's result, if the store has it.
    pub fn action(&self, action: &Digest) -> Option<ActionResult> {
        if let Some(result) = self.0.actions.read().get(action) {
            return Some(result.clone());
        }
        let mut file = self.0.directory.as_ref()?.open_file(Kind::Action, action)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).ok()?;
        ActionResult::decode(&*bytes).ok()
    }

    /// Takes an action's result out. Whether it was there.
    #[cfg(test)]
    pub(crate) fn remove_action(&self, action: &Digest) -> bool {
        let from_memory = self.0.actions.write().remove(action).is_some();
        let directory = self.0.directory.as_ref();
        directory.is_some_and(|d| d.remove(Kind::Action, action)) || from_memory
    }

    pub(super) fn directory(&self) -> Option<&Directory> {
        self.0.directory.as_ref()
    }
}

impl Blob {
    /// The bytes from `offset`, at most `length` of them. Without a copy when they are in memory.
    pub(super) fn read(&self, offset: u64, length: usize) -> io::Result<Bytes> {
        match self {
            Self::Memory(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                let end = start.saturating_add(length).min(bytes.len());
                Ok(bytes.slice(start..end))
            }
            Self::File(file) => {
                let mut buffer = vec![0; length];
                file.read_exact_at(&mut buffer, offset)?;
                Ok(buffer.into())
            }
        }
    }

    /// Whether reading it does file I/O.
    pub(super) const fn is_file(&self) -> bool {
        matches!(self, Self::File(_))
    }

    /// Its size, which for bytes put in unverified need not be the digest's.
    pub(super) fn size(&self, digest: &Digest) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File(_) => digest.size(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both() -> [(Store, Option<tempfile::TempDir>); 2] {
        let directory = tempfile::tempdir().unwrap();
        let on_disk = Store::in_directory(DigestFunction::Sha256, directory.path().into()).unwrap();
        [
            (Store::in_memory(DigestFunction::Sha256), None),
            (on_disk, Some(directory)),
        ]
    }

    #[test]
    fn what_is_put_is_there_until_it_is_removed() {
        for (store, _directory) in both() {
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
    }

    #[test]
    fn the_empty_blob_is_always_there() {
        for (store, _directory) in both() {
            let empty = Digest::of(DigestFunction::Sha256, b"");
            assert!(store.contains(&empty));
            assert_eq!(store.get(&empty).unwrap(), Bytes::new());
        }
    }

    #[test]
    fn a_hash_with_another_size_is_another_blob() {
        for (store, _directory) in both() {
            let digest = store.put(&b"hello"[..]);
            let longer = Digest::new(digest.function(), digest.hash(), 6).unwrap();
            assert!(!store.contains(&longer));
            assert_eq!(store.get(&longer), None);
        }
    }

    #[test]
    fn action_results_read_back() {
        for (store, _directory) in both() {
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

    #[test]
    fn a_directory_outlives_its_store() {
        let directory = tempfile::tempdir().unwrap();
        let open = || Store::in_directory(DigestFunction::Sha256, directory.path().into()).unwrap();
        let digest = open().put(&b"kept"[..]);
        open().put_action(digest.clone(), ActionResult::default());
        assert_eq!(open().get(&digest).unwrap(), &b"kept"[..]);
        assert!(open().action(&digest).is_some());
    }
}
