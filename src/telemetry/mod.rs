//! What an OpenTelemetry collector is told over OTLP: the trace of each build, and the metrics.
//!
//! Whoever knows when something began and ended notes it as a span: the build's task the build itself and its hold
//! ([`Trace`]), those that download and place outputs their batches ([`Open`]). Where no collector is named there is no
//! [`Trace`], and all that is left of it is the look whether there is one. A finished span goes into a queue of bounded
//! length and is forgotten there if the queue is full. The [`Exporter`] is the one task that takes spans from the queue, reads
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
