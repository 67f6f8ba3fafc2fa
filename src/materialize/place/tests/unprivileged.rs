//! As a user who is not root: only then does a read-only directory refuse.

use std::process::Command;

use super::*;

/// Set in the process that has given up its privileges: where to work.
const DIRECTORY: &str = "OUTHAUL_TEST_UNPRIVILEGED";

#[test]
fn without_privileges_read_only_trees_are_filled_too() {
    if let Some(dir) = std::env::var_os(DIRECTORY) {
        fill_a_read_only_tree(Path::new(&dir));
        return;
    }
    if !rustix::process::geteuid().is_root() {
        fill_a_read_only_tree(&std::env::temp_dir());
        return;
    }
    let nobody = 65534;
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(dir.path(), Some(nobody), Some(nobody)).unwrap();
    // The build directory need not be readable for everybody; a copy in the temp directory is. By the link in `/proc`,
    // for a build may have replaced the file that we were started from.
    let program = dir.path().join("tests");
    fs::copy("/proc/self/exe", &program).unwrap();
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&program)
        .args(["--exact", "--nocapture"])
        .arg("materialize::place::tests::unprivileged::without_privileges_read_only_trees_are_filled_too")
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

fn fill_a_read_only_tree(dir: &Path) {
    let mut f = Fixture::beneath(dir);
    let tree = f.path("bazel-out/tree");
    fs::create_dir(&tree).unwrap();
    set_mode(&tree, 0o555);
    assert!(
        fs::write(tree.join("direct"), "").is_err(),
        "the test is about nothing"
    );
    f.place("bazel-out/tree/file", "one").unwrap();
    f.place("bazel-out/tree/file", "two").unwrap();
    f.place("bazel-out/tree/sub/deep/file", "x").unwrap();
    f.placer
        .place_symlink(&exec("bazel-out/tree/link"), "file", &f.epoch, 1)
        .unwrap();
    let mut large = f
        .placer
        .begin_large(&exec("bazel-out/tree/large"), &digest("big"))
        .unwrap();
    large.write(b"big").unwrap();
    large.finish(&f.epoch, 1).unwrap();
    assert_eq!(f.read("bazel-out/tree/file"), "two");
    assert_eq!(mode(&tree), 0o555);

    let foreign = OutputRoot::open(Path::new("/"), false).unwrap();
    let mut placer = Placer::new(Arc::new(foreign), PlaceOptions::default());
    let file = (exec("not-ours/file"), digest("x"), "x");
    let error = placer
        .place_many(&[item(&file)], &f.epoch, 1)
        .remove(0)
        .unwrap_err();
    assert_eq!(error.kind, PlaceErrorKind::ReadOnly);
    set_mode(&tree, 0o755);
}
