//! Real remote caches, and our own for faults.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    process::Command,
    time::{Duration, Instant},
};

use outhaul::embedded_cache::{EmbeddedCache, RunningCache};
use outhaul_testkit::{Running, free_address, peers};
use tokio::runtime::Runtime;

use super::scratch::Scratch;

/// The caches that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CacheKind {
    BuildGrid,
    BazelRemote,
    Casd,
    /// One behind HTTP: nginx with its WebDAV module.
    Nginx,
    /// The library's own, in this process.
    Embedded,
}

impl CacheKind {
    /// The one that a word of `for_each_bazel!` means.
    pub(super) fn of_word(word: &str) -> Self {
        match word {
            "real" if peers::find("bazel-remote").is_some() => Self::BazelRemote,
            "real" => Self::BuildGrid,
            "casd" => Self::Casd,
            "nginx" => Self::Nginx,
            "embedded" => Self::Embedded,
            other => panic!("no cache is called {other:?}"),
        }
    }

    /// Whether it can be started. One that is required and missing is a failure.
    pub(crate) fn is_there(self) -> bool {
        self.peer()
            .is_none_or(|peer| peers::are_there(&format!("{self:?}"), &[peer]))
    }

    pub(super) const fn peer(self) -> Option<&'static str> {
        match self {
            Self::BuildGrid => Some("bgd"),
            Self::BazelRemote => Some("bazel-remote"),
            Self::Casd => Some("buildbox-casd"),
            Self::Nginx => Some("nginx"),
            Self::Embedded => None,
        }
    }
}

/// A cache that runs. It ends when this is dropped.
pub(crate) struct Cache {
    kind: CacheKind,
    url: String,
    // Dropped in this order.
    process: Option<Running>,
    embedded: Option<(RunningCache, Runtime)>,
    dir: Scratch,
}

impl Cache {
    /// Starts an empty cache on a free port.
    pub(crate) fn start(kind: CacheKind) -> Self {
        let dir = Scratch::new("cache");
        if kind == CacheKind::Embedded {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap();
            let running = runtime
                .block_on(
                    EmbeddedCache::builder()
                        .directory(Some(dir.join("blobs")))
                        .start(),
                )
                .unwrap();
            return Self {
                kind,
                url: running.endpoint(),
                process: None,
                embedded: Some((running, runtime)),
                dir,
            };
        }
        let (process, address) = launch(kind, &dir);
        let scheme = if kind == CacheKind::Nginx { "http" } else { "grpc" };
        Self {
            kind,
            url: format!("{scheme}://{address}"),
            process: Some(process),
            embedded: None,
            dir,
        }
    }

    pub(crate) fn kind(&self) -> CacheKind {
        self.kind
    }

    /// As `--remote_cache` takes it.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// The library's own cache, to make it misbehave.
    pub(crate) fn embedded(&self) -> &RunningCache {
        &self
            .embedded
            .as_ref()
            .expect("the test uses the embedded cache")
            .0
    }

    /// Ends the cache, as a crash of it would.
    pub(crate) fn kill(&mut self) {
        self.process = None;
        if let Some((running, runtime)) = self.embedded.take() {
            runtime.block_on(running.stop());
        }
    }
}

/// Starts a cache's program; once more if somebody else was faster to take the port.
fn launch(kind: CacheKind, dir: &Scratch) -> (Running, SocketAddr) {
    let mut said = String::new();
    for _ in 0..3 {
        let address = free_address();
        let mut running = Running::start(command(kind, dir, address));
        let started = Instant::now();
        while running.is_running() && started.elapsed() < Duration::from_secs(60) {
            if TcpStream::connect(address).is_ok() {
                return (running, address);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        said = running.stderr();
    }
    panic!("{kind:?} does not start; it said\n{said}");
}

fn command(kind: CacheKind, dir: &Scratch, address: SocketAddr) -> Command {
    let store = dir.join("store");
    std::fs::create_dir_all(&store).unwrap();
    let mut command = Command::new(peers::program(kind.peer().expect("a program's kind")));
    match kind {
        CacheKind::BuildGrid => {
            let config = dir.join("buildgrid.yml");
            let text = include_str!("../../../scripts/buildgrid.yml")
                .replace("PORT", &address.port().to_string())
                .replace("DIR", &store.display().to_string());
            std::fs::write(&config, text).unwrap();
            command.args(["server", "start"]).arg(config);
        }
        CacheKind::BazelRemote => {
            command
                .arg("--dir")
                .arg(&store)
                .args(["--max_size=5", "--log_timezone=none"]);
            command.arg(format!("--grpc_address={address}"));
            command.arg(format!("--http_address={}", free_address()));
        }
        CacheKind::Casd => {
            command.arg("--bind").arg(address.to_string());
            command.args(["--log-level", "warning"]).arg(&store);
        }
        CacheKind::Nginx => {
            let config = dir.join("nginx.conf");
            let text = include_str!("../../../scripts/nginx.conf")
                .replace("ADDRESS", &address.to_string())
                .replace("DIR", &store.display().to_string());
            std::fs::write(&config, text).unwrap();
            std::fs::create_dir(store.join("root")).unwrap();
            command.arg("-p").arg(&store).arg("-c").arg(config);
        }
        CacheKind::Embedded => unreachable!("runs in this process"),
    }
    command
}
