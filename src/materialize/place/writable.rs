//! Read-only directories, opened for writing and restored.
//!
//! Bazel gives the directories of tree artifacts mode 0555, and creates them early (7.x, if outputs are not
//! downloaded).
//! Anyone who is not root must give himself the right to write there and take it back afterwards.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;
use rustix::{
    fs::{self, AtFlags, Mode},
    io::{self, Errno},
};

use super::sys::{Dir, Inode, PERMISSIONS};

/// The directories of one root that are open for writing, and what they were before. Counted, so that the first
/// of several writers to finish does not lock the others out.
#[derive(Debug, Default)]
pub(super) struct WritableDirs(Mutex<HashMap<Inode, Holders>>);

#[derive(Debug)]
struct Holders {
    holders: usize,
    before: u32,
}

/// A directory that may be written into while this is held. Restored when the last one is dropped, on every path
/// out of a function.
#[derive(Debug)]
pub(super) struct Writable {
    /// What to give back; `None` when the directory was writable anyway.
    held_open: Option<(Arc<WritableDirs>, Arc<Dir>)>,
}

impl Writable {
    /// Opens a directory for writing if it is read-only to its owner. A directory that is not ours stays as it
    /// is, and the operation that wants to write there says what the system thinks of it.
    pub(super) fn open(dirs: &Arc<WritableDirs>, dir: &Arc<Dir>) -> io::Result<Self> {
        let mut held = dirs.0.lock();
        let mode = fs::fstat(&dir.fd)?.st_mode & PERMISSIONS;
        if let Some(entry) = held.get_mut(&dir.inode) {
            entry.holders += 1;
        } else if mode & 0o200 != 0 {
            return Ok(Self { held_open: None });
        } else {
            match set_mode(dir, mode | 0o200) {
                Ok(()) => {}
                Err(Errno::PERM | Errno::ROFS) => return Ok(Self { held_open: None }),
                Err(error) => return Err(error),
            }
            let entry = Holders {
                holders: 1,
                before: mode,
            };
            held.insert(dir.inode, entry);
        }
        Ok(Self {
            held_open: Some((Arc::clone(dirs), Arc::clone(dir))),
        })
    }
}

impl Writable {
    /// The mode that the directory gets back: of one that is read-only, as those of trees are.
    pub(super) fn before(&self) -> Option<u32> {
        let (dirs, dir) = self.held_open.as_ref()?;
        let held = dirs.0.lock();
        Some(held.get(&dir.inode)?.before)
    }
}

impl Drop for Writable {
    fn drop(&mut self) {
        let Some((dirs, dir)) = self.held_open.take() else {
            return;
        };
        let mut held = dirs.0.lock();
        let Some(entry) = held.get_mut(&dir.inode) else {
            return;
        };
        entry.holders -= 1;
        if entry.holders > 0 {
            return;
        }
        let before = entry.before;
        held.remove(&dir.inode);
        // Anyone who changed the mode meanwhile meant it; a directory that is gone needs nothing.
        let is_as_left = fs::fstat(&dir.fd).is_ok_and(|s| s.st_mode & PERMISSIONS == before | 0o200);
        if is_as_left && let Err(error) = set_mode(&dir, before) {
            tracing::warn!(path = %dir.path.display(), %error, "failed to make a directory read-only again");
        }
    }
}

/// `fchmod` refuses `O_PATH` descriptors; the directory's own dot does not.
fn set_mode(dir: &Dir, mode: u32) -> io::Result<()> {
    fs::chmodat(&dir.fd, ".", Mode::from_raw_mode(mode), AtFlags::empty())
}

#[cfg(test)]
mod tests {
    use std::{fs as std_fs, os::unix::fs::PermissionsExt as _, path::Path};

    use super::*;
    use crate::materialize::place::sys;

    fn open(path: &Path) -> Arc<Dir> {
        let fd = fs::open(path, sys::DIRECTORY, Mode::empty()).unwrap();
        let inode = sys::inode(&fs::fstat(&fd).unwrap());
        Arc::new(Dir {
            fd,
            inode,
            path: path.to_owned(),
            through: Box::default(),
        })
    }

    fn mode(path: &Path) -> u32 {
        std_fs::metadata(path).unwrap().permissions().mode() & PERMISSIONS
    }

    fn directory(mode: u32) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std_fs::set_permissions(dir.path(), std_fs::Permissions::from_mode(mode)).unwrap();
        dir
    }

    #[test]
    fn a_read_only_directory_is_writable_until_the_last_holder_lets_go() {
        let dir = directory(0o555);
        let dirs = Arc::new(WritableDirs::default());
        let first = Writable::open(&dirs, &open(dir.path())).unwrap();
        let second = Writable::open(&dirs, &open(dir.path())).unwrap();
        assert_eq!(mode(dir.path()), 0o755);
        drop(first);
        assert_eq!(mode(dir.path()), 0o755);
        drop(second);
        assert_eq!(mode(dir.path()), 0o555);
    }

    #[test]
    fn a_writable_directory_is_left_alone() {
        let dir = directory(0o700);
        let dirs = Arc::new(WritableDirs::default());
        drop(Writable::open(&dirs, &open(dir.path())).unwrap());
        assert_eq!(mode(dir.path()), 0o700);
    }

    #[test]
    fn a_mode_that_somebody_set_meanwhile_stays() {
        let dir = directory(0o555);
        let dirs = Arc::new(WritableDirs::default());
        let held = Writable::open(&dirs, &open(dir.path())).unwrap();
        std_fs::set_permissions(dir.path(), std_fs::Permissions::from_mode(0o770)).unwrap();
        drop(held);
        assert_eq!(mode(dir.path()), 0o770);
    }
}
