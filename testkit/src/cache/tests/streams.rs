//! ByteStream: reading, writing, resuming.

use super::*;

#[tokio::test]
async fn blobs_of_all_sizes_stream_back_compressed_or_not() {
    let directory = tempfile::tempdir().unwrap();
    let socket = format!("unix:{}", directory.path().join("cache.sock").display());
    for address in ["127.0.0.1:0", socket.as_str()] {
        let cache = EmbeddedCache::builder().bind(address).start().await.unwrap();
        let client = Client::of(&cache).await;
        for size in [0, 1, 1 << 20, (5 << 20) + 17] {
            let bytes = noise(size);
            let digest = cache.store().put(bytes.clone());
            let (plain, end) = client.read(&digest, false).await;
            assert!(end.is_ok() && plain == bytes, "{size} bytes: {end:?}");
            let (packed, end) = client.read(&digest, true).await;
            assert!(end.is_ok(), "{size} bytes: {end:?}");
            assert!(zstd::decode_all(&*packed).unwrap() == bytes, "{size} bytes");
            assert!(size < 2 || packed.len() < size);
        }
        assert_eq!(cache.stats().stream_reads, 8);
        assert_eq!(cache.stats().stream_reads_compressed, 4);
        cache.stop().await;
    }
    assert!(!directory.path().join("cache.sock").exists());
}

#[tokio::test]
async fn reads_begin_at_the_offset_and_end_at_the_limit() {
    let (cache, client) = start().await;
    let bytes = noise(3_000_000);
    let digest = cache.store().put(bytes.clone());
    let plain = resource(&digest, false);
    let packed = resource(&digest, true);
    assert!(client.read_from(&plain, 2_000_000, 0).await.0 == bytes[2_000_000..]);
    assert!(client.read_from(&plain, 10, 20).await.0 == bytes[10..30]);
    assert!(client.read_from(&plain, 2_999_999, 20).await.0 == bytes[2_999_999..]);
    assert!(client.read_from(&plain, 3_000_000, 0).await.0.is_empty());
    let (rest, _) = client.read_from(&packed, 1_234_567, 0).await;
    assert!(zstd::decode_all(&*rest).unwrap() == bytes[1_234_567..]);
    assert_eq!(
        code(client.read_from(&plain, 3_000_001, 0).await.1),
        Code::OutOfRange
    );
    assert_eq!(code(client.read_from(&plain, -1, 0).await.1), Code::OutOfRange);
    assert_eq!(
        code(client.read_from(&packed, 0, 5).await.1),
        Code::InvalidArgument
    );
    assert_eq!(
        code(client.read_from("nonsense", 0, 0).await.1),
        Code::InvalidArgument
    );
    assert_eq!(cache.stats().stream_reads_resumed, 6);
}

#[tokio::test]
async fn uploads_are_verified_and_kept() {
    let (cache, client) = start().await;
    let bytes = noise(2_500_000);
    let digest = Digest::of(DigestFunction::Sha256, &bytes);
    let name = format!("uploads/u/blobs/{digest}");
    let mut wrong = bytes.clone();
    wrong[7] ^= 1;
    let refused = client.write(upload(&name, &wrong, 0, true)).await;
    assert_eq!(code(refused), Code::InvalidArgument);
    let long = [&bytes[..], b"x"].concat();
    assert_eq!(
        code(client.write(upload(&name, &long, 0, true)).await),
        Code::InvalidArgument
    );
    assert!(!cache.store().contains(&digest));
    assert_eq!(
        client.write(upload(&name, &bytes, 0, true)).await.unwrap(),
        2_500_000
    );
    assert!(cache.store().get(&digest).unwrap() == bytes);
    // Again, which ends before everything is sent.
    assert_eq!(
        client.write(upload(&name, &bytes, 0, true)).await.unwrap(),
        2_500_000
    );
    assert_eq!(client.committed(&name).await, (2_500_000, true));
    assert_eq!(cache.stats().bytes_in, 2_500_000);
}

#[tokio::test]
async fn compressed_uploads_are_verified_and_kept() {
    let (cache, client) = start().await;
    let bytes = noise(2_500_000);
    let packed = zstd::encode_all(&*bytes, 1).unwrap();
    let digest = Digest::of(DigestFunction::Sha256, &bytes);
    let name = format!("uploads/u/compressed-blobs/zstd/{digest}");
    let refused = client.write(upload(&name, &bytes, 0, true)).await;
    assert_eq!(code(refused), Code::InvalidArgument);
    let committed = client.write(upload(&name, &packed, 0, true)).await.unwrap();
    assert_eq!(committed, packed.len() as i64);
    assert!(cache.store().get(&digest).unwrap() == bytes);
    assert_eq!(client.write(upload(&name, &packed, 0, true)).await.unwrap(), -1);
}

#[tokio::test]
async fn interrupted_uploads_go_on_where_they_stopped() {
    let (cache, client) = start().await;
    let bytes = noise(1_000_000);
    let packed = zstd::encode_all(&*bytes, 1).unwrap();
    let digest = Digest::of(DigestFunction::Sha256, &bytes);
    for (name, sent) in [
        (format!("uploads/u/blobs/{digest}"), &bytes),
        (format!("uploads/u/compressed-blobs/zstd/{digest}"), &packed),
    ] {
        cache.store().clear();
        assert_eq!(client.committed(&name).await, (0, false));
        client
            .write(upload(&name, &sent[..300_000], 0, false))
            .await
            .unwrap();
        assert_eq!(client.committed(&name).await, (300_000, false));
        let gap = client.write(upload(&name, sent, 400_000, true)).await;
        assert_eq!(code(gap), Code::InvalidArgument);
        let whole = client.write(upload(&name, sent, 300_000, true)).await.unwrap();
        assert_eq!(whole, sent.len() as i64);
        assert!(cache.store().get(&digest).unwrap() == bytes);
    }
}
