//! One try to post a document.

use std::{
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{
    HeaderValue, Request,
    header::{AUTHORIZATION, CONTENT_TYPE, USER_AGENT},
};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_rustls::{ConfigBuilderExt as _, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use rustls::{
    ClientConfig, ConfigBuilder, RootCertStore, WantsVerifier, client::WantsClientCert, crypto::ring,
};

use super::{document::Document, retry::Answer, signature::Secret, url::NotifyUrl};
use crate::printable::with_causes;

/// Most that is read of an answer, so that its connection can be used again.
const ANSWER: usize = 64 << 10;
/// How long that may take.
const REST: Duration = Duration::from_secs(1);

/// Posts to one URL. HTTP/1.1; proxies of the environment are not used.
pub(super) struct Poster {
    url: NotifyUrl,
    secret: Option<Secret>,
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

impl Poster {
    /// Believes of `https` URLs what the system's certificate authorities say.
    ///
    /// # Errors
    /// When the system has none, and the URL needs them.
    pub(super) fn new(url: NotifyUrl, secret: Option<Secret>) -> io::Result<Self> {
        let config = if url.is_https() {
            tls()?.with_native_roots()?
        } else {
            trusting(RootCertStore::empty())?
        };
        Ok(Self::with_tls(url, secret, config.with_no_client_auth()))
    }

    pub(super) fn with_tls(url: NotifyUrl, secret: Option<Secret>, config: ClientConfig) -> Self {
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(config)
            .https_or_http()
            .enable_http1()
            .build();
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_max_idle_per_host(1)
            .build(connector);
        Self { url, secret, client }
    }

    /// The receiver, fit to be shown.
    pub(super) const fn url(&self) -> &NotifyUrl {
        &self.url
    }

    /// One try. The status line and headers must come within the deadline; they are the answer, whatever becomes of
    /// the body behind them.
    pub(super) async fn post(&self, document: &Document, deadline: Duration) -> Answer {
        let mut request = Request::post(self.url.uri().clone())
            .header(CONTENT_TYPE, "application/json")
            .header(USER_AGENT, concat!("outhaul/", env!("CARGO_PKG_VERSION")))
            .header("x-outhaul-event", document.event.name())
            .header("x-outhaul-delivery", &document.delivery);
        if let Some(secret) = &self.secret {
            request = request.header("x-outhaul-signature-256", secret.sign(&document.body));
        }
        if let Some(value) = self.url.authorization() {
            request = request.header(AUTHORIZATION, HeaderValue::clone(value));
        }
        let request = match request.body(Full::new(document.body.clone())) {
            Ok(request) => request,
            Err(error) => return Answer::Refused(error.to_string()),
        };
        match tokio::time::timeout(deadline, self.client.request(request)).await {
            Ok(Ok(response)) => {
                let (head, body) = response.into_parts();
                let answer = Answer::of(head.status, &head.headers, SystemTime::now());
                // Nothing in it matters.
                let _ = tokio::time::timeout(REST, Limited::new(body, ANSWER).collect()).await;
                answer
            }
            // Whatever went wrong on the way may be better next time. The client's errors do not tell URLs.
            Ok(Err(error)) => Answer::Later {
                reason: with_causes(&error),
                asked: None,
            },
            Err(_) => Answer::Later {
                reason: "the receiver does not answer".to_owned(),
                asked: None,
            },
        }
    }
}

fn tls() -> io::Result<ConfigBuilder<ClientConfig, WantsVerifier>> {
    ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)
}

/// TLS that believes these authorities only.
pub(super) fn trusting(roots: RootCertStore) -> io::Result<ConfigBuilder<ClientConfig, WantsClientCert>> {
    Ok(tls()?.with_root_certificates(roots))
}
