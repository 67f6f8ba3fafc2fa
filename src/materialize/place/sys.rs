//! Stamps, and small pieces around system calls that more than one file here needs.

use std::{
    ffi::OsStr,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{self, AtFlags, Dir as Entries, FileType, Mode, OFlags, ResolveFlags, Stat},
    io::{self, Errno},
    path::Arg,
};

pub(super) use crate::units::now_ns;
use crate::{open_files::patient, output::Stamp};

/// Flags for a descriptor that only stands for a directory.
pub(super) const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Permissions in a mode, without the file's type.
pub(super) const PERMISSIONS: u32 = 0o7777;

/// A file's identity while it exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Inode {
    pub(super) device: u64,
    pub(super) number: u64,
}

/// An open directory. The descriptor is `O_PATH`: good for `*at` calls and nothing else.
#[derive(Debug)]
pub(super) struct Dir {
    pub(super) fd: OwnedFd,
    pub(super) inode: Inode,
    /// Below the root, links resolved.
    pub(super) path: PathBuf,
    /// The links that led here, below the root; none nearly always.
    pub(super) through: Box<[PathBuf]>,
}

impl Dir {
    /// Whether another is the same directory, reached by the same links.
    pub(super) fn is_as(&self, other: &Self) -> bool {
        self.inode == other.inode && self.through == other.through
    }
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// `open`, patient where there are no descriptors: see [`patient`]. All opening here goes through this or the next three.
pub(super) fn open(path: impl Arg + Copy, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
    patient(|| fs::open(path, flags, mode))
}

/// The same with `openat`.
pub(super) fn openat(
    dir: impl AsFd,
    path: impl Arg + Copy,
    flags: OFlags,
    mode: Mode,
) -> io::Result<OwnedFd> {
    patient(|| fs::openat(&dir, path, flags, mode))
}

/// The same with `openat2`.
pub(super) fn openat2(
    dir: impl AsFd,
    path: impl Arg + Copy,
    flags: OFlags,
    resolve: ResolveFlags,
) -> io::Result<OwnedFd> {
    patient(|| fs::openat2(&dir, path, flags, Mode::empty(), resolve))
}

/// A directory's entries, by a descriptor of its own.
pub(super) fn entries(dir: impl AsFd) -> io::Result<Entries> {
    patient(|| Entries::read_from(&dir))
}

/// The stamp in what `stat` said, taken at `taken_ns`.
// The fields' types differ between architectures.
#[allow(clippy::unnecessary_cast)]
pub(super) fn stamp(stat: &Stat, taken_ns: i64) -> Stamp {
    let ns = |seconds: i64, nanoseconds: u64| {
        seconds
            .saturating_mul(1_000_000_000)
            .saturating_add(i64::try_from(nanoseconds).unwrap_or(0))
    };
    Stamp {
        size: u64::try_from(stat.st_size).unwrap_or(0),
        mtime_ns: ns(stat.st_mtime as i64, stat.st_mtime_nsec as u64),
        ctime_ns: ns(stat.st_ctime as i64, stat.st_ctime_nsec as u64),
        inode: stat.st_ino as u64,
        device: stat.st_dev as u64,
        taken_ns,
    }
}

/// Whether two stamps are of the same unchanged file, whenever they were taken.
pub(super) fn is_same_file(a: &Stamp, b: &Stamp) -> bool {
    Stamp { taken_ns: 0, ..*a } == Stamp { taken_ns: 0, ..*b }
}

#[allow(clippy::unnecessary_cast)]
pub(super) fn inode(stat: &Stat) -> Inode {
    Inode {
        device: stat.st_dev as u64,
        number: stat.st_ino as u64,
    }
}

pub(super) fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// `lstat` of a name in a directory; `None` when there is nothing.
pub(super) fn lstat(dir: impl AsFd, name: &OsStr) -> io::Result<Option<Stat>> {
    match fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A symlink's target.
pub(super) fn read_link(dir: impl AsFd, name: &OsStr) -> io::Result<PathBuf> {
    let target = fs::readlinkat(dir, name, Vec::new())?;
    Ok(Path::new(OsStr::from_bytes(target.as_bytes())).to_owned())
}

/// Writes all bytes at the descriptor's position.
pub(super) fn write_all(fd: impl AsFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match io::write(&fd, bytes) {
            Ok(0) => return Err(Errno::IO),
            Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The magic number of tmpfs in `statfs`, from the kernel's `linux/magic.h`.
const TMPFS: u64 = 0x0102_1994;

/// How many bytes are free on a descriptor's file system, if that is a tmpfs.
#[allow(clippy::unnecessary_cast)]
pub(super) fn free_on_tmpfs(fd: impl AsFd) -> io::Result<Option<u64>> {
    let stat = fs::fstatfs(fd)?;
    if stat.f_type as u64 != TMPFS {
        return Ok(None);
    }
    // One without a limit says that it has no blocks at all.
    Ok(Some(if stat.f_blocks == 0 {
        u64::MAX
    } else {
        (stat.f_bavail as u64).saturating_mul(stat.f_bsize as u64)
    }))
}

/// Reads from the descriptor's position to the end, in pieces of at most `buffer`.
pub(super) fn read_pieces(
    fd: impl AsFd,
    buffer: &mut [u8],
    mut take: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    loop {
        match io::read(&fd, &mut *buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => take(buffer.get(..n).unwrap_or_default())?,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}
