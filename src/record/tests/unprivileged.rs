//! As a user who is not root: only then can a file be unreadable.

use std::{fs, os::unix::fs::PermissionsExt as _, process::Command};

use super::*;

/// Set in the process that has given up its privileges: where to work.
const DIRECTORY: &str = "OUTHAUL_TEST_UNPRIVILEGED";

#[test]
fn a_store_that_must_not_be_read_or_written_is_left_alone_and_the_record_works_from_memory() {
    if let Some(dir) = std::env::var_os(DIRECTORY) {
        take_permissions_away(Path::new(&dir));
        return;
    }
    if !rustix::process::geteuid().is_root() {
        take_permissions_away(tempfile::tempdir().unwrap().path());
        return;
    }
    let nobody = 65534;
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(dir.path(), Some(nobody), Some(nobody)).unwrap();
    // A copy: the build directory need not be readable for everybody.
    let program = dir.path().join("tests");
    fs::copy("/proc/self/exe", &program).unwrap();
    let name = "a_store_that_must_not_be_read_or_written_is_left_alone_and_the_record_works_from_memory";
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&program)
        .args(["--exact", "--nocapture"])
        .arg(format!("record::tests::unprivileged::{name}"))
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

fn take_permissions_away(dir: &Path) {
    for (what, mode) in [
        ("record", 0),
        ("record/db", 0),
        ("record/conf", 0),
        ("record/db", 0o400),
    ] {
        let state = tempfile::tempdir_in(dir).unwrap();
        let (record, _) = open(state.path());
        let root = record.root("/exec", 1, 2);
        record.put_outputs(root, numbered_rows(0..50));
        run(record.flush()).unwrap();
        drop(record);
        let path = state.path().join(what);
        let before = fs::metadata(&path).unwrap().permissions();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let (record, opening) = open(state.path());
        assert!(
            matches!(&opening, Opening::Unavailable { reason } if reason.contains("denied")),
            "{what}: {opening:?}"
        );
        let root = record.root("/exec", 1, 2);
        let (path_of_new, row) = numbered(1000);
        record.put_outputs(root, vec![(path_of_new.clone(), row.clone())]);
        assert_eq!(record.output(root, &path_of_new), Some(row), "{what}");
        assert!(!record.health().is_ok(), "{what}");
        drop(record);
        fs::set_permissions(&path, before).unwrap();
        let (record, opening) = open(state.path());
        assert_eq!(opening, Opening::Existing, "{what}");
        let root = record.root("/exec", 1, 2);
        assert!(record.output(root, &numbered(7).0).is_some(), "{what}");
    }
}
