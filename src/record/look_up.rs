//! Looking outputs up: first in what waits for the store, then in the store.

use std::sync::Arc;

use parking_lot::Mutex;
use sled::IVec;

use super::{
    block::{Block, Row, Texts, split},
    pending::Changes,
    row::RootId,
    shared::Shared,
    store::{Span, open_block},
};

/// Paths looked up under one lock.
const CHUNK: usize = 1000;

/// Blocks of the store that are kept open: some 10 KB each.
const KEPT_OPEN: usize = 256;
/// A block with more bytes, such as a large file that came inside an event, is not kept.
const KEPT_BYTES: usize = 64 << 10;

/// Blocks that were opened lately, each with the value that it was opened from. A value that sled gives again, in the
/// same memory, need not be checked and taken apart again; so nothing here is ever out of date.
#[derive(Default)]
pub(super) struct OpenBlocks(Mutex<Vec<Option<Kept>>>);

/// A block, and what it was opened from.
type Kept = (IVec, Arc<Block>);

impl OpenBlocks {
    fn find(&self, value: &IVec) -> Option<Arc<Block>> {
        let kept = self.0.lock();
        let (same, block) = kept.get(Self::slot(value))?.as_ref()?;
        let is_same = std::ptr::eq(same.as_ptr(), value.as_ptr()) && same.len() == value.len();
        is_same.then(|| block.clone())
    }

    fn keep(&self, value: IVec, block: Arc<Block>) {
        if value.len() > KEPT_BYTES {
            return;
        }
        let slot = Self::slot(&value);
        let mut kept = self.0.lock();
        kept.resize(KEPT_OPEN, None);
        kept[slot] = Some((value, block));
    }

    /// By the checksum, which follows the version in a value: as good as any hash.
    fn slot(value: &IVec) -> usize {
        value.get(1).map_or(0, |byte| usize::from(*byte)) % KEPT_OPEN
    }
}

/// The pending rows of a directory at one moment.
pub(super) struct Glimpse {
    /// Not yet taken by the writer; newest last.
    filling: Vec<Arc<Block>>,
    /// In the writer's hands.
    writing: Option<Arc<Changes>>,
    /// Whether what is in the writer's hands does not count any more.
    forgotten: bool,
}

/// What waits says of a row.
enum Waits<'a> {
    Row(Row<'a>),
    /// It is not known any more.
    Nowhere,
    /// The store knows.
    Unchanged,
}

impl Glimpse {
    /// The blocks of a directory, newest first.
    pub(super) fn blocks(&self, root: RootId, directory: &str) -> impl Iterator<Item = &Arc<Block>> {
        let writing = self.writing.as_ref().filter(|_| !self.forgotten);
        let writing = writing.map_or(&[][..], |writing| writing.outputs.stack(root, directory));
        self.filling.iter().rev().chain(writing.iter().rev())
    }

    /// Whether the store's rows count.
    pub(super) fn has_store(&self, root: RootId) -> bool {
        let writing = self.writing.as_ref();
        !self.forgotten && !writing.is_some_and(|writing| writing.outputs.is_forgotten(root))
    }

    fn find(&self, root: RootId, directory: &str, name: &str, likely: usize) -> (Waits<'_>, usize) {
        for block in self.blocks(root, directory) {
            if let Ok(at) = block.find(directory, name, likely)
                && let Some(row) = block.row(at)
            {
                let waits = if row.is_removal() {
                    Waits::Nowhere
                } else {
                    Waits::Row(row)
                };
                return (waits, at + 1);
            }
        }
        if self.has_store(root) {
            (Waits::Unchanged, likely)
        } else {
            (Waits::Nowhere, likely)
        }
    }
}

/// The part of the store that was read last.
pub(super) struct Reading<'a> {
    shared: &'a Shared,
    root: RootId,
    texts: Texts,
    open: Option<(Span, Arc<Block>)>,
}

impl<'a> Reading<'a> {
    pub(super) fn new(shared: &'a Shared, root: RootId) -> Self {
        Self {
            shared,
            root,
            texts: Texts::default(),
            open: None,
        }
    }

    /// The block that has a place, or would have it. `None` when there is no store, or it fails.
    pub(super) fn at(&mut self, directory: &[u8], name: &[u8]) -> Option<&(Span, Arc<Block>)> {
        let is_open = self
            .open
            .as_ref()
            .is_some_and(|(span, _)| span.begins_before(directory, name) && span.reaches(directory, name));
        if !is_open {
            let root = self.root;
            let span = self.shared.ask(|store| store.span(root, directory, name))?;
            let block = span.value.as_ref().and_then(|value| self.block(value));
            self.open = Some((span, block.unwrap_or_default()));
        }
        self.open.as_ref()
    }

    /// A row, with a guess at its number in its block, which becomes that of the row after it.
    fn row(&mut self, directory: &str, name: &str, likely: &mut usize) -> Option<Row<'_>> {
        let (_, block) = self.at(directory.as_bytes(), name.as_bytes())?;
        let found = block.find(directory, name, *likely);
        *likely = found.map_or_else(|at| at, |at| at + 1);
        block.row(found.ok()?)
    }

    fn block(&mut self, value: &IVec) -> Option<Arc<Block>> {
        if let Some(open) = self.shared.open_blocks.find(value) {
            return Some(open);
        }
        let block = self.shared.readable(open_block(value, &mut self.texts))?;
        let block = Arc::new(block);
        self.shared.open_blocks.keep(value.clone(), block.clone());
        Some(block)
    }

    /// Reads again from now on: what was read may be older than what waits.
    fn forget(&mut self) {
        self.open = None;
    }
}

impl Shared {
    /// What waits of a directory.
    pub(super) fn glimpse(&self, root: RootId, directory: &str) -> Glimpse {
        let state = self.state();
        let (filling, writing) = state.queue.outputs();
        Glimpse {
            filling: filling.stack(root, directory).to_vec(),
            writing: writing.cloned(),
            forgotten: filling.is_forgotten(root),
        }
    }

    /// Looks outputs up by their paths, and gives each that is known to `found`, in their order. Fastest when a
    /// directory's follow each other.
    pub(super) fn look_up_outputs<T>(
        &self,
        root: RootId,
        wanted: &[T],
        path: impl Fn(&T) -> &str,
        mut found: impl FnMut(usize, Row<'_>),
    ) {
        let mut reading = Reading::new(self, root);
        for (number, chunk) in wanted.chunks(CHUNK).enumerate() {
            // The queue before the store: a row leaves the queue only when the store has it.
            let glimpses = self.glimpses(root, chunk.iter().map(&path));
            reading.forget();
            let mut rest = chunk.iter().enumerate();
            for (len, glimpse) in &glimpses {
                let (mut likely_waiting, mut likely_stored) = (0, 0);
                for (i, wanted) in rest.by_ref().take(*len) {
                    let (directory, name) = split(path(wanted));
                    let (waits, next) = glimpse.find(root, directory, name, likely_waiting);
                    likely_waiting = next;
                    let row = match waits {
                        Waits::Row(row) => Some(row),
                        Waits::Nowhere => None,
                        Waits::Unchanged => reading.row(directory, name, &mut likely_stored),
                    };
                    if let Some(row) = row {
                        found(number * CHUNK + i, row);
                    }
                }
            }
        }
    }

    /// What waits, for each run of paths of one directory, and how long the run is.
    fn glimpses<'p>(&self, root: RootId, paths: impl Iterator<Item = &'p str>) -> Vec<(usize, Glimpse)> {
        let mut runs: Vec<(usize, Glimpse)> = Vec::new();
        let mut last = None;
        let state = self.state();
        let (filling, writing) = state.queue.outputs();
        for path in paths {
            let (directory, _) = split(path);
            match runs.last_mut() {
                Some((len, _)) if last == Some(directory) => *len += 1,
                _ => {
                    last = Some(directory);
                    let glimpse = Glimpse {
                        filling: filling.stack(root, directory).to_vec(),
                        writing: writing.cloned(),
                        forgotten: filling.is_forgotten(root),
                    };
                    runs.push((1, glimpse));
                }
            }
        }
        runs
    }
}
