//! Builds whose `bazel-out` is a link that leads out: an output service has their outputs.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt as _, symlink},
    path::{Path, PathBuf},
};

use outhaul_testkit::cache::{BlobFault, Stats};

use super::*;
use crate::{bep::event::CommandLine, builds::Settlement, output::OutputContent, record::OutputState};

/// More than goes into a batch.
const LARGE: usize = (1 << 20) + 1;

/// A tree of another process.
struct Tree(tempfile::TempDir);

impl Tree {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("k8/bin")).unwrap();
        Self(dir)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.0.path().join("k8/bin").join(name), bytes).unwrap();
    }

    /// Everything there, with what changes when it is touched.
    fn state(&self) -> BTreeMap<PathBuf, (u64, u32, u64, i64, i64)> {
        let mut state = BTreeMap::new();
        let mut todo = vec![self.0.path().to_owned()];
        while let Some(path) = todo.pop() {
            let seen = fs::symlink_metadata(&path).unwrap();
            if seen.is_dir() {
                todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            }
            let times = (seen.ctime(), seen.ctime_nsec());
            state.insert(path, (seen.ino(), seen.mode(), seen.len(), times.0, times.1));
        }
        state
    }
}

/// A daemon with this policy for its next build; that of the fixture is over, and can't pass for the newer one.
async fn another(policy: Policy) -> Fixture {
    let f = Fixture::new(false).await;
    f.finish().await;
    timeout(PATIENCE, f.services.engine.settled(&f.key))
        .await
        .unwrap();
    f.services.engine.set_policy(policy);
    f
}

/// A daemon whose build has begun, and whose `bazel-out` leads to a tree.
async fn begun(tree: &Tree, policy: Policy) -> Fixture {
    let mut f = another(policy).await;
    f.again("served").await;
    // Bazel makes the link once targets are loaded, in the place of what was there.
    symlink(tree.0.path(), f.exec_root().join("bazel-out")).unwrap();
    f
}

async fn with_service(f: &mut Fixture) {
    let service = "experimental_remote_output_service".to_owned();
    f.send(Event::CommandLine(CommandLine {
        label: "canonical".to_owned(),
        options: vec![(service, "unix:/run/clientd".to_owned())],
    }))
    .await;
}

/// Names outputs of one target, and says what became of them.
async fn build(f: &mut Fixture, files: Vec<File>) -> (Settlement, InvocationRow) {
    f.set("0", files, &[]).await;
    f.complete("//:t", &["0"]).await;
    f.finish().await;
    let settlement = timeout(PATIENCE, f.services.engine.settled(&f.key))
        .await
        .unwrap();
    f.services.engine.done(&f.key).await;
    let row = f.services.record.invocation(&f.key.invocation_id).unwrap();
    (settlement, row)
}

fn warming() -> Policy {
    Policy {
        warm_output_service: true,
        ..Policy::default()
    }
}

/// What the cache has been asked for.
fn asked(stats: &Stats) -> (u64, u64) {
    (stats.batch_read_blobs, stats.stream_reads)
}

fn said<'a>(settlement: &'a Settlement, what: &str) -> &'a str {
    let found = settlement.messages.iter().find(|message| message.contains(what));
    found.unwrap_or_else(|| panic!("{what}: {settlement:?}"))
}

#[tokio::test]
async fn an_output_service_has_outputs_by_their_size_and_nothing_is_written_or_fetched() {
    for names_service in [true, false] {
        let tree = Tree::new();
        let mut f = begun(&tree, Policy::default()).await;
        let there = f.cache.store().put("bytes");
        // It is not read, as a lazy file system would fetch it.
        tree.write("there", "BYTES");
        tree.write("longer", "bytes and more");
        symlink("there", tree.0.path().join("k8/bin/by-link")).unwrap();
        symlink("nowhere", tree.0.path().join("k8/bin/link")).unwrap();
        // A file in the place of a directory on the way.
        tree.write("longer-dir", "bytes");
        fs::create_dir(tree.0.path().join("k8/bin/dir")).unwrap();
        let before = tree.state();
        if names_service {
            with_service(&mut f).await;
        }
        let link = |target: &str| File {
            content: Content::Symlink(target.to_owned()),
            ..output("link", &there)
        };
        let mut files: Vec<File> = ["there", "by-link", "longer", "dir", "lost", "longer-dir/below"]
            .iter()
            .map(|name| output(name, &there))
            .collect();
        files.push(link("nowhere"));
        let (settlement, row) = build(&mut f, files).await;
        assert_eq!(settlement.failed, 4, "{settlement:?}");
        let by = if names_service {
            "the output service unix:/run/clientd".to_owned()
        } else {
            format!("{}, where the link bazel-out leads,", tree.0.path().display())
        };
        assert!(settlement.messages[0].starts_with(&format!("{by} provides this build's outputs")));
        for name in ["lost", "longer-dir/below"] {
            assert!(said(&settlement, &format!("bin/{name}: ")).ends_with(&format!("{by} does not have it")));
        }
        for name in ["longer", "dir"] {
            assert!(said(&settlement, &format!("bin/{name}: ")).contains("something else in its place"));
        }
        assert_eq!(
            (row.outputs.present, row.outputs.downloaded, row.outputs.failed),
            (3, 0, 4)
        );
        assert_eq!(
            row.errors
                .iter()
                .filter(|e| e.contains("provides this build's outputs"))
                .count(),
            1
        );
        assert_eq!(asked(&f.cache.stats()), (0, 0));
        assert_eq!(tree.state(), before);
        // Bytes that were not read are not known to be right, and leases go on for them.
        let path = ExecPath::new("bazel-out/k8/bin/there").unwrap();
        let recorded = f.services.record.output(row.root.unwrap(), &path).unwrap();
        assert_eq!((recorded.state, recorded.stamp), (OutputState::Known, None));
        // And again, when all is there.
        f.again("again").await;
        if names_service {
            with_service(&mut f).await;
        }
        let (settlement, _) = build(&mut f, vec![output("there", &there), link("nowhere")]).await;
        assert_eq!(settlement.failed, 0, "{settlement:?}");
        // With the link gone, the tree is Bazel's own again.
        fs::remove_file(f.exec_root().join("bazel-out")).unwrap();
        f.again("own").await;
        let (settlement, row) = build(&mut f, vec![output("there", &there)]).await;
        assert_eq!(
            (settlement.failed, row.outputs.downloaded),
            (0, 1),
            "{settlement:?}"
        );
        assert_eq!(
            fs::read(f.exec_root().join("bazel-out/k8/bin/there")).unwrap(),
            b"bytes"
        );
        assert_eq!(tree.state(), before);
    }
}

#[tokio::test]
async fn what_bazel_puts_in_the_links_place_after_the_build_has_begun_gets_its_outputs() {
    let tree = Tree::new();
    let mut f = another(Policy::default()).await;
    let digest = f.cache.store().put("bytes");
    let (out, own) = (f.exec_root().join("bazel-out"), f.exec_root().join("local"));
    let before = tree.state();
    for (id, made) in [("moved back", true), ("not made yet", false)] {
        symlink(tree.0.path(), &out).unwrap();
        f.again(id).await;
        // The exec root has been opened.
        f.services.engine.snapshot(id).await.unwrap();
        fs::remove_file(&out).unwrap();
        if made {
            fs::create_dir(&own).unwrap();
            fs::rename(&own, &out).unwrap();
        }
        let (settlement, row) = build(&mut f, vec![output("a", &digest)]).await;
        assert_eq!(
            (settlement.failed, row.outputs.downloaded),
            (0, 1),
            "{id}: {settlement:?}"
        );
        assert_eq!(fs::read(out.join("k8/bin/a")).unwrap(), b"bytes");
        fs::remove_dir_all(&out).unwrap();
    }
    assert_eq!(tree.state(), before);
}

#[tokio::test]
async fn warming_reads_the_blobs_of_what_is_there_verified_and_drops_them() {
    let tree = Tree::new();
    let mut f = begun(&tree, warming()).await;
    let store = f.cache.store();
    let (small, large) = (store.put("small"), store.put(vec![7; LARGE]));
    let (bad, bad_large) = (store.put("wrong"), store.put(vec![8; LARGE]));
    let (evicted, lost) = (absent("evicted"), absent("lost"));
    tree.write("small", "small");
    tree.write("same", "small");
    for name in ["large", "bad_large"] {
        tree.write(name, vec![0; LARGE]);
    }
    tree.write("bad", "wrong");
    tree.write("evicted", "evicted");
    tree.write("empty", "");
    for digest in [&bad, &bad_large] {
        f.cache.faults().blob(digest, BlobFault::Corrupt, Times::Always);
    }
    let before = tree.state();
    with_service(&mut f).await;
    let files = vec![
        output("small", &small),
        output("same", &small),
        output("large", &large),
        output("bad", &bad),
        output("bad_large", &bad_large),
        output("evicted", &evicted),
        output("lost", &lost),
        output("empty", &absent("")),
    ];
    let (settlement, row) = build(&mut f, files).await;
    assert_eq!(settlement.failed, 4, "{settlement:?}");
    assert!(said(&settlement, "bin/evicted: ").contains("evicted from the cache"));
    assert!(said(&settlement, "bin/lost: ").ends_with("does not have it"));
    for name in ["bin/bad: ", "bin/bad_large: "] {
        assert!(said(&settlement, name).contains("verify"), "{settlement:?}");
    }
    assert_eq!(
        (row.outputs.present, row.outputs.downloaded, row.outputs.failed),
        (4, 0, 4)
    );
    assert!(
        row.errors.contains(&"warmed 3 files, 1.0 MiB".to_owned()),
        "{row:?}"
    );
    assert_eq!(tree.state(), before);
    // Nothing is left over of them either.
    assert!(!Path::new(&f.dir.path().join(".outhaul-tmp")).exists());
}

#[tokio::test]
async fn warming_is_for_output_services_alone() {
    let mut f = another(warming()).await;
    f.again("own").await;
    let digest = f.cache.store().put("bytes");
    let (settlement, row) = build(&mut f, vec![output("a", &digest)]).await;
    assert_eq!(
        (settlement.failed, row.outputs.downloaded, row.errors.len()),
        (0, 1, 0)
    );
    assert_eq!(
        fs::read(f.exec_root().join("bazel-out/k8/bin/a")).unwrap(),
        b"bytes"
    );
}

#[tokio::test]
async fn a_service_by_name_gets_nothing_placed_whatever_is_in_the_place_of_the_link() {
    let mut f = Fixture::new(false).await;
    with_service(&mut f).await;
    let bin = f.exec_root().join("bazel-out/k8/bin");
    fs::create_dir_all(&bin).unwrap();
    let digest = f.cache.store().put("bytes");
    let tree = File {
        content: Content::Inline("inline".into()),
        ..output("inline", &digest)
    };
    let (settlement, _) = build(&mut f, vec![output("a", &digest), tree]).await;
    assert_eq!(settlement.failed, 2, "{settlement:?}");
    assert_eq!(fs::read_dir(bin).unwrap().count(), 0);
    let path = ExecPath::new("bazel-out/k8/bin/a").unwrap();
    let root = f.services.record.invocation("invocation").unwrap().root.unwrap();
    let row = f.services.record.output(root, &path).unwrap();
    assert_eq!(row.content, OutputContent::Blob(digest));
}
