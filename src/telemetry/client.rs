//! Requests to a collector: OTLP over gRPC.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry_proto::tonic::{
    collector::{
        metrics::v1::metrics_service_client::MetricsServiceClient,
        trace::v1::trace_service_client::TraceServiceClient,
    },
    resource::v1::Resource,
};
use tonic::{Code, Request, Response, Status, metadata::MetadataMap, transport::Channel};

use super::{
    collector::{CERTIFICATE, Collector},
    encode,
    exporter::Refusal,
    figures,
    span::Span,
};
use crate::{
    printable::with_causes,
    transport::{Connector, Fault, Header, RemoteError, Secrets},
    units,
};

/// A collector's client. Connects with the first request, and again when the connection broke.
pub(super) struct Client {
    traces: TraceServiceClient<Channel>,
    metrics: MetricsServiceClient<Channel>,
    headers: MetadataMap,
    /// Of the headers.
    secrets: Secrets,
    timeout: Duration,
    resource: Resource,
    /// Since when is counted, in nanoseconds since the epoch.
    since_ns: u64,
}

fn now_ns() -> u64 {
    u64::try_from(units::now_ns()).unwrap_or_default()
}

/// A message about certificates, which are named by a variable here and not by a flag.
fn named(message: &str) -> String {
    message.replace("--tls-certificate", CERTIFICATE)
}

impl Client {
    /// Reads certificates; connects nothing. To be called within the runtime.
    ///
    /// # Errors
    /// Naming what cannot be read or sent.
    pub(super) fn new(collector: &Collector) -> Result<Self, RemoteError> {
        let connector = Connector::new(&collector.connect).map_err(|error| RemoteError {
            context: named(&error.context),
            ..error
        })?;
        let channel = connector.channel();
        let mut headers = HeaderMap::new();
        for header in &collector.connect.headers {
            let unusable = || RemoteError::config(format!("header {}", header.name()), "not usable");
            let name = HeaderName::from_bytes(header.name().as_bytes()).map_err(|_| unusable())?;
            let mut value = HeaderValue::from_str(header.value()).map_err(|_| unusable())?;
            value.set_sensitive(true);
            headers.append(name, value);
        }
        Ok(Self {
            traces: TraceServiceClient::new(channel.clone()),
            metrics: MetricsServiceClient::new(channel),
            headers: MetadataMap::from_headers(headers),
            secrets: Secrets::of(collector.connect.headers.iter().flat_map(Header::secrets)),
            timeout: collector.timeout,
            resource: encode::resource(&collector.resource),
            since_ns: now_ns(),
        })
    }

    pub(super) async fn send_spans(&self, spans: &[Span]) -> Result<(), Refusal> {
        let message = encode::spans(spans, self.resource.clone());
        let mut traces = self.traces.clone();
        let answer = self.asked(message, |request| async move { traces.export(request).await });
        let partial = answer.await?.partial_success.unwrap_or_default();
        self.partly("spans", partial.rejected_spans, partial.error_message);
        Ok(())
    }

    /// Sends what is in an OpenMetrics text.
    pub(super) async fn send_metrics(&self, text: &str) -> Result<(), Refusal> {
        let figures = figures::read(text);
        let message = encode::metrics(figures, self.resource.clone(), (self.since_ns, now_ns()));
        let mut metrics = self.metrics.clone();
        let answer = self.asked(message, |request| async move { metrics.export(request).await });
        let partial = answer.await?.partial_success.unwrap_or_default();
        self.partly(
            "points of metrics",
            partial.rejected_data_points,
            partial.error_message,
        );
        Ok(())
    }

    async fn asked<M, A, F>(&self, message: M, ask: impl FnOnce(Request<M>) -> F) -> Result<A, Refusal>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let mut request = Request::new(message);
        *request.metadata_mut() = self.headers.clone();
        let late = || Status::deadline_exceeded(format!("no answer within {} s", self.timeout.as_secs_f64()));
        let asked = tokio::time::timeout(self.timeout, ask(request)).await;
        match asked.unwrap_or_else(|_| Err(late())) {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status) => Err(self.refusal(&status)),
        }
    }

    fn refusal(&self, status: &Status) -> Refusal {
        let reason = match (Fault::of(status), std::error::Error::source(status)) {
            (Some(Fault::Certificate(distrust)), _) => named(distrust.advice()),
            (_, Some(cause)) => with_causes(cause),
            (_, None) if status.message().is_empty() => status.code().to_string(),
            (_, None) => status.message().to_owned(),
        };
        // By OTLP's table.
        let is_passing = matches!(
            status.code(),
            Code::Cancelled
                | Code::DeadlineExceeded
                | Code::ResourceExhausted
                | Code::Aborted
                | Code::OutOfRange
                | Code::Unavailable
                | Code::DataLoss
        );
        Refusal {
            reason: self.secrets.conceal(reason),
            // A connection that broke is not always told apart.
            is_passing: is_passing || std::error::Error::source(status).is_some(),
        }
    }

    /// The collector has taken some and not the others, which are not sent again.
    fn partly(&self, what: &str, rejected: i64, reason: String) {
        if rejected > 0 || !reason.is_empty() {
            let reason = self.secrets.conceal(reason);
            tracing::warn!("the OpenTelemetry collector rejected {rejected} {what}: {reason}");
        }
    }
}
