//! The gRPC client of a remote cache, put together.

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use bazel_remote_apis::build::bazel::remote::execution::v2::ActionResult;
use tonic::Code;

use super::{
    ActionStore, Attribution, BatchAnswer, BlobStore, Capabilities, Sink,
    actions::{self, MetadataCache},
    batch,
    capabilities::{self, CapabilitiesCache},
    client::{Client, Failure},
    expand::TreeRef,
    options::RemoteOptions,
    pool::Connections,
    reading::read_tree,
    retry::{SystemTimer, Timer},
    store::all_failed,
    stream,
    trees::DirectoryTree,
};
use crate::{
    digest::{Digest, DigestFunction},
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
    pub fn options(&self) -> &RemoteOptions {
        &self.0.client.options
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
            Some(Fault::Certificate(distrust)) => distrust.advice().to_owned(),
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
}

#[async_trait]
impl BlobStore for GrpcCache {
    async fn capabilities(&self) -> Result<Capabilities, RemoteError> {
        self.0.capabilities.get(&self.0.client).await
    }

    async fn read_batch(
        &self,
        digests: &[Digest],
        attribution: &Attribution,
        avoid: bool,
    ) -> Vec<BatchAnswer> {
        let client = &self.0.client;
        match self.0.capabilities.get(client).await {
            Ok(capabilities) => batch::read(client, &capabilities, digests, attribution, avoid).await,
            Err(error) => all_failed(digests, &error),
        }
    }

    async fn read_stream(
        &self,
        digest: &Digest,
        offset: u64,
        attribution: &Attribution,
        avoid: bool,
        sink: &mut dyn Sink,
    ) -> Result<(), RemoteError> {
        let client = &self.0.client;
        let capabilities = self.0.capabilities.get(client).await?;
        let avoid = if avoid {
            client.pool.carriers([digest])
        } else {
            Connections::default()
        };
        stream::read(client, &capabilities, digest, offset, attribution, avoid, sink).await
    }

    async fn find_missing(
        &self,
        digests: &[Digest],
        attribution: &Attribution,
    ) -> Result<Vec<Digest>, RemoteError> {
        actions::find_missing(&self.0.client, digests, attribution).await
    }

    fn describe(&self) -> String {
        self.0.client.place().to_owned()
    }
}

#[async_trait]
impl ActionStore for GrpcCache {
    /// Remembered for some minutes.
    async fn action_result(
        &self,
        action: &Digest,
        attribution: &Attribution,
    ) -> Result<Option<Arc<ActionResult>>, RemoteError> {
        self.0.metadata.result(&self.0.client, action, attribution).await
    }

    async fn add_directories(
        &self,
        root: &Digest,
        attribution: &Attribution,
        tree: &mut DirectoryTree,
    ) -> Result<(), RemoteError> {
        actions::add_directories(&self.0.client, root, attribution, tree).await
    }

    /// Remembered.
    async fn tree(
        &self,
        reference: &TreeRef,
        attribution: &Attribution,
    ) -> Result<Arc<DirectoryTree>, RemoteError> {
        let read = read_tree(self, reference, attribution);
        self.0.metadata.tree(reference, read).await
    }

    async fn blob_size(&self, _: DigestFunction, hash: &[u8]) -> Result<Option<u64>, RemoteError> {
        let what = format!("blob {}", hex::encode(hash));
        let error = RemoteError::config(
            self.0.client.context(what),
            "a gRPC cache knows blobs by hash and size: give HASH/SIZE",
        );
        Err(error)
    }

    /// Asks the server once, without retries, whether this will work, and says in plain words what is wrong: it cannot be
    /// reached, does not speak TLS or insists on it, refuses us or our instance, or is not a remote cache.
    async fn probe(&self) -> Result<(), RemoteError> {
        let client = &self.0.client;
        match capabilities::ask_once(client).await {
            Ok(Some(_)) => Ok(()),
            // Not all old servers know the call; every cache knows this one.
            Ok(None) => match actions::is_storage(client).await {
                Ok(()) => self.0.capabilities.get(client).await.map(drop),
                Err(failure) => Err(self.explained(failure)),
            },
            Err(failure) => Err(self.explained(failure)),
        }
    }
}
