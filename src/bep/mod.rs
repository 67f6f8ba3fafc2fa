//! Decodes build events from the wire format to [`event::Event`], from a file or a stream.
//!
//! [`decode`] and [`json`] decode one event, [`source`] reads a file of events. [`named_sets`] is the graph that
//! completed targets refer to. [`commands`] knows Bazel's commands. `wire` reads and writes single fields of a message. This
//! module does not depend on networks or output trees.

pub(crate) mod commands;
pub mod decode;
pub(crate) mod error;
pub mod event;
pub(crate) mod json;
pub(crate) mod named_sets;
pub mod source;
pub(crate) mod uri;
pub(crate) mod wire;

pub(crate) use decode::Decoder;
pub(crate) use error::BepError;
pub use event::{Event, StreamEvent};
pub use named_sets::NamedSets;
pub use source::EventFile;
