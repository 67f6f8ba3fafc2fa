//! The promises of placing, on real file systems.

mod aliases;
mod bounds;
mod checking;
mod claims;
mod coarse;
mod placing;
mod planted;
mod races;
mod streams;
mod temp_files;
mod unprivileged;
mod walking;

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

pub(crate) use self::temp_files::Mount;
use super::{item::How, *};
use crate::{
    digest::{Digest, DigestFunction},
    exec_path::ExecPath,
    output::{OutputContent, Stamp},
};

/// An exec root in an output base, with an empty `bazel-out`.
struct Fixture {
    base: Base,
    root: Arc<OutputRoot>,
    epoch: Epoch,
    placer: Placer,
    /// Whether to say of everything that is placed that nothing was there, be it so or not.
    all_new: bool,
}

/// A directory that is removed however deep it has become: left to itself, it would go by the stack.
struct Base(tempfile::TempDir);

impl std::ops::Deref for Base {
    type Target = tempfile::TempDir;

    fn deref(&self) -> &tempfile::TempDir {
        &self.0
    }
}

impl Drop for Base {
    fn drop(&mut self) {
        let _ = crate::removal::remove_all(self.0.path());
    }
}

impl Fixture {
    fn new() -> Self {
        Self::beneath(&std::env::temp_dir())
    }

    fn beneath(dir: &Path) -> Self {
        let base = Base(tempfile::tempdir_in(dir).unwrap());
        let exec_root = base.path().join("execroot/_main");
        fs::create_dir_all(exec_root.join("bazel-out")).unwrap();
        let root = Arc::new(OutputRoot::open(&exec_root, false).unwrap());
        let mut placer = Placer::new(Arc::clone(&root), PlaceOptions::default());
        // The few files of a test, too.
        placer.staged = 1;
        Self {
            base,
            epoch: Epoch::new(),
            placer,
            root,
            all_new: false,
        }
    }

    /// On disk.
    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    fn outside(&self) -> PathBuf {
        let outside = self.base.path().join("outside");
        fs::create_dir_all(&outside).unwrap();
        outside
    }

    fn place(&mut self, path: &str, bytes: &str) -> Result<Placed, PlaceError> {
        self.place_all(&[(path, bytes)]).remove(0)
    }

    fn place_all(&mut self, files: &[(&str, &str)]) -> Vec<Result<Placed, PlaceError>> {
        let files: Vec<_> = files.iter().map(|(p, b)| (exec(p), digest(b), *b)).collect();
        let is_new = self.all_new;
        let items = files.iter().map(|file| Item { is_new, ..item(file) });
        let items: Vec<_> = items.collect();
        self.placer.place_many(&items, &self.epoch, 1)
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap()
    }

    fn check(&mut self, path: &str, bytes: &str) -> Check {
        let content = OutputContent::Blob(digest(bytes));
        self.placer.check(&exec(path), &content, None).unwrap()
    }

    /// What is in the temp directory of this process.
    fn leftovers(&self) -> Vec<PathBuf> {
        let mut left = Vec::new();
        for top in [self.base.path(), self.root.path()] {
            for process in fs::read_dir(top.join(".outhaul-tmp")).into_iter().flatten() {
                left.extend(
                    fs::read_dir(process.unwrap().path())
                        .unwrap()
                        .map(|e| e.unwrap().path()),
                );
            }
        }
        left
    }
}

/// Runs a test on the disk, in memory where there is `/dev/shm`, as if there were no unnamed files, and without staging
/// and as if nothing had been anywhere.
fn everywhere(test: impl Fn(Fixture)) {
    test(Fixture::new());
    let mut unstaged = Fixture::new();
    unstaged.all_new = true;
    unstaged.placer.staged = usize::MAX;
    test(unstaged);
    if Path::new("/dev/shm").is_dir() {
        test(Fixture::beneath(Path::new("/dev/shm")));
    }
    let old = Fixture::new();
    old.root.pretend_no_unnamed();
    old.root.forget_openat2();
    test(old);
}

fn exec(path: &str) -> ExecPath {
    ExecPath::new(path).unwrap()
}

fn digest(bytes: impl AsRef<[u8]>) -> Digest {
    Digest::of(DigestFunction::Sha256, bytes.as_ref())
}

fn item<'a>((path, digest, bytes): &'a (ExecPath, Digest, &'a str)) -> Item<'a> {
    let bytes = bytes.as_bytes();
    Item {
        path,
        digest,
        bytes,
        is_new: false,
    }
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// The stamp of a file as if it had been taken long after the file was written.
fn old_stamp(path: &Path) -> Stamp {
    let stat = rustix::fs::lstat(path).unwrap();
    super::sys::stamp(&stat, i64::MAX)
}

fn is_gone<T>(result: &Result<T, PlaceError>) -> bool {
    matches!(
        result,
        Err(PlaceError {
            kind: PlaceErrorKind::RootGone(_),
            ..
        })
    )
}
