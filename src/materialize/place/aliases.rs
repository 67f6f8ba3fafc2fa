//! Outputs of a build that lie where links lead.
//!
//! Nothing that is there is ever written through a link in a file's place: one that leads to other bytes is replaced.
//! But a link that leads to the right ones counts, for Bazel makes such itself (`ctx.actions.symlink`), and so does one
//! on the way, for a symlinked directory; and in an exec root, a link to nothing stays, and the file is put there. Then
//! two outputs are one file, which is right only as long as both are to have the same bytes. So everything that such an
//! output leans on is noted: the links, and the file at their end. Anyone who is about to put something else there
//! first makes the output a file of its own, from the bytes that are there still; where a link on the way would have to
//! go for that, which others go through as well, it is refused.
//!
//! A directory that is an output leans on itself, so that it is not removed for being empty when something is put in the
//! place of one above it.
//!
//! Looking for a name and changing what has it are one step: the lock is held for both, shared as long as nothing leans
//! on the name.

use std::path::Path;

use rustix::{
    fs::{self, FileType, Mode},
    io::Errno,
};

use super::{
    error::{PlaceError, PlaceErrorKind},
    leaning::{Alias, Aliases, Changing, Leaning, refused, turned},
    publish::{Job, NewFile},
    spot::Spot,
    sys, walk,
    writable::Writable,
};
use crate::{digest::Hasher, exec_path::ExecPath, open_files::GUARDED};

/// Pieces in which files are read.
const READ: usize = 256 << 10;

impl Aliases {
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
            let leaning = self.0.read();
            if leaning.is_empty() || !leaning.contains_key(&at) {
                return Ok(Changing::Shared(leaning));
            }
        }
        let mut leaning = self.0.write();
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
                let kind = PlaceErrorKind::Conflict("a symlink on its path leads to another file");
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
        let source = match sys::openat(&real.dir, &real.name, GUARDED, Mode::empty()) {
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
        let _open = Writable::open(&job.root.writable, &own.dir).map_err(error)?;
        file.publish(job.root, &own, true, leaning).map(|_| ())
    }
}
