//! Connections to servers: their settings, and the ways to make them.

use std::{
    error::Error as _,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::anyhow;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint as HttpEndpoint, Uri};

use super::{
    ConnectOptions, RemoteError,
    fault::{Fault, of_error},
};
use crate::printable::with_causes;

/// 800 MB/s at a round trip of 20 ms.
const STREAM_WINDOW: u32 = 16 * 1024 * 1024;
const CONNECTION_WINDOW: u32 = 32 * 1024 * 1024;
/// The default of 16 KiB means a read of the socket for every 8 KiB, and two copies of each; a server need not use it.
const FRAME: u32 = 1024 * 1024;
/// How often the system asks whether the other end of a connection is there.
const TCP_KEEPALIVE: Duration = Duration::from_secs(30);

/// Makes connections to one place.
#[derive(Debug, Clone)]
pub(crate) struct Connector {
    endpoint: HttpEndpoint,
    socket: Option<PathBuf>,
    dial: Option<fn(&HttpEndpoint) -> Channel>,
}

impl Connector {
    /// Reads certificates and keys; connects nothing.
    ///
    /// # Errors
    /// [`RemoteErrorKind::Config`](super::RemoteErrorKind::Config), naming the file.
    pub(crate) fn new(options: &ConnectOptions) -> Result<Self, RemoteError> {
        let place =
            |e: tonic::transport::Error| RemoteError::config(options.endpoint.to_string(), with_causes(&e));
        let mut endpoint = HttpEndpoint::from_shared(options.endpoint.http_uri())
            .map_err(place)?
            .user_agent(concat!("outhaul/", env!("CARGO_PKG_VERSION")))
            .map_err(place)?
            .connect_timeout(options.connect_timeout)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME)
            .http2_adaptive_window(false)
            // Servers end connections that ping without a reason.
            .keep_alive_while_idle(false)
            .tcp_keepalive(Some(TCP_KEEPALIVE))
            .tcp_nodelay(true);
        if let Some(authority) = &options.authority {
            let scheme = if options.endpoint.is_tls() {
                "https"
            } else {
                "http"
            };
            let origin = format!("{scheme}://{}", authority.value());
            // It was looked at when it was made.
            if let Ok(origin) = origin.parse() {
                endpoint = endpoint.origin(origin);
            }
        }
        if let Some(interval) = options.keepalive {
            endpoint = endpoint
                .http2_keep_alive_interval(interval)
                .keep_alive_timeout(interval / 3);
        }
        if options.endpoint.is_tls() {
            let mut tls = options.tls.read()?.timeout(options.connect_timeout);
            if let Some(name) = &options.tls_authority_override {
                tls = tls.domain_name(name);
            }
            endpoint = endpoint
                .tls_config(tls)
                .map_err(|e| RemoteError::config(format!("TLS for {}", options.endpoint), with_causes(&e)))?;
        }
        let socket = options.proxy.as_deref().or(options.endpoint.unix_path());
        Ok(Self {
            endpoint,
            socket: socket.map(Into::into),
            dial: options.dial,
        })
    }

    /// A connection that is made when it is first used, and again when it broke. Must be called within the runtime.
    pub(crate) fn channel(&self) -> Channel {
        match (self.dial, &self.socket) {
            (Some(dial), _) => dial(&self.endpoint),
            (None, Some(socket)) => self.endpoint.connect_with_connector_lazy(through(socket)),
            (None, None) => self.endpoint.connect_lazy(),
        }
    }

    /// Why no connection can ever be made, as far as that shows now: the server's certificate is not trusted, say.
    pub(crate) async fn refuses(&self) -> Option<String> {
        if self.socket.is_some() || self.dial.is_some() || self.endpoint.uri().scheme_str() != Some("https") {
            return None;
        }
        let error = self.endpoint.connect().await.err()?;
        match of_error(&error)? {
            Fault::Certificate(distrust) => Some(distrust.advice().to_owned()),
            fault if fault.is_of_tls() => Some(with_causes(&error)),
            _ => None,
        }
    }

    /// A connection that is made now.
    ///
    /// # Errors
    /// In words.
    pub(crate) async fn connect(&self) -> anyhow::Result<Channel> {
        let connected = match &self.socket {
            Some(socket) => self.endpoint.connect_with_connector(through(socket)).await,
            None => self.endpoint.connect().await,
        };
        // The error itself is just "transport error".
        connected.map_err(|e| anyhow!(e.source().map_or_else(|| e.to_string(), with_causes)))
    }
}

/// Connects to a unix socket, whatever the address.
fn through(
    socket: &Path,
) -> impl tower::Service<Uri, Response = TokioIo<UnixStream>, Error = io::Error, Future: Send> + Send + 'static
{
    let socket = socket.to_owned();
    tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    })
}
