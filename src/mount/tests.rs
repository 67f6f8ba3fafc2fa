//! The store, with a cache and without a kernel.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, sync::Arc};

use futures::future::join_all;
use outhaul_testkit::{
    cache::{BlobFault, EmbeddedCache, RunningCache, Times},
    until,
};

use super::{
    error::ReadError,
    store::{Blob, Store},
};
use crate::{
    digest::Digest,
    exec_path::ExecPath,
    materialize::MaterializeOptions,
    output::Class,
    remote::{Attribution, RemoteOptions},
    sources::SourceCache,
    transport::Endpoint,
};

struct Rig {
    cache: RunningCache,
    dir: tempfile::TempDir,
    source: SourceCache,
}

impl Rig {
    async fn new() -> Self {
        let cache = EmbeddedCache::builder().start().await.unwrap();
        let endpoint = Endpoint::parse("--remote-cache", &cache.endpoint()).unwrap();
        let mut options = RemoteOptions::new(endpoint);
        options.retries = 0;
        Self {
            source: SourceCache::open(options).unwrap(),
            cache,
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn store(&self, bound: u64) -> Arc<Store> {
        Store::open(
            &self.dir.path().join("store"),
            bound,
            MaterializeOptions::default(),
        )
        .unwrap()
    }

    fn blob(&self, digest: &Digest) -> Blob {
        Blob {
            digest: digest.clone(),
            cache: Ok(self.source.clone()),
            tree: self.dir.path().join("tree").into(),
            path: ExecPath::new("bazel-out/file").unwrap(),
            mount: self.dir.path().join("mount").into(),
            attribution: Arc::new(Attribution::default()),
        }
    }

    /// Where a blob's file is.
    fn file(&self, digest: &Digest) -> std::path::PathBuf {
        let hash = digest.hash_hex();
        let name = format!("{hash}-{}", digest.size());
        self.dir.path().join("store/sha256").join(&hash[..2]).join(name)
    }
}

fn files_below(directory: &Path) -> usize {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.path().is_dir() {
            true => files_below(&entry.path()),
            false => 1,
        })
        .sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn many_readers_of_a_blob_are_served_by_one_download() {
    let rig = Rig::new().await;
    let (store, digest) = (rig.store(1 << 20), rig.cache.store().put(vec![1; 100_000]));
    let blob = rig.blob(&digest);
    let readers = (0..20).map(|_| store.bring(&blob, Class::Required));
    for opened in join_all(readers).await {
        assert_eq!(opened.unwrap().file.metadata().unwrap().len(), 100_000);
    }
    rig.cache.store().clear();
    store.bring(&blob, Class::Required).await.unwrap();
    assert!(store.ready(&digest).is_some());
    assert_eq!(
        fs::metadata(rig.dir.path().join("store"))
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o700
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_or_lost_is_no_file_and_takes_no_room() {
    let rig = Rig::new().await;
    let (store, digest) = (rig.store(1 << 20), rig.cache.store().put(vec![1; 5000]));
    let blob = rig.blob(&digest);
    rig.cache
        .faults()
        .blob(&digest, BlobFault::Corrupt, Times::Always);
    assert!(matches!(
        store.bring(&blob, Class::Required).await,
        Err(ReadError::Lost(_))
    ));
    rig.cache.faults().clear();
    let other = rig.blob(&Digest::of(digest.function(), b"never stored"));
    let lost = store.bring(&other, Class::Required).await.err().unwrap();
    assert!(lost.to_string().starts_with("evicted from the cache"), "{lost}");
    assert_eq!(
        (
            store.filled().0,
            files_below(&rig.dir.path().join("store/sha256"))
        ),
        (0, 0)
    );
    store.bring(&blob, Class::Required).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_changed_in_the_store_or_left_by_another_process_is_verified() {
    let rig = Rig::new().await;
    let digests: Vec<Digest> = (0..3_u8).map(|n| rig.cache.store().put(vec![n; 5000])).collect();
    let store = rig.store(1 << 20);
    for digest in &digests {
        store.bring(&rig.blob(digest), Class::Required).await.unwrap();
    }
    let change = |digest: &Digest| {
        fs::remove_file(rig.file(digest)).unwrap();
        fs::write(rig.file(digest), vec![9; 5000]).unwrap();
    };
    change(&digests[0]);
    assert!(store.ready(&digests[0]).is_none());
    store
        .bring(&rig.blob(&digests[0]), Class::Required)
        .await
        .unwrap();
    assert_eq!(fs::read(rig.file(&digests[0])).unwrap(), [0; 5000]);

    // The lock is free when nothing of it is left.
    store.close().await;
    drop(store);
    change(&digests[1]);
    let store = rig.store(1 << 20);
    assert_eq!(store.filled().0, 3 * 8192);
    assert!(
        digests
            .iter()
            .all(|digest| store.has(digest) && store.ready(digest).is_none())
    );
    rig.cache.store().remove(&digests[2]);
    for (n, digest) in digests.iter().enumerate() {
        store.bring(&rig.blob(digest), Class::Required).await.unwrap();
        assert_eq!(fs::read(rig.file(digest)).unwrap(), [n as u8; 5000]);
    }
    // A wrong one that cannot be had again is gone.
    change(&digests[2]);
    assert!(
        store
            .bring(&rig.blob(&digests[2]), Class::Required)
            .await
            .is_err()
    );
    assert!(!rig.file(&digests[2]).exists() && !store.has(&digests[2]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_store_removes_what_nobody_reads_and_nothing_else() {
    let rig = Rig::new().await;
    let digests: Vec<Digest> = (0..4_u8).map(|n| rig.cache.store().put(vec![n; 8192])).collect();
    let store = rig.store(2 * 8192);
    let open = store
        .bring(&rig.blob(&digests[0]), Class::Required)
        .await
        .unwrap();
    for digest in &digests[1..] {
        store.bring(&rig.blob(digest), Class::Required).await.unwrap();
    }
    assert_eq!(store.filled(), (2 * 8192, 2 * 8192));
    let exist = digests.iter().map(|digest| rig.file(digest).exists());
    assert_eq!(exist.collect::<Vec<_>>(), [true, false, false, true]);
    let other = store
        .bring(&rig.blob(&digests[3]), Class::Required)
        .await
        .unwrap();
    let full = store
        .bring(&rig.blob(&digests[1]), Class::Required)
        .await
        .err()
        .unwrap();
    assert!(
        matches!(
            full,
            ReadError::Full {
                size: 8192,
                bound: 16384
            }
        ),
        "{full}"
    );
    drop((open, other));
    store
        .bring(&rig.blob(&digests[1]), Class::Required)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_the_output_tree_is_copied_if_it_has_the_bytes() {
    let rig = Rig::new().await;
    let digest = Digest::of(crate::digest::DigestFunction::Sha256, &[7; 5000]);
    let file = rig.dir.path().join("tree/bazel-out/file");
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(&file, [8; 5000]).unwrap();
    let store = rig.store(1 << 20);
    let wrong = store.bring(&rig.blob(&digest), Class::Required).await;
    assert!(wrong.is_err());
    fs::write(&file, [7; 5000]).unwrap();
    store.bring(&rig.blob(&digest), Class::Required).await.unwrap();
    assert_eq!(fs::read(rig.file(&digest)).unwrap(), [7; 5000]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_on_disk_needs_no_cache_and_stays_without_one() {
    let rig = Rig::new().await;
    let digests: Vec<Digest> = (0..3_u8).map(|n| rig.cache.store().put(vec![n; 5000])).collect();
    let store = rig.store(1 << 20);
    for digest in &digests {
        store.bring(&rig.blob(digest), Class::Required).await.unwrap();
    }
    store.close().await;
    drop(store);

    // A process that is about to end verifies nothing more, and removes nothing.
    let store = rig.store(1 << 20);
    store.close().await;
    let ending = store.bring(&rig.blob(&digests[0]), Class::Required).await.err();
    assert!(matches!(ending, Some(ReadError::Ending)));
    assert!(rig.file(&digests[0]).exists() && store.has(&digests[0]));
    drop(store);

    let store = rig.store(1 << 20);
    let without = |digest: &Digest| Blob {
        cache: Err("no cache is recorded".to_owned()),
        ..rig.blob(digest)
    };
    fs::remove_file(rig.file(&digests[1])).unwrap();
    fs::write(rig.file(&digests[1]), [9; 5000]).unwrap();
    for (digest, is_right) in [(&digests[0], true), (&digests[1], false), (&digests[2], true)] {
        let brought = store.bring(&without(digest), Class::Required).await;
        assert_eq!(brought.is_ok(), is_right, "{:?}", brought.err());
        assert!(rig.file(digest).exists());
    }
    // Nor does what is in the output tree.
    let file = rig.dir.path().join("tree/bazel-out/file");
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(&file, [1; 5000]).unwrap();
    store.bring(&without(&digests[1]), Class::Required).await.unwrap();
    assert_eq!(fs::read(rig.file(&digests[1])).unwrap(), [1; 5000]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_a_store_is_read_wherever_its_path_leads() {
    let rig = Rig::new().await;
    let digest = rig.cache.store().put(vec![1; 5000]);
    let store = rig.store(1 << 20);
    store.bring(&rig.blob(&digest), Class::Required).await.unwrap();
    // As when something is mounted over it.
    fs::rename(rig.dir.path().join("store"), rig.dir.path().join("hidden")).unwrap();
    fs::create_dir(rig.dir.path().join("store")).unwrap();
    assert!(store.ready(&digest).is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_torn_file_of_an_earlier_process_costs_no_good_one() {
    let rig = Rig::new().await;
    let digest = rig.cache.store().put(vec![1; 5000]);
    let store = rig.store(1 << 20);
    store.bring(&rig.blob(&digest), Class::Required).await.unwrap();
    store.close().await;
    drop(store);
    fs::remove_file(rig.file(&digest)).unwrap();
    fs::write(rig.file(&digest), [1; 100]).unwrap();
    let store = rig.store(1 << 20);
    assert_eq!(store.filled().0, 0);
    store.bring(&rig.blob(&digest), Class::Required).await.unwrap();
    assert_eq!(store.filled().0, 8192);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_output_that_is_a_link_to_a_source_is_read_there_but_not_from_the_mount_itself() {
    let rig = Rig::new().await;
    let store = rig.store(1 << 20);
    let bytes = b"#!/bin/sh\necho source\n";
    let digest = Digest::of(crate::digest::DigestFunction::Sha256, bytes);
    let output = rig.dir.path().join("tree/bazel-out/file");
    fs::create_dir_all(output.parent().unwrap()).unwrap();
    for (directory, is_there) in [("mount", false), ("workspace", true)] {
        let source = rig.dir.path().join(directory).join("probe.sh");
        fs::create_dir(source.parent().unwrap()).unwrap();
        fs::write(&source, bytes).unwrap();
        let _ = fs::remove_file(&output);
        std::os::unix::fs::symlink(&source, &output).unwrap();
        let opened = store.bring(&rig.blob(&digest), Class::Required).await;
        assert_eq!(opened.is_ok(), is_there, "{directory}");
    }
    assert_eq!(fs::read(rig.file(&digest)).unwrap(), bytes);
    // The store has a file of its own.
    assert!(!rig.file(&digest).is_symlink());
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_make_way_are_gone_and_those_that_were_half_gone_too() {
    let rig = Rig::new().await;
    let digests: Vec<Digest> = (0..3_u8).map(|n| rig.cache.store().put(vec![n; 8192])).collect();
    let directory = rig.dir.path().join("store");
    drop(rig.store(8192));
    fs::write(directory.join("leaving-7"), "of a process that was killed").unwrap();
    let store = rig.store(8192);
    for digest in &digests {
        store.bring(&rig.blob(digest), Class::Required).await.unwrap();
    }
    let exist = digests.iter().map(|digest| rig.file(digest).exists());
    assert_eq!(exist.collect::<Vec<_>>(), [false, false, true]);
    let names = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = names
        .filter(|name| name.to_string_lossy().starts_with("leaving"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_tries_for_itself_what_failed_when_nobody_waited_for_it() {
    let rig = Rig::new().await;
    let (store, digest) = (rig.store(1 << 20), rig.cache.store().put(vec![1; 5000]));
    let blob = rig.blob(&digest);
    // The materializer reads what was wrong once more.
    rig.cache
        .faults()
        .blob(&digest, BlobFault::Corrupt, Times::First(2));
    let (ahead, one, another) = futures::join!(
        store.bring(&blob, Class::Optional),
        store.bring(&blob, Class::Required),
        store.bring(&blob, Class::Required)
    );
    assert!(ahead.is_err());
    one.unwrap();
    another.unwrap();
}

#[tokio::test]
async fn what_a_reader_has_asked_for_is_counted_also_if_it_gives_up() {
    let rig = Rig::new().await;
    let (store, digest) = (rig.store(1 << 20), rig.cache.store().put(vec![1; 5000]));
    let blob = rig.blob(&digest);
    rig.cache
        .faults()
        .blob(&digest, BlobFault::StallAfter(1000), Times::First(1));
    for class in [Class::Optional, Class::Required] {
        let read = store.bring(&blob, class);
        assert!(futures::poll!(std::pin::pin!(read)).is_pending());
    }
    rig.cache.faults().sever_connections();
    until("nothing is under way", async || {
        store.ready(&digest).is_some() || !store.has(&digest)
    })
    .await;
    let on_disk = files_below(&rig.dir.path().join("store/sha256")) as u64;
    assert_eq!(store.filled().0, on_disk * 8192);
}
