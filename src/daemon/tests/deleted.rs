//! Directories that were deleted with the outputs in them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{
    super::deleted::{Deleted, look},
    absent,
    runfiles::metadata,
};
use crate::{
    action_cache::write::{Action, Written},
    digest::DigestFunction,
};

/// Bazel's action cache has these outputs.
fn caches(output_base: &Path, paths: &[&str]) {
    let mut cache = Written::new(16);
    for path in paths {
        let action = Action {
            primary: (*path).to_owned(),
            files: vec![((*path).to_owned(), metadata(&absent(path)))],
            ..Action::default()
        };
        cache.put(&action, false);
    }
    cache.save(output_base, 16);
}

fn found(deleted: Deleted) -> Option<PathBuf> {
    match deleted {
        Deleted::Nothing => None,
        Deleted::Directory(directory) => Some(directory),
        Deleted::Unknown => panic!("there is an action cache, or none has begun"),
    }
}

#[test]
fn what_an_interrupted_build_knows_is_unknown() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path();
    let deleted = || look(base, DigestFunction::Sha256, None);
    assert_eq!(deleted(), Deleted::Nothing);
    fs::create_dir(base.join("action_cache")).unwrap();
    assert_eq!(deleted(), Deleted::Nothing);
    fs::write(base.join("action_cache/filename_index_v16.journal"), "names").unwrap();
    assert_eq!(deleted(), Deleted::Unknown);
    caches(base, &["bazel-out/k8-fastbuild/bin/lib"]);
    assert_ne!(deleted(), Deleted::Unknown);
}

#[test]
fn what_bazel_knows_outputs_in_is_missed_once() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path();
    let deleted = || found(look(base, DigestFunction::Sha256, None));
    assert_eq!(deleted(), None, "there is no action cache");
    caches(
        base,
        &[
            "bazel-out/k8-fastbuild/bin/pkg/lib",
            "bazel-out/k8-opt/bin/pkg/sub/lib",
        ],
    );
    assert_eq!(deleted(), Some(base.join("execroot")));
    let root = base.join("execroot/_main");
    let of = |configuration: &str| root.join(format!("bazel-out/{configuration}/bin/pkg"));
    fs::create_dir_all(of("k8-fastbuild")).unwrap();
    fs::create_dir_all(of("k8-opt").join("sub")).unwrap();
    assert_eq!(deleted(), None);
    for (gone, expected) in [
        (of("k8-fastbuild"), of("k8-fastbuild")),
        (of("k8-opt").join("sub"), of("k8-opt").join("sub")),
        (of("k8-opt"), of("k8-opt").join("sub")),
        (root.join("bazel-out/k8-opt"), of("k8-opt").join("sub")),
    ] {
        fs::remove_dir_all(&gone).unwrap();
        assert_eq!(deleted(), Some(expected.clone()));
        assert!(expected.is_dir());
        assert_eq!(deleted(), None, "{}", gone.display());
    }
    fs::remove_dir_all(root).unwrap();
    assert_eq!(deleted(), Some(base.join("execroot")));
}

#[test]
fn outputs_of_a_workspace_with_another_name_are_not_those_of_the_next_build() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path();
    caches(base, &["bazel-out/k8-fastbuild/bin/pkg/lib"]);
    fs::create_dir_all(base.join("execroot/old/bazel-out/k8-fastbuild/bin/pkg")).unwrap();
    let deleted = |name| found(look(base, DigestFunction::Sha256, Some(name)));
    assert_eq!(deleted("old"), None);
    assert_eq!(deleted("new"), Some(base.join("execroot/new")));
    let bin = base.join("execroot/new/bazel-out/k8-fastbuild/bin");
    fs::create_dir_all(&bin).unwrap();
    assert_eq!(deleted("new"), Some(bin.join("pkg")));
    assert_eq!(deleted("new"), None);
}

#[test]
fn nothing_is_made_through_a_link_or_in_the_place_of_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let (base, outside) = (dir.path().join("base"), dir.path().join("outside"));
    let deleted = || found(look(&base, DigestFunction::Sha256, None));
    let bin = base.join("execroot/_main/bazel-out/k8/bin");
    fs::create_dir_all(&bin).unwrap();
    fs::create_dir(&outside).unwrap();
    caches(
        &base,
        &[
            "bazel-out/k8/bin/link/pkg/lib",
            "bazel-out/k8/bin/file/lib",
            // A file now, which another action had as a directory.
            "bazel-out/k8/bin/now",
            "bazel-out/k8/bin/now/before/lib",
        ],
    );
    std::os::unix::fs::symlink(&outside, bin.join("link")).unwrap();
    fs::write(bin.join("file"), "").unwrap();
    assert_eq!(deleted(), None);
    assert!(!bin.join("now").exists());
    assert_eq!(fs::read_dir(outside).unwrap().count(), 0);
    assert!(bin.join("file").is_file());
}
