//! Real remote caches, and our own for faults.

use std::{
    cell::{Ref, RefCell},
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, PoisonError},
};

use outhaul_testkit::{
    Running,
    cache::{EmbeddedCache, RunningCache},
    free_address, peers,
    stores::{Store, StoreKind},
};
use tokio::runtime::Runtime;

use super::scratch::{Scratch, clean_up_at_the_end};

/// The caches that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CacheKind {
    BuildGrid,
    BazelRemote,
    Casd,
    /// One behind HTTP: nginx with its WebDAV module.
    Nginx,
    /// Bazel's own disk cache, and nothing else.
    Disk,
    /// Bazel's disk cache before nginx, with half of its blobs collected.
    DiskAndNginx,
    /// A bucket in the layout `bazel`: Bazel fills it through nginx, Outhaul reads it through versitygw.
    Bucket,
    /// A bucket in the layout `disk`: Bazel has its disk cache there, Outhaul reads it through versitygw.
    DiskBucket,
    /// The library's own, in this process.
    Embedded,
}

/// What a cache is used with by the program itself.
#[derive(Debug, Clone, Default)]
pub(crate) struct Settings {
    /// `--remote-cache=` and `--disk-cache=`
    pub(crate) flags: Vec<String>,
    /// What must be in its environment.
    pub(crate) variables: Vec<(&'static str, &'static str)>,
}

impl Settings {
    /// The flags, and others after them.
    pub(crate) fn and<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        let flags = self.flags.iter().map(String::as_str);
        flags.chain(more.iter().copied()).collect()
    }
}

impl CacheKind {
    /// The one that a word of `for_each_bazel!` means.
    pub(super) fn of_word(word: &str) -> Self {
        match word {
            "real" if peers::find("bazel-remote").is_some() => Self::BazelRemote,
            "real" => Self::BuildGrid,
            "casd" => Self::Casd,
            "nginx" => Self::Nginx,
            "disk" => Self::Disk,
            "disk_and_nginx" => Self::DiskAndNginx,
            "bucket" => Self::Bucket,
            "disk_bucket" => Self::DiskBucket,
            "embedded" => Self::Embedded,
            other => panic!("no cache is called {other:?}"),
        }
    }

    /// Whether it can be started. One that is required and missing is a failure.
    pub(crate) fn is_there(self) -> bool {
        peers::are_there(&format!("{self:?}"), self.peers())
    }

    /// The programs that it needs.
    pub(super) const fn peers(self) -> &'static [&'static str] {
        match self {
            Self::BuildGrid => &["bgd"],
            Self::BazelRemote => &["bazel-remote"],
            Self::Casd => &["buildbox-casd"],
            Self::Nginx | Self::DiskAndNginx => &["nginx"],
            Self::Bucket => &["nginx", "versitygw"],
            Self::DiskBucket => &["versitygw"],
            Self::Disk | Self::Embedded => &[],
        }
    }

    /// Whether builds name no `bytestream://` addresses: digests without addresses from Bazel 7, nothing from Bazel 4.
    pub(crate) const fn is_not_grpc(self) -> bool {
        matches!(
            self,
            Self::Nginx | Self::Disk | Self::DiskAndNginx | Self::Bucket | Self::DiskBucket
        )
    }
}

/// A cache that runs. It ends when this is dropped; a BuildGrid goes to the next test that wants one, unless the test
/// failed, for it takes seconds to start.
pub(crate) struct Cache {
    kind: CacheKind,
    url: String,
    bazel: Vec<String>,
    settings: Settings,
    // Dropped in this order.
    process: RefCell<Option<Running>>,
    store: RefCell<Option<Store>>,
    embedded: RefCell<Option<(RunningCache, Runtime)>>,
    /// The server that outputs are read from, if there is one.
    address: Option<SocketAddr>,
    dir: Arc<Scratch>,
}

/// BuildGrids that no test has at the moment.
static IDLE: Mutex<Vec<(Running, SocketAddr, Arc<Scratch>)>> = Mutex::new(Vec::new());

impl Cache {
    /// Starts an empty cache on a free port.
    pub(crate) fn start(kind: CacheKind) -> Self {
        let mut cache = Self {
            kind,
            url: String::new(),
            bazel: Vec::new(),
            settings: Settings::default(),
            process: RefCell::default(),
            store: RefCell::default(),
            embedded: RefCell::default(),
            address: None,
            dir: Arc::new(Scratch::new("cache")),
        };
        match kind {
            CacheKind::BuildGrid => cache.start_buildgrid(),
            CacheKind::Embedded => cache.start_embedded(),
            CacheKind::Disk => cache.add_disk(&cache.disk(), true),
            CacheKind::DiskAndNginx => {
                // So that it can be closed before Bazel has been there.
                std::fs::create_dir(cache.disk()).unwrap();
                cache.add_disk(&cache.disk(), true);
                cache.launch(CacheKind::Nginx, true);
            }
            CacheKind::Bucket | CacheKind::DiskBucket => cache.start_bucket(),
            kind => cache.launch(kind, true),
        }
        cache
    }

    /// Takes an idle one, or starts one.
    fn start_buildgrid(&mut self) {
        let idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let (process, address, dir) = idle.unwrap_or_else(|| {
            let (process, address) = launch(CacheKind::BuildGrid, &self.dir);
            clean_up_at_the_end(&self.dir, &process.id().to_string());
            (process, address, Arc::clone(&self.dir))
        });
        self.dir = dir;
        self.add_remote(format!("grpc://{address}"), true);
        self.process = RefCell::new(Some(process));
    }

    fn start_embedded(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let running = runtime.block_on(EmbeddedCache::builder().start()).unwrap();
        self.add_remote(running.endpoint(), true);
        self.embedded = RefCell::new(Some((running, runtime)));
    }

    /// Starts versitygw and what fills its bucket.
    fn start_bucket(&mut self) {
        let store = Store::start(StoreKind::S3);
        let (name, settings) = match self.kind {
            CacheKind::DiskBucket => ("disk", "layout=disk"),
            _ => ("root", ""),
        };
        let bucket = store.directory();
        if self.kind == CacheKind::DiskBucket {
            std::fs::create_dir(bucket.join(name)).unwrap();
            self.add_disk(&bucket.join(name), false);
            // It shall be read as a bucket, and not as the build's own disk cache.
            give(&bucket.join(name), NOBODY);
        } else {
            let _ = std::fs::create_dir(self.dir.join("store"));
            std::fs::create_dir(bucket.join(name)).unwrap();
            // nginx writes there.
            std::os::unix::fs::symlink(bucket.join(name), self.dir.join("store/root")).unwrap();
            self.launch(CacheKind::Nginx, false);
        }
        self.address = Some(store.address());
        self.settings = Settings {
            flags: vec![format!("--remote-cache={}", store.url(name, settings))],
            variables: store.variables(),
        };
        self.store = RefCell::new(Some(store));
    }

    fn launch(&mut self, kind: CacheKind, is_read: bool) {
        let (process, address) = launch(kind, &self.dir);
        let scheme = if kind == CacheKind::Nginx { "http" } else { "grpc" };
        self.add_remote(format!("{scheme}://{address}"), is_read);
        self.process = RefCell::new(Some(process));
    }

    fn add_remote(&mut self, url: String, is_read: bool) {
        self.bazel.push(format!("--remote_cache={url}"));
        if is_read {
            self.settings.flags.push(format!("--remote-cache={url}"));
            self.address = url
                .split_once("://")
                .and_then(|(_, address)| address.parse().ok());
        }
        self.url = url;
    }

    fn add_disk(&mut self, disk: &Path, is_read: bool) {
        self.bazel.push(format!("--disk_cache={}", disk.display()));
        if is_read {
            self.settings
                .flags
                .push(format!("--disk-cache={}", disk.display()));
        }
    }

    pub(crate) fn kind(&self) -> CacheKind {
        self.kind
    }

    /// As `--remote_cache` takes it.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// The flags with which a Bazel uses it.
    pub(crate) fn bazel(&self) -> &[String] {
        &self.bazel
    }

    /// What the program reads it with.
    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Where its server is, if outputs are read from a server.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// Where its disk cache is, if it has one.
    pub(super) fn disk(&self) -> PathBuf {
        self.dir.join("disk")
    }

    /// Where that is while it is away.
    pub(super) fn disk_away(&self) -> PathBuf {
        self.dir.join("away")
    }

    /// Lets the program not use the build's disk cache: it is another user's.
    pub(super) fn close_disk(&self) {
        if self.kind == CacheKind::DiskAndNginx {
            give(&self.disk(), NOBODY);
        }
    }

    /// Removes half of the blobs of the disk cache that is before another cache, as Bazel's collector does, and lets the
    /// program use the rest.
    pub(super) fn collect(&self) {
        if self.kind != CacheKind::DiskAndNginx {
            return;
        }
        give(&self.disk(), rustix::process::geteuid().as_raw());
        for below in std::fs::read_dir(self.disk().join("cas")).into_iter().flatten() {
            let below = below.unwrap();
            let last = below.file_name().as_encoded_bytes().last().copied();
            if last.is_some_and(|digit| digit % 2 == 0) {
                std::fs::remove_dir_all(below.path()).unwrap();
            }
        }
    }

    /// The library's own cache, to make it misbehave.
    pub(crate) fn embedded(&self) -> Ref<'_, RunningCache> {
        Ref::map(self.embedded.borrow(), |embedded| {
            &embedded.as_ref().expect("the test uses the embedded cache").0
        })
    }

    /// Takes every blob from a cache behind HTTP, and leaves the results that name them, as an eviction does.
    pub(crate) fn lose_blobs(&self) {
        let blobs = self.dir.join("store/root/cas");
        assert!(blobs.is_dir(), "{:?} keeps its blobs elsewhere", self.kind);
        std::fs::remove_dir_all(blobs).unwrap();
    }

    /// Ends the cache, as a crash of it would.
    pub(crate) fn kill(&self) {
        self.process.take();
        self.store.take();
        for dir in [self.disk(), self.disk_away()] {
            let _ = std::fs::remove_dir_all(dir);
        }
        if let Some((running, runtime)) = self.embedded.take() {
            runtime.block_on(running.stop());
        }
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        let (CacheKind::BuildGrid, Some(address)) = (self.kind, self.address) else {
            return;
        };
        let Some(process) = self.process.take() else {
            return;
        };
        // Its results are blobs as well: without them, it has nothing.
        let objects = self.dir.join("store/cas/objects");
        if !std::thread::panicking() && empty(&objects).is_ok() {
            let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
            idle.push((process, address, Arc::clone(&self.dir)));
        }
    }
}

fn empty(dir: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        std::fs::remove_dir_all(entry?.path())?;
    }
    Ok(())
}

/// Some user whom no test runs as.
const NOBODY: u32 = 65534;

/// Gives a directory, which need not be there yet, to a user. For root, who can use it all the same.
fn give(dir: &Path, user: u32) {
    if dir.exists() {
        std::os::unix::fs::chown(dir, Some(user), None).unwrap();
    }
}

/// Starts a cache's program.
fn launch(kind: CacheKind, dir: &Scratch) -> (Running, SocketAddr) {
    Running::listening(&format!("{kind:?}"), |address| command(kind, dir, address))
}

fn command(kind: CacheKind, dir: &Scratch, address: SocketAddr) -> Command {
    let store = dir.join("store");
    std::fs::create_dir_all(&store).unwrap();
    let mut command = Command::new(peers::program(kind.peers()[0]));
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
            std::fs::create_dir_all(store.join("root")).unwrap();
            command.arg("-p").arg(&store).arg("-c").arg(config);
        }
        CacheKind::Embedded
        | CacheKind::Disk
        | CacheKind::DiskAndNginx
        | CacheKind::Bucket
        | CacheKind::DiskBucket => unreachable!("has no program of its own"),
    }
    command
}
