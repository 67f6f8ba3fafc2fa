//! What the cache was asked for, counted.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The calls that the cache answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rpc {
    /// `Capabilities.GetCapabilities`
    Capabilities,
    /// `ContentAddressableStorage.FindMissingBlobs`
    FindMissing,
    /// `ContentAddressableStorage.BatchReadBlobs`
    BatchRead,
    /// `ContentAddressableStorage.BatchUpdateBlobs`
    BatchUpdate,
    /// `ContentAddressableStorage.GetTree`
    GetTree,
    /// `ByteStream.Read`
    StreamRead,
    /// `ByteStream.Write`
    StreamWrite,
    /// `ByteStream.QueryWriteStatus`
    QueryWrite,
    /// `ActionCache.GetActionResult`
    GetAction,
    /// `ActionCache.UpdateActionResult`
    UpdateAction,
}

macro_rules! stats {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What was counted since the cache was started. Calls count when they arrive, also those that then fail.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct Stats {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Stats {
            /// What was counted since an earlier reading.
            pub const fn since(&self, earlier: &Self) -> Self {
                Self { $($name: self.$name.saturating_sub(earlier.$name),)* }
            }
        }

        /// The counters behind [`Stats`].
        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $(pub(super) $name: AtomicU64,)*
        }

        impl Counters {
            pub(super) fn read(&self) -> Stats {
                Stats { $($name: self.$name.load(Relaxed),)* }
            }
        }
    };
}

stats! {
    /// Connections accepted.
    connections,
    /// `GetCapabilities` calls.
    capabilities,
    /// `FindMissingBlobs` calls.
    find_missing,
    /// Digests in them.
    find_missing_blobs,
    /// `BatchReadBlobs` calls.
    batch_reads,
    /// Digests in them.
    batch_read_blobs,
    /// `BatchUpdateBlobs` calls.
    batch_updates,
    /// Blobs in them.
    batch_update_blobs,
    /// `GetTree` calls.
    get_trees,
    /// `ByteStream.Read` calls.
    stream_reads,
    /// Those that began at an offset: resumed ones.
    stream_reads_resumed,
    /// Those that asked for zstd.
    stream_reads_compressed,
    /// `ByteStream.Write` calls.
    stream_writes,
    /// `QueryWriteStatus` calls.
    query_writes,
    /// `GetActionResult` calls.
    get_actions,
    /// Those that found one.
    action_hits,
    /// `UpdateActionResult` calls.
    update_actions,
    /// Bytes of blobs sent, before compression.
    bytes_out,
    /// Bytes of blobs sent, as they were sent.
    wire_bytes_out,
    /// Bytes of blobs taken in, after decompression.
    bytes_in,
    /// Calls refused for want of the required header.
    unauthenticated,
}

impl Counters {
    /// Counts a call.
    pub(super) fn call(&self, rpc: Rpc) {
        let counter = match rpc {
            Rpc::Capabilities => &self.capabilities,
            Rpc::FindMissing => &self.find_missing,
            Rpc::BatchRead => &self.batch_reads,
            Rpc::BatchUpdate => &self.batch_updates,
            Rpc::GetTree => &self.get_trees,
            Rpc::StreamRead => &self.stream_reads,
            Rpc::StreamWrite => &self.stream_writes,
            Rpc::QueryWrite => &self.query_writes,
            Rpc::GetAction => &self.get_actions,
            Rpc::UpdateAction => &self.update_actions,
        };
        add(counter, 1);
    }
}

/// Adds to a counter.
pub(super) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Relaxed);
}
