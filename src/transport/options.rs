//! How a server is reached, and what it is shown.

use std::{path::PathBuf, time::Duration};

use tonic::transport::{Channel, Endpoint as HttpEndpoint};

use super::{Endpoint, Google, Header, TlsFiles};

/// How a server is reached, and what it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(
    unpredictable_function_pointer_comparisons,
    reason = "at worst a cache is opened again"
)]
pub struct ConnectOptions {
    /// Where it listens.
    pub endpoint: Endpoint,
    /// Headers for every request.
    pub headers: Vec<Header>,
    /// What a gRPC server is told as its own name, if its address has a user name.
    pub authority: Option<Header>,
    /// Certificates and keys.
    pub tls: TlsFiles,
    /// The name that the server's certificate must have, instead of the endpoint's host.
    pub tls_authority_override: Option<String>,
    /// Credential helpers, as `[SCOPE=]PATH`, see [`super::auth`].
    pub credential_helpers: Vec<String>,
    /// How long a credential helper may run.
    pub credential_helper_timeout: Duration,
    /// How long credentials are kept that do not say when they expire.
    pub credential_helper_cache_duration: Duration,
    /// Google's credentials, where no helper is for the endpoint.
    pub google: Option<Google>,
    /// Whether the user's `.netrc` is left unread.
    pub no_netrc: bool,
    /// The directory that `%workspace%` in a credential helper's path stands for.
    pub workspace: Option<PathBuf>,
    /// A unix socket through which the server is reached, instead of by its address.
    pub proxy: Option<PathBuf>,
    /// How long connecting may take, and then TLS.
    pub connect_timeout: Duration,
    /// How often a connection in use is pinged, if it is; the answer may take a third of that.
    pub keepalive: Option<Duration>,
    /// Makes channels over another network than this machine's. They connect when they are first used, and again when
    /// the connection broke.
    pub dial: Option<fn(&HttpEndpoint) -> Channel>,
}

impl ConnectOptions {
    /// The defaults, for an endpoint.
    pub const fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            headers: Vec::new(),
            authority: None,
            tls: TlsFiles {
                certificate: None,
                client_certificate: None,
                client_key: None,
            },
            tls_authority_override: None,
            credential_helpers: Vec::new(),
            // Bazel's defaults, both.
            credential_helper_timeout: Duration::from_secs(10),
            credential_helper_cache_duration: Duration::from_secs(30 * 60),
            google: None,
            no_netrc: false,
            workspace: None,
            proxy: None,
            connect_timeout: Duration::from_secs(10),
            keepalive: Some(Duration::from_secs(30)),
            dial: None,
        }
    }

    /// Whether what the server is shown could be read on the way to it: by HTTP, without TLS, on another machine.
    pub(crate) fn is_unencrypted(&self) -> bool {
        let stays_here = self.endpoint.is_local() || self.proxy.is_some();
        self.endpoint.is_http() && !self.endpoint.is_tls() && !stays_here
    }
}
