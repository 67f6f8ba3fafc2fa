//! One build as its events tell it: what they name, and what of that is wanted.
//!
//! [`Build`] is plain data: events go in, [`Effect`]s come out, in order. It waits with outputs until it knows the
//! command and the exec root, with a completed target until every set that it refers to has come, and with a test's
//! files until its summary says where they belong; what has not come by the end of the stream is done without.

use std::{collections::HashMap, sync::Arc};

use super::{
    policy::Policy,
    selection::{Command, GroupContext, Origin, ProfileId, Selector},
    test_outputs::{self, TestShape},
};
use crate::{
    bep::{
        event::{Action, Completed, Content, ConvenienceSymlink, Event, File, Started, TargetId, TestResult},
        named_sets::{NamedSets, SetBits, Ticket},
        uri::BytestreamUri,
    },
    exec_path::{ExecPath, ExecPathError},
    output::{Class, OutputContent},
};

/// The directory that all outputs of a build lie in.
const OUTPUT_DIRECTORY: &str = "bazel-out";

/// An output that the stream names.
#[derive(Debug, Clone, PartialEq)]
pub struct Named {
    /// Where it belongs.
    pub path: ExecPath,
    /// What it is.
    pub content: OutputContent,
    /// How much it is wanted.
    pub class: Class,
    /// Which rule says so.
    pub rule: Arc<str>,
    /// The output group, or empty.
    pub group: Arc<str>,
    /// The event that named it.
    pub event: Arc<str>,
}

/// What a target came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetEnd {
    /// Completed; whether all of it was built.
    Completed {
        /// Whether all of it was built.
        success: bool,
    },
    /// It will not be completed.
    Aborted,
}

/// What follows from an event.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// The build began.
    Started(Started),
    /// The build's exec root, absolute, as the build tool sees it. Comes after `Started` and before any outputs.
    ExecRoot(String),
    /// The effective command line is known.
    CommandLine(crate::bep::event::CommandLine),
    /// Outputs of one target.
    Outputs(Arc<TargetId>, Vec<Named>),
    /// A target came to its end; its outputs came before.
    Target(Arc<TargetId>, TargetEnd),
    /// Links into the output base.
    ConvenienceSymlinks(Vec<ConvenienceSymlink>),
    /// Outputs of this build that the build tool could not name, because the directories that they belong in were
    /// deleted. Comes at the end.
    Unnamed(Vec<ExecPath>),
    /// Something named can't be an output: why, in words.
    Refused(String),
    /// An output that can't be had, whatever the cache does: its path or its digest is none.
    Unusable(Class, String),
    /// The first blob's `bytestream://` authority, once.
    Authority(String),
    /// The build ended.
    Finished {
        /// The build tool's exit code.
        exit_code: i32,
    },
}

/// One build's life.
pub struct Build {
    selector: Selector,
    command: Command,
    started: bool,
    exec_root: Option<String>,
    ready: bool,
    authority_told: bool,
    /// Kinds of configured targets that are tests.
    tests: std::collections::HashSet<String>,
    configurations: HashMap<String, String>,
    sets: NamedSets,
    /// For each profile, the sets that have been gone through under it.
    visited: HashMap<ProfileId, SetBits>,
    /// Sets that any target refers to.
    referenced: SetBits,
    /// Absolute paths of outputs that the build tool could not read for the stream.
    unreadable: Vec<String>,
    results: HashMap<(String, String), Vec<TestResult>>,
    /// Completed targets that wait for the command and the exec root.
    backlog: Vec<Event>,
    /// Completed targets that wait for sets.
    parked: HashMap<Ticket, Completed>,
}

impl Build {
    /// A build of which nothing is known yet.
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        Self {
            selector: Selector::new(policy),
            command: Command::default(),
            started: false,
            exec_root: None,
            ready: false,
            authority_told: false,
            tests: std::collections::HashSet::new(),
            configurations: HashMap::new(),
            sets: NamedSets::default(),
            visited: HashMap::new(),
            referenced: SetBits::default(),
            unreadable: Vec::new(),
            results: HashMap::new(),
            backlog: Vec::new(),
            parked: HashMap::new(),
        }
    }

    /// Takes an event in.
    pub fn handle(&mut self, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        match event {
            Event::Started(started) => {
                self.command = Command::from_name(&started.command);
                self.started = true;
                effects.push(Effect::Started(started));
                self.get_ready(&mut effects);
            }
            Event::ExecRoot(path) => {
                self.exec_root = Some(path);
                self.get_ready(&mut effects);
            }
            Event::CommandLine(line) if line.label == "canonical" => effects.push(Effect::CommandLine(line)),
            Event::Configuration { id, mnemonic } => {
                self.configurations.insert(id, mnemonic);
            }
            Event::Configured { label, kind } => {
                // Bazel asks whether the rule class ends with "_test"; the kind is the class and the word "rule".
                if kind.strip_suffix(" rule").unwrap_or(&kind).ends_with("_test") {
                    self.tests.insert(label);
                }
            }
            Event::NamedSet(set) => {
                self.note_authority(&set.files, &mut effects);
                for ticket in self.sets.insert(set) {
                    if let Some(completed) = self.parked.remove(&ticket) {
                        self.expand(completed, &mut effects);
                    }
                }
            }
            Event::TestResult(result) => {
                let key = (result.label.clone(), result.configuration.clone());
                let results = self.results.entry(key).or_default();
                // A repeated event replaces what it repeats.
                results.retain(|r| (r.run, r.shard, r.attempt) != (result.run, result.shard, result.attempt));
                results.push(result);
            }
            Event::Completed(_) | Event::TestSummary { .. } | Event::Action(_) if !self.ready => {
                self.backlog.push(event);
            }
            Event::Completed(completed) => self.complete(completed, &mut effects),
            Event::TestSummary {
                label,
                configuration,
                shard_count,
                run_count,
            } => {
                self.tested(label, configuration, shard_count, run_count, &mut effects);
            }
            Event::Action(action) => self.action(&action, &mut effects),
            Event::Aborted {
                target: Some(target), ..
            } => {
                effects.push(Effect::Target(Arc::new(target), TargetEnd::Aborted));
            }
            Event::Unreadable(paths) => self.unreadable.extend(paths),
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
            if let Some(completed) = self.parked.remove(&released.ticket) {
                effects.push(Effect::Refused(format!(
                    "{} refers to sets of files that never came: {}",
                    completed.target,
                    released.missing.join(", ")
                )));
                self.expand(completed, &mut effects);
            }
        }
        if !self.ready && !self.backlog.is_empty() {
            effects.push(Effect::Unusable(
                Class::Required,
                "the stream has outputs, but tells no exec root; nothing was downloaded".to_owned(),
            ));
        }
        let open: Vec<_> = self.results.keys().cloned().collect();
        if self.ready {
            for (label, configuration) in open {
                self.tested(label, configuration, 0, 0, &mut effects);
            }
            self.unreferenced(&mut effects);
        }
        let root = self
            .exec_root
            .as_deref()
            .unwrap_or_default()
            .trim_end_matches('/');
        let unnamed: Vec<ExecPath> = std::mem::take(&mut self.unreadable)
            .iter()
            .filter_map(|path| {
                output_path(path.strip_prefix(root)?.strip_prefix('/')?)
                    .ok()
                    .flatten()
            })
            .collect();
        if !unnamed.is_empty() {
            effects.push(Effect::Unnamed(unnamed));
        }
        effects
    }

    /// Tells, once, where the stream says that blobs are.
    fn note_authority(&mut self, files: &[File], effects: &mut Vec<Effect>) {
        if self.authority_told {
            return;
        }
        let authority = files.iter().find_map(|file| {
            let rest = file.uri.as_deref()?.strip_prefix("bytestream://")?;
            rest.split('/').next().filter(|authority| !authority.is_empty())
        });
        if let Some(authority) = authority {
            self.authority_told = true;
            effects.push(Effect::Authority(authority.to_owned()));
        }
    }

    fn get_ready(&mut self, effects: &mut Vec<Effect>) {
        if self.ready || !self.started {
            return;
        }
        let Some(root) = &self.exec_root else { return };
        self.ready = true;
        effects.push(Effect::ExecRoot(root.clone()));
        for event in std::mem::take(&mut self.backlog) {
            effects.extend(self.handle(event));
        }
    }

    fn complete(&mut self, completed: Completed, effects: &mut Vec<Effect>) {
        let roots = completed.groups.iter().flat_map(|group| &group.sets);
        match self.sets.park(roots.map(String::as_str)) {
            Some(ticket) => {
                self.parked.insert(ticket, completed);
            }
            None => self.expand(completed, effects),
        }
    }

    fn expand(&mut self, completed: Completed, effects: &mut Vec<Effect>) {
        let target = Arc::new(completed.target);
        let event: Arc<str> = format!("target_completed {target}").into();
        let trees: Vec<&File> = completed.directories.iter().filter(|d| d.has_prefix()).collect();
        let mut namer = Namer {
            selector: &mut self.selector,
            trees: trees.iter().map(|d| (d.path.as_str(), false)).collect(),
            outputs: Vec::new(),
            unusable: Vec::new(),
        };
        let mut directory_profile = None;
        for group in &completed.groups {
            let context = GroupContext {
                command: self.command,
                label: &target.label,
                aspect: &target.aspect,
                group: &group.name,
                origin: Origin::Group {
                    incomplete: group.incomplete,
                    test_rule: self.tests.contains(&target.label),
                },
            };
            let profile = namer.selector.profile(&context);
            let name: Arc<str> = group.name.as_str().into();
            let visited = self.visited.entry(profile).or_default();
            let roots = group.sets.iter().map(String::as_str);
            let referenced = &mut self.referenced;
            for (set, files) in self.sets.expand(roots, |set| visited.test_and_set(set)) {
                referenced.test_and_set(set);
                let event: Arc<str> = format!("named_set {}", self.sets.id(set)).into();
                for file in files.iter() {
                    namer.name(file, profile, &name, &event);
                }
            }
            for file in &group.files {
                namer.name(file, profile, &name, &event);
            }
            if !group.incomplete {
                directory_profile = Some(directory_profile.map_or((profile, name.clone()), |found| found));
            }
        }
        // Files of a tree name it; an empty tree is named by nothing but its root.
        if let Some((profile, name)) = directory_profile {
            let empty: Vec<String> = namer
                .trees
                .iter()
                .filter(|(_, filled)| !filled)
                .map(|(root, _)| (*root).to_owned())
                .collect();
            for root in empty {
                namer.directory(&root, profile, &name, &event);
            }
        }
        let (outputs, unusable) = (namer.outputs, namer.unusable);
        effects.extend(unusable);
        if !outputs.is_empty() {
            effects.push(Effect::Outputs(target.clone(), outputs));
        }
        effects.push(Effect::Target(
            target,
            TargetEnd::Completed {
                success: completed.success,
            },
        ));
    }

    fn tested(
        &mut self,
        label: String,
        configuration: String,
        shards: u32,
        runs: u32,
        effects: &mut Vec<Effect>,
    ) {
        let mnemonic = self.configurations.get(&configuration).cloned();
        let key = (label, configuration);
        let Some(results) = self.results.remove(&key) else {
            return;
        };
        let (label, configuration) = key;
        let shape = TestShape::of(&results, shards, runs);
        let profile = self.selector.profile(&GroupContext {
            command: self.command,
            label: &label,
            aspect: "",
            group: "",
            origin: Origin::TestOutput,
        });
        let mut namer = Namer {
            selector: &mut self.selector,
            trees: Vec::new(),
            outputs: Vec::new(),
            unusable: Vec::new(),
        };
        for result in &results {
            let last = test_outputs::is_last_attempt(result, &results);
            let event: Arc<str> = format!(
                "test_result {label} run {} shard {} attempt {}",
                result.run, result.shard, result.attempt
            )
            .into();
            for file in &result.files {
                if let Some(path) = test_outputs::exec_path(file, result, shape, last, mnemonic.as_deref()) {
                    namer.name_at(&path, file, profile, &"".into(), &event);
                }
            }
        }
        let target = Arc::new(TargetId {
            label,
            aspect: String::new(),
            configuration,
        });
        let (outputs, unusable) = (namer.outputs, namer.unusable);
        effects.extend(unusable);
        if !outputs.is_empty() {
            effects.push(Effect::Outputs(target, outputs));
        }
    }

    fn action(&mut self, action: &Action, effects: &mut Vec<Effect>) {
        let Some(content) = action.content.clone().filter(|_| action.success) else {
            return;
        };
        let profile = self.selector.profile(&GroupContext {
            command: self.command,
            label: &action.label,
            aspect: "",
            group: "",
            origin: Origin::Action,
        });
        let mut namer = Namer {
            selector: &mut self.selector,
            trees: Vec::new(),
            outputs: Vec::new(),
            unusable: Vec::new(),
        };
        let file = File {
            path: action.primary_output.clone(),
            prefix_len: 1,
            content,
            uri: None,
        };
        let event = format!("action_completed {}", action.primary_output).into();
        namer.name_at(&action.primary_output, &file, profile, &"".into(), &event);
        if !namer.outputs.is_empty() {
            let target = TargetId {
                label: action.label.clone(),
                ..TargetId::default()
            };
            effects.push(Effect::Outputs(Arc::new(target), namer.outputs));
        }
    }

    fn unreferenced(&mut self, effects: &mut Vec<Effect>) {
        let profile = self.selector.profile(&GroupContext {
            command: self.command,
            label: "",
            aspect: "",
            group: "",
            origin: Origin::Unreferenced,
        });
        let mut namer = Namer {
            selector: &mut self.selector,
            trees: Vec::new(),
            outputs: Vec::new(),
            unusable: Vec::new(),
        };
        for (set, files) in self.sets.iter() {
            if self.referenced.contains(set) {
                continue;
            }
            let event: Arc<str> = format!("named_set {}", self.sets.id(set)).into();
            for file in files.iter() {
                namer.name(file, profile, &"".into(), &event);
            }
        }
        if !namer.outputs.is_empty() {
            effects.push(Effect::Outputs(Arc::default(), namer.outputs));
        }
    }
}

/// Turns the files of one target into outputs.
struct Namer<'a> {
    selector: &'a mut Selector,
    /// Roots of the target's trees, and whether a file of theirs was named.
    trees: Vec<(&'a str, bool)>,
    outputs: Vec<Named>,
    /// [`Effect::Unusable`].
    unusable: Vec<Effect>,
}

impl Namer<'_> {
    fn name(&mut self, file: &File, profile: ProfileId, group: &Arc<str>, event: &Arc<str>) {
        // Without a prefix it is a source file of the workspace, which is nobody's to write.
        if file.has_prefix() {
            self.name_at(&file.path, file, profile, group, event);
        }
    }

    fn name_at(&mut self, path: &str, file: &File, profile: ProfileId, group: &Arc<str>, event: &Arc<str>) {
        let Some(path) = self.output_path(path) else {
            return;
        };
        let (content, size) = match &file.content {
            Content::Blob(digest) => (OutputContent::Blob(digest.clone()), Some(digest.size())),
            Content::Inline(bytes) => (OutputContent::Inline(bytes.clone()), Some(bytes.len() as u64)),
            Content::Symlink(target) => (OutputContent::Symlink(target.clone()), None),
            Content::Unknown => {
                // Else it is a local file of a build tool that does not tell digests, and is on its disk.
                if let Some(uri) = file.uri.as_deref().filter(|uri| BytestreamUri::is_one(uri)) {
                    let class = self.selector.select(profile, path.as_str(), None, None).class;
                    let reason = format!("{path}: its digest is none, or is not that of {uri}");
                    self.unusable.push(Effect::Unusable(class, reason));
                }
                return;
            }
        };
        let tree = self.trees.iter_mut().find(|(root, _)| path.starts_with(root));
        let tree_root = tree.map(|(root, filled)| {
            *filled = true;
            *root
        });
        let verdict = self.selector.select(profile, path.as_str(), tree_root, size);
        self.outputs.push(Named {
            path,
            content,
            class: verdict.class,
            rule: verdict.rule,
            group: group.clone(),
            event: event.clone(),
        });
    }

    fn directory(&mut self, path: &str, profile: ProfileId, group: &Arc<str>, event: &Arc<str>) {
        let Some(path) = self.output_path(path) else {
            return;
        };
        let verdict = self
            .selector
            .select(profile, path.as_str(), Some(path.as_str()), None);
        self.outputs.push(Named {
            path: path.clone(),
            content: OutputContent::Directory,
            class: verdict.class,
            rule: verdict.rule,
            group: group.clone(),
            event: event.clone(),
        });
    }

    /// The path, if an output may be there.
    fn output_path(&mut self, path: &str) -> Option<ExecPath> {
        match output_path(path) {
            Ok(path) => path,
            Err(error) => {
                self.unusable
                    .push(Effect::Unusable(Class::Required, error.to_string()));
                None
            }
        }
    }
}

/// The path, if an output may be there; `None` for a generated file elsewhere, such as in an external repository's
/// sources.
fn output_path(path: &str) -> Result<Option<ExecPath>, ExecPathError> {
    let path = ExecPath::new(path)?;
    let is_one = path.starts_with(OUTPUT_DIRECTORY) && path.as_str() != OUTPUT_DIRECTORY;
    Ok(is_one.then_some(path))
}
