//! Faults of servers and of what is before them, and bugs that other clients had with them.

use std::time::Duration;

use futures::StreamExt as _;
use outhaul_testkit::cache::{BlobFault, EmbeddedCache, RequestFault, Rpc, RunningCache, Times};
pub(super) use outhaul_testkit::in_time;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::{Code, transport::Server, transport::server::TcpIncoming};

use super::*;

const SECRET: &str = "Bearer planted-secret-token";
pub(super) const SIZE: usize = 2_500_000;

pub(super) async fn start() -> RunningCache {
    EmbeddedCache::builder().start().await.unwrap()
}

pub(super) fn client_of(
    cache: &RunningCache,
    change: impl FnOnce(&mut RemoteOptions),
) -> (GrpcCache, Arc<FakeTimer>) {
    let mut options = options(&cache.endpoint());
    change(&mut options);
    let timer = Arc::new(FakeTimer::default());
    (GrpcCache::with_timer(options, timer.clone()).unwrap(), timer)
}

pub(super) async fn stream(client: &GrpcCache, digest: &Digest) -> (Vec<u8>, Result<(), RemoteError>) {
    let mut sink = reading::Collect::default();
    let result = client
        .read_stream(digest, 0, &attribution(), false, &mut sink)
        .await;
    (sink.into_bytes().into(), result)
}

pub(super) async fn batch(client: &GrpcCache, digest: &Digest) -> Result<Bytes, RemoteError> {
    let digests = std::slice::from_ref(digest);
    let mut answers = client.read_batch(digests, &attribution(), false).await;
    answers.remove(0).1
}

#[tokio::test]
async fn a_stream_that_breaks_at_any_offset_is_resumed() {
    let cache = start().await;
    let bytes = blob(SIZE);
    let digest = cache.store().put(bytes.clone());
    let size = SIZE as u64;
    for compression in [Compression::Never, Compression::Always] {
        let (client, _) = client_of(&cache, |o| o.compression = compression);
        // Nothing, a byte, within and around a message, around the end.
        for at in [0, 1, 500_000, (1 << 20) - 1, 1 << 20, size - 1, size] {
            for fault in [
                BlobFault::CutAfter(at),
                BlobFault::CutWithin(at),
                BlobFault::EndAfter(at),
                BlobFault::ResetAfter(at),
            ] {
                cache.faults().blob(&digest, fault, Times::Once);
                let (read, result) = in_time(stream(&client, &digest)).await;
                assert_eq!(result, Ok(()), "{fault:?}");
                assert!(read == bytes, "{fault:?}");
            }
        }
        cache.faults().blob(&digest, BlobFault::NoTrailers, Times::Once);
        let (read, result) = in_time(stream(&client, &digest)).await;
        assert!(result.is_ok() && read == bytes);
    }
    assert_eq!(cache.faults().fired(), 2 * (7 * 4 + 1));
    assert!(cache.stats().stream_reads_resumed > 0);
}

#[tokio::test]
async fn each_code_of_a_blob_is_reported_and_harms_no_other() {
    let cache = start().await;
    let (bad, good) = (cache.store().put(&b"bad"[..]), cache.store().put(&b"good"[..]));
    let (client, _) = client_of(&cache, |o| o.retries = 1);
    for code in (1..=16).map(Code::from_i32) {
        cache.faults().clear();
        cache.faults().blob(&bad, BlobFault::Status(code), Times::Always);
        let digests = [bad.clone(), good.clone()];
        let answers = client.read_batch(&digests, &attribution(), false).await;
        assert_eq!(answers[1].1.as_deref(), Ok(&b"good"[..]), "{code:?}");
        let in_batch = answers[0].1.clone().unwrap_err();
        let (_, streamed) = stream(&client, &bad).await;
        let in_stream = streamed.unwrap_err();
        assert_eq!(in_batch.kind, in_stream.kind, "{code:?}");
        assert!(in_batch.to_string().contains("injected fault"), "{in_batch}");
        assert_eq!(in_batch.is_not_found(), code == Code::NotFound);
    }
}

#[tokio::test]
async fn the_wait_that_a_server_asks_for_is_kept_within_limits() {
    let cache = start().await;
    let digest = cache.store().put(&b"blob"[..]);
    let (client, timer) = client_of(&cache, |_| {});
    let ask = Duration::from_secs(7);
    let year = Duration::from_secs(365 * 24 * 60 * 60);
    cache
        .faults()
        .blob(&digest, BlobFault::RetryAfter(ask), Times::Once);
    batch(&client, &digest).await.unwrap();
    cache
        .faults()
        .request(Rpc::BatchRead, RequestFault::RetryAfter(ask), Times::Once);
    batch(&client, &digest).await.unwrap();
    cache
        .faults()
        .blob(&digest, BlobFault::RetryAfter(year), Times::Once);
    stream(&client, &digest).await.1.unwrap();
    let longest = Duration::from_secs(30);
    assert_eq!(*timer.slept.lock().unwrap(), [ask, ask, longest]);
}

#[tokio::test]
async fn a_peer_that_accepts_and_never_answers_holds_nobody_for_long() {
    let cache = start().await;
    let digest = cache.store().put(&b"blob"[..]);
    let (client, _) = client_of(&cache, |o| {
        o.stall_timeout = Duration::from_secs(2);
        o.retries = 3;
    });
    cache.faults().accept_dead(1);
    assert_eq!(in_time(batch(&client, &digest)).await.unwrap().as_ref(), b"blob");
    assert_eq!(cache.faults().fired(), 1);
}

#[tokio::test]
async fn connections_that_died_without_a_word_are_replaced() {
    let cache = start().await;
    let small = cache.store().put(&b"blob"[..]);
    let large = cache.store().put(blob(SIZE));
    let (client, _) = client_of(&cache, |o| {
        o.stall_timeout = Duration::from_secs(2);
        o.retries = 3;
    });
    // All of them are in use.
    for _ in 0..8 {
        batch(&client, &small).await.unwrap();
    }
    assert_eq!(cache.stats().connections, 4);
    // In the middle of a stream, which has one after another of them to find out about.
    cache
        .faults()
        .blob(&large, BlobFault::StallAfter(1 << 20), Times::Once);
    let dying = async {
        while cache.faults().fired() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        cache.faults().kill_connections();
    };
    let (read, ()) = in_time(async { tokio::join!(stream(&client, &large), dying) }).await;
    assert_eq!(read.1, Ok(()));
    assert!(read.0 == blob(SIZE));
    for _ in 0..8 {
        in_time(batch(&client, &small)).await.unwrap();
    }
    // Each is opened again, some more than once on a busy machine.
    let connections = cache.stats().connections;
    assert!((8..=16).contains(&connections), "{connections}");
}

#[tokio::test]
async fn a_slow_server_is_waited_for() {
    let cache = start().await;
    let digest = cache.store().put(blob(SIZE));
    let (client, timer) = client_of(&cache, |_| {});
    let late = RequestFault::Delay(Duration::from_millis(300));
    cache.faults().every_request(late, Times::Always);
    assert!(in_time(stream(&client, &digest)).await.0 == blob(SIZE));
    in_time(batch(&client, &digest)).await.unwrap();
    assert!(timer.slept.lock().unwrap().is_empty(), "nothing was tried again");
}

/// A line to a server that lets 10 KiB of its answers through in each tenth of a second.
async fn slow_line(server: String) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("grpc://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = tokio::net::TcpStream::connect(&server).await.unwrap();
            tokio::spawn(async move {
                let (mut requests, mut slow) = client.into_split();
                let (mut answers, mut there) = server.into_split();
                tokio::spawn(async move { tokio::io::copy(&mut requests, &mut there).await });
                let mut piece = vec![0; 10 << 10];
                while let Ok(length @ 1..) = answers.read(&mut piece).await {
                    let _ = slow.write_all(&piece[..length]).await;
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            });
        }
    });
    endpoint
}

#[tokio::test]
async fn a_batch_may_take_longer_than_the_deadline_while_enough_of_it_comes() {
    let cache = start().await;
    let digests: Vec<_> = (0..6).map(|i| cache.store().put(blob(50_000 + i))).collect();
    let line = slow_line(cache.endpoint().replace("grpc://", "")).await;
    let mut options = options(&line);
    options.compression = Compression::Never;
    options.stall_timeout = Duration::from_secs(1);
    let timer = Arc::new(FakeTimer::default());
    let client = GrpcCache::with_timer(options.clone(), timer.clone()).unwrap();
    let answers = in_time(client.read_batch(&digests, &attribution(), false)).await;
    for (i, (_, answer)) in answers.iter().enumerate() {
        assert_eq!(answer.as_deref().unwrap(), blob(50_000 + i));
    }
    assert!(timer.slept.lock().unwrap().is_empty(), "nothing was tried again");
    // With more asked of the line than it has, the same is a stall.
    options.min_throughput = 10 << 20;
    options.retries = 0;
    let client = GrpcCache::with_timer(options, timer).unwrap();
    let error = in_time(client.read_batch(&digests, &attribution(), false))
        .await
        .remove(0)
        .1
        .unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Timeout);
    assert!(error.to_string().contains("the answer stalled after"), "{error}");
}

#[tokio::test]
async fn connections_that_are_sent_away_cost_no_call() {
    let cache = EmbeddedCache::builder()
        .connection_age(Duration::from_millis(20))
        .start()
        .await
        .unwrap();
    let small = cache.store().put(&b"blob"[..]);
    let large = cache.store().put(blob(SIZE));
    let (client, _) = client_of(&cache, |_| {});
    let begun = std::time::Instant::now();
    // On a busy machine, a round of reads may take longer than all of that.
    let few = || begun.elapsed() < Duration::from_millis(500) || cache.stats().connections <= 4;
    while few() && begun.elapsed() < Duration::from_secs(30) {
        let reads = (0..10).map(|_| batch(&client, &small));
        for read in in_time(futures::future::join_all(reads)).await {
            assert_eq!(read.as_deref(), Ok(&b"blob"[..]));
        }
        let (read, result) = in_time(stream(&client, &large)).await;
        assert_eq!(result, Ok(()));
        assert!(read == blob(SIZE));
    }
    let connections = cache.stats().connections;
    assert!(connections > 4, "{connections}");
}

#[tokio::test]
async fn more_streams_than_the_server_allows_wait_for_one_another() {
    let fake = Fake::new();
    let digest = fake.put(&blob(50_000));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = fake.router_on(Server::builder().max_concurrent_streams(3));
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    let mut options = options(&format!("grpc://{address}"));
    options.connections = Some(1);
    let client = GrpcCache::new(options).unwrap();
    let reads = futures::stream::iter(0..120)
        .map(|_| stream(&client, &digest))
        .buffer_unordered(120)
        .collect::<Vec<_>>();
    for (bytes, result) in in_time(reads).await {
        assert_eq!(result, Ok(()));
        assert!(bytes == blob(50_000));
    }
    assert_eq!(fake.count("read"), 120);
}

#[tokio::test]
async fn a_blob_evicted_between_the_question_and_the_read_is_missing_until_it_is_back() {
    let cache = start().await;
    let bytes = blob(SIZE);
    let digest = cache.store().put(bytes.clone());
    let (client, _) = client_of(&cache, |_| {});
    for large in [false, true] {
        cache.store().put(bytes.clone());
        let asked = std::slice::from_ref(&digest);
        assert_eq!(client.find_missing(asked, &attribution()).await, Ok(vec![]));
        cache.faults().blob(&digest, BlobFault::Evict, Times::Once);
        let read = async || match large {
            true => stream(&client, &digest).await.1,
            false => batch(&client, &digest).await.map(drop),
        };
        assert!(read().await.unwrap_err().is_not_found());
        // That it is missing is not remembered.
        cache.store().put(bytes.clone());
        assert_eq!(read().await, Ok(()));
    }
}

#[tokio::test]
async fn whatever_answers_instead_of_the_server_is_reported_in_clean_text() {
    let cache = start().await;
    let digest = cache.store().put(blob(SIZE));
    let (client, _) = client_of(&cache, |o| {
        o.retries = 2;
        o.connect
            .headers
            .push(Header::new("authorization", SECRET).unwrap());
    });
    let codes = [200, 301, 400, 401, 403, 404, 429, 500, 502, 503, 504].map(RequestFault::Http);
    let others = [
        RequestFault::TrailersOnly(Code::Ok),
        RequestFault::TrailersOnly(Code::DataLoss),
        RequestFault::Babble(Code::PermissionDenied),
        RequestFault::Babble(Code::Unavailable),
        RequestFault::HugeHead(1 << 20),
        RequestFault::AbsurdLength,
        RequestFault::Garbage,
        RequestFault::NoTrailers,
        RequestFault::Reset,
    ];
    for fault in codes.into_iter().chain(others) {
        for rpc in [Rpc::BatchRead, Rpc::StreamRead] {
            cache.faults().clear();
            let before = cache.stats();
            cache.faults().request(rpc, fault, Times::Always);
            let result = in_time(async {
                match rpc {
                    Rpc::BatchRead => batch(&client, &digest).await.map(drop),
                    _ => stream(&client, &digest).await.1,
                }
            })
            .await;
            let asked = cache.stats().since(&before);
            if (rpc, fault) == (Rpc::StreamRead, RequestFault::NoTrailers) {
                // All bytes are there.
                assert_eq!(result, Ok(()));
                continue;
            }
            if (rpc, fault) == (Rpc::BatchRead, RequestFault::Http(404)) {
                // A server that does not know the call: its streams are read.
                assert_eq!(result, Ok(()));
                continue;
            }
            // Reset streams bring some bytes every time.
            if (rpc, fault) != (Rpc::StreamRead, RequestFault::Reset) {
                let error = result.expect_err(&format!("{rpc:?} {fault:?}"));
                let shown = error.to_string();
                assert!(!shown.contains("planted"), "{shown}");
                assert!(
                    !shown.contains(|c: char| c.is_control() || c == '\u{202e}'),
                    "{shown:?}"
                );
                assert!(shown.len() < 1000, "{shown}");
                let calls = asked.batch_reads + asked.stream_reads;
                assert!((1..=8).contains(&calls), "{fault:?}: {asked:?}");
            }
        }
    }
    // And none of it is remembered.
    cache.faults().clear();
    assert!(batch(&client, &digest).await.is_ok());
    assert_eq!(stream(&client, &digest).await.1, Ok(()));
}

#[tokio::test]
async fn credentials_that_expire_are_asked_for_once_by_all_who_wait() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    // sh reads the script as its argument, so that nothing needs to be made executable while other tests fork.
    let script =
        "cat >> runs; echo >> runs; echo '{\"headers\": {\"authorization\": [\"'$(cat token)'\"]}}'\n";
    std::fs::write(file("get"), script).unwrap();
    let cache = start().await;
    let digests: Vec<Digest> = (0..30_u8).map(|n| cache.store().put(vec![n; 100])).collect();
    let (client, _) = client_of(&cache, |o| {
        o.connect.credential_helpers = vec!["sh".into()];
        o.connect.workspace = Some(dir.path().into());
    });
    for (runs, token) in [(1, "first-token"), (2, "second-token")] {
        std::fs::write(file("token"), token).unwrap();
        cache.require_header(Some(("authorization", token)));
        let reads = digests.iter().map(|digest| batch(&client, digest));
        for read in in_time(futures::future::join_all(reads)).await {
            assert!(read.is_ok(), "{read:?}");
        }
        let asked = std::fs::read_to_string(file("runs")).unwrap();
        assert_eq!(
            asked.matches("ContentAddressableStorage").count(),
            runs,
            "{asked}"
        );
    }
    assert!(cache.stats().unauthenticated > 0);
    // And one that cannot be given is no reason to ask for ever; its message is not shown.
    cache.require_header(Some(("authorization", "another-token")));
    let error = in_time(batch(&client, &digests[0])).await.unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Unauthenticated);
    assert!(!error.to_string().contains("second-token"), "{error}");
}
