//! A wire between the daemon and its cache that can be made slow, held up or cut.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    runtime::Runtime,
    sync::watch,
};

use super::cache::Cache;

/// What the wire does with the cache's answers. Requests always pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Flowing,
    /// So many bytes a second, on each connection.
    Slow(u64),
    /// Nothing passes, and nothing breaks.
    Held,
    /// Every connection breaks, and so does every new one.
    Cut,
}

/// A TCP proxy in front of a cache. Bazel is not sent through it, so that its own share of the work stays as it is.
pub(crate) struct Proxy {
    url: String,
    mode: watch::Sender<Mode>,
    passed: Arc<AtomicU64>,
    /// Its tasks end with it.
    _runtime: Runtime,
}

impl Proxy {
    pub(crate) fn start(cache: &Cache) -> Self {
        let upstream: SocketAddr = cache.url().trim_start_matches("grpc://").parse().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("grpc://{}", listener.local_addr().unwrap());
        let (mode, watched) = watch::channel(Mode::Flowing);
        let passed = Arc::new(AtomicU64::new(0));
        let counter = passed.clone();
        runtime.spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (mode, counter) = (watched.clone(), counter.clone());
                tokio::spawn(connection(client, upstream, mode, counter));
            }
        });
        Self {
            url,
            mode,
            passed,
            _runtime: runtime,
        }
    }

    /// As `--remote-cache` takes it.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Bytes of the cache's answers so far.
    pub(crate) fn passed(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }

    pub(crate) fn flow(&self) {
        self.mode.send_replace(Mode::Flowing);
    }

    /// Bytes a second, on each connection.
    pub(crate) fn slow(&self, rate: u64) {
        self.mode.send_replace(Mode::Slow(rate));
    }

    pub(crate) fn hold(&self) {
        self.mode.send_replace(Mode::Held);
    }

    pub(crate) fn cut(&self) {
        self.mode.send_replace(Mode::Cut);
    }
}

async fn connection(
    client: TcpStream,
    upstream: SocketAddr,
    mode: watch::Receiver<Mode>,
    passed: Arc<AtomicU64>,
) {
    let mut cut = mode.clone();
    let Ok(server) = TcpStream::connect(upstream).await else {
        return;
    };
    let (mut from_client, to_client) = client.into_split();
    let (from_server, mut to_server) = server.into_split();
    tokio::select! {
        _ = cut.wait_for(|mode| *mode == Mode::Cut) => {}
        _ = tokio::io::copy(&mut from_client, &mut to_server) => {}
        _ = answers(from_server, to_client, mode, passed) => {}
    }
}

async fn answers(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut mode: watch::Receiver<Mode>,
    passed: Arc<AtomicU64>,
) -> Option<()> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let count = from.read(&mut buffer).await.ok().filter(|count| *count > 0)?;
        let now = *mode.wait_for(|mode| *mode != Mode::Held).await.ok()?;
        if let Mode::Slow(rate) = now {
            let pause = Duration::from_secs_f64(count as f64 / rate as f64);
            // Whoever lets it flow does not wait for what was slow before.
            let _ = tokio::time::timeout(pause, mode.wait_for(|mode| *mode != now)).await;
            mode.wait_for(|mode| *mode != Mode::Held).await.ok()?;
        }
        to.write_all(&buffer[..count]).await.ok()?;
        passed.fetch_add(count as u64, Ordering::Relaxed);
    }
}
