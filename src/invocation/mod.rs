//! One build's life: what its events say is wanted, and when all of that is settled.
//!
//! [`build::Build`] is the decision, plain data in and out; [`Engine`] runs one task for each invocation that feeds
//! it, records what it says, and hands wants to the coordinator.

mod actor;
pub mod build;
mod engine;
pub mod feed;
pub mod limits;
mod message;
pub mod pattern;
pub mod policy;
pub mod roots;
pub(crate) mod rows;
pub(crate) mod runfiles;
pub mod selection;
mod shared;
pub mod sources;
pub mod tally;
mod test_outputs;
#[cfg(test)]
mod tests;
mod trees;
pub mod watching;

pub use engine::Engine;
pub use feed::Report;
