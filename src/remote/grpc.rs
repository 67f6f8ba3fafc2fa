//! The gRPC client of a remote cache, put together.

use std::{fmt, sync::Arc};

use bazel_remote_apis::build::bazel::remote::execution::v2::ActionResult;
use futures::future::BoxFuture;
use tonic::Code;

use super::{
    Attribution, BatchAnswer, BlobStore, Capabilities, Sink,
    actions::{self, MetadataCache, Trees},
    batch,
    capabilities::{self, CapabilitiesCache},
    client::{Client, Failure},
    expand::{self, Expanded, TreeRef},
    options::RemoteOptions,
    pool::Connections,
    retry::{SystemTimer, Timer},
    stream,
    trees::DirectoryTree,
};
use crate::{
    digest::Digest,
    transport::{ConnectOptions, Fault, RemoteError, RemoteErrorKind},
};

/// A remote cache that speaks the Remote Execution API over gRPC. Cheap to clone: clones share the connections.
#[derive(Clone)]
pub struct GrpcCache(Arc<Inner>);

struct Inner {
    client: Client,
    capabilities: CapabilitiesCache,
    metadata: MetadataCache,
}

impl fmt::Debug for GrpcCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("GrpcCache").field(&self.0.client.place()).finish()
    }
}

impl GrpcCache {
    /// Reads the files that the options name, and connects nothing yet.
    ///
    /// # Errors
    /// [`RemoteErrorKind::Config`], naming the flag, when the options cannot work.
    pub fn new(options: RemoteOptions) -> Result<Self, RemoteError> {
        Self::with_timer(options, Arc::new(SystemTimer))
    }

    /// As [`GrpcCache::new`], with another clock for the waits between tries.
    ///
    /// # Errors
    /// As [`GrpcCache::new`].
    pub fn with_timer(options: RemoteOptions, timer: Arc<dyn Timer>) -> Result<Self, RemoteError> {
        Ok(Self(Arc::new(Inner {
            client: Client::new(options, timer)?,
            capabilities: CapabilitiesCache::new(),
            metadata: MetadataCache::new(),
        })))
    }

    /// The options that it was made with.
    #[must_use]
    pub fn options(&self) -> &RemoteOptions {
        &self.0.client.options
    }

    /// Asks the server once, without retries, whether this will work, and says in plain words what is wrong.
    ///
    /// # Errors
    /// When the server cannot be reached, does not speak TLS or insists on it, refuses us or our instance, or is no
    /// remote cache.
    pub async fn probe(&self) -> Result<Capabilities, RemoteError> {
        let client = &self.0.client;
        match capabilities::ask_once(client).await {
            Ok(Some(capabilities)) => Ok(capabilities),
            // Not all old servers know the call; every cache knows this one.
            Ok(None) => match actions::is_storage(client).await {
                Ok(()) => self.0.capabilities.get(client).await,
                Err(failure) => Err(self.explained(failure)),
            },
            Err(failure) => Err(self.explained(failure)),
        }
    }

    /// The error in words that say what to do.
    fn explained(&self, failure: Failure) -> RemoteError {
        let Failure {
            mut error,
            code,
            fault,
        } = failure;
        let options = &self.0.client.options;
        let ConnectOptions { endpoint, tls, .. } = &options.connect;
        let instance = &options.instance_name;
        let message = error.message.as_str();
        let advice = match fault {
            _ if code == Some(Code::Unimplemented) => "the server is not a remote cache".to_owned(),
            Some(Fault::NoTls) => "the server does not speak TLS there; use grpc://".to_owned(),
            Some(Fault::Untrusted) => {
                "the server's certificate is not trusted; give its certificate authority with --tls-certificate"
                    .to_owned()
            }
            Some(Fault::Refused | Fault::Closed | Fault::Reset)
                if fault == Some(Fault::Refused)
                    // The alert that refuses a client may be overtaken by the end of its connection.
                    || endpoint.is_tls() && tls.client_certificate.is_none() =>
            {
                "the server refused the TLS connection; it may require --tls-client-certificate".to_owned()
            }
            Some(Fault::NoHttp2 | Fault::Closed) if !endpoint.is_tls() && endpoint.unix_path().is_none() => {
                "the server does not speak plain gRPC there; it may require TLS: use grpcs://".to_owned()
            }
            _ => match error.kind {
                // Without a status it is our own refusal, which says what is wrong.
                RemoteErrorKind::Rejected if code.is_some() && instance.is_empty() => {
                    "the server rejected the request; it may require --remote-instance-name".to_owned()
                }
                RemoteErrorKind::Rejected if message.to_ascii_lowercase().contains("instance") => {
                    format!("the server does not have the instance {instance:?} (--remote-instance-name)")
                }
                RemoteErrorKind::Unavailable => "failed to connect to the server".to_owned(),
                RemoteErrorKind::Timeout => "the server does not answer".to_owned(),
                // Without a status it is the credential helper that failed, which the error names.
                RemoteErrorKind::Unauthenticated if code.is_some() => {
                    "the server requires credentials (--remote-header, --credential-helper)".to_owned()
                }
                RemoteErrorKind::Denied => "permission denied by the server".to_owned(),
                _ => return error,
            },
        };
        error.context = format!("remote cache {}", self.0.client.place());
        error.message = format!("{advice} ({})", error.message);
        error
    }

    /// The result of an action, or `None` when the cache has none. Remembered for some minutes.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn action_result(
        &self,
        action: &Digest,
        attribution: &Attribution,
    ) -> Result<Option<Arc<ActionResult>>, RemoteError> {
        self.0.metadata.result(&self.0.client, action, attribution).await
    }

    /// A directory tree, complete, with every digest checked. Remembered.
    ///
    /// # Errors
    /// When the server cannot be asked or lacks a part of it.
    pub async fn tree(
        &self,
        reference: &TreeRef,
        attribution: &Attribution,
    ) -> Result<Arc<DirectoryTree>, RemoteError> {
        let client = &self.0.client;
        let capabilities = self.0.capabilities.get(client).await?;
        self.0
            .metadata
            .tree(client, &capabilities, reference, attribution)
            .await
    }

    /// All outputs of an action, trees expanded, in the order of paths; `None` when the cache has no result.
    ///
    /// # Errors
    /// When the server cannot be asked, a tree is missing, or the result names what must not be written.
    pub async fn expand_action(
        &self,
        action: &Digest,
        attribution: &Attribution,
    ) -> Result<Option<Vec<Expanded>>, RemoteError> {
        let Some(result) = self.action_result(action, attribution).await? else {
            return Ok(None);
        };
        let refused = |e: expand::ExpandError| {
            let context = self.0.client.context(format_args!("result for action {action}"));
            RemoteError::new(RemoteErrorKind::Protocol, context, e.to_string())
        };
        let function = action.function();
        let mut trees = Trees::new();
        for reference in expand::trees_of(function, &result).map_err(refused)? {
            // One named twice is read once: the second time it is remembered.
            let tree = self.tree(&reference, attribution).await?;
            trees.insert(reference, tree);
        }
        expand::expand_result(function, &result, &trees, expand::MAX_ENTRIES)
            .map(Some)
            .map_err(refused)
    }

    /// Everything in a tree, by the digest of its `Tree` message or of its root `Directory`, whichever it is. The two
    /// cannot be told apart by their digests; a `Tree` has its root in field 1, where a `Directory` has files, so
    /// decoding tells.
    ///
    /// # Errors
    /// When the server cannot be asked, lacks a part of it, or the blob is neither.
    pub async fn expand_any_tree(
        &self,
        digest: &Digest,
        attribution: &Attribution,
    ) -> Result<Vec<Expanded>, RemoteError> {
        let tree = match self.tree(&TreeRef::Root(digest.clone()), attribution).await {
            Ok(tree) => tree,
            Err(root_error) => self
                .tree(&TreeRef::Tree(digest.clone()), attribution)
                .await
                .map_err(|tree_error| {
                    if root_error.is_not_found() {
                        tree_error
                    } else {
                        root_error
                    }
                })?,
        };
        expand::expand_tree(None, &tree, expand::MAX_ENTRIES).map_err(|e| {
            let context = self.0.client.context(format_args!("tree {digest}"));
            RemoteError::new(RemoteErrorKind::Protocol, context, e.to_string())
        })
    }

    /// A whole blob in memory, verified.
    ///
    /// # Errors
    /// When it is missing, or wrong from two connections.
    pub async fn read_blob(
        &self,
        digest: &Digest,
        attribution: &Attribution,
    ) -> Result<bytes::Bytes, RemoteError> {
        let client = &self.0.client;
        let capabilities = self.0.capabilities.get(client).await?;
        actions::verified_blob(client, &capabilities, digest, attribution).await
    }
}

impl BlobStore for GrpcCache {
    fn capabilities(&self) -> BoxFuture<'_, Result<Capabilities, RemoteError>> {
        Box::pin(self.0.capabilities.get(&self.0.client))
    }

    fn read_batch<'a>(
        &'a self,
        digests: &'a [Digest],
        attribution: &'a Attribution,
        avoid: bool,
    ) -> BoxFuture<'a, Vec<BatchAnswer>> {
        Box::pin(async move {
            let client = &self.0.client;
            match self.0.capabilities.get(client).await {
                Ok(capabilities) => batch::read(client, &capabilities, digests, attribution, avoid).await,
                Err(error) => digests.iter().map(|d| (d.clone(), Err(error.clone()))).collect(),
            }
        })
    }

    fn read_stream<'a>(
        &'a self,
        digest: &'a Digest,
        offset: u64,
        attribution: &'a Attribution,
        avoid: bool,
        sink: &'a mut dyn Sink,
    ) -> BoxFuture<'a, Result<(), RemoteError>> {
        Box::pin(async move {
            let client = &self.0.client;
            let capabilities = self.0.capabilities.get(client).await?;
            let avoid = if avoid {
                client.pool.carriers([digest])
            } else {
                Connections::default()
            };
            stream::read(client, &capabilities, digest, offset, attribution, avoid, sink).await
        })
    }

    fn find_missing<'a>(
        &'a self,
        digests: &'a [Digest],
        attribution: &'a Attribution,
    ) -> BoxFuture<'a, Result<Vec<Digest>, RemoteError>> {
        Box::pin(actions::find_missing(&self.0.client, digests, attribution))
    }

    fn describe(&self) -> String {
        self.0.client.place().to_owned()
    }
}
