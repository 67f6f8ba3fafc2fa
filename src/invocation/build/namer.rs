//! From the files of one event to outputs: where they belong, what they are, and how much they are wanted.

use std::{collections::BTreeMap, sync::Arc};

use super::effect::{Effect, Named};
use crate::{
    bep::{
        event::{Content, File, TargetId},
        named_sets::{NamedSets, SetBits, SetIndex},
        uri::BytestreamUri,
    },
    exec_path::{ExecPath, ExecPathError},
    invocation::{
        selection::{ProfileId, Selector, Verdict},
        trees::{Holder, Run, Trees},
    },
    output::{Class, OutputContent},
};

/// The directory that all outputs of a build lie in.
pub(super) const OUTPUT_DIRECTORY: &str = "bazel-out";

/// What was gone through under a profile.
pub(super) struct Visited {
    pub(super) sets: SetBits,
    /// A group that has it.
    pub(super) group: Arc<str>,
}

/// Turns the files of one target into outputs.
pub(super) struct Namer<'a> {
    selector: &'a mut Selector,
    trees: &'a Trees,
    /// The directory of the file that was named last, and the tree that it lies in.
    near: Option<(String, Option<&'a str>)>,
    pub(super) outputs: Vec<Named>,
    /// [`Effect::Unusable`].
    unusable: Vec<Effect>,
    /// [`Effect::Undigested`].
    undigested: Vec<(Class, ExecPath)>,
    /// What [`Named`] says of them.
    pub(super) sequence: i64,
    pub(super) set: Option<SetIndex>,
}

impl<'a> Namer<'a> {
    pub(super) const fn new(selector: &'a mut Selector, trees: &'a Trees, sequence: i64) -> Self {
        Self {
            selector,
            trees,
            near: None,
            outputs: Vec::new(),
            unusable: Vec::new(),
            undigested: Vec::new(),
            sequence,
            set: None,
        }
    }

    /// What has been named, as effects.
    pub(super) fn finish(self, target: &Arc<TargetId>, effects: &mut Vec<Effect>) {
        effects.extend(self.unusable);
        if !self.outputs.is_empty() {
            effects.push(Effect::Outputs(target.clone(), self.outputs));
        }
        if !self.undigested.is_empty() {
            effects.push(Effect::Undigested(target.clone(), self.undigested));
        }
    }

    pub(super) fn name_all(
        &mut self,
        files: &[File],
        profile: ProfileId,
        group: &Arc<str>,
        event: &Arc<str>,
    ) {
        for file in files {
            self.name(file, profile, group, event);
        }
    }

    pub(super) fn name(&mut self, file: &File, profile: ProfileId, group: &Arc<str>, event: &Arc<str>) {
        // Without a prefix it is a source file of the workspace, which must not be written.
        if file.has_prefix() {
            self.name_at(&file.path, file, profile, group, event);
        }
    }

    pub(super) fn name_at(
        &mut self,
        path: &Arc<str>,
        file: &File,
        profile: ProfileId,
        group: &Arc<str>,
        event: &Arc<str>,
    ) {
        let Some(path) = self.output_path(path) else {
            return;
        };
        let Some((content, size)) = content_of(file) else {
            let class = self.selector.select(profile, path.as_str(), None, None).class;
            match file.uri.as_deref().filter(|uri| BytestreamUri::is_one(uri)) {
                Some(uri) => {
                    let reason = format!("{path}: its digest is invalid, or differs from the one in {uri}");
                    self.unusable.push(Effect::Unusable(class, reason));
                }
                None => self.undigested.push((class, path)),
            }
            return;
        };
        let tree_root = self.tree_of(&path, profile);
        let verdict = self.selector.select(profile, path.as_str(), tree_root, size);
        self.push(path, content, verdict, group, event);
    }

    /// Names files of a tree once more: under every profile that they were gone through under, for what is known of them
    /// now is true of all.
    pub(super) fn run_again(&mut self, run: Run, sets: &NamedSets, visited: &BTreeMap<ProfileId, Visited>) {
        match run.of {
            Holder::Set(set) => {
                let Some(files) = sets.files_of(set).and_then(|files| files.get(run.files)) else {
                    return;
                };
                let event = event_of(sets, set);
                self.set = Some(set);
                for (profile, visited) in visited.iter().filter(|(_, v)| v.sets.contains(set)) {
                    self.again(files, *profile, &visited.group, &event);
                }
                self.set = None;
            }
            Holder::Event(number) => {
                if let Some(inline) = self.trees.inline(number)
                    && let Some(files) = inline.files.get(run.files)
                {
                    self.again(files, inline.profile, &inline.group, &inline.event);
                }
            }
        }
    }

    /// Names files once more if they are judged in another way now that the tree that they lie in is known. What was
    /// said of those that cannot be outputs stays said.
    fn again(&mut self, files: &[File], profile: ProfileId, group: &Arc<str>, event: &Arc<str>) {
        if !self.selector.looks_at_trees(profile) {
            return;
        }
        for file in files.iter().filter(|file| file.has_prefix()) {
            let (Ok(Some(path)), Some((content, size))) = (output_path(&file.path), content_of(file)) else {
                continue;
            };
            let before = self.selector.select(profile, path.as_str(), None, size);
            let tree_root = self.tree_of(&path, profile);
            let verdict = self.selector.select(profile, path.as_str(), tree_root, size);
            if verdict != before {
                self.push(path, content, verdict, group, event);
            }
        }
    }

    /// The root of the tree that a file lies in, if the profile asks for that.
    fn tree_of(&mut self, path: &ExecPath, profile: ProfileId) -> Option<&'a str> {
        if !self.trees.are_known() || !self.selector.looks_at_trees(profile) {
            return None;
        }
        let directory = path.parent().unwrap_or_default();
        match &self.near {
            Some((near, root)) if near == directory => *root,
            _ => {
                let root = self.trees.root_of(directory);
                self.near = Some((directory.to_owned(), root));
                root
            }
        }
    }

    pub(super) fn directory(&mut self, path: &str, profile: ProfileId, group: &Arc<str>, event: &Arc<str>) {
        let Some(path) = self.output_path(&path.into()) else {
            return;
        };
        let verdict = self
            .selector
            .select(profile, path.as_str(), Some(path.as_str()), None);
        self.push(path, OutputContent::Directory, verdict, group, event);
    }

    fn push(
        &mut self,
        path: ExecPath,
        content: OutputContent,
        verdict: Verdict,
        group: &Arc<str>,
        event: &Arc<str>,
    ) {
        self.outputs.push(Named {
            path,
            content,
            class: verdict.class,
            rule: verdict.rule,
            group: group.clone(),
            event: event.clone(),
            sequence: self.sequence,
            set: self.set,
        });
    }

    /// The path, if an output may be there.
    fn output_path(&mut self, path: &Arc<str>) -> Option<ExecPath> {
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

/// The event that brought a set, as it is recorded.
pub(super) fn event_of(sets: &NamedSets, set: SetIndex) -> Arc<str> {
    format!("named_set {}", sets.id(set)).into()
}

/// What a file is, if the stream says it, and its size, if it has one.
fn content_of(file: &File) -> Option<(OutputContent, Option<u64>)> {
    match &file.content {
        Content::Blob(digest) => Some((OutputContent::Blob(digest.clone()), Some(digest.size()))),
        Content::Inline(bytes) => Some((OutputContent::Inline(bytes.clone()), Some(bytes.len() as u64))),
        Content::Symlink(target) => Some((OutputContent::Symlink(target.clone()), None)),
        Content::Unknown => None,
    }
}

/// The path, if an output may be there; `None` for a generated file elsewhere, such as in an external repository's
/// sources.
pub(super) fn output_path(path: &Arc<str>) -> Result<Option<ExecPath>, ExecPathError> {
    let path = ExecPath::shared(path)?;
    let is_one = path.starts_with(OUTPUT_DIRECTORY) && path.as_str() != OUTPUT_DIRECTORY;
    Ok(is_one.then_some(path))
}
