//! Turns wanted outputs into files: checks what is present, downloads what is missing, and places it.
//!
//! [`Materializer`] is the handle. One coordinator task owns all state, writer threads do blocking file system work,
//! and downloads run as separate tasks.

mod awaited;
mod coordinator;
mod large;
mod materializer;
mod options;
mod pause;
pub mod place;
mod queue;
mod rate;
#[cfg(test)]
mod tests;
mod traced;
mod want;
mod writers;

pub use self::want::{Completion, Outcome, Root, Session, Want};
pub(crate) use self::want::{Served, split_source};
pub(crate) use awaited::{Awaited, Counted, Counts};
pub use materializer::Materializer;
pub use options::MaterializeOptions;
pub(crate) use pause::Pause;
#[cfg(test)]
pub(crate) use want::Source;
