//! How much clients of the event service may ask of it.

/// The limits of the event service. A client that exceeds one gets an error, and no other client notices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BesLimits {
    /// Bytes of one request. Events can be far larger than gRPC's default of 4 MiB: sets of 5,000 files, chunks of
    /// output.
    pub message: usize,
    /// Bytes of one call's headers.
    pub headers: u32,
    /// Streams that are open, or whose builds are not settled, at a time. Those that only wait for upstream don't count.
    pub streams: usize,
    /// Streams that are open on one connection at a time.
    pub streams_per_connection: u32,
    /// Bytes of all clients' messages in memory, finished or not, of this service and of those beside it. What finds no
    /// room for its turn waits in the journal, and clients wait where there is no room for what they send.
    pub queue: usize,
    /// Bytes of one stream's journal on disk.
    pub journal: u64,
    /// Lifecycle calls that wait for an upstream service; it does not get those that come beyond.
    pub lifecycle_calls: usize,
}

impl Default for BesLimits {
    fn default() -> Self {
        Self {
            message: 256 << 20,
            headers: 64 << 10,
            streams: 4096,
            streams_per_connection: 1024,
            queue: 256 << 20,
            journal: 4 << 30,
            lifecycle_calls: 100_000,
        }
    }
}
