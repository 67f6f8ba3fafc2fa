//! Buckets, with real stores and, for what these do not do, with one of our own.

mod faults;
mod stores;

use std::{path::Path, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;

use super::{bucket::Bucket, cache::ObjectCache, credentials::Environment};
use crate::{
    digest::{Digest, DigestFunction},
    remote::{Attribution, BlobStore as _, RemoteOptions, Sink, reading::Collect},
    transport::{Endpoint, RemoteError},
};

/// Bytes that compress, but not to nothing.
fn noise(length: usize) -> Vec<u8> {
    (0..length as u64).map(|i| ((i * i) >> 9) as u8).collect()
}

fn sha256(bytes: &[u8]) -> Digest {
    Digest::of(DigestFunction::Sha256, bytes)
}

/// The bucket of an address, with nothing else in the environment.
fn bucket(url: &str, variables: &[(&str, &str)]) -> Result<Bucket, RemoteError> {
    let mut options = RemoteOptions::new(Endpoint::parse_cache("--remote-cache", url)?);
    options.retries = 2;
    options.max_retry_delay = Duration::from_millis(200);
    Bucket::open_in(&options, &Environment::fake(variables, Path::new("/nonexistent")))
}

fn cache(url: &str, variables: &[(&str, &str)]) -> Result<ObjectCache, RemoteError> {
    ObjectCache::with(bucket(url, variables)?)
}

async fn batch(cache: &ObjectCache, digests: &[Digest]) -> Vec<Result<Bytes, RemoteError>> {
    let answers = cache.read_batch(digests, &Attribution::default(), false).await;
    assert!(answers.iter().map(|(digest, _)| digest).eq(digests));
    answers.into_iter().map(|(_, answer)| answer).collect()
}

async fn stream(cache: &ObjectCache, digest: &Digest, offset: u64) -> Result<Vec<u8>, RemoteError> {
    let mut sink = Collect::default();
    let nobody = Attribution::default();
    cache
        .read_stream(digest, offset, &nobody, false, &mut sink)
        .await?;
    Ok(sink.into_bytes().into())
}

/// Says no after some bytes.
struct Full(usize);

#[async_trait]
impl Sink for Full {
    async fn write(&mut self, bytes: Bytes) -> std::io::Result<()> {
        let fits = self.0 >= bytes.len();
        self.0 = self.0.saturating_sub(bytes.len());
        if fits {
            Ok(())
        } else {
            Err(std::io::Error::other("full"))
        }
    }
}
