//! New directories, filled out of sight and renamed whole.
//!
//! One rename for a whole directory costs a file three system calls and a stat, where a link of its own would make it
//! a third more expensive; and the directory is never visible while it is half full.

use std::{
    ffi::OsStr,
    os::fd::{AsFd as _, OwnedFd},
};

use rustix::{
    fs::{self, AtFlags, Mode, RenameFlags},
    io::{self, Errno},
};

use super::{
    error::PlaceError,
    item::{How, Item, Placed},
    publish::{Job, create_flags, settle_mode},
    spot::Spot,
    sys,
    temp::TempName,
    walk::settle_dir_mode,
    writable::Writable,
};
use crate::{open_files::is_lacking, output::Stamp};

/// Places the items without an answer in a new directory, and answers them. When somebody else makes the directory
/// meanwhile, or it cannot be made in this way at all, they stay without an answer, to be placed one by one.
pub(super) fn fill(
    job: &Job<'_>,
    spot: &Spot,
    items: &[Item<'_>],
    answers: &mut [Option<Result<Placed, PlaceError>>],
) {
    let Ok(staging) = Staging::new(job) else { return };
    let mut staged = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        if answers.get(index).is_some_and(Option::is_some) {
            continue;
        }
        match staging.write(job, item) {
            Ok(stamp) => staged.push((index, Ok(stamp))),
            // The same path twice: the second one is for the live directory.
            Err(Errno::EXIST) => {}
            Err(errno) => {
                let error = PlaceError::system_error("write", item.path.as_str(), errno);
                staged.push((index, Err(error)));
            }
        }
    }
    // Only failures: no reason to make a directory.
    if staged.iter().any(|(_, outcome)| outcome.is_ok()) {
        let Some(permit) = job.epoch.permit(job.version) else {
            for (answer, item) in answers.iter_mut().zip(items).filter(|(a, _)| a.is_none()) {
                *answer = Some(Err(PlaceError::superseded(item.path.as_str())));
            }
            return;
        };
        if staging.publish(job, spot).is_err() {
            return;
        }
        drop(permit);
    }
    let how = How::Created;
    for (index, outcome) in staged {
        if let Some(answer) = answers.get_mut(index) {
            *answer = Some(outcome.map(|stamp| Placed { stamp, how }));
        }
    }
}

/// A directory among the temp files. What is left of it when this is dropped is removed.
struct Staging {
    name: TempName,
    fd: OwnedFd,
}

impl Staging {
    fn new(job: &Job<'_>) -> Result<Self, PlaceError> {
        let name = TempName::new(job.root.temp()?);
        let error = |errno| PlaceError::system_error("make staging directory", &name.name, errno);
        let mode = job.root.modes.directory();
        fs::mkdirat(&name.temp, &name.name, Mode::from_raw_mode(mode)).map_err(error)?;
        settle_dir_mode(name.temp.as_fd(), &name.name, mode).map_err(error)?;
        let fd = sys::openat(&name.temp, &name.name, sys::DIRECTORY, Mode::empty()).map_err(error)?;
        Ok(Self { name, fd })
    }

    /// Writes one file. A file that could not be written whole is not left for the rename to publish.
    fn write(&self, job: &Job<'_>, item: &Item<'_>) -> io::Result<Stamp> {
        let mode = job.mode(item.path);
        let name = OsStr::new(item.path.file_name());
        let fd = sys::openat(&self.fd, name, create_flags(), Mode::from_raw_mode(mode))?;
        let taken = sys::now_ns();
        let written = sys::write_all(&fd, item.bytes)
            .and_then(|()| settle_mode(job.root, &fd, mode))
            .and_then(|()| fs::fstat(&fd));
        match written {
            // The directory's rename does not touch the file, so this is the stamp of the published one as well.
            Ok(stat) => Ok(sys::stamp(&stat, taken)),
            Err(errno) => {
                fs::unlinkat(&self.fd, name, AtFlags::empty())?;
                Err(errno)
            }
        }
    }

    /// Gives the directory its final name, if nothing has it.
    fn publish(mut self, job: &Job<'_>, spot: &Spot) -> io::Result<()> {
        let open = Writable::open(&job.root.writable, &spot.dir)?;
        let (from, name) = (self.name.temp.as_fd(), &self.name.name);
        match fs::renameat_with(from, name, &spot.dir, &spot.name, RenameFlags::NOREPLACE) {
            // A plain rename replaces a directory only when that is empty, which is as good.
            Err(errno) if is_lacking(errno) => {
                fs::renameat(from, name, &spot.dir, &spot.name)?;
            }
            other => other?,
        }
        self.name.was_renamed();
        // In a tree, all directories are as its root is.
        if let Some(mode) = open.before() {
            fs::chmodat(&self.fd, ".", Mode::from_raw_mode(mode), AtFlags::empty())?;
        }
        Ok(())
    }
}
