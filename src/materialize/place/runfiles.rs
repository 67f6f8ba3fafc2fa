//! Looks at what lies beside the programs of a build: manifests of runfiles, and whether what they name is there.
//!
//! Nothing is written. What is only looked at is so wherever links lead, since that decides no more than what is asked
//! for, and that is placed with all care. What is read lies below `bazel-out`, or else where the reader lets links lead.

use std::{
    collections::{HashSet, VecDeque},
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, ErrorKind, Read as _},
    os::{fd::OwnedFd, unix::ffi::OsStrExt as _},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{self, AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};

use super::{
    error::{PlaceError, PlaceErrorKind},
    root::OutputRoot,
    sys,
    walk::{self, End},
};
use crate::{
    exec_path::{BUILD_TREE, ExecPath},
    open_files::{is_lacking, open_regular},
    units::show_size,
};

/// Follows a program's path.
const MANIFEST: &str = ".runfiles_manifest";
/// The same manifest in the tree of links.
const IN_TREE: &str = ".runfiles/MANIFEST";
/// Ends the name of a tree of links.
const LINKS: &str = ".runfiles";
/// Where other repositories' outputs are.
const EXTERNAL: &str = "external";
/// Files that make a directory of sources a package.
const BUILD_FILES: [&str; 2] = ["BUILD.bazel", "BUILD"];
/// Directories in those of packages in which programs are looked for.
const WALKED: usize = if cfg!(test) { 100 } else { 20_000 };
/// Bytes of a manifest. One of a hundred thousand files has about 30 MiB.
const LARGEST: u64 = 256 << 20;
/// How directories are opened that are listed.
const LISTED: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
/// How what is read is opened: a fifo in its place must not block us.
const READ: OFlags = OFlags::RDONLY
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY)
    .union(OFlags::CLOEXEC);
/// For what may not lead out of a directory.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS);
/// Entries of a directory that is read.
const MOST: usize = 1_000_000;
/// Bazel's file in an output base that says whose it is.
const OWNER: &str = "DO_NOT_BUILD_HERE";
/// Directories that are remembered as having none.
const REMEMBERED: usize = 1 << 16;
/// Names of directories that are remembered of each.
const NAMES: usize = 1000;

/// What is at a path, links followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// Nothing, or a link that leads nowhere.
    Nothing,
    /// A file, or whatever else is not a directory.
    File,
    /// A directory.
    Directory,
}

/// What can be read at a path.
#[derive(Debug)]
pub enum Lying {
    /// Nothing.
    Nothing,
    /// A file, with its path below the root, links resolved.
    File(File, PathBuf),
    /// A directory, with the names in it.
    Directory(Vec<OsString>),
    /// A link out of `bazel-out`, to this absolute path by its text.
    Outside(PathBuf),
}

impl OutputRoot {
    /// The programs that have a manifest of runfiles in some directories, and anywhere in those of some packages but not in
    /// those of packages below them; by their paths below the root. A directory that is as it was when it had none is not
    /// read again. Also a directory that was not looked at, if there are too many: of each package, those come last that are
    /// deepest.
    pub fn programs(&self, directories: &[String], packages: &[String]) -> (Vec<String>, Option<String>) {
        let mut looked_at = HashSet::new();
        let mut programs = Vec::new();
        // One of each package in turn, so that a large one does not hide the others.
        let left = packages.iter().map(|package| VecDeque::from([package.clone()]));
        let mut left: VecDeque<VecDeque<String>> = left.collect();
        let mut passed_over = None;
        let mut waiting = packages.len();
        while let Some(mut of_package) = left.pop_front() {
            let Some(directory) = of_package.pop_front() else {
                continue;
            };
            waiting -= 1;
            if !looked_at.contains(&directory) {
                if looked_at.len() >= packages.len() + WALKED {
                    passed_over.get_or_insert(directory);
                    break;
                }
                for name in self.programs_in(&directory, &mut programs) {
                    let below = format!("{directory}/{name}");
                    // Their names take memory.
                    if waiting >= packages.len() + 4 * WALKED {
                        passed_over.get_or_insert(below);
                        break;
                    }
                    if !self.is_package(&directory, &name) {
                        of_package.push_back(below);
                        waiting += 1;
                    }
                }
                looked_at.insert(directory);
            }
            left.push_back(of_package);
        }
        for directory in directories
            .iter()
            .filter(|directory| !looked_at.contains(*directory))
        {
            self.programs_in(directory, &mut programs);
        }
        (programs, passed_over)
    }

    /// Whether a directory in one of outputs is of another package, or of other repositories.
    fn is_package(&self, directory: &str, name: &str) -> bool {
        // After `bazel-out`, the configuration and `bin`; an exec root has the sources there.
        let package = directory.splitn(4, '/').nth(3).unwrap_or_default();
        let source = Path::new(package).join(name);
        package.is_empty() && name == EXTERNAL
            || BUILD_FILES.iter().any(|file| self.is_file(&source.join(file)))
    }

    fn is_file(&self, path: &Path) -> bool {
        let found = fs::statat(self, path, AtFlags::empty());
        found.is_ok_and(|stat| sys::file_type(&stat) == FileType::RegularFile)
    }

    /// Adds a directory's programs, and gives the names of the directories in it.
    fn programs_in(&self, directory: &str, programs: &mut Vec<String>) -> Vec<String> {
        let taken = sys::now_ns();
        // Events name packages, and links are made by builds.
        let Ok(Some(here)) = walk::find_dir(self, directory) else {
            return Vec::new();
        };
        let Ok(seen) = fs::fstat(&here) else {
            return Vec::new();
        };
        let stamp = sys::stamp(&seen, taken);
        let mut without = self.without_manifests.lock();
        if let Some((old, below)) = without.get(directory)
            && old.vouches_for(&stamp)
        {
            return below.clone();
        }
        let before = programs.len();
        let below = list(&here, directory, programs);
        if programs.len() > before {
            without.remove(directory);
        } else if below.len() <= NAMES && (without.len() < REMEMBERED || without.contains_key(directory)) {
            without.insert(directory.to_owned(), (stamp, below.clone()));
        }
        below
    }

    /// When the manifest of runfiles beside a program was made, in milliseconds since the epoch; `None` without one.
    #[must_use]
    pub fn manifest_made_ms(&self, program: &str) -> Option<i64> {
        let stat = fs::statat(self, format!("{program}{MANIFEST}"), AtFlags::SYMLINK_NOFOLLOW).ok()?;
        let ns = sys::stamp(&stat, 0).mtime_ns;
        Some(ns / 1_000_000)
    }

    /// Whether there is a manifest of runfiles beside a program, or in its tree of links.
    #[must_use]
    pub fn has_runfiles_manifest(&self, program: &str) -> bool {
        [MANIFEST, IN_TREE]
            .iter()
            .any(|end| self.is_file(Path::new(&format!("{program}{end}"))))
    }

    /// The bytes of a program's manifest of runfiles, from beside it or from its tree of links; `None` of what is no
    /// program.
    ///
    /// # Errors
    /// When it cannot be read, is not below `bazel-out`, or is larger than any could be.
    pub fn runfiles_manifest(&self, program: &str) -> io::Result<Option<Vec<u8>>> {
        match self.manifest(&format!("{program}{MANIFEST}"))? {
            None => self.manifest(&format!("{program}{IN_TREE}")),
            manifest => Ok(manifest),
        }
    }

    fn manifest(&self, path: &str) -> io::Result<Option<Vec<u8>>> {
        let file = match self.read(path) {
            Ok(Lying::File(file, _)) => file,
            Ok(Lying::Nothing) => return Ok(None),
            Ok(Lying::Directory(_)) => return Err(io::Error::other("it is a directory")),
            Ok(Lying::Outside(path)) => {
                let path = path.display();
                return Err(io::Error::other(format!(
                    "it is a symlink to {path}, which is not in bazel-out"
                )));
            }
            // Of a file that is not a program, its tree of links has no directory; and of a program whose name is as long as
            // names can be, the manifest can have none.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::NotFound
                        | ErrorKind::NotADirectory
                        | ErrorKind::InvalidFilename
                        // A directory on the way is a link to sources: Bazel makes no programs there.
                        | ErrorKind::CrossesDevices
                ) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let size = file.metadata()?.len();
        if size > LARGEST {
            let (size, most) = (show_size(size), show_size(LARGEST));
            return Err(io::Error::other(format!(
                "its size of {size} exceeds the limit of {most}"
            )));
        }
        let mut bytes = Vec::new();
        file.take(LARGEST).read_to_end(&mut bytes)?;
        Ok(Some(bytes))
    }

    /// Opens what is at a path to be read. In an exec root, links are followed within `bazel-out`, and nothing else is read;
    /// where an output service has that, within what it leads to.
    ///
    /// # Errors
    /// When it cannot be opened, is neither a file nor a directory, or a link on the way leads out.
    pub fn read(&self, path: &str) -> io::Result<Lying> {
        let below = path
            .strip_prefix(BUILD_TREE)
            .and_then(|path| path.strip_prefix('/'));
        let opened = match below {
            None if self.is_exec_root => return Ok(Lying::Nothing),
            Some(below) if self.elsewhere().is_some() => {
                let tree = sys::openat(self, BUILD_TREE, sys::DIRECTORY, Mode::empty())?;
                let opened = sys::openat2(&tree, below, READ, BENEATH);
                opened.map(|fd| (fd, PathBuf::from(path)))
            }
            _ => match walk::read_to_end(self, path).map_err(plain)? {
                End::Nothing => return Ok(Lying::Nothing),
                End::Outside(path) => return Ok(Lying::Outside(path)),
                End::Spot(spot) => {
                    let opened = sys::openat(&spot.dir, &spot.name, READ | OFlags::NOFOLLOW, Mode::empty());
                    opened.map(|fd| (fd, spot.path()))
                }
            },
        };
        match opened {
            Ok((fd, real)) => lying(fd, real),
            Err(Errno::NOENT) => Ok(Lying::Nothing),
            Err(errno) => Err(errno.into()),
        }
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

/// Adds the programs in a directory, and gives the names of the directories in it.
fn list(here: &sys::Dir, directory: &str, programs: &mut Vec<String>) -> Vec<String> {
    let mut below = Vec::new();
    let opened = sys::openat(here, ".", LISTED, Mode::empty());
    let Ok(entries) = opened.and_then(Dir::new) else {
        return below;
    };
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().to_str() else {
            continue;
        };
        let is_directory = match entry.file_type() {
            // Some file systems do not say.
            FileType::Unknown => fs::statat(here, name, AtFlags::SYMLINK_NOFOLLOW)
                .is_ok_and(|stat| sys::file_type(&stat) == FileType::Directory),
            known => known == FileType::Directory,
        };
        if is_directory {
            if !matches!(name, "." | "..") && !name.ends_with(LINKS) {
                below.push(name.to_owned());
            }
        } else if let Some(name) = name.strip_suffix(MANIFEST)
            && !name.is_empty()
        {
            programs.push(format!("{directory}/{name}"));
        }
    }
    below
}

/// Opens what is at a path below a directory of sources to be read. Links are followed wherever they lead, as a program that
/// runs there would; with `within`, only within the directory.
///
/// # Errors
/// When it cannot be opened, or is neither a file nor a directory.
pub(crate) fn read_source(directory: &Path, below: &str, within: bool) -> io::Result<Lying> {
    let real = directory.join(below);
    let opened = if within {
        let opened = sys::open(directory, sys::DIRECTORY, Mode::empty())
            .and_then(|directory| sys::openat2(&directory, below, READ, BENEATH));
        match opened {
            Err(errno) if is_lacking(errno) => open_within(directory, &real),
            opened => opened,
        }
    } else {
        sys::open(&real, READ, Mode::empty())
    };
    match opened {
        Ok(fd) => lying(fd, real),
        Err(Errno::NOENT) => Ok(Lying::Nothing),
        Err(Errno::XDEV) => Err(io::Error::other("a symlink leads out of its directory")),
        Err(errno) => Err(errno.into()),
    }
}

/// The same without `openat2`: where the links lead is looked at before.
fn open_within(directory: &Path, path: &Path) -> rustix::io::Result<OwnedFd> {
    let real = |path: &Path| {
        let real = path.canonicalize();
        real.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    };
    let path = real(path)?;
    if !path.starts_with(real(directory)?) {
        return Err(Errno::XDEV);
    }
    sys::open(&path, READ | OFlags::NOFOLLOW, Mode::empty())
}

fn lying(fd: OwnedFd, path: PathBuf) -> io::Result<Lying> {
    match sys::file_type(&fs::fstat(&fd)?) {
        FileType::RegularFile => Ok(Lying::File(File::from(fd), path)),
        FileType::Directory => {
            let mut names = Vec::new();
            for entry in Dir::new(fd)? {
                let entry = entry?;
                let name = entry.file_name().to_bytes();
                if !matches!(name, b"." | b"..") {
                    names.push(OsStr::from_bytes(name).to_owned());
                }
                if names.len() > MOST {
                    return Err(io::Error::other(format!("it has more than {MOST} entries")));
                }
            }
            Ok(Lying::Directory(names))
        }
        _ => Err(io::Error::other("it is neither a file nor a directory")),
    }
}

/// The workspace of an output base, by Bazel's own word there. Blocks.
pub(crate) fn owner(output_base: &Path) -> Option<String> {
    Some(small_text(&output_base.join(OWNER))?.trim_end().to_owned())
}

/// The text of a small file that is not a link. Blocks.
pub(crate) fn small_text(path: &Path) -> Option<String> {
    let (file, _) = open_regular(fs::CWD, path).ok()??;
    let mut text = String::new();
    file.take(8 << 10).read_to_string(&mut text).ok()?;
    Some(text)
}

/// The system's error where there is one, for its kind.
fn plain(error: PlaceError) -> io::Error {
    match error.errno {
        Some(errno) => io::Error::from_raw_os_error(errno),
        None if matches!(error.kind, PlaceErrorKind::Escapes { .. }) => {
            io::Error::new(ErrorKind::CrossesDevices, error)
        }
        None => io::Error::other(error),
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
            assert_eq!(root.programs(&asked, &[]), (Vec::new(), None));
        }
        std_fs::write(dir.path().join("b/app.runfiles_manifest"), "k v\n").unwrap();
        for _ in 0..2 {
            assert_eq!(root.programs(&asked, &[]).0, ["b/app"]);
        }
        assert_eq!(root.runfiles_manifest("b/app").unwrap().unwrap(), b"k v\n");
        std_fs::create_dir(dir.path().join("b/app.runfiles")).unwrap();
        std_fs::rename(
            dir.path().join("b/app.runfiles_manifest"),
            dir.path().join("b/app.runfiles/MANIFEST"),
        )
        .unwrap();
        assert_eq!(root.runfiles_manifest("b/app").unwrap().unwrap(), b"k v\n");
        std_fs::remove_file(dir.path().join("b/app.runfiles/MANIFEST")).unwrap();
        assert_eq!(root.runfiles_manifest("b/app").unwrap(), None);
        // Neither has it a tree of links, nor may its manifest have a name.
        for none in ["b/x.txt".to_owned(), "x".repeat(250)] {
            assert_eq!(root.runfiles_manifest(&none).unwrap(), None, "{none}");
        }
    }

    #[test]
    fn programs_are_found_anywhere_in_a_package_and_not_in_others() {
        let dir = tempfile::tempdir().unwrap();
        let root = OutputRoot::open(dir.path(), true).unwrap();
        let bin = "bazel-out/k8/bin";
        let make = |path: &str| {
            let path = dir.path().join(path);
            std_fs::create_dir_all(path.parent().unwrap()).unwrap();
            std_fs::write(path, "").unwrap();
        };
        for program in [
            "top",
            "gen/deep/er/x",
            "p/some/deep/x",
            "p/x.runfiles/y",
            "p/q/other",
            "p/q/r/other",
            "external/lib/other",
        ] {
            make(&format!("{bin}/{program}.runfiles_manifest"));
        }
        for package in ["p/BUILD", "p/q/BUILD.bazel"] {
            make(package);
        }
        std_fs::create_dir_all(dir.path().join(bin).join("p/empty/below")).unwrap();
        std::os::unix::fs::symlink("..", dir.path().join(bin).join("p/some/up")).unwrap();
        // So that the directories are older than a clock tick, and remembered.
        std::thread::sleep(std::time::Duration::from_millis(30));
        let found = |packages: &[&str]| {
            let packages: Vec<_> = packages.iter().map(|package| format!("{bin}{package}")).collect();
            let (mut found, passed_over) = root.programs(&[format!("{bin}/p")], &packages);
            assert_eq!(passed_over, None);
            found.sort_unstable();
            found
        };
        for _ in 0..2 {
            assert_eq!(found(&["/p"]), [format!("{bin}/p/some/deep/x")]);
            assert_eq!(
                found(&["", "/p", ""]),
                ["gen/deep/er/x", "p/some/deep/x", "top"].map(|path| format!("{bin}/{path}"))
            );
        }
        make(&format!("{bin}/p/empty/below/late.runfiles_manifest"));
        assert_eq!(found(&["/p"]).len(), 2);
        assert_eq!(found(&["/none"]), Vec::<String>::new());
        // A directory of that name makes no package.
        std_fs::remove_file(dir.path().join("p/q/BUILD.bazel")).unwrap();
        std_fs::create_dir(dir.path().join("p/q/BUILD")).unwrap();
        assert_eq!(found(&["/p"]).len(), 4);
    }

    #[test]
    fn programs_are_not_looked_for_outside_of_the_tree() {
        let dir = tempfile::tempdir().unwrap();
        let exec_root = dir.path().join("execroot/_main");
        std_fs::create_dir_all(exec_root.join("bazel-out/k8/bin/p")).unwrap();
        for place in ["execroot/_main", "execroot", "away"] {
            std_fs::create_dir_all(dir.path().join(place)).unwrap();
            std_fs::write(dir.path().join(place).join("x.runfiles_manifest"), "").unwrap();
        }
        std::os::unix::fs::symlink(dir.path().join("away"), exec_root.join("bazel-out/k8/bin/link")).unwrap();
        let root = OutputRoot::open(&exec_root, false).unwrap();
        for package in ["/link", "/../../../..", "/../../../../../away"] {
            let found = root.programs(&[], &[format!("bazel-out/k8/bin{package}")]);
            assert_eq!(found, (Vec::new(), None), "{package}");
        }
    }

    #[test]
    fn one_package_with_very_many_directories_does_not_hide_the_programs_of_others() {
        let dir = tempfile::tempdir().unwrap();
        let root = OutputRoot::open(dir.path(), true).unwrap();
        let bin = dir.path().join("bazel-out/k8/bin");
        for tree in 0..WALKED {
            std_fs::create_dir_all(bin.join(format!("a/deep/{tree}/deeper"))).unwrap();
        }
        std_fs::create_dir_all(bin.join("b/some/deep")).unwrap();
        std_fs::write(bin.join("b/some/deep/x.runfiles_manifest"), "").unwrap();
        let packages = ["a", "b"].map(|package| format!("bazel-out/k8/bin/{package}"));
        let (programs, passed_over) = root.programs(&[], &packages);
        assert_eq!(programs, ["bazel-out/k8/bin/b/some/deep/x"]);
        assert!(passed_over.unwrap().starts_with("bazel-out/k8/bin/a/deep/"));
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

    #[test]
    fn what_is_read_lies_in_bazel_out_or_the_reader_hears_where() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        let exec_root = base.join("execroot/_main");
        std_fs::create_dir_all(exec_root.join("bazel-out/k8/tree")).unwrap();
        std_fs::create_dir_all(base.join("secret")).unwrap();
        std_fs::write(base.join("secret/key"), "secret").unwrap();
        std_fs::write(exec_root.join("bazel-out/k8/tree/file"), "text").unwrap();
        let link = |name: &str, to: &str| {
            std::os::unix::fs::symlink(to, exec_root.join("bazel-out/k8").join(name)).unwrap();
        };
        link("near", "tree/file");
        link("far", exec_root.join("bazel-out/k8/near").to_str().unwrap());
        link("dir", "tree");
        link("out", base.join("secret/key").to_str().unwrap());
        link("chain", "out");
        link("up", "../../../../secret/key");
        link("source", exec_root.join("app/x.txt").to_str().unwrap());
        link("outdir", base.join("secret").to_str().unwrap());
        link("nothing", "nowhere");
        link("app.runfiles_manifest", base.join("secret/key").to_str().unwrap());
        link("good.runfiles_manifest", "tree/file");
        let root = OutputRoot::open(&exec_root, false).unwrap();
        let read = |name: &str| root.read(&format!("bazel-out/k8/{name}"));
        let text = |name: &str| match read(name).unwrap() {
            Lying::File(file, path) => (io::read_to_string(file).unwrap(), path),
            other => panic!("{name}: {other:?}"),
        };
        let real = Path::new("bazel-out/k8/tree/file").to_owned();
        for name in ["tree/file", "near", "far", "dir/file"] {
            assert_eq!(text(name), ("text".to_owned(), real.clone()), "{name}");
        }
        for (name, to) in [
            ("out", base.join("secret/key")),
            ("chain", base.join("secret/key")),
            ("up", base.join("secret/key")),
            ("source", exec_root.join("app/x.txt")),
            ("outdir", base.join("secret")),
        ] {
            let found = read(name).unwrap();
            assert!(
                matches!(&found, Lying::Outside(path) if *path == to),
                "{name}: {found:?}"
            );
        }
        assert!(matches!(read("dir").unwrap(), Lying::Directory(names) if names == ["file"]));
        assert!(matches!(read("nothing").unwrap(), Lying::Nothing));
        assert!(read("outdir/key").is_err());
        assert!(matches!(root.read("app/x.txt").unwrap(), Lying::Nothing));
        let error = root
            .runfiles_manifest("bazel-out/k8/app")
            .unwrap_err()
            .to_string();
        assert!(error.contains("secret/key, which is not in bazel-out"), "{error}");
        let manifest = root.runfiles_manifest("bazel-out/k8/good").unwrap();
        assert_eq!(manifest.as_deref(), Some(&b"text"[..]));
    }
}
