//! What actions resulted in, trees and sizes, of a chain.

use std::sync::Arc;

use async_trait::async_trait;
use bazel_remote_apis::build::bazel::remote::execution::v2::ActionResult;
use futures::future::join_all;

use super::{
    super::{ActionStore, Attribution, expand::TreeRef, reading::read_tree, trees::DirectoryTree},
    Chain, Refusals,
};
use crate::{
    digest::{Digest, DigestFunction},
    transport::RemoteError,
};

#[async_trait]
impl ActionStore for Chain {
    /// Of the first store that has one, whether or not its blobs are anywhere: what Bazel keeps in a disk cache names blobs
    /// that are only in the remote one.
    async fn action_result(
        &self,
        action: &Digest,
        attribution: &Attribution,
    ) -> Result<Option<Arc<ActionResult>>, RemoteError> {
        let mut refusals = Refusals::default();
        for (number, member) in self.members.iter().enumerate() {
            let answer = member.store.action_result(action, attribution);
            match member.asked(member.ask(), answer).await {
                Ok(Some(result)) => return Ok(Some(result)),
                Ok(None) => {}
                Err(error) => refusals.0.push((number, error)),
            }
        }
        if refusals.0.is_empty() {
            return Ok(None);
        }
        Err(self.nobody(|| format!("result for action {action}"), refusals))
    }

    async fn add_directories(
        &self,
        root: &Digest,
        attribution: &Attribution,
        tree: &mut DirectoryTree,
    ) -> Result<(), RemoteError> {
        for member in &self.members {
            if tree.missing().is_empty() {
                break;
            }
            let added = member.store.add_directories(root, attribution, tree);
            if let Err(error) = member.asked(member.look(), added).await {
                // What is missing then is read as blobs, of any store.
                tracing::debug!(store = &*member.name, %error, "no directories at once");
            }
        }
        Ok(())
    }

    /// Remembered.
    async fn tree(
        &self,
        reference: &TreeRef,
        attribution: &Attribution,
    ) -> Result<Arc<DirectoryTree>, RemoteError> {
        let read = read_tree(self, reference, attribution);
        self.metadata.tree(reference, read).await
    }

    async fn blob_size(&self, function: DigestFunction, hash: &[u8]) -> Result<Option<u64>, RemoteError> {
        let mut refusals = Refusals::default();
        for (number, member) in self.members.iter().enumerate() {
            match member.store.blob_size(function, hash).await {
                Ok(Some(size)) => return Ok(Some(size)),
                Ok(None) => {}
                // It says nothing of the store: some know no blob by its hash alone.
                Err(error) => refusals.0.push((number, error)),
            }
        }
        if refusals.0.is_empty() {
            return Ok(None);
        }
        Err(self.nobody(|| format!("blob {}", hex::encode(hash)), refusals))
    }

    /// Asks all of them.
    async fn probe(&self) -> Result<(), RemoteError> {
        let all = join_all(self.members.iter().map(|member| member.store.probe())).await;
        all.into_iter().collect()
    }
}
