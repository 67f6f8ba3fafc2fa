//! Capabilities, action results, trees and what is missing.

use bazel_remote_apis::build::bazel::remote::execution::v2::{
    self as reapi, ActionResult, Directory, DirectoryNode, FileNode, OutputDirectory, OutputFile,
};
use prost::Message as _;
use tonic::Status;

use super::{super::expand::TreeRef, *};
use crate::output::OutputContent;

fn wire(digest: &Digest) -> Option<reapi::Digest> {
    Some(client::to_wire(digest))
}

fn node(name: &str, digest: &Digest) -> DirectoryNode {
    DirectoryNode {
        name: name.into(),
        digest: wire(digest),
    }
}

/// A directory of one file.
fn directory(file: &str) -> Directory {
    Directory {
        files: vec![FileNode {
            name: file.into(),
            digest: wire(&digest(file.as_bytes())),
            is_executable: true,
            ..FileNode::default()
        }],
        ..Directory::default()
    }
}

#[tokio::test]
async fn capabilities_are_asked_once_by_all_who_want_them() {
    let fake = Fake::new();
    let cache = client(&fake, |o| o.instance_name = "main".into()).await;
    let all = futures::future::join_all((0..20).map(|_| cache.capabilities())).await;
    assert!(all.iter().all(Result::is_ok));
    assert_eq!(fake.script().log, ["capabilities main"]);
    let capabilities = all[0].clone().unwrap();
    assert_eq!(capabilities.digest_functions, [DigestFunction::Sha256]);
    // No limit is gRPC's limit, not none.
    assert!((1..4 * 1024 * 1024).contains(&capabilities.max_batch_bytes));
    assert!(!capabilities.zstd_batches && !capabilities.zstd_streams);
}

#[tokio::test]
async fn a_failure_to_get_capabilities_is_not_remembered() {
    let fake = Fake::new();
    fake.script().capability_errors = [Status::permission_denied("later")].into();
    let cache = client(&fake, |_| {}).await;
    assert_eq!(
        cache.capabilities().await.unwrap_err().kind,
        RemoteErrorKind::Denied
    );
    assert!(cache.capabilities().await.is_ok());
}

#[tokio::test]
async fn a_server_that_cannot_say_is_taken_for_a_plain_one() {
    let fake = Fake::new();
    fake.script().capability_errors = [Status::unimplemented("what?")].into();
    let cache = client(&fake, |_| {}).await;
    let capabilities = cache.capabilities().await.unwrap();
    assert!(!capabilities.zstd_streams && capabilities.max_batch_bytes > 0);
}

#[tokio::test]
async fn an_unknown_digest_function_is_refused_with_what_there_is() {
    let fake = Fake::new();
    fake.script().functions = vec![1, 4, 77];
    let cache = client(&fake, |o| o.digest_function = DigestFunction::Blake3).await;
    let error = cache.capabilities().await.unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Rejected);
    let shown = error.to_string();
    assert!(
        shown.contains("blake3; it supports sha256, vso, number 77"),
        "{shown}"
    );
    assert_eq!(cache.probe().await.unwrap_err(), error);
    // Every reader gets the same.
    let answers = cache.read_batch(&[digest(b"a")], &attribution(), false).await;
    assert_eq!(answers[0].1.as_ref().unwrap_err(), &error);
}

#[tokio::test]
async fn missing_blobs_are_reported_in_order_and_once() {
    let fake = Fake::new();
    let there = fake.put(b"there");
    let (x, y) = (digest(b"x"), digest(b"y"));
    let cache = client(&fake, |_| {}).await;
    let asked = [y.clone(), there, x.clone(), y.clone(), digest(b"")];
    let missing = cache.find_missing(&asked, &attribution()).await.unwrap();
    assert_eq!(missing, [y, x]);
    assert_eq!(fake.count("find 3"), 1);
}

#[tokio::test]
async fn an_action_without_a_result_is_none_and_not_remembered() {
    let fake = Fake::new();
    let cache = client(&fake, |_| {}).await;
    let action = digest(b"action");
    assert_eq!(cache.action_result(&action, &attribution()).await, Ok(None));
    fake.script()
        .actions
        .insert(action.hash_hex(), ActionResult::default());
    assert!(
        cache
            .action_result(&action, &attribution())
            .await
            .unwrap()
            .is_some()
    );
    cache.action_result(&action, &attribution()).await.unwrap();
    assert_eq!(fake.count("action"), 2);
}

#[tokio::test]
async fn an_action_is_expanded_with_its_trees() {
    let fake = Fake::new();
    let leaf = directory("leaf");
    let leaf_digest = digest(&leaf.encode_to_vec());
    let tree = reapi::Tree {
        root: Some(Directory {
            directories: vec![node("sub", &leaf_digest)],
            ..directory("top")
        }),
        children: vec![leaf],
    };
    let tree_digest = fake.put(&tree.encode_to_vec());
    let action = digest(b"action");
    let result = ActionResult {
        output_files: vec![OutputFile {
            path: "bazel-out/bin/f".into(),
            digest: wire(&digest(b"f")),
            ..OutputFile::default()
        }],
        output_directories: vec![OutputDirectory {
            path: "bazel-out/bin/t".into(),
            tree_digest: wire(&tree_digest),
            ..OutputDirectory::default()
        }],
        ..ActionResult::default()
    };
    fake.script().actions.insert(action.hash_hex(), result);
    let cache = client(&fake, |_| {}).await;
    for _ in 0..2 {
        let entries = expand_action(&cache, &action, &attribution())
            .await
            .unwrap()
            .unwrap();
        let shown: Vec<_> = entries
            .iter()
            .map(|e| (e.path.as_str(), e.is_executable))
            .collect();
        assert_eq!(
            shown,
            [
                ("bazel-out/bin/f", false),
                ("bazel-out/bin/t/sub/leaf", true),
                ("bazel-out/bin/t/top", true)
            ]
        );
        assert_eq!(entries[1].content, OutputContent::Blob(digest(b"leaf")));
    }
    assert_eq!(fake.count("batch"), 1);
}

#[tokio::test]
async fn a_tree_that_is_not_what_its_digest_says_is_refused() {
    let fake = Fake::new();
    let tree = fake.put(b"\x0a\x00");
    fake.script().blobs.insert(tree.hash_hex(), b"\x0a\x02".to_vec());
    let cache = client(&fake, |_| {}).await;
    let error = cache
        .tree(&TreeRef::Tree(tree), &attribution())
        .await
        .unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Protocol);
    assert!(error.to_string().contains("with the digest"), "{error}");
    // Once more on another connection, and no more.
    assert_eq!(fake.count("batch"), 2);
}

#[tokio::test]
async fn a_root_directory_is_fetched_by_pages_or_level_by_level() {
    for no_get_tree in [false, true] {
        let fake = Fake::new();
        fake.script().no_get_tree = no_get_tree;
        let mut below = fake.put(&directory("leaf").encode_to_vec());
        for level in ["c", "b", "a"] {
            let directory = Directory {
                directories: vec![node(level, &below), node("empty", &digest(b""))],
                ..Directory::default()
            };
            below = fake.put(&directory.encode_to_vec());
        }
        let cache = client(&fake, |_| {}).await;
        let tree = cache.tree(&TreeRef::Root(below), &attribution()).await.unwrap();
        let entries = expand::expand_tree(None, &tree, 100).unwrap();
        let paths: Vec<_> = entries.iter().map(|e| e.path.as_str()).collect();
        assert_eq!(paths, ["a/b/c/leaf", "a/b/empty", "a/empty", "empty"]);
        assert_eq!(fake.count("tree"), if no_get_tree { 1 } else { 2 });
        assert_eq!(fake.count("batch"), if no_get_tree { 4 } else { 0 });
    }
}

#[tokio::test]
async fn a_directory_that_is_gone_is_reported_as_missing() {
    let fake = Fake::new();
    let gone = digest(b"gone");
    let root = Directory {
        directories: vec![node("d", &gone)],
        ..Directory::default()
    };
    let root = fake.put(&root.encode_to_vec());
    let cache = client(&fake, |_| {}).await;
    let error = cache
        .tree(&TreeRef::Root(root), &attribution())
        .await
        .unwrap_err();
    assert!(error.is_not_found());
    assert!(error.to_string().contains(&gone.to_string()), "{error}");
}

#[tokio::test]
async fn a_named_digest_function_is_in_every_request() {
    let fake = Fake::new();
    fake.script().functions = vec![9];
    let a = Digest::of(DigestFunction::Blake3, b"a");
    fake.script().blobs.insert(a.hash_hex(), b"a".to_vec());
    let cache = client(&fake, |o| o.digest_function = DigestFunction::Blake3).await;
    assert_eq!(
        read_blob(&cache, &a, &attribution()).await.unwrap().as_ref(),
        b"a"
    );
    let mut sink = reading::Collect::default();
    cache
        .read_stream(&a, 0, &attribution(), false, &mut sink)
        .await
        .unwrap();
    assert_eq!(fake.count(&format!("read 0 blobs/blake3/{}/1", a.hash_hex())), 1);
}
