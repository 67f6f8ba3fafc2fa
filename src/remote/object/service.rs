//! The HTTP client that the crate sends its requests with.

use std::{error::Error as _, time::Duration};

use async_trait::async_trait;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, StatusCode, Uri,
    header::{AUTHORIZATION, CONTENT_RANGE, RANGE},
};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::{Client, connect::HttpConnector as TcpConnector};
use object_store::{
    ClientConfigKey, ClientOptions,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody, HttpResponse,
        HttpResponseBody, HttpService,
    },
};
use percent_encoding::percent_decode_str;

use super::fault::{Broken, Refusal, is_cut};
use crate::{
    remote::RemoteOptions,
    transport::{RemoteError, Secrets, https},
};

/// How much of a refusal is read, in bytes.
const MAX_REFUSAL: usize = 64 << 10;
/// The longest answer that the crate reads as a whole, in bytes: a page of a listing, or credentials.
const MAX_COLLECTED: usize = 32 << 20;
/// Requests at once, and so the most idle connections that are kept.
pub(super) const PARALLEL: usize = 64;

/// Marks requests for objects: their bytes are handed on as they come. All other answers are read as a whole.
#[derive(Clone, Copy)]
pub(super) struct Streamed;

/// The SHA-256 of the whole object, as S3 keeps it for what was uploaded with one.
#[derive(Clone, Copy)]
pub(super) struct StoredSha256(pub(super) [u8; 32]);

/// Has S3 say it: <https://docs.aws.amazon.com/AmazonS3/latest/API/API_HeadObject.html>.
pub(super) const CHECKSUM_MODE: (HeaderName, HeaderValue) = (
    HeaderName::from_static("x-amz-checksum-mode"),
    HeaderValue::from_static("ENABLED"),
);

impl StoredSha256 {
    /// What an answer says. That of an object which was uploaded in parts, and not as a whole, is of the parts' hashes.
    fn of(headers: &HeaderMap) -> Option<Self> {
        let of_parts = headers
            .get("x-amz-checksum-type")
            .is_some_and(|kind| kind != "FULL_OBJECT");
        let sum = headers.get("x-amz-checksum-sha256").filter(|_| !of_parts)?;
        let sum = STANDARD.decode(sum).ok()?;
        sum.try_into().ok().map(Self)
    }
}

/// Makes the services.
#[derive(Clone)]
pub(super) struct Connector {
    client: Client<HttpsConnector<TcpConnector>, HttpRequestBody>,
    /// How long the head of an answer may take.
    patience: Duration,
    /// Why servers' certificates cannot be verified, if so.
    unverifiable: Option<String>,
}

impl Connector {
    /// With the options' certificates and time-outs.
    ///
    /// # Errors
    /// Naming the file that cannot be read.
    pub(super) fn new(options: &RemoteOptions) -> Result<Self, RemoteError> {
        // Credentials come by TLS even where the bucket is on this machine.
        let mut tls = options.connect.tls.clone();
        if !options.connect.endpoint.is_tls() {
            tls = crate::transport::TlsFiles::default();
        }
        let mut tcp = TcpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(options.connect.connect_timeout));
        let (config, unverifiable) = match tls.client_config(true) {
            Ok(config) => (config, None),
            // Where the system has no authorities, what needs none still works.
            Err(error) if tls.certificate.is_none() => (tls.client_config(false)?, Some(error.message)),
            Err(error) => return Err(error),
        };
        Ok(Self {
            client: https::client_by(config, tcp, PARALLEL),
            unverifiable,
            patience: options.stall_timeout,
        })
    }
}

impl std::fmt::Debug for Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Connector")
    }
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let plain = options.get_config_value(&ClientConfigKey::AllowHttp);
        Ok(HttpClient::new(Service {
            connector: self.clone(),
            plain: plain.as_deref() == Some("true"),
        }))
    }
}

/// Sends requests; those that are refused are errors that say why.
#[derive(Debug)]
struct Service {
    connector: Connector,
    /// Whether requests may go without encryption.
    plain: bool,
}

#[async_trait]
impl HttpService for Service {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        self.send(request).await
    }
}

impl Service {
    async fn send(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let is_https = request.uri().scheme_str() == Some("https");
        let host = || request.uri().host().unwrap_or_default().to_owned();
        let broken = match &self.connector.unverifiable {
            _ if !is_https && !self.plain => Some(Broken::NotEncrypted(host())),
            Some(reason) if is_https => Some(Broken::NoAuthorities(host(), reason.clone())),
            _ => None,
        };
        if let Some(broken) = broken {
            return Err(HttpError::new(HttpErrorKind::Connect, broken));
        }
        let ranged = request.headers().contains_key(RANGE);
        let streamed = request.extensions().get::<Streamed>().is_some();
        let query = request.uri().query().unwrap_or_default();
        let is_listing = query.split('&').any(|setting| setting == "list-type=2");
        let secrets = sent(request.uri(), request.headers());
        let patience = self.connector.patience;
        let slow = || HttpError::new(HttpErrorKind::Timeout, Broken::Slow(patience));
        let answer = tokio::time::timeout(patience, self.connector.client.request(request)).await;
        let (mut parts, body) = answer.map_err(|_| slow())?.map_err(failed)?.into_parts();
        if parts.status.is_success() {
            if let Some(sum) = StoredSha256::of(&parts.headers) {
                parts.extensions.insert(sum);
            }
            if ranged && parts.status == StatusCode::OK {
                // Some say the range, and not that there is one.
                if !parts.headers.contains_key(CONTENT_RANGE) {
                    return Err(HttpError::new(HttpErrorKind::Decode, Broken::RangeIgnored));
                }
                parts.status = StatusCode::PARTIAL_CONTENT;
            }
            let body = if streamed {
                HttpResponseBody::new(body.map_err(|error| HttpError::new(HttpErrorKind::Interrupted, error)))
            } else {
                let whole = tokio::time::timeout(patience, Limited::new(body, MAX_COLLECTED).collect());
                let whole = whole.await.map_err(|_| slow())?.map_err(cut)?.to_bytes();
                if is_listing && is_cut(&whole) {
                    return Err(HttpError::new(HttpErrorKind::Decode, Broken::Cut));
                }
                HttpResponseBody::from(whole)
            };
            return Ok(HttpResponse::from_parts(parts, body));
        }
        // What is wrong is worth reading, but no reason to fail in another way.
        let said = tokio::time::timeout(patience, beginning(body))
            .await
            .unwrap_or_default();
        let refusal = Refusal::new(parts.status, &parts.headers, &said, &secrets);
        Err(HttpError::new(HttpErrorKind::Unknown, refusal))
    }
}

fn failed(error: hyper_util::client::legacy::Error) -> HttpError {
    let kind = if error.is_connect() {
        HttpErrorKind::Connect
    } else {
        HttpErrorKind::Request
    };
    tracing::trace!(source = ?error.source().map(ToString::to_string), "request failed");
    HttpError::new(kind, error)
}

fn cut(error: Box<dyn std::error::Error + Send + Sync>) -> HttpError {
    if error.is::<LengthLimitError>() {
        HttpError::new(HttpErrorKind::Decode, Broken::Long(MAX_COLLECTED))
    } else {
        HttpError::new(HttpErrorKind::Interrupted, std::io::Error::other(error))
    }
}

/// The beginning of an answer's body, as much as comes.
async fn beginning(mut body: hyper::body::Incoming) -> Bytes {
    let mut said = BytesMut::new();
    while let Some(Ok(frame)) = body.frame().await {
        if let Some(data) = frame.data_ref() {
            said.extend_from_slice(&data[..data.len().min(MAX_REFUSAL - said.len())]);
        }
        if said.len() == MAX_REFUSAL {
            break;
        }
    }
    said.freeze()
}

/// What of a request is not to be shown: a store may repeat it.
fn sent(uri: &Uri, headers: &HeaderMap) -> Secrets {
    let names = [AUTHORIZATION.as_str(), "x-amz-security-token"];
    let mut secrets: Vec<String> = names
        .iter()
        .filter_map(|name| headers.get(*name)?.to_str().ok().map(str::to_owned))
        .collect();
    // Of S3's signature, the words that might be repeated alone.
    let authorization = secrets.first().cloned().unwrap_or_default();
    for word in ["Credential=", "Signature="] {
        let value = authorization.split_once(word).map_or("", |(_, value)| value);
        secrets.extend(value.split([',', '/']).next().map(str::to_owned));
    }
    for pair in uri.query().unwrap_or_default().split('&') {
        if let Some((_, signature)) = pair.split_once('=').filter(|(key, _)| *key == "sig") {
            secrets.push(signature.to_owned());
            secrets.push(percent_decode_str(signature).decode_utf8_lossy().into_owned());
        }
    }
    Secrets::of(secrets.iter().map(String::as_str))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_checksum_of_a_whole_object_counts() {
        // Of `abc`.
        const SUM: &str = "ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0=";
        for (sum, kind, is_one) in [
            (Some(SUM), None, true),
            (Some(SUM), Some("FULL_OBJECT"), true),
            (Some(SUM), Some("COMPOSITE"), false),
            (
                Some("ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0=-2"),
                None,
                false,
            ),
            (Some("AAAA"), None, false),
            (None, Some("FULL_OBJECT"), false),
        ] {
            let mut headers = HeaderMap::new();
            for (name, value) in [("x-amz-checksum-sha256", sum), ("x-amz-checksum-type", kind)] {
                if let Some(value) = value {
                    headers.insert(name, HeaderValue::from_static(value));
                }
            }
            let found = StoredSha256::of(&headers).map(|sum| hex::encode(sum.0));
            let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
            assert_eq!(found.as_deref(), is_one.then_some(expected), "{sum:?} {kind:?}");
        }
    }
}
