//! What the last look found to be gone.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use parking_lot::Mutex;

use crate::{metrics::Metrics, record::RootId};

/// Targets that are named; more are only counted, and more than this many are not distinguished.
const NAMED: usize = 20;
const COUNTED: usize = 10_000;

/// Outputs of a root, of whichever build, that neither the newest build's cache nor the disk has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lost {
    /// The build that was the root's newest.
    pub invocation_id: String,
    /// Number of lost outputs.
    pub outputs: u64,
    targets: BTreeSet<Arc<str>>,
}

impl Lost {
    pub(super) fn new(invocation_id: &str) -> Self {
        Self {
            invocation_id: invocation_id.to_owned(),
            ..Self::default()
        }
    }

    pub(super) fn add(&mut self, target: &Arc<str>) {
        self.outputs += 1;
        if self.targets.len() < COUNTED && !target.is_empty() && !self.targets.contains(target) {
            self.targets.insert(target.clone());
        }
    }

    /// How many targets would have to be built again; up to 10,000.
    pub(crate) fn target_count(&self) -> u64 {
        self.targets.len() as u64
    }

    /// The first of them, by label.
    pub fn targets(&self) -> impl Iterator<Item = &str> {
        self.targets.iter().map(|label| &**label).take(NAMED)
    }
}

/// What the last looks found, by output root. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct LostOutputs(Arc<Mutex<HashMap<RootId, Lost>>>);

impl LostOutputs {
    /// What an invocation has lost, if it is the newest of its root and was looked at.
    pub fn lost(&self, root: RootId, invocation_id: &str) -> Option<Lost> {
        let lost = self.0.lock();
        lost.get(&root)
            .filter(|lost| lost.invocation_id == invocation_id)
            .cloned()
    }

    pub(super) fn put(&self, root: RootId, lost: Lost, metrics: &Metrics) {
        let mut all = self.0.lock();
        let before = all.get(&root).map_or(0, |lost| lost.outputs);
        if lost.outputs > before {
            let named: Vec<&str> = lost.targets().collect();
            tracing::warn!(
                invocation = lost.invocation_id,
                "{} outputs of {} targets of this output root are no longer in the remote cache; to get them, \
                 build again: {}",
                lost.outputs,
                lost.target_count(),
                named.join(" ")
            );
        }
        all.insert(root, lost);
        let sum: u64 = all.values().map(|lost| lost.outputs).sum();
        metrics.evicted.set(i64::try_from(sum).unwrap_or(i64::MAX));
    }

    /// Forgets roots that have no build any more.
    pub(super) fn retain(&self, is_there: impl Fn(RootId) -> bool) {
        let mut all = self.0.lock();
        all.retain(|root, _| is_there(*root));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_targets_are_counted_and_few_are_named() {
        let mut lost = Lost::new("i");
        for n in 0..50 {
            let label: Arc<str> = format!("//pkg:{:02}", n / 2).into();
            lost.add(&label);
        }
        lost.add(&Arc::default());
        assert_eq!((lost.outputs, lost.target_count()), (51, 25));
        assert_eq!(lost.targets().count(), NAMED);
        assert_eq!(lost.targets().next(), Some("//pkg:00"));
        for n in 0..20_000 {
            lost.add(&format!("//:{n}").into());
        }
        assert_eq!(lost.target_count(), COUNTED as u64);
    }
}
