//! Directories that were deleted with the outputs in them.

use std::{fs, path::Path};

use super::{absent, runfiles::metadata};
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

#[test]
fn what_bazel_knows_outputs_in_is_missed_once() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path();
    let deleted = || super::super::deleted::directory(base, DigestFunction::Sha256);
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
fn nothing_is_made_through_a_link_or_in_the_place_of_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let (base, outside) = (dir.path().join("base"), dir.path().join("outside"));
    let deleted = || super::super::deleted::directory(&base, DigestFunction::Sha256);
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
