//! The client against a server that sends whatever a test wants: every fault here is one that a real server has shown.

mod credentials;
mod fake;
mod places;
mod ranges;
mod reading;
mod statuses;

use std::{sync::Arc, time::Duration};

use fake::{Fake, Reply, Request, Then, chunked, reply};

use super::*;
use crate::{
    remote::{Compression, retry::tests::FakeTimer},
    transport::{Endpoint, Header},
};

/// Options for tests: nothing waits long.
fn options(url: &str) -> RemoteOptions {
    let mut options = RemoteOptions::new(Endpoint::parse_cache("--remote-cache", url).unwrap());
    options.compression = Compression::Never;
    options.stall_timeout = Duration::from_secs(60);
    options
}

fn opened(options: RemoteOptions) -> (HttpCache, Arc<FakeTimer>) {
    let timer = Arc::new(FakeTimer::default());
    (HttpCache::with_timer(options, timer.clone()).unwrap(), timer)
}

/// A client of the fake, changed as wanted, that waits for nothing between tries.
async fn client(fake: &Fake, change: impl FnOnce(&mut RemoteOptions)) -> HttpCache {
    let mut options = options(&format!("http://{}/some/cas/", fake.start().await));
    change(&mut options);
    opened(options).0
}

fn digest(bytes: &[u8]) -> Digest {
    Digest::of(DigestFunction::Sha256, bytes)
}

fn nobody() -> Attribution {
    Attribution::default()
}

/// Bytes that do not compress to nothing, and of which any two places differ.
fn blob(length: usize) -> Vec<u8> {
    (0..length)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

/// A blob that is streamed from an offset: what the sink got, and how it ended.
async fn streamed(
    cache: &HttpCache,
    digest: &Digest,
    offset: u64,
    avoid: bool,
) -> (Vec<u8>, Result<(), RemoteError>) {
    let mut whole = Collect::default();
    let ended = cache
        .read_stream(digest, offset, &nobody(), avoid, &mut whole)
        .await;
    (whole.into_bytes().into(), ended)
}
