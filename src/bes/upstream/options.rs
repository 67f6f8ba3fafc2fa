//! How upstream is reached, and what it is sent.

use std::{path::PathBuf, time::Duration};

use crate::transport::{Endpoint, Google, Header, RemoteError};

/// How to reach the upstream service, and what it is sent.
#[derive(Debug, Clone)]
pub struct UpstreamOptions {
    /// Where it listens.
    pub endpoint: Endpoint,
    /// Headers for every call; they take the place of the client's headers of the same names.
    pub headers: Vec<Header>,
    /// PEM file of the authorities that may sign the server's certificate, instead of the system's.
    pub tls_certificate: Option<PathBuf>,
    /// PEM file of our certificate.
    pub tls_client_certificate: Option<PathBuf>,
    /// PEM file of its key.
    pub tls_client_key: Option<PathBuf>,
    /// Credential helpers, as `[SCOPE=]PATH`.
    pub credential_helpers: Vec<String>,
    /// Google's credentials, where no helper is for the endpoint.
    pub google: Option<Google>,
    /// Whether forwarded events name files on disk instead of blobs, where they are there.
    pub rewrite_uris: bool,
    /// How long connecting may take, and then TLS.
    pub connect_timeout: Duration,
    /// How often a connection in use is pinged; the answer may take a third of that.
    pub keepalive: Duration,
    /// How long a lifecycle call may take. Bazel allows 15 s.
    pub call_timeout: Duration,
    /// How long upstream may take to close a stream that it has acknowledged to the end.
    pub close_timeout: Duration,
    /// Bytes of one stream's events in memory that upstream has not acknowledged. An event that is larger goes alone.
    pub window_bytes: usize,
    /// The wait after a first failure; each further one is 1.6 times as long. Bazel's are the same.
    pub first_retry: Duration,
    /// The longest wait.
    pub longest_retry: Duration,
}

impl UpstreamOptions {
    /// The defaults, for an endpoint.
    #[must_use]
    pub const fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            headers: Vec::new(),
            tls_certificate: None,
            tls_client_certificate: None,
            tls_client_key: None,
            credential_helpers: Vec::new(),
            google: None,
            rewrite_uris: false,
            connect_timeout: Duration::from_secs(10),
            keepalive: Duration::from_secs(60),
            call_timeout: Duration::from_secs(15),
            close_timeout: Duration::from_secs(10),
            window_bytes: 8 << 20,
            first_retry: Duration::from_secs(1),
            longest_retry: Duration::from_secs(60),
        }
    }
}

/// Settings of the upstream service that cannot work; names the flag.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(transparent)]
pub struct UpstreamError(#[from] RemoteError);
