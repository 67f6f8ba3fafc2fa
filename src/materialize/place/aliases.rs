//! Outputs of a build that lie where links lead.
//!
//! Nothing that is there is ever written through a link in a file's place: one that leads to other bytes is replaced. But
//! a link that leads to the right ones counts, for Bazel makes such itself (`ctx.actions.symlink`), and so does one on
//! the way, for a symlinked directory; and in an exec root, a link to nothing stays, and the file is put there. Then two
//! outputs are one file, which is right only as long as both are to have the same bytes. So everything that such an
//! output leans on is noted: the links, and the file at their end. Whoever is about to put something else there first
//! makes the output a file of its own, from the bytes that are there still; where a link on the way would have to go for
//! that, which others go through as well, it is refused.
//!
//! Looking for a name and changing what has it are one step: the lock is held for both, shared as long as nothing leans
//! on the name.

use std::{
    collections::HashMap,
    ops::Deref,
    path::{Path, PathBuf},
    sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use rustix::{
    fs::{self, FileType, Mode, OFlags},
    io::Errno,
};

use super::{
    error::{PlaceError, PlaceErrorKind},
    publish::{Job, NewFile},
    sys,
    walk::{self, Spot},
    writable::Writable,
};
use crate::{
    digest::{Digest, DigestFunction, Hasher},
    exec_path::ExecPath,
    output::OutputContent,
    removal,
};

/// Pieces in which files are read.
const READ: usize = 256 << 10;

/// By what they lean on, below the root.
#[derive(Debug, Default)]
pub(super) struct Aliases(RwLock<Leaning>);

pub(super) type Leaning = HashMap<PathBuf, Vec<Alias>>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Alias {
    path: ExecPath,
    /// `None` for a link or a directory.
    digest: Option<Digest>,
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
    let why = "another output of this build lies there, as a symlink leads there";
    PlaceError::new("replace", path, PlaceErrorKind::Conflict(why))
}

/// For a path that does not lead any more to where it did when its place was looked for.
pub(super) fn turned(operation: &'static str, path: &ExecPath) -> PlaceError {
    let why = "another output took the place of a symlink on the way";
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
    fn write(&self) -> RwLockWriteGuard<'_, Leaning> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new build begins.
    pub(super) fn clear(&self) {
        self.write().clear();
    }

    /// Notes that an output was found at a spot that is not its own. False if that is not so any more.
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
        let mut leaning = self.write();
        // Whoever has replaced it before it was noted did not know. Then this one has nothing there to put something
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
        Changing::Alone(self.write())
    }

    /// Before something is removed that another output may lean on.
    pub(super) fn refuse(&self, path: &Path) -> Result<Changing<'_>, PlaceError> {
        let leaning = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if leaning.contains_key(path) {
            return Err(refused(path));
        }
        Ok(Changing::Shared(leaning))
    }

    /// Before something is put at a spot for an output: what leans on it gets its own bytes. The caller holds a permit.
    pub(super) fn change<'a>(
        &'a self,
        job: &Job<'_>,
        spot: &Spot,
        path: &ExecPath,
    ) -> Result<Changing<'a>, PlaceError> {
        let is_through = !spot.dir.through.is_empty();
        let at = spot.path();
        if !is_through {
            let leaning = self.0.read().unwrap_or_else(PoisonError::into_inner);
            if leaning.is_empty() || !leaning.contains_key(&at) {
                return Ok(Changing::Shared(leaning));
            }
        }
        let mut leaning = self.write();
        if is_through && !walk::still_leads(job.root, path, spot) {
            return Err(turned("place", path));
        }
        let here = leaning.get(&at).map_or(&[][..], Vec::as_slice);
        if is_through && !here.iter().any(|alias| alias.path == *path) {
            let found = sys::lstat(&spot.dir, &spot.name);
            if found
                .map_err(|errno| PlaceError::system_error("stat", &at, errno))?
                .is_some()
            {
                let kind =
                    PlaceErrorKind::Conflict("a symlink on the way leads to where something else lies");
                return Err(PlaceError::new("replace", path.as_str(), kind));
            }
        }
        for alias in here.iter().filter(|alias| alias.path != *path) {
            alias.stand_alone(job, &at, &leaning)?;
        }
        leaning.remove(&at);
        Ok(Changing::Alone(leaning))
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

impl Alias {
    /// Puts a file with the output's bytes in the place of its link, before what the link leads to changes. What has
    /// not got its bytes any more has nothing to keep.
    fn stand_alone(&self, job: &Job<'_>, at: &Path, leaning: &Leaning) -> Result<(), PlaceError> {
        let error =
            |errno| PlaceError::system_error("copy, before another output takes its place,", at, errno);
        let Ok(Some(dir)) = walk::find_dir(job.root, self.path.parent().unwrap_or("")) else {
            return Ok(());
        };
        let name = self.path.file_name().into();
        let own = Spot { dir, name };
        let Some(seen) = sys::lstat(&own.dir, &own.name).map_err(error)? else {
            return Ok(());
        };
        let is_behind_link = !own.dir.through.is_empty();
        if sys::file_type(&seen) != FileType::Symlink && !is_behind_link {
            return Ok(());
        }
        let Some(digest) = &self.digest else {
            return Err(refused(at));
        };
        let Ok(Some(real)) = walk::follow(job.root, self.path.as_str()) else {
            return Ok(());
        };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let source = match sys::openat(&real.dir, &real.name, flags, Mode::empty()) {
            Ok(source) => source,
            Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => return Ok(()),
            Err(errno) => return Err(error(errno)),
        };
        if sys::file_type(&fs::fstat(&source).map_err(error)?) != FileType::RegularFile {
            return Ok(());
        }
        let file = NewFile::in_temp(job.root, job.mode(&self.path))?;
        let mut hasher = Hasher::new(digest.function());
        sys::read_pieces(&source, &mut vec![0; READ], |piece| {
            hasher.update(piece);
            sys::write_all(&file, piece)
        })
        .map_err(error)?;
        if hasher.finish() != *digest {
            return Ok(());
        }
        if is_behind_link {
            return Err(refused(at));
        }
        let _open = Writable::open(&job.root.leases, &own.dir).map_err(error)?;
        file.publish(job.root, &own, true, leaning).map(|_| ())
    }
}
