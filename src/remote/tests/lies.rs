//! Servers that say one thing and do another: limits, compression, sizes.

use outhaul_testkit::cache::{BlobFault, EmbeddedCache, Pretence, RequestFault, Rpc, Times};
use tonic::Code;

use super::{
    faults::{SIZE, batch, client_of, in_time, start, stream},
    *,
};

#[tokio::test]
async fn a_limit_lower_than_stated_is_found_out_once() {
    let cache = EmbeddedCache::builder()
        .max_batch_bytes(200_000)
        .start()
        .await
        .unwrap();
    cache.faults().pretend(Pretence {
        max_batch_bytes: Some(1 << 20),
        ..Pretence::default()
    });
    let digests: Vec<Digest> = (0..100)
        .map(|n| cache.store().put([&blob(4990)[..], &[n; 10]].concat()))
        .collect();
    let (client, _) = client_of(&cache, |_| {});
    let mut calls = Vec::new();
    for _ in 0..2 {
        let before = cache.stats();
        for (digest, answer) in client.read_batch(&digests, &attribution(), false).await {
            assert_eq!(answer.unwrap().len() as u64, digest.size());
        }
        calls.push(cache.stats().since(&before).batch_reads);
    }
    // 500,000 bytes in one and in two, with zstd and without, and in four.
    assert_eq!(calls[1], 4, "{calls:?}");
    assert!(calls[0] <= 10, "{calls:?}");
    assert_eq!(cache.stats().stream_reads, 0);
}

#[tokio::test]
async fn a_server_that_takes_nothing_is_not_asked_for_every_blob() {
    let cache = start().await;
    let digests: Vec<Digest> = (0..1000_u32)
        .map(|n| cache.store().put(n.to_le_bytes().to_vec()))
        .collect();
    let (client, _) = client_of(&cache, |_| {});
    for rpc in [Rpc::BatchRead, Rpc::StreamRead] {
        let no = RequestFault::Status(Code::InvalidArgument);
        cache.faults().request(rpc, no, Times::Always);
    }
    for (_, answer) in client.read_batch(&digests, &attribution(), false).await {
        assert_eq!(answer.unwrap_err().kind, RemoteErrorKind::Rejected);
    }
    let asked = cache.stats();
    assert!(asked.batch_reads + asked.stream_reads < 50, "{asked:?}");
}

#[tokio::test]
async fn blobs_that_are_refused_for_themselves_do_no_harm_to_others() {
    let fake = Fake::new();
    let digests: Vec<Digest> = (0..64_u32).map(|n| fake.put(&n.to_le_bytes())).collect();
    let bad = [0, 1, 2, 20, 40, 63];
    fake.script().detested = bad.iter().map(|&n: &usize| digests[n].hash_hex()).collect();
    let cache = client(&fake, |_| {}).await;
    let answers = cache.read_batch(&digests, &attribution(), false).await;
    for (n, (digest, answer)) in answers.into_iter().enumerate() {
        assert_eq!(digest, digests[n]);
        match answer {
            Ok(bytes) => assert!(!bad.contains(&n) && bytes[..] == (n as u32).to_le_bytes(), "{n}"),
            Err(error) => assert!(bad.contains(&n), "{n}: {error}"),
        }
    }
}

#[tokio::test]
async fn a_server_that_does_not_keep_its_offer_of_zstd_in_batches_is_asked_plainly() {
    let fake = Fake::new();
    fake.script().zstd = true;
    let digest = fake.put(&blob(5000));
    let cache = client(&fake, |_| {}).await;
    fake.script().errors = [tonic::Status::invalid_argument("no compressors")].into();
    let answer = batch(&cache, &digest).await;
    assert_eq!(answer.unwrap(), blob(5000));
    assert_eq!(fake.count("batch"), 2);
    assert_eq!(fake.count("read"), 0);
}

#[tokio::test]
async fn a_bomb_is_cut_at_the_size_that_was_asked_for() {
    let cache = start().await;
    let digest = cache.store().put(blob(SIZE));
    let (client, _) = client_of(&cache, |_| {});
    let bomb = BlobFault::Bomb(1 << 30);
    cache.faults().blob(&digest, bomb, Times::First(2));
    assert_eq!(
        batch(&client, &digest).await.unwrap_err().kind,
        RemoteErrorKind::Protocol
    );
    let (decoded, result) = stream(&client, &digest).await;
    assert_eq!(result.unwrap_err().kind, RemoteErrorKind::Protocol);
    assert!(decoded.len() <= SIZE, "{} bytes were decoded", decoded.len());
    assert_eq!(cache.faults().fired(), 2);
}

#[tokio::test]
async fn zstd_that_is_no_good_is_refused_and_what_is_odd_is_taken() {
    let cache = start().await;
    let digest = cache.store().put(blob(SIZE));
    let (client, _) = client_of(&cache, |o| o.retries = 1);
    for (fault, is_streamed, is_batched) in [
        (BlobFault::ManyFrames, true, true),
        (BlobFault::EmptyFrames(90_000), true, true),
        // More than the blob itself has.
        (BlobFault::EmptyFrames(8 << 20), false, false),
        (BlobFault::GarbleCompression, false, false),
        // It is gone on with, without compression.
        (BlobFault::TruncateCompression, true, false),
        (BlobFault::TrailingGarbage, false, false),
        (BlobFault::Resize(-1), false, false),
        (BlobFault::Resize(1), false, false),
    ] {
        cache.faults().clear();
        cache.faults().blob(&digest, fault, Times::Always);
        let (read, result) = in_time(stream(&client, &digest)).await;
        assert_eq!(
            result.is_ok() && read == blob(SIZE),
            is_streamed,
            "{fault:?}: {result:?}"
        );
        assert!(read.len() <= SIZE);
        let batched = in_time(batch(&client, &digest)).await;
        assert_eq!(batched.is_ok(), is_batched, "{fault:?}: {batched:?}");
        assert!(cache.faults().fired() > 0);
    }
}

#[tokio::test]
async fn an_answer_much_larger_than_asked_for_is_not_taken() {
    let fake = Fake::new();
    let digest = fake.put(b"small");
    fake.script().tamper = vec![
        (|answers: &mut Vec<_>| {
            let mut unasked = answers[0].clone();
            unasked.data = vec![7; 3 << 20];
            unasked.digest.as_mut().unwrap().size_bytes = 3 << 20;
            answers.push(unasked);
        }) as fake::Tamper;
        2
    ]
    .into();
    let cache = client(&fake, |_| {}).await;
    let error = batch(&cache, &digest).await.unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Protocol);
    assert!(
        error.to_string().contains("exceeds the expected maximum"),
        "{error}"
    );
}
