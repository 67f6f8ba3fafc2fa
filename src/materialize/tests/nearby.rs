//! Blobs that a file of the same root has already.

use super::*;

#[tokio::test]
async fn a_blob_that_was_placed_before_is_not_fetched_again() {
    let f = Fixture::new().await;
    for size in [10, 300 << 10, 3 << 20] {
        let digest = f.cache.store().put(vec![7; size]);
        let before = f.cache.stats().batch_reads + f.cache.stats().stream_reads;
        let mut asker = f.asker(1);
        for (place, source) in [("a", None), ("b", Some(Source::Copy)), ("c", Some(Source::Copy))] {
            let name = format!("{place}/{size}");
            f.want(&asker, Class::Required, &[(&name, &digest)]).await;
            let end = asker.end().await;
            assert!(
                source.is_none_or(|source| is_from(&end, source)),
                "{name}: {end:?}"
            );
            assert_eq!(fs::read(f.path(&name)).unwrap(), vec![7; size]);
        }
        let after = f.cache.stats().batch_reads + f.cache.stats().stream_reads;
        assert_eq!(after - before, 1, "{size}");
    }
}

#[tokio::test]
async fn a_file_that_was_changed_or_deleted_since_is_no_source() {
    let f = Fixture::new().await;
    for size in [10, 300 << 10] {
        for change in ["same size", "other size", "link", "deleted"] {
            let digest = f.cache.store().put(format!("{change}{size}").repeat(size / 10));
            let bytes = format!("{change}{size}").repeat(size / 10).into_bytes();
            let first = format!("first/{change}{size}");
            let mut asker = f.asker(1);
            f.want(&asker, Class::Required, &[(&first, &digest)]).await;
            assert!(asker.end().await.is_on_disk());
            let path = f.path(&first);
            fs::remove_file(&path).unwrap();
            match change {
                "same size" => fs::write(&path, vec![b'x'; bytes.len()]).unwrap(),
                "other size" => fs::write(&path, "x").unwrap(),
                "link" => std::os::unix::fs::symlink("/etc/hostname", &path).unwrap(),
                _ => {}
            }
            let second = format!("second/{change}{size}");
            f.want(&asker, Class::Required, &[(&second, &digest)]).await;
            let end = asker.end().await;
            assert!(is_from(&end, Source::Batch), "{change}: {end:?}");
            assert_eq!(fs::read(f.path(&second)).unwrap(), bytes, "{change}");
        }
    }
}

#[tokio::test]
async fn wants_that_come_in_pieces_cost_one_transfer_for_each_blob() {
    let f = Fixture::new().await;
    let blobs: Vec<Digest> = (0..50)
        .map(|n| f.cache.store().put(format!("blob {n}")))
        .collect();
    let mut asker = f.asker(1);
    for piece in 0..40 {
        let names: Vec<String> = (0..25).map(|n| format!("d{piece}/f{n}")).collect();
        let wants: Vec<(&str, &Digest)> = names
            .iter()
            .enumerate()
            .map(|(n, name)| (name.as_str(), &blobs[(piece * 7 + n) % blobs.len()]))
            .collect();
        f.want(&asker, Class::Required, &wants).await;
        if piece % 5 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    for (path, outcome) in asker.ends(1000).await {
        assert!(outcome.is_on_disk(), "{path}: {outcome:?}");
    }
    assert_eq!(f.cache.stats().batch_read_blobs, blobs.len() as u64);
}
