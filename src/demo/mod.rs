//! Generated builds and a player for them: what the demo shows, and what tests and benchmarks drive the daemon with.
//!
//! [`GeneratedBuild`] is a small build with a bit of everything, [`Shape`] a large uniform one; both put their outputs
//! into a [`Store`](crate::embedded_cache::Store) and give the events that Bazel 7 would send. [`play`](play()) sends events as
//! Bazel does.

mod build;
mod events;
mod play;
mod shape;

pub use build::{GeneratedBuild, GeneratedContent, GeneratedOutput};
pub use events::Setting;
pub use play::play;
pub use shape::{FilledShape, Shape};
