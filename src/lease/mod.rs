//! Leases: regularly asks the cache for outputs that were not downloaded, so that it keeps them.
//!
//! A build that downloads little leaves its outputs in the cache, and a cache evicts unused blobs. By the Remote
//! Execution API, `FindMissingBlobs` extends the lifetime of a blob, so it is called for all outputs of each output
//! root, at its newest build's cache, while that build is recent enough. Outputs that neither the cache nor the disk
//! has any more are marked as evicted in the record, until the blob is back. The mark is only for users: a download
//! still asks the cache.
//!
//! The record does not say which build last named an unchanged output, so all outputs of a root are included: the
//! newest build may still depend on outputs that it did not rebuild. An output is only reported as lost if it was
//! uploaded to the cache that is asked, and while no build is running that may upload it again.
//!
//! There is one task, [`keep`](keep()), and nothing waits for it. Rows are read in pages and asked for in batches, so memory
//! does not grow with the build; the number of digests per second is limited.

mod error;
mod keep;
mod lost;
mod origin;
mod pass;
mod schedule;
#[cfg(test)]
mod tests;

pub(crate) use self::{
    keep::{LeaseContext, keep},
    lost::LostOutputs,
    schedule::LeaseOptions,
};
