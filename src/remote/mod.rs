//! The interface to a remote cache, and its implementations.
//!
//! This module does not depend on Bazel or its events.

use std::sync::Arc;

use bazel_remote_apis::build::bazel::remote::execution::v2::ActionResult;
use bytes::Bytes;
use futures::future::BoxFuture;

use crate::{
    digest::{Digest, DigestFunction},
    transport::RemoteError,
};

pub mod expand;
pub mod grpc;
pub mod http;
#[cfg(feature = "object-stores")]
pub mod object;
pub mod options;
pub mod retry;
pub mod trees;

mod actions;
mod batch;
mod call;
mod capabilities;
#[cfg_attr(
    not(feature = "object-stores"),
    allow(dead_code, reason = "only stores have it")
)]
mod casblob;
mod chain;
mod client;
mod compression;
mod copies;
mod disk;
mod inflate;
#[cfg_attr(
    not(feature = "object-stores"),
    allow(dead_code, reason = "only stores have it")
)]
mod layout;
mod limits;
mod metadata;
mod nowhere;
mod open;
mod pool;
mod reading;
mod rope;
mod status;
mod stream;
mod wire;
mod written;

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;

pub use chain::Chain;
pub use compression::Compression;
pub(crate) use copies::{Copy, LOCAL_FILES, LocalFirst, Offer, looks_right};
pub use disk::DiskCache;
pub(crate) use disk::piece;
pub use expand::{ExpandError, Expanded, TreeRef};
pub use grpc::GrpcCache;
pub use http::HttpCache;
pub use nowhere::Nowhere;
pub use open::open;
pub use options::{MAX_HTTP_CONNECTIONS, RemoteOptions};
#[cfg(test)]
pub(crate) use reading::Collect;
pub use reading::{expand_action, expand_any_tree, read_blob};
pub use trees::DirectoryTree;
pub use written::WrittenDigest;

/// What a build's requests are attributed to, sent as the Remote Execution API's `RequestMetadata`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Attribution {
    /// The build's invocation id.
    pub invocation_id: String,
    /// The build's build id, which ties several invocations together.
    pub build_id: String,
    /// The target asked for, if there is one.
    pub target: String,
}

/// What a cache can do, learned once per connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// Functions that the server takes; empty when it does not say.
    pub digest_functions: Vec<DigestFunction>,
    /// Largest sum of blob sizes in one batch, already within the message limit of gRPC.
    pub max_batch_bytes: u64,
    /// zstd for `ByteStream`.
    pub zstd_streams: bool,
    /// zstd for `BatchReadBlobs`.
    pub zstd_batches: bool,
}

impl Capabilities {
    /// Those of a store that names none: no compression, and batches up to this size in bytes.
    #[must_use]
    pub const fn plain(max_batch_bytes: u64) -> Self {
        Self {
            digest_functions: Vec::new(),
            max_batch_bytes,
            zstd_streams: false,
            zstd_batches: false,
        }
    }
}

/// One blob's answer in a batch.
pub type BatchAnswer = (Digest, Result<Bytes, RemoteError>);

/// Takes a stream's bytes as they come.
///
/// `write` gets consecutive pieces; an error stops the transfer and is returned as
/// [`RemoteErrorKind::Sink`](crate::transport::RemoteErrorKind::Sink).
pub trait Sink: Send {
    /// Takes the next bytes. Waits while the sink is full, which holds the network back.
    fn write(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), String>>;
}

/// A store of blobs by digest: the part of a remote cache that fetching needs.
pub trait BlobStore: Send + Sync + 'static {
    /// What the server can do.
    fn capabilities(&self) -> BoxFuture<'_, Result<Capabilities, RemoteError>>;

    /// Reads small blobs in one request. Every digest gets exactly one answer, in the order asked, whatever the
    /// server did; bytes are decompressed but **not verified**: the writer hashes them where they are hot. `avoid`
    /// asks for another connection than the last time, after bytes that turned out wrong.
    ///
    /// # Errors
    /// Per blob. A request that failed as a whole gives its error to every digest. Retryable failures have already
    /// been retried.
    fn read_batch<'a>(
        &'a self,
        digests: &'a [Digest],
        attribution: &'a Attribution,
        avoid: bool,
    ) -> BoxFuture<'a, Vec<BatchAnswer>>;

    /// Streams one blob into a sink from byte `offset`, resuming after broken streams. Not verified either.
    ///
    /// # Errors
    /// When the blob is missing, the sink fails, the retries are used up, or the server sends more or fewer bytes
    /// than the digest says.
    fn read_stream<'a>(
        &'a self,
        digest: &'a Digest,
        offset: u64,
        attribution: &'a Attribution,
        avoid: bool,
        sink: &'a mut dyn Sink,
    ) -> BoxFuture<'a, Result<(), RemoteError>>;

    /// Which of the digests the cache does not have.
    ///
    /// # Errors
    /// When the server cannot be asked.
    fn find_missing<'a>(
        &'a self,
        digests: &'a [Digest],
        attribution: &'a Attribution,
    ) -> BoxFuture<'a, Result<Vec<Digest>, RemoteError>>;

    /// The cache's endpoint and instance name, for messages; without credentials.
    fn describe(&self) -> String;

    /// Where the bytes of a blob came from that was read here lately, as [`BlobStore::describe`] has it; `None` where there is
    /// one store only, or it is not known any more.
    fn origin(&self, _digest: &Digest) -> Option<Arc<str>> {
        None
    }

    /// Tells that the bytes of a blob that was read here lately were wrong. Whether another store may have the right ones;
    /// where there is one store only, reading once more with `avoid` is all that can be done.
    fn distrust(&self, _digest: &Digest) -> bool {
        false
    }
}

/// A store that also knows what actions resulted in: the part of a remote cache that reading by action or tree needs.
pub trait ActionStore: BlobStore {
    /// The result of an action, or `None` when the store has none. Nothing vouches for it: only blobs have digests.
    ///
    /// # Errors
    /// When the store cannot be asked, or what it has is no result.
    fn action_result<'a>(
        &'a self,
        action: &'a Digest,
        attribution: &'a Attribution,
    ) -> BoxFuture<'a, Result<Option<Arc<ActionResult>>, RemoteError>>;

    /// Adds directories of a tree, by its root: as many as the store gives without being asked for each. The others are
    /// read as blobs.
    ///
    /// # Errors
    /// When the store cannot be asked.
    fn add_directories<'a>(
        &'a self,
        _root: &'a Digest,
        _attribution: &'a Attribution,
        _tree: &'a mut DirectoryTree,
    ) -> BoxFuture<'a, Result<(), RemoteError>> {
        Box::pin(async { Ok(()) })
    }

    /// A directory tree, complete, with every digest checked.
    ///
    /// # Errors
    /// When the store cannot be asked or lacks a part of it.
    fn tree<'a>(
        &'a self,
        reference: &'a TreeRef,
        attribution: &'a Attribution,
    ) -> BoxFuture<'a, Result<Arc<DirectoryTree>, RemoteError>> {
        Box::pin(async move {
            reading::read_tree(self, reference, attribution)
                .await
                .map(Arc::new)
        })
    }

    /// How many bytes the blob with this hash has; `None` when the store does not have it. A store may be wrong: it is
    /// the bytes that tell.
    ///
    /// # Errors
    /// When the store cannot be asked, or is one that knows blobs only by hash and size together.
    fn blob_size<'a>(
        &'a self,
        function: DigestFunction,
        hash: &'a [u8],
    ) -> BoxFuture<'a, Result<Option<u64>, RemoteError>>;

    /// Asks once, without retries, whether the store is there and lets us in.
    ///
    /// # Errors
    /// In plain words that say what is wrong and what to do.
    fn probe(&self) -> BoxFuture<'_, Result<(), RemoteError>>;
}
