//! The Build Event Service: where a build tool sends its events, and where it waits for its outputs.
//!
//! One task per connection reads ([`server`]). One task per stream owns that stream's sequence numbers,
//! acknowledgements and waiting (`stream`), and writes its events to the [`journal`](crate::journal) before it acknowledges them
//! (`intake`). Another task delivers the events, so that a slow engine does not block the stream (`delivery`).

pub(crate) mod budget;
mod command;
mod context;
pub(crate) mod counted;
mod counters;
mod delivery;
mod following;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
pub(crate) mod hold;
mod inbound;
mod intake;
mod lifecycle;
pub(crate) mod limits;
pub(crate) mod listen;
mod raw;
mod reader;
mod recovery;
pub mod serve;
pub(crate) mod server;
mod stream;
mod streams;
#[cfg(test)]
mod tests;
pub(crate) mod upstream;

pub(crate) use context::BesOptions;
pub(crate) use hold::HoldMode;
pub use hold::HoldPolicy;
pub(crate) use listen::ListenError;
pub use listen::{BesAddress, BesListener};
pub(crate) use serve::{ServeError, serve};
pub(crate) use server::BesService;
pub(crate) use upstream::{Upstream, UpstreamOptions};
