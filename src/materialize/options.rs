//! How much is done at once.

use super::place::PlaceOptions;

/// How much is done at once. Memory is bounded by bytes, whatever the build's size.
#[derive(Debug, Clone)]
pub struct MaterializeOptions {
    /// Writer threads.
    pub writers: usize,
    /// Blobs up to this many bytes are fetched in batches, larger ones are streamed.
    pub small_limit: u64,
    /// Largest sum of sizes in a batch.
    pub batch_bytes: u64,
    /// Blobs in a batch.
    pub batch_count: usize,
    /// Batches that may be under way, where the line is long enough for as many.
    pub batches_in_flight: usize,
    /// Bytes of small blobs that may be on their way between the cache and the disk.
    pub bytes_in_flight: u64,
    /// Large blobs that may be under way.
    pub large_in_flight: usize,
    /// Bytes that are downloaded in a second, for what is required and for what is optional alike; no limit if unset.
    pub rate: Option<u64>,
    /// How files are placed.
    pub place: PlaceOptions,
}

impl Default for MaterializeOptions {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        Self {
            writers: cores.clamp(2, 8),
            small_limit: 1 << 20,
            batch_bytes: 1 << 20,
            batch_count: 4000,
            batches_in_flight: 32,
            bytes_in_flight: 32 << 20,
            large_in_flight: 4,
            rate: None,
            place: PlaceOptions::default(),
        }
    }
}
