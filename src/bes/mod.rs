//! The Build Event Service: where a build tool sends its events, and where it waits for its outputs.
//!
//! One task per connection reads ([`server`]). One task per stream owns that stream's sequence numbers,
//! acknowledgements and waiting (`stream`), and writes its events to the [`journal`](crate::journal) before it acknowledges them
//! (`intake`). Another task delivers the events, so that a slow engine does not block the stream (`delivery`).

pub mod budget;
mod command;
mod context;
pub(crate) mod counted;
mod counters;
mod delivery;
mod following;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
pub mod hold;
mod inbound;
mod intake;
mod lifecycle;
pub mod limits;
pub mod listen;
mod raw;
mod reader;
mod recovery;
pub mod serve;
pub mod server;
mod stream;
mod streams;
#[cfg(test)]
mod tests;
pub mod upstream;

pub use budget::Budget;
pub use context::BesOptions;
pub use counters::{Counters, CountersNow};
pub use hold::{HoldMode, HoldPolicy};
pub use listen::{BesAddress, BesListener, ListenError};
pub use serve::{ServeError, serve};
pub use server::BesService;
pub use upstream::{Upstream, UpstreamOptions};
