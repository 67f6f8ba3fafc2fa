//! Is it already there?

use std::{path::Path, sync::Arc};

use rustix::fs::{self, AtFlags, FileType, OFlags, Stat};

use super::{
    dirs::DirCache,
    error::{PlaceError, PlaceErrorKind},
    hash::{Check, Vouched, Wanted, hash_file, hash_opened, leans},
    placer::Placer,
    spot::Spot,
    sys::{self, Dir},
    walk,
};
use crate::{
    exec_path::ExecPath,
    output::{OutputContent, Stamp},
};

type Found = Result<Option<Arc<Dir>>, PlaceError>;

impl Placer {
    /// Whether the content is at the path. `recorded` is the stamp that was recorded when *this* content was seen
    /// there last; while it vouches for the file, nothing is read.
    ///
    /// # Errors
    /// When the root is not the one that was opened, a symlink on the way leads out of it, or the system fails.
    pub fn check(
        &mut self,
        path: &ExecPath,
        content: &OutputContent,
        recorded: Option<&Stamp>,
    ) -> Result<Check, PlaceError> {
        let dir = self.dirs.get(&self.root, path.parent().unwrap_or(""));
        self.check_in(&dir, sys::now_ns(), path, content, recorded)
    }

    /// Checks many at once, and answers in their order. Neighbours of one directory are looked up in it together; when
    /// it is not there, neither are they.
    ///
    /// # Errors
    /// Each for itself, as for [`check`](Self::check).
    pub(crate) fn check_many<'a>(
        &mut self,
        items: impl ExactSizeIterator<Item = (&'a ExecPath, &'a OutputContent, Option<&'a Stamp>)>,
    ) -> Vec<Result<Check, PlaceError>> {
        let mut results = Vec::with_capacity(items.len());
        let mut last: Option<(&str, Found, i64)> = None;
        for (path, content, recorded) in items {
            let parent = path.parent().unwrap_or("");
            // Anyone who looked away for long, to read a file, looks the directory up again.
            let (dir, taken) = match last.take().filter(|(of, ..)| *of == parent) {
                Some((_, dir, taken)) => (dir, taken),
                // A stamp may count as taken earlier than it was, but not later.
                None => (self.dirs.get(&self.root, parent), sys::now_ns()),
            };
            let result = self.check_in(&dir, taken, path, content, recorded);
            let has_read = matches!(
                &result,
                Ok(Check::Present {
                    how: Vouched::Content,
                    ..
                } | Check::Differs)
            );
            if !has_read {
                last = Some((parent, dir, taken));
            }
            results.push(result);
        }
        results
    }

    /// Checks a name in its directory, looked up no earlier than `taken`.
    fn check_in(
        &mut self,
        dir: &Found,
        taken: i64,
        path: &ExecPath,
        content: &OutputContent,
        recorded: Option<&Stamp>,
    ) -> Result<Check, PlaceError> {
        let error = |errno| PlaceError::system_error("check", path.as_str(), errno);
        self.root.admit(path.as_str())?;
        let dir = match dir {
            Ok(Some(dir)) => dir,
            Ok(None) => return Ok(Check::Absent),
            // A file lies where a directory on the way should be.
            Err(e) if matches!(e.kind, PlaceErrorKind::Conflict(_)) => return Ok(Check::Differs),
            Err(e) => {
                let path = path.as_path().to_owned();
                return Err(PlaceError { path, ..e.clone() });
            }
        };
        let Some(seen) = sys::lstat(dir, path.file_name().as_ref()).map_err(error)? else {
            return Ok(Check::Absent);
        };
        // What nearly every file of a build that changes nothing comes to.
        if let Some(wanted) = Wanted::of(content)
            && dir.through.is_empty()
            && sys::file_type(&seen) == FileType::RegularFile
            && let Some(settled) = wanted.at_first_sight(&seen, taken, recorded)
        {
            return Ok(settled);
        }
        self.check_seen(dir, seen, taken, path, content, recorded)
    }

    /// Looks closer at what a first look could not settle.
    fn check_seen(
        &mut self,
        dir: &Arc<Dir>,
        mut seen: Stat,
        taken: i64,
        path: &ExecPath,
        content: &OutputContent,
        recorded: Option<&Stamp>,
    ) -> Result<Check, PlaceError> {
        let error = |errno| PlaceError::system_error("check", path.as_str(), errno);
        let mut spot = Spot {
            dir: Arc::clone(dir),
            name: path.file_name().into(),
        };
        let link = match content {
            OutputContent::Symlink(target) => Some(Path::new(target)),
            _ => None,
        };
        if sys::file_type(&seen) == FileType::Symlink && link.is_none() {
            if !self.root.is_exec_root {
                return Ok(Check::Differs);
            }
            match walk::follow(&self.root, path.as_str()) {
                Ok(Some(found)) => spot = found,
                Ok(None) => return Ok(Check::Absent),
                Err(e)
                    if matches!(
                        e.kind,
                        PlaceErrorKind::Escapes { .. } | PlaceErrorKind::Conflict(_)
                    ) =>
                {
                    return self.check_outside(&spot, content, recorded);
                }
                Err(e) => return Err(e),
            }
            match sys::lstat(&spot.dir, &spot.name).map_err(error)? {
                Some(found) => seen = found,
                None => return Ok(Check::Absent),
            }
        }
        let check = match Wanted::of(content) {
            None if link.is_some() => {
                let is_it = sys::file_type(&seen) == FileType::Symlink
                    && sys::read_link(&spot.dir, &spot.name).is_ok_and(|t| Some(&*t) == link);
                present_if(is_it, &seen, taken)
            }
            None => {
                let is_it = sys::file_type(&seen) == FileType::Directory;
                present_if(is_it, &seen, taken)
            }
            Some(wanted) => match wanted.at_first_sight(&seen, taken, recorded) {
                Some(settled) => settled,
                None => {
                    let how = Vouched::Content;
                    hash_file(&spot, &wanted, &mut self.buffer)?
                        .map_or(Check::Differs, |stamp| Check::Present { stamp, how })
                }
            },
        };
        Ok(match check {
            Check::Present { stamp, .. } if !leans(&self.root, path, &|| content.clone(), &spot, &stamp) => {
                Check::Differs
            }
            check => check,
        })
    }

    /// Looks through a symlink that leads out of the root. Nothing is ever written through one, but Bazel makes some
    /// itself: the executable of an `sh_test` is a link into the workspace, whose content no cache has to have.
    fn check_outside(
        &mut self,
        spot: &Spot,
        content: &OutputContent,
        recorded: Option<&Stamp>,
    ) -> Result<Check, PlaceError> {
        let Some(wanted) = Wanted::of(content) else {
            return Ok(Check::Differs);
        };
        let taken = sys::now_ns();
        let Ok(seen) = fs::statat(&spot.dir, &spot.name, AtFlags::empty()) else {
            // Dangling, or closed to us: in any case not the content.
            return Ok(Check::Differs);
        };
        // By a way around, such as the workspace's own links, to an output that may be another's.
        let real = self.root.path().join(spot.path()).canonicalize();
        if real.is_ok_and(|real| {
            self.root
                .below(&real)
                .is_some_and(|real| self.root.may_end_in(real))
        }) {
            return Ok(Check::Differs);
        }
        if let Some(settled) = wanted.at_first_sight(&seen, taken, recorded) {
            return Ok(settled);
        }
        let how = Vouched::Content;
        Ok(hash_opened(spot, OFlags::empty(), &wanted, &mut self.buffer)?
            .map_or(Check::Differs, |stamp| Check::Present { stamp, how }))
    }

    /// Forgets the directories that are kept open for checks.
    pub(crate) fn close_directories(&mut self) {
        self.dirs = DirCache::default();
    }
}

fn present_if(is_it: bool, seen: &Stat, taken: i64) -> Check {
    if is_it {
        let (stamp, how) = (sys::stamp(seen, taken), Vouched::Content);
        Check::Present { stamp, how }
    } else {
        Check::Differs
    }
}
