//! Where a mount may be, and how it ends.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::process::CommandExt as _},
    path::{Component, Path, PathBuf},
    process::{Command, Stdio},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Access, access},
    io::Errno,
    mount::{UnmountFlags, unmount},
};

use super::error::{EndError, MountError};
use crate::materialize::place::mount_point;

/// The type that `/proc/self/mountinfo` gives to our mounts.
const TYPE: &str = "fuse.outhaul";

/// Refuses to mount over what the mount itself reads and writes, or in its store. Blocks.
///
/// # Errors
/// When one of these lies in the directory, wherever links lead; it need not exist yet.
pub(super) fn hides_nothing(directory: &Path, store: &Path, others: &[PathBuf]) -> Result<(), MountError> {
    let at = resolved(directory);
    let others = others.iter().map(|path| ("the state directory", path.as_path()));
    for (what, path) in std::iter::once(("the store", store)).chain(others) {
        let real = resolved(path);
        if real.starts_with(&at) || (path == store && at.starts_with(&real)) {
            return Err(MountError::Hides {
                at,
                what,
                path: path.to_owned(),
            });
        }
    }
    Ok(())
}

/// A path without links, as far as it exists.
fn resolved(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let real = absolute
        .ancestors()
        .find_map(|above| Some((above.canonicalize().ok()?, absolute.strip_prefix(above).ok()?)));
    let Some((mut real, rest)) = real else {
        return absolute;
    };
    for part in rest.components() {
        match part {
            Component::ParentDir => {
                real.pop();
            }
            part => real.push(part),
        }
    }
    real
}

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
    let is_empty = loop {
        // Not `stat`, which the kernel may answer from memory.
        match fs::read_dir(directory) {
            Err(error) if is_dead(&error) => remove_dead(directory)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(directory).map_err(failed)?;
                break true;
            }
            Err(error) => return Err(failed(error)),
            Ok(mut entries) => break entries.next().is_none(),
        }
    };
    let at = directory.canonicalize().map_err(failed)?;
    match top_of(&mounts(), &at).map(|on_top| on_top.kind.clone()) {
        Some(by) if by == TYPE => {
            let by = "another `outhaul mount`".to_owned();
            Err(MountError::Mounted { at, by })
        }
        Some(by) => Err(MountError::Mounted { at, by }),
        None if is_empty => Ok(at),
        None => Err(MountError::NotEmpty(at)),
    }
}

/// Removes the uppermost mount of a directory, which must be one of ours. An error if it stays: there would be no end of trying.
fn remove_dead(directory: &Path) -> Result<(), MountError> {
    let at = spelled(directory).map_err(|source| MountError::Directory {
        at: directory.to_owned(),
        source,
    })?;
    let count = |all: &[Line]| all.iter().filter(|line| line.at == at).count();
    let before = mounts();
    let by = top_of(&before, &at).map_or_else(|| "a file system".to_owned(), |line| line.kind.clone());
    if by != TYPE {
        return Err(MountError::Mounted { at, by });
    }
    let stays = match detach(&at) {
        // A mount that this process may not remove, such as one of another user namespace, stays without an error.
        Ok(()) if count(&mounts()) < count(&before) => return Ok(()),
        Ok(()) => "it belongs to another namespace".to_owned(),
        Err(EndError::Refused { reason, .. }) => reason,
        Err(error) => error.to_string(),
    };
    Err(MountError::Dead { at, reason: stays })
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

/// A line of `/proc/self/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    /// Where something is mounted.
    at: PathBuf,
    /// Its type.
    kind: String,
    /// The number of its device, as it is spelled there. No other file system has it as long as this one exists.
    device: String,
}

/// What is mounted. Empty where that cannot be read.
fn mounts() -> Vec<Line> {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let lines = table.split(|byte| *byte == b'\n');
    lines.filter_map(Line::of).collect()
}

/// What is mounted on a path and covers all that is mounted there, too.
fn top_of<'a>(all: &'a [Line], at: &Path) -> Option<&'a Line> {
    all.iter().rfind(|line| line.at == at)
}

impl Line {
    fn of(line: &[u8]) -> Option<Self> {
        // Paths may have any bytes but blanks.
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
        let at = mount_point(fields.get(4)?)?;
        let mut after = fields.iter().skip_while(|field| **field != b"-").skip(1);
        let (kind, source) = (*after.next()?, *after.next()?);
        // Root mounts without the helper program, and has no subtype there.
        let kind = if (kind, source) == (b"fuse", b"outhaul") {
            TYPE.to_owned()
        } else {
            text(kind)
        };
        let device = text(fields[2]);
        Some(Self { at, kind, device })
    }
}

/// A mount of this process, which is told from all others that come to its place.
pub(super) struct Ours {
    at: PathBuf,
    /// As in [`Line`]; none if the system did not tell.
    device: Option<String>,
    /// The connection to the kernel.
    connection: OwnedFd,
}

/// Where a mount of ours is.
#[derive(Debug, PartialEq, Eq)]
enum Whereabouts {
    /// Nothing covers it.
    OnTop,
    /// Something else was mounted over it.
    Covered,
    /// A directory above it has another name now.
    Moved(PathBuf),
    /// Somebody has unmounted it.
    Gone,
}

impl Ours {
    /// What was just mounted on this directory over this connection.
    pub(super) fn new(at: &Path, connection: OwnedFd) -> Self {
        let all = mounts();
        let ours = top_of(&all, at).filter(|line| line.kind == TYPE);
        Self {
            at: at.to_owned(),
            device: ours.map(|line| line.device.clone()),
            connection,
        }
    }

    /// Takes it away, as [`detach`] does, and nothing else that has come to its place in the meantime. Blocks.
    ///
    /// # Errors
    /// When it stays.
    pub(super) fn detach(&self) -> Result<(), EndError> {
        // Its device may be another one's by now.
        if self.is_closed() {
            return Ok(());
        }
        let Some(device) = &self.device else {
            return Err(EndError::Unknown(self.at.clone()));
        };
        match whereabouts(&mounts(), &self.at, device) {
            Whereabouts::OnTop => detach(&self.at),
            Whereabouts::Moved(to) => detach(&to),
            Whereabouts::Covered => Err(EndError::Covered),
            Whereabouts::Gone => Ok(()),
        }
    }

    /// Whether the kernel has closed the connection: it is unmounted, and nobody has a file of it open.
    pub(super) fn is_closed(&self) -> bool {
        let mut polled = [PollFd::new(&self.connection, PollFlags::empty())];
        let at_once = Timespec::default();
        poll(&mut polled, Some(&at_once)).is_ok() && polled[0].revents().contains(PollFlags::ERR)
    }
}

fn whereabouts(all: &[Line], at: &Path, device: &str) -> Whereabouts {
    let is_ours = |line: &Line| line.kind == TYPE && line.device == device;
    if top_of(all, at).is_some_and(is_ours) {
        Whereabouts::OnTop
    } else if all.iter().any(|line| line.at == at && is_ours(line)) {
        Whereabouts::Covered
    } else if let Some(line) = all.iter().rfind(|line| is_ours(line)) {
        if top_of(all, &line.at).is_some_and(is_ours) {
            Whereabouts::Moved(line.at.clone())
        } else {
            Whereabouts::Covered
        }
    } else {
        Whereabouts::Gone
    }
}

/// Takes a mount away, at once for those who look there from now on. Files that are open fail when this process ends. Blocks.
///
/// # Errors
/// When it stays.
fn detach(at: &Path) -> Result<(), EndError> {
    let refused = |reason: String| EndError::Refused {
        at: at.to_owned(),
        reason,
    };
    match unmount(at, UnmountFlags::DETACH) {
        // Nothing is mounted there any more.
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
        Err(Errno::PERM) => {}
        Err(errno) => return Err(refused(errno.to_string())),
    }
    // Only root may unmount; for others there is a program.
    let mut reasons = Vec::new();
    for program in ["fusermount3", "fusermount"] {
        let mut command = Command::new(program);
        command
            .args(["-u", "-z", "--"])
            .arg(at)
            // A signal of the terminal is not for it.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        match command.output() {
            Ok(output) if output.status.success() => return Ok(()),
            Ok(output) => reasons.push(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
            Err(error) => reasons.push(format!("{program}: {error}")),
        }
    }
    Err(refused(reasons.join("; ")))
}

/// Why nothing could be mounted, and what to do.
pub(super) fn refusal(at: &Path, error: &io::Error, allow_other: bool) -> MountError {
    let is_root = rustix::process::geteuid().is_root();
    let advice = if !Path::new("/dev/fuse").exists() {
        "there is no /dev/fuse: FUSE is not available here; load the kernel module (modprobe fuse), or start the container \
         with --device /dev/fuse --cap-add SYS_ADMIN"
    } else if access("/dev/fuse", Access::READ_OK | Access::WRITE_OK).is_err() {
        "this user may not open /dev/fuse; its mode must be 0666"
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
        // A helper program's words end with their line.
        reason: format!("{}; {advice}", error.to_string().trim_end().replace('\n', ": ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_read_with_odd_names() {
        let read = |line: &str| Line::of(line.as_bytes()).map(|line| (line.at, line.kind, line.device));
        let line =
            r"129 29 0:51 / /mnt/two\040words\134 rw,nosuid master:1 - fuse.outhaul outhaul ro,user_id=0";
        let expected = |at: &str| Some((PathBuf::from(at), TYPE.to_owned(), "0:51".to_owned()));
        assert_eq!(read(line), expected(r"/mnt/two words\"));
        let line = "129 29 0:51 / /mnt ro - fuse outhaul ro,user_id=0";
        assert_eq!(read(line), expected("/mnt"));
        assert_eq!(read("129 29 0:51 / /mnt rw"), None);
        let latin = Line::of(b"130 29 8:1 / /media/M\xfc rw shared:1 - vfat /dev/sdb1 rw").unwrap();
        assert_eq!(latin.at.as_os_str().as_encoded_bytes(), b"/media/M\xfc");
        assert_eq!(top_of(&mounts(), Path::new("/proc")).unwrap().kind, "proc");
    }

    #[test]
    fn what_others_mount_at_the_same_place_is_not_ours() {
        let ours = "129 29 0:51 / /mnt ro - fuse.outhaul outhaul ro";
        let another = "130 29 0:52 / /mnt ro - fuse.outhaul outhaul ro";
        let disk = "131 29 8:1 / /mnt rw - ext4 /dev/sda1 rw";
        let elsewhere = "132 29 0:51 / /srv ro - fuse.outhaul outhaul ro";
        let over_it = "133 29 8:2 / /srv rw - ext4 /dev/sdb1 rw";
        for (lines, expected) in [
            (&[ours][..], Whereabouts::OnTop),
            (&[disk, ours], Whereabouts::OnTop),
            (&[ours, elsewhere], Whereabouts::OnTop),
            (&[ours, disk], Whereabouts::Covered),
            (&[ours, another], Whereabouts::Covered),
            (&[another], Whereabouts::Gone),
            (&[disk], Whereabouts::Gone),
            (&[elsewhere], Whereabouts::Moved("/srv".into())),
            (&[elsewhere, over_it], Whereabouts::Covered),
            (&[], Whereabouts::Gone),
        ] {
            let all: Vec<Line> = lines
                .iter()
                .filter_map(|line| Line::of(line.as_bytes()))
                .collect();
            assert_eq!(
                whereabouts(&all, Path::new("/mnt"), "0:51"),
                expected,
                "{lines:?}"
            );
        }
    }

    #[test]
    fn nothing_is_hidden_that_the_mount_needs() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::os::unix::fs::symlink(dir.path(), path("link")).unwrap();
        fs::create_dir(path("state")).unwrap();
        for (directory, store, is_refused) in [
            ("builds", "state/mount", false),
            ("state/builds", "state/mount", false),
            ("builds", "builds2", false),
            ("builds", "builds/store", true),
            ("builds", "link/builds/new/store", true),
            ("link/builds", "builds", true),
            ("builds", "other/../builds/store", true),
            ("state/mount", "state/mount", true),
            ("state/mount/sha256", "state/mount", true),
            // The state directory itself.
            (".", "elsewhere", true),
            ("link/state", "elsewhere", true),
        ] {
            let refused = hides_nothing(&path(directory), &path(store), &[path("state")]);
            assert_eq!(refused.is_err(), is_refused, "{directory} {store}");
        }
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
