//! From a written file to its final name.

use std::{
    ffi::OsStr,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
};

use rustix::{
    fs::{self, AtFlags, FileType, Mode, OFlags, RenameFlags, Stat},
    io::{self, Errno},
};

use super::{
    epoch::{Epoch, Permit},
    error::PlaceError,
    hash,
    item::{How, Placed},
    leaning::{self, Leaning},
    options::PlaceOptions,
    root::OutputRoot,
    spot::Spot,
    sys::{self, Dir},
    temp::{self, TempName, Unnamed},
    walk,
    writable::Writable,
};
use crate::{
    digest::Digest,
    exec_path::ExecPath,
    open_files::is_lacking,
    output::{OutputContent, Stamp},
};

/// A job of placing: what the functions of a publication need to know together.
#[derive(Clone, Copy)]
pub(super) struct Job<'a> {
    pub(super) root: &'a OutputRoot,
    pub(super) options: PlaceOptions,
    pub(super) epoch: &'a Epoch,
    pub(super) version: u64,
}

impl<'a> Job<'a> {
    /// The right to change the tree now.
    pub(super) fn permit(&self, path: &ExecPath) -> Result<Permit<'a>, PlaceError> {
        self.epoch
            .permit(self.version)
            .ok_or_else(|| PlaceError::superseded(path.as_str()))
    }

    /// The mode of a file at a path.
    pub(super) fn mode(&self, path: &ExecPath) -> u32 {
        self.root.mode(path, self.options)
    }

    /// The directory for a path, made if need be. The root is checked first.
    pub(super) fn parent(&self, path: &ExecPath) -> Result<Arc<Dir>, PlaceError> {
        self.root.guard(path.as_str())?;
        let permit = self.permit(path)?;
        walk::make_dir(self.root, path.parent().unwrap_or(""), &permit)
    }
}

/// Where a file goes, and what is there.
pub(super) struct Site<'a> {
    pub(super) spot: Spot,
    pub(super) seen: Option<Stat>,
    path: &'a ExecPath,
    /// Where the link leads that is there.
    linked: Option<Spot>,
}

impl<'a> Site<'a> {
    /// Looks at a name in its directory. The caller holds the directory [`Writable`].
    pub(super) fn find(job: &Job<'_>, path: &'a ExecPath, dir: &Arc<Dir>) -> Result<Self, PlaceError> {
        let spot = Spot {
            dir: Arc::clone(dir),
            name: path.file_name().into(),
        };
        let seen = sys::lstat(&spot.dir, &spot.name)
            .map_err(|errno| PlaceError::system_error("stat", path.as_str(), errno))?;
        let is_link = seen.is_some_and(|stat| sys::file_type(&stat) == FileType::Symlink);
        // One that leads nowhere, or out, is not ours, and will be replaced like any other.
        let linked = is_link.then(|| walk::follow(job.root, path.as_str()).ok().flatten());
        Ok(Self {
            spot,
            seen,
            path,
            linked: linked.flatten(),
        })
    }

    /// The stamp of what is there, if it is the blob already. A link counts if it leads to the blob.
    pub(super) fn is_already(
        &self,
        job: &Job<'_>,
        digest: &Digest,
        buffer: &mut Vec<u8>,
    ) -> Result<Option<Stamp>, PlaceError> {
        let is_file = self
            .seen
            .is_some_and(|stat| sys::file_type(&stat) == FileType::RegularFile);
        let spot = match &self.linked {
            Some(linked) => linked,
            None if is_file => &self.spot,
            None => return Ok(None),
        };
        let wanted = hash::Wanted::Digest(digest);
        let stamp = hash::hash_file(spot, &wanted, buffer)?;
        let content = || OutputContent::Blob(digest.clone());
        Ok(stamp.filter(|stamp| hash::leans(job.root, self.path, &content, spot, stamp)))
    }

    /// Publishes a written file here. The caller has verified it and asked for a permit no earlier than it needs. A link
    /// is replaced, unless Bazel has made it to where nothing is yet.
    pub(super) fn publish(
        &self,
        job: &Job<'_>,
        digest: &Digest,
        mut file: NewFile,
    ) -> Result<Placed, PlaceError> {
        let permit = job.permit(self.path)?;
        if let Some(stamp) = self.publish_after(job, digest, &mut file, &permit) {
            let how = How::Created;
            return Ok(Placed { stamp, how });
        }
        // Another output may just have come where the link leads.
        if self.linked.is_some()
            && let Ok(Some(stamp)) = self.is_already(job, digest, &mut Vec::new())
        {
            let how = How::Kept;
            return Ok(Placed { stamp, how });
        }
        let is_through = !self.spot.dir.through.is_empty();
        let mut changing = match job.root.aliases.change(job, &self.spot, self.path) {
            Ok(changing) => changing,
            // Another output may have brought the same bytes there since this one looked.
            Err(error) => {
                let stamp = self.has_come(job, digest).ok_or(error)?;
                let how = How::Kept;
                return Ok(Placed { stamp, how });
            }
        };
        let (stamp, how) = if is_through && self.seen.is_none() {
            // What has come there meanwhile is another output's.
            file.publish_only_new(job.root, &self.spot)?
        } else {
            file.publish(job.root, &self.spot, self.seen.is_some(), &changing)?
        };
        changing.placed(self.path, Some(digest), &self.spot);
        Ok(Placed { stamp, how })
    }

    fn has_come(&self, job: &Job<'_>, digest: &Digest) -> Option<Stamp> {
        let wanted = hash::Wanted::Digest(digest);
        let stamp = hash::hash_file(&self.spot, &wanted, &mut Vec::new()).ok()??;
        let content = || OutputContent::Blob(digest.clone());
        hash::leans(job.root, self.path, &content, &self.spot, &stamp).then_some(stamp)
    }

    /// Publishes it where the link leads that is here, if nothing has that name: the link stays, as in Bazel's own
    /// downloads, where the link's target exists as well. `None` if that cannot be.
    fn publish_after(
        &self,
        job: &Job<'_>,
        digest: &Digest,
        file: &mut NewFile,
        permit: &Permit<'_>,
    ) -> Option<Stamp> {
        let is_link = |stat: Stat| sys::file_type(&stat) == FileType::Symlink;
        let is_bazels = job.root.is_exec_root && self.spot.dir.through.is_empty();
        if !is_bazels || !self.seen.is_some_and(is_link) {
            return None;
        }
        let is_free = |spot: &Spot| sys::lstat(&spot.dir, &spot.name).is_ok_and(|stat| stat.is_none());
        if self.linked.as_ref().is_some_and(|linked| !is_free(linked)) {
            return None;
        }
        let behind = walk::follow_making(job.root, self.path.as_str(), Some(permit)).ok()??;
        ExecPath::new(behind.path().to_str()?).ok()?;
        let _open = Writable::open(&job.root.writable, &behind.dir).ok()?;
        let mut changing = job.root.aliases.begin();
        // A link on the way may have made room for another output's file, before it was noted that this one leans on it.
        if !walk::still_leads(job.root, self.path, &behind) {
            return None;
        }
        settle_mode(job.root, &file.fd, file.mode).ok()?;
        file.link(job.root, &behind.dir, &behind.name).ok()?;
        changing.placed(self.path, Some(digest), &behind);
        file.stamp(job.root).ok()
    }
}

/// A file without its final name, gone when dropped.
pub(super) struct NewFile {
    fd: OwnedFd,
    /// Its name among the temp files, if it has one.
    name: Option<TempName>,
    mode: u32,
}

impl NewFile {
    /// A file with no name in the directory where it will have one, or in the temp directory where the file system
    /// has no such files.
    pub(super) fn unnamed(root: &OutputRoot, dir: &Dir, mode: u32) -> Result<Self, PlaceError> {
        match Self::unnamed_in(root.unnamed()?, dir.as_fd(), mode) {
            Ok(file) => Ok(file),
            // This file system, or this mount of it, cannot.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => Self::named(root, mode),
            Err(errno) => Err(PlaceError::system_error("create file in", &dir.path, errno)),
        }
    }

    /// A file in the temp directory, without a name if possible: a crash leaves nothing then.
    pub(super) fn in_temp(root: &OutputRoot, mode: u32) -> Result<Self, PlaceError> {
        let temp = root.temp()?;
        match Self::unnamed_in(temp.unnamed(), temp.as_fd(), mode) {
            Ok(file) => Ok(file),
            Err(_) => Self::named(root, mode),
        }
    }

    /// A file with a name in the temp directory: right for what will replace something, since only a name can be
    /// renamed.
    pub(super) fn named(root: &OutputRoot, mode: u32) -> Result<Self, PlaceError> {
        let name = TempName::new(root.temp()?);
        let fd = sys::openat(&name.temp, &name.name, create_flags(), Mode::from_raw_mode(mode))
            .map_err(|e| PlaceError::system_error("create temp file", &name.name, e))?;
        Ok(Self {
            fd,
            name: Some(name),
            mode,
        })
    }

    fn unnamed_in(way: Unnamed, dir: BorrowedFd<'_>, mode: u32) -> io::Result<Self> {
        if way == Unnamed::Unsupported {
            return Err(Errno::OPNOTSUPP);
        }
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let fd = sys::openat(dir, ".", flags, Mode::from_raw_mode(mode))?;
        Ok(Self { fd, name: None, mode })
    }

    /// Gives it another mode, if more is known of modes since it was made.
    pub(super) fn with_mode(mut self, mode: u32) -> io::Result<Self> {
        if mode != self.mode {
            fs::fchmod(&self.fd, Mode::from_raw_mode(mode))?;
            self.mode = mode;
        }
        Ok(self)
    }

    /// Gives up the right to write. A program cannot be executed while anybody has it open for writing, so big
    /// files, whose descriptors live long, do without before they get their name. Unsuccessfully is harmless.
    pub(super) fn close_for_writing(&mut self) {
        let path = format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        if let Ok(fd) = sys::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
            self.fd = fd;
        }
    }

    /// Gives the file its name and returns its stamp. `exists` says that something was seen there, so that no link
    /// is tried in vain; a directory there is removed if it holds no files.
    pub(super) fn publish(
        mut self,
        root: &OutputRoot,
        spot: &Spot,
        exists: bool,
        leaning: &Leaning,
    ) -> Result<(Stamp, How), PlaceError> {
        let error = |operation, errno| PlaceError::system_error(operation, spot.path(), errno);
        settle_mode(root, &self.fd, self.mode).map_err(|e| error("set mode of", e))?;
        let (mut exists, mut copied) = (exists, false);
        for _ in 0..100 {
            let outcome = if exists {
                self.replace(root, spot)
            } else {
                self.link(root, &spot.dir, &spot.name)
            };
            match outcome {
                Ok(()) => {
                    let how = if exists { How::Replaced } else { How::Created };
                    let stamp = self.stamp(root).map_err(|e| error("stat", e))?;
                    return Ok((stamp, how));
                }
                Err(Errno::EXIST) if !exists => exists = true,
                Err(Errno::ISDIR | Errno::NOTEMPTY | Errno::EXIST) => {
                    leaning::remove_empty(leaning, spot)?;
                }
                Err(Errno::XDEV) if !copied => {
                    copied = true;
                    self = self
                        .copied_beside(root, spot)
                        .map_err(|e| error("copy to another mount for", e))?;
                }
                Err(errno) => return Err(error("publish", errno)),
            }
        }
        Err(error("publish", Errno::BUSY))
    }

    /// Gives the file its name unless something has it, and returns its stamp.
    fn publish_only_new(mut self, root: &OutputRoot, spot: &Spot) -> Result<(Stamp, How), PlaceError> {
        settle_mode(root, &self.fd, self.mode)
            .and_then(|()| self.link(root, &spot.dir, &spot.name))
            .and_then(|()| self.stamp(root))
            .map(|stamp| (stamp, How::Created))
            .map_err(|errno| PlaceError::system_error("publish", spot.path(), errno))
    }

    /// Gives the file its name if that works at once and nothing has it. The caller holds a permit.
    pub(super) fn publish_new(mut self, root: &OutputRoot, dir: &Arc<Dir>, name: &str) -> Option<Placed> {
        settle_mode(root, &self.fd, self.mode).ok()?;
        self.link(root, dir, name.as_ref()).ok()?;
        let stamp = self.stamp(root).ok()?;
        let how = How::Created;
        Some(Placed { stamp, how })
    }

    /// Gives it the name, unless something has it.
    fn link(&mut self, root: &OutputRoot, dir: &Dir, to: &OsStr) -> io::Result<()> {
        let Some(name) = &self.name else {
            let way = root.unnamed().map_err(|_| Errno::IO)?;
            return temp::link_unnamed(way, &self.fd, dir, to);
        };
        let (from, interim) = (&name.temp, &name.name);
        match fs::renameat_with(from, interim, dir, to, RenameFlags::NOREPLACE) {
            // NFS and others have no such rename; a second link says the same.
            Err(errno) if is_lacking(errno) => {
                fs::linkat(from, interim, dir, to, AtFlags::empty())?;
                // At once, since that changes the file's stamp.
                if fs::unlinkat(from, interim, AtFlags::empty()).is_ok() {
                    self.forget_name();
                }
                Ok(())
            }
            other => other.map(|()| self.forget_name()),
        }
    }

    /// Gives it the name, whatever has it, except for a directory.
    fn replace(&mut self, root: &OutputRoot, spot: &Spot) -> io::Result<()> {
        if self.name.is_none() {
            self.name = Some(self.name_unnamed(root, spot)?);
        }
        let Some(name) = &self.name else {
            return Err(Errno::NOENT);
        };
        fs::renameat(&name.temp, &name.name, &spot.dir, &spot.name)?;
        self.forget_name();
        Ok(())
    }

    /// Gives an unnamed file an interim name, in a temp directory on its mount.
    fn name_unnamed(&self, root: &OutputRoot, spot: &Spot) -> io::Result<TempName> {
        let mut temp = root.temp().map_err(|_| Errno::IO)?;
        for _ in 0..2 {
            let name = TempName::new(Arc::clone(&temp));
            match temp::link_unnamed(temp.unnamed(), &self.fd, &name.temp, &name.name) {
                Ok(()) => return Ok(name),
                Err(Errno::XDEV) => temp = root.temp_beside(spot.dir.as_fd())?,
                Err(errno) => return Err(errno),
            }
        }
        Err(Errno::XDEV)
    }

    /// The same bytes in a file on the final name's own mount.
    fn copied_beside(self, root: &OutputRoot, spot: &Spot) -> io::Result<Self> {
        let near = TempName::new(root.temp_beside(spot.dir.as_fd())?);
        let fd = sys::openat(
            &near.temp,
            &near.name,
            create_flags(),
            Mode::from_raw_mode(self.mode),
        )?;
        let copy = Self {
            fd,
            name: Some(near),
            mode: self.mode,
        };
        let mut from = 0;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match io::pread(&self.fd, &mut buffer[..], from) {
                Ok(0) => break,
                Ok(n) => {
                    sys::write_all(&copy.fd, &buffer[..n])?;
                    from += n as u64;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        settle_mode(root, &copy.fd, copy.mode)?;
        Ok(copy)
    }

    /// It has its final name now; there is nothing to clear away.
    fn forget_name(&mut self) {
        if let Some(mut name) = self.name.take() {
            name.was_renamed();
        }
    }

    /// The stamp after publishing: both a link and a rename change the change time.
    fn stamp(&self, root: &OutputRoot) -> io::Result<Stamp> {
        // No later than the look: see `Stamp::recorded_at`.
        let taken = sys::now_ns();
        let mut stat = fs::fstat(&self.fd)?;
        // A directory's default ACL may say otherwise than the umask.
        if stat.st_mode & 0o777 != self.mode {
            root.modes_hold.store(false, Ordering::Relaxed);
            fs::fchmod(&self.fd, Mode::from_raw_mode(self.mode))?;
            stat = fs::fstat(&self.fd)?;
        }
        Ok(sys::stamp(&stat, taken))
    }
}

impl AsFd for NewFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Flags for a new file with a name.
pub(super) const fn create_flags() -> OFlags {
    OFlags::RDWR
        .union(OFlags::CREATE)
        .union(OFlags::EXCL)
        .union(OFlags::NOFOLLOW)
        .union(OFlags::CLOEXEC)
}

/// Sets the mode of a file that has no final name yet, if it did not come out as it was asked for. Once files do
/// come out right in this root, nothing is asked any more.
pub(super) fn settle_mode(root: &OutputRoot, fd: &OwnedFd, mode: u32) -> io::Result<()> {
    if root.modes_hold.load(Ordering::Relaxed) {
        return Ok(());
    }
    if fs::fstat(fd)?.st_mode & 0o777 == mode {
        root.modes_hold.store(true, Ordering::Relaxed);
        return Ok(());
    }
    fs::fchmod(fd, Mode::from_raw_mode(mode))
}
