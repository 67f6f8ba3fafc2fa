//! No cache at all.

use std::sync::Arc;

use async_trait::async_trait;
use bazel_remote_apis::build::bazel::remote::execution::v2::ActionResult;

use super::{ActionStore, Attribution, BatchAnswer, BlobStore, Capabilities, Sink};
use crate::{
    digest::{Digest, DigestFunction},
    transport::RemoteError,
};

/// What stands for a cache where there is none to ask: what is on disk is found there, and the rest fails for the reason
/// that this holds.
pub(crate) struct Nowhere(pub String);

impl Nowhere {
    fn error(&self, what: &str) -> RemoteError {
        RemoteError::config(what, self.0.clone())
    }
}

#[async_trait]
impl BlobStore for Nowhere {
    async fn capabilities(&self) -> Result<Capabilities, RemoteError> {
        Err(self.error("the remote cache"))
    }

    async fn read_batch(&self, digests: &[Digest], _: &Attribution, _: bool) -> Vec<BatchAnswer> {
        let answers = digests
            .iter()
            .map(|d| (d.clone(), Err(self.error(&d.to_string()))));
        answers.collect()
    }

    async fn read_stream(
        &self,
        digest: &Digest,
        _: u64,
        _: &Attribution,
        _: bool,
        _: &mut dyn Sink,
    ) -> Result<(), RemoteError> {
        Err(self.error(&digest.to_string()))
    }

    async fn find_missing(&self, _: &[Digest], _: &Attribution) -> Result<Vec<Digest>, RemoteError> {
        Err(self.error("the remote cache"))
    }

    fn describe(&self) -> String {
        "no cache".to_owned()
    }
}

#[async_trait]
impl ActionStore for Nowhere {
    async fn action_result(
        &self,
        action: &Digest,
        _: &Attribution,
    ) -> Result<Option<Arc<ActionResult>>, RemoteError> {
        Err(self.error(&format!("action {action}")))
    }

    async fn blob_size(&self, _: DigestFunction, hash: &[u8]) -> Result<Option<u64>, RemoteError> {
        Err(self.error(&hex::encode(hash)))
    }

    async fn probe(&self) -> Result<(), RemoteError> {
        Err(self.error("the remote cache"))
    }
}
