//! Exports the trace of each build, and the metrics, to an OpenTelemetry collector by OTLP.
//!
//! A build's task notes the build itself and its hold as spans ([`Trace`]); those that download and place outputs note their
//! batches ([`Open`]). Without a collector there is no [`Trace`], and they only look whether there is one. A finished span
//! goes into a queue of bounded length, and is dropped and counted if the queue is full. The [`Exporter`] is the one task that takes spans from the queue, reads
//! the metrics from the registry that `/metrics` is written from, and sends both; nothing waits for it.

#[cfg(feature = "otlp")]
mod client;
#[cfg(not(feature = "otlp"))]
#[path = "without.rs"]
mod client;
mod collector;
#[cfg(feature = "otlp")]
mod encode;
mod exporter;
#[cfg(feature = "otlp")]
mod figures;
mod parent;
mod span;
mod trace;

pub(crate) use self::{
    collector::Collector,
    exporter::Exporter,
    parent::TraceParent,
    span::Value,
    trace::{Build, Open, Trace, Traces, open},
};
