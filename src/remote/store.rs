//! What a store of blobs answers, and what is asked of it.

use std::{io, sync::Arc, time::Duration};

use async_trait::async_trait;
use bazel_remote_apis::build::bazel::remote::execution::v2::ActionResult;
use bytes::Bytes;

use super::{expand::TreeRef, metadata::Attribution, reading::read_tree, trees::DirectoryTree};
use crate::{
    digest::{Digest, DigestFunction},
    transport::RemoteError,
};

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

/// The answers to a batch that failed as a whole.
pub(super) fn all_failed(digests: &[Digest], error: &RemoteError) -> Vec<BatchAnswer> {
    digests
        .iter()
        .map(|digest| (digest.clone(), Err(error.clone())))
        .collect()
}

/// Takes a stream's bytes as they come.
///
/// `write` gets consecutive pieces; an error stops the transfer and is returned as
/// [`RemoteErrorKind::Sink`](crate::transport::RemoteErrorKind::Sink).
#[async_trait]
pub trait Sink: Send {
    /// Takes the next bytes. Waits while the sink is full, which holds the network back.
    async fn write(&mut self, bytes: Bytes) -> io::Result<()>;
}

/// A store of blobs by digest: the part of a remote cache that fetching needs.
#[async_trait]
pub trait BlobStore: Send + Sync + 'static {
    /// What the server can do.
    async fn capabilities(&self) -> Result<Capabilities, RemoteError>;

    /// Reads small blobs in one request. Every digest gets exactly one answer, in the order asked, whatever the
    /// server did; bytes are decompressed but **not verified**: the writer hashes them where they are hot. `avoid`
    /// asks for another connection than the last time, after bytes that turned out wrong.
    ///
    /// # Errors
    /// Per blob. A request that failed as a whole gives its error to every digest. Retryable failures have already
    /// been retried.
    async fn read_batch(
        &self,
        digests: &[Digest],
        attribution: &Attribution,
        avoid: bool,
    ) -> Vec<BatchAnswer>;

    /// Streams one blob into a sink from byte `offset`, resuming after broken streams. Not verified either.
    ///
    /// # Errors
    /// When the blob is missing, the sink fails, the retries are used up, or the server sends more or fewer bytes
    /// than the digest says.
    async fn read_stream(
        &self,
        digest: &Digest,
        offset: u64,
        attribution: &Attribution,
        avoid: bool,
        sink: &mut dyn Sink,
    ) -> Result<(), RemoteError>;

    /// Which of the digests the cache does not have.
    ///
    /// # Errors
    /// When the server cannot be asked.
    async fn find_missing(
        &self,
        digests: &[Digest],
        attribution: &Attribution,
    ) -> Result<Vec<Digest>, RemoteError>;

    /// The cache's endpoint and instance name, for messages; without credentials.
    fn describe(&self) -> String;

    /// Whether it is asked at present; of several stores, of each.
    fn standing(&self) -> Vec<Standing> {
        vec![Standing {
            name: self.describe(),
            passed_over: None,
        }]
    }

    /// Where the bytes of a blob came from that was read here lately, as [`BlobStore::describe`] has it; `None` where there is
    /// one store only, or it is not known any more.
    fn origin(&self, _digest: &Digest) -> Option<Arc<str>> {
        None
    }

    /// Reports that the bytes of a blob that was read here lately were wrong. Whether another store may have the right ones;
    /// where there is one store only, reading once more with `avoid` is all that can be done.
    fn distrust(&self, _digest: &Digest) -> bool {
        false
    }
}

/// Whether a store is asked at present.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// As [`BlobStore::describe`] has it.
    pub name: String,
    /// While it is passed over: how much longer, and why.
    pub passed_over: Option<(Duration, String)>,
}

/// A store that also knows what actions resulted in: the part of a remote cache that reading by action or tree needs.
#[async_trait]
pub trait ActionStore: BlobStore {
    /// The result of an action, or `None` when the store has none. Nothing vouches for it: only blobs have digests.
    ///
    /// # Errors
    /// When the store cannot be asked, or what it has is not a result.
    async fn action_result(
        &self,
        action: &Digest,
        attribution: &Attribution,
    ) -> Result<Option<Arc<ActionResult>>, RemoteError>;

    /// Adds directories of a tree, by its root: as many as the store gives without being asked for each. The others are
    /// read as blobs.
    ///
    /// # Errors
    /// When the store cannot be asked.
    async fn add_directories(
        &self,
        _root: &Digest,
        _attribution: &Attribution,
        _tree: &mut DirectoryTree,
    ) -> Result<(), RemoteError> {
        Ok(())
    }

    /// A directory tree, complete, with every digest checked.
    ///
    /// # Errors
    /// When the store cannot be asked or lacks a part of it.
    async fn tree(
        &self,
        reference: &TreeRef,
        attribution: &Attribution,
    ) -> Result<Arc<DirectoryTree>, RemoteError> {
        read_tree(self, reference, attribution).await.map(Arc::new)
    }

    /// How many bytes the blob with this hash has; `None` when the store does not have it. A store may be wrong: it is
    /// the bytes that say.
    ///
    /// # Errors
    /// When the store cannot be asked, or is one that knows blobs only by hash and size together.
    async fn blob_size(&self, function: DigestFunction, hash: &[u8]) -> Result<Option<u64>, RemoteError>;

    /// Asks once, without retries, whether the store is there and lets us in.
    ///
    /// # Errors
    /// In plain words that say what is wrong and what to do.
    async fn probe(&self) -> Result<(), RemoteError>;
}
