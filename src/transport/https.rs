//! HTTP/1.1 clients. Proxies from the environment are not used.

use std::{io, sync::Arc};

use bytes::Bytes;
use http_body_util::Full;
use hyper_rustls::{ConfigBuilderExt as _, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use rustls::{
    ClientConfig, ConfigBuilder, RootCertStore, WantsVerifier, client::WantsClientCert, crypto::ring,
};

/// Sends requests to `http` and `https` URLs.
pub(crate) type HttpsClient = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// A client that believes of `https` URLs what the system's certificate authorities say; for others it reads none.
///
/// # Errors
/// When the system has none, and the URL needs them.
pub(crate) fn client_for(is_https: bool) -> io::Result<HttpsClient> {
    let config = if is_https {
        tls()?.with_native_roots()?
    } else {
        trusting(RootCertStore::empty())?
    };
    Ok(client(config.with_no_client_auth()))
}

/// A client with this TLS.
pub(crate) fn client(config: ClientConfig) -> HttpsClient {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    client_by(config, tcp, 1)
}

/// A client that connects in this way, and keeps at most `idle` connections to a host.
pub(crate) fn client_by<B>(
    config: ClientConfig,
    tcp: HttpConnector,
    idle: usize,
) -> Client<HttpsConnector<HttpConnector>, B>
where
    B: http_body::Body + Send,
    B::Data: Send,
{
    let connector = HttpsConnectorBuilder::new()
        .with_tls_config(config)
        .https_or_http()
        .enable_http1()
        .wrap_connector(tcp);
    Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_max_idle_per_host(idle)
        .build(connector)
}

pub(super) fn tls() -> io::Result<ConfigBuilder<ClientConfig, WantsVerifier>> {
    ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)
}

/// TLS that believes these authorities only.
pub(crate) fn trusting(roots: RootCertStore) -> io::Result<ConfigBuilder<ClientConfig, WantsClientCert>> {
    Ok(tls()?.with_root_certificates(roots))
}
