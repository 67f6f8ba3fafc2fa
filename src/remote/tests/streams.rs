//! Streams that break, end, stall and lie.

use std::time::Duration;

use async_trait::async_trait;
use tonic::Status;

use super::{fake::Cut, *};

#[derive(Default)]
struct Collect {
    bytes: Vec<u8>,
    full_at: Option<usize>,
}

#[async_trait]
impl Sink for Collect {
    async fn write(&mut self, bytes: bytes::Bytes) -> std::io::Result<()> {
        self.bytes.extend_from_slice(&bytes);
        let full = self.full_at.is_some_and(|n| self.bytes.len() > n);
        if full {
            Err(std::io::Error::other("disk full"))
        } else {
            Ok(())
        }
    }
}

/// Reads a blob; what the sink got, and the result.
async fn read(cache: &GrpcCache, digest: &Digest, offset: u64) -> (Vec<u8>, Result<(), RemoteError>) {
    let mut sink = Collect::default();
    let result = cache
        .read_stream(digest, offset, &attribution(), false, &mut sink)
        .await;
    (sink.bytes, result)
}

const SIZE: usize = 300_000;

#[tokio::test]
async fn a_blob_streams_whole_plain_and_compressed() {
    for zstd in [false, true] {
        let fake = Fake::new();
        fake.script().zstd = zstd;
        let digest = fake.put(&blob(SIZE));
        let cache = client(&fake, |o| o.instance_name = "a/b".into()).await;
        let (bytes, result) = read(&cache, &digest, 0).await;
        result.unwrap();
        assert!(bytes == blob(SIZE));
        let name = if zstd {
            "read 0 a/b/compressed-blobs/zstd/"
        } else {
            "read 0 a/b/blobs/"
        };
        assert_eq!(fake.count(name), 1);
    }
}

#[tokio::test]
async fn a_broken_stream_is_resumed_where_it_broke() {
    for zstd in [false, true] {
        let fake = Fake::new();
        fake.script().zstd = zstd;
        fake.script().cuts = [Cut::Error(100_000), Cut::End(50_000), Cut::Error(0)].into();
        let digest = fake.put(&blob(SIZE));
        let cache = client(&fake, |_| {}).await;
        let (bytes, result) = read(&cache, &digest, 0).await;
        result.unwrap();
        assert!(bytes == blob(SIZE));
        // What of a broken stream arrived before its error is up to the network; that it is not asked for again
        // shows in the bytes.
        assert_eq!(fake.count("read"), 4);
    }
}

#[tokio::test]
async fn progress_forgives_more_failures_than_there_are_retries() {
    let fake = Fake::new();
    fake.script().cuts = vec![Cut::End(20_000); 10].into();
    let digest = fake.put(&blob(SIZE));
    let cache = client(&fake, |o| o.retries = 1).await;
    let (bytes, result) = read(&cache, &digest, 0).await;
    result.unwrap();
    assert!(bytes == blob(SIZE));
}

#[tokio::test]
async fn a_trickle_is_no_progress() {
    let fake = Fake::new();
    fake.script().cuts = vec![Cut::End(1); 10].into();
    let digest = fake.put(&blob(SIZE));
    let cache = client(&fake, |o| o.retries = 2).await;
    let (_, result) = read(&cache, &digest, 0).await;
    let error = result.unwrap_err();
    assert!(error.to_string().contains("ended at byte 3"), "{error}");
    assert_eq!(fake.count("read"), 3);
}

#[tokio::test]
async fn a_transfer_starts_at_the_offset_and_a_complete_one_asks_for_nothing() {
    let fake = Fake::new();
    let digest = fake.put(&blob(SIZE));
    let cache = client(&fake, |_| {}).await;
    let (bytes, result) = read(&cache, &digest, 200_000).await;
    result.unwrap();
    assert!(bytes == blob(SIZE)[200_000..]);
    for (digest, offset) in [(&digest, SIZE as u64), (&super::digest(b""), 0)] {
        assert_eq!(read(&cache, digest, offset).await, (vec![], Ok(())));
    }
    assert_eq!(fake.count("read"), 1);
    let error = read(&cache, &digest, SIZE as u64 + 1).await.1.unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Rejected);
}

#[tokio::test]
async fn too_many_bytes_are_refused_at_once_and_never_reach_the_sink() {
    for zstd in [false, true] {
        for excess in [1, 1_000_000] {
            let fake = Fake::new();
            fake.script().zstd = zstd;
            fake.script().excess = vec![0; excess];
            let digest = fake.put(&blob(SIZE));
            let cache = client(&fake, |_| {}).await;
            let (bytes, result) = read(&cache, &digest, 0).await;
            assert_eq!(result.unwrap_err().kind, RemoteErrorKind::Protocol);
            assert!(bytes.len() <= SIZE);
            assert_eq!(fake.count("read"), 1);
        }
    }
}

#[tokio::test]
async fn a_stream_that_hangs_is_cut_and_resumed() {
    let fake = Fake::new();
    fake.script().cuts = [Cut::Hang(100_000)].into();
    let digest = fake.put(&blob(SIZE));
    let cache = client(&fake, |o| o.stall_timeout = Duration::from_millis(300)).await;
    let (bytes, result) = read(&cache, &digest, 0).await;
    result.unwrap();
    assert!(bytes == blob(SIZE));
    assert_eq!(fake.count("read 100000 "), 1);
}

#[tokio::test]
async fn an_end_that_does_not_come_is_not_needed() {
    let fake = Fake::new();
    fake.script().cuts = [Cut::Hang(SIZE as u64)].into();
    let digest = fake.put(&blob(SIZE));
    let cache = client(&fake, |o| o.stall_timeout = Duration::from_millis(300)).await;
    assert!(read(&cache, &digest, 0).await.0 == blob(SIZE));
    assert_eq!(fake.count("read"), 1);
}

#[tokio::test]
async fn an_error_after_the_last_byte_takes_nothing_away() {
    let fake = Fake::new();
    fake.script().cuts = [Cut::Error(SIZE as u64)].into();
    let digest = fake.put(&blob(SIZE));
    let cache = client(&fake, |_| {}).await;
    let (bytes, result) = read(&cache, &digest, 0).await;
    assert!(result.is_ok() && bytes == blob(SIZE));
}

#[tokio::test]
async fn a_missing_blob_is_reported_at_once_and_by_name() {
    let fake = Fake::new();
    let cache = client(&fake, |_| {}).await;
    let missing = super::digest(b"missing");
    let error = read(&cache, &missing, 0).await.1.unwrap_err();
    assert!(error.is_not_found());
    assert!(error.to_string().contains(&missing.to_string()), "{error}");
    assert_eq!(fake.count("read"), 1);
}

#[tokio::test]
async fn a_server_that_does_not_keep_its_offer_of_zstd_is_read_plain() {
    let fake = Fake::new();
    fake.script().zstd = true;
    fake.script().refuses_compressed_names = true;
    let digest = fake.put(&blob(SIZE));
    let cache = client(&fake, |_| {}).await;
    let (bytes, result) = read(&cache, &digest, 0).await;
    result.unwrap();
    assert!(bytes == blob(SIZE));
}

#[tokio::test]
async fn small_blobs_are_not_compressed() {
    let fake = Fake::new();
    fake.script().zstd = true;
    let digest = fake.put(&blob(99));
    let cache = client(&fake, |_| {}).await;
    read(&cache, &digest, 0).await.1.unwrap();
    assert_eq!(fake.count("read 0 blobs/"), 1);
}

#[tokio::test]
async fn a_sink_that_fails_ends_the_transfer() {
    let fake = Fake::new();
    let digest = fake.put(&blob(SIZE));
    let cache = client(&fake, |_| {}).await;
    let mut sink = Collect {
        full_at: Some(100_000),
        ..Collect::default()
    };
    let error = cache
        .read_stream(&digest, 0, &attribution(), false, &mut sink)
        .await
        .unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Sink);
    assert_eq!(error.message, "disk full");
    assert_eq!(fake.count("read"), 1);
}

#[tokio::test]
async fn the_server_may_ask_for_patience_before_the_stream_begins() {
    let fake = Fake::new();
    let digest = fake.put(&blob(SIZE));
    let cache = client(&fake, |_| {}).await;
    fake.script().errors = vec![Status::unavailable("starting"); 3].into();
    read(&cache, &digest, 0).await.1.unwrap();
    assert_eq!(fake.count("read"), 4);
}
