//! How upstream is reached, and what it is sent.

use std::time::Duration;

use crate::transport::{ConnectOptions, Endpoint};

/// How to reach the upstream service, and what it is sent.
#[derive(Debug, Clone)]
pub struct UpstreamOptions {
    /// How it is reached, and what it is shown. Its headers take the place of the client's headers of the same names.
    pub connect: ConnectOptions,
    /// Whether the client's `authorization` is for us, and not passed on.
    pub is_authorized_here: bool,
    /// Whether forwarded events name files on disk instead of blobs, where they are there.
    pub rewrite_uris: bool,
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
    pub const fn new(endpoint: Endpoint) -> Self {
        let mut connect = ConnectOptions::new(endpoint);
        connect.keepalive = Some(Duration::from_secs(60));
        Self {
            connect,
            is_authorized_here: false,
            rewrite_uris: false,
            call_timeout: Duration::from_secs(15),
            close_timeout: Duration::from_secs(10),
            window_bytes: 8 << 20,
            first_retry: Duration::from_secs(1),
            longest_retry: Duration::from_secs(60),
        }
    }
}
