//! The way to another build event service: what came in goes out again, byte for byte, in order, and nothing is lost.
//!
//! Each stream has two tasks. One (`supply`) takes what the stream's intake hands over, reads back what is only in the
//! journal, holds completions until they are true (`gate`), points them to files on disk if that is wanted (`rewrite`),
//! and lets events into a window of bounded size. The other one (`forward`) sends what is in the window over as many
//! connections as it takes (`call`), and lets go of it when it is acknowledged. A build's lifecycle calls have a task
//! of their own (`lifecycle`), which keeps them before or after the build's streams.
//!
//! An outage costs nothing but time: intake never waits for upstream, and what does not fit into the window
//! stays in the journal.

mod backoff;
mod call;
mod client;
mod forward;
#[cfg(any(test, fuzzing))]
mod fuzz;
mod gate;
mod headers;
mod health;
mod lifecycle;
mod options;
mod order;
mod outgoing;
mod peek;
mod rewrite;
mod shared;
mod supply;
#[cfg(test)]
mod tests;
mod window;

pub(crate) use client::Upstream;
#[cfg(any(test, fuzzing))]
pub(super) use fuzz::{
    blobs as fuzz_blobs, file_uri as fuzz_file_uri, kind as fuzz_kind, rewritten as fuzz_rewritten,
};
pub(crate) use options::UpstreamOptions;
pub(in crate::bes) use order::LifecycleEvent;
pub(in crate::bes) use outgoing::{ForwardStatus, Outgoing, OutgoingEvent};
pub(in crate::bes) use shared::Surroundings;
