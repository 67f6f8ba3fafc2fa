//! Removing: in a user's directory what an earlier stage put there, in an exec root what the cache still has. And finding
//! extra files.

use rustix::{
    fs::{self, AtFlags, FileType, Mode, OFlags},
    io::Errno,
};

use super::{
    epoch::Epoch,
    error::{PlaceError, PlaceErrorKind},
    hash::Check,
    placer::Placer,
    sys, walk,
    writable::Writable,
};
use crate::{
    exec_path::{ExecPath, is_reserved},
    output::{OutputContent, Stamp},
};

/// What came of removing something.
enum Unlinked {
    Gone,
    /// It is another file by now.
    Differs,
    /// It is a directory that is not empty.
    Holds,
}

impl Placer {
    /// Removes what is at a path as long as it has the content that was put there, and then the directories above it that
    /// are empty, up to one that `keep` names. What has changed since is somebody else's, and stays.
    ///
    /// # Errors
    /// When the root is an exec root or was replaced, or the system fails.
    pub fn remove(
        &mut self,
        path: &ExecPath,
        content: &OutputContent,
        recorded: Option<&Stamp>,
        keep: &dyn Fn(&str) -> bool,
    ) -> Result<Check, PlaceError> {
        if self.root.is_exec_root {
            let kind = PlaceErrorKind::Conflict("outputs of a build are never removed");
            return Err(PlaceError::new("remove", path.as_str(), kind));
        }
        let check = self.check(path, content, recorded)?;
        let Check::Present { stamp, .. } = check else {
            return Ok(check);
        };
        match self.unlink(path, content, &stamp)? {
            Unlinked::Gone => {}
            Unlinked::Differs => return Ok(Check::Differs),
            Unlinked::Holds => return Ok(check),
        }
        let above = path.parent().unwrap_or("");
        let mut empty = above;
        while !empty.is_empty() && !keep(empty) {
            let (above, name) = empty.rsplit_once('/').unwrap_or(("", empty));
            let Some(dir) = walk::find_dir(&self.root, above)? else {
                break;
            };
            let Ok(_open) = Writable::open(&self.root.writable, &dir) else {
                break;
            };
            // Not empty, mostly.
            if fs::unlinkat(&dir, name, AtFlags::REMOVEDIR).is_err() {
                break;
            }
            empty = above;
        }
        Ok(check)
    }

    /// Removes a build's downloaded file, as long as it has the content that was put there and lies where no link leads; in
    /// a dry run, only looks whether it does. Its directory stays.
    ///
    /// # Errors
    /// When a newer version has begun, the root was replaced, or the system fails.
    pub(crate) fn evict(
        &mut self,
        path: &ExecPath,
        content: &OutputContent,
        recorded: Option<&Stamp>,
        (epoch, version): (&Epoch, u64),
        dry_run: bool,
    ) -> Result<Check, PlaceError> {
        let check = self.check(path, content, recorded)?;
        let Check::Present { stamp, .. } = &check else {
            return Ok(check);
        };
        self.root.guard(path.as_str())?;
        let _permit = epoch
            .permit(version)
            .ok_or_else(|| PlaceError::superseded(path.as_str()))?;
        let dir = walk::find_dir(&self.root, path.parent().unwrap_or(""))?;
        // What lies where a link leads may be another output.
        if dir.is_some_and(|dir| !dir.through.is_empty()) {
            return Ok(Check::Differs);
        }
        if dry_run {
            return Ok(check);
        }
        Ok(match self.unlink(path, content, stamp)? {
            Unlinked::Gone => check,
            Unlinked::Differs | Unlinked::Holds => Check::Differs,
        })
    }

    /// Removes what is at a path, if it is still what has this stamp.
    fn unlink(
        &self,
        path: &ExecPath,
        content: &OutputContent,
        stamp: &Stamp,
    ) -> Result<Unlinked, PlaceError> {
        let error = |errno| PlaceError::system_error("remove", path.as_str(), errno);
        let Some(dir) = walk::find_dir(&self.root, path.parent().unwrap_or(""))? else {
            return Ok(Unlinked::Differs);
        };
        // Checking may have read gigabytes since it looked.
        let is_it = sys::lstat(&dir, path.file_name().as_ref())
            .map_err(error)?
            .is_some_and(|seen| sys::is_same_file(&sys::stamp(&seen, stamp.taken_ns), stamp));
        if !is_it {
            return Ok(Unlinked::Differs);
        }
        let flags = match content {
            OutputContent::Directory => AtFlags::REMOVEDIR,
            _ => AtFlags::empty(),
        };
        let _open = Writable::open(&self.root.writable, &dir).map_err(error)?;
        match fs::unlinkat(&dir, path.file_name(), flags) {
            Ok(()) | Err(Errno::NOENT) => Ok(Unlinked::Gone),
            // A directory that was empty, and holds something by now.
            Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(Unlinked::Holds),
            Err(errno) => Err(error(errno)),
        }
    }

    /// Files below a directory, links included, that `known` does not name: `most` at most. No link is followed.
    ///
    /// # Errors
    /// When a directory cannot be read.
    pub(crate) fn others_below(
        &self,
        directory: &str,
        known: &dyn Fn(&str) -> bool,
        most: usize,
    ) -> Result<Vec<String>, PlaceError> {
        let mut others = Vec::new();
        let mut left = vec![directory.to_owned()];
        while let Some(path) = left.pop() {
            let error = |errno| PlaceError::system_error("list", &path, errno);
            let dir = match walk::find_dir(&self.root, &path) {
                Ok(Some(dir)) => dir,
                Ok(None) => continue,
                // A file or a link in its place, which is reported as that.
                Err(e)
                    if matches!(
                        e.kind,
                        PlaceErrorKind::Conflict(_) | PlaceErrorKind::Escapes { .. }
                    ) =>
                {
                    continue;
                }
                Err(e) => return Err(e),
            };
            // The descriptor that was found stands for the directory, and cannot be read from.
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let readable = sys::openat(&dir, ".", flags, Mode::empty()).map_err(error)?;
            for entry in fs::Dir::new(readable).map_err(error)? {
                let entry = entry.map_err(error)?;
                let name = entry.file_name().to_string_lossy();
                if name == "." || name == ".." || is_reserved(&name) {
                    continue;
                }
                let below = format!("{path}/{name}");
                let kind = match entry.file_type() {
                    FileType::Unknown => {
                        let name = std::os::unix::ffi::OsStrExt::from_bytes(entry.file_name().to_bytes());
                        let seen = sys::lstat(&dir, name).map_err(error)?;
                        seen.map_or(FileType::Unknown, |seen| sys::file_type(&seen))
                    }
                    kind => kind,
                };
                if kind == FileType::Directory {
                    left.push(below);
                } else if !known(&below) {
                    others.push(below);
                    if others.len() >= most {
                        return Ok(others);
                    }
                }
            }
        }
        others.sort();
        Ok(others)
    }
}
