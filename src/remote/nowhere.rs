//! No cache at all.

use std::sync::Arc;

use bazel_remote_apis::build::bazel::remote::execution::v2::ActionResult;
use futures::{FutureExt as _, future::BoxFuture};

use super::{ActionStore, Attribution, BatchAnswer, BlobStore, Capabilities, Sink};
use crate::{
    digest::{Digest, DigestFunction},
    transport::RemoteError,
};

/// What stands for a cache where there is none to ask: what is on disk is found there, and the rest fails for the reason
/// that this holds.
pub struct Nowhere(pub String);

impl Nowhere {
    fn error(&self, what: &str) -> RemoteError {
        RemoteError::config(what, self.0.clone())
    }
}

impl BlobStore for Nowhere {
    fn capabilities(&self) -> BoxFuture<'_, Result<Capabilities, RemoteError>> {
        async { Err(self.error("the remote cache")) }.boxed()
    }

    fn read_batch<'a>(
        &'a self,
        digests: &'a [Digest],
        _: &'a Attribution,
        _: bool,
    ) -> BoxFuture<'a, Vec<BatchAnswer>> {
        let answers = digests
            .iter()
            .map(|d| (d.clone(), Err(self.error(&d.to_string()))));
        futures::future::ready(answers.collect()).boxed()
    }

    fn read_stream<'a>(
        &'a self,
        digest: &'a Digest,
        _: u64,
        _: &'a Attribution,
        _: bool,
        _: &'a mut dyn Sink,
    ) -> BoxFuture<'a, Result<(), RemoteError>> {
        futures::future::ready(Err(self.error(&digest.to_string()))).boxed()
    }

    fn find_missing<'a>(
        &'a self,
        _: &'a [Digest],
        _: &'a Attribution,
    ) -> BoxFuture<'a, Result<Vec<Digest>, RemoteError>> {
        async { Err(self.error("the remote cache")) }.boxed()
    }

    fn describe(&self) -> String {
        "no cache".to_owned()
    }
}

impl ActionStore for Nowhere {
    fn action_result<'a>(
        &'a self,
        action: &'a Digest,
        _: &'a Attribution,
    ) -> BoxFuture<'a, Result<Option<Arc<ActionResult>>, RemoteError>> {
        futures::future::ready(Err(self.error(&format!("action {action}")))).boxed()
    }

    fn blob_size<'a>(
        &'a self,
        _: DigestFunction,
        hash: &'a [u8],
    ) -> BoxFuture<'a, Result<Option<u64>, RemoteError>> {
        futures::future::ready(Err(self.error(&hex::encode(hash)))).boxed()
    }

    fn probe(&self) -> BoxFuture<'_, Result<(), RemoteError>> {
        futures::future::ready(Err(self.error("the remote cache"))).boxed()
    }
}
