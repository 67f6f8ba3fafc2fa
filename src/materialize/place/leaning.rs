//! What outputs lean on that lie where links lead, or are directories: see [`super::aliases`].

use std::{
    collections::HashMap,
    ops::Deref,
    path::{Path, PathBuf},
};

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::{
    error::{PlaceError, PlaceErrorKind},
    spot::Spot,
};
use crate::{
    digest::{Digest, DigestFunction},
    exec_path::ExecPath,
    output::OutputContent,
    removal,
};

/// By what they lean on, below the root.
#[derive(Debug, Default)]
pub(super) struct Aliases(pub(super) RwLock<Leaning>);

pub(super) type Leaning = HashMap<PathBuf, Vec<Alias>>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Alias {
    pub(super) path: ExecPath,
    /// `None` for a link or a directory.
    pub(super) digest: Option<Digest>,
}

/// While it lives, nothing begins to lean on a name.
pub(super) enum Changing<'a> {
    Shared(RwLockReadGuard<'a, Leaning>),
    Alone(RwLockWriteGuard<'a, Leaning>),
}

/// Notes everything that an output leans on: the links that led to a spot, and what is there.
fn add(leaning: &mut Leaning, spot: &Spot, alias: &Alias) {
    for path in spot.dir.through.iter().cloned().chain([spot.path()]) {
        let list = leaning.entry(path).or_default();
        list.retain(|other| other.path != alias.path);
        list.push(alias.clone());
    }
}

/// For what may not be removed.
pub(super) fn refused(path: &Path) -> PlaceError {
    let why = "another output of this build is in its place";
    PlaceError::new("replace", path, PlaceErrorKind::Conflict(why))
}

/// For a path that does not lead any more to where it did when its place was looked for.
pub(super) fn turned(operation: &'static str, path: &ExecPath) -> PlaceError {
    let why = "another output replaced a symlink on its path";
    PlaceError::new(operation, path.as_str(), PlaceErrorKind::Conflict(why))
}

/// Removes a directory with no files in it, for something that takes its place, unless an output leans on what is below.
pub(super) fn remove_empty(leaning: &Leaning, spot: &Spot) -> Result<(), PlaceError> {
    let path = spot.path();
    if leaning.keys().any(|key| key.starts_with(&path)) {
        return Err(refused(&path));
    }
    removal::remove_empty(&*spot.dir, &spot.name)
        .map_err(|errno| PlaceError::system_error("replace", path, errno))
}

impl Aliases {
    /// A new build begins.
    pub(super) fn clear(&self) {
        self.0.write().clear();
    }

    /// What leans on what.
    pub(super) fn leaning(&self) -> Leaning {
        self.0.read().clone()
    }

    /// The root was opened again in the middle of a build.
    pub(super) fn lean_again(&self, before: Leaning) {
        let mut leaning = self.0.write();
        for (path, aliases) in before {
            leaning.entry(path).or_insert(aliases);
        }
    }

    /// Notes that an output was found at a spot where links led, or is a directory. False if that is not so any more.
    pub(super) fn found(
        &self,
        path: &ExecPath,
        content: &OutputContent,
        spot: &Spot,
        is_still_there: impl FnOnce() -> bool,
    ) -> bool {
        let digest = match content {
            OutputContent::Blob(digest) => Some(digest.clone()),
            OutputContent::Inline(bytes) => Some(Digest::of(DigestFunction::Sha256, bytes)),
            OutputContent::Directory | OutputContent::Symlink(_) => None,
        };
        let mut leaning = self.0.write();
        // Anyone who has replaced it before it was noted did not know. Then this one has nothing there to put something
        // else upon.
        let is_there = is_still_there();
        if is_there {
            let path = path.clone();
            add(&mut leaning, spot, &Alias { path, digest });
        }
        is_there
    }

    /// Before something is put where nothing is, by way of links.
    pub(super) fn begin(&self) -> Changing<'_> {
        Changing::Alone(self.0.write())
    }

    /// Before something is removed that another output may lean on.
    pub(super) fn refuse(&self, path: &Path) -> Result<Changing<'_>, PlaceError> {
        let leaning = self.0.read();
        let others =
            |aliases: &Vec<Alias>| aliases.iter().any(|alias| Path::new(alias.path.as_str()) != path);
        if leaning.get(path).is_some_and(others) {
            return Err(refused(path));
        }
        Ok(Changing::Shared(leaning))
    }
}

impl Deref for Changing<'_> {
    type Target = Leaning;

    fn deref(&self) -> &Leaning {
        match self {
            Self::Shared(leaning) => leaning,
            Self::Alone(leaning) => leaning,
        }
    }
}

impl Changing<'_> {
    /// Notes that an output was put at a spot, if links led there.
    pub(super) fn placed(&mut self, path: &ExecPath, digest: Option<&Digest>, spot: &Spot) {
        if let Self::Alone(leaning) = self
            && !spot.dir.through.is_empty()
        {
            let (path, digest) = (path.clone(), digest.cloned());
            add(leaning, spot, &Alias { path, digest });
        }
    }
}
