//! The client against a small server that follows a script: every fault here is one that a real server has shown.

mod batches;
mod fake;
mod faults;
mod lies;
mod metadata;
mod places;
mod real;
mod simulated;
mod streams;

use std::sync::Arc;

use bytes::Bytes;
use fake::Fake;

use super::{retry::tests::FakeTimer, *};
use crate::{
    digest::{Digest, DigestFunction},
    transport::{Endpoint, Header, RemoteError, RemoteErrorKind},
};

/// Options for tests: nothing waits long.
fn options(endpoint: &str) -> RemoteOptions {
    let mut options = RemoteOptions::new(Endpoint::parse("--remote-cache", endpoint).unwrap());
    options.compression = Compression::Always;
    options.stall_timeout = std::time::Duration::from_secs(20);
    options
}

/// A client of the fake, changed as wanted, that waits for nothing between tries.
async fn client(fake: &Fake, change: impl FnOnce(&mut RemoteOptions)) -> GrpcCache {
    let mut options = options(&fake.start().await);
    change(&mut options);
    GrpcCache::with_timer(options, Arc::new(FakeTimer::default())).unwrap()
}

fn digest(bytes: &[u8]) -> Digest {
    Digest::of(DigestFunction::Sha256, bytes)
}

fn attribution() -> Attribution {
    Attribution::default()
}

/// Bytes that do not compress to nothing, and of which any two places differ.
fn blob(length: usize) -> Vec<u8> {
    (0..length)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}
