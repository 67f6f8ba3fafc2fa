//! When a server wants to be asked again.

use std::time::{Duration, SystemTime};

use bazel_remote_apis::google::rpc;
use http::{HeaderMap, header::RETRY_AFTER};
use prost::Message as _;

/// `google.rpc.RetryInfo`, which `bazel-remote-apis` does not have.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct RetryInfo {
    #[prost(message, optional, tag = "1")]
    pub(crate) retry_delay: Option<prost_types::Duration>,
}

/// What the details of a gRPC status say of it.
pub(crate) fn retry_delay(status: &rpc::Status) -> Option<Duration> {
    let any = status
        .details
        .iter()
        .find(|any| any.type_url.ends_with("/google.rpc.RetryInfo"))?;
    let delay = RetryInfo::decode(any.value.as_slice()).ok()?.retry_delay?;
    Duration::try_from(delay).ok()
}

/// `Retry-After`: seconds, or a date (RFC 9110, 10.2.3).
pub(crate) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(now).unwrap_or(Duration::ZERO))
}
