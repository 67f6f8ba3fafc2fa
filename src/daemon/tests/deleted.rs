//! Directories that were deleted with the outputs in them.

use std::{fs, path::Path};

use super::absent;
use crate::{
    action_cache::write::{Action, Metadata, Written},
    digest::DigestFunction,
};

/// Bazel's action cache has these outputs.
fn caches(output_base: &Path, paths: &[&str]) {
    let directory = output_base.join("action_cache");
    fs::create_dir_all(&directory).unwrap();
    let mut cache = Written::new(16);
    for path in paths {
        let digest = absent(path);
        let metadata = Metadata {
            hash: digest.hash().to_vec(),
            size: i64::try_from(digest.size()).unwrap(),
            expires_ms: -1,
            link_to: None,
        };
        let action = Action {
            primary: (*path).to_owned(),
            files: vec![((*path).to_owned(), metadata)],
            ..Action::default()
        };
        cache.put(&action, false);
    }
    fs::write(directory.join("action_cache_v16.blaze"), &cache.actions).unwrap();
    fs::write(directory.join("filename_index_v16.blaze"), &cache.index).unwrap();
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
    fs::create_dir(&base).unwrap_or_default();
    caches(
        &base,
        &["bazel-out/k8/bin/link/pkg/lib", "bazel-out/k8/bin/file/lib"],
    );
    std::os::unix::fs::symlink(&outside, bin.join("link")).unwrap();
    fs::write(bin.join("file"), "").unwrap();
    assert_eq!(deleted(), None);
    assert!(!bin.join("now").exists());
    assert_eq!(fs::read_dir(outside).unwrap().count(), 0);
    assert!(bin.join("file").is_file());
}
