//! Symlinks and directories.

use std::{os::fd::AsFd as _, path::Path, sync::Arc};

use rustix::{
    fs::{self, FileType},
    io::Errno,
};

use super::{
    epoch::Epoch,
    error::PlaceError,
    item::{How, Placed},
    leaning,
    placer::Placer,
    publish::Job,
    spot::Spot,
    sys,
    temp::TempName,
    walk,
    writable::Writable,
};
use crate::{exec_path::ExecPath, output::OutputContent};

impl Placer {
    /// Makes a symlink with this target, as it is: nothing is ever written through it. What is in its place is
    /// replaced, a directory only if it holds no files.
    ///
    /// # Errors
    /// As for [`place_many`](Self::place_many).
    pub(crate) fn place_symlink(
        &mut self,
        path: &ExecPath,
        target: &str,
        epoch: &Epoch,
        version: u64,
    ) -> Result<Placed, PlaceError> {
        let _working = epoch.working();
        self.root.learn_modes();
        let job = self.job(epoch, version);
        let dir = job.parent(path)?;
        let spot = Spot {
            dir,
            name: path.file_name().into(),
        };
        let error = |errno| PlaceError::system_error("make symlink", path.as_str(), errno);
        let _permit = job.permit(path)?;
        let _open = Writable::open(&job.root.writable, &spot.dir).map_err(error)?;
        let is_it = || sys::read_link(&spot.dir, &spot.name).is_ok_and(|t| t == Path::new(target));
        if !spot.dir.through.is_empty() && is_it() {
            return placed(&spot, How::Kept).map_err(error);
        }
        let mut how = How::Created;
        for _ in 0..100 {
            let mut changing = job.root.aliases.change(&job, &spot, path)?;
            match fs::symlinkat(target, &spot.dir, &spot.name) {
                Ok(()) => {
                    changing.placed(path, None, &spot);
                    return placed(&spot, how).map_err(error);
                }
                // It came there meanwhile; the next round says whose it is.
                Err(Errno::EXIST) if !spot.dir.through.is_empty() && how == How::Created => {
                    how = How::Replaced;
                    continue;
                }
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(error(errno)),
            }
            if is_it() {
                return placed(&spot, How::Kept).map_err(error);
            }
            how = How::Replaced;
            match replace_by_symlink(&job, &spot, target)? {
                Ok(()) => return placed(&spot, how).map_err(error),
                Err(Errno::ISDIR | Errno::NOTEMPTY | Errno::EXIST) => {
                    leaning::remove_empty(&changing, &spot)?;
                }
                Err(errno) => return Err(error(errno)),
            }
        }
        Err(error(Errno::BUSY))
    }

    /// Makes a directory and its parents. A file in its place is replaced; a symlink is followed in an exec root, and
    /// replaced elsewhere.
    ///
    /// # Errors
    /// As for [`place_many`](Self::place_many).
    pub(crate) fn make_directory(
        &mut self,
        path: &ExecPath,
        epoch: &Epoch,
        version: u64,
    ) -> Result<Placed, PlaceError> {
        let _working = epoch.working();
        self.root.learn_modes();
        let job = self.job(epoch, version);
        job.root.guard(path.as_str())?;
        let permit = job.permit(path)?;
        let is_there = walk::find_dir(job.root, path.as_str()).is_ok_and(|dir| dir.is_some());
        let dir = walk::make_dir(job.root, path.as_str(), &permit)?;
        let spot = Spot {
            dir: Arc::clone(&dir),
            name: ".".into(),
        };
        let leads_there = || {
            let now = walk::find_dir(job.root, path.as_str());
            now.is_ok_and(|now| now.is_some_and(|now| now.is_as(&dir)))
        };
        let content = OutputContent::Directory;
        if !job.root.aliases.found(path, &content, &spot, leads_there) && !dir.through.is_empty() {
            return Err(leaning::turned("make directory", path));
        }
        let stat =
            fs::fstat(&dir.fd).map_err(|errno| PlaceError::system_error("stat", path.as_str(), errno))?;
        Ok(Placed {
            stamp: sys::stamp(&stat, sys::now_ns()),
            how: if is_there { How::Kept } else { How::Created },
        })
    }
}

/// Renames a new symlink over whatever file or link has its name. The outer error is the temp directory's.
fn replace_by_symlink(
    job: &Job<'_>,
    spot: &Spot,
    target: &str,
) -> Result<rustix::io::Result<()>, PlaceError> {
    let mut name = TempName::new(job.root.temp()?);
    let renamed = fs::symlinkat(target, &name.temp, &name.name)
        .and_then(|()| fs::renameat(&name.temp, &name.name, &spot.dir, &spot.name));
    match renamed {
        Ok(()) => name.was_renamed(),
        // The directory is on another mount: the link is made there.
        Err(Errno::XDEV) => {
            return Ok(job.root.temp_beside(spot.dir.as_fd()).and_then(|temp| {
                let mut near = TempName::new(temp);
                fs::symlinkat(target, &near.temp, &near.name)?;
                fs::renameat(&near.temp, &near.name, &spot.dir, &spot.name)?;
                near.was_renamed();
                Ok(())
            }));
        }
        Err(_) => {}
    }
    Ok(renamed)
}

/// The answer for a symlink that has just been made or seen.
fn placed(spot: &Spot, how: How) -> rustix::io::Result<Placed> {
    let seen = sys::lstat(&spot.dir, &spot.name)?
        .filter(|stat| sys::file_type(stat) == FileType::Symlink)
        .ok_or(Errno::NOENT)?;
    let stamp = sys::stamp(&seen, sys::now_ns());
    Ok(Placed { stamp, how })
}
