//! Blobs that wait to be asked for, and how much is asked for at a time.

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::{
    super::{options::MaterializeOptions, queue::BlobQueue, rate::Rate},
    jobs::CacheId,
    window::Window,
};
use crate::{digest::Digest, output::Class};

/// Bytes are counted in flight in units of this many, so that the semaphore's 32 bits are enough.
pub(super) const BUDGET_UNIT: u64 = 1024;

/// What waits to be asked for, how much is under way, and how much may be.
pub(super) struct Lanes {
    pub(super) small: BlobQueue<CacheId>,
    pub(super) large: BlobQueue<CacheId>,
    /// The size of the largest blob that is read in a batch.
    small_limit: u64,
    pub(super) batches_in_flight: usize,
    pub(super) large_in_flight: usize,
    pub(super) budget: Arc<Semaphore>,
    pub(super) window: Arc<Window>,
    pub(super) rate: Option<Arc<Rate>>,
}

impl Lanes {
    pub(super) fn new(options: &MaterializeOptions) -> Self {
        let budget = usize::try_from(options.bytes_in_flight.div_ceil(BUDGET_UNIT)).unwrap_or(usize::MAX);
        Self {
            small: BlobQueue::new(),
            large: BlobQueue::new(),
            small_limit: options.small_limit,
            batches_in_flight: 0,
            large_in_flight: 0,
            budget: Arc::new(Semaphore::new(budget.clamp(1, Semaphore::MAX_PERMITS))),
            window: Arc::new(Window::new(options.bytes_in_flight)),
            rate: options.rate.map(|per_second| Arc::new(Rate::new(per_second))),
        }
    }

    /// Begins no downloads of this class, or below, until further notice. Those under way are finished.
    pub(super) fn pause(&mut self, up_to: Option<Class>) {
        self.small.pause(up_to);
        self.large.pause(up_to);
    }

    /// Has a blob wait, or moves it to the lane of a higher class.
    pub(super) fn push(&mut self, cache: CacheId, digest: &Digest, class: Class) {
        let queue = if digest.size() > self.small_limit {
            &mut self.large
        } else {
            &mut self.small
        };
        queue.push(cache, digest, class);
    }

    pub(super) fn remove(&mut self, cache: CacheId, digest: &Digest) {
        self.small.remove(cache, digest);
        self.large.remove(cache, digest);
    }
}
