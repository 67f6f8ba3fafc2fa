//! Outputs of other output roots on this machine as sources.

use super::*;

/// What is done between the builds of two roots, and what comes of the second.
struct Case {
    name: &'static str,
    /// Done to the first root.
    before: fn(&Fixture),
    /// The output's path in the second root's build.
    second: &'static str,
    /// Blobs that the cache is asked for.
    asked: u64,
    source: &'static str,
}

fn first(f: &Fixture) -> std::path::PathBuf {
    f.dir.path().join("execroot/_main/bazel-out/k8/bin/a")
}

fn rewrite(f: &Fixture, bytes: &[u8]) {
    let path = first(f);
    let before = std::fs::metadata(&path).unwrap();
    let mut modes = before.permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut modes, 0o755);
    std::fs::set_permissions(&path, modes).unwrap();
    std::fs::write(&path, bytes).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(before.modified().unwrap()).unwrap();
}

/// Blobs that the cache was asked for.
fn asked(f: &Fixture) -> u64 {
    let stats = f.cache.stats();
    stats.batch_read_blobs + stats.stream_reads
}

async fn build(f: &mut Fixture, invocation: &str, root: &str, workspace: &str, files: Vec<File>) {
    // The fixture has begun the first one.
    if invocation != f.key.invocation_id {
        f.key.invocation_id = invocation.to_owned();
        let root = f.dir.path().join(root);
        f.begin(&root, workspace).await;
    }
    f.set("0", files, &[]).await;
    f.complete("//:a", &["0"]).await;
    f.finish().await;
    f.services.engine.settled(&f.key).await;
    // What came of the outputs is on record then.
    f.services.engine.snapshot(invocation).await.unwrap();
}

/// Two roots, of which the first one has an output.
async fn first_built() -> (Fixture, Digest) {
    let mut f = Fixture::new(false).await;
    std::fs::create_dir_all(f.dir.path().join("second/execroot/_main")).unwrap();
    let digest = f.cache.store().put("bytes");
    let files = vec![output("a", &digest)];
    build(&mut f, "invocation", "execroot/_main", "/w", files).await;
    (f, digest)
}

#[tokio::test]
async fn what_another_root_has_is_copied_and_verified() {
    let cases = [
        Case {
            name: "the same path",
            before: |_| {},
            second: "a",
            asked: 0,
            source: "batch from local files",
        },
        Case {
            name: "another path",
            before: |_| {},
            second: "moved/b",
            asked: 0,
            source: "batch from local files",
        },
        Case {
            name: "deleted meanwhile",
            before: |f| std::fs::remove_file(first(f)).unwrap(),
            second: "a",
            asked: 1,
            source: "batch",
        },
        Case {
            name: "changed, which its size shows",
            before: |f| rewrite(f, b"other bytes"),
            second: "a",
            asked: 1,
            source: "batch",
        },
        Case {
            name: "changed, which only its bytes show",
            before: |f| rewrite(f, b"tybes"),
            second: "a",
            asked: 1,
            source: "batch",
        },
    ];
    for case in cases {
        let (mut f, digest) = first_built().await;
        (case.before)(&f);
        let before = asked(&f);
        let files = vec![output(case.second, &digest)];
        build(&mut f, "two", "second/execroot/_main", "/w2", files).await;
        let name = case.name;
        assert_eq!(asked(&f) - before, case.asked, "{name}");
        let path = format!("bazel-out/k8/bin/{}", case.second);
        let there = f.dir.path().join("second/execroot/_main").join(&path);
        assert_eq!(std::fs::read(&there).unwrap(), b"bytes", "{name}");
        let (row, _) = f.services.engine.snapshot("two").await.unwrap();
        let path = ExecPath::new(&path).unwrap();
        let output = f.services.record.output(row.root.unwrap(), &path).unwrap();
        assert_eq!(*output.source, *case.source, "{name}");
        // Never linked.
        if case.asked == 0 {
            use std::os::unix::fs::MetadataExt as _;
            let inode = |path: &std::path::Path| std::fs::metadata(path).unwrap().ino();
            assert_ne!(inode(&there), inode(&first(&f)), "{name}");
        }
    }
}

#[tokio::test]
async fn a_root_whose_outputs_were_deleted_gets_them_from_another_one() {
    let (mut f, digest) = first_built().await;
    let files = vec![output("a", &digest)];
    build(&mut f, "two", "second/execroot/_main", "/w", files).await;
    std::fs::remove_dir_all(f.dir.path().join("execroot/_main/bazel-out")).unwrap();
    f.cache.store().clear();
    build(
        &mut f,
        "three",
        "execroot/_main",
        "/w",
        vec![output("a", &digest)],
    )
    .await;
    assert_eq!(std::fs::read(first(&f)).unwrap(), b"bytes");
}

#[tokio::test]
async fn without_local_sources_everything_comes_from_the_cache() {
    let (mut f, digest) = first_built().await;
    f.services.engine.set_policy(Policy {
        no_local_sources: true,
        ..Policy::default()
    });
    let before = asked(&f);
    let files = vec![output("a", &digest)];
    build(&mut f, "two", "second/execroot/_main", "/w2", files).await;
    assert_eq!(asked(&f) - before, 1);
}

#[tokio::test]
async fn what_is_asked_for_by_path_is_copied_from_another_root_too() {
    let (mut f, digest) = first_built().await;
    let files = vec![output("a", &digest)];
    build(&mut f, "two", "second/execroot/_main", "/w2", files).await;
    let second = f.dir.path().join("second/execroot/_main/bazel-out/k8/bin/a");
    f.cache.store().clear();
    for (no_local_sources, outcome) in [
        (true, pb::OutputOutcome::Unspecified),
        (false, pb::OutputOutcome::Downloaded),
        // The record has a stamp of it this time.
        (false, pb::OutputOutcome::Downloaded),
    ] {
        std::fs::remove_file(&second).unwrap_or_default();
        f.services.engine.set_policy(Policy {
            no_local_sources,
            ..Policy::default()
        });
        let path = second.display().to_string();
        let got = f.services.service.materialize(vec![path]).await;
        assert_eq!(got[0].outcome(), outcome, "{:?}", got[0]);
    }
    assert_eq!(std::fs::read(&second).unwrap(), b"bytes");
}
