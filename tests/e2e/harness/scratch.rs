//! Temporary directories that a Bazel can live in.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// A directory straight below `/tmp`: Bazel 7 sees that place, and a socket's path is short there, whatever `TMPDIR`
/// says. Removed when dropped, read-only trees and all; `OUTHAUL_KEEP=1` keeps it.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new(purpose: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix(&format!("oh-{purpose}-"))
            .tempdir_in("/tmp")
            .unwrap();
        Self(dir.keep())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        self.0.join(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::env::var("OUTHAUL_KEEP").as_deref() == Ok("1") {
            eprintln!("kept: {}", self.0.display());
            return;
        }
        open_up(&self.0);
        // What is left over is below /tmp, and no reason to fail.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Lets the owner write to every directory: only root may remove what is in others.
fn open_up(dir: &Path) {
    let _ = std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755));
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            open_up(&entry.path());
        }
    }
}

/// Kills what lives in a directory when this process ends, however it ends, and removes the directory. `processes` are
/// words of a shell, to which the directory is `$0`.
pub(super) fn clean_up_at_the_end(dir: &Scratch, processes: &str) {
    if std::env::var("OUTHAUL_KEEP").as_deref() == Ok("1") {
        return;
    }
    let script = format!(
        "cat; [ -d \"$0\" ] || exit; kill {processes}; sleep 1; chmod -R u+rwX \"$0\"; rm -rf \"$0\""
    );
    let mut process = Command::new("sh");
    process
        .arg("-c")
        .arg(script)
        .arg(dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // With its standard input, which is open until this process is gone.
    std::mem::forget(process.spawn().unwrap());
}

/// Copies a directory with everything in it.
pub(super) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), &target).unwrap();
        }
    }
}
