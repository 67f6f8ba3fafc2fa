//! Outputs in the store: blocks that each have all rows from their key up to the next one's.

use std::{cmp::Ordering, collections::BTreeMap, ops::Bound, sync::Arc};

use bytes::Bytes;
use sled::IVec;

use super::{MAX_VALUE, Store, TreeId, sort};
use crate::record::{
    block::{Block, Builder, Remap, Row, Texts, merge, seal, unseal},
    error::StoreError,
    keys,
    pending::{Stack, Waiting},
    row::RootId,
    shield::shield,
};

/// Blocks that go into sled at once: more would hold readers up for longer.
const BLOCKS_PER_BATCH: usize = 64;

/// A block's part of a root's rows.
pub(in crate::record) struct Span {
    key: Vec<u8>,
    pub(in crate::record) value: Option<IVec>,
    /// The next block's key, and the length of the directory in it.
    upper: Option<(IVec, usize)>,
}

impl Span {
    /// Whether a place is not before this block.
    pub(in crate::record) fn begins_before(&self, directory: &[u8], name: &[u8]) -> bool {
        (directory, name) >= keys::place(&self.key)
    }

    /// Whether a place is before the next block.
    pub(in crate::record) fn reaches(&self, directory: &[u8], name: &[u8]) -> bool {
        self.next().is_none_or(|next| (directory, name) < next)
    }

    /// Where the next block begins.
    pub(in crate::record) fn next(&self) -> Option<(&[u8], &[u8])> {
        let (key, directory) = self.upper.as_ref()?;
        Some((key.get(4..4 + directory)?, key.get(5 + directory..)?))
    }
}

/// A block of the store's.
pub(in crate::record) fn open(
    value: &IVec,
    texts: &mut Texts,
) -> Result<Block, crate::record::value::ValueError> {
    unseal(Bytes::from_owner(value.clone()), texts)
}

impl Store {
    /// The block that has a place, or would have it.
    pub(in crate::record) fn span(
        &self,
        root: RootId,
        directory: &[u8],
        name: &[u8],
    ) -> Result<Span, StoreError> {
        shield(|| {
            let tree = self.tree(TreeId::Outputs)?;
            let first = keys::root(root);
            let place = keys::block(root, directory, name);
            let found = tree
                .range(&first[..]..=&place[..])
                .next_back()
                .transpose()
                .map_err(sort)?;
            let (key, value) = match found {
                Some((key, value)) => (key.to_vec(), Some(value)),
                None => (first.clone(), None),
            };
            let mut above = tree.range::<&[u8], _>((Bound::Excluded(&key[..]), Bound::Unbounded));
            let above = above.next().transpose().map_err(sort)?;
            let upper = above
                .map(|(key, _)| key)
                .filter(|above| above.starts_with(&first));
            let upper = upper.map(|key| {
                let directory = keys::place(&key).0.len();
                (key, directory)
            });
            Ok(Span { key, value, upper })
        })
    }

    /// Applies changes of a root's outputs. Says how many blocks could not be read, and so were lost.
    pub(in crate::record) fn apply_outputs(
        &self,
        root: RootId,
        waiting: &Waiting,
    ) -> Result<u64, StoreError> {
        if waiting.forgotten {
            self.remove_blocks(root)?;
        }
        let mut unreadable = 0;
        let mut texts = Texts::default();
        let mut changes = Changes::new(&waiting.directories);
        let mut batch = Batch::default();
        while changes.settle() {
            let Some(row) = changes.block.row(changes.at) else {
                break;
            };
            let span = self.span(root, row.directory().as_bytes(), row.name())?;
            let old = match &span.value {
                Some(value) => open(value, &mut texts).unwrap_or_else(|_| {
                    unreadable += 1;
                    Block::default()
                }),
                None => Block::default(),
            };
            let made = rewrite(&span, &old, &mut changes);
            batch.replace(self, root, span, &made)?;
        }
        batch.apply(self)?;
        Ok(unreadable)
    }

    fn remove_blocks(&self, root: RootId) -> Result<(), StoreError> {
        let prefix = keys::root(root);
        loop {
            let page = self.page(
                TreeId::Outputs,
                &prefix,
                Bound::Included(&prefix),
                BLOCKS_PER_BATCH,
            )?;
            if page.is_empty() {
                return Ok(());
            }
            let mut batch = Batch::default();
            for (key, _) in page {
                batch.0.push((key.to_vec(), None));
            }
            batch.apply(self)?;
        }
    }
}

/// Changes in order, directory by directory.
struct Changes<'a> {
    following: std::collections::btree_map::Values<'a, Arc<str>, Stack>,
    block: Arc<Block>,
    at: usize,
    /// How many blocks there were before this one.
    number: usize,
}

impl<'a> Changes<'a> {
    fn new(directories: &'a BTreeMap<Arc<str>, Stack>) -> Self {
        Self {
            following: directories.values(),
            block: Arc::default(),
            at: 0,
            number: 0,
        }
    }

    /// Goes to the next row, if this one is no more, and over what makes no sense. Whether there is one.
    fn settle(&mut self) -> bool {
        while self.block.row(self.at).is_none() {
            if self.at + 1 < self.block.len() {
                self.at += 1;
                continue;
            }
            let Some(stack) = self.following.next() else {
                return false;
            };
            self.block = whole(stack);
            self.at = 0;
            self.number += 1;
        }
        true
    }
}

/// A directory's changes as one block.
pub(in crate::record) fn whole(stack: &[Arc<Block>]) -> Arc<Block> {
    let mut blocks = stack.iter().rev();
    let mut all = blocks.next().cloned().unwrap_or_default();
    for older in blocks {
        all = Arc::new(merge(older, &all));
    }
    all
}

/// A block's rows with all changes that are its own, as blocks that are small enough.
fn rewrite(span: &Span, old: &Block, changes: &mut Changes<'_>) -> Vec<Block> {
    let mut made = Made::default();
    let within = |row: &Row<'_>| span.reaches(row.directory().as_bytes(), row.name());
    // Anything beyond was left by a writer that was killed, and is out of date.
    let mut old = old.rows_from(0).take_while(within).peekable();
    while changes.settle() {
        let block = changes.block.clone();
        let Some(new) = block.row(changes.at).filter(within) else {
            break;
        };
        while let Some(row) = old.next_if(|old| old.order_of(&new) == Ordering::Less) {
            made.copy(&row, 0);
        }
        old.next_if(|old| old.order_of(&new) == Ordering::Equal);
        if !new.is_removal() {
            made.copy(&new, changes.number);
        }
        changes.at += 1;
    }
    for row in old {
        made.copy(&row, 0);
    }
    made.finish(span.upper.is_none())
}

/// Blocks in the making.
#[derive(Default)]
struct Made {
    done: Vec<Block>,
    builder: Builder,
    /// For the rows that were there before.
    from_old: Remap,
    /// For a block of changes, and that block's number.
    from_new: (usize, Remap),
}

impl Made {
    /// Takes a row of a block of changes, or with number 0 of the block that was there before.
    fn copy(&mut self, row: &Row<'_>, number: usize) {
        if !self.builder.is_empty() && self.builder.size() + row.size() > MAX_VALUE {
            self.done.push(std::mem::take(&mut self.builder).finish());
            self.from_old = Remap::default();
            self.from_new.1 = Remap::default();
        }
        if number == 0 {
            self.builder.copy(row, &mut self.from_old);
            return;
        }
        if self.from_new.0 != number {
            self.from_new = (number, Remap::default());
        }
        self.builder.copy(row, &mut self.from_new.1);
    }

    /// The blocks. A small rest is shared with the block before it, or every later change near their border would
    /// make another small one; but not at the end of everything, which is where rows are added in order.
    fn finish(mut self, is_end: bool) -> Vec<Block> {
        if self.builder.is_empty() {
            return self.done;
        }
        let is_small = self.builder.size() < MAX_VALUE / 2;
        let last = self.builder.finish();
        match self.done.pop_if(|_| is_small && !is_end) {
            Some(before) => {
                let half = (before.bytes() + last.bytes()) / 2;
                let mut halves = [Builder::default(), Builder::default()];
                for block in [&before, &last] {
                    let mut remaps = [Remap::default(), Remap::default()];
                    for row in block.rows_from(0) {
                        let side = usize::from(halves[0].size() >= half.min(MAX_VALUE / 2 + MAX_VALUE / 4));
                        halves[side].copy(&row, &mut remaps[side]);
                    }
                }
                self.done.extend(
                    halves
                        .into_iter()
                        .filter(|half| !half.is_empty())
                        .map(Builder::finish),
                );
            }
            None => self.done.push(last),
        }
        self.done
    }
}

/// Changed blocks on their way into sled.
#[derive(Default)]
struct Batch(Vec<(Vec<u8>, Option<Vec<u8>>)>);

impl Batch {
    /// Puts blocks in the place of one.
    fn replace(&mut self, store: &Store, root: RootId, span: Span, made: &[Block]) -> Result<(), StoreError> {
        let mut made = made.iter();
        let first = made.next();
        // New ones go first: were the old one shortened before them, rows would be missing in between.
        for block in made {
            if let Some(row) = block.row(0) {
                let key = keys::block(root, row.directory().as_bytes(), row.name());
                self.0.push((key, Some(seal(block))));
            }
            if self.0.len() >= BLOCKS_PER_BATCH {
                self.apply(store)?;
            }
        }
        self.0.push((span.key, first.map(seal)));
        if self.0.len() >= BLOCKS_PER_BATCH {
            self.apply(store)?;
        }
        Ok(())
    }

    fn apply(&mut self, store: &Store) -> Result<(), StoreError> {
        let changes = std::mem::take(&mut self.0);
        store.apply(TreeId::Outputs, changes.iter().map(|(key, value)| (key, value)))
    }
}
