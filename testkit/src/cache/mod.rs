//! A small remote cache that runs inside the process: for the tests and the benchmarks.
//!
//! **Not for production.** Nothing is ever evicted, nobody is isolated from anybody, interrupted uploads live until the
//! process ends, and an action result is served whether or not its outputs are still there. It is complete enough for
//! a real Bazel (`--remote_cache=grpc://127.0.0.1:PORT`), strict where a lenient server would hide a client's fault
//! (instance names, digest functions, batch limits, offsets), and it can be made to misbehave: see [`Faults`].
//!
//! It speaks the Remote Execution API 2.0 to 2.3: Capabilities, ContentAddressableStorage without blob chunking,
//! ByteStream, ActionCache. [`EmbeddedCache::builder`] makes one, [`RunningCache`] is the handle on it.

mod action_cache;
mod batch_read;
mod capabilities;
mod cas;
mod connection;
mod context;
mod direct;
mod faults;
mod memory;
mod read;
mod resource;
mod server;
mod stats;
mod store;
mod upload;
mod wire;
mod write;

#[cfg(test)]
mod tests;

pub use faults::{BlobFault, Faults, Pretence, RequestFault, Times};
pub use server::{Builder, EmbeddedCache, RunningCache, ServerTls};
pub use stats::{Rpc, Stats};
pub use store::Store;
