//! What the service counts, for metrics.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::metrics::Count;

macro_rules! counters {
    ($($(#[doc = $doc:literal])* $name:ident,)*) => {
        /// Counts since the start of the process.
        #[derive(Debug, Default)]
        pub(crate) struct Counters { $($(#[doc = $doc])* pub(super) $name: AtomicU64,)* }

        /// [`Counters`] at one moment.
        #[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
        pub(crate) struct CountersNow { $($(#[doc = $doc])* pub $name: u64,)* }

        impl Counters {
            /// The counts now.
            pub(crate) fn now(&self) -> CountersNow {
                CountersNow { $($name: self.$name.load(Relaxed),)* }
            }

            /// Each with its name and what it counts.
            pub(crate) fn each(&self) -> impl Iterator<Item = Count> + use<> {
                [$(Count {
                    name: stringify!($name),
                    help: concat!($($doc),*),
                    value: self.$name.load(Relaxed),
                },)*].into_iter()
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
    /// Calls and streams refused because they were beyond a limit.
    refused,
    /// Lifecycle events received.
    lifecycle_events,
    /// Lifecycle events that the upstream service does not get because too many waited for it.
    lifecycle_dropped,
    /// Events that the upstream service has acknowledged.
    forwarded,
    /// Bytes of requests sent upstream, repetitions included.
    forwarded_bytes,
    /// Streams to the upstream service that broke and were opened again.
    reconnects,
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
        Self::add_many(counter, 1);
    }

    pub(super) fn add_many(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Relaxed);
    }
}
