//! Which outputs of a recorded build are asked for: its events are replayed, and patterns pick among what they name.
//!
//! Everything that a completed target, one of its aspects or its test names in a complete output group can be staged.
//! Hidden groups only if they are asked for by name, for they are built for their side effects; and so the own outputs
//! of tests in a command that runs them.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet, btree_map::Entry},
    sync::Arc,
};

use super::{
    error::StageError,
    recorded::Recorded,
    request::{Request, hits},
    unpacked::unpacked_at,
};
use crate::{
    bep::{Event, event::TargetId},
    exec_path::{ExecPath, is_reserved},
    invocation::{
        build::{Effect, Named, TargetEnd, contradiction, take_contradicting},
        pattern,
        policy::{PathRegex, Rule},
    },
    output::{Class, OutputContent},
};

/// What output groups are called that are built for their side effects only.
const HIDDEN: &str = "_hidden_";
/// How many outputs a message names.
const NAMED: usize = 3;

/// An output that can be staged.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Artifact {
    /// The target that names it.
    pub(crate) label: Arc<str>,
    /// Its aspect, or empty.
    pub(crate) aspect: Arc<str>,
    /// The output group, or empty for a test's output.
    pub(crate) group: Arc<str>,
    /// Where the build has it.
    pub(crate) exec_path: ExecPath,
    /// What it is.
    pub(crate) content: OutputContent,
    /// Whether it must be there.
    pub(crate) class: Class,
    /// Where it goes, below the directory.
    pub(crate) place: ExecPath,
}

/// What a request comes to.
#[derive(Debug, Clone, Default)]
pub(crate) struct Selection {
    /// In the order of their places.
    pub(crate) artifacts: Vec<Artifact>,
    /// Those that lie in the place of another one with the same content.
    pub(crate) also: Vec<Artifact>,
    /// Trees that are picked whole, by their places below the directory.
    pub(crate) trees: Vec<String>,
    /// What the user should know, in words.
    pub(crate) notes: Vec<String>,
}

impl Recorded {
    /// Every output that can be staged.
    ///
    /// # Errors
    /// When there is none.
    #[cfg(test)]
    pub(crate) fn everything(&self, invocation_id: &str) -> Result<Selection, StageError> {
        self.select(invocation_id, &Request::new(super::Wish::default())?)
    }

    /// The outputs that a request asks for.
    ///
    /// # Errors
    /// When a pattern of the request picks nothing, or two outputs would have one place.
    pub(crate) fn select(&self, invocation_id: &str, request: &Request) -> Result<Selection, StageError> {
        let trees = self.trees();
        let mut picked = Picked::new(request);
        if request.wish.failed {
            picked.failed = Some(self.failed_tests());
        }
        let mut notes = self.notes.clone();
        // As for Bazel: anyone who tests asks for what tests say, not for the tests themselves, whose programs may be
        // links to sources that no cache has. Who names a group means it.
        let tests = if request.wish.output_groups.is_empty() {
            self.tests()
        } else {
            HashSet::new()
        };
        for event in self.events() {
            if let Event::Completed(completed) = event
                && tests.contains(&*completed.target.label)
            {
                let success = completed.success;
                picked.ended(&completed.target.label, success);
            }
        }
        for effect in self.replay(self.dividing_rules(request), &tests) {
            match effect {
                Effect::Outputs(target, mut named) => {
                    let contradicting = take_contradicting(&mut named);
                    notes.extend(contradicting.iter().map(|n| contradiction(&n.path)));
                    for output in named {
                        request.still_asked()?;
                        picked.offer(&target, output, &trees);
                    }
                }
                Effect::Target(target, end, _) => {
                    let success = matches!(end, TargetEnd::Completed { success: true, .. });
                    picked.ended(&target.label, success);
                }
                Effect::Refused(reason) | Effect::Unusable(_, reason) => notes.push(reason),
                Effect::Undigested(target, outputs) => picked.note_undigested(&target.label, outputs),
                Effect::Unnamed(paths) => notes.push(unnamed(&paths)),
                Effect::Hollow(target) => {
                    notes.push(format!(
                        "{}: the build tool named none of its outputs",
                        target.label
                    ));
                }
                _ => {}
            }
        }
        notes.extend(self.without_digest(&picked.undigested));
        picked.check(invocation_id)?;
        // By file name, the files of a tree lie among all others.
        let whole = |tree: &&&str| !request.wish.flatten && !picked.partial.contains(**tree);
        let whole: HashSet<&str> = trees.iter().filter(whole).copied().collect();
        let (artifacts, also) = placed(picked.artifacts, request.wish.flatten, request.wish.extract)?;
        let in_trees = artifacts
            .iter()
            .flat_map(|artifact| above_and_itself(artifact.place.as_str()))
            .filter(|path| whole.contains(path));
        let trees: BTreeSet<&str> = in_trees.collect();
        let trees = trees.into_iter().map(str::to_owned).collect();
        if artifacts.is_empty() && request.wish.failed {
            return Err(StageError::NoneFailed(invocation_id.to_owned()));
        }
        if artifacts.is_empty() {
            return Err(StageError::Nothing(invocation_id.to_owned()));
        }
        Ok(Selection {
            artifacts,
            also,
            trees,
            notes,
        })
    }

    /// Rules that match no file, and distinguish target patterns and output groups.
    fn dividing_rules(&self, request: &Request) -> Vec<Rule> {
        let none = Rule {
            min_size: Some(u64::MAX),
            max_size: Some(0),
            ..Rule::of(Class::Known)
        };
        let mut groups: BTreeSet<&str> = request.wish.output_groups.iter().map(String::as_str).collect();
        groups.extend(self.groups().filter(|name| name.starts_with(HIDDEN)));
        let by_label = request.targets.iter().map(|pattern| Rule {
            label: Some(pattern.clone()),
            ..none.clone()
        });
        let by_group = groups.into_iter().map(|group| Rule {
            output_group: Some(group.to_owned()),
            ..none.clone()
        });
        by_label.chain(by_group).collect()
    }
}

fn unnamed(paths: &[ExecPath]) -> String {
    let paths: Vec<&str> = paths.iter().map(ExecPath::as_str).collect();
    format!(
        "{} outputs cannot be staged, because the build tool could not name them: {}",
        paths.len(),
        some(&paths)
    )
}

pub(super) fn some(names: &[&str]) -> String {
    let rest = if names.len() > NAMED { ", …" } else { "" };
    format!("{}{rest}", names[..names.len().min(NAMED)].join(", "))
}

/// Outputs that were picked, and which patterns have done so.
struct Picked<'a> {
    request: &'a Request,
    /// By exec path.
    artifacts: BTreeMap<ExecPath, Artifact>,
    /// Labels of targets with an output that was picked, or of a test that has not failed.
    labels: HashSet<Arc<str>>,
    /// The only tests, by label and configuration, whose outputs are asked for, and nothing else.
    failed: Option<HashSet<(&'a str, &'a str)>>,
    groups: HashSet<Arc<str>>,
    /// Trees of which something is left out.
    partial: HashSet<String>,
    include: Vec<bool>,
    required: Vec<bool>,
    optional: Vec<bool>,
    /// All targets that ended, and whether they did well; for hints.
    ends: BTreeMap<String, bool>,
    /// Groups that there are; for hints.
    offered_groups: BTreeSet<Arc<str>>,
    /// Outputs without a digest, and the targets that they are of.
    undigested: BTreeSet<ExecPath>,
    labels_undigested: HashSet<String>,
}

impl<'a> Picked<'a> {
    fn new(request: &'a Request) -> Self {
        Self {
            request,
            artifacts: BTreeMap::new(),
            labels: HashSet::new(),
            failed: None,
            groups: HashSet::new(),
            partial: HashSet::new(),
            include: vec![false; request.include.len()],
            required: vec![false; request.required.len()],
            optional: vec![false; request.optional.len()],
            ends: BTreeMap::new(),
            offered_groups: BTreeSet::new(),
            undigested: BTreeSet::new(),
            labels_undigested: HashSet::new(),
        }
    }

    fn ended(&mut self, label: &str, success: bool) {
        *self.ends.entry(label.to_owned()).or_default() |= success;
    }

    fn offer(&mut self, target: &TargetId, named: Named, trees: &HashSet<&str>) {
        // Known: of an incomplete group. Optional: an action's. No label: of a set that no target refers to.
        if named.class != Class::Required || target.label.is_empty() {
            return;
        }
        if !pattern::matches(&self.request.targets, &target.label) {
            return;
        }
        let of_failed = |failed: &HashSet<(&str, &str)>| {
            named.group.is_empty() && failed.contains(&(&*target.label, &*target.configuration))
        };
        if !self.failed.as_ref().is_none_or(of_failed) {
            // A pattern is of use for tests that have passed, too.
            self.labels.insert(target.label.as_str().into());
            return;
        }
        self.offered_groups.insert(named.group.clone());
        let wanted = &self.request.wish.output_groups;
        let in_group = if wanted.is_empty() {
            !named.group.starts_with(HIDDEN)
        } else {
            wanted.iter().any(|group| **group == *named.group)
        };
        if !in_group {
            return;
        }
        let path = named.path.as_str();
        let is_meant = |one: &&str| *one == path || trees.contains(one);
        let paths: Vec<&str> = above_and_itself(path).filter(is_meant).collect();
        let any = |list: &[PathRegex]| list.iter().any(|r| hits(r, &paths));
        if (!self.request.include.is_empty() && !any(&self.request.include)) || any(&self.request.exclude) {
            let parts = paths.iter().filter(|path| trees.contains(**path));
            self.partial.extend(parts.map(|path| (*path).to_owned()));
            return;
        }
        for (list, seen) in [
            (&self.request.include, &mut self.include),
            (&self.request.required, &mut self.required),
            (&self.request.optional, &mut self.optional),
        ] {
            for (regex, seen) in list.iter().zip(seen) {
                *seen |= hits(regex, &paths);
            }
        }
        let label: Arc<str> = target.label.as_str().into();
        self.labels.insert(label.clone());
        self.groups.insert(named.group.clone());
        let artifact = Artifact {
            label,
            aspect: target.aspect.as_str().into(),
            group: named.group,
            class: self.request.class(&paths),
            place: named.path.clone(),
            exec_path: named.path.clone(),
            content: named.content,
        };
        // Named again, it is the newer content that the build ended with.
        self.artifacts.insert(named.path, artifact);
    }

    /// Takes note of outputs of which the build tool tells no digest.
    fn note_undigested(&mut self, label: &str, outputs: Vec<(Class, ExecPath)>) {
        if !self.request.targets.is_empty() && !pattern::matches(&self.request.targets, label) {
            return;
        }
        let wanted = outputs.into_iter().filter(|(class, _)| *class > Class::Known);
        self.undigested.extend(wanted.map(|(_, path)| path));
        self.labels_undigested.insert(label.to_owned());
    }

    /// Refuses patterns that have picked nothing.
    fn check(&self, invocation_id: &str) -> Result<(), StageError> {
        let wish = &self.request.wish;
        let no_match = |flag, pattern: &str, hint| StageError::NoMatch {
            flag,
            pattern: pattern.to_owned(),
            invocation_id: invocation_id.to_owned(),
            hint,
        };
        for (text, pattern) in wish.targets.iter().zip(&self.request.targets) {
            let alone = std::slice::from_ref(pattern);
            // One that takes targets out may have nothing to take.
            if !text.starts_with('-') && !self.labels.iter().any(|label| pattern::matches(alone, label)) {
                return Err(no_match("TARGET", text, self.target_hint(alone)));
            }
        }
        for group in &wish.output_groups {
            if !self.groups.contains(group.as_str()) {
                let known: Vec<&str> = self
                    .offered_groups
                    .iter()
                    .map(|g| &**g)
                    .filter(|g| !g.is_empty())
                    .collect();
                let hint = if known.is_empty() {
                    String::new()
                } else {
                    format!(" (available: {})", known.join(", "))
                };
                return Err(no_match("--output-group", group, hint));
            }
        }
        for (flag, texts, seen) in [
            ("--include", &wish.include, &self.include),
            ("--required", &wish.required, &self.required),
            ("--optional", &wish.optional, &self.optional),
        ] {
            if let Some((text, _)) = texts.iter().zip(seen).find(|(_, seen)| !**seen) {
                return Err(no_match(flag, text, String::new()));
            }
        }
        Ok(())
    }

    /// What became of the targets that a pattern does match.
    fn target_hint(&self, pattern: &[pattern::TargetPattern]) -> String {
        let matched: Vec<(&str, bool)> = self
            .ends
            .iter()
            .filter(|(label, _)| pattern::matches(pattern, label))
            .map(|(label, success)| (label.as_str(), *success))
            .collect();
        let failed: Vec<&str> = matched
            .iter()
            .filter(|(_, ok)| !ok)
            .map(|(label, _)| *label)
            .collect();
        let has_no_digests = |(label, _): &(&str, bool)| self.labels_undigested.contains(*label);
        if matched.is_empty() {
            ": no such target in the build".to_owned()
        } else if matched.iter().any(has_no_digests) {
            ": the build reports no digests for its outputs".to_owned()
        } else if failed.is_empty() {
            ": the other filters exclude all of its outputs".to_owned()
        } else {
            format!(": not built, or only partly: {}", some(&failed))
        }
    }
}

fn above_and_itself(path: &str) -> impl Iterator<Item = &str> {
    let above = path.match_indices('/').map(|(end, _)| &path[..end]);
    above.chain([path])
}

/// Gives every output its place; refuses what cannot lie side by side. The same content twice in one place is there once:
/// the others come second.
pub(super) fn placed(
    artifacts: BTreeMap<ExecPath, Artifact>,
    flatten: bool,
    extract: bool,
) -> Result<(Vec<Artifact>, Vec<Artifact>), StageError> {
    let mut also = Vec::new();
    let mut by_place: BTreeMap<ExecPath, Artifact> = BTreeMap::new();
    for (path, mut artifact) in artifacts {
        if flatten {
            // One component of a good path is a good path.
            artifact.place =
                ExecPath::new(path.file_name()).map_err(|e| StageError::Internal(e.to_string()))?;
        }
        if extract && let Some(place) = unpacked_at(&artifact.content, &path, &artifact.place)? {
            artifact.place = place;
        }
        let first_component = artifact.place.components().next().unwrap_or_default();
        if is_reserved(first_component) {
            return Err(StageError::Setting {
                flag: "--flatten".to_owned(),
                reason: format!(
                    "{path} would be staged as {first_component}, a name that is reserved for outhaul"
                ),
            });
        }
        match by_place.entry(artifact.place.clone()) {
            Entry::Vacant(place) => {
                place.insert(artifact);
            }
            Entry::Occupied(mut first) if first.get().content.is_same(&artifact.content) => {
                let class = &mut first.get_mut().class;
                *class = artifact.class.max(*class);
                also.push(artifact);
            }
            Entry::Occupied(first) => {
                return Err(StageError::Collision {
                    first: first.get().exec_path.clone(),
                    second: path,
                    place: artifact.place,
                });
            }
        }
    }
    side_by_side(&by_place)?;
    Ok((by_place.into_values().collect(), also))
}

/// Refuses a file where another one's directory must be.
pub(super) fn side_by_side(by_place: &BTreeMap<ExecPath, Artifact>) -> Result<(), StageError> {
    for artifact in by_place.values() {
        let place = artifact.place.as_str();
        for (end, _) in place.match_indices('/') {
            if let Some(above) = by_place.get(&place[..end])
                && above.content != OutputContent::Directory
            {
                return Err(StageError::Collision {
                    first: above.exec_path.clone(),
                    second: artifact.exec_path.clone(),
                    place: above.place.clone(),
                });
            }
        }
    }
    Ok(())
}
