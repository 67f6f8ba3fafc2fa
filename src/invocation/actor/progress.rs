//! How far a build is settled: by the numbers of its events, and target by target.
//!
//! A completion may be shown upstream only when everything that it calls for is there. Events go upstream in their order,
//! so that one number says it all: the lowest one that still misses something holds everything after it. By the same
//! number a target is settled, also as to sets that it shares with targets before it.

use std::sync::Arc;

use super::Actor;
use crate::{bep::event::TargetId, builds::Progress, invocation::feed::Change};

impl Actor {
    /// Announces how far the build is settled, if that has changed.
    pub(super) fn announce_progress(&mut self) {
        if self.recheck.holds() {
            return;
        }
        // What has not come by the end of a broken stream is not waited for.
        let open = self.build.lowest_open().filter(|_| self.phase.is_open());
        let open_target = self.build.lowest_open_target().filter(|_| self.phase.is_open());
        let through = self.ledger.stream.through(open);
        let (failed_at, messages) = (self.ledger.stream.failed_at, &self.ledger.tally.messages);
        self.followers.progress.send_if_modified(|now| {
            let changed = (now.through, now.open, now.failed_at) != (through, open, failed_at);
            if changed {
                *now = Progress {
                    through,
                    open,
                    failed_at,
                    messages: failed_at.map(|_| messages.clone()).unwrap_or_default(),
                };
            }
            changed
        });
        for target in self
            .ledger
            .stream
            .settled(self.ledger.stream.through(open_target))
        {
            self.target_settled(&target);
        }
    }

    /// Tells the build which of its sets have failed.
    pub(super) fn pass_failures_on(&mut self) {
        for set in self.ledger.failed_sets() {
            self.build.fail_set(set);
        }
    }

    /// All that is required of a target came to its end.
    pub(super) fn target_settled(&mut self, target: &Arc<TargetId>) {
        let failed = self.build.failures(target);
        if let Some(index) = self.ledger.target_settled(target, failed) {
            self.announce_target(index);
        }
    }

    /// Notifies the listeners what a target is now.
    pub(super) fn announce_target(&mut self, index: usize) {
        if let Some((_, row)) = self.ledger.targets.get_index(index)
            && !row.label.is_empty()
        {
            let change = Change::Target(row.clone());
            self.notify(Some(index), &change);
        }
    }

    /// Notifies the listeners.
    pub(super) fn notify(&mut self, target: Option<usize>, change: &Change) {
        self.followers.listeners.notify(target, change);
        if !matches!(change, Change::Output { .. }) {
            self.shared.notify(&self.row.invocation_id, change);
        }
    }
}
