//! Tests that mean something only as a user who is not root: only then is a file unreadable, or a directory read-only.

use std::{fs, path::Path, process::Command};

/// Set in the process that has given up its privileges: where to work.
const DIRECTORY: &str = "OUTHAUL_TEST_UNPRIVILEGED";
const NOBODY: u32 = 65534;

/// Runs a test's body in a directory of its own, without privileges: here, or in a second process that runs this test
/// alone. `name` is the test's, with its modules.
pub(crate) fn run(name: &str, body: fn(&Path)) {
    if let Some(dir) = std::env::var_os(DIRECTORY) {
        body(Path::new(&dir));
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    if !rustix::process::geteuid().is_root() {
        body(dir.path());
        return;
    }
    std::os::unix::fs::chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    // The build directory need not be readable for everybody; a copy in the temp directory is. By the link in `/proc`,
    // for a build may have replaced the file that we were started from.
    let program = dir.path().join("tests");
    fs::copy("/proc/self/exe", &program).unwrap();
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&program)
        .args(["--exact", "--nocapture", name])
        .env(DIRECTORY, dir.path())
        .env("TMPDIR", dir.path())
        .current_dir(dir.path())
        .output();
    match output {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(text.contains("1 passed"), "{text}");
        }
        Ok(output) => panic!("{output:?}"),
        Err(error) => eprintln!("SKIPPED: no setpriv here: {error}"),
    }
}
