//! From the staging directory to the final names, by rename alone.

use std::{
    ffi::{OsStr, OsString},
    os::{fd::OwnedFd, unix::ffi::OsStrExt as _},
};

use rustix::{
    fs::{self, AtFlags, Dir, FileType, Mode, OFlags, RenameFlags},
    io::Errno,
};

use super::{
    ArchiveError, Existing, Published, Staging,
    error::place,
    staging::{TREE, descend, open_directory, rename_new},
};
use crate::open_files::{is_lacking, patient};

/// What stops a merge in the middle, for tests.
type Between<'a> = &'a mut dyn FnMut() -> Result<(), ArchiveError>;

impl Staging {
    /// Moves everything to its final name. To be called only when the bytes of all archives are verified.
    ///
    /// # Errors
    /// When an archive was unpacked only in part, something in the target is in the way, or the system refuses. With [`Existing::Merge`] nothing was renamed
    /// if it is the former; each file there is whole in any case, and the same archives can be unpacked again.
    pub(crate) fn publish(self) -> Result<Published, ArchiveError> {
        self.publish_with(&mut || Ok(()))
    }

    /// As [`Self::publish`] with [`Existing::Merge`], into a directory that is open: whatever has its path now.
    ///
    /// # Errors
    /// As [`Self::publish`].
    pub(crate) fn publish_into(self, directory: &OwnedFd) -> Result<(), ArchiveError> {
        if let Some(archive) = self.index.lock().unfinished() {
            return Err(ArchiveError::Unfinished { archive });
        }
        self.merge(directory, &mut || Ok(()))
    }

    pub(super) fn publish_with(self, between: Between<'_>) -> Result<Published, ArchiveError> {
        if let Some(archive) = self.index.lock().unfinished() {
            return Err(ArchiveError::Unfinished { archive });
        }
        let files = self.index.lock().files();
        let target = &self.target;
        let error = || place("create", &target.path);
        between()?;
        match rename_new(&self.temp, TREE.as_ref(), &target.parent, &target.name) {
            Ok(()) => {
                let existed = false;
                return Ok(Published { files, existed });
            }
            Err(Errno::EXIST | Errno::NOTEMPTY | Errno::XDEV) => {}
            Err(errno) => return Err(error()(errno)),
        }
        let stat = fs::statat(&target.parent, &target.name, AtFlags::SYMLINK_NOFOLLOW).map_err(error())?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Err(ArchiveError::InTheWay {
                path: target.path.clone(),
                reason: "it is not a directory",
            });
        }
        match self.options.existing {
            Existing::Replace => self.replace(between)?,
            Existing::Merge => {
                let path = &self.target.path;
                let target = open_directory(path).map_err(place("open", path))?;
                self.merge(&target, between)?;
            }
        }
        let existed = true;
        Ok(Published { files, existed })
    }

    /// Exchanges the target. What was there is removed with the staging directory.
    fn replace(&self, between: Between<'_>) -> Result<(), ArchiveError> {
        let target = &self.target;
        let (temp, parent, name) = (&self.temp, &target.parent, &target.name);
        let error = || place("replace", &target.path);
        match fs::renameat_with(temp, TREE, parent, name, RenameFlags::EXCHANGE) {
            Ok(()) => return Ok(()),
            // This file system cannot exchange: for a moment there is nothing.
            Err(errno) if is_lacking(errno) => {}
            Err(errno) => return Err(error()(errno)),
        }
        let old = temp.next_name();
        fs::renameat(parent, name, temp, &old).map_err(error())?;
        let placed = between().and_then(|()| fs::renameat(temp, TREE, parent, name).map_err(error()));
        if placed.is_err() {
            let _ = fs::renameat(temp, &old, parent, name);
        }
        placed
    }

    /// Renames file by file into the target, after a look whether that can be done. A directory that the target lacks is
    /// renamed as a whole.
    fn merge(&self, target: &OwnedFd, between: Between<'_>) -> Result<(), ArchiveError> {
        let path = &self.target.path;
        self.walk(target, &mut |_, _, _| Ok(()))?;
        self.walk(target, &mut |from, to, name| {
            between()?;
            fs::renameat(from, name, to, name).map_err(place("create", path.join(name)))
        })
    }

    /// Calls `visit` with what is to be renamed: its directory in the tree and the one in the target, and its name.
    fn walk(
        &self,
        target: &OwnedFd,
        visit: &mut dyn FnMut(&OwnedFd, &OwnedFd, &OsStr) -> Result<(), ArchiveError>,
    ) -> Result<(), ArchiveError> {
        let mut directories = vec![String::new()];
        while let Some(directory) = directories.pop() {
            let shown = |name: &OsStr| self.target.path.join(&directory).join(name);
            let error = || place("open", self.target.path.join(&directory));
            let from = descend(&self.tree, &directory).map_err(error())?;
            let to = descend(target, &directory).map_err(error())?;
            for (name, is_directory) in entries(&from).map_err(error())? {
                let there = match fs::statat(&to, &name, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(stat) => Some(FileType::from_raw_mode(stat.st_mode)),
                    Err(Errno::NOENT) => None,
                    Err(errno) => return Err(place("open", shown(&name))(errno)),
                };
                let in_the_way = |reason| ArchiveError::InTheWay {
                    path: shown(&name),
                    reason,
                };
                match (is_directory, there) {
                    (true, Some(FileType::Directory)) => directories.push(below(&directory, &name)),
                    (true, Some(FileType::Symlink)) => {
                        return Err(in_the_way("it is a symlink where a directory is to be"));
                    }
                    (true, Some(_)) => return Err(in_the_way("it is a file where a directory is to be")),
                    (false, Some(FileType::Directory)) => {
                        return Err(in_the_way("it is a directory where a file is to be"));
                    }
                    (_, None) | (false, Some(_)) => visit(&from, &to, &name)?,
                }
            }
        }
        Ok(())
    }
}

/// The path of a name in a directory of the tree, where all names are text.
fn below(directory: &str, name: &OsStr) -> String {
    let name = name.to_string_lossy();
    if directory.is_empty() {
        name.into_owned()
    } else {
        format!("{directory}/{name}")
    }
}

/// What is in a directory of the tree, and whether each is a directory.
fn entries(dir: &OwnedFd) -> rustix::io::Result<Vec<(OsString, bool)>> {
    let mut all = Vec::new();
    // The descriptor only stands for the directory.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = &patient(|| fs::openat(dir, ".", flags, Mode::empty()))?;
    for entry in patient(|| Dir::read_from(dir))? {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name == "." || name == ".." {
            continue;
        }
        let kind = match entry.file_type() {
            FileType::Unknown => {
                let stat = fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
                FileType::from_raw_mode(stat.st_mode)
            }
            kind => kind,
        };
        all.push((name.to_owned(), kind == FileType::Directory));
    }
    Ok(all)
}
