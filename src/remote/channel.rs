//! The connections to a cache.
//!
//! There are a few of them, since one connection is one flow to every queue and limit on the way, and each has large
//! fixed windows: a window divided by the round trip's time is the most that a stream can carry.

use std::{
    fs,
    path::Path,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, AtomicUsize, Ordering},
    },
    time::Duration,
};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint as HttpEndpoint, Identity, Uri};

use super::options::RemoteOptions;
use crate::{
    digest::Digest,
    printable::with_causes,
    transport::{RemoteError, RemoteErrorKind},
};

/// 800 MB/s at a round trip of 20 ms.
const STREAM_WINDOW: u32 = 16 * 1024 * 1024;
const CONNECTION_WINDOW: u32 = 32 * 1024 * 1024;
/// The default of 16 KiB means a read of the socket for every 8 KiB, and two copies of each; a server need not use it.
const FRAME: u32 = 1024 * 1024;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Places in the table of who brought what.
const REMEMBERED: usize = 1 << 14;

/// A set of connections, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Connections(u64);

impl Connections {
    pub(crate) const fn insert(&mut self, index: usize) {
        self.0 |= 1 << index;
    }

    /// Every connection except for one.
    pub(crate) const fn all_but(line: Line) -> Self {
        Self(!(1 << line.index))
    }

    const fn contains(self, index: usize) -> bool {
        self.0 >> index & 1 == 1
    }
}

/// A connection that was picked, as it was then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) index: usize,
    generation: u32,
}

/// A place for a connection.
#[derive(Default)]
struct Slot {
    channel: Option<Channel>,
    /// Counts those that were given up.
    generation: u32,
}

/// Makes connections to one place.
pub(crate) struct Connector {
    endpoint: HttpEndpoint,
    socket: Option<std::path::PathBuf>,
}

/// The connections. Each is made when it is first needed, and again when it broke.
pub(crate) struct Pool {
    connector: Connector,
    slots: Vec<Mutex<Slot>>,
    next: AtomicUsize,
    /// Which connection last carried a digest, at the place that its hash tells, plus one. Others fall on the same
    /// place and that does no harm: it is asked only after bytes that were wrong, and a wrong answer avoids a
    /// connection that need not be avoided.
    carried: Box<[AtomicU8]>,
}

impl Connector {
    /// Reads certificates and keys; connects nothing.
    ///
    /// # Errors
    /// [`RemoteErrorKind::Config`], naming the file.
    pub(crate) fn new(options: &RemoteOptions) -> Result<Self, RemoteError> {
        let uri = options.endpoint.http_uri();
        let place = |e: tonic::transport::Error| {
            RemoteError::new(
                RemoteErrorKind::Config,
                options.endpoint.to_string(),
                with_causes(&e),
            )
        };
        let mut endpoint = HttpEndpoint::from_shared(uri)
            .map_err(place)?
            .user_agent(concat!("outhaul/", env!("CARGO_PKG_VERSION")))
            .map_err(place)?
            .connect_timeout(options.connect_timeout)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME)
            .http2_adaptive_window(false)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            // Servers end connections that ping without a reason.
            .keep_alive_while_idle(false)
            .tcp_keepalive(Some(KEEPALIVE_INTERVAL))
            .tcp_nodelay(true);
        if options.endpoint.is_tls() {
            endpoint = endpoint.tls_config(tls(options)?).map_err(|e| {
                RemoteError::new(
                    RemoteErrorKind::Config,
                    format!("TLS for {}", options.endpoint),
                    with_causes(&e),
                )
            })?;
        }
        Ok(Self {
            endpoint,
            socket: options
                .proxy
                .clone()
                .or_else(|| options.endpoint.unix_path().map(Path::to_owned)),
        })
    }

    /// With other times for pings and their answers.
    pub(crate) fn keep_alive(self, interval: Duration, timeout: Duration) -> Self {
        Self {
            endpoint: self
                .endpoint
                .http2_keep_alive_interval(interval)
                .keep_alive_timeout(timeout),
            ..self
        }
    }

    /// A connection that is made when it is first used, and again when it broke. Must be called within the runtime.
    pub(crate) fn channel(&self) -> Channel {
        #[cfg(test)]
        if turmoil::in_simulation() {
            return crate::simulated::net::channel(&self.endpoint);
        }
        let Some(socket) = &self.socket else {
            return self.endpoint.connect_lazy();
        };
        let socket = socket.clone();
        self.endpoint
            .connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
                let socket = socket.clone();
                async move { UnixStream::connect(socket).await.map(TokioIo::new) }
            }))
    }
}

impl Pool {
    /// Reads certificates and keys; connects nothing.
    ///
    /// # Errors
    /// [`RemoteErrorKind::Config`], naming the file.
    pub(crate) fn new(options: &RemoteOptions) -> Result<Self, RemoteError> {
        Ok(Self {
            connector: Connector::new(options)?,
            slots: (0..options.connections.max(1))
                .map(|_| Mutex::default())
                .collect(),
            next: AtomicUsize::new(0),
            carried: (0..REMEMBERED).map(|_| AtomicU8::new(0)).collect(),
        })
    }

    /// The next connection in turn that is not to be avoided, or the next one when all are. Must be called within
    /// the runtime.
    pub(crate) fn pick(&self, avoid: Connections) -> (Line, Channel) {
        let count = self.slots.len();
        let start = self.next.fetch_add(1, Ordering::Relaxed);
        let index = (0..count)
            .map(|i| start.wrapping_add(i) % count)
            .find(|&i| !avoid.contains(i))
            .unwrap_or(start % count);
        let mut slot = self.slot(index);
        let channel = slot.channel.get_or_insert_with(|| self.connector.channel());
        let channel = channel.clone();
        let generation = slot.generation;
        (Line { index, generation }, channel)
    }

    /// Gives a connection up on which nothing came in time: its peer may be gone without a word, and the next call on it
    /// would wait as long. What is under way on it may still end.
    pub(crate) fn give_up(&self, line: Line) {
        let mut slot = self.slot(line.index);
        if slot.generation == line.generation {
            slot.channel = None;
            slot.generation = slot.generation.wrapping_add(1);
        }
    }

    fn slot(&self, index: usize) -> MutexGuard<'_, Slot> {
        // A channel and a number: a panic elsewhere leaves them as good as before.
        self.slots[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers who carried a digest.
    pub(crate) fn note(&self, digest: &Digest, index: usize) {
        // There are at most 64 connections.
        let stored = u8::try_from(index + 1).unwrap_or(0);
        self.carried[place(digest)].store(stored, Ordering::Relaxed);
    }

    /// The connections that last carried one of these digests.
    pub(crate) fn carriers<'a>(&self, digests: impl IntoIterator<Item = &'a Digest>) -> Connections {
        let mut found = Connections::default();
        for digest in digests {
            if let Some(index) = self.carried[place(digest)].load(Ordering::Relaxed).checked_sub(1) {
                found.insert(usize::from(index));
            }
        }
        found
    }
}

fn place(digest: &Digest) -> usize {
    match *digest.hash() {
        [a, b, ..] => usize::from(u16::from_le_bytes([a, b])) % REMEMBERED,
        _ => 0,
    }
}

/// TLS with the files of the options.
///
/// # Errors
/// [`RemoteErrorKind::Config`], naming the file.
pub(crate) fn tls(options: &RemoteOptions) -> Result<ClientTlsConfig, RemoteError> {
    let config = ClientTlsConfig::new().timeout(options.connect_timeout);
    let config = match &options.tls_certificate {
        Some(file) => config.ca_certificate(Certificate::from_pem(pem(
            "--tls-certificate",
            file,
            "CERTIFICATE",
        )?)),
        None => config.with_native_roots(),
    };
    let config = match &options.tls_authority_override {
        Some(name) => config.domain_name(name),
        None => config,
    };
    match (&options.tls_client_certificate, &options.tls_client_key) {
        (Some(certificate), Some(key)) => Ok(config.identity(Identity::from_pem(
            pem("--tls-client-certificate", certificate, "CERTIFICATE")?,
            pem("--tls-client-key", key, "PRIVATE KEY")?,
        ))),
        _ => Ok(config),
    }
}

/// The bytes of a PEM file that has at least one section of the kind.
fn pem(flag: &str, file: &Path, section: &str) -> Result<Vec<u8>, RemoteError> {
    let error = |message: String| {
        RemoteError::new(
            RemoteErrorKind::Config,
            format!("{flag}={}", file.display()),
            message,
        )
    };
    let bytes = fs::read(file).map_err(|e| error(e.to_string()))?;
    let end = format!("{section}-----");
    if !String::from_utf8_lossy(&bytes)
        .lines()
        .any(|line| line.starts_with("-----BEGIN ") && line.trim_end().ends_with(&end))
    {
        return Err(error(format!("does not contain a PEM section {section}")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{digest::DigestFunction, transport::Endpoint};

    fn options(endpoint: &str) -> RemoteOptions {
        RemoteOptions::new(Endpoint::parse("--remote-cache", endpoint).unwrap())
    }

    #[tokio::test]
    async fn connections_take_turns_and_can_be_avoided() {
        let pool = Pool::new(&options("grpc://localhost:1")).unwrap();
        let turns: Vec<_> = (0..8)
            .map(|_| pool.pick(Connections::default()).0.index)
            .collect();
        assert_eq!(turns, [0, 1, 2, 3, 0, 1, 2, 3]);
        let digest = Digest::of(DigestFunction::Sha256, b"x");
        assert_eq!(pool.carriers([&digest]), Connections::default());
        pool.note(&digest, 0);
        let avoid = pool.carriers([&digest]);
        assert_eq!(pool.pick(avoid).0.index, 1);
        assert!((0..8).all(|_| pool.pick(avoid).0.index != 0));
    }

    #[tokio::test]
    async fn a_single_connection_serves_even_when_it_is_to_be_avoided() {
        let mut options = options("grpc://localhost:1");
        options.connections = 1;
        let pool = Pool::new(&options).unwrap();
        let mut avoid = Connections::default();
        avoid.insert(0);
        assert_eq!(pool.pick(avoid).0.index, 0);
    }

    #[tokio::test]
    async fn a_connection_is_given_up_once_and_the_next_one_is_new() {
        let pool = Pool::new(&options("grpc://localhost:1")).unwrap();
        let (line, _) = pool.pick(Connections::default());
        pool.give_up(line);
        let (fresh, _) = pool.pick(Connections::all_but(line));
        assert_eq!((fresh.index, fresh.generation), (line.index, line.generation + 1));
        // Others that waited on the old one don't take the new one away.
        pool.give_up(line);
        assert_eq!(pool.pick(Connections::all_but(line)).0, fresh);
    }

    #[test]
    fn files_that_hold_no_certificate_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ca.pem");
        fs::write(&file, "hello").unwrap();
        let mut options = options("grpcs://localhost");
        for (path, part) in [
            (dir.path().join("none.pem"), "No such file"),
            (file, "does not contain a PEM section CERTIFICATE"),
        ] {
            options.tls_certificate = Some(path.clone());
            let error = Pool::new(&options).err().unwrap();
            assert_eq!(error.kind, RemoteErrorKind::Config);
            let shown = error.to_string();
            assert!(
                shown.contains(part) && shown.contains(&format!("--tls-certificate={}", path.display())),
                "{shown}"
            );
        }
    }
}
