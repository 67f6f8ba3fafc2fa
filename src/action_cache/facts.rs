//! One fact for each path.

use std::{
    borrow::Cow,
    cmp::Ordering,
    collections::HashMap,
    hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher},
};

use super::{
    cursor::{Cursor, Fault},
    entry::{self, Heed, Metadata},
    frame,
    index::Index,
};
use crate::{
    digest::{Digest, DigestFunction},
    exec_path::ExecPath,
};

/// Key of the record that says how many strings there were when it was written.
pub(super) const VALIDATION: i32 = -10;
/// The directory that all outputs lie in.
pub(super) const OUTPUT_DIRECTORY: &str = "bazel-out/";

/// An output that Bazel knows to be in the remote cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Output {
    /// Where it belongs.
    pub path: ExecPath,
    /// Digest of the content.
    pub digest: Digest,
    /// The tree that it is a file of.
    pub tree: Option<ExecPath>,
    /// Where it leads to, if it is a link to another output.
    pub link_to: Option<ExecPath>,
    /// Until when the cache promised to keep it, in milliseconds since the epoch; -1 for no promise.
    pub expires_ms: i64,
    /// Whether it is the first output of the action that tells of it, which is known by that name: whatever makes it now
    /// has taken the place of what made it before. Of another output, an action that is gone may still tell.
    pub is_primary: bool,
}

impl Output {
    /// Which of two counts: the greater. The promise that ends later was given later: since Bazel 8, the entry of an action
    /// whose first output this is may be left from before it became another's.
    fn compare(&self, other: &Self) -> Ordering {
        let by_owner = self.is_primary.cmp(&other.is_primary);
        if self.expires_ms >= 0 && other.expires_ms >= 0 {
            self.expires_ms.cmp(&other.expires_ms).then(by_owner)
        } else {
            by_owner.then(self.expires_ms.cmp(&other.expires_ms))
        }
    }
}

/// What is known of outputs, in the order of their paths.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    outputs: Vec<Output>,
    ambiguous: Vec<ExecPath>,
    extent: Extent,
}

/// What facts are of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Extent {
    /// The whole action cache.
    #[default]
    Whole,
    /// What it has in addition to what was read before.
    Grown,
    /// The log of one build.
    Log,
}

/// The actions with outputs in the remote cache, by the numbers of their names, in order; each with a hash of where its
/// outputs are.
pub(super) type Actions = Vec<(i32, u64)>;

impl Facts {
    /// All outputs, in the order of their paths.
    pub(crate) fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    /// The outputs of a log, each with a path of its own.
    pub(super) fn of_log(mut outputs: Vec<Output>) -> Self {
        outputs.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        Self {
            outputs,
            extent: Extent::Log,
            ..Self::default()
        }
    }

    /// What they are of.
    pub(crate) const fn extent(&self) -> Extent {
        self.extent
    }

    /// The output at a path.
    pub(crate) fn get(&self, path: &str) -> Option<&Output> {
        let at = self
            .outputs
            .binary_search_by(|output| output.path.as_str().cmp(path));
        at.ok().and_then(|at| self.outputs.get(at))
    }

    /// The files of the tree at a path.
    pub(crate) fn tree<'a>(&'a self, path: &'a str) -> impl Iterator<Item = &'a Output> + 'a {
        let from = self.outputs.partition_point(|output| output.path.as_str() < path);
        let below = self.outputs[from..].iter();
        below
            .take_while(move |output| output.path.as_str().starts_with(path))
            .filter(move |output| output.tree.as_ref().is_some_and(|tree| tree.as_str() == path))
    }

    /// Forgets some outputs, given in the order of their paths.
    pub(crate) fn forget(&mut self, stale: &[ExecPath]) {
        if !stale.is_empty() {
            self.outputs
                .retain(|output| stale.binary_search(&output.path).is_err());
        }
    }

    /// Whether actions say different things of this path, and nothing says which is newer.
    pub(crate) fn is_ambiguous(&self, path: &ExecPath) -> bool {
        self.ambiguous.binary_search(path).is_ok()
    }

    /// Decodes the files: the actions and their journal, the strings and theirs. A journal that is not there is empty.
    /// Gives the actions with outputs as well; faults with the number of the file.
    pub(super) fn decode(
        files: &Files<'_>,
        function: DigestFunction,
    ) -> Result<(Self, Actions), (usize, Fault)> {
        let index = files.strings()?;
        let mut entries = Entries::default();
        for (number, file) in [files.actions, files.journal].into_iter().enumerate() {
            entries.take_in(number, file, 0)?;
        }
        if !entries.take_validation(&index)? && !entries.0.is_empty() {
            let what = "the number of strings is missing";
            let at = frame::HEADER;
            return Err((0, Fault { at, what }));
        }
        let (candidates, actions) = entries.read(&index, function)?;
        Ok((Self::of(candidates), actions))
    }

    /// Decodes what the journal of actions has from a place on, which `known` were read before. `None` if only all of the
    /// actions say what there is: one is gone that had outputs, or has them elsewhere, or two name one. The same for the
    /// actions.
    pub(super) fn decode_grown(
        files: &Files<'_>,
        from: usize,
        known: &Actions,
        function: DigestFunction,
    ) -> Result<Option<(Self, Actions)>, (usize, Fault)> {
        let index = files.strings()?;
        let mut entries = Entries::default();
        let removed = entries.take_in(1, files.journal, from)?;
        entries.take_validation(&index)?;
        let keys: Vec<i32> = entries.0.keys().copied().collect();
        let (candidates, actions) = entries.read(&index, function)?;
        let paths = |actions: &Actions, key: i32| {
            let at = actions.binary_search_by_key(&key, |(key, _)| *key);
            at.ok().map(|at| actions[at].1)
        };
        let is_other = |key: &i32| {
            let before = paths(known, *key);
            before.is_some() && before != paths(&actions, *key)
        };
        if keys.iter().chain(&removed).any(is_other) {
            return Ok(None);
        }
        let mut all = known.clone();
        all.extend(actions.iter().filter(|(key, _)| paths(known, *key).is_none()));
        all.sort_unstable();
        let facts = Self {
            extent: Extent::Grown,
            ..Self::of(candidates)
        };
        Ok(facts.ambiguous.is_empty().then_some((facts, all)))
    }

    /// What one entry says of a path. Entries of actions that are gone stay, so an output may have two.
    fn of(mut candidates: Vec<Output>) -> Self {
        candidates.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        let mut facts = Self::default();
        for same in candidates.chunk_by(|a, b| a.path == b.path) {
            let Some(best) = same.iter().max_by(|a, b| a.compare(b)) else {
                continue;
            };
            let contradicts = |one: &Output| one.compare(best) == Ordering::Equal && one != best;
            if same.iter().any(contradicts) {
                facts.ambiguous.push(best.path.clone());
            } else {
                facts.outputs.push(best.clone());
            }
        }
        facts
    }
}

/// The four files' bytes, without a journal that is not there.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Files<'a> {
    pub(super) actions: &'a [u8],
    pub(super) journal: &'a [u8],
    pub(super) index: &'a [u8],
    pub(super) index_journal: &'a [u8],
}

impl<'a> Files<'a> {
    /// Of the actions, their journal, the strings, and theirs.
    pub(super) fn of([actions, journal, index, index_journal]: &'a [Vec<u8>; 4]) -> Self {
        Self {
            actions,
            journal,
            index,
            index_journal,
        }
    }

    /// The strings by their numbers, none of which is missing.
    fn strings(&self) -> Result<Index<'a>, (usize, Fault)> {
        let mut index = Index::default();
        index.take_in(self.index).map_err(|fault| (2, fault))?;
        index.take_in(self.index_journal).map_err(|fault| (3, fault))?;
        let (at, what) = (frame::HEADER, "missing string");
        index.len().ok_or((2, Fault { at, what }))?;
        Ok(index)
    }
}

/// The newest record of each action, by the number of its name: which file it is in, where, and its bytes.
#[derive(Default)]
struct Entries<'a>(HashMap<i32, (usize, usize, &'a [u8])>);

impl<'a> Entries<'a> {
    /// Takes in a file's records, from a place on. Gives the actions that it says are gone.
    fn take_in(&mut self, number: usize, file: &'a [u8], from: usize) -> Result<Vec<i32>, (usize, Fault)> {
        let mut removed = Vec::new();
        let read = frame::records(file, from, Cursor::int32, |key, is_set, cursor| {
            if is_set {
                let value = cursor.piece()?;
                self.0.insert(key, (number, cursor.place() - value.len(), value));
            } else {
                self.0.remove(&key);
                removed.push(key);
            }
            Ok(())
        });
        read.map_err(|fault| (number, fault))?;
        removed.retain(|key| !self.0.contains_key(key));
        Ok(removed)
    }

    /// Holds against each other how many strings there are and are said to be. Whether that is said.
    fn take_validation(&mut self, index: &Index<'_>) -> Result<bool, (usize, Fault)> {
        let Some((number, at, value)) = self.0.remove(&VALIDATION) else {
            return Ok(false);
        };
        let strings = index.len().unwrap_or_default();
        let written = Cursor::new(value, at).int32();
        let fits = written.is_ok_and(|written| usize::try_from(written).is_ok_and(|n| n <= strings));
        if value.len() != 4 || !fits {
            let what = "it refers to more strings than exist";
            return Err((number, Fault { at, what }));
        }
        Ok(true)
    }

    /// What the records say, and of which actions.
    fn read(
        self,
        index: &Index<'a>,
        function: DigestFunction,
    ) -> Result<(Vec<Output>, Actions), (usize, Fault)> {
        let mut gathering = Gathering {
            index,
            function,
            key: 0,
            candidates: Vec::new(),
            actions: Vec::new(),
            place: None,
        };
        for (key, (number, at, value)) in self.0 {
            gathering.key = key;
            let is_string = gathering.string(key);
            is_string.map_err(|what| (number, Fault { at, what }))?;
            entry::read(value, at, &mut gathering).map_err(|fault| (number, fault))?;
        }
        gathering.actions.sort_unstable();
        Ok((gathering.candidates, gathering.actions))
    }
}

struct Gathering<'a, 'i> {
    index: &'i Index<'a>,
    function: DigestFunction,
    /// The action whose record is read.
    key: i32,
    candidates: Vec<Output>,
    actions: Actions,
    /// Where that action's last output is.
    place: Option<(i32, bool)>,
}

impl<'a> Gathering<'a, '_> {
    fn bytes(&self, id: i32) -> Result<Cow<'a, [u8]>, &'static str> {
        self.index.get(id).ok_or("reference to a missing string")
    }

    /// The action has an output there, which is a file, or a tree with a file in it.
    fn note(&mut self, place: (i32, bool)) {
        if self.actions.last().is_none_or(|(key, _)| *key != self.key) {
            self.actions.push((self.key, 0));
            self.place = None;
        }
        // Which files a tree has is said again with each of its entries.
        if let Some((_, paths)) = self.actions.last_mut()
            && self.place.replace(place) != Some(place)
        {
            *paths = BuildHasherDefault::<DefaultHasher>::default().hash_one((*paths, place));
        }
    }

    fn push(
        &mut self,
        path: &[u8],
        tree: Option<&[u8]>,
        first: i32,
        metadata: Metadata<'a>,
    ) -> Result<(), &'static str> {
        const NO_OUTPUT: &str = "an output is not under bazel-out";
        let digest = Digest::new(self.function, metadata.hash, metadata.size);
        // An action that has not run since builds here had another digest function.
        let Ok(digest) = digest else { return Ok(()) };
        // Outside of the output tree it is a source file, and there already.
        let link_to = match metadata.link_to {
            Some(id) => match output_path(&self.bytes(id)?) {
                Some(Ok(path)) => Some(path),
                Some(Err(())) => return Err("invalid symlink target"),
                None => return Ok(()),
            },
            None => None,
        };
        let tree = match tree {
            Some(tree) => match output_path(tree) {
                Some(Ok(tree)) => Some(tree),
                _ if std::str::from_utf8(tree).is_err() => return Ok(()),
                _ => return Err(NO_OUTPUT),
            },
            None => None,
        };
        let path = match output_path(path) {
            Some(Ok(path)) => path,
            // No event could name it either.
            _ if std::str::from_utf8(path).is_err() => return Ok(()),
            _ => return Err(NO_OUTPUT),
        };
        self.note((first, tree.is_some()));
        self.candidates.push(Output {
            path,
            digest,
            tree,
            link_to,
            expires_ms: metadata.expires_ms,
            is_primary: self.key == first,
        });
        Ok(())
    }
}

impl<'a> Heed<'a> for Gathering<'a, '_> {
    fn file(&mut self, path: i32, metadata: Metadata<'a>) -> Result<(), &'static str> {
        let bytes = self.bytes(path)?;
        self.push(&bytes, None, path, metadata)
    }

    fn child(&mut self, tree: i32, below: i32, metadata: Metadata<'a>) -> Result<(), &'static str> {
        let (root, below) = (self.bytes(tree)?, self.bytes(below)?);
        let path = [&*root, b"/", &*below].concat();
        self.push(&path, Some(&root), tree, metadata)
    }

    fn string(&mut self, id: i32) -> Result<(), &'static str> {
        self.bytes(id).map(drop)
    }
}

/// Whether a journal has, from a place on, only actions that had no outputs to report, and still have none.
pub(super) fn has_no_outputs(journal: &[u8], from: usize, with_outputs: &Actions) -> bool {
    struct Nothing;
    impl<'a> Heed<'a> for Nothing {
        fn file(&mut self, _: i32, _: Metadata<'a>) -> Result<(), &'static str> {
            Err("an output")
        }
        fn child(&mut self, _: i32, _: i32, _: Metadata<'a>) -> Result<(), &'static str> {
            Err("a file in a tree")
        }
        fn string(&mut self, _: i32) -> Result<(), &'static str> {
            Ok(())
        }
    }
    let read = frame::records(journal, from, Cursor::int32, |key, is_set, cursor| {
        if with_outputs.binary_search_by_key(&key, |(key, _)| *key).is_ok() {
            return Err(cursor.fault("an action that had outputs"));
        }
        let value = if is_set { cursor.piece()? } else { &[] };
        if is_set && key != VALIDATION {
            entry::read(value, cursor.place() - value.len(), &mut Nothing)?;
        }
        Ok(())
    });
    read.is_ok()
}

/// The path below `bazel-out`; `None` for one elsewhere, and an error for an invalid path there.
fn output_path(bytes: &[u8]) -> Option<Result<ExecPath, ()>> {
    let path = std::str::from_utf8(bytes).ok()?;
    path.starts_with(OUTPUT_DIRECTORY)
        .then(|| ExecPath::new(path).map_err(drop))
}
