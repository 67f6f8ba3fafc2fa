//! Where files and directories lie before they have their names.
//!
//! One directory for all, [`NAME`], in the output base of an exec root (so outside what the build tool looks at), or
//! in the root itself where the output base is on another device or there is none. What goes to another mount below the
//! root has one at the top of that mount. In it every process has a directory of its own and holds a lock on it: what can
//! be locked belongs to no living process, and is swept.

use std::{
    ffi::{OsStr, OsString},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::{OsStrExt as _, OsStringExt as _},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{self, AtFlags, FlockOperation, Mode, OFlags, ResolveFlags, StatxFlags},
    io::Errno,
};

use super::{
    error::PlaceError,
    root::OutputRoot,
    sys::{self, Inode},
};
use crate::{
    open_files::{Want as _, is_lacking, patient},
    removal::remove_tree,
};

/// Name of the directory that holds every process's own.
pub(super) const NAME: &str = ".outhaul-tmp";

const READ_DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// How an unnamed file gets its name on this system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unnamed {
    /// By its descriptor.
    ByDescriptor,
    /// By its name in `/proc`, for kernels before 6.10 and users without privileges.
    ByProc,
    /// There are no unnamed files here.
    Unsupported,
}

/// A process's own temp directory. Removed when dropped.
#[derive(Debug)]
pub(crate) struct TempDir {
    /// Held open with its lock.
    fd: OwnedFd,
    inode: Inode,
    base: OwnedFd,
    name: String,
    next: AtomicU64,
    unnamed: Unnamed,
}

impl TempDir {
    pub(super) fn create(root: &OutputRoot) -> Result<Self, PlaceError> {
        let error = |errno| PlaceError::system_error("make temp directory", root.path().join(NAME), errno);
        let parents = parents(root);
        let (last, others) = parents.split_last().ok_or_else(|| error(Errno::NOENT))?;
        for parent in others {
            // The output base may be on another device, read-only or not ours: then the root itself is used.
            if let Ok(temp) = Self::create_in(parent, root.device()) {
                return Ok(temp);
            }
        }
        Self::create_in(last, root.device()).map_err(error)
    }

    /// One on the mount of a directory below the root: at its top, where a sweep looks for it, or in the directory itself
    /// where that is not ours to write to.
    pub(super) fn create_beside(root: &OutputRoot, dir: BorrowedFd<'_>) -> rustix::io::Result<Self> {
        let device = sys::inode(&fs::fstat(dir)?).device;
        let top = top_of_mount(root, dir)?;
        Self::create_in(&top, device)
            .or_else(|_| Self::create_in(&sys::openat(dir, ".", ABOVE, Mode::empty())?, device))
    }

    fn create_in(parent: &OwnedFd, device: u64) -> rustix::io::Result<Self> {
        // Somebody's sweep may remove either directory between our steps, hence the rounds.
        for _ in 0..100 {
            match fs::mkdirat(parent, NAME, Mode::from_raw_mode(0o700)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno),
            }
            let base = match sys::openat(parent, NAME, READ_DIRECTORY, Mode::empty()) {
                Ok(base) => base,
                Err(Errno::NOENT) => continue,
                Err(errno) => return Err(errno),
            };
            let stat = fs::fstat(&base)?;
            if sys::inode(&stat).device != device {
                return Err(Errno::XDEV);
            }
            if stat.st_uid != rustix::process::geteuid().as_raw() {
                return Err(Errno::PERM);
            }
            let name = format!("{}-{:x}", std::process::id(), unique());
            match fs::mkdirat(&base, &*name, Mode::from_raw_mode(0o700)) {
                Ok(()) => {}
                Err(Errno::EXIST | Errno::NOENT) => continue,
                Err(errno) => {
                    // On a full disk there was room for the first of the two only.
                    let _ = fs::unlinkat(parent, NAME, AtFlags::REMOVEDIR);
                    return Err(errno);
                }
            }
            let fd = match sys::openat(&base, &*name, READ_DIRECTORY, Mode::empty()) {
                Ok(fd) => fd,
                Err(errno) if errno.is_want() => {
                    let _ = fs::unlinkat(&base, &*name, AtFlags::REMOVEDIR);
                    return Err(errno);
                }
                Err(_) => continue,
            };
            if fs::flock(&fd, FlockOperation::NonBlockingLockExclusive).is_err() {
                continue;
            }
            let inode = sys::inode(&fs::fstat(&fd)?);
            // A sweep may have locked and removed it before we could lock it.
            let is_there = sys::lstat(&base, OsStr::new(&name))?.is_some_and(|s| sys::inode(&s) == inode);
            if !is_there {
                continue;
            }
            let unnamed = probe_unnamed(&fd);
            return Ok(Self {
                fd,
                inode,
                base,
                name,
                next: AtomicU64::new(0),
                unnamed,
            });
        }
        Err(Errno::BUSY)
    }

    /// Whether nobody has removed it.
    pub(super) fn is_there(&self) -> bool {
        sys::lstat(&self.base, OsStr::new(&self.name))
            .is_ok_and(|stat| stat.is_some_and(|s| sys::inode(&s) == self.inode))
            && fs::fstat(&self.base).is_ok_and(|s| s.st_nlink > 0)
    }

    pub(super) const fn unnamed(&self) -> Unnamed {
        self.unnamed
    }

    /// As on a file system without unnamed files.
    #[cfg(test)]
    pub(super) fn pretend_no_unnamed(&mut self) {
        self.unnamed = Unnamed::Unsupported;
    }

    /// A name in this directory that nothing has had.
    pub(crate) fn next_name(&self) -> OsString {
        format!("{:x}", self.next.fetch_add(1, Ordering::Relaxed)).into()
    }
}

impl AsFd for TempDir {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        // It is empty nearly always, and then no descriptor is needed, for there may be none left. Whatever stays is swept
        // at the next start.
        if self.is_there() && fs::unlinkat(&self.base, &*self.name, AtFlags::REMOVEDIR).is_err() {
            let _ = remove_tree(&self.base, OsStr::new(&self.name));
        }
        // Only if it is empty.
        let _ = fs::unlinkat(&self.base, format!("../{NAME}"), AtFlags::REMOVEDIR);
    }
}

/// A name in a temp directory for something that is not published yet. What is still there when this is dropped
/// is removed.
#[derive(Debug)]
pub(super) struct TempName {
    pub(super) temp: Arc<TempDir>,
    pub(super) name: OsString,
    is_renamed: bool,
}

impl TempName {
    pub(super) fn new(temp: Arc<TempDir>) -> Self {
        let name = temp.next_name();
        Self {
            temp,
            name,
            is_renamed: false,
        }
    }

    /// There is nothing under this name any more.
    pub(super) fn was_renamed(&mut self) {
        self.is_renamed = true;
    }
}

impl Drop for TempName {
    fn drop(&mut self) {
        if self.is_renamed {
            return;
        }
        let _ = remove_tree(&*self.temp, &self.name);
    }
}

/// Removes what dead processes left. Returns how many had left something. What cannot be removed keeps nothing else
/// from being; the error is the first.
pub(super) fn sweep(root: &OutputRoot) -> Result<usize, PlaceError> {
    Ok(sweep_in(parents(root), root.path())? + sweep_mounts(root))
}

/// How long a sweep waits for other mounts.
const MOUNTS: Duration = Duration::from_secs(1);

/// The same at the tops of other mounts below the root. One whose file system hangs does not delay the others.
fn sweep_mounts(root: &OutputRoot) -> usize {
    let table = patient(|| std::fs::read("/proc/self/mountinfo")).unwrap_or_default();
    let below = mount_points(&table).filter_map(|point| {
        let below = point.strip_prefix(root.canonical()).ok()?;
        below.components().next().map(|_| below.to_owned())
    });
    let (send, swept) = mpsc::channel();
    for point in below {
        let (Ok(fd), path, send) = (
            patient(|| root.as_fd().try_clone_to_owned()),
            root.path().join(&point),
            send.clone(),
        ) else {
            continue;
        };
        let sweeping = move || {
            // Links on the way are not in the table.
            let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            let top = sys::openat2(&fd, &point, ABOVE, how).ok();
            let done = sweep_in(top.into_iter().collect(), &path);
            let _ = send.send(done.unwrap_or_else(|error| {
                tracing::debug!("failed to sweep temporary files: {error}");
                0
            }));
        };
        let _ = thread::Builder::new()
            .name("outhaul-sweep".into())
            .spawn(sweeping);
    }
    drop(send);
    let until = Instant::now() + MOUNTS;
    let next = || {
        swept
            .recv_timeout(until.saturating_duration_since(Instant::now()))
            .ok()
    };
    std::iter::from_fn(next).sum()
}

/// Removes one process's directory, unless the process still has it locked or it is gone.
fn sweep_one(base: &OwnedFd, name: &OsStr) -> Result<bool, Errno> {
    let fd = match sys::openat(base, name, READ_DIRECTORY, Mode::empty()) {
        Ok(fd) => fd,
        // Not a directory, so none of ours.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(false),
        Err(errno) => return Err(errno),
    };
    if fs::flock(&fd, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(false);
    }
    remove_tree(base, name).map(|()| true)
}

fn sweep_in(parents: Vec<OwnedFd>, path: &Path) -> Result<usize, PlaceError> {
    let (mut swept, mut failed) = (0, None);
    for parent in parents {
        let error = |errno| PlaceError::system_error("sweep temp directory", path.join(NAME), errno);
        let base = match sys::openat(&parent, NAME, READ_DIRECTORY, Mode::empty()) {
            Ok(base) => base,
            Err(Errno::NOENT) => continue,
            Err(errno) => return Err(error(errno)),
        };
        if fs::fstat(&base).map_err(error)?.st_uid != rustix::process::geteuid().as_raw() {
            continue;
        }
        for entry in sys::entries(&base).map_err(error)? {
            let entry = entry.map_err(error)?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            match sweep_one(&base, name) {
                Ok(is_swept) => swept += usize::from(is_swept),
                Err(errno) => failed = failed.or_else(|| Some(error(errno))),
            }
        }
        // Only when nothing is left in it.
        let _ = fs::unlinkat(&parent, NAME, AtFlags::REMOVEDIR);
    }
    failed.map_or(Ok(swept), Err)
}

/// A process's own temp directory in any directory at `path`, for files that are not outputs. What dead processes left there is
/// removed first, as far as that goes.
pub(crate) fn temp_in(parent: &OwnedFd, path: &Path) -> Result<TempDir, PlaceError> {
    let error = |errno| PlaceError::system_error("make temp directory", path.join(NAME), errno);
    let again =
        patient(|| parent.try_clone()).map_err(|e| error(Errno::from_io_error(&e).unwrap_or(Errno::IO)))?;
    if let Err(e) = sweep_in(vec![again], path) {
        tracing::debug!("failed to sweep temporary files: {e}");
    }
    let device = sys::inode(&fs::fstat(parent).map_err(error)?).device;
    TempDir::create_in(parent, device).map_err(error)
}

const ABOVE: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// What distinguishes a mount from others; the device, where the kernel is too old to say.
pub(super) fn mount(dir: BorrowedFd<'_>) -> rustix::io::Result<u64> {
    match fs::statx(dir, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID) {
        Ok(stat) if stat.stx_mask & StatxFlags::MNT_ID.bits() != 0 => Ok(stat.stx_mnt_id),
        Err(errno) if !is_lacking(errno) => Err(errno),
        _ => Ok(sys::inode(&fs::fstat(dir)?).device),
    }
}

/// The highest directory above this one on the same mount, and no higher than the root.
fn top_of_mount(root: &OutputRoot, dir: BorrowedFd<'_>) -> rustix::io::Result<OwnedFd> {
    let of = mount(dir)?;
    let limit = sys::inode(&fs::fstat(root)?);
    let mut top = sys::openat(dir, ".", ABOVE, Mode::empty())?;
    loop {
        let here = sys::inode(&fs::fstat(&top)?);
        let above = sys::openat(&top, "..", ABOVE, Mode::empty())?;
        let is_end = here == limit || here == sys::inode(&fs::fstat(&above)?) || mount(above.as_fd())? != of;
        if is_end {
            return Ok(top);
        }
        top = above;
    }
}

/// Where mounts are, by the text of `/proc/self/mountinfo`.
fn mount_points(table: &[u8]) -> impl Iterator<Item = PathBuf> {
    table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| mount_point(line.split(|byte| *byte == b' ').nth(4)?))
}

/// A path as that text spells it.
pub(crate) fn mount_point(mut escaped: &[u8]) -> Option<PathBuf> {
    let mut path = Vec::with_capacity(escaped.len());
    while let Some((byte, rest)) = escaped.split_first() {
        // Spaces and their like are octal numbers.
        let octal = rest.get(..3).filter(|_| *byte == b'\\');
        let octal = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        path.push(octal.unwrap_or(*byte));
        escaped = rest.get(if octal.is_some() { 3 } else { 0 }..)?;
    }
    Some(OsString::from_vec(path).into())
}

/// The directories that may hold [`NAME`], best first; the root itself is the last.
fn parents(root: &OutputRoot) -> Vec<OwnedFd> {
    let output_base = root.output_base().and_then(|path| {
        let flags = sys::DIRECTORY | OFlags::NOFOLLOW;
        sys::open(path, flags, Mode::empty()).ok()
    });
    let own = patient(|| root.as_fd().try_clone_to_owned()).ok();
    output_base.into_iter().chain(own).collect()
}

/// Unique among this process's temp directories, and unlikely to be one that a process of the same number left.
fn unique() -> u64 {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let now = u64::try_from(sys::now_ns()).unwrap_or(0);
    now.wrapping_add(COUNTER.fetch_add(1, Ordering::Relaxed))
}

fn probe_unnamed(dir: &OwnedFd) -> Unnamed {
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    let Ok(file) = sys::openat(dir, ".", flags, Mode::from_raw_mode(0o600)) else {
        return Unnamed::Unsupported;
    };
    let name = OsStr::new("probe");
    for way in [Unnamed::ByDescriptor, Unnamed::ByProc] {
        if link_unnamed(way, &file, dir, name).is_ok() {
            let _ = fs::unlinkat(dir, name, AtFlags::empty());
            return way;
        }
    }
    Unnamed::Unsupported
}

/// Gives an unnamed file a name in a directory. Never replaces anything.
pub(super) fn link_unnamed(
    way: Unnamed,
    file: &OwnedFd,
    dir: impl AsFd,
    name: &OsStr,
) -> rustix::io::Result<()> {
    use std::os::fd::AsRawFd as _;
    match way {
        Unnamed::ByDescriptor => fs::linkat(file, "", dir, name, AtFlags::EMPTY_PATH),
        Unnamed::ByProc => {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            fs::linkat(fs::CWD, path, dir, name, AtFlags::SYMLINK_FOLLOW)
        }
        Unnamed::Unsupported => Err(Errno::OPNOTSUPP),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_read_from_the_systems_table() {
        let table = b"22 1 8:1 / / rw - ext4 /dev/sda rw\n40 22 0:33 / /a\\040b/c\\134d rw,nosuid - tmpfs tmpfs rw\nx\n";
        let points: Vec<PathBuf> = mount_points(table).collect();
        assert_eq!(points, [PathBuf::from("/"), PathBuf::from("/a b/c\\d")]);
    }
}
