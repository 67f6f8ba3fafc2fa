//! Which programs are Bazel: nothing else ever gets Bazel's flags.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
};

/// The names, other than `bazel` itself, without a version or a platform at their end.
const NAMES: &[&str] = &[
    "bazel",
    "bazelisk",
    "bazelw",
    "bazel-real",
    "bazel_real",
    "bazel-dev",
];
/// A file in the archive that follows a Bazel's client program.
const SERVER: &[u8] = b"A-server.jar";
/// The end of an archive: its mark, and the longest comment after it.
const ARCHIVE_END: usize = 22;
const COMMENT: u64 = 0xffff;
/// Larger lists of files are not a Bazel's.
const LISTING: u64 = 8 << 20;

/// The file that a program's name means, looked for on a `PATH` if it is a bare name. Files for which `is_ours` are
/// passed over.
pub(in crate::cli) fn find(
    program: &OsStr,
    path: &OsStr,
    is_ours: impl Fn(&Path) -> bool,
) -> Option<PathBuf> {
    if program.as_bytes().contains(&b'/') {
        return Some(PathBuf::from(program));
    }
    std::env::split_paths(path)
        .map(|directory| directory.join(program))
        .find(|file| is_executable(file) && !is_ours(file))
}

fn is_executable(file: &Path) -> bool {
    file.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Whether a program is a Bazel, or something that stands for one: by its name, by the name of what it is a link to, or
/// by what is in it.
pub(in crate::cli) fn is_bazel(file: &Path) -> bool {
    let real = file.canonicalize();
    [Some(file), real.as_deref().ok()]
        .into_iter()
        .flatten()
        .filter_map(Path::file_name)
        .any(is_name)
        || holds_a_server(file)
}

/// Whether a program is a script: a wrapper around Bazel, which may do more than call it. Not Bazelisk, which npm installs as
/// one, or Debian's, which only calls the `bazel-real` beside it.
pub(super) fn is_script(file: &Path) -> bool {
    let mut begin = [0; 2];
    let read = File::open(file).and_then(|file| file.read_exact_at(&mut begin, 0));
    let does_no_more = file.canonicalize().is_ok_and(|real| {
        let name = real.file_name().unwrap_or_default();
        name.as_bytes().starts_with(b"bazelisk") || is_executable(&real.with_file_name("bazel-real"))
    });
    read.is_ok() && begin == *b"#!" && !does_no_more
}

/// `bazel`, `bazelisk`, and these with a version or a platform, such as `bazel-7.7.1` and `bazelisk-linux-amd64`;
/// not `bazel-remote`.
fn is_name(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else {
        return false;
    };
    let name = name.strip_suffix(".exe").unwrap_or(name);
    NAMES.iter().any(|known| {
        name.strip_prefix(known).is_some_and(|rest| {
            let rest = rest.strip_prefix(['-', '_', '.']).unwrap_or(rest);
            let version = rest.strip_prefix('v').unwrap_or(rest);
            rest.is_empty() && !name.ends_with(['-', '_', '.'])
                || version.starts_with(|c: char| c.is_ascii_digit())
                || rest.starts_with("linux-")
                || rest.starts_with("darwin-")
        })
    })
}

/// Whether a file ends with an archive that has Bazel's server in it.
fn holds_a_server(file: &Path) -> bool {
    let listing = || {
        let file = File::open(file).ok()?;
        let meta = file.metadata().ok().filter(std::fs::Metadata::is_file)?;
        let tail_len = meta.len().min(ARCHIVE_END as u64 + COMMENT);
        let mut tail = vec![0; usize::try_from(tail_len).ok()?];
        file.read_exact_at(&mut tail, meta.len() - tail_len).ok()?;
        let end = tail
            .windows(ARCHIVE_END)
            .rposition(|w| w.starts_with(b"PK\x05\x06"))?;
        let number = |at: usize| -> Option<u64> {
            let bytes = tail.get(end + at..end + at + 4)?;
            Some(u64::from(u32::from_le_bytes(bytes.try_into().ok()?)))
        };
        let length = number(12).filter(|length| *length <= LISTING)?;
        // Offsets count from the archive's beginning, or the file's; the list ends where its end begins.
        let at = (meta.len() - tail_len + end as u64).checked_sub(length)?;
        let mut listing = vec![0; usize::try_from(length).ok()?];
        file.read_exact_at(&mut listing, at).ok()?;
        Some(listing)
    };
    listing().is_some_and(|listing| listing.windows(SERVER.len()).any(|w| w == SERVER))
}

/// The `PATH` that a program is looked for on where none is set, as the C library has it.
pub(in crate::cli) fn path() -> OsString {
    std::env::var_os("PATH").unwrap_or_else(|| "/bin:/usr/bin".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrapper_is_a_script_but_for_bazelisk() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text, expected) in [
            ("bazel", "#!/bin/sh\n", true),
            ("bazelisk.js", "#!/usr/bin/env node\n", false),
            ("other", "\x7fELF", false),
            ("empty", "", false),
        ] {
            let file = dir.path().join(name);
            std::fs::write(&file, text).unwrap();
            assert_eq!(is_script(&file), expected, "{name}");
        }
        std::os::unix::fs::symlink("bazelisk.js", dir.path().join("linked")).unwrap();
        assert!(!is_script(&dir.path().join("linked")));
        assert!(!is_script(&dir.path().join("none")));
    }

    #[test]
    fn names_tell_a_bazel() {
        for name in [
            "bazel",
            "bazelisk",
            "bazelw",
            "bazel4",
            "bazel-4",
            "bazel-7.7.1",
            "bazel-7.7.1-linux-x86_64",
            "bazel_7",
            "bazel-real",
            "bazelisk-linux-amd64",
            "bazelisk-v1.20",
            "bazel.exe",
            "bazel-dev",
        ] {
            assert!(is_name(OsStr::new(name)), "{name}");
        }
        for name in [
            "",
            "make",
            "bazel-remote",
            "bazel-ci.sh",
            "bazelify",
            "bazel-",
            "mybazel",
            "bazel.sh",
            "bazel-watcher",
            "bazel-linux",
            "buildozer",
        ] {
            assert!(!is_name(OsStr::new(name)), "{name}");
        }
    }

    #[test]
    fn links_and_archives_tell_a_bazel() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("bazel"), "#!/bin/sh\n").unwrap();
        std::os::unix::fs::symlink(path("bazel"), path("b")).unwrap();
        std::os::unix::fs::symlink("nowhere", path("dangling")).unwrap();
        std::fs::write(path("tool"), "#!/bin/sh\n").unwrap();
        let archive = |entry: &[u8]| {
            let mut bytes = b"\x7fELF client".to_vec();
            bytes.extend_from_slice(entry);
            bytes.extend_from_slice(b"PK\x05\x06\0\0\0\0\0\0\0\0");
            bytes.extend_from_slice(&(entry.len() as u32).to_le_bytes());
            bytes.extend_from_slice(&[0; 4]);
            bytes.extend_from_slice(b"\x02\0hi");
            bytes
        };
        std::fs::write(path("renamed"), archive(b"PK\x01\x02...A-server.jar")).unwrap();
        std::fs::write(path("zip"), archive(b"PK\x01\x02...B-server.jar")).unwrap();
        let cut = &archive(b"PK\x01\x02A-server.jar")[..40];
        std::fs::write(path("cut"), cut).unwrap();
        for (name, expected) in [
            ("bazel", true),
            ("b", true),
            ("renamed", true),
            ("tool", false),
            ("zip", false),
            ("cut", false),
            ("dangling", false),
            ("missing", false),
        ] {
            assert_eq!(is_bazel(&path(name)), expected, "{name}");
        }
        assert!(!is_bazel(dir.path()));
    }

    #[test]
    fn a_bare_name_is_looked_for_on_the_path() {
        let dir = tempfile::tempdir().unwrap();
        for (name, mode) in [("a/bazel", 0o644), ("b/bazel", 0o755), ("c/bazel", 0o755)] {
            let file = dir.path().join(name);
            std::fs::create_dir(file.parent().unwrap()).unwrap();
            std::fs::write(&file, "").unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        let path = std::env::join_paths(["a", "b", "c"].map(|d| dir.path().join(d))).unwrap();
        let found = |ours: &str| find(OsStr::new("bazel"), &path, |file| file.ends_with(ours));
        assert_eq!(found("none"), Some(dir.path().join("b/bazel")));
        assert_eq!(found("b/bazel"), Some(dir.path().join("c/bazel")));
        assert_eq!(find(OsStr::new("./x"), &path, |_| true), Some("./x".into()));
        assert_eq!(find(OsStr::new("gone"), &path, |_| false), None);
    }
}
