//! Directories of outputs that somebody has deleted, such as by `rm -rf bazel-bin/pkg`.
//!
//! As long as Bazel's action cache knows of the outputs there, a Bazel that downloads nothing neither makes such a directory again
//! nor names what belongs there.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    io,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Mode, OFlags, open},
    io::Errno,
};

use crate::{
    action_cache::{self, ActionCacheError, Facts, Reading},
    digest::DigestFunction,
    exec_path::BUILD_TREE,
    stage::open_below,
};

/// What of the directories of outputs is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Deleted {
    /// Nothing, as far as is known.
    Nothing,
    /// This directory, perhaps among others.
    Directory(PathBuf),
    /// What Bazel knows outputs in: only its server does, for it writes its action cache when a build ends by itself.
    Unknown,
}

/// A directory of an output base that is gone, and that Bazel knows outputs in. `function` is the digest function of its builds,
/// and `exec_root` the name of the exec root that the next one has, where that is known: as for Bazel's action cache, which has
/// no exec roots in its paths, outputs of builds under another name are its own, wherever they are.
///
/// All of these are made again, empty: of targets that are not built any more, nobody else would do that. Reads the action
/// cache, and blocks.
pub(super) fn look(output_base: &Path, function: DigestFunction, exec_root: Option<&str>) -> Deleted {
    match known(output_base, function) {
        Ok(Some(facts)) => {
            directory(output_base, &facts, exec_root).map_or(Deleted::Nothing, Deleted::Directory)
        }
        Ok(None) if has_begun(output_base) => Deleted::Unknown,
        Ok(None) => Deleted::Nothing,
        Err(error) => {
            tracing::debug!("{error}; whether directories of outputs were deleted is unknown");
            Deleted::Unknown
        }
    }
}

/// Whether Bazel has an action cache that it has never written: the index of names is there from the beginning.
fn has_begun(output_base: &Path) -> bool {
    let entries = std::fs::read_dir(output_base.join("action_cache"));
    let mut names = entries
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name());
    names.any(|name| name.to_string_lossy().starts_with("filename_index_"))
}

fn directory(output_base: &Path, facts: &Facts, exec_root: Option<&str>) -> Option<PathBuf> {
    let directories: BTreeSet<&str> = facts
        .outputs()
        .iter()
        .filter_map(|output| output.tree.as_ref().unwrap_or(&output.path).parent())
        .collect();
    let exec_roots = output_base.join("execroot");
    let mut roots: Vec<PathBuf> = std::fs::read_dir(&exec_roots)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|root| root.join(BUILD_TREE).is_dir())
        .filter(|root| exec_root.is_none_or(|name| root.ends_with(name)))
        .collect();
    // A workspace may have had another name, and so another exec root.
    roots.sort_by_key(|root| {
        std::fs::metadata(root.join(BUILD_TREE))
            .and_then(|meta| meta.modified())
            .ok()
    });
    let is_gone = |place: &Path| {
        let found = place.symlink_metadata();
        found.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    };
    let mut gone = directories
        .into_iter()
        .filter(|directory| roots.iter().all(|root| is_gone(&root.join(directory))))
        .filter(|directory| !is_in_place_of_output(facts, directory));
    let Some(newest) = roots.last() else {
        // Bazel makes its own first.
        return gone
            .next()
            .map(|_| exec_roots.join(exec_root.unwrap_or_default()));
    };
    let mut first = None;
    for directory in gone {
        match make(newest, directory) {
            Ok(()) => _ = first.get_or_insert_with(|| newest.join(directory)),
            Err(error) => tracing::warn!(
                "failed to make {directory} in {} again: {error}",
                newest.display()
            ),
        }
    }
    first
}

/// Whether the path, or one above it, is an output's now, and only an action that is gone had it as a directory.
fn is_in_place_of_output(facts: &Facts, directory: &str) -> bool {
    let above = directory.match_indices('/').map(|(end, _)| &directory[..end]);
    above.chain([directory]).any(|path| facts.get(path).is_some())
}

fn known(output_base: &Path, function: DigestFunction) -> Result<Option<Facts>, ActionCacheError> {
    match action_cache::read(output_base, function, None)? {
        Reading::Read(facts, _) => Ok(Some(facts)),
        Reading::Absent | Reading::Unchanged => Ok(None),
    }
}

/// Makes a directory, and those above it, without following a link.
fn make(root: &Path, directory: &str) -> Result<(), Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = open(root, flags, Mode::empty())?;
    let mut names = directory.split('/');
    let made = names.try_fold(root, |at, name| open_below(&at, OsStr::new(name), true));
    made.map(drop)
}
