//! One request to the server: credentials, a connection's place, and what a status means.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Incoming;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::{
    digest::{Digest, DigestFunction},
    printable::clipped,
    remote::{
        RemoteOptions,
        compression::Chooser,
        retry::{RetryPolicy, Timer},
        status::{MAX_MESSAGE, readable},
    },
    transport::{
        Auth, Fault, Header, HttpClient, HttpFault, RemoteError, RemoteErrorKind, http_head::kind_of,
        retry_after,
    },
};

/// Most that is read of an answer that has no blob, so that its connection can be used again.
const REST: usize = 64 << 10;
/// How long that may take.
const REST_PATIENCE: Duration = Duration::from_secs(1);

/// The server, and the means to ask it.
pub(super) struct Server {
    pub(super) options: RemoteOptions,
    /// Without a slash at its end.
    base: String,
    client: HttpClient,
    auth: Auth,
    pub(super) retry: RetryPolicy,
    /// One for each connection.
    places: Semaphore,
    pub(super) chooser: Chooser,
    /// It sent a blob plain that it was asked to compress.
    knows_no_zstd: AtomicBool,
}

/// A request.
#[derive(Debug)]
pub(super) struct Ask<'a> {
    pub(super) method: Method,
    /// Below the base URL: `cas/HASH` or `ac/HASH`.
    pub(super) path: &'a str,
    /// The value of `Range`.
    pub(super) range: Option<String>,
    /// Whether zstd is as good.
    pub(super) zstd: bool,
    /// Whether to use a new connection.
    pub(super) fresh: bool,
}

impl<'a> Ask<'a> {
    /// For all of it, plain.
    pub(super) const fn plain(method: Method, path: &'a str) -> Self {
        Self {
            method,
            path,
            range: None,
            zstd: false,
            fresh: false,
        }
    }
}

impl Server {
    pub(super) fn new(options: RemoteOptions, timer: Arc<dyn Timer>) -> Result<Self, RemoteError> {
        options.validate()?;
        let connections = options.connections();
        let auth = Auth::new(&options.connect)?;
        auth.warn_if_unencrypted(&options.connect);
        Ok(Self {
            base: options.connect.endpoint.to_string(),
            client: HttpClient::new(&options.connect, connections)?,
            auth,
            retry: RetryPolicy::new(options.retries, options.max_retry_delay, timer),
            places: Semaphore::new(connections),
            chooser: Chooser::new(options.compression, options.connect.endpoint.is_local()),
            knows_no_zstd: AtomicBool::new(false),
            options,
        })
    }

    /// `what`, and where: the context of errors.
    pub(super) fn context(&self, what: impl std::fmt::Display) -> String {
        format!("{what} from {}", self.base)
    }

    pub(super) fn place(&self) -> &str {
        &self.base
    }

    /// Waits for a connection's place.
    pub(super) async fn connection(&self) -> Option<SemaphorePermit<'_>> {
        // It is never closed.
        self.places.acquire().await.ok()
    }

    /// Whether it may be asked for zstd.
    pub(super) fn may_know_zstd(&self) -> bool {
        !self.knows_no_zstd.load(Relaxed)
    }

    pub(super) fn found_plain(&self) {
        self.knows_no_zstd.store(true, Relaxed);
    }

    /// Sends a request and waits for the answer's head, whatever its status. Credentials that are refused are renewed
    /// once.
    pub(super) async fn send(&self, context: &str, ask: &Ask<'_>) -> Result<Response<Incoming>, RemoteError> {
        let mut refreshed = false;
        let mut closed = false;
        loop {
            let (headers, credentials) = self.auth.headers("").await?;
            let request = self.request(ask, &headers, context)?;
            let client = match ask.fresh {
                true => self.client.fresh(),
                false => self.client.clone(),
            };
            let limit = self.options.stall_timeout;
            let answer = match tokio::time::timeout(limit, client.send(request)).await {
                Ok(Ok(answer)) => answer,
                // A server may end a kept connection at the moment when it is used again.
                Ok(Err(error)) if error.fault == Some(Fault::Closed) && !closed => {
                    closed = true;
                    continue;
                }
                Ok(Err(error)) => return Err(self.broken(context, error)),
                Err(_) => {
                    let message = format!("no answer within {limit:?}");
                    return Err(RemoteError::timeout(context, message));
                }
            };
            if is_unauthenticated(answer.status(), answer.headers())
                && !refreshed
                && self.auth.refresh(credentials).await
            {
                refreshed = true;
                rest(answer.into_body()).await;
                continue;
            }
            return Ok(answer);
        }
    }

    fn request(
        &self,
        ask: &Ask<'_>,
        headers: &[Header],
        context: &str,
    ) -> Result<Request<Empty<Bytes>>, RemoteError> {
        let mut request = Request::builder()
            .method(&ask.method)
            .uri(format!("{}/{}", self.base, ask.path))
            .header(header::ACCEPT, "*/*")
            .header(
                header::ACCEPT_ENCODING,
                if ask.zstd { "zstd" } else { "identity" },
            )
            .header(header::USER_AGENT, concat!("outhaul/", env!("CARGO_PKG_VERSION")));
        if let Some(range) = &ask.range {
            request = request.header(header::RANGE, range);
        }
        for header in headers {
            if let Ok(mut value) = HeaderValue::from_str(header.value()) {
                value.set_sensitive(true);
                request = request.header(header.name(), value);
            }
        }
        // Its parts were checked when they were read.
        request
            .body(Empty::new())
            .map_err(|e| RemoteError::config(context, e.to_string()))
    }

    /// The error for a connection that could not be made, or broke.
    pub(super) fn broken(&self, context: &str, error: HttpFault) -> RemoteError {
        let kind = match error.fault {
            Some(fault) if fault.is_of_tls() => RemoteErrorKind::Config,
            _ => RemoteErrorKind::Unavailable,
        };
        let message = match error.fault {
            Some(Fault::NoTls) => "the server does not speak TLS there; use http://".to_owned(),
            Some(Fault::Certificate(distrust)) => distrust.advice().to_owned(),
            Some(Fault::Refused) => {
                "the server refused the TLS connection; it may require --tls-client-certificate".to_owned()
            }
            _ => error.message,
        };
        RemoteError::new(kind, context, clipped(&readable(&message), MAX_MESSAGE))
    }

    /// The error for an answer that its request does not allow. Reads its body, so that the connection can
    /// be used again.
    pub(super) async fn refused(&self, context: &str, answer: Response<Incoming>) -> RemoteError {
        let (head, body) = answer.into_parts();
        let said = rest(body).await;
        let status = head.status;
        let kind = match is_unauthenticated(status, &head.headers) {
            true => RemoteErrorKind::Unauthenticated,
            false if status == StatusCode::FORBIDDEN && self.options.forbidden_is_missing => {
                RemoteErrorKind::NotFound
            }
            false => kind_of(status),
        };
        let mut message = match kind {
            RemoteErrorKind::NotFound if status == StatusCode::FORBIDDEN => {
                format!("not in the cache ({status}, which means so with --forbidden-is-missing)")
            }
            RemoteErrorKind::NotFound => "not in the cache".to_owned(),
            RemoteErrorKind::Unauthenticated => format!(
                "the server requires credentials: a user name and a password in the URL or in ~/.netrc, \
                 --remote-header or --credential-helper ({status})"
            ),
            RemoteErrorKind::Denied => format!("permission denied by the server ({status})"),
            _ if status.is_redirection() => format!("the server redirects, which is not followed ({status})"),
            _ => format!("the server answered {status}"),
        };
        if kind != RemoteErrorKind::NotFound && is_plain_text(&head.headers) {
            let words = self
                .auth
                .secrets()
                .conceal(readable(&String::from_utf8_lossy(&said)));
            if !words.is_empty() {
                message = format!("{message}: {}", clipped(&words, MAX_MESSAGE));
            }
        }
        let mut error = RemoteError::new(kind, context, message);
        error.retry_after = retry_after(&head.headers, SystemTime::now());
        self.options.with_left_out(error)
    }
}

/// A blob's path.
pub(super) fn cas(digest: &Digest) -> String {
    format!("cas/{}", digest.hash_hex())
}

/// The path of the blob that all servers have: nobody uploads it.
pub(super) fn empty(function: DigestFunction) -> String {
    cas(&Digest::of(function, b""))
}

/// Bazel takes the second as the first: a token that has expired (RFC 6750, 3.1).
fn is_unauthenticated(status: StatusCode, headers: &HeaderMap) -> bool {
    let words = headers
        .get(header::WWW_AUTHENTICATE)
        .and_then(|value| value.to_str().ok());
    status == StatusCode::UNAUTHORIZED
        || !status.is_success()
            && words.is_some_and(|words| words.starts_with("Bearer") && words.contains("invalid_token"))
}

/// Others send pages.
fn is_plain_text(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE);
    kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/plain"))
}

/// What there is of a body, if that is soon there and not much.
async fn rest(body: Incoming) -> Bytes {
    let all = Limited::new(body, REST).collect();
    match tokio::time::timeout(REST_PATIENCE, all).await {
        Ok(Ok(all)) => all.to_bytes(),
        _ => Bytes::new(),
    }
}
