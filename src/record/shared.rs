//! What the record's handles and its writer share: the queue, the store as long as there is one, and the counters.
//!
//! Rows are not applied by anyone who hands them over: that would hold a build's event loop up for as long as the disk
//! takes. They lie in the queue, where every reader looks first.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Bound,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};
use tokio::sync::{Notify, oneshot};

use super::{
    block::Block,
    error::{FlushError, Health, HealthState, StoreError},
    lock::InstanceLock,
    look_up::OpenBlocks,
    opening::StoreLocation,
    pending::{Pending, Queue},
    roots::Roots,
    row::{RootId, RootRow},
    store::{Change, Store, TreeId},
    value::{ValueError, decode_root, encode_root},
};
use crate::units::now_ms;

/// Pending bytes that wake the writer at once.
pub(super) const BATCH_BYTES: usize = 2 << 20;

/// Pending bytes from which async callers are asked to wait.
const BUSY_BYTES: usize = 8 << 20;

/// Pending bytes from which nothing more is taken.
const FULL_BYTES: usize = 32 << 20;

/// How long a caller is held up by a full queue before its rows are given up.
const FULL_WAIT: Duration = Duration::from_secs(1);

/// Keys looked up under one lock.
const LOOKUP_CHUNK: usize = 1000;

/// Entries that a scan reads at once.
const PAGE_ROWS: usize = 512;

/// The same trouble is logged once in this time.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// There is no store at the moment.
#[derive(Debug, Clone)]
pub(super) struct Down {
    pub(super) reason: String,
    pub(super) since_ms: i64,
}

/// Under the lock that callers and writer share.
#[derive(Default)]
pub(super) struct State {
    pub(super) queue: Queue,
    /// Wait for everything handed over so far.
    pub(super) waiters: Vec<oneshot::Sender<Result<(), FlushError>>>,
    /// A reader found this store damaged.
    pub(super) damaged: Option<(Arc<Store>, String)>,
    pub(super) down: Option<Down>,
    /// The writer made no progress while the queue was full; callers do not wait for it until it does.
    pub(super) stalled: bool,
    /// No more rows are taken.
    pub(super) closed: bool,
    /// The writer has ended.
    pub(super) ended: bool,
}

pub(super) struct Shared {
    pub(super) place: StoreLocation,
    store: RwLock<Option<Arc<Store>>>,
    identity: Mutex<String>,
    state: Mutex<State>,
    /// Wakes the writer.
    pub(super) wake: Condvar,
    /// Wakes threads that wait for room or for the writer's end.
    room: Condvar,
    /// Wakes tasks that wait for room.
    room_async: Notify,
    pub(super) open_blocks: OpenBlocks,
    pub(super) roots: Mutex<Roots>,
    /// Held while an invocation's row and index change together.
    pub(super) invocations: Mutex<()>,
    /// Freed by the writer when the store is closed.
    lock: Mutex<Option<InstanceLock>>,
    dropped: AtomicU64,
    pub(super) unreadable: AtomicU64,
    pub(super) quarantined: AtomicU64,
    last_log: Mutex<Option<Instant>>,
}

impl Shared {
    pub(super) fn new(place: StoreLocation, lock: InstanceLock, roots: Roots, down: Option<Down>) -> Self {
        Self {
            place,
            store: RwLock::new(None),
            identity: Mutex::default(),
            state: Mutex::new(State {
                down,
                ..State::default()
            }),
            wake: Condvar::new(),
            room: Condvar::new(),
            room_async: Notify::new(),
            open_blocks: OpenBlocks::default(),
            roots: Mutex::new(roots),
            invocations: Mutex::default(),
            lock: Mutex::new(Some(lock)),
            dropped: AtomicU64::new(0),
            unreadable: AtomicU64::new(0),
            quarantined: AtomicU64::new(0),
            last_log: Mutex::default(),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    // === the store ===

    pub(super) fn store(&self) -> Option<Arc<Store>> {
        self.store.read().clone()
    }

    /// Puts a store in place, or takes it away, and hands back the one before.
    pub(super) fn swap_store(&self, store: Option<Store>) -> Option<Arc<Store>> {
        if let Some(store) = &store {
            store.identity().clone_into(&mut self.identity.lock());
        }
        std::mem::replace(&mut *self.store.write(), store.map(Arc::new))
    }

    pub(super) fn identity(&self) -> String {
        self.identity.lock().clone()
    }

    pub(super) fn release_lock(&self) {
        self.lock.lock().take();
    }

    /// Learns the store's roots, and hands it those that it does not have.
    pub(super) fn exchange_roots(&self) {
        let stored: Vec<(RootId, RootRow)> = self
            .store()
            .map(|store| store.page(TreeId::Roots, &[], Bound::Unbounded, usize::MAX))
            .and_then(Result::ok)
            .unwrap_or_default()
            .iter()
            .filter_map(|(key, value)| {
                let id = RootId(u32::from_be_bytes(key.as_ref().try_into().ok()?));
                Some((id, decode_root(value).ok()?))
            })
            .collect();
        let mut roots = self.roots.lock();
        roots.merge(stored);
        let rows: Vec<Change> = roots.iter().map(|(id, row)| root_change(id, row)).collect();
        self.state().queue.add(TreeId::Roots, rows);
    }

    /// Asks the store. No store, or a failing one, answers nothing.
    pub(super) fn ask<T>(&self, question: impl FnOnce(&Store) -> Result<T, StoreError>) -> Option<T> {
        let store = self.store()?;
        match question(&store) {
            Ok(answer) => Some(answer),
            Err(error) => {
                self.log_now_and_then(&format!("failed to read the record: {error}"));
                if let StoreError::Damaged(reason) = error {
                    self.state().damaged.get_or_insert((store, reason));
                    self.wake.notify_one();
                }
                None
            }
        }
    }

    // === reading ===

    /// Looks keys up, and gives the value of each that has one to `found`. Not for outputs.
    pub(super) fn look_up(&self, tree: TreeId, keys: &[Vec<u8>], mut found: impl FnMut(usize, &[u8])) {
        for (chunk_at, chunk) in keys.chunks(LOOKUP_CHUNK).enumerate() {
            let first = chunk_at * LOOKUP_CHUNK;
            // The queue before the store: a row leaves the queue only when the store has it.
            let mut for_store = Vec::with_capacity(chunk.len());
            let mut pending = Vec::new();
            let state = self.state();
            for (i, key) in chunk.iter().enumerate() {
                match state.queue.get(tree, key) {
                    Pending::Unchanged => for_store.push(i),
                    Pending::Removed => {}
                    Pending::Value(value) => pending.push((i, value)),
                }
            }
            drop(state);
            for (i, value) in pending {
                found(first + i, &value);
            }
            if for_store.is_empty() {
                continue;
            }
            let stored = self.ask(|store| store.get_many(tree, for_store.iter().map(|i| &chunk[*i][..])));
            let stored = for_store.iter().zip(stored.into_iter().flatten());
            for (i, value) in stored.filter_map(|(i, value)| Some((i, value?))) {
                found(first + i, &value);
            }
        }
    }

    /// Looks one key up.
    pub(super) fn get<T>(
        &self,
        tree: TreeId,
        key: Vec<u8>,
        decode: impl Fn(&[u8]) -> Result<T, ValueError>,
    ) -> Option<T> {
        let mut row = None;
        self.look_up(tree, &[key], |_, value| row = self.readable(decode(value)));
        row
    }

    /// Counts a value that cannot be read, which is as good as none.
    pub(super) fn readable<T>(&self, row: Result<T, ValueError>) -> Option<T> {
        row.inspect_err(|error| {
            self.unreadable.fetch_add(1, Ordering::Relaxed);
            self.log_now_and_then(&format!("skipped an unreadable value of the record: {error}"));
        })
        .ok()
    }

    /// A page of entries below a prefix, from a bound on, and the bound to go on from if there are more.
    fn page(&self, tree: TreeId, prefix: &[u8], start: Bound<&[u8]>) -> (Entries, Option<Vec<u8>>) {
        let (pending, more_pending) = self.state().queue.page(tree, prefix, start, PAGE_ROWS);
        let stored = self
            .ask(|store| store.page(tree, prefix, start, PAGE_ROWS))
            .unwrap_or_default();
        // Beyond the end of either page the other one is incomplete.
        let mut end: Option<Vec<u8>> = None;
        if more_pending {
            end = pending.keys().next_back().cloned();
        }
        if stored.len() == PAGE_ROWS
            && let Some((last, _)) = stored.last()
            && end.as_deref().is_none_or(|end| &last[..] < end)
        {
            end = Some(last.to_vec());
        }
        let mut merged: BTreeMap<Vec<u8>, Option<Vec<u8>>> = stored
            .iter()
            .map(|(key, value)| (key.to_vec(), Some(value.to_vec())))
            .collect();
        merged.extend(pending);
        if let Some(end) = &end {
            merged.retain(|key, _| key <= end);
        }
        (
            merged
                .into_iter()
                .filter_map(|(key, value)| Some((key, value?)))
                .collect(),
            end,
        )
    }

    // === writing ===

    /// Takes changes for the writer. Waits a little when the queue is full, and then gives them up.
    pub(super) fn put(&self, tree: TreeId, changes: Vec<Change>) {
        let rows = changes.len();
        self.hand_over(rows, |queue| queue.add(tree, changes));
    }

    /// The same for rows of outputs; each block is of one directory.
    pub(super) fn put_outputs(&self, root: RootId, blocks: Vec<Block>) {
        let rows = blocks.iter().map(Block::len).sum();
        self.hand_over(rows, |queue| queue.add_outputs(root, blocks));
    }

    /// The same, unless outputs of the root have changed since `turn`. Says whether they have not.
    pub(super) fn put_outputs_at(&self, root: RootId, blocks: Vec<Block>, turn: u64) -> bool {
        let rows = blocks.iter().map(Block::len).sum();
        let mut has_changed = false;
        self.hand_over(rows, |queue| {
            has_changed = queue.outputs_turn(root) != turn;
            if !has_changed {
                queue.add_outputs(root, blocks);
            }
        });
        !has_changed
    }

    /// Forgets a root's outputs, after everything that was handed over before. Taken whatever else waits: without it
    /// the rows could be another root's some day.
    pub(super) fn forget_outputs(&self, root: RootId) {
        self.state().queue.forget_outputs(root);
        self.wake.notify_one();
    }

    fn hand_over(&self, rows: usize, add: impl FnOnce(&mut Queue)) {
        if rows == 0 {
            return;
        }
        let mut state = self.state();
        if state.queue.bytes() >= FULL_BYTES {
            self.wait_for_room(&mut state);
        }
        if state.closed || state.queue.bytes() >= FULL_BYTES {
            drop(state);
            self.count_dropped(rows);
            return;
        }
        let was_idle = state.queue.waiting() == 0;
        let was_few = state.queue.bytes() < BATCH_BYTES;
        add(&mut state.queue);
        let wake = was_idle || (was_few && state.queue.bytes() >= BATCH_BYTES);
        drop(state);
        if wake {
            self.wake.notify_one();
        }
    }

    fn wait_for_room(&self, state: &mut MutexGuard<'_, State>) {
        let is_full = |state: &mut State| {
            state.queue.bytes() >= FULL_BYTES && state.down.is_none() && !state.stalled && !state.closed
        };
        self.room.wait_while_for(state, is_full, FULL_WAIT);
        state.stalled |= is_full(state);
    }

    /// Waits until the writer has caught up, or will not.
    pub(super) async fn room(&self) {
        let caught_up = async {
            loop {
                let notified = self.room_async.notified();
                {
                    let state = self.state();
                    if state.queue.bytes() < BUSY_BYTES
                        || state.down.is_some()
                        || state.stalled
                        || state.closed
                    {
                        return;
                    }
                }
                notified.await;
            }
        };
        // Not an error: the next `put` decides what becomes of its rows.
        let _ = tokio::time::timeout(FULL_WAIT, caught_up).await;
    }

    /// Tells everybody who waits that the queue or the writer's state has changed.
    pub(super) fn announce(&self) {
        self.room.notify_all();
        self.room_async.notify_waiters();
    }

    /// Waits until the writer has ended.
    pub(super) fn wait_for_end(&self, limit: Duration) -> bool {
        let mut state = self.state();
        self.room.wait_while_for(&mut state, |state| !state.ended, limit);
        state.ended
    }

    // === health ===

    pub(super) fn count_dropped(&self, rows: usize) {
        if rows > 0 {
            self.dropped.fetch_add(rows as u64, Ordering::Relaxed);
            self.log_now_and_then(
                "some rows were not recorded; the next build checks their outputs by content",
            );
        }
    }

    pub(super) fn log_now_and_then(&self, trouble: &str) {
        let mut last = self.last_log.lock();
        if last.is_none_or(|at| at.elapsed() >= LOG_EVERY) {
            *last = Some(Instant::now());
            tracing::warn!(dropped_rows = self.dropped.load(Ordering::Relaxed), "{trouble}");
        }
    }

    pub(super) fn health(&self) -> Health {
        let state = self.state();
        Health {
            state: state
                .down
                .as_ref()
                .map_or(HealthState::Ok, |down| HealthState::Degraded {
                    reason: down.reason.clone(),
                    since_ms: down.since_ms,
                }),
            dropped_rows: self.dropped.load(Ordering::Relaxed),
            unreadable_values: self.unreadable.load(Ordering::Relaxed),
            quarantined: self.quarantined.load(Ordering::Relaxed),
            pending_rows: state.queue.rows() as u64,
        }
    }
}

impl Down {
    pub(super) fn now(reason: String) -> Self {
        Self {
            reason,
            since_ms: now_ms(),
        }
    }
}

pub(super) fn root_change(id: RootId, row: &RootRow) -> Change {
    (id.0.to_be_bytes().to_vec(), Some(encode_root(row)))
}

type Entries = VecDeque<(Vec<u8>, Vec<u8>)>;

/// Walks the entries below a prefix, in the order of their keys, page by page. Sees what was handed over before it
/// began; what changes meanwhile it may or may not see.
pub(super) struct Scan {
    shared: Arc<Shared>,
    tree: TreeId,
    prefix: Vec<u8>,
    page: Entries,
    /// Where the next page starts; `None` after the last page.
    next: Option<Bound<Vec<u8>>>,
}

impl Scan {
    pub(super) fn new(shared: Arc<Shared>, tree: TreeId, prefix: Vec<u8>) -> Self {
        let next = Some(Bound::Included(prefix.clone()));
        Self {
            shared,
            tree,
            prefix,
            page: VecDeque::new(),
            next,
        }
    }
}

impl Iterator for Scan {
    type Item = (Vec<u8>, Vec<u8>);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(entry) = self.page.pop_front() {
                return Some(entry);
            }
            let start = self.next.take()?;
            let start = start.as_ref().map(Vec::as_slice);
            let (page, end) = self.shared.page(self.tree, &self.prefix, start);
            self.page = page;
            self.next = end.map(Bound::Excluded);
        }
    }
}
