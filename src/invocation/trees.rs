//! What a build's events say of trees: which directories are roots of some, and which files lie in them.
//!
//! Only a target's completion names the roots of its trees; an aspect's does not, nor does another target that has the
//! same files. Either may come first. So a root that is new says which files are to be judged again, no matter who
//! named them before, and a tree is empty only if no set of files, and no event, has one of its files.

use std::{
    collections::BTreeMap,
    ops::{Bound, Range},
    sync::Arc,
};

use super::selection::ProfileId;
use crate::{
    bep::{
        event::File,
        named_sets::{NamedSets, SetIndex},
    },
    exec_path::ExecPath,
};

/// Roots of trees, and the files of a build by their directories.
#[derive(Debug, Default)]
pub(super) struct Trees {
    /// By their keys. None lies in another: no build tool makes trees in trees, and a file is in one at most.
    roots: BTreeMap<String, Box<str>>,
    /// Which files lie where, by the directories' keys; from the first root on.
    files: Option<BTreeMap<String, Vec<Run>>>,
    inline: Vec<Inline>,
}

/// Files of one directory that follow each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) of: Holder,
    pub(super) files: Range<usize>,
}

/// What has files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holder {
    Set(SetIndex),
    /// A completion's own files: see [`Trees::inline`].
    Event(usize),
}

/// Files that a completion named by itself, and how they were judged.
#[derive(Debug)]
pub(super) struct Inline {
    pub(super) files: Arc<[File]>,
    pub(super) profile: ProfileId,
    pub(super) group: Arc<str>,
    pub(super) event: Arc<str>,
}

/// Ordered by components, so that what lies in a directory comes right after it.
fn key(path: &str) -> String {
    path.replace('/', "\0")
}

/// Whether the key is that of the directory, or of something in it.
fn is_in(key: &str, directory: &str) -> bool {
    key.strip_prefix(directory)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('\0'))
}

impl Trees {
    /// Takes the root of a tree in. Gives the files that were named before and lie in a tree that was not known.
    pub(super) fn add(&mut self, root: &str, sets: &NamedSets) -> Vec<Run> {
        if self.files.is_none() {
            self.files = Some(BTreeMap::new());
            for (set, files) in sets.iter() {
                self.set_came(set, files);
            }
            for number in 0..self.inline.len() {
                let files = Arc::clone(&self.inline[number].files);
                self.note(Holder::Event(number), &files);
            }
        }
        if ExecPath::new(root).is_err() || self.root_of(root).is_some() {
            return Vec::new();
        }
        let directory = key(root);
        let mut next = self
            .roots
            .range::<str, _>((Bound::Included(&*directory), Bound::Unbounded));
        if next.next().is_some_and(|(other, _)| is_in(other, &directory)) {
            return Vec::new();
        }
        let runs = self.below(root).cloned().collect();
        self.roots.insert(directory, root.into());
        runs
    }

    /// A set has come.
    pub(super) fn set_came(&mut self, set: SetIndex, files: &[File]) {
        self.note(Holder::Set(set), files);
    }

    /// A completion has files of its own.
    pub(super) fn event_came(&mut self, inline: Inline) {
        self.note(Holder::Event(self.inline.len()), &inline.files);
        self.inline.push(inline);
    }

    /// The files of a completion.
    pub(super) fn inline(&self, number: usize) -> Option<&Inline> {
        self.inline.get(number)
    }

    /// Whether what comes is to be noted.
    pub(super) const fn are_known(&self) -> bool {
        self.files.is_some()
    }

    fn note(&mut self, of: Holder, files: &[File]) {
        let Some(index) = &mut self.files else { return };
        let mut start = 0;
        for run in files.chunk_by(|a, b| parent(&a.path) == parent(&b.path)) {
            let here = start..start + run.len();
            start = here.end;
            // A NUL, which no path has, would seem to part components.
            let directory = run.first().map(|file| parent(&file.path)).unwrap_or_default();
            if !directory.is_empty() && !directory.contains('\0') {
                let run = Run { of, files: here };
                index.entry(key(directory)).or_default().push(run);
            }
        }
    }

    /// The root of the tree that a path is of, or lies in.
    pub(super) fn root_of(&self, path: &str) -> Option<&str> {
        if self.roots.is_empty() {
            return None;
        }
        let path = key(path);
        let before = (Bound::Unbounded, Bound::Included(&*path));
        // Since no root lies in another, none comes between a root and what lies in it.
        let (directory, root) = self.roots.range::<str, _>(before).next_back()?;
        is_in(&path, directory).then_some(root)
    }

    /// Whether no file of a tree is known.
    pub(super) fn is_empty(&self, root: &str) -> bool {
        self.below(root).next().is_none()
    }

    fn below(&self, root: &str) -> impl Iterator<Item = &Run> {
        let directory = key(root);
        let from = (Bound::Included(directory.clone()), Bound::Unbounded);
        self.files
            .iter()
            .flat_map(move |files| files.range(from.clone()))
            .take_while(move |(key, _)| is_in(key, &directory))
            .flat_map(|(_, runs)| runs)
    }
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(directory, _)| directory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bep::event::{Content, NamedSet};

    fn files(paths: &[&str]) -> Vec<File> {
        let file = |path: &&str| File {
            path: (*path).into(),
            prefix_len: 1,
            content: Content::Unknown,
            uri: None,
        };
        paths.iter().map(file).collect()
    }

    fn sets(paths: &[&str]) -> NamedSets {
        let mut sets = NamedSets::new();
        sets.insert(NamedSet {
            id: "0".to_owned(),
            files: files(paths),
            ..NamedSet::default()
        });
        sets
    }

    #[test]
    fn a_new_root_says_what_was_named_below_it_before() {
        let sets = sets(&["o/a/x", "o/a/y", "o/a-b/x", "o/a/d/z", "o/a", "o/ab/x"]);
        let mut trees = Trees::default();
        let ranges = |runs: Vec<Run>| runs.into_iter().map(|run| run.files).collect::<Vec<_>>();
        assert_eq!(ranges(trees.add("o/a", &sets)), [0..2, 3..4]);
        assert!(trees.add("o/a", &sets).is_empty(), "it is not new");
        assert_eq!(trees.root_of("o/a/d/e"), Some("o/a"));
        assert_eq!(trees.root_of("o/a"), Some("o/a"));
        assert_eq!(trees.root_of("o/a-b/x"), None);
        let late = trees.add("o/a-b", &sets);
        assert_eq!((late.len(), late[0].files.clone()), (1, 2..3));
        assert_eq!(trees.root_of("o/a/d/e"), Some("o/a"));
        assert_eq!(trees.root_of("o/a-b/x"), Some("o/a-b"));
        assert!(trees.is_empty("o/none") && !trees.is_empty("o/ab"));
        // What comes later is known as well.
        trees.event_came(Inline {
            files: files(&["o/none/late"]).into(),
            profile: 0,
            group: "".into(),
            event: "".into(),
        });
        assert!(!trees.is_empty("o/none"));
    }

    #[test]
    fn trees_in_trees_and_names_that_are_no_paths_say_nothing() {
        let sets = sets(&["o/a/b/x", "o/t\0x/y"]);
        let mut trees = Trees::default();
        assert_eq!(trees.add("o/a/b", &sets).len(), 1);
        for root in ["o/a", "o/a/b/c", "o/../x", "o\0a", "", "/"] {
            assert!(trees.add(root, &sets).is_empty(), "{root:?}");
        }
        assert_eq!(trees.root_of("o/a/y"), None);
        assert!(trees.is_empty("o/t"));
    }
}
