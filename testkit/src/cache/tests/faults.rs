//! Every fault, seen from the client.

use super::*;

#[tokio::test]
async fn corrupt_bytes_have_the_right_size() {
    let (cache, client) = start().await;
    let bytes = noise(2_000_000);
    let digest = cache.store().put(bytes.clone());
    cache.faults().blob(&digest, BlobFault::Corrupt, Times::First(3));
    let (plain, _) = client.read(&digest, false).await;
    let packed = zstd::decode_all(&*client.read(&digest, true).await.0).unwrap();
    let batched = client.batch(&[&digest], false).await.unwrap().remove(0).data;
    for wrong in [plain, packed, batched] {
        assert_eq!(wrong.len(), bytes.len());
        assert_ne!(wrong[0], bytes[0]);
        assert!(wrong[1..] == bytes[1..]);
    }
    assert!(client.read(&digest, false).await.0 == bytes);
}

#[tokio::test]
async fn sizes_can_be_wrong_both_ways() {
    let (cache, client) = start().await;
    let bytes = noise(2_000_000);
    let digest = cache.store().put(bytes.clone());
    for by in [5_i64, -1_500_000] {
        cache.faults().clear();
        cache.faults().every_blob(BlobFault::Resize(by), Times::Always);
        let expected = (2_000_000 + by) as usize;
        assert_eq!(client.read(&digest, false).await.0.len(), expected);
        let packed = client.read(&digest, true).await.0;
        assert_eq!(zstd::decode_all(&*packed).unwrap().len(), expected);
        let batched = client.batch(&[&digest], false).await.unwrap().remove(0).data;
        assert_eq!(batched.len(), expected);
    }
}

#[tokio::test]
async fn blobs_can_be_dropped_or_refused_in_batches() {
    let (cache, client) = start().await;
    let (one, two) = (cache.store().put(&b"one"[..]), cache.store().put(&b"two"[..]));
    cache.faults().blob(&one, BlobFault::DropFromBatch, Times::Once);
    cache
        .faults()
        .blob(&two, BlobFault::Status(Code::ResourceExhausted), Times::First(2));
    let answers = client.batch(&[&one, &two], false).await.unwrap();
    assert_eq!(answers.len(), 1);
    assert_eq!(
        answers[0].status.as_ref().unwrap().code,
        Code::ResourceExhausted as i32
    );
    assert_eq!(code(client.read(&two, false).await.1), Code::ResourceExhausted);
    let answers = client.batch(&[&one, &two], false).await.unwrap();
    assert!(answers.iter().all(|a| a.status.as_ref().unwrap().code == 0));
    assert_eq!(answers.len(), 2);
}

#[tokio::test]
async fn streams_are_cut_after_a_number_of_bytes() {
    let (cache, client) = start().await;
    let bytes = noise(3_000_000);
    let digest = cache.store().put(bytes.clone());
    cache
        .faults()
        .blob(&digest, BlobFault::CutAfter(1_500_000), Times::First(2));
    let (start, end) = client.read(&digest, false).await;
    assert_eq!(code(end), Code::Unavailable);
    assert!(start == bytes[..1_500_000]);
    let (packed, end) = client.read(&digest, true).await;
    assert_eq!(code(end), Code::Unavailable);
    let mut decoder = zstd::stream::write::Decoder::new(Vec::new()).unwrap();
    std::io::Write::write_all(&mut decoder, &packed).unwrap();
    std::io::Write::flush(&mut decoder).unwrap();
    assert!(decoder.get_ref()[..] == bytes[..1_500_000]);
    let (rest, end) = client.read_from(&resource(&digest, false), 1_500_000, 0).await;
    assert!(end.is_ok() && rest == bytes[1_500_000..]);
    // Cut at the very end: all is there, and still it fails; beyond the end: nothing happens.
    cache
        .faults()
        .every_blob(BlobFault::CutAfter(3_000_000), Times::Once);
    let (all, end) = client.read(&digest, false).await;
    assert!(all == bytes && end.is_err());
    for zstd in [false, true] {
        cache
            .faults()
            .every_blob(BlobFault::CutAfter(3_000_001), Times::Once);
        assert!(client.read(&digest, zstd).await.1.is_ok());
    }
}

#[tokio::test]
async fn compression_can_be_undecodable() {
    let (cache, client) = start().await;
    let bytes = noise(5000);
    let digest = cache.store().put(bytes.clone());
    cache
        .faults()
        .every_blob(BlobFault::GarbleCompression, Times::First(2));
    assert!(client.read(&digest, false).await.0 == bytes);
    assert!(zstd::decode_all(&*client.read(&digest, true).await.0).is_err());
    let batched = client.batch(&[&digest], true).await.unwrap().remove(0);
    assert_eq!(batched.compressor, 1);
    assert!(zstd::decode_all(&*batched.data).is_err());
}

#[tokio::test]
async fn calls_fail_wait_or_stall_as_asked() {
    let (cache, client) = start().await;
    let digest = cache.store().put(&b"blob"[..]);
    cache
        .faults()
        .every_request(RequestFault::Status(Code::Unavailable), Times::First(2));
    assert_eq!(code(client.read(&digest, false).await.1), Code::Unavailable);
    assert_eq!(code(client.batch(&[&digest], false).await), Code::Unavailable);
    assert!(client.read(&digest, false).await.1.is_ok());

    cache
        .faults()
        .request(Rpc::BatchRead, RequestFault::Delay(BRIEFLY), Times::Once);
    let begun = tokio::time::Instant::now();
    client.batch(&[&digest], false).await.unwrap();
    assert!(begun.elapsed() >= BRIEFLY);

    cache
        .faults()
        .request(Rpc::BatchRead, RequestFault::Stall, Times::Once);
    assert!(timeout(BRIEFLY, client.batch(&[&digest], false)).await.is_err());
    cache.faults().every_blob(BlobFault::StallAfter(2), Times::Once);
    assert!(timeout(BRIEFLY, client.read(&digest, false)).await.is_err());
    assert!(client.read(&digest, false).await.1.is_ok());
}

#[tokio::test]
async fn severed_connections_fail_and_new_ones_are_taken() {
    let (cache, client) = start().await;
    let digest = cache.store().put(&b"blob"[..]);
    cache
        .faults()
        .request(Rpc::BatchRead, RequestFault::Stall, Times::Once);
    let waiting = async {
        let digests = [&digest];
        client.batch(&digests, false).await
    };
    let sever = async {
        while cache.faults().fired() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        cache.faults().sever_connections();
    };
    let (waited, ()) = timeout(PATIENCE, async { tokio::join!(waiting, sever) })
        .await
        .unwrap();
    assert!(waited.is_err());
    assert!(client.read(&digest, false).await.1.is_ok());
    assert_eq!(cache.stats().connections, 2);
}

#[tokio::test]
async fn stopping_breaks_what_is_under_way_and_frees_the_address() {
    let (cache, client) = start().await;
    let digest = cache.store().put(&b"blob"[..]);
    cache.faults().every_request(RequestFault::Stall, Times::Always);
    let store = cache.store().clone();
    let address = cache.endpoint().replace("grpc://", "");
    let waiting = tokio::spawn(async move { client.batch(&[&digest], false).await });
    while cache.faults().fired() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    timeout(PATIENCE, cache.stop()).await.unwrap();
    assert!(timeout(PATIENCE, waiting).await.unwrap().unwrap().is_err());
    assert_eq!(store.len(), 1);
    EmbeddedCache::builder().bind(address).start().await.unwrap();
}
