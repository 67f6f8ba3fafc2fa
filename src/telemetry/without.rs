//! What stands in the client's place in an Outhaul that was built without the feature `otlp`: nothing can be sent.

use super::{
    collector::Collector,
    exporter::{Refusal, Taken},
    span::Span,
};
use crate::transport::RemoteError;

/// There is none.
pub(super) enum Client {}

impl Client {
    pub(super) fn new(collector: &Collector) -> Result<Self, RemoteError> {
        Err(RemoteError::config(
            format!("--otlp-endpoint={}", collector.connect.endpoint),
            "this outhaul was built without OpenTelemetry (the feature otlp)",
        ))
    }

    pub(super) async fn send_spans(&self, _: &[Span]) -> Result<Taken, Refusal> {
        match *self {}
    }

    pub(super) async fn send_metrics(&self, _: &str) -> Result<Taken, Refusal> {
        match *self {}
    }
}
