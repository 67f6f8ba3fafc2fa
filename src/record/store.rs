//! sled, with bytes in and bytes out: trees, pages of keys, batches. Every call is shielded.
//!
//! sled 0.34.7's own flusher is off: the record's writer flushes. Its `flush` reaches the page cache and is told to
//! the disk, but is no promise against a power cut; the record may lose its newest rows there, and so may be deleted
//! altogether.

mod blocks;
mod compact;
mod packed;
mod unfinished;

use std::{io, ops::Bound, path::Path};

pub(super) use blocks::{Span, open as open_block, whole};
pub(super) use compact::exchange;
use rand::random;

use super::{
    error::StoreError,
    shield::shield,
    value::{decode_root, seal, unseal},
};
use crate::proto::outhaul::v1::RecordMeta;

/// Version of the trees and their keys.
pub(super) const SCHEMA: u32 = 2;

/// sled's own default is 1 GiB.
const CACHE_BYTES: u64 = 64 << 20;

/// Rows that go into sled at once: larger batches hold readers up for longer.
const ROWS_PER_BATCH: usize = 1000;

/// The size that a value of many rows may grow to. sled keeps up to sixteen values in a page and rewrites it every so
/// often; a page of more than 128 KiB would become a file of its own.
const MAX_VALUE: usize = 6 << 10;

const META_KEY: &[u8] = b"meta";

/// The record's trees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TreeId {
    /// Number of a root, big endian → `RecordRoot`.
    Roots,
    /// Number of a root, big endian, directory, NUL, and name → a block of rows, from that one on.
    Outputs,
    /// Length of the invocation id, the id, and the target → `RecordTarget`, many in one value.
    Targets,
    /// Invocation id → `RecordInvocation`.
    Invocations,
    /// Complement of the start time and invocation id → nothing: newest first.
    ByStart,
}

impl TreeId {
    /// In the order in which a batch is applied: what others point to comes first.
    pub(super) const ALL: [Self; 5] = [
        Self::Roots,
        Self::Outputs,
        Self::Targets,
        Self::Invocations,
        Self::ByStart,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Roots => "roots",
            Self::Outputs => "outputs",
            Self::Targets => "targets",
            Self::Invocations => "invocations",
            Self::ByStart => "invocations_by_start",
        }
    }
}

impl TreeId {
    const fn is_packed(self) -> bool {
        matches!(self, Self::Targets)
    }
}

const META_TREE: &str = "meta";

/// What a store's directory held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing, or no rows: it has been recreated.
    Fresh,
    /// A record.
    Existing,
}

/// An open store. Dropping it flushes, which can take its time.
pub(super) struct Store {
    /// `None` only while dropping.
    open: Option<Open>,
    identity: String,
}

struct Open {
    db: sled::Db,
    trees: [sled::Tree; TreeId::ALL.len()],
}

impl Drop for Store {
    fn drop(&mut self) {
        let open = self.open.take();
        let closed = shield(|| {
            drop(open);
            Ok(())
        });
        if let Err(error) = closed {
            tracing::debug!(%error, "the record's store did not close cleanly");
        }
    }
}

/// A key and its value, or `None` to remove it.
pub(super) type Change = (Vec<u8>, Option<Vec<u8>>);

impl Store {
    /// Opens or makes a store and checks that it is one of ours.
    pub(super) fn open(dir: &Path, now_ms: i64) -> Result<(Self, Found), StoreError> {
        shield(|| {
            unfinished::remove(dir);
            let db = config(dir).open().map_err(sort)?;
            refuse_foreign(&db)?;
            let meta_tree = db.open_tree(META_TREE).map_err(sort)?;
            let mut trees = Vec::with_capacity(TreeId::ALL.len());
            for id in TreeId::ALL {
                trees.push(db.open_tree(id.name()).map_err(sort)?);
            }
            let trees = <[sled::Tree; TreeId::ALL.len()]>::try_from(trees)
                .map_err(|_| StoreError::Damaged("missing tree".into()))?;
            let (meta, found) = match meta_tree.get(META_KEY).map_err(sort)? {
                Some(value) => (check_meta(&value)?, Found::Existing),
                None => (make_meta(&meta_tree, &trees, now_ms)?, Found::Fresh),
            };
            touch(&trees)?;
            if found == Found::Fresh {
                db.flush().map_err(sort)?;
            }
            let open = Some(Open { db, trees });
            Ok((
                Self {
                    open,
                    identity: meta.identity,
                },
                found,
            ))
        })
    }

    /// Changes when the store is recreated.
    pub(super) fn identity(&self) -> &str {
        &self.identity
    }

    fn open_db(&self) -> Result<&Open, StoreError> {
        self.open
            .as_ref()
            .ok_or_else(|| StoreError::Unavailable("the store is closed".into()))
    }

    fn tree(&self, id: TreeId) -> Result<&sled::Tree, StoreError> {
        Ok(&self.open_db()?.trees[id as usize])
    }

    /// Reads several keys of a tree, in their order.
    pub(super) fn get_many<'a>(
        &self,
        id: TreeId,
        keys: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<Vec<Option<sled::IVec>>, StoreError> {
        shield(|| {
            let tree = self.tree(id)?;
            if id.is_packed() {
                return packed::get_many(tree, keys);
            }
            keys.into_iter().map(|key| tree.get(key).map_err(sort)).collect()
        })
    }

    /// Reads up to `limit` entries whose keys begin with `prefix`, from `start` on.
    pub(super) fn page(
        &self,
        id: TreeId,
        prefix: &[u8],
        start: Bound<&[u8]>,
        limit: usize,
    ) -> Result<Vec<(sled::IVec, sled::IVec)>, StoreError> {
        shield(|| {
            let tree = self.tree(id)?;
            if id.is_packed() {
                return packed::page(tree, prefix, start, limit);
            }
            let mut page = Vec::new();
            for entry in tree.range::<&[u8], _>((start, Bound::Unbounded)).take(limit) {
                let (key, value) = entry.map_err(sort)?;
                if !key.starts_with(prefix) {
                    break;
                }
                page.push((key, value));
            }
            Ok(page)
        })
    }

    /// Applies changes to one tree. Not atomic as a whole, only in batches.
    pub(super) fn apply<'a>(
        &self,
        id: TreeId,
        changes: impl IntoIterator<Item = (&'a Vec<u8>, &'a Option<Vec<u8>>)>,
    ) -> Result<(), StoreError> {
        shield(|| {
            let tree = self.tree(id)?;
            if id.is_packed() {
                return packed::apply(tree, changes);
            }
            let mut changes = changes.into_iter().peekable();
            while changes.peek().is_some() {
                let some = changes.by_ref().take(ROWS_PER_BATCH);
                let some = some.map(|(key, value)| (&key[..], value.as_deref()));
                tree.apply_batch(batch_of(some)).map_err(sort)?;
            }
            Ok(())
        })
    }

    /// Hands everything applied to the system.
    pub(super) fn flush(&self) -> Result<(), StoreError> {
        shield(|| self.open_db()?.db.flush().map(drop).map_err(sort))
    }

    /// Bytes on disk.
    pub(super) fn size_on_disk(&self) -> Result<u64, StoreError> {
        shield(|| self.open_db()?.db.size_on_disk().map_err(sort))
    }
}

fn config(dir: &Path) -> sled::Config {
    sled::Config::new()
        .path(dir)
        .cache_capacity(CACHE_BYTES)
        .flush_every_ms(None)
}

/// Changes as sled takes them: a key and its value, or none to remove it.
fn batch_of<T: Into<sled::IVec>>(changes: impl IntoIterator<Item = (T, Option<T>)>) -> sled::Batch {
    let mut batch = sled::Batch::default();
    for (key, value) in changes {
        match value {
            Some(value) => batch.insert(key, value),
            None => batch.remove(key),
        }
    }
    batch
}

/// Reads both ends of every tree and all roots: damage there shows itself now rather than in a build.
fn touch(trees: &[sled::Tree; TreeId::ALL.len()]) -> Result<(), StoreError> {
    for tree in trees {
        tree.first().map_err(sort)?;
        tree.last().map_err(sort)?;
    }
    for root in &trees[TreeId::Roots as usize] {
        let (_, value) = root.map_err(sort)?;
        decode_root(&value).map_err(|e| StoreError::Damaged(format!("value of a root: {e}")))?;
    }
    Ok(())
}

/// Fails for a sled database of somebody else.
fn refuse_foreign(db: &sled::Db) -> Result<(), StoreError> {
    let foreign = |what: &str| Err(StoreError::Damaged(format!("contains another program's {what}")));
    if db.iter().next().transpose().map_err(sort)?.is_some() {
        return foreign("rows");
    }
    for name in db.tree_names() {
        let ours = name == META_TREE.as_bytes()
            || name == b"__sled__default"
            || TreeId::ALL.iter().any(|id| name == id.name().as_bytes());
        if !ours {
            let name: String = String::from_utf8_lossy(&name).chars().take(40).collect();
            return foreign(&format!("tree {name:?}"));
        }
    }
    Ok(())
}

fn check_meta(value: &[u8]) -> Result<RecordMeta, StoreError> {
    let meta: RecordMeta =
        unseal(value).map_err(|e| StoreError::Damaged(format!("description of the store: {e}")))?;
    if meta.schema != SCHEMA {
        return Err(StoreError::Damaged(format!(
            "written by outhaul {} with schema {}; this one reads schema {SCHEMA}",
            meta.created_by, meta.schema
        )));
    }
    if meta.identity.is_empty() {
        return Err(StoreError::Damaged("the store has no identity".into()));
    }
    Ok(meta)
}

fn make_meta(meta_tree: &sled::Tree, trees: &[sled::Tree], now_ms: i64) -> Result<RecordMeta, StoreError> {
    for tree in trees {
        if tree.first().map_err(sort)?.is_some() {
            return Err(StoreError::Damaged(
                "has rows but no description of itself".into(),
            ));
        }
    }
    let meta = RecordMeta {
        schema: SCHEMA,
        identity: format!("{:032x}", random::<u128>()),
        created_ms: now_ms,
        created_by: env!("CARGO_PKG_VERSION").into(),
    };
    meta_tree.insert(META_KEY, seal(&meta)).map_err(sort)?;
    Ok(meta)
}

/// Whether an error is the store's fault or the system's.
fn sort(error: sled::Error) -> StoreError {
    match error {
        sled::Error::Io(error) => sort_io(&error),
        // Also ReportableBug: what sled calls a bug is mostly damage that it did not expect.
        other => StoreError::Damaged(other.to_string()),
    }
}

fn sort_io(error: &io::Error) -> StoreError {
    use io::ErrorKind as K;
    let text = error.to_string();
    let of_the_system = matches!(
        error.kind(),
        K::StorageFull
            | K::QuotaExceeded
            | K::FileTooLarge
            | K::ReadOnlyFilesystem
            | K::PermissionDenied
            | K::WouldBlock
            | K::OutOfMemory
    );
    // sled copies errors without their numbers, so some are only in the words: its own lock held by a store that is
    // still closing, and EMFILE, ENFILE (24, 23).
    let in_words = [
        "could not acquire lock",
        "code: 24",
        "code: 23",
        "os error 24",
        "os error 23",
    ];
    if of_the_system || in_words.iter().any(|words| text.contains(words)) {
        StoreError::Unavailable(text)
    } else {
        StoreError::Damaged(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_not_damage() {
        for kind in [io::ErrorKind::StorageFull, io::ErrorKind::FileTooLarge] {
            let full = io::Error::from(kind);
            assert!(matches!(sort_io(&full), StoreError::Unavailable(_)), "{kind}");
        }
        let fds = io::Error::other("Os { code: 24, kind: Uncategorized, message: \"Too many open files\" }");
        assert!(matches!(sort_io(&fds), StoreError::Unavailable(_)));
        let end = io::Error::from(io::ErrorKind::UnexpectedEof);
        assert!(matches!(sort_io(&end), StoreError::Damaged(_)));
    }

    #[test]
    fn a_page_ends_with_its_prefix() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(&dir.path().join("s"), 0).unwrap();
        let rows: Vec<Change> = (0..2500u32)
            .map(|n| (n.to_be_bytes().to_vec(), Some(vec![1])))
            .collect();
        store
            .apply(TreeId::Invocations, rows.iter().map(|(k, v)| (k, v)))
            .unwrap();
        let page = store
            .page(TreeId::Invocations, &[0, 0, 1], Bound::Included(&[0, 0, 1]), 1000)
            .unwrap();
        assert_eq!(page.len(), 256);
        let page = store.page(TreeId::Invocations, &[], Bound::Unbounded, 7).unwrap();
        assert_eq!(page.len(), 7);
    }
}
