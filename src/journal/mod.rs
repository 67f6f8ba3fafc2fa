//! The journal keeps acknowledged events on disk.
//!
//! One append-only file per stream, mode 0600 in a directory of mode 0700. A file is a valid zstd file: a skippable
//! frame names the stream, then pairs follow of a skippable frame that describes and a zstd frame that holds whole
//! records, so `zstd -d` reads it too. Everything is little-endian. A frame reaches the operating system with one write
//! before anything in it is acknowledged: a killed process loses no acknowledged event; a power failure may, unless the
//! journal is durable. A torn last frame is recognised by its length or checksum and truncated.
//!
//! `NAME.journal` is unfinished: there may be outputs to download, or events that an upstream service has not received.
//! It becomes `NAME.settled` when there is nothing left to do. `NAME.acked` says how much upstream has. A file of
//! another version, or with a damaged header, is renamed to `NAME.damaged` and never read. One that has crashed the
//! daemon repeatedly is renamed to `NAME.set-aside`.

mod cursor;
mod error;
mod file;
mod format;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
pub(crate) mod headers;
mod inlet;
pub(crate) mod received;
mod replay;
mod retention;
mod store;
#[cfg(test)]
mod tests;
mod writer;

pub(crate) use error::JournalError;
pub(crate) use format::{Record, RecordKind};
pub(crate) use replay::SetAside;
pub(crate) use retention::{Executed, Plan};
pub use store::Journal;
pub(crate) use store::now_ms;
pub(crate) use store::{Entry, JournalOptions};
pub(crate) use writer::Writer;

pub(crate) use file::{FrameAt, StoredFrame, read_frame};
pub(crate) use format::Batch;
pub(crate) use replay::{MOST_LOST, Replaying};
pub(crate) use writer::Recovered;
