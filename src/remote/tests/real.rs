//! Against a real server that takes writes: the one that `OUTHAUL_TEST_CACHE` names (`grpc://HOST:PORT`), or else
//! buildbox-casd, as `scripts/install-peers` installs it. Without either it skips loudly, or fails if
//! `OUTHAUL_REQUIRE_PEERS` is set.

use std::{
    net::{TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command},
    time::{Duration, Instant},
};

use bazel_remote_apis::google::bytestream::{WriteRequest, byte_stream_client::ByteStreamClient};

use super::*;

/// A server of our own, ended with the test.
struct Server {
    process: Child,
    _store: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn server() -> Option<(Option<Server>, String)> {
    if let Ok(endpoint) = std::env::var("OUTHAUL_TEST_CACHE") {
        return Some((None, endpoint));
    }
    let peers = std::env::var_os("OUTHAUL_PEERS")
        .map(PathBuf::from)
        .or_else(|| Some(std::env::home_dir()?.join(".cache/outhaul-peers")))?;
    let casd = peers.join("bin/buildbox-casd");
    if !casd.exists() {
        let required = std::env::var("OUTHAUL_REQUIRE_PEERS").unwrap_or_default();
        let required = required == "1" || required.split(',').any(|one| one == "buildbox-casd");
        assert!(
            !required,
            "{} is missing; scripts/install-peers installs it",
            casd.display()
        );
        eprintln!(
            "SKIPPED: {} is missing; scripts/install-peers installs it",
            casd.display()
        );
        return None;
    }
    let store = tempfile::tempdir().unwrap();
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let process = Command::new(casd)
        .args(["--bind", &address.to_string(), "--log-level", "error"])
        .arg(store.path())
        .spawn()
        .unwrap();
    let server = Server {
        process,
        _store: store,
    };
    let end = Instant::now() + Duration::from_secs(20);
    while TcpStream::connect(address).is_err() {
        assert!(Instant::now() < end, "buildbox-casd does not answer");
        std::thread::sleep(Duration::from_millis(20));
    }
    Some((Some(server), format!("grpc://{address}")))
}

async fn write(endpoint: &str, bytes: &[u8]) -> Digest {
    let digest = digest(bytes);
    let name = format!("uploads/00000000-0000-4000-8000-000000000000/blobs/{digest}");
    let requests: Vec<_> = bytes
        .chunks(1024 * 1024)
        .enumerate()
        .map(|(i, data)| WriteRequest {
            resource_name: name.clone(),
            write_offset: (i * 1024 * 1024) as i64,
            finish_write: (i + 1) * 1024 * 1024 >= bytes.len(),
            data: data.to_vec(),
        })
        .collect();
    let mut client = ByteStreamClient::connect(endpoint.replace("grpc://", "http://"))
        .await
        .unwrap();
    client.write(futures::stream::iter(requests)).await.unwrap();
    digest
}

#[tokio::test]
async fn a_real_cache_is_read_by_batches_and_streams() {
    let Some((_server, endpoint)) = server() else {
        return;
    };
    let cache = GrpcCache::new(options(&endpoint)).unwrap();
    // Another test's server may have had the port for a moment.
    let end = Instant::now() + Duration::from_secs(20);
    while let Err(error) = cache.probe().await {
        assert!(Instant::now() < end, "{error}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let capabilities = cache.capabilities().await.unwrap();
    eprintln!("{capabilities:?}");
    let mut digests = Vec::new();
    for i in 0..50 {
        digests.push(write(&endpoint, &blob(1000 + i)).await);
    }
    let missing = digest(b"never written");
    digests.push(missing.clone());
    for (digest, answer) in cache.read_batch(&digests, &attribution(), false).await {
        match answer {
            Ok(bytes) => assert_eq!(Digest::of(DigestFunction::Sha256, &bytes), digest),
            Err(error) => {
                eprintln!("{error}");
                assert!(digest == missing && error.is_not_found());
            }
        }
    }
    assert_eq!(
        cache.find_missing(&digests, &attribution()).await.unwrap(),
        std::slice::from_ref(&missing)
    );

    let large = blob(20_000_000);
    let digest = write(&endpoint, &large).await;
    for offset in [0, 12_345_678] {
        let mut sink = reading::Collect::default();
        cache
            .read_stream(&digest, offset, &attribution(), false, &mut sink)
            .await
            .unwrap();
        assert!(sink.into_bytes() == large[usize::try_from(offset).unwrap()..]);
    }
    assert_eq!(cache.action_result(&missing, &attribution()).await, Ok(None));
    for change in [
        |o: &mut RemoteOptions| o.instance_name = "no/such".into(),
        |o: &mut RemoteOptions| o.digest_function = DigestFunction::Blake3,
    ] {
        let mut options = options(&endpoint);
        change(&mut options);
        eprintln!("{}", GrpcCache::new(options).unwrap().probe().await.unwrap_err());
    }
}
