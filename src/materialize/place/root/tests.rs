use std::fs as std_fs;

use super::*;

fn is_gone(result: Result<(), PlaceError>) -> bool {
    matches!(
        result,
        Err(PlaceError {
            kind: PlaceErrorKind::RootGone(_),
            ..
        })
    )
}

#[test]
fn a_replaced_root_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("root");
    std_fs::create_dir(&path).unwrap();
    let root = OutputRoot::open(&path, false).unwrap();
    assert!(root.is_same());
    std_fs::rename(&path, dir.path().join("old")).unwrap();
    assert!(is_gone(root.guard("bazel-out/a")));
    std_fs::create_dir(&path).unwrap();
    assert!(!root.is_same());
    assert!(is_gone(root.guard("bazel-out/a")));
}

#[test]
fn a_cleaned_bazel_out_is_gone_even_when_there_is_a_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("bazel-out");
    std_fs::create_dir(&out).unwrap();
    let root = OutputRoot::open(dir.path(), false).unwrap();
    root.guard("bazel-out/x").unwrap();
    assert!(!root.may_make(OsStr::new("bazel-out")));
    std_fs::remove_dir(&out).unwrap();
    assert!(is_gone(root.guard("bazel-out/x")));
    std_fs::create_dir(&out).unwrap();
    assert!(
        is_gone(root.guard("bazel-out/x")),
        "the held inode's number is not reused"
    );
    root.begin_build(false).unwrap();
    root.guard("bazel-out/x").unwrap();
}

#[test]
fn only_a_fresh_build_may_make_bazel_out() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("bazel-out");
    let root = OutputRoot::open(dir.path(), false).unwrap();
    assert!(is_gone(root.guard("bazel-out/x")));
    root.begin_build(true).unwrap();
    root.guard("bazel-out/x").unwrap();
    assert!(root.may_make(OsStr::new("bazel-out")));
    std_fs::create_dir(&out).unwrap();
    root.guard("bazel-out/x").unwrap();
    assert!(
        !root.may_make(OsStr::new("bazel-out")),
        "once it was there, it is not made again"
    );
    std_fs::remove_dir(&out).unwrap();
    assert!(is_gone(root.guard("bazel-out/x")));
}

#[test]
fn what_replaces_a_link_belongs_to_the_build_that_found_the_link() {
    for (fresh, is_made_by_us) in [(true, false), (true, true), (false, false)] {
        let dir = tempfile::tempdir().unwrap();
        let (out, kept) = (dir.path().join("bazel-out"), dir.path().join("kept"));
        std_fs::create_dir(&kept).unwrap();
        std::os::unix::fs::symlink("/nowhere", &out).unwrap();
        let root = OutputRoot::open(dir.path(), false).unwrap();
        root.begin_build(fresh).unwrap();
        if fresh {
            root.end_build().unwrap();
        }
        std_fs::remove_file(&out).unwrap();
        if is_made_by_us {
            root.guard("bazel-out/x").unwrap();
            assert!(root.may_make(OsStr::new("bazel-out")));
        }
        // As Bazel puts back the directory that it had before.
        std_fs::rename(&kept, &out).unwrap();
        root.guard("bazel-out/x").unwrap();
        std_fs::rename(&out, &kept).unwrap();
        assert!(is_gone(root.guard("bazel-out/x")));
        std::os::unix::fs::symlink("/nowhere", &out).unwrap();
        assert!(
            is_gone(root.guard("bazel-out/x")),
            "this one was not there when it began"
        );
    }
}

#[test]
fn while_a_build_runs_another_bazel_out_is_its_own_and_after_that_none_is() {
    let dir = tempfile::tempdir().unwrap();
    let [out, old, new] = ["bazel-out", "old", "new"].map(|name| dir.path().join(name));
    let swap = || {
        std_fs::create_dir(&new).unwrap();
        std_fs::rename(&out, &old).unwrap();
        std_fs::rename(&new, &out).unwrap();
        std_fs::remove_dir(&old).unwrap();
    };
    std_fs::create_dir(&out).unwrap();
    let root = OutputRoot::open(dir.path(), false).unwrap();
    root.begin_build(true).unwrap();
    for _ in 0..3 {
        swap();
        root.guard("bazel-out/x").unwrap();
        root.guard("bazel-out/x").unwrap();
    }
    std_fs::rename(&out, &old).unwrap();
    assert!(is_gone(root.guard("bazel-out/x")), "it is not made again");
    assert!(!root.may_make(OsStr::new("bazel-out")));
    std::os::unix::fs::symlink(&old, &out).unwrap();
    assert!(is_gone(root.guard("bazel-out/x")), "a link is not the build's");
    assert!(!root.may_make(OsStr::new("bazel-out")));
    std_fs::remove_file(&out).unwrap();
    std_fs::rename(&old, &out).unwrap();
    swap();
    root.end_build().unwrap();
    root.guard("bazel-out/x").unwrap();
    swap();
    assert!(is_gone(root.guard("bazel-out/x")));
    // One that comes again from the journal has no more right to it.
    root.begin_build(false).unwrap();
    swap();
    assert!(is_gone(root.guard("bazel-out/x")));
}

#[test]
fn a_plain_output_directory_is_made_and_not_guarded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/b/");
    assert!(OutputRoot::open(&path, false).is_err());
    let root = OutputRoot::open(&path, true).unwrap();
    assert_eq!(root.path(), dir.path().join("a/b"));
    root.begin_build(false).unwrap();
    root.guard("bazel-out/x").unwrap();
    assert!(OutputRoot::open(Path::new("relative"), true).is_err());
}
