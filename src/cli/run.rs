//! `outhaul run -- bazel build //…`: a build tool's command with a daemon of its own.
//!
//! The daemon lives in this process, on a free port of the loopback interface; nothing else has to run, and nothing
//! stays behind. Bazel is told of it by flags put right behind its command word, so that the user's own flags, which
//! come later, win where they disagree.

mod child;
mod words;

use std::{
    ffi::OsString,
    hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher},
    io::Write as _,
    path::Path,
    time::Duration,
};

use clap::Args;
use tokio::sync::broadcast;

use self::{
    child::Signals,
    words::{flags, with_flags, without_backend},
};
use super::{bare_runtime, exit::Failure, print};
use crate::{
    bes::{BesAddress, BesListener},
    config::{CacheArgs, HoldArgs, LimitArgs, PlaceArgs, SelectionArgs, StateArgs, UpstreamArgs},
    daemon::{Daemon, DaemonOptions, Retention, Rooms},
    invocation::{Report, roots::Destination},
    open_files,
    printable::printable,
    record::{Record, RecordError},
};

/// What is kept of old builds where no daemon looks after that.
const RETENTION: Retention = Retention {
    max_age: Duration::from_secs(14 * 24 * 3600),
    journal_bytes: 0,
};
/// How long optional outputs may still take after the command has ended.
const OPTIONAL_WAIT: Duration = Duration::from_secs(600);

/// Arguments of `outhaul run`.
#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// Leave what Bazel itself downloads as it is, instead of adding --remote_download_minimal
    #[arg(long, env = "OUTHAUL_KEEP_DOWNLOAD_MODE")]
    keep_download_mode: bool,

    /// The command: Bazel with its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,

    #[command(flatten)]
    state: StateArgs,

    #[command(flatten)]
    hold: HoldArgs,

    #[command(flatten)]
    selection: SelectionArgs,

    #[command(flatten)]
    place: PlaceArgs,

    #[command(flatten)]
    cache: CacheArgs,

    #[command(flatten)]
    upstream: UpstreamArgs,

    #[command(flatten)]
    limits: LimitArgs,
}

pub(super) fn main(args: RunArgs) -> Result<u8, Failure> {
    bare_runtime()?.block_on(run(args))
}

async fn run(mut args: RunArgs) -> Result<u8, Failure> {
    let hold = args.hold.policy()?;
    let (command, backend) = without_backend(&args.command);
    let mut upstream = args.upstream.clone();
    // An empty one says that events are to go nowhere.
    let unheard = backend.as_deref().is_some_and(str::is_empty);
    if let Some(backend) = backend.filter(|backend| !backend.is_empty()) {
        upstream.bes_backend = Some(backend);
    }
    let upstream = upstream.upstream(&mut args.cache, hold)?;
    let limits = args.limits.limits()?;
    let mut policy = args.selection.policy()?;
    policy.limits = limits.build;
    let rules = args.place.rules(Destination::ExecRoot)?;
    let options = args.place.options()?;
    // The command is the user's own, so it may say where its cache is.
    let source = args.cache.source_rule(true)?;
    let record = record(&args.state.directory()?).await?;
    let listener =
        BesListener::bind(&BesAddress::Tcp(([127, 0, 0, 1], 0).into())).map_err(Failure::failed)?;
    let rooms = Rooms::open(record, policy, rules, source, options, args.upstream.rewrite_uris)?;
    let mut reports = rooms.engine.reports();
    let daemon = Daemon::start(
        rooms.clone(),
        DaemonOptions {
            // Nobody comes back to a port that ends with the command.
            journal_dir: None,
            durable: false,
            hold,
            upstream,
            limits: limits.bes,
            control_message: limits.control_message,
            bes: vec![listener],
            control: None,
            admin: None,
            retention: Some(RETENTION),
            leases: None,
            idle_timeout: None,
            notifications: None,
        },
    )
    .await
    .map_err(Failure::failed)?;
    let address = daemon.bes.first().map(ToString::to_string).unwrap_or_default();
    let command = if unheard {
        // A reader that has gone is no reason not to build.
        let _ = writeln!(
            print::err(),
            "outhaul: the command has an empty --bes_backend, so its events go nowhere; it is run as it is, and nothing \
             is brought to disk"
        );
        args.command.clone()
    } else {
        let flagged = with_flags(&command, &flags(&address, args.keep_download_mode));
        // Without a word of Bazel's to put them behind, the command is the user's as it was.
        if flagged == command {
            args.command.clone()
        } else {
            flagged
        }
    };
    let shutdown = daemon.shutdown_token();
    let serving = tokio::spawn(daemon.join());
    let started = Signals::listen().map_err(Failure::from).and_then(|signals| {
        let child = child::start(&command)?;
        // Only now: the command is to have the limit that it would have without us.
        open_files::raise();
        Ok((signals, child))
    });
    let ended = match started {
        Ok((mut signals, mut child)) => match signals.see_through(&mut child).await {
            Ok(status) => {
                wait_for_optional(&rooms, &mut signals).await;
                Ok(child::code(status))
            }
            Err(error) => Err(Failure::failed(format!(
                "failed to wait for the command: {error}"
            ))),
        },
        Err(failure) => Err(failure),
    };
    // The command's code counts, also when nobody reads what we say.
    let _ = tell(&mut reports);
    // Whatever came of the command: a daemon whose runtime is taken away would take that for a fault of its own.
    shutdown.cancel();
    drop(rooms);
    match serving.await {
        Ok(Ok(())) => {}
        Ok(Err(reason)) => tracing::error!("{reason}"),
        Err(error) => tracing::error!("{error}"),
    }
    ended
}

/// What is optional, or was let go at the deadline, may still be on its way when the command has ended.
async fn wait_for_optional(rooms: &Rooms, signals: &mut Signals) {
    let waited = tokio::time::timeout(OPTIONAL_WAIT, async {
        while rooms.engine.is_busy().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    tokio::select! {
        waited = waited => {
            if waited.is_err() {
                tracing::error!("giving up on outputs that are still on their way");
            }
        }
        () = signals.end() => {}
    }
}

/// The record of the state directory; one of the workspace's own where a daemon, or another `run`, has that.
async fn record(state_dir: &Path) -> Result<Record, Failure> {
    let here = std::env::current_dir()?;
    let number = BuildHasherDefault::<DefaultHasher>::default().hash_one(&here);
    let own = state_dir.join("run").join(format!("{number:016x}"));
    let alone = state_dir.join("run").join(format!("pid-{}", std::process::id()));
    let elsewhere = std::env::temp_dir().join(format!("outhaul-run-{}", std::process::id()));
    for directory in [state_dir.to_owned(), own, alone, elsewhere] {
        match tokio::task::spawn_blocking(move || Record::open(&directory)).await {
            Ok(Ok((record, _))) => return Ok(record),
            Ok(Err(RecordError::Held { .. })) => {}
            // No record is worth a build.
            Ok(Err(error)) => tracing::warn!("{error}"),
            Err(error) => return Err(Failure::failed(error)),
        }
    }
    Err(Failure::failed(format!(
        "every record below {} is held",
        state_dir.display()
    )))
}

/// One summary line for each invocation (Bazel starts another one in the same command after an eviction).
fn tell(reports: &mut broadcast::Receiver<Report>) -> Result<(), Failure> {
    let mut err = print::err();
    loop {
        match reports.try_recv() {
            Ok(report) => {
                for message in &report.messages {
                    writeln!(err, "outhaul: {}", printable(message))?;
                }
                writeln!(err, "{}", printable(&report.line))?;
            }
            Err(broadcast::error::TryRecvError::Lagged(_)) => {}
            Err(_) => return Ok(()),
        }
    }
}
