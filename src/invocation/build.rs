//! One build as its events describe it: what they name, and what of that is wanted.
//!
//! [`Build`] is plain data: events go in, [`Effect`]s come out, in order. It waits with outputs until it knows the
//! command and the exec root, with a completed target until every set that it refers to has come, and with a test's
//! files until its summary says where they belong; what has not come by the end of the stream is done without.

mod effect;
mod namer;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

pub use self::effect::{Effect, Named, TargetEnd};
pub(crate) use self::effect::{contradiction, take_contradicting};
use self::namer::{Namer, Visited, event_of, output_path};
use super::{
    limits::{Admission, Meter},
    policy::Policy,
    runfiles::parts_of,
    selection::{Command, GroupContext, Origin, ProfileId, Selector, Verdict},
    test_outputs::{self, TestShape},
    trees::{Inline, Trees},
};
use crate::{
    bep::{
        event::{Action, CommandLine, Completed, Event, File, NamedSet, TargetId, TestResult},
        named_sets::{NamedSets, SetBits, SetIndex, Ticket},
    },
    exec_path::ExecPath,
    output::Class,
};

/// Where Bazel makes the report of all tests' coverage (`CoverageReportActionBuilder`).
const COMBINED_REPORT: &str = "bazel-out/_coverage/_coverage_report.dat";

/// What the build tool left out of the stream.
#[derive(Debug, Default)]
struct LeftOut {
    /// Absolute paths of outputs that it could not read.
    unreadable: Vec<String>,
    /// Targets of which no output is named, though they have some.
    hollow: Vec<Arc<TargetId>>,
    /// How many targets were given up because others failed.
    incomplete: usize,
}

/// A test's results with their events' numbers, by run, shard and attempt: a repeated event replaces what it repeats.
type Attempts = HashMap<(u32, u32, u32), (i64, TestResult)>;

/// What the stream has said of the build as a whole.
#[derive(Default)]
struct Facts {
    command: Command,
    started: bool,
    /// Where the build's client was started, as the build tool sees it.
    working_directory: String,
    /// The effective command line.
    command_line: Option<CommandLine>,
    exec_root: Option<String>,
    /// Configured targets that are tests.
    tests: HashSet<String>,
    /// Those that are groups of files.
    filegroups: HashSet<String>,
    configurations: HashMap<String, String>,
}

/// One build's life.
pub struct Build {
    meter: Meter,
    /// Whether the blobs of outputs that an output service has are to be read.
    pub(super) warms_output_service: bool,
    /// Whether outputs of other roots may be copied.
    pub(super) has_local_sources: bool,
    selector: Selector,
    facts: Facts,
    ready: bool,
    has_authority: bool,
    sets: NamedSets,
    visited: BTreeMap<ProfileId, Visited>,
    trees: Trees,
    /// Sets that any target refers to.
    referenced: SetBits,
    left_out: LeftOut,
    /// By label and configuration.
    results: HashMap<(String, String), Attempts>,
    /// Completed targets that wait for the command and the exec root.
    backlog: Vec<(i64, Event)>,
    /// Completed targets that wait for sets.
    parked: HashMap<Ticket, (i64, Completed)>,
    /// Numbers of events whose outputs are not known yet; those of tests' results by themselves, since a target that
    /// is not a test has nothing to do with them.
    open: BTreeSet<i64>,
    open_results: BTreeSet<i64>,
    /// Whether sets are open until a target that refers to them is completed, and the numbers of those that are.
    holds_sets: bool,
    set_numbers: HashMap<SetIndex, i64>,
    /// The sets of each completed target, for what they have in common.
    roots: HashMap<Arc<TargetId>, Box<[SetIndex]>>,
}

impl Build {
    /// A build of which nothing is known yet.
    pub fn new(policy: Policy) -> Self {
        Self {
            meter: Meter::new(policy.limits),
            warms_output_service: policy.warm_output_service,
            has_local_sources: !policy.no_local_sources,
            selector: Selector::new(policy),
            facts: Facts::default(),
            ready: false,
            has_authority: false,
            sets: NamedSets::default(),
            visited: BTreeMap::new(),
            trees: Trees::default(),
            referenced: SetBits::default(),
            left_out: LeftOut::default(),
            results: HashMap::new(),
            backlog: Vec::new(),
            parked: HashMap::new(),
            open: BTreeSet::new(),
            open_results: BTreeSet::new(),
            holds_sets: false,
            set_numbers: HashMap::new(),
            roots: HashMap::new(),
        }
    }

    /// Whether the event that brings a set is open ([`Self::lowest_open`]) until a target refers to the set, and its
    /// outputs have that event's number.
    pub(crate) fn holding_sets(mut self, holds: bool) -> Self {
        self.holds_sets = holds;
        self
    }

    /// The lowest number of an event whose outputs are not known yet, because something that they need has not come.
    pub(crate) fn lowest_open(&self) -> Option<i64> {
        let result = self.open_results.first().copied();
        self.lowest_open_target().into_iter().chain(result).min()
    }

    /// The same without the results of tests, whose files wait for a summary.
    pub(crate) fn lowest_open_target(&self) -> Option<i64> {
        self.open.first().copied()
    }

    /// A required output that this set has failed to download.
    pub(crate) fn fail_set(&mut self, set: SetIndex) {
        self.sets.fail(set);
    }

    /// How many required outputs of the sets that a completed target refers to, directly or through others, could not
    /// be downloaded: see [`NamedSets::failures`].
    pub fn failures(&mut self, target: &TargetId) -> u64 {
        let roots = self.roots.get(target).map_or(&[][..], |roots| roots);
        self.sets.failures(roots)
    }

    /// The effective command line, once it is known.
    pub(super) const fn command_line(&self) -> Option<&CommandLine> {
        self.facts.command_line.as_ref()
    }

    /// Where the build's client was started, as the build tool sees it; empty if it does not say.
    pub(super) fn working_directory(&self) -> &str {
        &self.facts.working_directory
    }

    /// The exec root as the build tool calls it.
    pub(super) fn exec_root(&self) -> Option<&str> {
        self.facts.exec_root.as_deref()
    }

    /// Whether a target is a group of files, which hands on what others make.
    pub(super) fn is_filegroup(&self, label: &str) -> bool {
        self.facts.filegroups.contains(label)
    }

    /// Whether a target is a test that this command runs.
    pub(super) fn is_tested(&self, label: &str) -> bool {
        matches!(self.facts.command, Command::Test | Command::Coverage) && self.facts.tests.contains(label)
    }

    /// Where a target has the program that is called as it is.
    pub(super) fn program(&self, target: &TargetId) -> Option<String> {
        let mnemonic = self.facts.configurations.get(&target.configuration)?;
        test_outputs::path_of_target(&target.label, mnemonic, "bin", self.has_siblings())
    }

    /// Where the outputs of a target's package are, but for those of packages below it.
    pub(super) fn package_directory(&self, target: &TargetId) -> Option<String> {
        let path = self.program(target)?;
        let (_, _, name) = parts_of(&target.label)?;
        let directory = path.strip_suffix(name)?.trim_end_matches('/');
        // Nothing has checked a label.
        ExecPath::new(directory).ok()?;
        Some(directory.to_owned())
    }

    /// Whether outputs of other repositories lie beside those of the main one.
    fn has_siblings(&self) -> bool {
        let line = self.facts.command_line.as_ref();
        line.is_some_and(|line| line.switch("experimental_sibling_repository_layout") == Some(true))
    }

    /// How much one of a target's runfiles is wanted, and why. The size is unknown for what was not found.
    pub(super) fn select_runfile(
        &mut self,
        label: &str,
        path: &str,
        tree: Option<&str>,
        size: Option<u64>,
    ) -> Verdict {
        let test_rule = self.facts.tests.contains(label);
        let profile = self.profile(label, Origin::Runfiles { test_rule });
        self.selector.select(profile, path, tree, size)
    }

    /// The most that any of a target's runfiles can be wanted.
    pub(super) fn most_of_runfiles(&mut self, label: &str) -> Class {
        let test_rule = self.facts.tests.contains(label);
        let profile = self.profile(label, Origin::Runfiles { test_rule });
        self.selector.most(profile)
    }

    /// The profile of files that are in no output group.
    fn profile(&mut self, label: &str, origin: Origin) -> ProfileId {
        self.selector.profile(&GroupContext {
            command: self.facts.command,
            label,
            aspect: "",
            group: "",
            origin,
        })
    }

    /// Takes the event of this number in. Numbers grow.
    pub fn handle(&mut self, sequence: i64, event: Event) -> Vec<Effect> {
        match self.meter.admit(&event) {
            Admission::Taken => self.take(sequence, event),
            // As if an output that it may have named failed to download.
            Admission::Skipped(reason) | Admission::Over(reason) => {
                vec![Effect::Unusable(Class::Required, reason)]
            }
            Admission::Ignored => Vec::new(),
        }
    }

    /// What comes next is beyond a limit outside of this.
    pub fn limit(&mut self, reason: String) -> Vec<Effect> {
        if self.meter.close() {
            vec![Effect::Unusable(Class::Required, reason)]
        } else {
            Vec::new()
        }
    }

    /// An event that is within the limits.
    fn take(&mut self, sequence: i64, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        match event {
            Event::Started(started) => {
                self.facts.command = Command::from_name(&started.command);
                self.facts.started = true;
                self.facts
                    .working_directory
                    .clone_from(&started.working_directory);
                effects.push(Effect::Started(started));
                self.get_ready(&mut effects);
            }
            Event::ExecRoot(path) => {
                self.facts.exec_root = Some(path);
                self.get_ready(&mut effects);
            }
            Event::CommandLine(line) if line.label == "canonical" => self.facts.command_line = Some(line),
            Event::Configuration { id, mnemonic } => {
                self.facts.configurations.insert(id, mnemonic);
            }
            Event::Configured {
                label,
                kind,
                completions,
            } => {
                if is_test(&kind) {
                    self.facts.tests.insert(label);
                } else if kind == "filegroup rule" {
                    self.facts.filegroups.insert(label);
                }
                if !completions.is_empty() {
                    effects.push(Effect::Announced(completions));
                }
            }
            Event::NamedSet(set) => self.named_set(sequence, set, &mut effects),
            Event::TestResult(result) => {
                let key = (result.label.clone(), result.configuration.clone());
                let results = self.results.entry(key).or_default();
                let attempt = (result.run, result.shard, result.attempt);
                if let Some((repeated, _)) = results.insert(attempt, (sequence, result)) {
                    self.open_results.remove(&repeated);
                }
                self.open_results.insert(sequence);
            }
            Event::Completed(_) | Event::TestSummary { .. } | Event::Action(_) | Event::CombinedReport(_)
                if !self.ready =>
            {
                self.open.insert(sequence);
                self.backlog.push((sequence, event));
            }
            Event::Completed(completed) => self.complete(sequence, completed, &mut effects),
            Event::TestSummary {
                label,
                configuration,
                shard_count,
                run_count,
            } => {
                let counts = (shard_count, run_count);
                self.tested(sequence, (label, configuration), counts, &mut effects);
            }
            Event::Action(action) => self.action(sequence, &action, &mut effects),
            Event::Aborted {
                target: Some(target),
                reason,
                ..
            } => {
                self.left_out.incomplete += usize::from(reason == "INCOMPLETE");
                effects.push(Effect::Target(Arc::new(target), TargetEnd::Aborted, sequence));
            }
            Event::CombinedReport(file) => self.combined_report(sequence, &file, &mut effects),
            Event::Unreadable(paths) => self.left_out.unreadable.extend(paths),
            Event::Skipped(reason) => effects.push(Effect::Unusable(Class::Required, reason)),
            Event::ConvenienceSymlinks(links) => effects.push(Effect::ConvenienceSymlinks(links)),
            Event::Finished { exit_code, .. } => effects.push(Effect::Finished { exit_code }),
            Event::CommandLine(_) | Event::Aborted { target: None, .. } | Event::Other => {}
        }
        effects
    }

    /// The stream is over: what waited for more is done with what there is, and sets that no target refers to are
    /// recorded as known.
    pub fn end(&mut self) -> Vec<Effect> {
        let mut effects = Vec::new();
        for released in self.sets.finish() {
            if let Some((sequence, completed)) = self.parked.remove(&released.ticket) {
                let target = &completed.target;
                effects.push(if released.missing.is_empty() {
                    let reason = format!("{target} refers to named sets of files that include each other");
                    Effect::Refused(reason)
                } else {
                    // The target lacks them, whatever else it has.
                    for set in released
                        .missing
                        .iter()
                        .filter_map(|id| self.sets.find(id))
                        .collect::<Vec<_>>()
                    {
                        self.sets.fail(set);
                    }
                    let missing = released.missing.join(", ");
                    let reason =
                        format!("{target} refers to named sets of files that were never sent: {missing}");
                    Effect::Unusable(Class::Required, reason)
                });
                self.expand(sequence, completed, &mut effects);
            }
        }
        if !self.ready && !self.backlog.is_empty() {
            effects.push(Effect::Unusable(
                Class::Required,
                "the stream names outputs but no exec root; nothing was downloaded".to_owned(),
            ));
        }
        let mut open: Vec<_> = self
            .results
            .iter()
            .filter_map(|(key, results)| {
                let last = results.values().map(|(number, _)| *number).max()?;
                Some((last, key.clone()))
            })
            .collect();
        open.sort_unstable();
        if self.ready {
            for (sequence, key) in open {
                self.tested(sequence, key, (0, 0), &mut effects);
            }
            self.unreferenced(&mut effects);
        }
        self.open.clear();
        self.open_results.clear();
        let left_out = std::mem::take(&mut self.left_out);
        let root = self
            .facts
            .exec_root
            .as_deref()
            .unwrap_or_default()
            .trim_end_matches('/');
        let unnamed: Vec<ExecPath> = left_out
            .unreadable
            .iter()
            .filter_map(|path| {
                output_path(&path.strip_prefix(root)?.strip_prefix('/')?.into())
                    .ok()
                    .flatten()
            })
            .collect();
        effects.extend(self.incomplete(left_out.incomplete));
        if unnamed.is_empty() {
            effects.extend(left_out.hollow.into_iter().map(Effect::Hollow));
        } else {
            effects.push(Effect::Unnamed(unnamed));
        }
        effects
    }

    /// Reports targets that were given up. In its other modes, the build tool has downloaded what was made of them.
    fn incomplete(&self, count: usize) -> Option<Effect> {
        let line = self.facts.command_line.as_ref();
        let is_minimal = line.is_some_and(|line| line.download_mode() == Some("minimal"));
        (count > 0 && is_minimal).then(|| {
            let reason = format!(
                "{count} targets were not completed because of failures; outputs of theirs that were made are not named, \
                 and were not downloaded"
            );
            Effect::Unusable(Class::Known, reason)
        })
    }

    /// Reports, once, where the stream says that blobs are.
    fn note_authority(&mut self, set: &NamedSet, effects: &mut Vec<Effect>) {
        if let Some(authority) = set.authority.as_deref().filter(|_| !self.has_authority) {
            self.has_authority = true;
            effects.push(Effect::Authority(authority.to_owned()));
        }
    }

    fn named_set(&mut self, sequence: i64, set: NamedSet, effects: &mut Vec<Effect>) {
        self.note_authority(&set, effects);
        let is_noted = self.holds_sets || self.trees.are_known();
        let id = is_noted.then(|| set.id.clone());
        let is_new = self.sets.files(&set.id).is_none();
        let released = self.sets.insert(set);
        if let Some(set) = id.and_then(|id| self.sets.find(&id)) {
            if self.holds_sets {
                self.set_numbers.insert(set, sequence);
                self.open.insert(sequence);
            }
            if let Some(files) = self.sets.files_of(set).filter(|_| is_new) {
                self.trees.set_came(set, files);
            }
        }
        for ticket in released {
            if let Some((sequence, completed)) = self.parked.remove(&ticket) {
                self.expand(sequence, completed, effects);
            }
        }
    }

    fn get_ready(&mut self, effects: &mut Vec<Effect>) {
        if self.ready || !self.facts.started {
            return;
        }
        let Some(root) = &self.facts.exec_root else { return };
        self.ready = true;
        effects.push(Effect::ExecRoot(root.clone()));
        for (sequence, event) in std::mem::take(&mut self.backlog) {
            self.open.remove(&sequence);
            effects.extend(self.take(sequence, event));
        }
    }

    fn complete(&mut self, sequence: i64, completed: Completed, effects: &mut Vec<Effect>) {
        let roots = completed.groups.iter().flat_map(|group| &group.sets);
        match self.sets.park(roots.map(String::as_str)) {
            Some(ticket) => {
                self.open.insert(sequence);
                self.parked.insert(ticket, (sequence, completed));
            }
            None => self.expand(sequence, completed, effects),
        }
    }

    fn expand(&mut self, sequence: i64, mut completed: Completed, effects: &mut Vec<Effect>) {
        self.open.remove(&sequence);
        let target = Arc::new(std::mem::take(&mut completed.target));
        let event: Arc<str> = format!("target_completed {target}").into();
        let test_rule = self.facts.tests.contains(&target.label);
        let trees: Vec<&File> = completed.directories.iter().filter(|d| d.has_prefix()).collect();
        let mut again = Vec::new();
        for tree in &trees {
            again.extend(self.trees.add(&tree.path, &self.sets));
        }
        self.note_hollow(&target, &completed);
        let mut groups = Vec::with_capacity(completed.groups.len());
        for group in completed.groups {
            let profile = self.group_profile(&target, &group.name);
            let name: Arc<str> = group.name.into();
            let files: Arc<[File]> = group.files.into();
            if !files.is_empty() {
                self.trees.event_came(Inline {
                    files: files.clone(),
                    profile,
                    group: name.clone(),
                    event: event.clone(),
                });
            }
            groups.push((profile, name, group.sets, files, group.incomplete));
        }
        let mut namer = Namer::new(&mut self.selector, &self.trees, sequence);
        for run in again {
            namer.run_again(run, &self.sets, &self.visited);
        }
        let mut directory_profile = None;
        let mut refers_to = Vec::new();
        for (profile, name, sets, own, incomplete) in groups {
            let visited = self.visited.entry(profile).or_insert_with(|| Visited {
                sets: SetBits::default(),
                group: name.clone(),
            });
            refers_to.extend(sets.iter().filter_map(|id| self.sets.find(id)));
            let roots = sets.iter().map(String::as_str);
            let referenced = &mut self.referenced;
            for (set, files) in self.sets.expand(roots, |set| visited.sets.test_and_set(set)) {
                referenced.test_and_set(set);
                let event = event_of(&self.sets, set);
                namer.set = Some(set);
                if let Some(number) = self.set_numbers.get(&set) {
                    self.open.remove(number);
                    namer.sequence = *number;
                }
                namer.name_all(files, profile, &name, &event);
            }
            (namer.set, namer.sequence) = (None, sequence);
            namer.name_all(&own, profile, &name, &event);
            if !incomplete {
                directory_profile = directory_profile.or(Some((profile, name)));
            }
        }
        // Files of a tree name it, no matter who has them; an empty tree has only its root.
        if let Some((profile, name)) = directory_profile {
            for tree in trees {
                if self.trees.is_empty(&tree.path) {
                    namer.directory(&tree.path, profile, &name, &event);
                }
            }
        }
        namer.finish(&target, effects);
        self.roots.insert(target.clone(), refers_to.into());
        let is_tested = test_rule && target.aspect.is_empty() && self.facts.command.tests();
        let end = TargetEnd::Completed {
            success: completed.success,
            awaits_tests: completed.success && is_tested,
        };
        effects.push(Effect::Target(target, end, sequence));
    }

    /// Takes note of a target whose required outputs are missing from its sets, all of them. An empty tree has only its root,
    /// and a group without outputs no sets at all.
    fn note_hollow(&mut self, target: &Arc<TargetId>, completed: &Completed) {
        // One of a source directory has sets without files as well.
        let is_hollow = completed.success
            && !self.facts.filegroups.contains(&target.label)
            && completed.directories.is_empty()
            && completed.groups.iter().any(|group| {
                group.files.is_empty() && is_hollow_group(&self.sets, &group.sets) && {
                    let profile = self.group_profile(target, &group.name);
                    self.selector.most(profile) == Class::Required
                }
            });
        if is_hollow {
            self.left_out.hollow.push(target.clone());
        }
    }

    /// The profile of files that are in an output group of a target.
    fn group_profile(&mut self, target: &TargetId, group: &str) -> ProfileId {
        let test_rule = self.facts.tests.contains(&target.label);
        self.selector.profile(&GroupContext {
            command: self.facts.command,
            label: &target.label,
            aspect: &target.aspect,
            group,
            origin: Origin::Group { test_rule },
        })
    }

    /// The tests of a target were run, by label and configuration, with this many shards and runs.
    fn tested(
        &mut self,
        sequence: i64,
        key: (String, String),
        (shards, runs): (u32, u32),
        effects: &mut Vec<Effect>,
    ) {
        let mnemonic = self.facts.configurations.get(&key.1).cloned();
        let siblings = self.has_siblings();
        let results = self.results.remove(&key).unwrap_or_default();
        let mut results: Vec<(i64, TestResult)> = results.into_values().collect();
        results.sort_unstable_by_key(|(number, _)| *number);
        let (label, configuration) = key;
        // A result may be shown when its files are there, which is not yet, now that their places are known.
        let (numbers, results): (Vec<i64>, Vec<TestResult>) = results.into_iter().unzip();
        for number in &numbers {
            self.open_results.remove(number);
        }
        let shape = TestShape::of(&results, shards, runs);
        let last_attempts = test_outputs::last_attempts(&results);
        let is_last =
            |result: &TestResult| last_attempts.get(&(result.shard, result.run)) == Some(&result.attempt);
        let passed = results.iter().all(|result| result.passed || !is_last(result));
        let profile = self.profile(&label, Origin::TestOutput { passed: Some(passed) });
        let mut namer = Namer::new(&mut self.selector, &self.trees, sequence);
        for (number, result) in numbers.iter().zip(&results) {
            namer.sequence = *number;
            let last = is_last(result);
            let event: Arc<str> = format!(
                "test_result {label} run {} shard {} attempt {}",
                result.run, result.shard, result.attempt
            )
            .into();
            let mark = test_outputs::shard_mark(result, shape).filter(|_| last);
            for file in result.files.iter().chain(&mark) {
                let mnemonic = mnemonic.as_deref();
                let path = test_outputs::exec_path(file, result, shape, last, mnemonic, siblings);
                if let Some(path) = path {
                    namer.name_at(&path.into(), file, profile, &"".into(), &event);
                }
            }
        }
        let target = Arc::new(TargetId {
            label,
            aspect: String::new(),
            configuration,
        });
        namer.finish(&target, effects);
        effects.push(Effect::Tested(target, sequence));
    }

    fn action(&mut self, sequence: i64, action: &Action, effects: &mut Vec<Effect>) {
        let Some(content) = action.content.clone().filter(|_| action.success) else {
            return;
        };
        let profile = self.profile(&action.label, Origin::Action);
        let mut namer = Namer::new(&mut self.selector, &self.trees, sequence);
        let file = File {
            path: action.primary_output.as_str().into(),
            prefix_len: 1,
            content,
            uri: None,
        };
        let event = format!("action_completed {}", action.primary_output).into();
        namer.name(&file, profile, &"".into(), &event);
        if !namer.outputs.is_empty() {
            let target = TargetId {
                label: action.label.clone(),
                ..TargetId::default()
            };
            effects.push(Effect::Outputs(Arc::new(target), namer.outputs));
        }
    }

    fn combined_report(&mut self, sequence: i64, file: &File, effects: &mut Vec<Effect>) {
        let profile = self.profile("", Origin::TestOutput { passed: None });
        let mut namer = Namer::new(&mut self.selector, &self.trees, sequence);
        let event = "build_tool_logs".into();
        namer.name_at(&COMBINED_REPORT.into(), file, profile, &"".into(), &event);
        namer.finish(&Arc::default(), effects);
    }

    fn unreferenced(&mut self, effects: &mut Vec<Effect>) {
        let profile = self.profile("", Origin::Unreferenced);
        let mut namer = Namer::new(&mut self.selector, &self.trees, 0);
        for (set, files) in self.sets.iter() {
            if self.referenced.contains(set) {
                continue;
            }
            namer.name_all(files, profile, &"".into(), &event_of(&self.sets, set));
        }
        if !namer.outputs.is_empty() {
            effects.push(Effect::Outputs(Arc::default(), namer.outputs));
        }
    }
}

/// Whether a target of this kind is a test. Bazel asks whether the rule class ends with "_test"; the kind is the class
/// and the word "rule".
pub(crate) fn is_test(kind: &str) -> bool {
    kind.strip_suffix(" rule").unwrap_or(kind).ends_with("_test")
}

/// Whether sets that have come have no files at all.
fn is_hollow_group(sets: &NamedSets, roots: &[String]) -> bool {
    let mut all = sets.expand(roots.iter().map(String::as_str), |_| false);
    !roots.is_empty() && all.by_ref().all(|(_, files)| files.is_empty()) && all.missing().is_empty()
}
