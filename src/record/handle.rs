//! The handle that the rest of Outhaul holds: opening, closing, flushing, health, and the output roots.

use std::{fmt, fs, os::unix::fs::DirBuilderExt as _, path::Path, sync::Arc, time::Duration};

use rand::random;
use tokio::sync::oneshot;

use super::{
    error::{FlushError, Health, RecordError},
    keys,
    lock::InstanceLock,
    opening::{Opening, StoreLocation},
    roots::Roots,
    row::{RootId, RootRow},
    shared::{Down, Scan, Shared, root_change},
    store::{Change, TreeId},
    writer,
};
use crate::units::now_ms;

/// How long [`Record::flush`] waits for the disk.
const FLUSH_DEADLINE: Duration = Duration::from_secs(30);

/// How long closing waits for the writer. What is not written by then is lost, which costs a look at some files.
const CLOSE_DEADLINE: Duration = Duration::from_secs(10);

/// The record of one state directory. Cheap to clone; the last clone that is dropped closes it.
///
/// Reads are synchronous and see everything that was handed over before. Writes are queued and never fail: a record
/// that cannot be written shows in [`Record::health`] and nowhere else.
#[derive(Clone)]
pub struct Record {
    handle: Arc<Handle>,
}

struct Handle {
    shared: Arc<Shared>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        close(&self.shared);
    }
}

fn close(shared: &Shared) {
    shared.state().closed = true;
    shared.wake.notify_one();
    if !shared.wait_for_end(CLOSE_DEADLINE) {
        tracing::warn!(
            "the record's writer did not end within {} s",
            CLOSE_DEADLINE.as_secs()
        );
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Record")
            .field("identity", &self.identity())
            .finish_non_exhaustive()
    }
}

impl Record {
    /// Takes the state directory, made if need be, and opens the record in it. Blocks while the store recovers.
    ///
    /// A store that is damaged, foreign or of another version is not an error: it is moved away, and the record starts
    /// with nothing known. Nor is a disk that is full.
    ///
    /// # Errors
    /// When another process holds the directory, or it cannot be made or locked.
    pub fn open(state_dir: &Path) -> Result<(Self, Opening), RecordError> {
        Self::open_as(state_dir, true)
    }

    /// The same for a command that ends soon, and that its user may interrupt at any time: that it was killed while it
    /// opened the store says nothing of the store.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub(crate) fn open_for_command(state_dir: &Path) -> Result<(Self, Opening), RecordError> {
        Self::open_as(state_dir, false)
    }

    fn open_as(state_dir: &Path, blames: bool) -> Result<(Self, Opening), RecordError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(state_dir)
            .map_err(|source| RecordError::StateDir {
                path: state_dir.to_owned(),
                source,
            })?;
        // Before the store: its own lock has no words for a user, and opening moves directories about.
        let lock = InstanceLock::take(state_dir)?;
        let mut place = StoreLocation::new(state_dir);
        place.blames = blames;
        let (store, opening) = place.open();
        let (roots, down) = match &opening {
            // The numbers of a store that will be opened later are not known; these must not meet them.
            Opening::Unavailable { reason } => (
                Roots::from(random::<u32>() | 1 << 31),
                Some(Down::now(reason.clone())),
            ),
            _ => (Roots::from(1), None),
        };
        let shared = Arc::new(Shared::new(place, lock, roots, down));
        shared.swap_store(store);
        shared.exchange_roots();
        if let Opening::Quarantined { moved_to, reason } = &opening {
            shared.quarantined.store(1, std::sync::atomic::Ordering::Relaxed);
            let moved_to = moved_to.display();
            tracing::warn!(%moved_to, "the record is not usable; starting a new one: {reason}");
        }
        writer::start(shared.clone())?;
        Ok((
            Self {
                handle: Arc::new(Handle { shared }),
            },
            opening,
        ))
    }

    /// Writes what is queued, closes the store and frees the state directory. Later writes are dropped, later reads
    /// find nothing. Blocks for at most ten seconds.
    pub fn close(&self) {
        close(self.shared());
    }

    /// Waits until everything handed over before is in the store and flushed: it outlives the process. A power cut
    /// may still take it.
    ///
    /// # Errors
    /// When there is no working store, or the disk does not answer within half a minute.
    pub async fn flush(&self) -> Result<(), FlushError> {
        let (send, done) = oneshot::channel();
        {
            let mut state = self.shared().state();
            if state.closed {
                return Err(FlushError::Closed);
            }
            state.waiters.push(send);
        }
        self.shared().wake.notify_one();
        match tokio::time::timeout(FLUSH_DEADLINE, done).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(FlushError::Closed),
            Err(_) => Err(FlushError::Timeout(FLUSH_DEADLINE.as_secs())),
        }
    }

    /// Waits, for a second at most, until the writer has caught up somewhat. For async callers with many rows: a
    /// `put` into a full queue blocks its thread.
    pub async fn room(&self) {
        self.shared().room().await;
    }

    /// How the record fares.
    pub fn health(&self) -> Health {
        self.shared().health()
    }

    /// Changes whenever the record starts again: what was remembered of an older one is not in this one. Empty while no
    /// store could be opened yet.
    pub fn identity(&self) -> String {
        self.shared().identity()
    }

    /// Bytes that the store takes on disk, if it can be asked.
    pub fn size_on_disk(&self) -> Option<u64> {
        self.shared().store()?.size_on_disk().ok()
    }

    // === output roots ===

    /// The root with this path, device and inode; created if it is new.
    pub fn root(&self, path: &str, device: u64, inode: u64) -> RootId {
        let mut roots = self.shared().roots.lock();
        let (id, made) = roots.get_or_create(path, device, inode);
        if made {
            // A process that was killed while it forgot a root may have left rows under this number.
            self.shared().forget_outputs(id);
            self.put_root(&roots, id);
        }
        id
    }

    /// A root's row.
    pub(crate) fn root_row(&self, id: RootId) -> Option<RootRow> {
        self.shared().roots.lock().get(id).cloned()
    }

    /// Every root, in the order of their numbers.
    pub fn roots(&self) -> Vec<(RootId, RootRow)> {
        self.shared()
            .roots
            .lock()
            .iter()
            .map(|(id, row)| (id, row.clone()))
            .collect()
    }

    /// A version for a new invocation of a root: above every version given out for it before, in this record or a
    /// lost one. About the wall clock in milliseconds.
    pub fn next_version(&self, id: RootId) -> u64 {
        self.next_version_above(id, 0)
    }

    /// The same, above one that another process has given out as well.
    pub(crate) fn next_version_above(&self, id: RootId, other: u64) -> u64 {
        let mut roots = self.shared().roots.lock();
        let floor = i64::try_from(other.saturating_add(1)).unwrap_or(i64::MAX);
        let version = roots.next_version(id, now_ms().max(floor));
        self.put_root(&roots, id);
        version
    }

    /// Removes a root with all its outputs, as when its directory is gone. Its invocations stay.
    pub(crate) fn forget_root(&self, id: RootId) {
        if self.shared().roots.lock().remove(id) {
            self.shared().forget_outputs(id);
            self.put(TreeId::Roots, vec![(keys::root(id), None)]);
        }
    }

    /// Queues a root's row. Under the roots' lock, so that rows are queued in the order of their changes; never
    /// waits, for they are few.
    fn put_root(&self, roots: &Roots, id: RootId) {
        if let Some(row) = roots.get(id) {
            self.shared()
                .state()
                .queue
                .add(TreeId::Roots, [root_change(id, row)]);
            self.shared().wake.notify_one();
        }
    }

    /// Changes a root's row.
    pub(super) fn change_root(&self, id: RootId, change: impl FnOnce(&mut RootRow)) {
        let mut roots = self.shared().roots.lock();
        let Some(row) = roots.get_mut(id) else { return };
        let before = row.clone();
        change(row);
        if *row != before {
            self.put_root(&roots, id);
        }
    }

    // === for the other parts of the handle ===

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.handle.shared
    }

    pub(super) fn put(&self, tree: TreeId, changes: Vec<Change>) {
        self.shared().put(tree, changes);
    }

    /// Queues any number of changes, with room for others in between.
    pub(super) fn put_chunked(&self, tree: TreeId, changes: impl Iterator<Item = Change>) {
        let mut chunk = Vec::new();
        for change in changes {
            chunk.push(change);
            if chunk.len() == 1000 {
                self.put(tree, std::mem::take(&mut chunk));
            }
        }
        self.put(tree, chunk);
    }

    pub(super) fn scan(&self, tree: TreeId, prefix: Vec<u8>) -> Scan {
        Scan::new(self.shared().clone(), tree, prefix)
    }
}
