//! What a build has named, what of that it wants, and what has come of it: plain data, no runtime.
//!
//! Every wanted output is on its way until its end is reported ([`Ledger::complete`]); what is on its way is counted
//! here and nowhere else.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, HashSet},
    hash::BuildHasher as _,
    sync::Arc,
};

use indexmap::IndexMap;

use super::{
    parts::{PathHasher, Wanted},
    stream_progress::StreamProgress,
};
use crate::{
    bep::{event::TargetId, named_sets::SetIndex},
    digest::Digest,
    exec_path::{ExecPath, is_reserved},
    invocation::{
        build::{Named, TargetEnd, contradiction, take_contradicting},
        feed::{Hold, PendingOutput, Waiting},
        tally::{RuleIndex, Tally},
    },
    materialize::{Completion, Outcome, Want},
    output::{Class, Directories, OutputContent},
    record::{TargetRow, TargetState, Transfers},
};

/// See the module.
#[derive(Default)]
pub(super) struct Ledger {
    pub(super) wanted: HashMap<ExecPath, Wanted, PathHasher>,
    /// Hashes of the paths that are only known, so that each counts once.
    pub(super) known: HashSet<u64, PathHasher>,
    /// Where all of that lies.
    pub(super) directories: Directories,
    /// Where each flattened name came from, and with what.
    flattened: HashMap<ExecPath, (ExecPath, OutputContent)>,
    /// Required outputs on their way, and optional ones.
    pub(super) required: u64,
    pub(super) optional: u64,
    /// Bytes of all of these.
    pending_bytes: u64,
    /// In the order in which they were named; what follows the build shares them.
    pub(super) targets: IndexMap<Arc<TargetId>, Arc<TargetRow>>,
    pub(super) tally: Tally,
    pub(super) stream: StreamProgress,
    /// Where each content is on disk, once that was asked for.
    pub(super) places: Option<HashMap<Digest, ExecPath>>,
    /// Sets that have a required output which failed, for [`super::Actor`] to pass on.
    failed_sets: Vec<SetIndex>,
}

/// Whose output came to its end.
pub(super) struct Ended {
    pub(super) target: Arc<TargetId>,
    pub(super) group: Arc<str>,
    /// Whether the user should hear that it is not there.
    pub(super) is_missed: bool,
}

/// The row of a target of which nothing more is known.
fn announced(target: &TargetId) -> TargetRow {
    TargetRow {
        label: target.label.clone(),
        aspect: target.aspect.clone(),
        configuration: target.configuration.clone(),
        ..TargetRow::default()
    }
}

/// Leaves the first of what has the same path. Gives what has other content than that.
fn drop_repeated(named: &mut Vec<Named>) -> Vec<Named> {
    let mut seen = HashSet::with_capacity_and_hasher(named.len(), PathHasher::default());
    let first: Vec<bool> = named.iter().map(|n| seen.insert(n.path.as_str())).collect();
    // They are large; nearly always each is there once.
    if !first.contains(&false) {
        return Vec::new();
    }
    let contradicting = take_contradicting(named);
    let mut seen = HashSet::with_capacity_and_hasher(named.len(), PathHasher::default());
    named.retain(|n| seen.insert(n.path.clone()));
    contradicting
}

impl Ledger {
    /// Whether nothing is on its way.
    pub(super) const fn is_quiet(&self) -> bool {
        self.required + self.optional == 0
    }

    /// What is waited for, and at most so many of the outputs that are on their way.
    pub(super) fn waiting(&self, most: usize, hold: Option<Hold>) -> Waiting {
        let mut first = BinaryHeap::with_capacity(most + 1);
        // All that was wanted is looked at, which may be very much.
        let is_any = most > 0 && !self.is_quiet();
        for (path, wanted) in self.wanted.iter().filter(|(_, w)| is_any && !w.done) {
            // Those that come last are on top, and go.
            first.push(Reverse((wanted.class, wanted.content.size(), Reverse(path))));
            if first.len() > most {
                first.pop();
            }
        }
        let outputs = first.into_sorted_vec().into_iter().filter_map(|entry| {
            let Reverse((class, bytes, Reverse(path))) = entry;
            Some(PendingOutput {
                path: path.clone(),
                target: self.wanted.get(path)?.target.clone(),
                bytes,
                class,
            })
        });
        Waiting {
            hold,
            required: self.required,
            optional: self.optional,
            bytes: self.pending_bytes,
            outputs: outputs.collect(),
        }
    }

    /// Sets that have failed since this was asked last.
    pub(super) fn failed_sets(&mut self) -> impl Iterator<Item = SetIndex> + use<> {
        std::mem::take(&mut self.failed_sets).into_iter()
    }

    /// Forgets what only events that are still to come would need: the numbers stay.
    pub(super) fn unload(&mut self) {
        self.places = None;
        self.wanted = HashMap::default();
        self.known = HashSet::default();
        self.directories = Directories::default();
        self.flattened = HashMap::default();
        self.targets = IndexMap::new();
    }

    /// An output is on its way.
    fn begin(&mut self, class: Class, sequence: i64, bytes: u64) {
        self.pending_bytes = self.pending_bytes.saturating_add(bytes);
        match class {
            Class::Required => {
                self.required += 1;
                self.stream.begin(sequence);
            }
            _ => self.optional += 1,
        }
    }

    /// It is not any more.
    fn end(&mut self, class: Class, sequence: i64, bytes: u64) {
        self.pending_bytes = self.pending_bytes.saturating_sub(bytes);
        match class {
            Class::Required => {
                self.required -= 1;
                self.stream.end(sequence);
            }
            _ => self.optional -= 1,
        }
    }

    /// A required output that the event of this number calls for is not available.
    fn output_failed(&mut self, sequence: i64, set: Option<SetIndex>) {
        self.stream.fail(sequence);
        self.failed_sets.extend(set);
    }

    /// Counts what cannot be downloaded whatever the cache does, as of the event that was taken in last.
    pub(super) fn fail(&mut self, class: Class, reason: &str) {
        self.tally.fail(class, reason);
        if class == Class::Required {
            self.output_failed(self.stream.taken(), None);
        }
    }

    /// One more required output of a target has failed.
    pub(super) fn fail_target(&mut self, target: &Arc<TargetId>) {
        if let Some(row) = self.targets.get_mut(target) {
            Arc::make_mut(row).failed += 1;
        }
    }

    /// An output that a target names has failed, whatever is in the cache.
    fn refuse(&mut self, target: &Arc<TargetId>, named: &Named, reason: &str) {
        self.tally.fail(named.class, reason);
        if named.class == Class::Required {
            self.output_failed(named.sequence, named.set);
            self.fail_target(target);
        }
    }

    /// A target's row, to be changed.
    fn row(&mut self, target: &Arc<TargetId>) -> &mut TargetRow {
        let row = self
            .targets
            .entry(target.clone())
            .or_insert_with(|| Arc::new(announced(target)));
        Arc::make_mut(row)
    }

    /// Takes in what a target names, and leaves what is new. Gives what contradicts itself, in words.
    pub(super) fn name(&mut self, target: &Arc<TargetId>, named: &mut Vec<Named>) -> Vec<String> {
        // A path that one target names twice counts once, as the more that it is.
        if !named.is_sorted_by(|a, b| a.class >= b.class) {
            named.sort_by_key(|n| std::cmp::Reverse(n.class));
        }
        if self.know(target, named) {
            return Vec::new();
        }
        let contradicting = drop_repeated(named);
        let counts = self.row(target);
        for n in &contradicting {
            match n.class {
                Class::Required => counts.required += 1,
                Class::Optional => counts.optional += 1,
                Class::Known => {}
            }
        }
        // An output that is wanted already is not asked for again, nor made less than it is.
        let mut failed = 0;
        let (wanted, stream) = (&self.wanted, &mut self.stream);
        named.retain(|n| {
            let Some(old) = wanted.get(&n.path) else {
                return true;
            };
            let again = n.class > old.class || (n.class > Class::Known && n.content != old.content);
            if !again && n.class == Class::Required && old.target != *target {
                if !old.done {
                    stream.share(&n.path, target);
                } else if !old.on_disk {
                    failed += 1;
                }
            }
            again
        });
        self.count(target, named, failed);
        let mut said = Vec::new();
        for n in contradicting {
            let reason = contradiction(&n.path);
            match n.class {
                Class::Known => self.tally.note(&reason),
                _ => self.refuse(target, &n, &reason),
            }
            said.push(reason);
        }
        said
    }

    /// Counts outputs that are all only known, and neither wanted nor repeated. `false` if some may be, as far as they
    /// could be counted then.
    ///
    /// Builds name very many of these, and nearly all of them once.
    fn know(&mut self, target: &Arc<TargetId>, named: &[Named]) -> bool {
        // The first is what is wanted most.
        if named.first().is_some_and(|n| n.class > Class::Known) {
            return false;
        }
        let (wanted, known) = (&self.wanted, &mut self.known);
        known.reserve(named.len());
        let new = named.iter().filter(|n| {
            let hash = known.hasher().hash_one(n.path.as_str());
            !wanted.contains_key(&n.path) && known.insert(hash)
        });
        let new = new.count();
        self.tally.known += new as u64;
        self.row(target).known += new as u64;
        new == named.len()
    }

    /// Counts a target's new outputs.
    fn count(&mut self, target: &Arc<TargetId>, named: &[Named], failed: u64) {
        let (mut known, mut required, mut optional) = (0, 0, 0);
        for n in named {
            let hash = |known: &HashSet<u64, PathHasher>| known.hasher().hash_one(n.path.as_str());
            match n.class {
                // Other sets, groups and targets may have named it before.
                Class::Known => {
                    let hash = hash(&self.known);
                    if self.known.insert(hash) {
                        known += 1;
                        self.tally.known += 1;
                    }
                    continue;
                }
                Class::Required => required += 1,
                Class::Optional => optional += 1,
            }
            if !self.known.is_empty() {
                let hash = hash(&self.known);
                if self.known.remove(&hash) {
                    self.tally.known -= 1;
                }
            }
        }
        let counts = self.row(target);
        counts.known += known;
        counts.required += required;
        counts.optional += optional;
        counts.failed += failed;
    }

    /// Puts what is wanted of what was named on its way, unless all of it is `blocked`. What cannot be placed is counted as
    /// failed; of two outputs that contradict each other, the one that was named first counts, and the other one is taken
    /// out of the list.
    pub(super) fn want(&mut self, target: &Arc<TargetId>, named: &mut Vec<Named>, blocked: Option<&str>) {
        let mut refused = HashSet::new();
        for n in named.iter().filter(|n| n.class > Class::Known) {
            let wanted = &self.wanted;
            let is_file = |path: &str| {
                let there = wanted.get(path);
                there.is_some_and(|there| there.content != OutputContent::Directory)
            };
            let reason = match blocked {
                Some(reason) => Some(format!("{}: {reason}", n.path)),
                None => {
                    let taken_in = self.directories.take_in(&n.path, &n.content, is_file);
                    taken_in.err().map(|error| {
                        refused.insert(n.path.clone());
                        error.to_string()
                    })
                }
            };
            if let Some(reason) = reason {
                self.refuse(target, n, &reason);
                continue;
            }
            let wanted = Wanted {
                content: n.content.clone(),
                class: n.class,
                rule: self.tally.rule(&n.rule),
                target: target.clone(),
                group: n.group.clone(),
                sequence: n.sequence,
                set: n.set,
                done: false,
                on_disk: false,
            };
            let old = self.wanted.insert(n.path.clone(), wanted);
            if old.as_ref().is_some_and(|old| !old.content.is_same(&n.content)) {
                self.tally.note(&format!(
                    "{}: the build names it again with other content, which it ended with",
                    n.path
                ));
            }
            // Its earlier want will be answered as well, and must not count twice.
            if let Some(old) = old.filter(|old| !old.done) {
                self.end(old.class, old.sequence, old.content.size());
            }
            self.begin(n.class, n.sequence, n.content.size());
        }
        if !refused.is_empty() {
            named.retain(|n| !refused.contains(&n.path));
        }
    }

    /// Takes the end of an output. `None` if it answers a want that a later one has replaced.
    pub(super) fn complete(&mut self, completion: &Completion) -> Option<Ended> {
        let wanted = self.wanted.get_mut(&completion.path)?;
        if wanted.done || completion.class != wanted.class || completion.content != wanted.content {
            return None;
        }
        wanted.done = true;
        wanted.on_disk = completion.outcome.is_on_disk();
        let (class, sequence, set) = (wanted.class, wanted.sequence, wanted.set);
        let (on_disk, target) = (wanted.on_disk, wanted.target.clone());
        let (group, rule) = (wanted.group.clone(), wanted.rule);
        self.end(class, sequence, completion.content.size());
        let sharers = self.stream.sharers(&completion.path);
        let is_missed = !on_disk && completion.outcome != Outcome::Superseded;
        if is_missed && class == Class::Required {
            self.output_failed(sequence, set);
            for target in sharers.iter().chain([&target]) {
                self.fail_target(target);
            }
        }
        if on_disk
            && let Some(places) = &mut self.places
            && let OutputContent::Blob(digest) = &completion.content
        {
            places.insert(digest.clone(), completion.path.clone());
        }
        self.tally.add(completion);
        self.count_transfers(&completion.outcome, &target, rule, u64::saturating_add);
        Some(Ended {
            target,
            group,
            is_missed,
        })
    }

    /// Counts, or uncounts, what was transferred for an output of a target.
    fn count_transfers(
        &mut self,
        outcome: &Outcome,
        target: &Arc<TargetId>,
        rule: RuleIndex,
        change: fn(u64, u64) -> u64,
    ) {
        let transfers = outcome.transfers();
        if transfers == Transfers::default() {
            return;
        }
        self.tally.count_transfers(transfers, rule, change);
        if let Some(row) = self.targets.get_mut(target) {
            let row = Arc::make_mut(row);
            row.transfers = row.transfers.changed(transfers, change);
        }
    }

    /// An output that was on disk is not any more, and is wanted once more.
    pub(super) fn want_again(&mut self, path: ExecPath, outcome: &Outcome) -> Option<Want> {
        let wanted = self.wanted.get_mut(&path).filter(|wanted| wanted.done)?;
        wanted.done = false;
        wanted.on_disk = false;
        let (class, sequence) = (wanted.class, wanted.sequence);
        let (target, rule) = (wanted.target.clone(), wanted.rule);
        let want = Want::new(path, wanted.content.clone(), class, None);
        self.begin(class, sequence, want.content.size());
        self.tally.take_back(outcome);
        self.count_transfers(outcome, &target, rule, u64::saturating_sub);
        Some(want)
    }

    /// Gives every output its bare file name; two of one name are an error that names both, unless
    /// they have the same content.
    pub(super) fn flatten(&mut self, named: &mut Vec<Named>) {
        named.retain_mut(|n| {
            // Only what goes there takes a name.
            if n.class == Class::Known {
                return true;
            }
            // A file name is a path of one component, and cannot escape.
            let Ok(flat) = ExecPath::new(n.path.file_name()) else {
                return false;
            };
            let refused = match self.flattened.get(&flat) {
                Some((other, content)) if *other != n.path && !content.is_same(&n.content) => {
                    format!("{other} and {} have the same name", n.path)
                }
                _ if is_reserved(flat.as_str()) => {
                    format!(
                        "{} has a name that is reserved for outhaul; do not use --flatten",
                        n.path
                    )
                }
                _ => {
                    self.flattened
                        .insert(flat.clone(), (n.path.clone(), n.content.clone()));
                    n.path = flat;
                    return true;
                }
            };
            self.tally.fail(n.class, &refused);
            if n.class == Class::Required {
                self.output_failed(n.sequence, n.set);
            }
            false
        });
    }

    /// A target was announced. Its place, if it is new.
    pub(super) fn announce(&mut self, target: TargetId) -> Option<usize> {
        if self.targets.contains_key(&target) {
            return None;
        }
        let row = Arc::new(announced(&target));
        Some(self.targets.insert_full(Arc::new(target), row).0)
    }

    /// A target came to its end as far as the build tool is concerned. Its place, if that changes it.
    pub(super) fn target_ended(
        &mut self,
        target: Arc<TargetId>,
        end: TargetEnd,
        sequence: i64,
    ) -> Option<usize> {
        let row = self.row(&target);
        let mut is_completed = false;
        match end {
            TargetEnd::Completed {
                success,
                awaits_tests,
            } => {
                row.success = success;
                row.state = if success {
                    TargetState::Completed
                } else {
                    TargetState::Failed
                };
                is_completed = !awaits_tests;
            }
            // It can come once more after the end of the build (Bazel issue 21767); what is complete stays so.
            TargetEnd::Aborted if row.state == TargetState::Announced => row.state = TargetState::Aborted,
            TargetEnd::Aborted => return None,
        }
        let index = self.targets.get_index_of(&target);
        if is_completed {
            self.stream.completed(sequence, target);
        }
        index
    }

    /// All required outputs of a target have ended, with this many failures of those that it shares with others. Gives
    /// its place.
    pub(super) fn target_settled(&mut self, target: &Arc<TargetId>, failed: u64) -> Option<usize> {
        let (index, _, row) = self.targets.get_full_mut(target)?;
        let row = Arc::make_mut(row);
        // A failure is reported for the target that named the output first; it counts for all that share it.
        row.failed = row.failed.max(failed);
        if row.failed > 0 {
            row.state = TargetState::Failed;
        } else if row.state == TargetState::Completed {
            row.state = TargetState::Settled;
        }
        Some(index)
    }

    /// Targets that are not settled, or that the last look at the disk has changed.
    pub(super) fn unsettled(&self) -> Vec<Arc<TargetId>> {
        let unsettled = self.targets.iter().filter(|(_, row)| match row.state {
            TargetState::Completed => true,
            TargetState::Settled => row.failed > 0,
            _ => false,
        });
        unsettled.map(|(target, _)| target.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{digest::DigestFunction, materialize::Source};

    fn target(label: &str) -> Arc<TargetId> {
        Arc::new(TargetId {
            label: label.to_owned(),
            ..TargetId::default()
        })
    }

    fn blob(text: &str) -> OutputContent {
        OutputContent::Blob(Digest::of(DigestFunction::Sha256, text.as_bytes()))
    }

    fn named(path: &str, text: &str, class: Class, sequence: i64) -> Named {
        Named {
            path: ExecPath::new(path).unwrap(),
            content: blob(text),
            class,
            rule: "".into(),
            group: "".into(),
            event: "".into(),
            sequence,
            set: None,
        }
    }

    fn end(path: &str, text: &str, class: Class, outcome: Outcome) -> Completion {
        Completion {
            fetched: None,
            path: ExecPath::new(path).unwrap(),
            content: blob(text),
            class,
            outcome,
            took: Duration::ZERO,
        }
    }

    fn downloaded() -> Outcome {
        Outcome::Downloaded {
            source: Source::Batch,
            store: None,
            stamp: None,
            bytes: 5,
        }
    }

    /// Names outputs and wants them.
    fn take(ledger: &mut Ledger, label: &str, mut outputs: Vec<Named>) -> usize {
        let target = target(label);
        ledger.name(&target, &mut outputs);
        ledger.want(&target, &mut outputs, None);
        outputs.len()
    }

    const A: &str = "bazel-out/a";
    const B: &str = "bazel-out/b";

    #[test]
    fn what_is_on_its_way_is_counted_until_its_end_is_reported() {
        use Class::{Known, Optional, Required};
        let failed = || Outcome::Failed("no".to_owned());
        // What is named, what comes to its end, and what is on its way then, is known and has failed.
        for (names, ends, required, optional, known, failures) in [
            (vec![(A, "1", Required)], vec![], 1, 0, 0, 0),
            (vec![(A, "1", Required), (B, "2", Optional)], vec![], 1, 1, 0, 0),
            (vec![(A, "1", Known)], vec![], 0, 0, 1, 0),
            // Named again as more than it was.
            (vec![(A, "1", Known), (A, "1", Required)], vec![], 1, 0, 0, 0),
            (vec![(A, "1", Optional), (A, "1", Required)], vec![], 1, 0, 0, 0),
            // And as less, and with other content.
            (vec![(A, "1", Required), (A, "1", Known)], vec![], 1, 0, 0, 0),
            (vec![(A, "1", Required), (A, "2", Required)], vec![], 1, 0, 0, 0),
            (vec![(A, "1", Required)], vec![(A, "1", downloaded())], 0, 0, 0, 0),
            (vec![(A, "1", Required)], vec![(A, "1", failed())], 0, 0, 0, 1),
            (
                vec![(A, "1", Required)],
                vec![(A, "1", Outcome::Superseded)],
                0,
                0,
                0,
                0,
            ),
            // The answer to a want that was replaced.
            (
                vec![(A, "1", Required), (A, "2", Required)],
                vec![(A, "1", failed())],
                1,
                0,
                0,
                0,
            ),
            // Reported twice.
            (
                vec![(A, "1", Required), (B, "2", Required)],
                vec![(A, "1", downloaded()), (A, "1", downloaded())],
                1,
                0,
                0,
                0,
            ),
        ] {
            let mut ledger = Ledger::default();
            for (n, (path, text, class)) in names.iter().enumerate() {
                take(
                    &mut ledger,
                    &format!("//:{n}"),
                    vec![named(path, text, *class, n as i64)],
                );
            }
            for (path, text, outcome) in ends {
                ledger.complete(&end(path, text, Required, outcome));
            }
            let now = (
                ledger.required,
                ledger.optional,
                ledger.tally.known,
                ledger.tally.failed,
            );
            assert_eq!(now, (required, optional, known, failures), "{names:?}");
            assert_eq!(ledger.is_quiet(), required + optional == 0);
        }
    }

    #[test]
    fn what_was_transferred_is_counted_by_target_and_rule_and_taken_back() {
        let mut ledger = Ledger::default();
        let outputs = [(A, "1"), (B, "2")].map(|(path, text)| Named {
            rule: "toplevel".into(),
            ..named(path, text, Class::Required, 1)
        });
        take(&mut ledger, "//:a", outputs.to_vec());
        let present = Outcome::Present {
            stamp: None,
            hashed: false,
        };
        ledger.complete(&end(A, "1", Class::Required, downloaded()));
        ledger.complete(&end(B, "2", Class::Required, present.clone()));
        let counted = |ledger: &Ledger| {
            let of_target = ledger.targets[&target("//:a")].transfers;
            assert_eq!(ledger.tally.rules, [("toplevel".into(), of_target)]);
            (
                of_target.downloaded,
                of_target.downloaded_bytes,
                of_target.without_download,
            )
        };
        assert_eq!(counted(&ledger), (1, 5, 1));
        let path = |path| ExecPath::new(path).unwrap();
        ledger.want_again(path(B), &present).unwrap();
        assert_eq!(counted(&ledger), (1, 5, 0));
        ledger.complete(&end(B, "2", Class::Required, downloaded()));
        assert_eq!(counted(&ledger), (2, 10, 0));
    }

    #[test]
    fn a_target_that_shares_a_failed_output_has_failed_as_well() {
        let mut ledger = Ledger::default();
        for label in ["//:first", "//:second"] {
            let outputs = vec![named(A, "1", Class::Required, 1)];
            let new = take(&mut ledger, label, outputs);
            assert_eq!(new, usize::from(label == "//:first"), "it is asked for once");
        }
        ledger.complete(&end(A, "1", Class::Required, Outcome::Evicted("gone".to_owned())));
        // One that names it after its end.
        take(&mut ledger, "//:third", vec![named(A, "1", Class::Required, 2)]);
        for label in ["//:first", "//:second", "//:third"] {
            let target = target(label);
            let end = TargetEnd::Completed {
                success: true,
                awaits_tests: false,
            };
            ledger.target_ended(target.clone(), end, 3);
            ledger.target_settled(&target, 0);
            let row = &ledger.targets[&target];
            assert_eq!((row.failed, row.state), (1, TargetState::Failed), "{label}");
        }
    }

    #[test]
    fn what_is_wanted_again_is_on_its_way_again_and_counted_once() {
        let mut ledger = Ledger::default();
        take(&mut ledger, "//:a", vec![named(A, "1", Class::Required, 1)]);
        let path = || ExecPath::new(A).unwrap();
        assert!(
            ledger.want_again(path(), &downloaded()).is_none(),
            "it is on its way"
        );
        ledger.complete(&end(A, "1", Class::Required, downloaded()));
        assert_eq!((ledger.tally.downloaded, ledger.is_quiet()), (1, true));
        assert!(ledger.want_again(path(), &downloaded()).is_some());
        assert_eq!((ledger.tally.downloaded, ledger.required), (0, 1));
        ledger.complete(&end(A, "1", Class::Required, downloaded()));
        assert_eq!((ledger.tally.downloaded, ledger.required), (1, 0));
    }

    #[test]
    fn what_is_blocked_or_contradicts_itself_fails_and_is_not_on_its_way() {
        let mut ledger = Ledger::default();
        let target = target("//:a");
        let mut outputs = vec![named(A, "1", Class::Required, 1)];
        ledger.name(&target, &mut outputs);
        ledger.want(&target, &mut outputs, Some("no cache"));
        assert_eq!((ledger.tally.failed, ledger.is_quiet()), (1, true));
        assert!(ledger.tally.messages[0].contains("no cache"));
        // A file, and another one below it; the first one counts.
        let below = format!("{B}/c");
        let mut outputs = vec![
            named(B, "1", Class::Required, 2),
            named(&below, "2", Class::Required, 2),
        ];
        ledger.name(&target, &mut outputs);
        ledger.want(&target, &mut outputs, None);
        assert_eq!((outputs.len(), ledger.required, ledger.tally.failed), (1, 1, 2));
        assert_eq!(ledger.targets[&target].failed, 2);
    }
}
