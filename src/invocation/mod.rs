//! The life of one build: which outputs its events request, and when all of them are settled.
//!
//! [`build::Build`] makes the decisions, with plain data in and out; [`Engine`] runs one task per invocation, which
//! feeds it events, records its results, and gives wanted outputs to the coordinator.

mod actor;
pub mod build;
pub(crate) mod elsewhere;
mod engine;
pub mod feed;
pub(crate) mod limits;
mod message;
pub(crate) mod pattern;
pub mod policy;
pub(crate) mod rows;
pub(crate) mod runfiles;
pub(crate) mod selection;
mod shared;
pub(crate) mod tally;
mod test_outputs;
#[cfg(test)]
mod tests;
pub(crate) mod timeline;
mod trees;
pub mod watching;

pub(crate) use engine::Engine;
pub use feed::Report;
