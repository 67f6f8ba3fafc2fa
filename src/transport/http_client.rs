//! Connections to one HTTP server, kept and used again.

use std::{
    error::Error,
    future::Future,
    io,
    path::{Path, PathBuf},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use tokio::net::UnixStream;
use tower::Service;

use super::{ConnectOptions, Fault, RemoteError, fault};
use crate::printable::with_causes;

/// How long a connection is kept that nobody uses. Servers and balancers in the cloud end theirs after 60 s and more.
const KEPT_FOR: Duration = Duration::from_secs(30);
/// How often the system asks whether the other end of a connection is there.
const TCP_KEEPALIVE: Duration = Duration::from_secs(30);

type BoxError = Box<dyn Error + Send + Sync>;
type Opening<T> = Pin<Box<dyn Future<Output = Result<T, BoxError>> + Send>>;

/// A client for one server, with HTTP/1.1.
#[derive(Clone)]
pub(crate) struct HttpClient(Way);

#[derive(Clone)]
enum Way {
    Tcp(Kept<HttpConnector>),
    Unix(Kept<Socket>),
}

#[derive(Clone)]
struct Kept<C> {
    connector: InTime<HttpsConnector<C>>,
    client: Client<InTime<HttpsConnector<C>>, Empty<Bytes>>,
}

/// Why there is no answer.
#[derive(Debug)]
pub(crate) struct HttpFault {
    /// What has befallen the connection, where that is known.
    pub(crate) fault: Option<Fault>,
    /// In words.
    pub(crate) message: String,
}

impl HttpClient {
    /// Reads certificates and keys; connects nothing. Keeps at most `idle` connections.
    ///
    /// # Errors
    /// [`RemoteErrorKind::Config`](super::RemoteErrorKind::Config), naming the file.
    pub(crate) fn new(options: &ConnectOptions, idle: usize) -> Result<Self, RemoteError> {
        let tls = options.tls.client_config(options.endpoint.is_tls())?;
        let limit = options.connect_timeout;
        let way = match &options.proxy {
            Some(path) => Way::Unix(Kept::new(tls, Socket(path.clone()), limit, idle)),
            None => {
                let mut tcp = HttpConnector::new();
                tcp.enforce_http(false);
                tcp.set_nodelay(true);
                tcp.set_keepalive(Some(TCP_KEEPALIVE));
                tcp.set_connect_timeout(Some(limit));
                Way::Tcp(Kept::new(tls, tcp, limit, idle))
            }
        };
        Ok(Self(way))
    }

    /// The same without its connections: what is sent with it goes over new ones, which are not kept.
    pub(crate) fn fresh(&self) -> Self {
        let way = match &self.0 {
            Way::Tcp(kept) => Way::Tcp(kept.fresh()),
            Way::Unix(kept) => Way::Unix(kept.fresh()),
        };
        Self(way)
    }

    /// Sends a request, and waits for the answer's head.
    pub(crate) async fn send(&self, request: Request<Empty<Bytes>>) -> Result<Response<Incoming>, HttpFault> {
        let answer = match &self.0 {
            Way::Tcp(kept) => kept.client.request(request).await,
            Way::Unix(kept) => kept.client.request(request).await,
        };
        answer.map_err(|error| HttpFault::of(&error))
    }
}

impl HttpFault {
    /// Of a client's or a body's error. Neither says what was sent.
    pub(crate) fn of(error: &(dyn Error + 'static)) -> Self {
        Self {
            fault: fault::of_error(error),
            message: with_causes(error),
        }
    }
}

impl<C> Kept<C>
where
    HttpsConnector<C>: Service<Uri, Error = BoxError, Future: Send> + Clone + Send + Sync + 'static,
    <HttpsConnector<C> as Service<Uri>>::Response: hyper::rt::Read
        + hyper::rt::Write
        + hyper_util::client::legacy::connect::Connection
        + Send
        + Unpin
        + 'static,
{
    fn new(tls: rustls::ClientConfig, connector: C, limit: Duration, idle: usize) -> Self {
        let inner = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(connector);
        Self::of(InTime { inner, limit }, idle)
    }

    fn of(connector: InTime<HttpsConnector<C>>, idle: usize) -> Self {
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(KEPT_FOR)
            .pool_max_idle_per_host(idle)
            .build(connector.clone());
        Self { connector, client }
    }

    fn fresh(&self) -> Self {
        Self::of(self.connector.clone(), 0)
    }
}

/// Connects within a time, TLS included.
#[derive(Clone)]
struct InTime<C> {
    inner: C,
    limit: Duration,
}

impl<C> Service<Uri> for InTime<C>
where
    C: Service<Uri, Error = BoxError, Future: Send + 'static>,
    C::Response: 'static,
{
    type Response = C::Response;
    type Error = BoxError;
    type Future = Opening<C::Response>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (opening, limit) = (self.inner.call(uri), self.limit);
        Box::pin(async move {
            let late = |_| io::Error::new(io::ErrorKind::TimedOut, format!("no connection within {limit:?}"));
            tokio::time::timeout(limit, opening).await.map_err(late)?
        })
    }
}

/// Connects to a unix socket, whatever the address.
#[derive(Clone)]
struct Socket(PathBuf);

impl Socket {
    async fn connect(path: &Path) -> io::Result<TokioIo<UnixStream>> {
        let failed = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
        UnixStream::connect(path).await.map(TokioIo::new).map_err(failed)
    }
}

impl Service<Uri> for Socket {
    type Response = TokioIo<UnixStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<TokioIo<UnixStream>>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let path = self.0.clone();
        Box::pin(async move { Self::connect(&path).await })
    }
}
