//! What an action's result or a directory tree puts where.
//!
//! Pure: the trees have been fetched. Names come from a cache that anybody may have written to, so none may lead out
//! of the place it is put in, and a small tree that refers to one directory a thousand times on each of ten levels
//! ends at a limit instead of in memory.

use std::collections::{HashMap, HashSet};

use bazel_remote_apis::build::bazel::remote::execution::v2::{self as reapi, ActionResult};

use super::{client::from_wire, trees::DirectoryTree};
use crate::{
    digest::{Digest, DigestFunction},
    exec_path::{ExecPath, ExecPathError},
    output::{Directories, OutputContent},
};

/// The most entries of one expansion, directories counted.
pub(crate) const MAX_ENTRIES: usize = 2_000_000;

/// Something that is to be at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Expanded {
    /// Where, below the exec root or the directory that the tree is put in.
    pub path: ExecPath,
    /// What. [`OutputContent::Directory`] only for a directory with nothing in it.
    pub content: OutputContent,
    /// Whether a file's owner may execute it.
    pub is_executable: bool,
}

/// Why a result or tree cannot be expanded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ExpandError {
    /// A path of the action's result is not a valid exec path.
    #[error("output refused: {0}")]
    Path(#[from] ExecPathError),
    /// A name in a directory is not one name.
    #[error("{directory:?} contains {name:?}, which is not a valid file name")]
    Name {
        /// The directory's path; empty for the root.
        directory: String,
        /// Name of the entry.
        name: String,
    },
    /// Two entries of one path.
    #[error("{0:?} is named twice, with different contents")]
    Twice(String),
    /// A digest is missing or invalid.
    #[error("{0:?} has no valid digest")]
    Digest(String),
    /// A symlink has no target, or one that no symlink can have.
    #[error("symlink {0:?} has no valid target")]
    Target(String),
    /// A directory that was not fetched.
    #[error("{path:?} is directory {digest}, which the cache does not have")]
    Missing {
        /// Path of the directory.
        path: String,
        /// Digest of the directory.
        digest: Digest,
    },
    /// Too many entries.
    #[error("more than {0} entries")]
    TooMany(usize),
}

/// The trees that [`expand_result`] needs: digests of `Tree` messages where the result has them, else of root
/// directories.
///
/// # Errors
/// When an output directory has no digest that can be read.
pub(crate) fn trees_of(function: DigestFunction, result: &ActionResult) -> Result<Vec<TreeRef>, ExpandError> {
    result
        .output_directories
        .iter()
        .map(|directory| tree_ref(function, directory))
        .collect()
}

/// How a result names an output directory's content.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum TreeRef {
    /// By the digest of a `Tree` message.
    Tree(Digest),
    /// By the digest of its root `Directory`.
    Root(Digest),
}

fn tree_ref(function: DigestFunction, directory: &reapi::OutputDirectory) -> Result<TreeRef, ExpandError> {
    let read = |digest: &Option<reapi::Digest>| digest.as_ref().and_then(|d| from_wire(function, d));
    read(&directory.tree_digest)
        // A `Tree` has at least a root, even if that is empty: an empty digest here is an unset one.
        .filter(|d| !d.is_empty())
        .map(TreeRef::Tree)
        .or_else(|| read(&directory.root_directory_digest).map(TreeRef::Root))
        .ok_or_else(|| ExpandError::Digest(directory.path.clone()))
}

/// Everything that an action's result puts below the exec root, in the order of paths.
///
/// # Errors
/// When a path or name leads elsewhere, a digest is unusable, a tree is not in `trees`, or there are more than
/// `limit` entries.
pub(crate) fn expand_result<'t>(
    function: DigestFunction,
    result: &ActionResult,
    trees: &HashMap<TreeRef, impl AsRef<DirectoryTree> + 't>,
    limit: usize,
) -> Result<Vec<Expanded>, ExpandError> {
    let mut expansion = Expansion::new(limit);
    for file in &result.output_files {
        let path = ExecPath::new(&file.path)?;
        let digest = file
            .digest
            .as_ref()
            .and_then(|d| from_wire(function, d))
            .ok_or_else(|| ExpandError::Digest(file.path.clone()))?;
        expansion.push(path, OutputContent::Blob(digest), file.is_executable)?;
    }
    // Servers for old and new clients fill the old two fields and the new one with the same links.
    for link in result.output_symlinks.iter().chain(old_symlinks(result)) {
        let path = ExecPath::new(&link.path)?;
        let target = target(&link.path, &link.target)?;
        expansion.push(path, OutputContent::Symlink(target), false)?;
    }
    for directory in &result.output_directories {
        let reference = tree_ref(function, directory)?;
        let tree = trees.get(&reference).ok_or_else(|| {
            let (TreeRef::Tree(digest) | TreeRef::Root(digest)) = reference;
            ExpandError::Missing {
                path: directory.path.clone(),
                digest,
            }
        })?;
        // An action may declare the whole of its working directory.
        let base = match directory.path.as_str() {
            "" => None,
            path => Some(ExecPath::new(path)?),
        };
        expansion.walk(base, tree.as_ref())?;
    }
    expansion.finish()
}

#[allow(deprecated)]
fn old_symlinks(result: &ActionResult) -> impl Iterator<Item = &reapi::OutputSymlink> {
    result
        .output_file_symlinks
        .iter()
        .chain(&result.output_directory_symlinks)
}

/// Everything in a tree, put below `base` (or nothing, for a directory of its own), in the order of paths.
///
/// # Errors
/// As [`expand_result`].
pub(crate) fn expand_tree(
    base: Option<ExecPath>,
    tree: &DirectoryTree,
    limit: usize,
) -> Result<Vec<Expanded>, ExpandError> {
    let mut expansion = Expansion::new(limit);
    expansion.walk(base, tree)?;
    expansion.finish()
}

struct Expansion {
    entries: Vec<Expanded>,
    limit: usize,
    /// Entries and the directories that were walked through.
    visited: usize,
}

impl Expansion {
    const fn new(limit: usize) -> Self {
        Self {
            entries: Vec::new(),
            limit,
            visited: 0,
        }
    }

    fn count(&mut self) -> Result<(), ExpandError> {
        self.visited += 1;
        if self.visited > self.limit {
            return Err(ExpandError::TooMany(self.limit));
        }
        Ok(())
    }

    fn push(
        &mut self,
        path: ExecPath,
        content: OutputContent,
        is_executable: bool,
    ) -> Result<(), ExpandError> {
        self.count()?;
        self.entries.push(Expanded {
            path,
            content,
            is_executable,
        });
        Ok(())
    }

    fn walk(&mut self, base: Option<ExecPath>, tree: &DirectoryTree) -> Result<(), ExpandError> {
        // A cycle would need a digest that contains itself; were there one, its paths would grow too long.
        let mut stack = vec![(base, tree.root().clone())];
        while let Some((base, digest)) = stack.pop() {
            let here = base.as_ref().map_or("", ExecPath::as_str);
            let Some(directory) = tree.get(&digest) else {
                return Err(ExpandError::Missing {
                    path: here.to_owned(),
                    digest,
                });
            };
            self.count()?;
            let function = digest.function();
            let mut names = HashSet::new();
            let mut child = |name: &str| {
                let path = child(base.as_ref(), name)?;
                if names.insert(name.to_owned()) {
                    Ok(path)
                } else {
                    Err(ExpandError::Twice(path.as_str().to_owned()))
                }
            };
            for node in &directory.files {
                let path = child(&node.name)?;
                let digest = node.digest.as_ref().and_then(|d| from_wire(function, d));
                let digest = digest.ok_or_else(|| ExpandError::Digest(path.as_str().to_owned()))?;
                self.push(path, OutputContent::Blob(digest), node.is_executable)?;
            }
            for node in &directory.symlinks {
                let path = child(&node.name)?;
                let target = target(path.as_str(), &node.target)?;
                self.push(path, OutputContent::Symlink(target), false)?;
            }
            for node in &directory.directories {
                let path = child(&node.name)?;
                let digest = node.digest.as_ref().and_then(|d| from_wire(function, d));
                let digest = digest.ok_or_else(|| ExpandError::Digest(path.as_str().to_owned()))?;
                stack.push((Some(path), digest));
            }
            let is_bare = directory.files.is_empty()
                && directory.symlinks.is_empty()
                && directory.directories.is_empty();
            if let Some(base) = base
                && is_bare
            {
                self.push(base, OutputContent::Directory, false)?;
            }
        }
        Ok(())
    }

    /// Sorted, with what was said twice said once.
    fn finish(mut self) -> Result<Vec<Expanded>, ExpandError> {
        self.entries.sort_by(|a, b| a.path.cmp(&b.path));
        self.entries.dedup();
        let twice = |path: &ExecPath| Err(ExpandError::Twice(path.as_str().to_owned()));
        if let Some(pair) = self.entries.windows(2).find(|pair| pair[0].path == pair[1].path) {
            return twice(&pair[0].path);
        }
        // Another output's directory is not a file.
        let mut directories = Directories::default();
        for entry in &self.entries {
            let is_file = |path: &str| {
                let found = self
                    .entries
                    .binary_search_by(|other| other.path.as_str().cmp(path));
                found.is_ok_and(|found| self.entries[found].content != OutputContent::Directory)
            };
            if directories.take_in(&entry.path, &entry.content, is_file).is_err() {
                return twice(&entry.path);
            }
        }
        Ok(self.entries)
    }
}

fn child(base: Option<&ExecPath>, name: &str) -> Result<ExecPath, ExpandError> {
    let refused = || ExpandError::Name {
        directory: base.map_or("", ExecPath::as_str).to_owned(),
        name: name.to_owned(),
    };
    if name.contains('/') {
        return Err(refused());
    }
    // What is wrong with the name alone is reported as such, what only its length below the base makes wrong as a path.
    let alone = ExecPath::new(name).map_err(|_| refused())?;
    match base {
        None => Ok(alone),
        Some(base) => Ok(base.join(name)?),
    }
}

fn target(path: &str, target: &str) -> Result<String, ExpandError> {
    if target.is_empty() || target.contains('\0') || target.len() > 4095 {
        return Err(ExpandError::Target(path.to_owned()));
    }
    Ok(target.to_owned())
}

#[cfg(test)]
#[path = "expand_tests.rs"]
mod tests;
