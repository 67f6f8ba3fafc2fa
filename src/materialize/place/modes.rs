//! Which modes a build's own files and directories have.
//!
//! Not a rule of ours: Bazel 4.2.3 gives every output 0555 whatever the umask, Debian's 7.7.1 what the umask of its server
//! leaves of 0444 with the owner's right to execute (0544, or 0500 with a umask of 077), and both add the right to write
//! with `--experimental_writable_outputs`. Directories have what the umask leaves of 0777. So both are read from what
//! Bazel has made itself: `bazel-out`, and the status file in it, which is an output like any other and is written by every
//! build that executes anything (measured with umasks of 002, 022, 027 and 077). What a test leaves beside its log is mostly
//! no output to them: `test.xml` and its like have what the umask leaves of 0666, whatever the flag says.

use std::{
    ffi::OsStr,
    sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
};

use rustix::{fd::AsFd, fs::FileType};

use super::{options::PlaceOptions, sys};
use crate::exec_path::ExecPath;

/// The output whose mode is that of all.
const STATUS: &str = "bazel-out/volatile-status.txt";
/// What a directory and a file have where nothing says.
const DIRECTORY: u32 = 0o755;
/// What Bazel gives at the least, when it has written something whole; before, a file has no right to execute.
const FILE_LEAST: u32 = 0o500;
const DIRECTORY_LEAST: u32 = 0o700;

/// The modes of one exec root's outputs, as far as they are known; 0 is unknown.
#[derive(Debug, Default)]
pub(super) struct Modes {
    file: AtomicU32,
    /// Whether this build has shown that; until then, what it was in the build before counts.
    is_file_new: AtomicBool,
    directory: AtomicU32,
}

impl Modes {
    /// Another build has begun, which may have other settings.
    pub(super) fn forget(&self) {
        self.is_file_new.store(false, Relaxed);
        self.directory.store(0, Relaxed);
    }

    /// Looks at what the build tool has made, unless that is known. True if files get another mode from now on.
    pub(super) fn learn(&self, root: impl AsFd) -> bool {
        if self.directory.load(Relaxed) == 0
            && let Some(mode) = mode_of(&root, crate::exec_path::BUILD_TREE, FileType::Directory)
            && mode & DIRECTORY_LEAST == DIRECTORY_LEAST
        {
            self.directory.store(mode, Relaxed);
        }
        if self.is_file_new.load(Relaxed) {
            return false;
        }
        let mode = mode_of(&root, STATUS, FileType::RegularFile);
        let Some(mode) = mode.filter(|mode| mode & FILE_LEAST == FILE_LEAST) else {
            return false;
        };
        self.is_file_new.store(true, Relaxed);
        self.file.swap(mode, Relaxed) != mode
    }

    /// A file's mode.
    pub(super) fn file(&self, path: &ExecPath, options: PlaceOptions) -> u32 {
        match self.file.load(Relaxed) {
            _ if is_left_by_a_test(path) => self.directory() & 0o666,
            0 => options.mode(),
            mode if options.writable => mode | 0o200,
            mode => mode,
        }
    }

    /// The mode of a directory that is not in a tree.
    pub(super) fn directory(&self) -> u32 {
        match self.directory.load(Relaxed) {
            0 => DIRECTORY,
            mode => mode,
        }
    }
}

/// Whether a file is one that a test leaves, and not an output of its action. To Bazel 7.7.1 `outputs.zip` is one; 4.2.3
/// names it only where a test ran, and has it on disk then.
fn is_left_by_a_test(path: &ExecPath) -> bool {
    let is_output = [
        "test.log",
        "test.cache_status",
        "outputs.zip",
        "coverage.dat",
        "baseline_coverage.dat",
    ];
    let mut parts = path.as_str().split('/').skip(2);
    // The third part; below another repository's name with --experimental_sibling_repository_layout, the fourth.
    let is_testlogs = match parts.next() {
        Some("testlogs") => true,
        Some("bin" | "genfiles" | "include") | None => false,
        Some(_) => parts.next() == Some("testlogs"),
    };
    is_testlogs && !is_output.contains(&path.file_name())
}

fn mode_of(root: &impl AsFd, path: &str, of: FileType) -> Option<u32> {
    let stat = sys::lstat(root, OsStr::new(path)).ok()??;
    // Never what everybody may change.
    (sys::file_type(&stat) == of).then_some(stat.st_mode & 0o775)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

    use super::*;
    use crate::{
        digest::{Digest, DigestFunction},
        exec_path::ExecPath,
        materialize::place::{Epoch, Item, OutputRoot, Placer},
    };

    fn set(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777
    }

    /// Directories for what is no file have the mode of Bazel's, too, if they come first.
    #[test]
    fn directories_of_links_have_the_modes_of_what_the_build_tool_made() {
        for is_link in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let out = dir.path().join("execroot/ws/bazel-out");
            fs::create_dir_all(&out).unwrap();
            set(&out, 0o700);
            let root = std::sync::Arc::new(OutputRoot::open(out.parent().unwrap(), false).unwrap());
            let mut placer = Placer::new(root, PlaceOptions::default());
            let path = ExecPath::new("bazel-out/a/b").unwrap();
            let placed = if is_link {
                placer.place_symlink(&path, "c", &Epoch::new(), 0)
            } else {
                placer.make_directory(&path, &Epoch::new(), 0)
            };
            placed.unwrap();
            assert_eq!(mode(&out.join("a")), 0o700, "{is_link}");
        }
    }

    /// What Bazels of several versions leave with several umasks: directories, files, and directories in trees.
    #[test]
    fn outputs_have_the_modes_of_what_the_build_tool_made() {
        for (directory, file, tree, writable, expected) in [
            (0o755, Some(0o555), 0o555, false, 0o555),
            (0o755, Some(0o544), 0o555, false, 0o544),
            (0o775, Some(0o564), 0o575, false, 0o564),
            (0o750, Some(0o540), 0o550, false, 0o540),
            (0o700, Some(0o500), 0o500, false, 0o500),
            (0o700, Some(0o555), 0o555, false, 0o555),
            (0o755, Some(0o744), 0o755, false, 0o744),
            (0o755, Some(0o544), 0o555, true, 0o744),
            // Nothing was executed yet, or what is there says nothing.
            (0o700, None, 0o500, false, 0o555),
            (0o700, None, 0o500, true, 0o755),
            (0o755, Some(0o000), 0o555, false, 0o555),
            // It is being written just now.
            (0o755, Some(0o644), 0o555, false, 0o555),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let out = dir.path().join("execroot/ws/bazel-out");
            let in_tree = out.join("t.d");
            fs::create_dir_all(&in_tree).unwrap();
            set(&in_tree, tree);
            set(&out, directory);
            if let Some(file) = file {
                fs::write(out.join("volatile-status.txt"), "").unwrap();
                set(&out.join("volatile-status.txt"), file);
            }
            let root = std::sync::Arc::new(OutputRoot::open(out.parent().unwrap(), false).unwrap());
            let options = PlaceOptions {
                writable,
                ..PlaceOptions::default()
            };
            let mut placer = Placer::new(root, options);
            let digest = Digest::of(DigestFunction::Sha256, b"x");
            // A large file may be the first that comes.
            let large = ExecPath::new("bazel-out/first/large").unwrap();
            let mut begun = placer.begin_large(&large, &digest).unwrap();
            begun.write(b"x").unwrap();
            begun.finish(&Epoch::new(), 0).unwrap();
            assert_eq!(mode(&out.join("first/large")), expected, "{directory:o} {file:?}");
            assert_eq!(mode(&out.join("first")), directory, "{directory:o} {file:?}");
            // A file alone, some in a directory that is filled out of sight, and the same in a tree.
            let mut names = vec!["a/b/alone".to_owned(), "t.d/sub/deep/alone".to_owned()];
            for testlogs in ["k8/testlogs/p/x", "repo~/k8/testlogs/p/x"] {
                let left = ["test.xml", "test.log", "test.outputs/outputs.zip"];
                names.extend(left.map(|name| format!("{testlogs}/{name}")));
            }
            // A package may have that name.
            names.push("k8/bin/testlogs/test.xml".to_owned());
            names.extend((0..8).flat_map(|n| [format!("many/{n}"), format!("t.d/many/{n}")]));
            let paths: Vec<_> = names
                .iter()
                .map(|name| ExecPath::new(&format!("bazel-out/{name}")).unwrap())
                .collect();
            let items: Vec<_> = paths
                .iter()
                .map(|path| Item {
                    path,
                    digest: &digest,
                    bytes: b"x",
                    is_new: true,
                })
                .collect();
            let mut sorted = items.clone();
            sorted.sort_by_key(|item| item.path.clone());
            for placed in placer.place_many(&sorted, &Epoch::new(), 0) {
                placed.unwrap();
            }
            for name in &names {
                let is_left = name.ends_with("/x/test.xml");
                let expected = if is_left { directory & 0o666 } else { expected };
                assert_eq!(mode(&out.join(name)), expected, "{name} {directory:o} {file:?}");
            }
            for (name, expected) in [
                ("a", directory),
                ("a/b", directory),
                ("many", directory),
                ("t.d", tree),
                ("t.d/sub", tree),
                ("t.d/sub/deep", tree),
                ("t.d/many", tree),
            ] {
                assert_eq!(mode(&out.join(name)), expected, "{name} {directory:o} {file:?}");
            }
        }
    }
}
