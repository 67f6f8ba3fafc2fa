//! Looks at what lies beside the programs of a build: manifests of runfiles, and whether what they name is there.
//!
//! Nothing is written. Links are followed wherever they lead: they only decide what is asked for, and that is placed
//! with all care.

use std::{
    fs::File,
    io::{self, Read as _},
};

use rustix::{
    fs::{self, AtFlags, Dir, FileType, Mode, OFlags},
    io::Errno,
};

use super::{root::OutputRoot, sys};
use crate::{exec_path::ExecPath, units::show_size};

/// Follows a program's path.
const MANIFEST: &str = ".runfiles_manifest";
/// The same manifest in the tree of links.
const IN_TREE: &str = ".runfiles/MANIFEST";
/// Bytes of a manifest. One of a hundred thousand files has about 30 MiB.
const LARGEST: u64 = 256 << 20;
/// How directories are opened that are listed.
const LISTED: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
/// Directories that are remembered as having none.
const REMEMBERED: usize = 1 << 16;

/// What is at a path, links followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// Nothing, or a link that leads nowhere.
    Nothing,
    /// A file, or whatever else is no directory.
    File,
    /// A directory.
    Directory,
}

impl OutputRoot {
    /// The programs that have a manifest of runfiles in some directories, by their paths below the root. A directory
    /// that is as it was when it had none is not read again.
    pub fn programs(&self, directories: &[String]) -> Vec<String> {
        let mut without = self.without_manifests.lock();
        let mut programs = Vec::new();
        for directory in directories {
            let taken = sys::now_ns();
            let Ok(seen) = fs::statat(self, directory, AtFlags::empty()) else {
                continue;
            };
            let stamp = sys::stamp(&seen, taken);
            if without.get(directory).is_some_and(|old| old.vouches_for(&stamp)) {
                continue;
            }
            let before = programs.len();
            self.list(directory, &mut programs);
            if programs.len() > before {
                without.remove(directory);
            } else if without.len() < REMEMBERED || without.contains_key(directory) {
                without.insert(directory.clone(), stamp);
            }
        }
        programs
    }

    fn list(&self, directory: &str, programs: &mut Vec<String>) {
        let Ok(fd) = sys::openat(self, directory, LISTED, Mode::empty()) else {
            return;
        };
        let Ok(entries) = Dir::new(fd) else { return };
        for entry in entries.flatten() {
            let Some(name) = entry
                .file_name()
                .to_str()
                .ok()
                .and_then(|name| name.strip_suffix(MANIFEST))
            else {
                continue;
            };
            if !name.is_empty() {
                programs.push(format!("{directory}/{name}"));
            }
        }
    }

    /// Whether there is a manifest of runfiles beside a program, or in its tree of links.
    #[must_use]
    pub fn has_runfiles_manifest(&self, program: &str) -> bool {
        [MANIFEST, IN_TREE].iter().any(|end| {
            let found = fs::statat(self, format!("{program}{end}"), AtFlags::empty());
            found.is_ok_and(|stat| sys::file_type(&stat) == FileType::RegularFile)
        })
    }

    /// The bytes of a program's manifest of runfiles, from beside it or from its tree of links.
    ///
    /// # Errors
    /// When it cannot be read, or is larger than any could be.
    pub fn runfiles_manifest(&self, program: &str) -> io::Result<Vec<u8>> {
        match self.read(&format!("{program}{MANIFEST}")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.read(&format!("{program}{IN_TREE}"))
            }
            read => read,
        }
    }

    fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        // A fifo in its place must not block us.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = sys::openat(self, path, flags, Mode::empty())?;
        let stat = fs::fstat(&fd)?;
        if sys::file_type(&stat) != FileType::RegularFile {
            return Err(io::Error::other("it is not a regular file"));
        }
        let size = stat.st_size.cast_unsigned();
        if size > LARGEST {
            let (size, most) = (show_size(size), show_size(LARGEST));
            return Err(io::Error::other(format!(
                "its size of {size} exceeds the limit of {most}"
            )));
        }
        let mut bytes = Vec::new();
        File::from(fd).take(LARGEST).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// What is at a path.
    pub fn see(&self, path: &ExecPath) -> Seen {
        match fs::statat(self, path.as_str(), AtFlags::empty()) {
            Ok(stat) if sys::file_type(&stat) == FileType::Directory => Seen::Directory,
            Ok(_) => Seen::File,
            // What we may not look at is there all the same.
            Err(Errno::ACCESS | Errno::PERM) => Seen::File,
            Err(_) => Seen::Nothing,
        }
    }

    /// Whether a directory has nothing in it.
    pub fn is_empty(&self, path: &ExecPath) -> bool {
        let opened = sys::openat(self, path.as_str(), LISTED, Mode::empty());
        opened.and_then(Dir::new).is_ok_and(|entries| {
            let own = |name: &[u8]| matches!(name, b"." | b"..");
            entries.flatten().all(|entry| own(entry.file_name().to_bytes()))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs as std_fs;

    use super::*;

    #[test]
    fn programs_are_found_by_their_manifests_also_in_a_directory_that_had_none() {
        let dir = tempfile::tempdir().unwrap();
        let root = OutputRoot::open(dir.path(), true).unwrap();
        let asked = ["a".to_owned(), "b".to_owned(), "gone".to_owned()];
        for name in ["a", "b"] {
            std_fs::create_dir(dir.path().join(name)).unwrap();
            for file in ["x.txt", ".runfiles_manifest", "runfiles_manifest"] {
                std_fs::write(dir.path().join(name).join(file), "").unwrap();
            }
        }
        // So that the directories are older than a clock tick, and remembered.
        std::thread::sleep(std::time::Duration::from_millis(30));
        for _ in 0..2 {
            assert_eq!(root.programs(&asked), Vec::<String>::new());
        }
        std_fs::write(dir.path().join("b/app.runfiles_manifest"), "k v\n").unwrap();
        for _ in 0..2 {
            assert_eq!(root.programs(&asked), ["b/app"]);
        }
        assert_eq!(root.runfiles_manifest("b/app").unwrap(), b"k v\n");
        std_fs::create_dir(dir.path().join("b/app.runfiles")).unwrap();
        std_fs::rename(
            dir.path().join("b/app.runfiles_manifest"),
            dir.path().join("b/app.runfiles/MANIFEST"),
        )
        .unwrap();
        assert_eq!(root.runfiles_manifest("b/app").unwrap(), b"k v\n");
        std_fs::remove_file(dir.path().join("b/app.runfiles/MANIFEST")).unwrap();
        let error = root.runfiles_manifest("b/app").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_manifest_that_is_a_pipe_or_a_directory_does_not_block() {
        let dir = tempfile::tempdir().unwrap();
        let root = OutputRoot::open(dir.path(), true).unwrap();
        let path = dir.path().join("x.runfiles_manifest");
        fs::mkfifoat(fs::CWD, &path, Mode::from_raw_mode(0o600)).unwrap();
        assert!(root.runfiles_manifest("x").is_err());
        std_fs::create_dir(dir.path().join("y.runfiles_manifest")).unwrap();
        assert!(root.runfiles_manifest("y").is_err());
    }

    #[test]
    fn a_link_is_what_it_leads_to() {
        let dir = tempfile::tempdir().unwrap();
        let root = OutputRoot::open(dir.path(), true).unwrap();
        let path = |name: &str| ExecPath::new(name).unwrap();
        std_fs::create_dir_all(dir.path().join("tree/sub")).unwrap();
        std_fs::write(dir.path().join("file"), "").unwrap();
        for (to, link) in [
            ("tree", "to_tree"),
            ("file", "to_file"),
            ("nowhere", "to_nothing"),
            ("loop", "loop"),
        ] {
            std::os::unix::fs::symlink(to, dir.path().join(link)).unwrap();
        }
        for (name, seen) in [
            ("to_tree", Seen::Directory),
            ("to_file", Seen::File),
            ("to_nothing", Seen::Nothing),
            ("loop", Seen::Nothing),
            ("file/below", Seen::Nothing),
        ] {
            assert_eq!(root.see(&path(name)), seen, "{name}");
        }
        assert!(root.is_empty(&path("tree/sub")) && !root.is_empty(&path("to_tree")));
    }
}
