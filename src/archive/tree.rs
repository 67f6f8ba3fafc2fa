//! Members become files, directories and links in the staging directory.
//!
//! A file is written under a name of its own beside the tree, and renamed to its place when it is whole, so that other
//! archives never see a part of it.

use std::{os::fd::OwnedFd, sync::Arc};

use rustix::{
    fs::{self, AtFlags, FileType, Mode, OFlags},
    io::Errno,
};

use super::{
    Archive, ArchiveError, OnConflict, Staging, Unpacked,
    budget::Budget,
    error::place,
    member,
    staging::{DIRECTORY, Index, Kind, Taken, rename_new, split},
};
use crate::{
    digest::{DigestFunction, Hasher},
    exec_path::ExecPath,
    open_files::patient,
    output::OutputContent,
};

const BUFFER: usize = 256 << 10;

/// The tree, as one archive sees it.
pub(super) struct Tree<'a> {
    staging: &'a Staging,
    archive: Archive<'a>,
    budget: Budget<'a>,
    done: Unpacked,
    buffer: Vec<u8>,
    /// The directory that was used last: members of one come together.
    last: Option<(String, Arc<OwnedFd>)>,
}

/// A file or link that has no place in the tree yet. Removed when dropped.
struct Interim<'a> {
    staging: &'a Staging,
    name: std::ffi::OsString,
    kind: Kind,
    is_executable: bool,
    inode: u64,
    /// What it is, if that is to be listed.
    content: Option<OutputContent>,
}

impl Drop for Interim<'_> {
    fn drop(&mut self) {
        // Nothing is there if it has its place.
        let _ = fs::unlinkat(&self.staging.temp, &self.name, AtFlags::empty());
    }
}

impl<'a> Tree<'a> {
    pub(super) fn new(staging: &'a Staging, archive: Archive<'a>) -> Self {
        staging.index.lock().begin(archive.order, archive.name);
        Self {
            staging,
            archive,
            budget: Budget::new(archive),
            done: Unpacked::default(),
            buffer: vec![0; BUFFER],
            last: None,
        }
    }

    /// The archive has come to its proper end.
    pub(super) fn finish(self) -> Unpacked {
        self.staging.index.lock().finish(self.archive.order);
        self.done
    }

    /// Counts a member that is not unpacked.
    pub(super) fn count(&mut self) -> Result<(), ArchiveError> {
        self.budget.entry()
    }

    /// Counts bytes, once `read` bytes of the archive were read.
    pub(super) fn spend(&mut self, bytes: u64, read: u64) -> Result<(), ArchiveError> {
        self.budget.bytes(bytes, read)
    }

    /// A directory. One that is there already is fine.
    pub(super) fn directory(&mut self, path: &ExecPath) -> Result<(), ArchiveError> {
        // It counts also where it exists.
        self.budget.entry()?;
        let path = self.placed(path)?;
        self.open(path.as_str())?;
        self.staging
            .index
            .lock()
            .list_also(path.as_str(), self.archive.order)?;
        self.done.directories += 1;
        Ok(())
    }

    /// A file of `size` bytes. `read` fills a buffer, and says how many bytes it has and how many of the archive were
    /// read.
    pub(super) fn file(
        &mut self,
        path: &ExecPath,
        is_executable: bool,
        size: u64,
        mut read: impl FnMut(&mut [u8]) -> Result<(usize, u64), ArchiveError>,
    ) -> Result<(), ArchiveError> {
        self.budget.entry()?;
        self.budget.fits(size)?;
        let path = &self.placed(path)?;
        let (mut interim, file) = self.create(path, is_executable)?;
        let mut hasher = self.hasher();
        let mut written: u64 = 0;
        loop {
            let (n, so_far) = read(&mut self.buffer)?;
            if n == 0 {
                break;
            }
            self.budget.bytes(n as u64, so_far)?;
            written += n as u64;
            if written > size {
                break;
            }
            if let Some(hasher) = &mut hasher {
                hasher.update(&self.buffer[..n]);
            }
            write_all(&file, &self.buffer[..n]).map_err(place("write", path.as_path()))?;
        }
        if written != size {
            let reason = format!("{path:?} has other than its {size} bytes");
            return Err(self.archive.damaged(reason));
        }
        drop(file);
        interim.content = hasher.map(|hasher| OutputContent::Blob(hasher.finish()));
        self.settle(path, &interim)?;
        self.done.files += 1;
        self.done.bytes += size;
        Ok(())
    }

    /// A copy of a file or symlink that this archive had before, which is what becomes of a hard link: no two files share an
    /// inode.
    pub(super) fn hard_link(
        &mut self,
        link: &ExecPath,
        to: &ExecPath,
        read: u64,
    ) -> Result<(), ArchiveError> {
        let (path, to) = (&self.placed(link)?, &self.placed(to)?);
        let refused = |reason| Err(self.archive.link(path.as_str(), to.as_str().as_bytes(), reason));
        let kind = self.staging.index.lock().kind_in(to.as_str(), self.archive.order);
        if !matches!(kind, Some(Kind::File | Kind::Symlink)) {
            return refused("no file of that name comes before it in the archive");
        }
        if path == to {
            return refused("it is a link to itself");
        }
        let error = || place("copy", to.as_path());
        if kind == Some(Kind::Symlink) {
            let (dir, name) = split(to);
            let dir = self.open(dir)?;
            let target = fs::readlinkat(&*dir, name, Vec::new()).map_err(error())?;
            return self.symlink(link, target.as_bytes(), read);
        }
        self.budget.entry()?;
        let (dir, name) = split(to);
        let dir = self.open(dir)?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let from = patient(|| fs::openat(&*dir, name, flags, Mode::empty())).map_err(error())?;
        let stat = fs::fstat(&from).map_err(error())?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        self.budget.bytes(size, read)?;
        let (mut interim, file) = self.create(path, stat.st_mode & 0o111 != 0)?;
        interim.content = self.staging.index.lock().content(to.as_str());
        if fs::ioctl_ficlone(&file, &from).is_err() {
            loop {
                let n = patient_read(&from, &mut self.buffer).map_err(error())?;
                if n == 0 {
                    break;
                }
                write_all(&file, &self.buffer[..n]).map_err(place("write", path.as_path()))?;
            }
        }
        drop(file);
        self.settle(path, &interim)?;
        self.done.files += 1;
        self.done.bytes += size;
        Ok(())
    }

    /// A symlink.
    pub(super) fn symlink(&mut self, path: &ExecPath, target: &[u8], read: u64) -> Result<(), ArchiveError> {
        self.budget.entry()?;
        self.budget.bytes(target.len() as u64, read)?;
        let is_any_allowed = self.staging.options.unsafe_links;
        // Of an archive with a directory of its own, it may not lead out of that.
        let target = member::target(&self.archive, path, target, is_any_allowed)?;
        let path = &self.placed(path)?;
        let mut interim = self.interim(Kind::Symlink, false);
        interim.content = Some(OutputContent::Symlink(target.to_owned()));
        fs::symlinkat(target, &self.staging.temp, &interim.name).map_err(place("create", path.as_path()))?;
        self.settle(path, &interim)?;
        self.done.links += 1;
        Ok(())
    }

    fn interim(&self, kind: Kind, is_executable: bool) -> Interim<'a> {
        Interim {
            staging: self.staging,
            name: self.staging.temp.next_name(),
            kind,
            is_executable,
            inode: 0,
            content: None,
        }
    }

    /// A member's path in the target.
    fn placed(&self, path: &ExecPath) -> Result<ExecPath, ArchiveError> {
        if self.archive.below.is_empty() {
            return Ok(path.clone());
        }
        let placed = format!("{}/{path}", self.archive.below);
        ExecPath::new(&placed).map_err(|e| ArchiveError::Name {
            archive: self.archive.name.to_owned(),
            member: path.as_str().to_owned(),
            reason: e.reason.to_owned(),
        })
    }

    fn hasher(&self) -> Option<Hasher> {
        let lists = self.staging.options.lists;
        lists.then(|| Hasher::new(DigestFunction::Sha256))
    }

    fn create(&self, path: &ExecPath, is_executable: bool) -> Result<(Interim<'a>, OwnedFd), ArchiveError> {
        let error = || place("create", path.as_path());
        let mut interim = self.interim(Kind::File, is_executable);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(if is_executable { 0o777 } else { 0o666 });
        let file = patient(|| fs::openat(&self.staging.temp, &interim.name, flags, mode)).map_err(error())?;
        if self.staging.options.lists {
            interim.inode = fs::fstat(&file).map_err(error())?.st_ino;
        }
        Ok((interim, file))
    }

    /// Opens a directory of the tree, making it and those above it where they are missing.
    fn open(&mut self, path: &str) -> Result<Arc<OwnedFd>, ArchiveError> {
        let mut from = 0;
        let mut here: Option<Arc<OwnedFd>> = None;
        if let Some((last, fd)) = &self.last {
            let rest = path.strip_prefix(last.as_str());
            if rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/')) {
                from = last.len();
                here = Some(Arc::clone(fd));
            }
        }
        while from < path.len() {
            let start = if from == 0 { 0 } else { from + 1 };
            let end = path[start..].find('/').map_or(path.len(), |at| start + at);
            let at = here.as_deref().unwrap_or(&self.staging.tree);
            let (name, so_far) = (&path[start..end], &path[..end]);
            let opened = match patient(|| fs::openat(at, name, DIRECTORY, Mode::empty())) {
                Err(Errno::NOENT) => {
                    self.budget.entry()?;
                    self.make(at, name, so_far)?;
                    patient(|| fs::openat(at, name, DIRECTORY, Mode::empty()))
                }
                opened => opened,
            };
            let fd = match opened {
                Ok(fd) => fd,
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    let reason = "its parent directory would be a file or a link";
                    return Err(self.conflict(so_far, reason, false));
                }
                Err(errno) => return Err(place("open", so_far)(errno)),
            };
            if self.staging.index.lock().get(so_far).is_none() {
                return Err(self.conflict(so_far, TWIN, false));
            }
            here = Some(Arc::new(fd));
            from = end;
        }
        let here = match here {
            Some(here) => here,
            None => Arc::new(self.staging.directory("").map_err(place("open", path))?),
        };
        if !path.is_empty() {
            self.last = Some((path.to_owned(), Arc::clone(&here)));
        }
        Ok(here)
    }

    fn make(&self, at: &OwnedFd, name: &str, path: &str) -> Result<(), ArchiveError> {
        let mut index = self.staging.index.lock();
        let mode = Mode::from_raw_mode(0o777);
        match fs::mkdirat(at, name, mode) {
            Ok(()) => {}
            // Another archive was faster.
            Err(Errno::EXIST) => return Ok(()),
            Err(errno) => return Err(place("create", path)(errno)),
        }
        let taken = Taken {
            kind: Kind::Directory,
            order: self.archive.order,
        };
        index.take(path, taken);
        self.list(&mut index, path, OutputContent::Directory, 0)
    }

    /// Lists a path, if that is asked for.
    fn list(
        &self,
        index: &mut Index,
        path: &str,
        content: OutputContent,
        inode: u64,
    ) -> Result<(), ArchiveError> {
        if self.staging.options.lists {
            index.list(path, content, self.archive.order, inode)?;
        }
        Ok(())
    }

    /// Gives a whole file or link its place.
    fn settle(&mut self, path: &ExecPath, interim: &Interim<'_>) -> Result<(), ArchiveError> {
        let (dir, name) = split(path);
        let dir = self.open(dir)?;
        let order = self.archive.order;
        let kind = interim.kind;
        let error = || place("create", path.as_path());
        let mut index = self.staging.index.lock();
        let Some(there) = index.get(path.as_str()) else {
            return match rename_new(&self.staging.temp, &interim.name, &dir, name.as_ref()) {
                Ok(()) => {
                    index.take(path.as_str(), Taken { kind, order });
                    self.list_interim(&mut index, path.as_str(), interim)
                }
                Err(Errno::EXIST) => {
                    drop(index);
                    Err(self.conflict(path.as_str(), TWIN, false))
                }
                Err(errno) => Err(error()(errno)),
            };
        };
        if there.kind == Kind::Directory {
            drop(index);
            return Err(self.conflict(
                path.as_str(),
                "it is a directory in one and not in the other",
                false,
            ));
        }
        if self.staging.options.on_conflict == OnConflict::Last {
            if order >= there.order {
                fs::renameat(&self.staging.temp, &interim.name, &*dir, name).map_err(error())?;
                index.take(path.as_str(), Taken { kind, order });
                self.list_interim(&mut index, path.as_str(), interim)?;
            }
            return Ok(());
        }
        // From now on, what is there stays.
        drop(index);
        if there.kind != kind {
            return Err(self.conflict(path.as_str(), "it is a file in one and a link in the other", true));
        }
        if !is_same(interim, &dir, name).map_err(error())? {
            return Err(self.conflict(path.as_str(), "they have different content", true));
        }
        let mut index = self.staging.index.lock();
        index.share(path.as_str(), order);
        index.list_also(path.as_str(), order)
    }

    fn list_interim(&self, index: &mut Index, path: &str, interim: &Interim<'_>) -> Result<(), ArchiveError> {
        match interim.content.clone() {
            Some(content) => self.list(index, path, content, interim.inode),
            None => Ok(()),
        }
    }

    fn conflict(&self, path: &str, reason: &'static str, is_optional: bool) -> ArchiveError {
        let index = self.staging.index.lock();
        let first = index.get(path).map_or(self.archive.order, |taken| taken.order);
        ArchiveError::Conflict {
            path: path.to_owned(),
            first: index.name(first),
            second: self.archive.name.to_owned(),
            reason,
            on_conflict: is_optional.then_some(self.staging.options.on_conflict),
        }
    }
}

/// Two names are one on file systems that fold case.
const TWIN: &str = "the file system takes its name for that of another member";

/// Whether a file or link has the content of one that is there. If only the new one is executable, that one becomes so.
fn is_same(interim: &Interim<'_>, dir: &OwnedFd, name: &str) -> rustix::io::Result<bool> {
    let temp = &interim.staging.temp;
    if interim.kind == Kind::Symlink {
        let new = fs::readlinkat(temp, &interim.name, Vec::new())?;
        return Ok(new == fs::readlinkat(dir, name, Vec::new())?);
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let new = patient(|| fs::openat(temp, &interim.name, flags, Mode::empty()))?;
    let old = patient(|| fs::openat(dir, name, flags, Mode::empty()))?;
    let (new_stat, old_stat) = (fs::fstat(&new)?, fs::fstat(&old)?);
    if FileType::from_raw_mode(old_stat.st_mode) != FileType::RegularFile
        || new_stat.st_size != old_stat.st_size
    {
        return Ok(false);
    }
    let (mut a, mut b) = (vec![0; 64 << 10], vec![0; 64 << 10]);
    loop {
        let (n, m) = (fill(&new, &mut a)?, fill(&old, &mut b)?);
        if a[..n] != b[..m] {
            return Ok(false);
        }
        if n == 0 {
            break;
        }
    }
    if interim.is_executable {
        // Anyone who may read it may execute it.
        let mode = fs::fstat(&old)?.st_mode;
        fs::fchmod(&old, Mode::from_raw_mode(mode | (mode & 0o444) >> 2))?;
    }
    Ok(true)
}

/// Reads until the buffer is full, or to the end.
fn fill(file: &OwnedFd, buffer: &mut [u8]) -> rustix::io::Result<usize> {
    let mut read = 0;
    while read < buffer.len() {
        match patient_read(file, &mut buffer[read..])? {
            0 => break,
            n => read += n,
        }
    }
    Ok(read)
}

fn patient_read(file: &OwnedFd, buffer: &mut [u8]) -> rustix::io::Result<usize> {
    rustix::io::retry_on_intr(|| rustix::io::read(file, &mut *buffer))
}

fn write_all(file: &OwnedFd, mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::retry_on_intr(|| rustix::io::write(file, bytes))? {
            0 => return Err(Errno::IO),
            n => bytes = &bytes[n..],
        }
    }
    Ok(())
}
