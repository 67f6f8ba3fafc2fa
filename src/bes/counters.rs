//! What the service counts, for metrics.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counts since the start of the process.
        #[derive(Debug, Default)]
        pub struct Counters { $($(#[$doc])* pub(super) $name: AtomicU64,)* }

        /// [`Counters`] at one moment.
        #[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
        pub struct CountersNow { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            /// The counts now.
            #[must_use]
            pub fn now(&self) -> CountersNow {
                CountersNow { $($name: self.$name.load(Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Connections that sent a stream's events.
    connections,
    /// Connections that replaced another one of the same stream that was still open.
    takeovers,
    /// Events received, without duplicates.
    events,
    /// Events received again after they had been acknowledged.
    duplicates,
    /// Places where sequence numbers were skipped.
    gaps,
    /// Events that could not be decoded.
    undecodable,
    /// Lifecycle events received.
    lifecycle_events,
    /// Streams whose journal failed, so that they went on without one.
    journal_failures,
    /// Frames handed over from the journal because the engine was slower than the build.
    spilled_frames,
    /// Times the engine was so slow, without a journal, that memory was used beyond the budget.
    stalls,
    /// Streams that ended with their last event.
    finished,
    /// Streams that ended without it.
    broken,
    /// Waits for the last acknowledgement that ran into their deadline.
    hold_timeouts,
    /// Streams failed because of the strict rule.
    strict_failures,
}

impl Counters {
    pub(super) fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Relaxed);
    }
}
