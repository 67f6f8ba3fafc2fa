//! Faults that leave the protocol's ground, seen from the client.

use super::*;

#[tokio::test]
async fn batches_can_say_too_much_and_in_another_order() {
    let (cache, client) = start().await;
    let [one, two] = ["one", "two"].map(|text| cache.store().put(text));
    let reported = async |digests: &[&Digest]| -> Vec<(String, Vec<u8>)> {
        let answers = client.batch(digests, false).await.unwrap();
        let pair = |a: batch_read_blobs_response::Response| (a.digest.unwrap().hash, a.data);
        answers.into_iter().map(pair).collect()
    };
    cache.faults().blob(&one, BlobFault::Last, Times::Once);
    let hashes: Vec<_> = reported(&[&one, &two])
        .await
        .into_iter()
        .map(|(hash, _)| hash)
        .collect();
    assert_eq!(hashes, [two.hash_hex(), one.hash_hex()]);
    for wrong_first in [false, true] {
        cache
            .faults()
            .blob(&one, BlobFault::Twice { wrong_first }, Times::Once);
        let answers = reported(&[&one]).await;
        assert_eq!(answers.len(), 2);
        assert!(answers.iter().all(|(hash, _)| *hash == one.hash_hex()));
        assert_eq!(answers[usize::from(wrong_first)].1, b"one");
        assert_ne!(answers[usize::from(!wrong_first)].1, b"one");
    }
    cache.faults().blob(&one, BlobFault::Unasked, Times::Once);
    let answers = reported(&[&one]).await;
    assert_eq!(answers.len(), 2);
    assert!(answers.iter().any(|(hash, _)| *hash != one.hash_hex()));
}

#[tokio::test]
async fn zstd_can_be_anything() {
    let (cache, client) = start().await;
    let bytes = noise(300_000);
    let digest = cache.store().put(bytes.clone());
    for (fault, expected) in [
        (BlobFault::ManyFrames, Some(bytes.clone())),
        (BlobFault::EmptyFrames(2000), Some(bytes.clone())),
        (BlobFault::Bomb(5 << 20), Some(vec![0; 5 << 20])),
        (BlobFault::TruncateCompression, None),
        (BlobFault::TrailingGarbage, None),
    ] {
        cache.faults().clear();
        cache.faults().blob(&digest, fault, Times::Always);
        let streamed = client.read(&digest, true).await.0;
        let batched = client.batch(&[&digest], true).await.unwrap().remove(0);
        assert_eq!(batched.compressor, 1);
        for packed in [streamed, batched.data] {
            assert!(zstd::decode_all(&*packed).ok() == expected, "{fault:?}");
        }
        assert!(
            client.read(&digest, false).await.0 == bytes,
            "plain ones are left alone"
        );
    }
}

#[tokio::test]
async fn streams_can_end_in_all_ways() {
    let (cache, client) = start().await;
    let bytes = noise(3_000_000);
    let digest = cache.store().put(bytes.clone());
    for (fault, came, code_of_end) in [
        (BlobFault::EndAfter(1_500_000), 1_500_000, None),
        (BlobFault::CutWithin(1 << 20), 1 << 20, Some(Code::Unavailable)),
        (BlobFault::ResetAfter(1_500_000), 1_500_000, Some(Code::Internal)),
        (BlobFault::NoTrailers, bytes.len(), Some(Code::Unknown)),
        (
            BlobFault::RetryAfter(Duration::from_secs(2)),
            0,
            Some(Code::ResourceExhausted),
        ),
    ] {
        cache.faults().blob(&digest, fault, Times::Once);
        let (read, end) = client.read(&digest, false).await;
        // A reset takes with it what is still on the way.
        let is_reset = matches!(fault, BlobFault::ResetAfter(_));
        assert!(read.len() == came || (is_reset && read.len() < came), "{fault:?}");
        assert!(bytes.starts_with(&read), "{fault:?}");
        assert_eq!(end.err().map(|status| status.code()), code_of_end, "{fault:?}");
    }
    cache.faults().blob(&digest, BlobFault::Evict, Times::Once);
    for _ in 0..2 {
        assert_eq!(code(client.read(&digest, false).await.1), Code::NotFound);
    }
    assert!(!cache.store().contains(&digest));
}

#[tokio::test]
async fn what_is_before_the_service_can_answer_for_it() {
    let (cache, client) = start().await;
    let digest = cache.store().put(&b"blob"[..]);
    for (fault, expected) in [
        (RequestFault::TrailersOnly(Code::Aborted), Code::Aborted),
        (RequestFault::Babble(Code::DataLoss), Code::DataLoss),
        (RequestFault::AbsurdLength, Code::OutOfRange),
        (RequestFault::Garbage, Code::Internal),
    ] {
        cache.faults().request(Rpc::BatchRead, fault, Times::Once);
        let status = client.batch(&[&digest], false).await.unwrap_err();
        assert_eq!(status.code(), expected, "{fault:?}: {status}");
        if let RequestFault::Babble(_) = fault {
            let said = status.message();
            assert!(
                said.contains('\u{1b}') && said.contains("te=trailers"),
                "{said:?}"
            );
        }
    }
    for fault in [
        RequestFault::Http(502),
        RequestFault::Http(200),
        RequestFault::HugeHead(1 << 20),
        RequestFault::NoTrailers,
        RequestFault::Reset,
    ] {
        cache.faults().request(Rpc::BatchRead, fault, Times::Once);
        assert!(client.batch(&[&digest], false).await.is_err(), "{fault:?}");
    }
    assert_eq!(cache.stats().batch_reads, 9, "all were counted");
    assert!(client.batch(&[&digest], false).await.is_ok());
}

#[tokio::test]
async fn the_cache_can_pretend() {
    let (cache, client) = start().await;
    let reported = async || {
        let request = GetCapabilitiesRequest::default();
        let answer = CapabilitiesClient::new(client.0.clone())
            .get_capabilities(request)
            .await;
        answer.unwrap().into_inner().cache_capabilities.unwrap()
    };
    let truth = reported().await;
    cache.faults().pretend(Pretence {
        max_batch_bytes: Some(-7),
        zstd: Some(false),
        digest_functions: Some(vec![9999]),
    });
    let lie = reported().await;
    assert_eq!(lie.max_batch_total_size_bytes, -7);
    assert_eq!(lie.digest_functions, [9999]);
    assert!(lie.supported_compressors.is_empty());
    cache.faults().clear();
    assert_eq!(reported().await, truth);
}

#[tokio::test]
async fn connections_can_be_dead_from_the_start_or_die_later() {
    let (cache, client) = start().await;
    let digest = cache.store().put(&b"blob"[..]);
    assert!(client.batch(&[&digest], false).await.is_ok());
    cache.faults().kill_connections();
    assert!(timeout(BRIEFLY, client.batch(&[&digest], false)).await.is_err());
    let living = Client::of(&cache).await;
    assert!(living.batch(&[&digest], false).await.is_ok());
    cache.faults().accept_dead(1);
    let dead = Client::of(&cache).await;
    assert!(timeout(BRIEFLY, dead.batch(&[&digest], false)).await.is_err());
    // The dead can be buried.
    cache.faults().sever_connections();
    assert!(timeout(PATIENCE, dead.batch(&[&digest], false)).await.is_ok());
}

#[tokio::test]
async fn old_connections_are_sent_away() {
    let cache = EmbeddedCache::builder()
        .connection_age(Duration::from_millis(30))
        .start()
        .await
        .unwrap();
    let client = Client::of(&cache).await;
    let digest = cache.store().put(&b"blob"[..]);
    let mut good = 0;
    while cache.stats().connections < 4 {
        good += u32::from(client.batch(&[&digest], false).await.is_ok());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(good > 0);
}
