//! The library end to end, against the plain program: `cargo bench --bench pipeline`.
//!
//! A generated build is played as Bazel would to a daemon with its real event service, journal, record and writers,
//! which fetches from the embedded cache over a unix socket or TCP as from any other. Player, daemon and cache share
//! this process and its cores, so a figure is what all three cost together. Every round also runs the plain program
//! of `plain/` on files of the same number and sizes; the ratio is taken round by round.

mod plain;

use std::{
    error::Error,
    fs,
    io::Write as _,
    path::Path,
    time::{Duration, Instant},
};

use outhaul::{
    bes::{BesAddress, BesListener},
    daemon::{Daemon, DaemonOptions, Services},
    demo::{FilledShape, Setting, Shape, play},
    invocation::policy::Policy,
    materialize::MaterializeOptions,
    record::Record,
    remote::{GrpcCache, RemoteOptions},
    roots::{Destination, RootRules},
    sources::SourceRule,
    transport::Endpoint,
};
use outhaul_testkit::cache::{EmbeddedCache, RunningCache};
use plain::{Folder, ROUNDS, create, directory, folders, look, spread};

type Failure = Box<dyn Error>;

/// What is played.
struct Bench {
    shape: Shape,
    /// The plain program's files, of the same number and sizes.
    folders: Vec<Folder>,
    unit: &'static str,
    /// How many units the whole shape is.
    units: f64,
}

fn main() -> Result<(), Failure> {
    let small = Bench {
        shape: Shape {
            targets: 200,
            ..Shape::default()
        },
        folders: folders(200, 100, 4096),
        unit: "thousand files/s",
        units: 20.0,
    };
    let large = Bench {
        shape: Shape {
            targets: 4,
            files_per_target: 1,
            file_size: 256 << 20,
            ..Shape::default()
        },
        folders: folders(4, 1, 256 << 20),
        unit: "MiB/s",
        units: 1024.0,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut table = std::io::stdout();
    writeln!(
        table,
        "| what | outhaul | plain program | time, outhaul / plain |"
    )?;
    writeln!(table, "|---|---|---|---|")?;
    runtime.block_on(measure("20,000 files of 4 KiB", &small))?;
    runtime.block_on(measure("4 files of 256 MiB", &large))
}

/// A round's times.
struct Round {
    cold: Duration,
    noop: Duration,
    created: Duration,
    looked: Duration,
}

async fn measure(name: &str, bench: &Bench) -> Result<(), Failure> {
    let base = directory()?;
    let cache = EmbeddedCache::builder().start().await?;
    let filled = bench.shape.fill(|bytes| cache.store().put(bytes));
    let services = services(base.path(), &cache)?;
    let listener = BesListener::bind(&BesAddress::Tcp(([127, 0, 0, 1], 0).into()))?;
    let options = DaemonOptions {
        journal_dir: Some(base.path().join("state/journal")),
        bes: vec![listener],
        ..DaemonOptions::default()
    };
    let daemon = Daemon::start(services, options).await?;
    let address = format!("grpc://{}", daemon.bes.first().ok_or("nothing listens")?);
    let shutdown = daemon.shutdown_token();
    let serving = tokio::spawn(daemon.join());
    let mut rounds = Vec::new();
    for number in 0..=ROUNDS {
        let round = round(number, base.path(), &address, &cache, &filled, &bench.folders).await?;
        // The first is the warm-up.
        if number > 0 {
            rounds.push(round);
        }
    }
    shutdown.cancel();
    serving.await??;
    cache.stop().await;

    let row = |what: &str, ours: fn(&Round) -> Duration, plain: fn(&Round) -> Duration| {
        let per_second = |time: fn(&Round) -> Duration| {
            let values: Vec<f64> = rounds
                .iter()
                .map(|r| bench.units / time(r).as_secs_f64())
                .collect();
            format!("{} {}", spread(&values, 1), bench.unit)
        };
        let ratios: Vec<f64> = rounds
            .iter()
            .map(|r| ours(r).as_secs_f64() / plain(r).as_secs_f64())
            .collect();
        writeln!(
            std::io::stdout(),
            "| {name}, {what} | {} | {} | {} |",
            per_second(ours),
            per_second(plain),
            spread(&ratios, 1)
        )
    };
    row("cold", |r| r.cold, |r| r.created)?;
    // Four files are looked at in no time; what that measures is the stream.
    if bench.shape.files() > 100 {
        row("all present", |r| r.noop, |r| r.looked)?;
    }
    Ok(())
}

/// The services of a daemon, with everything below `base`.
fn services(base: &Path, cache: &RunningCache) -> Result<Services, Failure> {
    let endpoint = Endpoint::parse("--remote-cache", &cache.endpoint())?;
    let store = GrpcCache::new(RemoteOptions::new(endpoint))?;
    let (record, _) = Record::open(&base.join("state"))?;
    let rules = RootRules {
        destination: Destination::ExecRoot,
        allowed: vec![base.to_owned()],
        ..RootRules::default()
    };
    let source = SourceRule::Fixed(store.into());
    let options = MaterializeOptions::default();
    Ok(Services::open(
        record,
        Policy::default(),
        rules,
        source,
        options,
        false,
    )?)
}

/// Plays the build into an exec root of its own, twice; then lets the plain program do the like.
async fn round(
    number: usize,
    base: &Path,
    address: &str,
    cache: &RunningCache,
    filled: &FilledShape,
    folders: &[Folder],
) -> Result<Round, Failure> {
    let exec_root = base.join(format!("{number}/execroot/_main"));
    fs::create_dir_all(&exec_root)?;
    let setting = Setting {
        workspace: base.join("workspace").display().to_string(),
        exec_root: exec_root.display().to_string(),
        remote_cache: cache.endpoint(),
        instance_name: String::new(),
    };
    let mut times = [Duration::ZERO; 2];
    for (run, time) in times.iter_mut().enumerate() {
        let id = filled.invocation_id((2 * number + run) as u64);
        let start = Instant::now();
        // The last acknowledgement comes when everything is on disk.
        play(address, &id, "b", filled.events(&setting, &id)).await?;
        *time = start.elapsed();
        for (path, digest) in filled.outputs() {
            let size = fs::symlink_metadata(exec_root.join(&path)).map(|m| m.len());
            if size.as_ref().ok() != Some(&digest.size()) {
                return Err(format!("{path} is not there: {size:?}").into());
            }
        }
    }
    fs::remove_dir_all(base.join(number.to_string()))?;
    let plain = base.join("plain");
    let created = create(&plain, folders)?;
    let looked = look(&plain, folders)?;
    fs::remove_dir_all(&plain)?;
    let [cold, noop] = times;
    Ok(Round {
        cold,
        noop,
        created,
        looked,
    })
}
