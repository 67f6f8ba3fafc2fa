//! Removing directories, however deep they are.
//!
//! The directories come from builds, or from anyone else who writes to the same trees, and may be too deep for the
//! stack of a thread or the descriptors of a process. So there is no recursion here: the names on the way down are kept
//! on the heap, and the way up is `..`, which is checked to be the directory that we came from. Two descriptors are
//! enough.

use std::{
    ffi::{OsStr, OsString},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use rustix::{
    fs::{self, AtFlags, CWD, FileType, Mode, OFlags},
    io::{self, Errno},
};

use crate::open_files::patient;

/// What becomes of files in a directory that is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Files {
    /// They are removed as well, links too, but not what those lead to.
    Remove,
    /// They keep their directory.
    Keep,
}

/// Removes what a name stands for: a file, a link (not what it leads to), or a directory with everything in it.
/// That there is nothing is not an error.
pub(crate) fn remove_tree(dir: impl AsFd, name: &OsStr) -> io::Result<()> {
    match fs::unlinkat(&dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        // Linux says ISDIR, POSIX allows PERM.
        Err(Errno::ISDIR | Errno::PERM) => remove_directory(dir.as_fd(), name, Files::Remove),
        Err(error) => Err(error),
    }
}

/// The same by path, in the place of [`std::fs::remove_dir_all`], which holds a descriptor for each level.
pub(crate) fn remove_all(path: &Path) -> std::io::Result<()> {
    Ok(remove_tree(CWD, path.as_os_str())?)
}

/// Removes a directory that holds nothing but empty directories, such as the roots of trees that Bazel makes
/// beforehand. Fails with `NOTEMPTY` at the first file; what was removed before that was empty.
pub(crate) fn remove_empty(dir: impl AsFd, name: &OsStr) -> io::Result<()> {
    match fs::unlinkat(&dir, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::NOTEMPTY | Errno::EXIST) => remove_directory(dir.as_fd(), name, Files::Keep),
        Err(error) => Err(error),
    }
}

/// A directory on the way down.
struct Level {
    name: OsString,
    device: u64,
    inode: u64,
    /// Directories in it that are still to be removed.
    below: Vec<OsString>,
}

impl Level {
    /// Reads a directory, and removes the files in it, if that is what becomes of them.
    #[allow(clippy::unnecessary_cast)]
    fn read(fd: &OwnedFd, name: OsString, files: Files) -> io::Result<Self> {
        let stat = fs::fstat(fd)?;
        // Bazel takes the right to write from directories of trees. If it cannot be given back, the first removal says so.
        if files == Files::Remove && stat.st_mode & 0o300 != 0o300 {
            let _ = fs::fchmod(fd, Mode::from_raw_mode(stat.st_mode | 0o700));
        }
        let mut below = Vec::new();
        for entry in patient(|| fs::Dir::read_from(fd))? {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let kind = match entry.file_type() {
                FileType::Unknown => match fs::statat(fd, name, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(stat) => FileType::from_raw_mode(stat.st_mode),
                    Err(Errno::NOENT) => continue,
                    Err(error) => return Err(error),
                },
                kind => kind,
            };
            match (kind, files) {
                (FileType::Directory, _) => below.push(name.to_owned()),
                (_, Files::Keep) => return Err(Errno::NOTEMPTY),
                (_, Files::Remove) => gone(fs::unlinkat(fd, name, AtFlags::empty()))?,
            }
        }
        Ok(Self {
            name,
            device: stat.st_dev as u64,
            inode: stat.st_ino as u64,
            below,
        })
    }

    #[allow(clippy::unnecessary_cast)]
    fn is(&self, fd: &OwnedFd) -> io::Result<bool> {
        let stat = fs::fstat(fd)?;
        Ok((stat.st_dev as u64, stat.st_ino as u64) == (self.device, self.inode))
    }
}

/// That something is not there any more is not an error.
fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}

fn remove_directory(dir: BorrowedFd<'_>, name: &OsStr, files: Files) -> io::Result<()> {
    const READ: OFlags = OFlags::RDONLY
        .union(OFlags::DIRECTORY)
        .union(OFlags::NOFOLLOW)
        .union(OFlags::CLOEXEC);
    const UP: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
    let mut here = patient(|| fs::openat(dir, name, READ, Mode::empty()))?;
    let mut way = vec![Level::read(&here, name.to_owned(), files)?];
    while let Some(mut level) = way.pop() {
        if let Some(below) = level.below.pop() {
            way.push(level);
            match fs::unlinkat(&here, &below, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::NOTEMPTY | Errno::EXIST) => {
                    let inner = patient(|| fs::openat(&here, &below, READ, Mode::empty()))?;
                    way.push(Level::read(&inner, below, files)?);
                    here = inner;
                }
                Err(error) => return Err(error),
            }
            continue;
        }
        let Some(above) = way.last() else {
            return gone(fs::unlinkat(dir, &level.name, AtFlags::REMOVEDIR));
        };
        let up = patient(|| fs::openat(&here, "..", UP, Mode::empty()))?;
        // Somebody has moved it: where it is now, nothing is ours to remove.
        if !above.is(&up)? {
            return Err(Errno::BUSY);
        }
        gone(fs::unlinkat(&up, &level.name, AtFlags::REMOVEDIR))?;
        here = up;
    }
    Ok(())
}

/// For tests: this many nested directories. Only the first is named by its path: the others' would be too long.
#[cfg(test)]
pub(crate) fn nest(path: &Path, depth: usize) -> io::Result<()> {
    let (mode, flags) = (Mode::from_raw_mode(0o755), OFlags::PATH | OFlags::NOFOLLOW);
    fs::mkdir(path, mode)?;
    let mut here = fs::open(path, flags, Mode::empty())?;
    for _ in 1..depth {
        fs::mkdirat(&here, "d", mode)?;
        here = fs::openat(&here, "d", flags, Mode::empty())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        fs as std_fs,
        os::unix::fs::{PermissionsExt as _, symlink},
    };

    use super::*;

    fn open(path: &Path) -> OwnedFd {
        fs::open(path, OFlags::PATH, Mode::empty()).unwrap()
    }

    #[test]
    fn removing_a_tree_does_not_follow_links() {
        let dir = tempfile::tempdir().unwrap();
        std_fs::create_dir_all(dir.path().join("tree/sub/empty")).unwrap();
        std_fs::create_dir_all(dir.path().join("tree/other/sub")).unwrap();
        std_fs::create_dir(dir.path().join("kept")).unwrap();
        std_fs::write(dir.path().join("kept/file"), "x").unwrap();
        std_fs::write(dir.path().join("tree/sub/file"), "x").unwrap();
        std_fs::write(dir.path().join("tree/other/sub/file"), "x").unwrap();
        symlink("../../kept", dir.path().join("tree/sub/link")).unwrap();
        let fd = open(dir.path());
        remove_tree(&fd, OsStr::new("tree")).unwrap();
        remove_tree(&fd, OsStr::new("tree")).unwrap();
        assert!(!dir.path().join("tree").exists());
        assert!(dir.path().join("kept/file").exists());
        symlink("kept", dir.path().join("link")).unwrap();
        remove_all(&dir.path().join("link")).unwrap();
        assert!(dir.path().join("kept/file").exists());
        remove_all(&dir.path().join("kept")).unwrap();
        assert_eq!(std_fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn directories_that_are_not_writable_are_removed() {
        let name = "removal::tests::directories_that_are_not_writable_are_removed";
        crate::unprivileged::run(name, |dir| {
            let tree = dir.join("tree");
            std_fs::create_dir_all(tree.join("sub/deep")).unwrap();
            std_fs::write(tree.join("sub/file"), "x").unwrap();
            for path in [tree.join("sub/deep"), tree.join("sub"), tree.clone()] {
                std_fs::set_permissions(path, std_fs::Permissions::from_mode(0o555)).unwrap();
            }
            remove_all(&tree).unwrap();
            assert!(!tree.exists());
        });
    }

    #[test]
    fn only_directories_without_files_are_removed_as_empty() {
        let dir = tempfile::tempdir().unwrap();
        std_fs::create_dir_all(dir.path().join("empty/a/b")).unwrap();
        std_fs::create_dir_all(dir.path().join("empty/c/d")).unwrap();
        std_fs::create_dir_all(dir.path().join("full/a")).unwrap();
        std_fs::write(dir.path().join("full/file"), "x").unwrap();
        let fd = open(dir.path());
        remove_empty(&fd, OsStr::new("empty")).unwrap();
        assert!(!dir.path().join("empty").exists());
        assert_eq!(remove_empty(&fd, OsStr::new("full")), Err(Errno::NOTEMPTY));
        assert!(dir.path().join("full/file").exists());
        assert!(dir.path().join("full/a").exists());
    }

    #[test]
    fn no_depth_is_too_much() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        // A stack that would not do for a hundredth of it.
        let worker = std::thread::Builder::new().stack_size(128 << 10).spawn(move || {
            let (fd, name) = (open(&path), OsStr::new("deep"));
            nest(&path.join(name), 8_000).unwrap();
            remove_empty(&fd, name).unwrap();
            assert!(!path.join(name).exists());
            nest(&path.join(name), 8_000).unwrap();
            remove_tree(&fd, name).unwrap();
            assert!(!path.join(name).exists());
        });
        worker.unwrap().join().unwrap();
    }
}
