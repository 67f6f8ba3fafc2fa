//! A wire between the daemon and its cache that can be made slow, held up or cut.

use std::{
    net::SocketAddr,
    path::PathBuf,
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

use super::cache::{Cache, Settings};

/// What the wire does with the cache's answers. Requests always pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Flowing,
    /// This many bytes a second, on each connection.
    Slow(u64),
    /// Nothing passes, and nothing breaks.
    Held,
    /// Every connection breaks, and so does every new one.
    Cut,
}

/// A TCP proxy in front of a cache. Bazel is not sent through it, so that its own share of the work stays as it is.
pub(crate) struct Proxy {
    url: String,
    settings: Settings,
    mode: watch::Sender<Mode>,
    passed: Arc<AtomicU64>,
    /// Its tasks end with it.
    _runtime: Runtime,
}

/// A way to a cache: over a wire, or to a directory, which can only be there or not.
pub(crate) enum Way {
    Wire(Proxy),
    Directory {
        /// Where the cache is.
        path: PathBuf,
        /// Where it is while it is away.
        away: PathBuf,
        settings: Settings,
    },
}

impl Way {
    /// To a cache of any kind.
    pub(crate) fn to(cache: &Cache) -> Self {
        if cache.address().is_some() {
            // The build's own disk cache would be read without the wire.
            cache.close_disk();
            return Self::Wire(Proxy::start(cache));
        }
        Self::Directory {
            path: cache.disk(),
            away: cache.disk_away(),
            settings: cache.settings().clone(),
        }
    }

    pub(crate) fn settings(&self) -> &Settings {
        match self {
            Self::Wire(proxy) => &proxy.settings,
            Self::Directory { settings, .. } => settings,
        }
    }

    /// The wire, if it is one.
    pub(crate) fn wire(&self) -> Option<&Proxy> {
        match self {
            Self::Wire(proxy) => Some(proxy),
            Self::Directory { .. } => None,
        }
    }

    /// Lets through what there is, as fast as it can.
    pub(crate) fn flow(&self) {
        match self {
            Self::Wire(proxy) => proxy.flow(),
            Self::Directory { path, away, .. } => {
                if away.exists() {
                    // Bazel has made a new one.
                    let _ = std::fs::remove_dir_all(path);
                    std::fs::rename(away, path).unwrap();
                }
            }
        }
    }

    /// Lets nothing through.
    pub(crate) fn cut(&self) {
        match self {
            Self::Wire(proxy) => proxy.cut(),
            Self::Directory { path, away, .. } => {
                if !away.exists() {
                    std::fs::rename(path, away).unwrap();
                }
            }
        }
    }
}

impl Proxy {
    pub(crate) fn start(cache: &Cache) -> Self {
        let upstream = cache.address().expect("a cache with a server");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let url = format!("grpc://{address}");
        let mut settings = cache.settings().clone();
        // What is read over the wire is not in a disk cache.
        settings.flags.retain(|flag| !flag.starts_with("--disk-cache="));
        for flag in &mut settings.flags {
            *flag = flag.replace(&upstream.to_string(), &address.to_string());
        }
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
            settings,
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
            // Letting it flow does not wait for what was slow before.
            let _ = tokio::time::timeout(pause, mode.wait_for(|mode| *mode != now)).await;
            mode.wait_for(|mode| *mode != Mode::Held).await.ok()?;
        }
        to.write_all(&buffer[..count]).await.ok()?;
        passed.fetch_add(count as u64, Ordering::Relaxed);
    }
}
