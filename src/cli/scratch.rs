//! Directories for as long as a command runs. What a killed command has left is removed by a later one.

use std::{
    fs::{DirBuilder, File},
    io::{self, Write as _},
    os::unix::{
        ffi::OsStrExt as _,
        fs::{DirBuilderExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::{FlockOperation, flock};

use super::exit::Failure;
use crate::removal::remove_all;

/// A file that is locked for as long as its command lives.
const LOCK: &str = "scratch.lock";
/// How old a directory without a command is before it is swept: one that is being made has no lock yet.
const ABANDONED: Duration = Duration::from_secs(60);

/// A directory of this process, for this user alone. It is removed when this is dropped.
pub(super) struct Scratch {
    path: PathBuf,
    /// Locked.
    lock: Option<File>,
}

impl Scratch {
    /// Makes one where temporary files belong.
    pub(super) fn temporary(prefix: &str) -> Result<Self, Failure> {
        let base = temporary();
        Self::new(&base, prefix)
            .map_err(|e| Failure::failed(format!("failed to create a directory in {}: {e}", base.display())))
    }

    /// Makes one below `base`, whose name begins with `prefix`, and removes others of that prefix whose command was killed.
    pub(super) fn new(base: &Path, prefix: &str) -> io::Result<Self> {
        let name = format!("{prefix}{}-{:08x}", std::process::id(), rand::random::<u32>());
        let made = Self::make(base.join(name))?;
        sweep(base, prefix);
        Ok(made)
    }

    fn make(path: PathBuf) -> io::Result<Self> {
        DirBuilder::new().mode(0o700).create(&path)?;
        // From here on, it goes if this fails.
        let mut made = Self { path, lock: None };
        let mut lock = File::create(made.path.join(LOCK))?;
        // Where there are no locks, nothing is swept either.
        let _ = flock(&lock, FlockOperation::NonBlockingLockExclusive);
        // A file system that is full takes names all the same, but no bytes.
        lock.write_all(&[0; 4096])?;
        made.lock = Some(lock);
        Ok(made)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed stays until the directory of temporary files is cleared.
        let _ = remove_all(&self.path);
    }
}

/// Where temporary files belong. A relative directory is none: programs of a build change theirs.
pub(super) fn temporary() -> PathBuf {
    Some(std::env::temp_dir())
        .filter(|directory| directory.is_absolute())
        .unwrap_or_else(|| "/tmp".into())
}

/// Removes directories whose command was killed.
fn sweep(base: &Path, prefix: &str) {
    let user = rustix::process::geteuid().as_raw();
    for entry in std::fs::read_dir(base).into_iter().flatten().flatten() {
        let is_ours = entry.file_name().as_bytes().starts_with(prefix.as_bytes())
            && entry.metadata().is_ok_and(|meta| {
                let age = meta.modified().ok().and_then(|at| at.elapsed().ok());
                meta.is_dir() && meta.uid() == user && age.is_some_and(|age| age > ABANDONED)
            });
        if !is_ours {
            continue;
        }
        let lock = File::open(entry.path().join(LOCK));
        if lock.is_ok_and(|lock| flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok()) {
            let _ = remove_all(&entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn directories_of_killed_commands_are_swept_and_no_others() {
        let base = tempfile::tempdir().unwrap();
        let make = |name: &str| Scratch::make(base.path().join(name)).unwrap();
        let [killed, alive, young, other] =
            ["outhaul-run-1-a", "outhaul-run-2-b", "outhaul-run-3-c", "another"].map(make);
        let directories = [&killed, &alive, &young, &other].map(|made| made.path.clone());
        let lives = [killed, young, other].map(|mut made| {
            made.lock = None;
            std::mem::ManuallyDrop::new(made)
        });
        for directory in [&directories[0], &directories[1], &directories[3]] {
            let old = SystemTime::now() - 2 * ABANDONED;
            File::open(directory).unwrap().set_modified(old).unwrap();
        }
        sweep(base.path(), "outhaul-run-");
        assert_eq!(
            directories.map(|directory| directory.exists()),
            [false, true, true, true]
        );
        drop((lives, alive));
    }
}
