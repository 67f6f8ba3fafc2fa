//! What a server turned out to refuse, whatever it says of itself.
//!
//! Stated limits are wrong now and then: a proxy in front of the cache has a lower one, or its backend changed.
//! A batch that is refused as such is halved until it is taken, and what was learned from that is kept as long as the
//! server's word would be.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use tonic::Code;

use super::{client::Failure, status::refuses_instance};

/// No batch is made smaller than that for what was learned: with one blob in a request, a refusal may have been about
/// that blob.
const LEAST: u64 = 64 << 10;

/// What was learned of one server.
#[derive(Debug)]
pub(crate) struct Learned {
    batch_bytes: AtomicU64,
    plain_batches: AtomicBool,
}

impl Default for Learned {
    fn default() -> Self {
        Self {
            batch_bytes: AtomicU64::new(u64::MAX),
            plain_batches: AtomicBool::new(false),
        }
    }
}

impl Learned {
    /// Forgets everything: the server is asked again what it can do.
    pub(crate) fn forget(&self) {
        self.batch_bytes.store(u64::MAX, Relaxed);
        self.plain_batches.store(false, Relaxed);
    }

    /// The largest sum of sizes in a batch, where `stated` is what the server says.
    pub(crate) fn batch_bytes(&self, stated: u64) -> u64 {
        stated.min(self.batch_bytes.load(Relaxed))
    }

    /// Whether batches are refused that may be compressed.
    pub(crate) fn plain_batches(&self) -> bool {
        self.plain_batches.load(Relaxed)
    }

    /// A batch was taken only when it was asked for without compression.
    pub(crate) fn found_plain(&self) {
        self.plain_batches.store(true, Relaxed);
    }
}

/// Whether a failed batch may be taken when it asks for less.
pub(crate) fn is_too_much(failure: &Failure) -> bool {
    let message = &failure.error.message;
    match failure.code {
        Some(Code::InvalidArgument | Code::OutOfRange | Code::FailedPrecondition) => {
            !refuses_instance(message)
        }
        // gRPC's own limit for messages; the same code says "try later" otherwise.
        Some(Code::ResourceExhausted) => message.contains("larger than"),
        _ => false,
    }
}

/// What is learned from a batch that was refused, in the course of its being halved.
#[derive(Debug, Default)]
pub(crate) struct Halving {
    /// The largest sum of sizes that was taken.
    taken: u64,
    /// The smallest blob that was refused even by itself.
    refused: Option<u64>,
}

impl Halving {
    pub(crate) fn taken(&mut self, bytes: u64) {
        self.taken = self.taken.max(bytes);
    }

    pub(crate) fn refused_alone(&mut self, size: u64) {
        self.refused = Some(self.refused.map_or(size, |before| before.min(size)));
    }

    /// Keeps what it shows of the limit. Where a blob was refused that is smaller than what was taken, it was not for
    /// its size.
    pub(crate) fn learn(&self, learned: &Learned) {
        if self.taken > 0 && self.refused.is_none_or(|size| size > self.taken) {
            learned.batch_bytes.fetch_min(self.taken.max(LEAST), Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learned_of(taken: &[u64], refused: &[u64]) -> u64 {
        let (learned, mut halving) = (Learned::default(), Halving::default());
        taken.iter().for_each(|bytes| halving.taken(*bytes));
        refused.iter().for_each(|size| halving.refused_alone(*size));
        halving.learn(&learned);
        learned.batch_bytes(1 << 20)
    }

    #[test]
    fn a_limit_is_learned_from_what_is_taken() {
        assert_eq!(learned_of(&[100_000, 200_000], &[]), 200_000);
        assert_eq!(learned_of(&[100_000], &[150_000]), 100_000);
        assert_eq!(learned_of(&[10], &[]), LEAST);
    }

    #[test]
    fn nothing_is_learned_from_a_blob_that_is_refused_for_itself() {
        assert_eq!(learned_of(&[100_000], &[10]), 1 << 20);
        assert_eq!(learned_of(&[], &[10]), 1 << 20);
    }
}
