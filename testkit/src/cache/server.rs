//! Starting and stopping the cache.

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use super::{
    action_cache::ActionCacheService,
    capabilities::CapabilitiesService,
    cas::CasService,
    connection::Connection,
    context::{Context, Shared},
    faults::Faults,
    stats::{Stats, add},
    store::Store,
    wire::Wire,
    write::ByteStreamService,
};
use bazel_remote_apis::{
    build::bazel::remote::execution::v2::{
        action_cache_server::ActionCacheServer, capabilities_server::CapabilitiesServer,
        content_addressable_storage_server::ContentAddressableStorageServer,
    },
    google::bytestream::byte_stream_server::ByteStreamServer,
};
use futures::{Stream, TryStreamExt as _};
use outhaul_digest::DigestFunction;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    task::JoinHandle,
};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig, server::Router};

/// gRPC's default limit of 4 MiB for a message, less room for what 4,000 blobs carry beside their bytes: some 96 bytes
/// each for digest, status and tags.
const DEFAULT_BATCH_BYTES: u64 = (4 << 20) - (384 << 10);

/// Largest message taken. Clients write streams in messages of at most a few MiB.
const MAX_MESSAGE: usize = 16 << 20;

/// HTTP/2 windows for what clients upload. For downloads, the clients' own windows count.
const STREAM_WINDOW: u32 = 8 << 20;
const CONNECTION_WINDOW: u32 = 32 << 20;

/// Why a cache did not start.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedCacheError {
    /// Neither an IP address with a port nor `unix:PATH`.
    #[error("{0:?} is no address to listen on; write IP:PORT or unix:/PATH")]
    Address(String),
    /// The address is taken, or cannot be listened on.
    #[error("listening on {address}: {source}")]
    Bind {
        /// The address as given.
        address: String,
        /// The system's words.
        source: io::Error,
    },
    /// The certificates or the key cannot be used.
    #[error("setting TLS up: {0}")]
    Tls(tonic::transport::Error),
    /// No digest function was left to serve.
    #[error("no digest function given")]
    NoDigestFunction,
}

/// A certificate for the server, all as PEM.
#[derive(Clone)]
pub struct ServerTls {
    /// The server's certificate chain.
    pub certificate: String,
    /// Its private key.
    pub key: String,
    /// With it, clients must show a certificate issued by this authority.
    pub client_ca: Option<String>,
}

/// The cache, before it is started.
#[derive(Debug)]
pub struct EmbeddedCache;

impl EmbeddedCache {
    /// A cache with the defaults: in memory, zstd offered, SHA-256, any instance name, a free port of `127.0.0.1`.
    pub fn builder() -> Builder {
        Builder {
            zstd: true,
            functions: vec![DigestFunction::Sha256],
            instance: None,
            max_batch_bytes: DEFAULT_BATCH_BYTES,
            address: "127.0.0.1:0".to_owned(),
            tls: None,
            required_header: None,
            connection_age: None,
        }
    }
}

/// Settings of a cache.
pub struct Builder {
    zstd: bool,
    functions: Vec<DigestFunction>,
    instance: Option<String>,
    max_batch_bytes: u64,
    address: String,
    tls: Option<ServerTls>,
    required_header: Option<(String, String)>,
    connection_age: Option<Duration>,
}

impl Builder {
    /// Whether zstd is offered and taken, in batches and streams.
    pub const fn zstd(mut self, offered: bool) -> Self {
        self.zstd = offered;
        self
    }

    /// Functions that requests may use. The first is the store's own, see [`Store::put`].
    pub fn digest_functions(mut self, functions: Vec<DigestFunction>) -> Self {
        self.functions = functions;
        self
    }

    /// The only instance name (possibly empty) that requests may carry. `None` takes any, with the same content.
    pub fn instance_name(mut self, name: Option<String>) -> Self {
        self.instance = name;
        self
    }

    /// Largest sum of blob sizes in a batch; 0 states no limit and has none.
    pub const fn max_batch_bytes(mut self, bytes: u64) -> Self {
        self.max_batch_bytes = bytes;
        self
    }

    /// Where to listen: `IP:PORT`, with port 0 for a free one, or `unix:/PATH`.
    pub fn bind(mut self, address: impl Into<String>) -> Self {
        self.address = address.into();
        self
    }

    /// Speaks TLS, perhaps with client certificates.
    pub fn tls(mut self, tls: ServerTls) -> Self {
        self.tls = Some(tls);
        self
    }

    /// After this time, a connection gets GOAWAY: calls under way on it complete, new calls need a new connection.
    pub const fn connection_age(mut self, most: Duration) -> Self {
        self.connection_age = Some(most);
        self
    }

    /// Calls without this header are answered with UNAUTHENTICATED.
    pub fn required_header(mut self, name: &str, value: &str) -> Self {
        self.required_header = header(Some((name, value)));
        self
    }

    /// Starts the cache on the current tokio runtime.
    ///
    /// # Errors
    /// When the address or the certificates cannot be used.
    pub async fn start(self) -> Result<RunningCache, EmbeddedCacheError> {
        let address = self.address.clone();
        let failed = |source| EmbeddedCacheError::Bind {
            address: address.clone(),
            source,
        };
        if let Some(path) = address.strip_prefix("unix:") {
            let listener = UnixListener::bind(path).map_err(failed)?;
            let mut cache = self.serve(address.clone(), UnixListenerStream::new(listener))?;
            cache.socket = Some(path.into());
            return Ok(cache);
        }
        let parsed: SocketAddr = address
            .parse()
            .map_err(|_| EmbeddedCacheError::Address(address.clone()))?;
        let listener = TcpListener::bind(parsed).await.map_err(failed)?;
        let scheme = if self.tls.is_some() { "grpcs" } else { "grpc" };
        let endpoint = format!("{scheme}://{}", listener.local_addr().map_err(failed)?);
        let incoming = TcpListenerStream::new(listener).inspect_ok(|socket| {
            // Without it, small answers wait for the peer's delayed acknowledgement.
            if let Err(error) = socket.set_nodelay(true) {
                tracing::debug!(%error, "could not set TCP_NODELAY");
            }
        });
        self.serve(endpoint, incoming)
    }

    /// Serves connections that come from elsewhere; clients know the cache by the endpoint.
    ///
    /// # Errors
    /// When the certificates cannot be used.
    pub fn serve<S>(
        self,
        endpoint: String,
        incoming: impl Stream<Item = io::Result<S>> + Send + 'static,
    ) -> Result<RunningCache, EmbeddedCacheError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (router, context) = self.router()?;
        // The line is taken after the wait: one from before may have been severed meanwhile.
        let incoming = incoming.map_ok({
            let context = context.clone();
            move |socket| {
                add(&context.counters.connections, 1);
                Connection::new(socket, context.faults.line())
            }
        });
        let stopped = CancellationToken::new();
        let stop = stopped.clone().cancelled_owned();
        let task = tokio::spawn(async move {
            if let Err(error) = router.serve_with_incoming_shutdown(incoming, stop).await {
                tracing::warn!(%error, "embedded cache stopped");
            }
        });
        Ok(RunningCache {
            endpoint,
            context,
            stopped,
            task: Some(task),
            socket: None,
        })
    }

    /// The services, and what they share.
    fn router(self) -> Result<(Router, Shared), EmbeddedCacheError> {
        let function = *self
            .functions
            .first()
            .ok_or(EmbeddedCacheError::NoDigestFunction)?;
        let context = Arc::new(Context {
            store: Store::in_memory(function),
            faults: Faults::default(),
            counters: Default::default(),
            uploads: Default::default(),
            functions: self.functions,
            instance: self.instance,
            zstd: self.zstd,
            max_batch_bytes: self.max_batch_bytes,
            required_header: self.required_header.into(),
            last_headers: Default::default(),
        });
        let mut server = Server::builder()
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW);
        if let Some(age) = self.connection_age {
            server = server.max_connection_age(age);
        }
        if let Some(tls) = self.tls {
            let mut config = ServerTlsConfig::new().identity(Identity::from_pem(&tls.certificate, &tls.key));
            if let Some(authority) = &tls.client_ca {
                config = config.client_ca_root(Certificate::from_pem(authority));
            }
            server = server.tls_config(config).map_err(EmbeddedCacheError::Tls)?;
        }
        let message = usize::try_from(self.max_batch_bytes)
            .unwrap_or(MAX_MESSAGE)
            .saturating_add(1 << 20)
            .max(MAX_MESSAGE);
        let router = server
            .add_service(Wire::new(
                CapabilitiesServer::new(CapabilitiesService(context.clone())),
                context.clone(),
            ))
            .add_service(Wire::new(
                ActionCacheServer::new(ActionCacheService(context.clone())),
                context.clone(),
            ))
            .add_service(Wire::new(
                ContentAddressableStorageServer::new(CasService(context.clone()))
                    .max_decoding_message_size(message),
                context.clone(),
            ))
            .add_service(Wire::new(
                ByteStreamServer::new(ByteStreamService(context.clone())).max_decoding_message_size(message),
                context.clone(),
            ));
        Ok((router, context))
    }
}

/// A cache that serves. It stops when this is dropped.
#[derive(Debug)]
pub struct RunningCache {
    endpoint: String,
    context: Shared,
    stopped: CancellationToken,
    task: Option<JoinHandle<()>>,
    /// The socket's file, to be removed.
    socket: Option<PathBuf>,
}

impl RunningCache {
    /// The address as `--remote_cache` takes it: `grpc://IP:PORT`, `grpcs://IP:PORT` or `unix:/PATH`.
    pub fn endpoint(&self) -> String {
        self.endpoint.clone()
    }

    /// What the cache holds.
    pub fn store(&self) -> &Store {
        &self.context.store
    }

    /// Its misbehaviour.
    pub fn faults(&self) -> &Faults {
        &self.context.faults
    }

    /// What it was asked for so far.
    pub fn stats(&self) -> Stats {
        self.context.counters.read()
    }

    /// Headers of the last call that arrived, whatever became of it.
    pub fn last_headers(&self) -> http::HeaderMap {
        self.context.last_headers.read().clone()
    }

    /// Changes the header that calls must carry from now on, as when a token expires; `None` for no header.
    pub fn require_header(&self, required: Option<(&str, &str)>) {
        *self.context.required_header.write() = header(required);
    }

    /// Stops the cache: connections are broken, calls under way fail. Returns when the address is free again.
    pub async fn stop(mut self) {
        self.shut();
        if let Some(mut task) = self.task.take() {
            // A connection accepted at the last moment is not among those broken by `shut`.
            while tokio::time::timeout(Duration::from_millis(10), &mut task)
                .await
                .is_err()
            {
                self.context.faults.sever_connections();
            }
        }
    }

    fn shut(&self) {
        self.stopped.cancel();
        self.context.faults.sever_connections();
        if let Some(socket) = &self.socket {
            let _ = std::fs::remove_file(socket);
        }
    }
}

impl Drop for RunningCache {
    fn drop(&mut self) {
        self.shut();
    }
}

fn header(required: Option<(&str, &str)>) -> Option<(String, String)> {
    required.map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
}
