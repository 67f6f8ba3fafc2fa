//! Generated builds and a player for them: what the demo shows, and what tests and benchmarks drive the daemon with.
//!
//! [`GeneratedBuild`] is a small build with a bit of everything, [`Shape`] a large uniform one; both hand over their outputs'
//! bytes for a cache, and give the events that Bazel 7 would send. [`play`](play()) sends events as Bazel does.

mod build;
mod cache;
mod events;
mod play;
mod shape;

pub use build::{GeneratedBuild, GeneratedContent, GeneratedOutput};
pub(crate) use cache::DemoCache;
pub use events::Setting;
pub use play::play;
pub use shape::{FilledShape, Shape};
