//! Sets some of whose files failed to download, and who reaches them.
//!
//! Thousands of targets share sets, and each is asked whether one below it has failed. So what leads to a failed set is
//! marked, once, from below; only marked sets are ever gone through to answer, and all answers together go through no
//! more than that many.

use std::collections::{HashMap, HashSet};

use foldhash::fast::RandomState;

use super::{NamedSets, SetBits, SetIndex};

/// Sets that all answers of one stream together may go through. After that, a target with failures has at least one.
const VISITS: u64 = 2_000_000;

/// What is kept from the first failure on.
#[derive(Debug, Default)]
pub(super) struct Faults {
    /// How many failures each set has of its own.
    counts: HashMap<SetIndex, u64>,
    /// The sets that include each set.
    parents: HashMap<SetIndex, Vec<SetIndex>>,
    /// Sets that have failed, and all that lead to them.
    marked: SetBits,
    visits: u64,
}

impl Faults {
    fn of(sets: &NamedSets) -> Self {
        let mut faults = Self::default();
        for (parent, node) in sets.nodes.iter().enumerate() {
            for child in &node.children {
                faults.parents.entry(*child).or_default().push(SetIndex(parent));
            }
        }
        faults
    }

    /// A set has come that includes others.
    pub(super) fn insert(&mut self, set: SetIndex, children: &[SetIndex]) {
        for child in children {
            self.parents.entry(*child).or_default().push(set);
        }
        if children.iter().any(|child| self.marked.contains(*child)) {
            self.mark(set);
        }
    }

    /// Each set is marked once, so that all marking is linear in the graph.
    fn mark(&mut self, set: SetIndex) {
        let mut todo = vec![set];
        while let Some(set) = todo.pop() {
            if !self.marked.test_and_set(set) {
                todo.extend(self.parents.get(&set).into_iter().flatten());
            }
        }
    }
}

impl NamedSets {
    /// A file of this set failed to download.
    pub fn fail(&mut self, set: SetIndex) {
        let mut faults = self.faults.take().unwrap_or_else(|| Box::new(Faults::of(self)));
        *faults.counts.entry(set).or_default() += 1;
        faults.mark(set);
        self.faults = Some(faults);
    }

    /// How many files of these sets, and of all that they include, failed to download. Never none if there is one, and
    /// never too many; of a graph that takes too long to go through, it may be too few.
    pub fn failures(&mut self, roots: &[SetIndex]) -> u64 {
        let Some(mut faults) = self.faults.take() else {
            return 0;
        };
        let mut todo: Vec<SetIndex> = roots
            .iter()
            .copied()
            .filter(|root| faults.marked.contains(*root))
            .collect();
        let any = u64::from(!todo.is_empty());
        let mut visited: HashSet<SetIndex, RandomState> = HashSet::default();
        let mut failures = 0;
        while let Some(set) = todo.pop() {
            if faults.visits >= VISITS {
                break;
            }
            if !visited.insert(set) {
                continue;
            }
            let children = self.nodes.get(set.0).map_or(&[][..], |node| &node.children);
            faults.visits += 1 + children.len() as u64;
            failures += faults.counts.get(&set).copied().unwrap_or(0);
            todo.extend(children.iter().filter(|child| faults.marked.contains(**child)));
        }
        self.faults = Some(faults);
        failures.max(any)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bep::event::NamedSet;

    fn set(id: usize, children: &[usize]) -> NamedSet {
        NamedSet {
            id: id.to_string(),
            children: children.iter().map(usize::to_string).collect(),
            ..NamedSet::default()
        }
    }

    fn failures(sets: &mut NamedSets, id: usize) -> u64 {
        let root = sets.find(&id.to_string());
        sets.failures(root.as_slice())
    }

    #[test]
    fn failures_are_counted_once_for_all_that_reach_them_whenever_these_come() {
        let mut sets = NamedSets::new();
        sets.insert(set(0, &[]));
        sets.insert(set(1, &[0]));
        sets.insert(set(2, &[0, 1]));
        sets.insert(set(3, &[]));
        assert_eq!(failures(&mut sets, 2), 0);
        let zero = sets.find("0").unwrap();
        sets.fail(zero);
        sets.fail(zero);
        // Comes before a set that it includes, and after the failure.
        sets.insert(set(4, &[5, 3]));
        assert_eq!(failures(&mut sets, 4), 0);
        sets.insert(set(5, &[1]));
        assert_eq!(
            [0, 1, 2, 3, 4, 5].map(|id| failures(&mut sets, id)),
            [2, 2, 2, 0, 2, 2]
        );
        let three = sets.find("3").unwrap();
        sets.fail(three);
        assert_eq!((failures(&mut sets, 3), failures(&mut sets, 4)), (1, 3));
    }

    #[test]
    fn cycles_come_to_an_end() {
        let mut sets = NamedSets::new();
        sets.insert(set(0, &[0, 1]));
        sets.insert(set(1, &[0]));
        let one = sets.find("1").unwrap();
        sets.fail(one);
        assert_eq!((failures(&mut sets, 0), failures(&mut sets, 1)), (1, 1));
    }

    /// Were every target to go through all sets, this would be two hundred million steps.
    #[test]
    fn many_targets_over_many_failed_sets_are_distinguished_in_time() {
        const MANY: usize = 20_000;
        let mut sets = NamedSets::new();
        for id in 0..MANY {
            // A chain, and sets of its own for each target beside it.
            let below: Vec<usize> = id.checked_sub(1).into_iter().collect();
            sets.insert(set(id, &below));
        }
        sets.insert(set(MANY, &[]));
        for id in 0..MANY {
            let failed = SetIndex(id);
            sets.fail(failed);
        }
        for id in (0..MANY).rev() {
            assert!(sets.failures(&[SetIndex(id)]) > 0);
            assert_eq!(sets.failures(&[SetIndex(MANY)]), 0);
        }
    }
}
