//! An exec root whose `bazel-out` an output service has: a link that leads out of the root, to a tree of somebody else's.
//!
//! Nothing is ever written there, since no walk goes through such a link ([`super::walk`]). What is there is looked at, no
//! more: reading a file makes a lazy file system fetch it.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{self, Access, AtFlags, FileType, Stat},
    io::Errno,
};

use super::{
    error::{PlaceError, PlaceErrorKind},
    hash::{Check, Vouched},
    root::OutputRoot,
    sys,
};
use crate::{
    exec_path::{BUILD_TREE, ExecPath},
    output::OutputContent,
};

impl OutputRoot {
    /// Where an exec root's `bazel-out` leads, if it is a link now.
    pub fn elsewhere(&self) -> Option<PathBuf> {
        let link = || sys::read_link(self, OsStr::new(BUILD_TREE)).ok();
        self.is_exec_root.then(link).flatten()
    }

    /// Whether outputs can be read, and have the right size or are the right link, wherever links lead. Their bytes are
    /// not looked at. Answers in the order of the outputs.
    ///
    /// # Errors
    /// For all when the root is not the one that was opened. Each for itself when it is not an output's path, or cannot be
    /// looked at or read.
    pub fn look<'a>(
        &self,
        outputs: impl Iterator<Item = (&'a ExecPath, &'a OutputContent)>,
    ) -> Vec<Result<Check, PlaceError>> {
        let is_same = self.is_same();
        let look = |(path, content): (&'a ExecPath, &'a OutputContent)| {
            if !is_same {
                let kind = PlaceErrorKind::RootGone("it was deleted or replaced");
                return Err(PlaceError::new("look at", path.as_str(), kind));
            }
            self.admit(path.as_str())?;
            self.look_at(path, content)
                .map_err(|errno| PlaceError::system_error("look at", path.as_str(), errno))
        };
        outputs.map(look).collect()
    }

    fn look_at(&self, path: &ExecPath, content: &OutputContent) -> rustix::io::Result<Check> {
        let is_link = matches!(content, OutputContent::Symlink(_));
        let flags = if is_link {
            AtFlags::SYMLINK_NOFOLLOW
        } else {
            AtFlags::empty()
        };
        let taken = sys::now_ns();
        let seen = match fs::statat(self, path.as_str(), flags) {
            Ok(seen) => seen,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(Check::Absent),
            Err(errno) => return Err(errno),
        };
        if !self.is_like(path, content, &seen) {
            return Ok(Check::Differs);
        }
        if !is_link {
            fs::accessat(self, path.as_str(), Access::READ_OK, AtFlags::EACCESS)?;
        }
        Ok(Check::Present {
            stamp: sys::stamp(&seen, taken),
            how: Vouched::Size,
        })
    }

    fn is_like(&self, path: &ExecPath, content: &OutputContent, seen: &Stat) -> bool {
        let is_file_of =
            |size: u64| sys::file_type(seen) == FileType::RegularFile && seen.st_size.cast_unsigned() == size;
        match content {
            OutputContent::Blob(digest) => is_file_of(digest.size()),
            OutputContent::Inline(bytes) => is_file_of(bytes.len() as u64),
            OutputContent::Directory => sys::file_type(seen) == FileType::Directory,
            OutputContent::Symlink(target) => {
                sys::read_link(self, OsStr::new(path.as_str())).is_ok_and(|to| to == Path::new(target))
            }
        }
    }
}
