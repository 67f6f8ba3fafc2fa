//! Requests to a collector: OTLP over gRPC.

use std::{error::Error as _, time::Duration};

use bazel_remote_apis::google::rpc;
use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry_proto::tonic::{
    collector::{
        metrics::v1::metrics_service_client::MetricsServiceClient,
        trace::v1::trace_service_client::TraceServiceClient,
    },
    resource::v1::Resource,
};
use prost::Message as _;
use tonic::{Code, Request, Response, Status, metadata::MetadataMap, transport::Channel};

use super::{
    collector::{CERTIFICATE, Collector, HEADERS},
    encode,
    exporter::{Refusal, Taken},
    figures,
    span::Span,
};
use crate::{
    printable::{clipped, with_causes},
    transport::{Connector, Fault, Header, RemoteError, Secrets, retry_delay},
    units,
};

/// How much of a collector's message is kept.
const MAX_MESSAGE: usize = 500;

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
            let unusable =
                || RemoteError::config(HEADERS, format!("the header {} cannot be sent", header.name()));
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

    pub(super) async fn send_spans(&self, spans: &[Span]) -> Result<Taken, Refusal> {
        let message = encode::spans(spans, self.resource.clone());
        let mut traces = self.traces.clone();
        let answer = self.asked(message, |request| async move { traces.export(request).await });
        let partial = answer.await?.partial_success.unwrap_or_default();
        Ok(self.taken(partial.rejected_spans, partial.error_message))
    }

    /// Sends what is in an OpenMetrics text.
    pub(super) async fn send_metrics(&self, text: &str) -> Result<Taken, Refusal> {
        let figures = figures::read(text);
        let message = encode::metrics(figures, self.resource.clone(), (self.since_ns, now_ns()));
        let mut metrics = self.metrics.clone();
        let answer = self.asked(message, |request| async move { metrics.export(request).await });
        let partial = answer.await?.partial_success.unwrap_or_default();
        Ok(self.taken(partial.rejected_data_points, partial.error_message))
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
        let reason = match (Fault::of(status), status.source()) {
            (Some(Fault::Certificate(distrust)), _) => named(distrust.advice()),
            (_, Some(cause)) => with_causes(cause),
            (_, None) if status.message().is_empty() => status.code().to_string(),
            (_, None) => status.message().to_owned(),
        };
        let retry_after = rpc::Status::decode(status.details())
            .ok()
            .and_then(|details| retry_delay(&details));
        Refusal {
            reason: self.shown(reason),
            is_passing: is_passing(status, retry_after),
            is_of_kind: status.code() == Code::Unimplemented,
            retry_after,
        }
    }

    /// What the collector says of what it took. What it rejected is not sent again.
    fn taken(&self, rejected: i64, mut note: String) -> Taken {
        let rejected = u64::try_from(rejected).unwrap_or_default();
        if rejected > 0 && note.is_empty() {
            "it does not say why".clone_into(&mut note);
        }
        Taken {
            rejected,
            note: self.shown(note),
        }
    }

    /// A collector's words: without secrets, as one line of bounded length.
    fn shown(&self, words: String) -> String {
        clipped(&self.secrets.conceal(words), MAX_MESSAGE).into_owned()
    }
}

/// Whether the same may be taken later, by OTLP's table.
fn is_passing(status: &Status, retry_after: Option<Duration>) -> bool {
    match status.code() {
        Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unavailable
        | Code::DataLoss => true,
        // Otherwise the request is too large, and stays so.
        Code::ResourceExhausted => retry_after.is_some(),
        // A connection that broke is not always told apart.
        _ => status.source().is_some(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_sent_again_only_if_it_may_be_taken_later() {
        let second = Some(Duration::from_secs(1));
        for (code, retry_after, expected) in [
            (Code::Unavailable, None, true),
            (Code::DeadlineExceeded, None, true),
            (Code::ResourceExhausted, None, false),
            (Code::ResourceExhausted, second, true),
            (Code::Unimplemented, None, false),
            (Code::Unauthenticated, second, false),
            (Code::InvalidArgument, None, false),
        ] {
            let status = Status::new(code, "words");
            assert_eq!(is_passing(&status, retry_after), expected, "{code:?}");
        }
        let broken = Status::from_error(Box::new(std::io::Error::other("reset")));
        assert!(is_passing(&broken, None), "{broken:?}");
    }
}
