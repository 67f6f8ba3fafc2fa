//! One fact for each path.

use std::{borrow::Cow, collections::HashMap};

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
}

/// What is known of outputs, in the order of their paths.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    outputs: Vec<Output>,
    ambiguous: Vec<ExecPath>,
    is_part: bool,
}

impl Facts {
    /// All outputs, in the order of their paths.
    pub(crate) fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    /// Some outputs of many, each with a path of its own.
    pub(super) fn part(mut outputs: Vec<Output>) -> Self {
        outputs.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        Self {
            outputs,
            is_part: true,
            ..Self::default()
        }
    }

    /// Whether there may be others that it does not tell of.
    pub(crate) const fn is_part(&self) -> bool {
        self.is_part
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

    /// Whether actions tell different things of this path, and nothing says which is newer.
    pub(crate) fn is_ambiguous(&self, path: &ExecPath) -> bool {
        self.ambiguous.binary_search(path).is_ok()
    }

    /// Decodes the files: the actions and their journal, the strings and theirs. A journal that is not there is empty.
    /// Gives the numbers of the names of actions with outputs as well; faults with the number of the file.
    pub(super) fn decode(
        files: &Files<'_>,
        function: DigestFunction,
    ) -> Result<(Self, Vec<i32>), (usize, Fault)> {
        let mut index = Index::default();
        index.take_in(files.index).map_err(|fault| (2, fault))?;
        index.take_in(files.index_journal).map_err(|fault| (3, fault))?;
        let strings = index.len().ok_or_else(|| {
            let what = "missing string";
            (
                2,
                Fault {
                    at: frame::HEADER,
                    what,
                },
            )
        })?;
        let mut entries: HashMap<i32, (usize, usize, &[u8])> = HashMap::new();
        for (number, file) in [files.actions, files.journal].into_iter().enumerate() {
            frame::records(file, 0, Cursor::int32, |key, is_set, cursor| {
                if is_set {
                    let value = cursor.piece()?;
                    entries.insert(key, (number, cursor.place() - value.len(), value));
                } else {
                    entries.remove(&key);
                }
                Ok(())
            })
            .map_err(|fault| (number, fault))?;
        }
        if let Some((number, at, value)) = entries.remove(&VALIDATION) {
            let written = Cursor::new(value, at).int32();
            let fits = written.is_ok_and(|written| usize::try_from(written).is_ok_and(|n| n <= strings));
            if value.len() != 4 || !fits {
                let what = "it refers to more strings than exist";
                return Err((number, Fault { at, what }));
            }
        } else if !entries.is_empty() {
            let what = "the number of strings is missing";
            return Err((
                0,
                Fault {
                    at: frame::HEADER,
                    what,
                },
            ));
        }
        let mut gathering = Gathering {
            index: &index,
            function,
            key: 0,
            told: Vec::new(),
            with_outputs: Vec::new(),
        };
        for (key, (number, at, value)) in entries {
            gathering.key = key;
            let is_string = gathering.string(key);
            is_string.map_err(|what| (number, Fault { at, what }))?;
            entry::read(value, at, &mut gathering).map_err(|fault| (number, fault))?;
        }
        let mut with_outputs = gathering.with_outputs;
        with_outputs.sort_unstable();
        Ok((Self::of(gathering.told), with_outputs))
    }

    /// What one entry says of a path. Entries of actions that are gone stay, so an output may have two.
    fn of(mut told: Vec<Candidate>) -> Self {
        told.sort_unstable_by(|a, b| a.output.path.cmp(&b.output.path));
        let mut facts = Self::default();
        for same in told.chunk_by(|a, b| a.output.path == b.output.path) {
            let Some(best) = same.iter().max_by_key(|told| told.rank()) else {
                continue;
            };
            let contradicts = |told: &Candidate| told.rank() == best.rank() && told.output != best.output;
            if same.iter().any(contradicts) {
                facts.ambiguous.push(best.output.path.clone());
            } else {
                facts.outputs.push(best.output.clone());
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

/// What one action's record tells of an output.
struct Candidate {
    output: Output,
    /// The action's own name is this path: it is its first output.
    is_primary: bool,
}

impl Candidate {
    /// Which of two counts: the higher.
    const fn rank(&self) -> (bool, i64) {
        (self.is_primary, self.output.expires_ms)
    }
}

struct Gathering<'a, 'i> {
    index: &'i Index<'a>,
    function: DigestFunction,
    /// The action whose record is read.
    key: i32,
    told: Vec<Candidate>,
    with_outputs: Vec<i32>,
}

impl<'a> Gathering<'a, '_> {
    fn bytes(&self, id: i32) -> Result<Cow<'a, [u8]>, &'static str> {
        self.index.get(id).ok_or("reference to a missing string")
    }

    fn push(
        &mut self,
        path: &[u8],
        tree: Option<&[u8]>,
        first: i32,
        metadata: Metadata<'a>,
    ) -> Result<(), &'static str> {
        const NO_OUTPUT: &str = "an output is not under bazel-out";
        if self.with_outputs.last() != Some(&self.key) {
            self.with_outputs.push(self.key);
        }
        let digest = Digest::new(self.function, metadata.hash, metadata.size);
        let digest = digest.map_err(|_| "a digest does not use the build's digest function")?;
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
        self.told.push(Candidate {
            output: Output {
                path,
                digest,
                tree,
                link_to,
                expires_ms: metadata.expires_ms,
            },
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

/// Whether a journal has, from a place on, only actions that had no outputs to tell of, and still have none. `with_outputs`
/// is in order.
pub(super) fn tells_nothing(journal: &[u8], from: usize, with_outputs: &[i32]) -> bool {
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
        if with_outputs.binary_search(&key).is_ok() {
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
