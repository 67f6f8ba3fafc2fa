//! Rows handed over and not yet in the store: plain data, shared under the writer's lock.
//!
//! Two generations: `filling` takes new rows; `writing` is what the writer has in hand. A reader asks `filling`, then
//! `writing`, then the store, and so sees every row from the moment it was handed over.

mod outputs;

use std::{
    collections::{BTreeMap, HashMap},
    ops::Bound,
    sync::Arc,
};

pub(super) use outputs::{Outputs, Stack, Waiting};

use super::{
    block::Block,
    row::RootId,
    store::{Change, TreeId},
};

/// Bytes that a change of any tree but the outputs' takes in memory, roughly.
const BYTES_EACH: usize = 300;

/// Changes by tree and key; ordered, so that pages can be merged and neighbours are written together. Those of outputs
/// are in blocks.
#[derive(Debug, Default)]
pub(super) struct Changes {
    trees: [BTreeMap<Vec<u8>, Option<Vec<u8>>>; TreeId::ALL.len()],
    pub(super) outputs: Outputs,
}

impl Changes {
    pub(super) fn len(&self) -> usize {
        self.outputs.len() + self.trees.iter().map(BTreeMap::len).sum::<usize>()
    }

    fn bytes(&self) -> usize {
        self.outputs.bytes() + BYTES_EACH * self.trees.iter().map(BTreeMap::len).sum::<usize>()
    }

    pub(super) fn tree(&self, id: TreeId) -> &BTreeMap<Vec<u8>, Option<Vec<u8>>> {
        &self.trees[id as usize]
    }

    fn tree_mut(&mut self, id: TreeId) -> &mut BTreeMap<Vec<u8>, Option<Vec<u8>>> {
        &mut self.trees[id as usize]
    }
}

/// What a reader learns of a key before it asks the store.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pending {
    /// The store knows.
    Unchanged,
    /// Removed, and the store may not know yet.
    Removed,
    /// This value, which the store may not have yet.
    Value(Vec<u8>),
}

/// Both generations.
#[derive(Debug, Default)]
pub(super) struct Queue {
    filling: Changes,
    writing: Option<Arc<Changes>>,
    /// How often outputs of a root were handed over or forgotten.
    turns: HashMap<RootId, u64>,
}

impl Queue {
    /// Rows not yet in the store.
    pub(super) fn rows(&self) -> usize {
        self.waiting() + self.writing.as_ref().map_or(0, |w| w.len())
    }

    /// Rows that the writer has not taken yet.
    pub(super) fn waiting(&self) -> usize {
        self.filling.len()
    }

    /// Bytes in memory, roughly.
    pub(super) fn bytes(&self) -> usize {
        self.filling.bytes() + self.writing.as_ref().map_or(0, |w| w.bytes())
    }

    /// Takes changes; the last one of a key wins. Not of outputs.
    pub(super) fn add(&mut self, tree: TreeId, changes: impl IntoIterator<Item = Change>) {
        self.filling.tree_mut(tree).extend(changes);
    }

    /// How often outputs of a root have changed: as long as it is the same, what was read of them still holds.
    pub(super) fn outputs_turn(&self, root: RootId) -> u64 {
        self.turns.get(&root).copied().unwrap_or(0)
    }

    /// Takes rows of outputs. Each block is of one directory.
    pub(super) fn add_outputs(&mut self, root: RootId, blocks: impl IntoIterator<Item = Block>) {
        *self.turns.entry(root).or_default() += 1;
        for block in blocks {
            self.filling.outputs.add(root, block);
        }
    }

    /// Forgets all outputs of a root.
    pub(super) fn forget_outputs(&mut self, root: RootId) {
        *self.turns.entry(root).or_default() += 1;
        self.filling.outputs.forget(root);
    }

    /// Changes of outputs that the writer has not taken, and those that it has in hand.
    pub(super) fn outputs(&self) -> (&Outputs, Option<&Arc<Changes>>) {
        (&self.filling.outputs, self.writing.as_ref())
    }

    /// Hands what has come to the writer. `None` when there is nothing, or it still has some in hand.
    pub(super) fn take(&mut self) -> Option<Arc<Changes>> {
        if self.writing.is_some() || self.filling.len() == 0 {
            return None;
        }
        let taken = Arc::new(std::mem::take(&mut self.filling));
        self.writing = Some(taken.clone());
        Some(taken)
    }

    /// The writer is done: the store has its rows.
    pub(super) fn written(&mut self) {
        self.writing = None;
    }

    /// The store did not take them: they wait again, after newer ones of the same keys.
    pub(super) fn give_back(&mut self) {
        let Some(writing) = self.writing.take() else {
            return;
        };
        self.filling.outputs.put_below(&writing.outputs);
        for id in TreeId::ALL {
            let filling = self.filling.tree_mut(id);
            for (key, value) in writing.tree(id) {
                if !filling.contains_key(key) {
                    filling.insert(key.clone(), value.clone());
                }
            }
        }
    }

    /// Gives up everything that waits, and says how many rows that was.
    pub(super) fn discard(&mut self) -> usize {
        self.give_back();
        std::mem::take(&mut self.filling).len()
    }

    /// What is known of a key here.
    pub(super) fn get(&self, tree: TreeId, key: &[u8]) -> Pending {
        let found = self
            .filling
            .tree(tree)
            .get(key)
            .or_else(|| self.writing.as_ref().and_then(|w| w.tree(tree).get(key)));
        match found {
            None => Pending::Unchanged,
            Some(None) => Pending::Removed,
            Some(Some(value)) => Pending::Value(value.clone()),
        }
    }

    /// Changes of keys that begin with `prefix`, from `start` on; at most the first `limit`, and whether there are
    /// more.
    pub(super) fn page(
        &self,
        tree: TreeId,
        prefix: &[u8],
        start: Bound<&[u8]>,
        limit: usize,
    ) -> (BTreeMap<Vec<u8>, Option<Vec<u8>>>, bool) {
        let mut page = BTreeMap::new();
        let mut more = false;
        // Older first, so that newer changes of the same key replace them.
        for changes in self.writing.as_deref().into_iter().chain([&self.filling]) {
            let range = changes.tree(tree).range::<[u8], _>((start, Bound::Unbounded));
            let mut within = range.take_while(|(key, _)| key.starts_with(prefix));
            for (key, value) in within.by_ref().take(limit) {
                page.insert(key.clone(), value.clone());
            }
            more |= within.next().is_some();
        }
        while page.len() > limit {
            page.pop_last();
            more = true;
        }
        (page, more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(queue: &mut Queue, key: u8, value: Option<u8>) {
        queue.add(TreeId::Targets, [(vec![key], value.map(|v| vec![v]))]);
    }

    fn get(queue: &Queue, key: u8) -> Pending {
        queue.get(TreeId::Targets, &[key])
    }

    #[test]
    fn a_row_is_seen_in_every_stage_until_it_is_written() {
        let mut queue = Queue::default();
        put(&mut queue, 1, Some(10));
        assert_eq!(get(&queue, 1), Pending::Value(vec![10]));
        assert!(queue.take().is_some());
        assert_eq!(get(&queue, 1), Pending::Value(vec![10]));
        put(&mut queue, 1, None);
        assert_eq!(get(&queue, 1), Pending::Removed);
        assert_eq!((queue.rows(), queue.waiting()), (2, 1));
        assert!(queue.take().is_none(), "one batch at a time");
        queue.written();
        assert_eq!(get(&queue, 1), Pending::Removed);
        assert!(queue.take().is_some());
        queue.written();
        assert_eq!((get(&queue, 1), queue.rows()), (Pending::Unchanged, 0));
    }

    #[test]
    fn rows_given_back_do_not_replace_newer_ones() {
        let mut queue = Queue::default();
        put(&mut queue, 1, Some(10));
        put(&mut queue, 2, Some(20));
        queue.take();
        put(&mut queue, 1, Some(11));
        queue.give_back();
        assert_eq!(
            (get(&queue, 1), get(&queue, 2)),
            (Pending::Value(vec![11]), Pending::Value(vec![20]))
        );
        assert_eq!((queue.rows(), queue.waiting()), (2, 2));
        assert_eq!((queue.discard(), queue.rows()), (2, 0));
    }

    #[test]
    fn a_page_merges_both_generations_and_says_whether_it_is_all() {
        let mut queue = Queue::default();
        for key in [1, 3, 5] {
            put(&mut queue, key, Some(0));
        }
        queue.take();
        for key in [2, 3, 4] {
            put(&mut queue, key, Some(1));
        }
        let (page, more) = queue.page(TreeId::Targets, &[], Bound::Unbounded, 3);
        assert_eq!(page.keys().map(|k| k[0]).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(page[&vec![3]], Some(vec![1]));
        assert!(more);
        let (page, more) = queue.page(TreeId::Targets, &[], Bound::Excluded(&[3]), 3);
        assert_eq!(page.keys().map(|k| k[0]).collect::<Vec<_>>(), [4, 5]);
        assert!(!more);
    }
}
