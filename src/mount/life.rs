//! Where a mount may be, and how it ends.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use rustix::{
    io::Errno,
    mount::{UnmountFlags, unmount},
};

use super::error::MountError;

/// The type that `/proc/self/mountinfo` gives to our mounts.
const TYPE: &str = "fuse.outhaul";

/// Gives the directory to mount on, absolute and without links: makes it if it is missing, and removes what a process of ours
/// has left there that was killed. Blocks.
///
/// # Errors
/// When something else is mounted there, it is not an empty directory, or it cannot be made or read.
pub(super) fn prepare(directory: &Path) -> Result<PathBuf, MountError> {
    let failed = |source: io::Error| MountError::Directory {
        at: directory.to_owned(),
        source,
    };
    // Not `stat`, which the kernel may answer from memory.
    let is_empty = match fs::read_dir(directory) {
        Err(error) if is_dead(&error) => {
            let at = spelled(directory).map_err(failed)?;
            let by = mounted(&at).unwrap_or_else(|| "a file system".to_owned());
            if by != TYPE {
                return Err(MountError::Mounted { at, by });
            }
            detach(&at).map_err(|reason| MountError::Dead { at, reason })?;
            return prepare(directory);
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(directory).map_err(failed)?;
            true
        }
        Err(error) => return Err(failed(error)),
        Ok(mut entries) => entries.next().is_none(),
    };
    let at = directory.canonicalize().map_err(failed)?;
    match mounted(&at) {
        Some(by) if by == TYPE => {
            let by = "another `outhaul mount`".to_owned();
            Err(MountError::Mounted { at, by })
        }
        Some(by) => Err(MountError::Mounted { at, by }),
        None if is_empty => Ok(at),
        None => Err(MountError::NotEmpty(at)),
    }
}

/// Whether this is what the system says where a mount's process has ended.
fn is_dead(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::NOTCONN | Errno::CONNABORTED))
}

/// The absolute path of a directory that cannot be looked at.
fn spelled(directory: &Path) -> io::Result<PathBuf> {
    let absolute: PathBuf = std::path::absolute(directory)?.components().collect();
    match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => Ok(parent.canonicalize()?.join(name)),
        _ => Ok(absolute),
    }
}

/// The type of what is mounted on a path, if anything is.
fn mounted(at: &Path) -> Option<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").ok()?;
    // The last one covers the others.
    let lines = text.lines().filter_map(mount_of);
    lines
        .filter(|(path, _)| path == at)
        .map(|(_, kind)| kind)
        .next_back()
}

/// Where a line of `/proc/self/mountinfo` says that what is mounted.
fn mount_of(line: &str) -> Option<(PathBuf, String)> {
    let (before, after) = line.split_once(" - ")?;
    let path = before.split(' ').nth(4)?;
    let mut words = after.split(' ');
    let (kind, source) = (words.next()?, words.next()?);
    // Root mounts without the helper program, and has no subtype there.
    let kind = if (kind, source) == ("fuse", "outhaul") {
        TYPE
    } else {
        kind
    };
    let mut plain = path.to_owned();
    for (escape, letter) in [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")] {
        plain = plain.replace(escape, letter);
    }
    Some((plain.into(), kind.to_owned()))
}

/// Takes a mount away, at once for those who look there from now on. Files that are open fail when this process ends. Blocks.
///
/// # Errors
/// In words, when it stays.
pub(super) fn detach(at: &Path) -> Result<(), String> {
    match unmount(at, UnmountFlags::DETACH) {
        // Nothing is mounted there any more.
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
        Err(Errno::PERM) => {}
        Err(errno) => return Err(errno.to_string()),
    }
    // Only root may unmount; for others there is a program.
    let mut reasons = Vec::new();
    for program in ["fusermount3", "fusermount"] {
        let mut command = Command::new(program);
        command
            .args(["-u", "-z", "--"])
            .arg(at)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        match command.output() {
            Ok(output) if output.status.success() => return Ok(()),
            Ok(output) => reasons.push(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
            Err(error) => reasons.push(format!("{program}: {error}")),
        }
    }
    Err(reasons.join("; "))
}

/// Why nothing could be mounted, and what to do.
pub(super) fn refusal(at: &Path, error: &io::Error, allow_other: bool) -> MountError {
    let is_root = rustix::process::geteuid().is_root();
    let advice = if !Path::new("/dev/fuse").exists() {
        "there is no /dev/fuse: FUSE is not available here; load the kernel module (modprobe fuse), or start the container \
         with --device /dev/fuse --cap-add SYS_ADMIN"
    } else if is_root {
        "mounting is not permitted here; a container needs --device /dev/fuse --cap-add SYS_ADMIN"
    } else if allow_other {
        "users other than root need fusermount3 (package fuse3), and for --allow-other the line user_allow_other in \
         /etc/fuse.conf"
    } else {
        "users other than root need fusermount3 (package fuse3)"
    };
    MountError::Fuse {
        at: at.to_owned(),
        reason: format!("{error}; {advice}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_read_with_odd_names() {
        let line =
            r"129 29 0:51 / /mnt/two\040words\134 rw,nosuid master:1 - fuse.outhaul outhaul ro,user_id=0";
        let expected = (PathBuf::from(r"/mnt/two words\"), TYPE.to_owned());
        assert_eq!(mount_of(line), Some(expected));
        let line = "129 29 0:51 / /mnt ro - fuse outhaul ro,user_id=0";
        assert_eq!(mount_of(line), Some((PathBuf::from("/mnt"), TYPE.to_owned())));
        assert_eq!(mount_of("129 29 0:51 / /mnt rw"), None);
        assert_eq!(mounted(Path::new("/proc")).as_deref(), Some("proc"));
    }

    #[test]
    fn only_an_empty_directory_is_mounted_on() {
        let dir = tempfile::tempdir().unwrap();
        let new = dir.path().join("new/deep");
        assert_eq!(prepare(&new).unwrap(), new.canonicalize().unwrap());
        assert_eq!(prepare(&new).unwrap(), new.canonicalize().unwrap());
        for (path, part) in [
            (dir.path().to_owned(), "not empty"),
            (PathBuf::from("/proc"), "proc is mounted there"),
            (PathBuf::from("/proc/version"), "Not a directory"),
        ] {
            let message = prepare(&path).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
