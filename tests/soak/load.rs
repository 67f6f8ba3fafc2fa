//! Builds, and everything that happens to them.

use std::{
    future::Future,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use outhaul::{
    demo::{GeneratedBuild, GeneratedContent, Setting, play},
    digest::Digest,
};
use outhaul_testkit::{
    Chance, PATIENCE, Running,
    cache::{BlobFault, EmbeddedCache, RequestFault, Rpc, RunningCache, Times},
};
use tokio::sync::Mutex;

use super::daemon::{Daemon, outhaul, terminate};

/// Output roots, and who builds at once.
const ROOTS: usize = 24;
const BUILDERS: usize = 5;
/// What was done.
#[derive(Default)]
pub struct Counts {
    pub played: AtomicU64,
    vanished: AtomicU64,
    doubled: AtomicU64,
    recreated: AtomicU64,
    evicted: AtomicU64,
    faults: AtomicU64,
    commands: AtomicU64,
    upstream: AtomicU64,
    failed: AtomicU64,
}

/// The cache, the output roots, and what goes on.
pub struct World {
    /// A second Outhaul that builds are passed on to; dropped before its directory.
    upstream: Mutex<Option<Running>>,
    pub dir: tempfile::TempDir,
    pub cache: RunningCache,
    pub counts: Counts,
    upstream_socket: PathBuf,
    seed: u64,
    numbers: AtomicU64,
}

impl World {
    pub async fn new(seed: u64) -> Self {
        let dir = tempfile::tempdir_in(scratch()).expect("a directory");
        let world = Self {
            upstream_socket: dir.path().join("upstream.sock"),
            dir,
            cache: EmbeddedCache::builder().start().await.expect("a cache"),
            counts: Counts::default(),
            upstream: Mutex::default(),
            seed,
            numbers: AtomicU64::new(seed << 20),
        };
        for n in 0..ROOTS {
            std::fs::create_dir_all(world.root(n)).expect("an output root");
        }
        world.upstream_up().await;
        world
    }

    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub fn upstream_address(&self) -> String {
        format!("unix:{}", self.upstream_socket.display())
    }

    pub fn next_number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    fn base(&self, n: usize) -> PathBuf {
        self.dir.path().join(format!("base{n}"))
    }

    fn root(&self, n: usize) -> PathBuf {
        self.base(n).join("execroot/_main")
    }

    /// A build of a root that nobody has made before.
    fn build(&self, n: usize) -> GeneratedBuild {
        let setting = Setting {
            workspace: self.base(n).join("workspace").display().to_string(),
            exec_root: self.root(n).display().to_string(),
            remote_cache: self.cache.endpoint(),
            instance_name: String::new(),
        };
        GeneratedBuild::new(|bytes| self.cache.store().put(bytes), setting, self.next_number())
    }

    /// Plays a build. A daemon that is gone, or lets it hang, is found out by others.
    async fn play(&self, build: &GeneratedBuild, address: &str, most: usize) {
        let (id, build_id) = (build.invocation_id(), build.build_id());
        let events: Vec<_> = build.events().take(most).collect();
        let played = play(address, &id, &build_id, events.into_iter());
        match tokio::time::timeout(PATIENCE, played).await {
            Ok(Ok(_)) => count(&self.counts.played),
            _ => count(&self.counts.failed),
        }
    }

    /// Everything at once, until then.
    pub fn load(self: &Arc<Self>, daemon: &Daemon, until: Instant) -> impl Future<Output = ()> + use<> {
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..BUILDERS {
            let (world, address) = (self.clone(), daemon.process.address().to_owned());
            tasks.spawn(async move { world.builder(n, &address, until).await });
        }
        let world = self.clone();
        tasks.spawn(async move { world.trouble(until).await });
        let world = self.clone();
        tasks.spawn(async move { world.curious(until).await });
        async move {
            while let Some(ended) = tasks.join_next().await {
                ended.expect("nothing here panics");
            }
        }
    }

    fn chance(&self) -> Chance {
        Chance::new(self.seed ^ Chance::new(self.next_number()).number())
    }

    /// Somebody who builds.
    async fn builder(&self, own: usize, address: &str, until: Instant) {
        let mut chance = self.chance();
        while Instant::now() < until {
            // Roots of their own: the same workspace is not built twice at once by the same user, mostly.
            let n = chance.below((ROOTS / BUILDERS) as u64) as usize * BUILDERS + own;
            let build = self.build(n);
            match chance.below(100) {
                // Goes away in the middle.
                0..10 => {
                    let patience = Duration::from_millis(chance.between(1, 199));
                    let events: Vec<_> = build.events().collect();
                    let (id, build_id) = (build.invocation_id(), build.build_id());
                    let _ = tokio::time::timeout(patience, play(address, &id, &build_id, events.into_iter()))
                        .await;
                    count(&self.counts.vanished);
                }
                // Ends its stream early, as a cancelled build.
                10..15 => self.play(&build, address, chance.between(1, 11) as usize).await,
                // Two at once, of the same root.
                15..25 => {
                    let other = self.build(n);
                    tokio::join!(
                        self.play(&build, address, usize::MAX),
                        self.play(&other, address, usize::MAX)
                    );
                    count(&self.counts.doubled);
                }
                // `bazel clean --expunge`.
                25..28 => {
                    let _ = std::fs::remove_dir_all(self.base(n));
                    std::fs::create_dir_all(self.root(n)).expect("an output root");
                    count(&self.counts.recreated);
                    self.play(&build, address, usize::MAX).await;
                }
                // `bazel clean`.
                28..31 => {
                    let _ = std::fs::remove_dir_all(self.root(n).join("bazel-out"));
                    self.play(&build, address, usize::MAX).await;
                }
                _ => {
                    self.play(&build, address, usize::MAX).await;
                    if chance.happens(0.5) {
                        self.play(&build.incremental(), address, usize::MAX).await;
                    }
                }
            }
        }
    }

    /// What happens to the cache and to the upstream service.
    async fn trouble(&self, until: Instant) {
        let mut chance = self.chance();
        while Instant::now() < until {
            let faults = self.cache.faults();
            match chance.below(10) {
                0 => faults.every_request(
                    RequestFault::Status(tonic::Code::Unavailable),
                    Times::First(chance.between(1, 39) as u32),
                ),
                1 => faults.every_request(
                    RequestFault::Delay(Duration::from_millis(chance.between(1, 399))),
                    Times::First(20),
                ),
                2 => faults.request(Rpc::BatchRead, RequestFault::Stall, Times::First(3)),
                3 => faults.every_blob(BlobFault::Corrupt, Times::First(chance.between(1, 9) as u32)),
                4 => faults.every_blob(BlobFault::CutAfter(chance.below(5000)), Times::First(5)),
                5 => faults.sever_connections(),
                6 => {
                    let digests = self.cache.store().digests();
                    for digest in &digests {
                        if chance.happens(0.3) {
                            self.cache.store().remove(digest);
                        }
                    }
                    count(&self.counts.evicted);
                }
                7 => {
                    // Old blobs are of no use to anybody, and this process has a memory too.
                    self.cache.store().clear();
                    count(&self.counts.evicted);
                }
                8 => {
                    self.upstream_down().await;
                    count(&self.counts.upstream);
                    pause(&mut chance, 2500, until).await;
                    self.upstream_up().await;
                }
                _ => faults.clear(),
            }
            count(&self.counts.faults);
            pause(&mut chance, 1500, until).await;
            if chance.happens(0.5) {
                self.cache.faults().clear();
            }
        }
    }

    /// Somebody who asks.
    async fn curious(&self, until: Instant) {
        let mut chance = self.chance();
        let state = format!("--state-dir={}", self.state().display());
        while Instant::now() < until {
            let root = self.root(chance.below(ROOTS as u64) as usize);
            let file = root
                .join("bazel-out/k8-fastbuild/bin/app/app")
                .display()
                .to_string();
            let workspace = self.base(chance.below(ROOTS as u64) as usize).join("workspace");
            let workspace = format!("--workspace={}", workspace.display());
            let args: Vec<&str> = match chance.below(6) {
                0 => vec!["status", "--json"],
                1 => vec!["ls", "--json"],
                2 => vec!["stat", &file],
                3 => vec!["get", &file],
                4 => vec!["why", &file],
                _ => vec!["wait", &workspace, "--timeout=1s"],
            };
            let mut command = outhaul();
            command.args(args).arg(&state);
            // What is asked about may be gone; asking is the point.
            let _ = tokio::time::timeout(PATIENCE, Running::start(command).end()).await;
            count(&self.counts.commands);
            pause(&mut chance, 400, until).await;
        }
    }

    async fn upstream_up(&self) {
        let mut upstream = self.upstream.lock().await;
        if upstream.is_some() {
            return;
        }
        let _ = std::fs::remove_file(&self.upstream_socket);
        let mut command = outhaul();
        command
            .args([
                "serve",
                "--admin-listen=none",
                "--hold=none",
                "--retention-age=10s",
            ])
            .arg(format!("--bes-listen={}", self.upstream_address()))
            .arg("--remote-cache=grpc://127.0.0.1:1")
            .args(["--remote-retries=0", "--download=minimal"])
            .arg(format!(
                "--state-dir={}",
                self.dir.path().join("upstream").display()
            ));
        *upstream = Some(Running::serve(command).await);
    }

    async fn upstream_down(&self) {
        if let Some(mut upstream) = self.upstream.lock().await.take() {
            // One that does not end is killed.
            let _ = terminate(&mut upstream, Duration::from_secs(30)).await;
        }
    }

    /// Everything works.
    pub async fn calm(&self) {
        self.cache.faults().clear();
        self.upstream_up().await;
    }

    /// One more build in each root, whose outputs must all be right.
    pub async fn last_builds(&self, daemon: &Daemon) -> Vec<String> {
        self.calm().await;
        let mut wrong = Vec::new();
        for n in 0..ROOTS {
            let build = self.build(n);
            self.play(&build, daemon.process.address(), usize::MAX).await;
            let root = self.root(n);
            let differs = build.outputs().iter().filter(|output| {
                let GeneratedContent::File(digest) = &output.content else {
                    return false;
                };
                let bytes = std::fs::read(root.join(&output.path));
                !bytes.is_ok_and(|bytes| Digest::of(digest.function(), &bytes) == *digest)
            });
            wrong.extend(differs.map(|output| format!("root {n}: {} is not right at the end", output.path)));
        }
        wrong
    }

    /// What the daemon has left in the output trees.
    pub fn left_over(&self) -> Vec<String> {
        let mut left = Vec::new();
        for n in 0..ROOTS {
            names(&self.base(n), &mut |path| {
                let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("");
                if name.starts_with(".outhaul-tmp") {
                    left.push(format!("left over: {}", path.display()));
                }
            });
        }
        left
    }

    /// What was done, in words.
    pub fn reported(&self) -> String {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let c = &self.counts;
        format!(
            "{} builds played to their end, {} clients vanished, {} pairs at once in one root, {} roots made again, \
             {} evictions, {} faults of the cache, {} ends of the upstream service, {} commands asked; {} streams failed",
            of(&c.played),
            of(&c.vanished),
            of(&c.doubled),
            of(&c.recreated),
            of(&c.evicted),
            of(&c.faults),
            of(&c.upstream),
            of(&c.commands),
            of(&c.failed),
        )
    }
}

/// Memory, where there is a file system of it: thousands of builds are hard on a disk.
fn scratch() -> PathBuf {
    let shared = Path::new("/dev/shm");
    if shared.is_dir() {
        shared.to_owned()
    } else {
        std::env::temp_dir()
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

async fn pause(chance: &mut Chance, most_ms: u64, until: Instant) {
    let pause = Duration::from_millis(chance.below(most_ms));
    tokio::time::sleep(pause.min(until.saturating_duration_since(Instant::now()))).await;
}

/// Every file and directory below a directory.
fn names(dir: &Path, see: &mut impl FnMut(&Path)) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        see(&entry.path());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            names(&entry.path(), see);
        }
    }
}
