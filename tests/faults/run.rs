//! Runs a case: the daemon's services, the real client, a cache that does what the schedule says.

use std::{
    collections::BTreeMap,
    fmt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::future::BoxFuture;
use outhaul::{
    bep::event::StreamEvent,
    builds::{Builds as _, StreamEnd, StreamKey},
    daemon::Services,
    invocation::{Report, feed::Change, policy::Policy, watching::Watch},
    materialize::{MaterializeOptions, Outcome},
    record::Record,
    remote::{GrpcCache, RemoteOptions, retry::Timer},
    roots::{Destination, RootRules},
    sources::SourceRule,
    transport::{Endpoint, Header},
};
use outhaul_testkit::cache::{EmbeddedCache, RunningCache, Stats};
use tokio::time::timeout;

use crate::{build::Build, check, schedule::Case, steps::Step};

/// A build that is not settled by then has somebody waiting for ever.
const PATIENCE: Duration = Duration::from_secs(120);
/// What no message, log or reason may show.
pub(crate) const SECRET: &str = "Bearer hunter2-planted-secret";
/// The longest wait that a server is granted.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// Waits no longer than a moment, and writes down for how long it should have.
#[derive(Default)]
struct Quick {
    waits: AtomicU64,
    longest: AtomicU64,
}

impl Timer for Quick {
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        self.waits.fetch_add(1, Ordering::Relaxed);
        let millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        self.longest.fetch_max(millis, Ordering::Relaxed);
        Box::pin(tokio::time::sleep(duration.min(Duration::from_millis(2))))
    }

    fn jitter(&self) -> f64 {
        0.5
    }
}

/// What one build came to.
pub(crate) struct Played {
    pub(crate) outcomes: BTreeMap<String, Vec<Outcome>>,
    pub(crate) report: Report,
    /// What the cache was asked for.
    pub(crate) asked: Stats,
}

/// What cases came to.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) cases: u64,
    pub(crate) builds: u64,
    pub(crate) wants: u64,
    pub(crate) outcomes: BTreeMap<&'static str, u64>,
    pub(crate) fired: BTreeMap<&'static str, u64>,
    pub(crate) files_checked: u64,
    pub(crate) waits: u64,
    /// The most requests for a blob, on the average of a build's blobs.
    pub(crate) most_calls: f64,
    /// Builds without faults that a time-out spoilt, on a busy machine, and that were played again.
    pub(crate) again: u64,
}

impl Counts {
    pub(crate) fn add(&mut self, other: &Self) {
        self.cases += other.cases;
        self.builds += other.builds;
        self.wants += other.wants;
        self.files_checked += other.files_checked;
        self.waits += other.waits;
        self.again += other.again;
        self.most_calls = self.most_calls.max(other.most_calls);
        for (name, count) in &other.fired {
            *self.fired.entry(name).or_default() += count;
        }
        for (name, count) in &other.outcomes {
            *self.outcomes.entry(name).or_default() += count;
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} schedules, {} builds, {} wants, {:?}",
            self.cases, self.builds, self.wants, self.outcomes
        )?;
        writeln!(
            f,
            "{} files checked, 0 wrong; 0 wants unanswered; {} waits before a retry; at most {:.1} requests per blob; \
             {} played again",
            self.files_checked, self.waits, self.most_calls, self.again
        )?;
        write!(f, "{} faults: {:?}", self.fired.values().sum::<u64>(), self.fired)
    }
}

/// Runs a case on a runtime of its own: what a daemon remembers of a build for some minutes ends with it.
///
/// # Errors
/// Which promise was broken, and how.
pub(crate) async fn run(case: &Case) -> Result<Counts, String> {
    let case = case.clone();
    let running = tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.map_err(|e| e.to_string())?.block_on(run_here(&case))
    });
    running.await.map_err(|e| format!("a panic: {e}"))?
}

async fn run_here(case: &Case) -> Result<Counts, String> {
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let exec_root = dir.path().join("execroot/_main");
    std::fs::create_dir_all(&exec_root).map_err(|e| e.to_string())?;
    let mut builder = EmbeddedCache::builder()
        .zstd(case.zstd)
        .max_batch_bytes(case.max_batch);
    if let Some(age) = case.age {
        builder = builder.connection_age(age);
    }
    let cache = builder.start().await.map_err(|e| e.to_string())?;
    case.build.fill(cache.store());
    let timer = Arc::new(Quick::default());
    let services = services(case, &cache, dir.path(), timer.clone())?;
    let memory = watch_memory(&services);
    misbehave(case, &cache);

    let mut counts = Counts {
        cases: 1,
        ..Counts::default()
    };
    let older = &case.build;
    let mut newest = older.clone();
    if let Some(after) = case.overtaken {
        newest = older.changed();
        newest.fill(cache.store());
        let overtaking = async {
            tokio::time::sleep(after).await;
            play(&newest, &services, &cache, &exec_root, 1).await
        };
        let first = begin(older, &services, &cache, &exec_root, 0).await?;
        let (first, second) = tokio::join!(first.settled(0), overtaking);
        let (first, second) = (first?, second?);
        check::overtaken(older, &first)?;
        check::amid_faults(case, &newest, Some(older), &second, &exec_root).await?;
        count(&mut counts, older, &first);
        count(&mut counts, &newest, &second);
    } else {
        let first = play(older, &services, &cache, &exec_root, 0).await?;
        check::amid_faults(case, older, None, &first, &exec_root).await?;
        count(&mut counts, older, &first);
    }
    counts.fired = cache.faults().fired_by_name();
    for step in &case.steps {
        if matches!(step, Step::Pretend(_) | Step::Sever(_)) {
            *counts.fired.entry(step.name()).or_default() += 1;
        }
    }

    // The server is well again, and has everything.
    cache.faults().clear();
    newest.fill(cache.store());
    for round in 2.. {
        let next = play(&newest, &services, &cache, &exec_root, round).await?;
        count(&mut counts, &newest, &next);
        match check::behind_faults(case, &newest, &next, &exec_root).await {
            Ok(()) => break,
            // Where patience is short, a busy machine may try it once or twice without a fault of anybody's.
            Err(why) if round < 4 && why.contains("700ms") => counts.again += 1,
            Err(why) => return Err(why),
        }
    }
    check::metrics(&services, &counts).await?;
    let most = memory.load(Ordering::Relaxed);
    let allowed = i64::try_from(case.bytes_in_flight + 1024).unwrap_or(i64::MAX);
    if most > allowed {
        return Err(format!("{most} bytes in flight, {allowed} allowed"));
    }
    let longest = Duration::from_millis(timer.longest.load(Ordering::Relaxed));
    if longest > LONGEST_WAIT {
        return Err(format!("the client wanted to wait for {longest:?}"));
    }
    counts.waits = timer.waits.load(Ordering::Relaxed);
    Ok(counts)
}

fn services(case: &Case, cache: &RunningCache, dir: &Path, timer: Arc<Quick>) -> Result<Services, String> {
    let endpoint = Endpoint::parse("--remote-cache", &cache.endpoint()).map_err(|e| e.to_string())?;
    let mut options = RemoteOptions::new(endpoint);
    options.compression = case.compression;
    options.connections = Some(case.connections);
    options.retries = case.retries;
    options.stall_timeout = case.patience();
    options.min_throughput = 0;
    options
        .connect
        .headers
        .push(Header::new("authorization", SECRET).map_err(str::to_owned)?);
    let store = GrpcCache::with_timer(options, timer).map_err(|e| e.to_string())?;
    let (record, _) = Record::open(&dir.join("state")).map_err(|e| e.to_string())?;
    let options = MaterializeOptions {
        writers: 2,
        small_limit: case.small_limit,
        batch_bytes: case.batch_bytes,
        batch_count: case.batch_count,
        bytes_in_flight: case.bytes_in_flight,
        large_in_flight: case.large_in_flight,
        ..MaterializeOptions::default()
    };
    let rules = RootRules {
        destination: Destination::ExecRoot,
        path_maps: Vec::new(),
        allowed: vec![dir.to_owned()],
        ..RootRules::default()
    };
    let source = SourceRule::Fixed(store.into());
    Services::open(record, Policy::default(), rules, source, options, false).map_err(|e| e.to_string())
}

/// Arms the cache.
fn misbehave(case: &Case, cache: &RunningCache) {
    let faults = cache.faults();
    for step in &case.steps {
        match step {
            Step::Blob(output, fault, times) => match output.map(|n| case.build.digest(n)) {
                None => faults.every_blob(*fault, *times),
                Some(Some(digest)) => faults.blob(&digest, *fault, *times),
                // A link, a directory.
                Some(None) => {}
            },
            Step::Call(None, fault, times) => faults.every_request(*fault, *times),
            Step::Call(Some(rpc), fault, times) => faults.request(*rpc, *fault, *times),
            Step::Pretend(pretence) => faults.pretend(pretence.clone()),
            Step::Dead(count) => faults.accept_dead(*count),
            Step::Sever(when) | Step::Kill(when) => {
                let (faults, when) = (faults.clone(), *when);
                let kill = matches!(step, Step::Kill(_));
                tokio::spawn(async move {
                    tokio::time::sleep(when).await;
                    if kill {
                        faults.kill_connections();
                    } else {
                        faults.sever_connections();
                    }
                });
            }
        }
    }
}

/// The most bytes in flight that the daemon ever showed.
fn watch_memory(services: &Services) -> Arc<AtomicI64> {
    let most = Arc::new(AtomicI64::new(0));
    let (seen, metrics) = (Arc::downgrade(&most), services.metrics.clone());
    tokio::spawn(async move {
        while let Some(most) = seen.upgrade() {
            most.fetch_max(metrics.bytes_in_flight.get(), Ordering::Relaxed);
            drop(most);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    most
}

/// A build all of whose events are sent and taken up.
struct Playing<'a> {
    changes: Watch,
    before: Stats,
    cache: &'a RunningCache,
}

/// Plays a build, and waits until it is settled.
async fn play(
    build: &Build,
    services: &Services,
    cache: &RunningCache,
    exec_root: &Path,
    round: usize,
) -> Result<Played, String> {
    let playing = begin(build, services, cache, exec_root, round).await?;
    playing.settled(round).await
}

async fn begin<'a>(
    build: &Build,
    services: &Services,
    cache: &'a RunningCache,
    exec_root: &Path,
    round: usize,
) -> Result<Playing<'a>, String> {
    let key = StreamKey {
        build_id: format!("build {round}"),
        invocation_id: format!("invocation {round}"),
        ..StreamKey::default()
    };
    let before = cache.stats();
    let mut events = build.events("/w", &exec_root.display().to_string()).into_iter();
    let mut sent = 0;
    let mut send = |event| {
        sent += 1;
        vec![(sent, StreamEvent { event, last: false })]
    };
    // The build is known from its first event on, and nothing is wanted yet.
    let first = events.next().ok_or("a build without events")?;
    services.engine.events(&key, send(first)).await;
    let changes = services
        .engine
        .watch(&key.invocation_id)
        .await
        .ok_or("the build is not known")?;
    for event in events {
        services.engine.events(&key, send(event)).await;
    }
    services.engine.ended(&key, StreamEnd::Finished).await;
    // Answered after all that.
    let _ = services.engine.snapshot(&key.invocation_id).await;
    Ok(Playing {
        changes,
        before,
        cache,
    })
}

impl Playing<'_> {
    async fn settled(mut self, round: usize) -> Result<Played, String> {
        let listening = async {
            let mut outcomes = BTreeMap::<String, Vec<Outcome>>::new();
            let mut report = None;
            while let Some(change) = self.changes.recv().await {
                match change {
                    Change::Output(ended) => {
                        let of_path = outcomes.entry(ended.path.to_string()).or_default();
                        of_path.push(ended.outcome.clone());
                    }
                    Change::Settled(last) => report = Some(*last),
                    Change::Begun { .. } | Change::Target(_) => {}
                }
            }
            (outcomes, report)
        };
        let (outcomes, report) = timeout(PATIENCE, listening).await.map_err(|_| {
            format!("round {round} is not settled after {PATIENCE:?}: somebody is not answered")
        })?;
        Ok(Played {
            outcomes,
            report: report.ok_or("the build ended without a report")?,
            asked: self.cache.stats().since(&self.before),
        })
    }
}

fn count(counts: &mut Counts, build: &Build, played: &Played) {
    counts.builds += 1;
    counts.wants += build.outputs.len() as u64;
    for outcome in played.outcomes.values().flatten() {
        *counts.outcomes.entry(outcome.name()).or_default() += 1;
    }
    let calls = played.asked.batch_read_blobs + played.asked.stream_reads;
    let blobs = build.outputs.len() as f64;
    counts.most_calls = counts.most_calls.max(calls as f64 / blobs);
    counts.files_checked += build.outputs.len() as u64;
}
