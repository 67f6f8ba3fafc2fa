//! Outputs' rows that wait for the store: blocks by directory.
//!
//! What was handed over together for one directory is a block, and stays as it is until the writer takes it: a
//! target's files mostly are a directory's, and nothing is moved about for them. A directory that is handed over in
//! many small parts is kept in a stack of blocks, of which each is much larger than the next.

use std::{collections::BTreeMap, ops::Bound, sync::Arc};

use crate::record::{
    block::{Block, merge},
    row::RootId,
};

/// Blocks of one directory, newest last.
pub(in crate::record) type Stack = Vec<Arc<Block>>;

/// Changes of outputs.
#[derive(Debug, Default)]
pub(in crate::record) struct Outputs {
    roots: BTreeMap<RootId, Waiting>,
    rows: usize,
    bytes: usize,
}

/// Changes of a root's outputs.
#[derive(Debug, Default)]
pub(in crate::record) struct Waiting {
    /// Whether everything older is gone.
    pub(in crate::record) forgotten: bool,
    pub(in crate::record) directories: BTreeMap<Arc<str>, Stack>,
}

impl Outputs {
    /// Rows, and roots that are forgotten.
    pub(in crate::record) const fn len(&self) -> usize {
        self.rows
    }

    /// Bytes in memory, roughly.
    pub(in crate::record) const fn bytes(&self) -> usize {
        self.bytes
    }

    pub(in crate::record) fn roots(&self) -> impl Iterator<Item = (RootId, &Waiting)> {
        self.roots.iter().map(|(id, waiting)| (*id, waiting))
    }

    /// Whether everything about a root that is older than this is gone.
    pub(in crate::record) fn is_forgotten(&self, root: RootId) -> bool {
        self.roots.get(&root).is_some_and(|waiting| waiting.forgotten)
    }

    /// The blocks of a directory.
    pub(in crate::record) fn stack(&self, root: RootId, directory: &str) -> &[Arc<Block>] {
        self.roots
            .get(&root)
            .and_then(|waiting| waiting.directories.get(directory))
            .map_or(&[], Vec::as_slice)
    }

    /// The first directory that is not before `from`.
    pub(in crate::record) fn next_directory(&self, root: RootId, from: &str) -> Option<&Arc<str>> {
        let directories = &self.roots.get(&root)?.directories;
        let mut following = directories.range::<str, _>((Bound::Included(from), Bound::Unbounded));
        following.next().map(|(directory, _)| directory)
    }

    /// Takes a block of rows of one directory, newer than all before.
    pub(in crate::record) fn add(&mut self, root: RootId, block: Block) {
        let Some(directory) = block.row(0).map(|row| row.directory().clone()) else {
            return;
        };
        let stack = self
            .roots
            .entry(root)
            .or_default()
            .directories
            .entry(directory)
            .or_default();
        let mut newest = block;
        while let Some(older) = stack.pop_if(|older| older.len() < 2 * newest.len()) {
            self.rows -= older.len();
            self.bytes -= older.bytes();
            newest = merge(&older, &newest);
        }
        self.rows += newest.len();
        self.bytes += newest.bytes();
        stack.push(Arc::new(newest));
    }

    /// Forgets all about a root.
    pub(in crate::record) fn forget(&mut self, root: RootId) {
        let forgotten = Waiting {
            forgotten: true,
            ..Waiting::default()
        };
        let before = self.roots.insert(root, forgotten).unwrap_or_default();
        self.rows += 1;
        self.rows -= usize::from(before.forgotten);
        for block in before.directories.values().flatten() {
            self.rows -= block.len();
            self.bytes -= block.bytes();
        }
    }

    /// Takes back older changes.
    pub(in crate::record) fn put_below(&mut self, older: &Self) {
        for (root, older) in &older.roots {
            let waiting = self.roots.entry(*root).or_default();
            if waiting.forgotten {
                continue;
            }
            waiting.forgotten = older.forgotten;
            self.rows += usize::from(older.forgotten);
            for (directory, stack) in &older.directories {
                let newer = waiting.directories.entry(directory.clone()).or_default();
                newer.splice(0..0, stack.iter().cloned());
                for block in stack {
                    self.rows += block.len();
                    self.bytes += block.bytes();
                }
            }
        }
    }
}
