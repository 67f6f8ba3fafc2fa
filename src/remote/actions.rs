//! The metadata that a cache keeps: action results, trees, and what is missing.

use std::{collections::HashSet, sync::Arc, time::Duration};

use bazel_remote_apis::build::bazel::remote::execution::v2::{
    ActionResult, FindMissingBlobsRequest, GetActionResultRequest, GetTreeRequest,
    action_cache_client::ActionCacheClient,
    content_addressable_storage_client::ContentAddressableStorageClient,
};
use http::uri::PathAndQuery;
use moka::future::Cache;
use prost::Message as _;
use tonic::{Code, Status};

use super::{
    Attribution,
    client::{Client, Failure, MAX_MESSAGE, from_wire, services, to_wire},
    expand::TreeRef,
    pool::Connections,
    trees::{DirectoryTree, MAX_TREE, RawGetTreeResponse, too_large},
};
use crate::{
    digest::{Digest, DigestFunction},
    transport::RemoteError,
};

/// The most that a request for missing blobs holds. As Bazel splits them.
const MAX_REQUEST: usize = 1024 * 1024;

/// Memory for each of the two caches, in bytes.
const CACHE_BYTES: u64 = 64 * 1024 * 1024;

/// An action may be executed again with another result; trees never change, their digest is their name.
const RESULTS_KEPT_FOR: Duration = Duration::from_secs(5 * 60);

const GET_TREE: &str = "/build.bazel.remote.execution.v2.ContentAddressableStorage/GetTree";

/// What was read lately. Only what the server had is remembered, never that it had not.
pub(crate) struct MetadataCache {
    results: Cache<Digest, Arc<ActionResult>>,
    trees: Cache<TreeRef, Arc<DirectoryTree>>,
}

impl MetadataCache {
    pub(crate) fn new() -> Self {
        let weight = |bytes: usize| u32::try_from(bytes.saturating_mul(4) + 256).unwrap_or(u32::MAX);
        Self {
            results: Cache::builder()
                .max_capacity(CACHE_BYTES)
                .weigher(move |_, result: &Arc<ActionResult>| weight(result.encoded_len()))
                .time_to_live(RESULTS_KEPT_FOR)
                .build(),
            trees: Cache::builder()
                .max_capacity(CACHE_BYTES)
                .weigher(|_, tree: &Arc<DirectoryTree>| tree.weight())
                .build(),
        }
    }

    /// The result of an action, or `None` when the cache has none.
    pub(crate) async fn result(
        &self,
        client: &Client,
        action: &Digest,
        attribution: &Attribution,
    ) -> Result<Option<Arc<ActionResult>>, RemoteError> {
        let result = self
            .results
            .try_get_with(action.clone(), action_result(client, action, attribution))
            .await;
        match result {
            Ok(result) => Ok(Some(result)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(Arc::unwrap_or_clone(error)),
        }
    }

    /// A tree, if it must be read with this.
    pub(crate) async fn tree(
        &self,
        reference: &TreeRef,
        read: impl Future<Output = Result<DirectoryTree, RemoteError>>,
    ) -> Result<Arc<DirectoryTree>, RemoteError> {
        self.trees
            .try_get_with(reference.clone(), async { read.await.map(Arc::new) })
            .await
            .map_err(Arc::unwrap_or_clone)
    }
}

async fn action_result(
    client: &Client,
    action: &Digest,
    attribution: &Attribution,
) -> Result<Arc<ActionResult>, RemoteError> {
    let request = GetActionResultRequest {
        instance_name: client.instance(),
        action_digest: Some(to_wire(action)),
        digest_function: action.function().wire(),
        ..GetActionResultRequest::default()
    };
    let context = client.context(format_args!("result for action {action}"));
    client
        .unary(
            (services::ACTION_CACHE, &context),
            attribution,
            &request,
            |channel, request| async move {
                ActionCacheClient::new(channel)
                    .max_decoding_message_size(MAX_MESSAGE)
                    .get_action_result(request)
                    .await
            },
        )
        .await
        .map(Arc::new)
        .map_err(|failure| failure.error)
}

/// Which of these the cache does not have, in the order asked, each once.
pub(crate) async fn find_missing(
    client: &Client,
    digests: &[Digest],
    attribution: &Attribution,
) -> Result<Vec<Digest>, RemoteError> {
    let mut missing = HashSet::new();
    for request in missing_requests(client.instance(), digests) {
        let context = client.context(format_args!(
            "FindMissingBlobs for {} blobs",
            request.blob_digests.len()
        ));
        let answer = client
            .unary(
                (services::CAS, &context),
                attribution,
                &request,
                |channel, request| async move {
                    ContentAddressableStorageClient::new(channel)
                        .max_decoding_message_size(MAX_MESSAGE)
                        .find_missing_blobs(request)
                        .await
                },
            )
            .await
            .map_err(|failure| failure.error)?;
        let Some(function) = DigestFunction::from_wire(request.digest_function) else {
            continue;
        };
        missing.extend(
            answer
                .missing_blob_digests
                .iter()
                .filter_map(|d| from_wire(function, d)),
        );
    }
    // Taken out when reported, so that one asked about twice is reported once.
    Ok(digests.iter().filter(|d| missing.remove(*d)).cloned().collect())
}

/// The questions about these digests, each of one function and small enough. The empty blob is never missing, and
/// none is asked about twice.
fn missing_requests(instance_name: String, digests: &[Digest]) -> Vec<FindMissingBlobsRequest> {
    let mut requests = Vec::new();
    let mut size = 0;
    let mut asked = HashSet::new();
    for digest in digests {
        if digest.is_empty() || !asked.insert(digest) {
            continue;
        }
        let wire = to_wire(digest);
        // Tag and length of the embedded message are at most four bytes.
        let length = wire.encoded_len() + 4;
        let function = digest.function().wire();
        match requests.last_mut() {
            Some(FindMissingBlobsRequest {
                blob_digests,
                digest_function,
                ..
            }) if *digest_function == function && size + length <= MAX_REQUEST => {
                blob_digests.push(wire);
                size += length;
            }
            _ => {
                let request = FindMissingBlobsRequest {
                    instance_name: instance_name.clone(),
                    blob_digests: vec![wire],
                    digest_function: function,
                };
                size = request.encoded_len();
                requests.push(request);
            }
        }
    }
    requests
}

/// Adds the directories that `GetTree` sends, of a server that has it, tried as often as any request.
pub(crate) async fn add_directories(
    client: &Client,
    root: &Digest,
    attribution: &Attribution,
    tree: &mut DirectoryTree,
) -> Result<(), RemoteError> {
    let context = client.context(format_args!("directory {root}"));
    let mut backoff = client.retry.start();
    loop {
        match get_tree(client, &context, root, attribution, tree).await {
            Err(failure) if failure.code != Some(Code::Unimplemented) => backoff.again(failure.error).await?,
            _ => return Ok(()),
        }
    }
}

/// Adds what `GetTree` sends, page by page. Each directory is filed under its own digest, so nothing that the server
/// adds or alters can take another's place.
async fn get_tree(
    client: &Client,
    context: &str,
    root: &Digest,
    attribution: &Attribution,
    tree: &mut DirectoryTree,
) -> Result<(), Failure> {
    let mut avoid = Connections::default();
    let mut request = GetTreeRequest {
        instance_name: client.instance(),
        root_digest: Some(to_wire(root)),
        page_size: 0,
        page_token: String::new(),
        digest_function: root.function().wire(),
    };
    let mut tokens = HashSet::new();
    loop {
        let (mut stream, _) = client
            .once(
                (services::CAS, context),
                attribution,
                &mut avoid,
                &request,
                |channel, request| async move {
                    let mut grpc = tonic::client::Grpc::new(channel).max_decoding_message_size(MAX_MESSAGE);
                    grpc.ready()
                        .await
                        .map_err(|e| Status::unavailable(format!("not ready: {e}")))?;
                    let codec = tonic_prost::ProstCodec::<GetTreeRequest, RawGetTreeResponse>::default();
                    grpc.server_streaming(request, PathAndQuery::from_static(GET_TREE), codec)
                        .await
                },
            )
            .await?;
        let mut token = String::new();
        while let Some(page) = client.within_deadline(context, stream.message()).await? {
            token = page.next_page_token;
            for directory in page.directories {
                tree.add(directory)
                    .map_err(|e| RemoteError::protocol(context, e))?;
            }
            if tree.encoded_bytes > MAX_TREE {
                return Err(too_large(context).into());
            }
        }
        if token.is_empty() {
            return Ok(());
        }
        if !tokens.insert(token.clone()) {
            return Err(
                RemoteError::protocol(context, "the server repeats the same page of the tree").into(),
            );
        }
        request.page_token = token;
    }
}

/// Whether the server knows a call that every storage knows. Asks about nothing.
pub(crate) async fn is_storage(client: &Client) -> Result<(), Failure> {
    let request = FindMissingBlobsRequest {
        instance_name: client.instance(),
        ..FindMissingBlobsRequest::default()
    };
    client
        .once(
            (services::CAS, &client.context("an answer")),
            &Attribution::default(),
            &mut Connections::default(),
            &request,
            |channel, request| async move {
                ContentAddressableStorageClient::new(channel)
                    .find_missing_blobs(request)
                    .await
            },
        )
        .await
        .map(drop)
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn questions_stay_below_their_limit_and_none_is_lost() {
        let digests: Vec<Digest> = (0..30_000_u32)
            .map(|i| Digest::of(DigestFunction::Sha256, &i.to_le_bytes()))
            .collect();
        let twice: Vec<Digest> = digests.iter().chain(&digests).cloned().collect();
        let requests = missing_requests("instance".into(), &twice);
        assert!(requests.len() > 1);
        assert!(requests.iter().all(|r| r.encoded_len() <= MAX_REQUEST));
        let asked: usize = requests.iter().map(|r| r.blob_digests.len()).sum();
        assert_eq!(asked, digests.len());
    }

    #[test]
    fn functions_are_not_mixed_and_the_empty_blob_is_not_asked_about() {
        let digests = [
            Digest::of(DigestFunction::Sha256, b"a"),
            Digest::of(DigestFunction::Blake3, b"a"),
            Digest::of(DigestFunction::Sha256, b""),
        ];
        let requests = missing_requests(String::new(), &digests);
        assert_eq!(
            requests.iter().map(|r| r.digest_function).collect::<Vec<_>>(),
            [DigestFunction::Sha256.wire(), DigestFunction::Blake3.wire()]
        );
    }
}
