//! How to reach a remote cache, and how patiently.

use std::time::Duration;

use super::compression::Compression;
use crate::{
    digest::DigestFunction,
    transport::{ConnectOptions, Endpoint, RemoteError, RemoteErrorKind},
};

/// Connections are numbered by the bits of a word.
pub(crate) const MAX_CONNECTIONS: usize = 64;
/// HTTP/2 connections, each of which carries many requests at once.
const CONNECTIONS: usize = 4;
/// HTTP/1.1 connections, each of which carries one: Bazel's default.
const HTTP_CONNECTIONS: usize = 100;
/// The most connections to an HTTP cache.
pub(crate) const MAX_HTTP_CONNECTIONS: usize = 1000;

/// Words that end an instance name in a resource name (Remote Execution API, "ByteStream" resource names).
const RESERVED_SEGMENTS: [&str; 7] = [
    "blobs",
    "uploads",
    "actions",
    "actionResults",
    "operations",
    "capabilities",
    "compressed-blobs",
];

/// All settings of a cache's client. Values that can be checked alone are checked when they
/// are parsed; [`RemoteOptions::validate`] checks how they fit together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteOptions {
    /// How the cache is reached, and what it is shown.
    pub connect: ConnectOptions,
    /// The instance of the cache; may be empty and may have several segments.
    pub instance_name: String,
    /// When to ask for zstd where the server offers it.
    pub compression: Compression,
    /// Connections: of HTTP/2, or of HTTP/1.1 to an HTTP cache. `None` for the default, see
    /// [`RemoteOptions::connections`].
    pub connections: Option<usize>,
    /// Tries after the first.
    pub retries: u32,
    /// Longest wait between tries, unless the server asks for more.
    pub max_retry_delay: Duration,
    /// How long a request may bring nothing before it is cut and tried again; the deadline of requests that are
    /// answered in one message.
    pub stall_timeout: Duration,
    /// What a stream must bring in bytes per second, over `stall_timeout`, not to count as stalled.
    pub min_throughput: u64,
    /// The digest function that must be known to the server.
    pub digest_function: DigestFunction,
    /// Whether reading from a disk cache makes its entries new to the collector, as it does when Bazel reads them.
    pub touch: bool,
    /// Whether an HTTP cache that forbids reading a blob counts as one that does not have it.
    pub forbidden_is_missing: bool,
    /// Whether a disk cache that cannot be used counts as one that has nothing, instead of as an error.
    pub is_optional: bool,
    /// What of the build's own options could not be used, and why. Reported if the server refuses us.
    pub left_out: Vec<String>,
}

impl RemoteOptions {
    /// The default of `stall_timeout`.
    pub const STALL_TIMEOUT: Duration = Duration::from_secs(60);

    /// The defaults, for an endpoint.
    pub const fn new(endpoint: Endpoint) -> Self {
        Self {
            connect: ConnectOptions::new(endpoint),
            instance_name: String::new(),
            compression: Compression::WherePaying,
            connections: None,
            retries: 5,
            max_retry_delay: Duration::from_secs(5),
            stall_timeout: Self::STALL_TIMEOUT,
            min_throughput: 1024,
            digest_function: DigestFunction::Sha256,
            touch: true,
            forbidden_is_missing: false,
            is_optional: false,
            left_out: Vec::new(),
        }
    }

    /// Checks what one value alone does not show.
    ///
    /// # Errors
    /// [`RemoteErrorKind::Config`], naming the flag.
    pub fn validate(&self) -> Result<(), RemoteError> {
        if let Some(segment) = self
            .instance_name
            .split('/')
            .find(|s| RESERVED_SEGMENTS.contains(s))
        {
            return Err(RemoteError::config(
                format!("--remote-instance-name={}", self.instance_name),
                format!("an instance name must not contain the segment {segment:?}"),
            ));
        }
        if !self.instance_name.is_empty() && self.instance_name.split('/').any(str::is_empty) {
            return Err(RemoteError::config(
                format!("--remote-instance-name={}", self.instance_name),
                "an instance name must not contain empty segments",
            ));
        }
        if self.instance_name.chars().any(char::is_control) {
            return Err(RemoteError::config(
                format!("--remote-instance-name={:?}", self.instance_name),
                "an instance name must not contain control characters",
            ));
        }
        // Buckets and directories have their own numbers.
        let endpoint = &self.connect.endpoint;
        let is_grpc =
            !endpoint.is_http() && endpoint.bucket().is_none() && endpoint.directory_path().is_none();
        let most = if is_grpc {
            MAX_CONNECTIONS
        } else {
            MAX_HTTP_CONNECTIONS
        };
        if !(1..=most).contains(&self.connections()) {
            return Err(RemoteError::config(
                format!("--remote-max-connections={}", self.connections()),
                format!("must be from 1 to {most}"),
            ));
        }
        if self.stall_timeout.is_zero() {
            return Err(RemoteError::config(
                "--remote-timeout=0",
                "must be greater than zero",
            ));
        }
        self.connect.tls.validate(&self.connect.endpoint)
    }

    /// How many connections there are at most: 4 for gRPC, 100 for HTTP unless something else is set.
    pub fn connections(&self) -> usize {
        let is_http = self.connect.endpoint.is_http();
        let default = if is_http { HTTP_CONNECTIONS } else { CONNECTIONS };
        self.connections.unwrap_or(default)
    }

    /// A refusal, with what might have prevented it.
    pub(super) fn with_left_out(&self, mut error: RemoteError) -> RemoteError {
        let refused = matches!(
            error.kind,
            RemoteErrorKind::Unauthenticated | RemoteErrorKind::Denied
        );
        if refused && !self.left_out.is_empty() {
            error.message = format!(
                "{} (credentials of the build that outhaul could not use: {}; give --remote-header, \
                 --credential-helper or --tls-certificate to outhaul)",
                error.message,
                self.left_out.join("; ")
            );
        }
        error
    }

    /// Endpoint and instance, for messages. An HTTP cache knows no instances.
    pub fn describe(&self) -> String {
        if self.instance_name.is_empty() || self.connect.endpoint.is_http() {
            self.connect.endpoint.to_string()
        } else {
            format!("{}, instance {}", self.connect.endpoint, self.instance_name)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::Header;

    fn options(endpoint: &str) -> RemoteOptions {
        RemoteOptions::new(Endpoint::parse("--remote-cache", endpoint).expect(endpoint))
    }

    #[test]
    fn what_does_not_fit_together_is_named_by_its_flag() {
        let change = |change: fn(&mut RemoteOptions)| {
            let mut options = options("grpc://localhost:1");
            change(&mut options);
            options.validate().expect_err("a fault").to_string()
        };
        for (shown, part) in [
            (
                change(|o| o.instance_name = "a/blobs".into()),
                "--remote-instance-name=a/blobs",
            ),
            (change(|o| o.instance_name = "/a".into()), "empty segments"),
            (change(|o| o.connections = Some(0)), "--remote-max-connections=0"),
            (change(|o| o.stall_timeout = Duration::ZERO), "--remote-timeout"),
            (
                change(|o| o.connect.tls.certificate = Some("/ca.pem".into())),
                "--tls-certificate=/ca.pem: grpc://localhost:1 is not encrypted",
            ),
        ] {
            assert!(shown.contains(part), "{shown}");
        }
        let mut halved = options("grpcs://localhost");
        halved.connect.tls.client_key = Some("/key.pem".into());
        let shown = halved.validate().unwrap_err().to_string();
        assert!(shown.contains("requires --tls-client-certificate"), "{shown}");
        assert_eq!(options("grpcs://localhost").validate(), Ok(()));
    }

    #[test]
    fn options_are_shown_without_secrets() {
        let mut options = options("grpc://localhost:1");
        options
            .connect
            .headers
            .push(Header::parse("--remote-header", "authorization=s3cret").unwrap());
        let shown = format!("{options:?}");
        assert!(
            shown.contains("authorization") && !shown.contains("s3cret"),
            "{shown}"
        );
    }
}
