//! What actions resulted in, trees and sizes, of a chain.

use std::sync::Arc;

use bazel_remote_apis::build::bazel::remote::execution::v2::ActionResult;
use futures::{
    FutureExt as _,
    future::{BoxFuture, join_all},
};

use super::{
    super::{ActionStore, Attribution, expand::TreeRef, reading::read_tree, trees::DirectoryTree},
    Chain, Refusals,
};
use crate::{
    digest::{Digest, DigestFunction},
    transport::RemoteError,
};

impl ActionStore for Chain {
    /// Of the first store that has one, whether or not its blobs are anywhere: what Bazel keeps in a disk cache names blobs
    /// that are only in the remote one.
    fn action_result<'a>(
        &'a self,
        action: &'a Digest,
        attribution: &'a Attribution,
    ) -> BoxFuture<'a, Result<Option<Arc<ActionResult>>, RemoteError>> {
        async move {
            let mut refusals = Refusals::default();
            for (number, member) in self.members.iter().enumerate() {
                let answer = match member.ask() {
                    Ok(ticket) => {
                        let answer = member.store.action_result(action, attribution).await;
                        member.heard(ticket, answer.as_ref().err());
                        answer
                    }
                    Err(error) => Err(error),
                };
                match answer {
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
        .boxed()
    }

    fn add_directories<'a>(
        &'a self,
        root: &'a Digest,
        attribution: &'a Attribution,
        tree: &'a mut DirectoryTree,
    ) -> BoxFuture<'a, Result<(), RemoteError>> {
        async move {
            for member in &self.members {
                if tree.missing().is_empty() {
                    break;
                }
                let Ok(ticket) = member.look() else { continue };
                let added = member.store.add_directories(root, attribution, tree).await;
                member.heard(ticket, added.as_ref().err());
                if let Err(error) = added {
                    // What is missing then is read as blobs, of any store.
                    tracing::debug!(store = &*member.name, %error, "no directories at once");
                }
            }
            Ok(())
        }
        .boxed()
    }

    /// Remembered.
    fn tree<'a>(
        &'a self,
        reference: &'a TreeRef,
        attribution: &'a Attribution,
    ) -> BoxFuture<'a, Result<Arc<DirectoryTree>, RemoteError>> {
        let read = read_tree(self, reference, attribution);
        Box::pin(self.metadata.tree(reference, read))
    }

    fn blob_size<'a>(
        &'a self,
        function: DigestFunction,
        hash: &'a [u8],
    ) -> BoxFuture<'a, Result<Option<u64>, RemoteError>> {
        async move {
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
        .boxed()
    }

    /// Asks all of them.
    fn probe(&self) -> BoxFuture<'_, Result<(), RemoteError>> {
        async {
            let all = join_all(self.members.iter().map(|member| member.store.probe())).await;
            all.into_iter().collect()
        }
        .boxed()
    }
}
