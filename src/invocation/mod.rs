//! The life of one build: which outputs its events request, and when all of them are settled.
//!
//! [`build::Build`] makes the decisions, with plain data in and out; [`Engine`] runs one task per invocation, which
//! feeds it events, records its results, and gives wanted outputs to the coordinator.

mod actor;
pub mod build;
mod elsewhere;
mod engine;
pub mod feed;
pub mod limits;
mod message;
pub mod pattern;
pub mod policy;
pub(crate) mod rows;
pub(crate) mod runfiles;
pub mod selection;
mod shared;
pub mod tally;
mod test_outputs;
#[cfg(test)]
mod tests;
mod trees;
pub mod watching;

pub use engine::Engine;
pub use feed::Report;
