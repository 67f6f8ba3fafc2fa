//! `outhaul run -- bazel build //…`: a build tool's command with a daemon of its own.
//!
//! The daemon lives in this process, on free ports of the loopback interface; nothing else has to run, and nothing
//! stays behind. A Bazel is asked what its options come to ([`probe`]), gets a listener for its events and flags that lead
//! there ([`host`]), and is told to download nothing only where all of it is sure to come by us ([`mode`]). Any other
//! program runs as it is, with a `PATH` on which Bazels below it are found by us first ([`shims`]).

mod again;
pub(super) mod child;
mod forward;
mod host;
mod line;
mod mode;
mod probe;
mod program;
mod reach;
mod reports;
mod shims;
mod state;
mod wrapped;

use std::{
    ffi::OsString,
    io::{self, Write as _},
    path::Path,
    sync::Arc,
    time::Duration,
};

use clap::Args;
use parking_lot::Mutex;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

#[cfg(test)]
pub(super) use self::probe::Options;
use self::{
    child::Signals,
    host::Host,
    reports::{SharedReports, collect, tell},
    wrapped::{Wrapped, see_through},
};
pub(super) use self::{
    forward::{can_forward, directories_of},
    line::Line,
    mode::{KNOWN, Mode, Setting, decide, names_a_cache, waits_for_all},
    probe::{CommandInfo, Probe},
    program::{find, is_bazel},
    reach::reach_of,
    shims::{Shims, called_as_another, is_ours, path_without},
    state::own as own_states,
};
use super::{bare_runtime, exit::Failure, paths::workspace_around, print};
use crate::{
    bes::{HoldPolicy, Upstream},
    config::{
        CacheArgs, FROM_BUILD, HoldArgs, LimitArgs, OtlpArgs, PlaceArgs, SelectionArgs, StateArgs,
        UpstreamArgs,
    },
    daemon::{Daemon, DaemonError, DaemonOptions, Retention, Services},
    invocation::Report,
    materialize::place::Mark,
    record::Record,
    roots::Destination,
    telemetry::{Collector, Exporter, TraceParent},
    transport::Header,
};

/// What is kept of old builds, as `serve` does by default.
const RETENTION: Retention = Retention {
    max_age: Duration::from_secs(14 * 24 * 3600),
    journal_bytes: 1 << 30,
};
/// How long a build waits for its outputs: what comes after it needs them, and what does not come fails before.
const HOLD_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
/// How long reads of files may still take at the end.
const READS: Duration = Duration::from_secs(10);
/// The variable that has a trace's context, as W3C's specifications have it.
const TRACEPARENT: &str = "TRACEPARENT";
/// What Bazel's commands end with when --strict fails them.
const STRICT: u8 = 45;
/// What a build of Bazel's ended with that lost inputs from the cache: it starts another one then.
const EVICTED: i32 = 39;

/// Arguments of `outhaul run`.
#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// Do not add --remote_download_minimal; Bazel's own options decide what Bazel downloads
    #[arg(long, env = "OUTHAUL_KEEP_DOWNLOAD_MODE")]
    keep_download_mode: bool,

    /// The command: Bazel with its arguments, or a program that calls Bazel
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

    #[command(flatten)]
    otlp: OtlpArgs,
}

pub(super) fn main(args: RunArgs) -> Result<u8, Failure> {
    let runtime = bare_runtime()?;
    let ended = runtime.block_on(run(args));
    // A file may still be read on a file system whose server is gone.
    runtime.shutdown_timeout(READS);
    ended
}

/// A daemon of our own.
struct Started {
    host: Arc<Host>,
    shims: Shims,
    reports: SharedReports,
    shutdown: CancellationToken,
    exporter: Option<Exporter>,
    serving: JoinHandle<Result<(), DaemonError>>,
}

async fn run(args: RunArgs) -> Result<u8, Failure> {
    let mut signals = Signals::listen()?;
    let strict = args.hold.strict;
    let command = args.command.clone();
    let path = path_without();
    let name = command.first().cloned().unwrap_or_default();
    let bazel = program::find(&name, &path, is_ours).filter(|file| program::is_bazel(file));
    let is_building = bazel.is_some() && Line::building(&command).is_some();
    let started = match start(args).await? {
        Ok(started) => started,
        Err(reason) => {
            // The build comes first, whatever we can do for it.
            say(&format!(
                "{reason}; running the command without outhaul, so nothing is downloaded"
            ));
            let code = see_through(&command, &[], &mut signals, |_| {}).await?;
            return Ok(if strict && is_building && code == 0 {
                STRICT
            } else {
                code
            });
        }
    };
    let run = Wrapped {
        started: &started,
        command: &command,
        bazel: bazel.as_deref(),
        path: &path,
        is_building,
        strict,
    };
    let ended = run.to_its_end(&mut signals).await;
    let Started {
        host,
        shims,
        reports,
        shutdown,
        exporter,
        serving,
    } = started;
    // Whatever came of the command: a daemon whose runtime is taken away would take that for a fault of its own.
    shutdown.cancel();
    let reports = reports.lock().take();
    let has_failed = ended
        .as_ref()
        .is_ok_and(|code| outcome(&host, &reports, bazel.is_none().then_some(&name), *code != 0));
    if host.has_heard_any() {
        shims::tell_outer(has_failed).await;
    }
    drop(host);
    match serving.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!("{error}"),
        Err(error) => tracing::error!("{error}"),
    }
    if let Some(exporter) = exporter
        && let Some(reason) = exporter.close().await
    {
        say(&reason);
    }
    drop(shims);
    let code = ended?;
    Ok(if strict && has_failed && code == 0 {
        STRICT
    } else {
        code
    })
}

/// Says what came of it, and whether something did not come. `wrapped` is the program, if it is not a Bazel.
fn outcome(host: &Host, reports: &[Report], wrapped: Option<&OsString>, has_failed: bool) -> bool {
    // The command's code counts, also when nobody reads what we say.
    let _ = tell(reports);
    let (any_fault, messages) = host.faults(has_failed);
    for message in &messages {
        say(message);
    }
    if let Some(program) = wrapped.filter(|_| !host.has_heard_any()) {
        say(&format!(
            "{} did not run a Bazel build that outhaul could see. Outhaul sees Bazel when it is called as \
             `bazel` or `bazelisk` and found in PATH, or when its workspace has outhaul's tools/bazel",
            Path::new(program).display()
        ));
    }
    // Bazel starts another build in the same command after an eviction, under the same build request id: the last one
    // counts. Other commands may share such an id as well.
    let is_replaced = |(at, report): (usize, &Report)| {
        let is_again = |other: &Report| other.build_id == report.build_id;
        report.exit_code == Some(EVICTED) && reports[at + 1..].iter().any(is_again)
    };
    let counts = |(at, report): &(usize, &Report)| report.failed > 0 && !is_replaced((*at, report));
    any_fault || reports.iter().enumerate().any(|report| counts(&report))
}

/// Says something, if anybody hears it.
fn say(message: &str) {
    let _ = writeln!(print::err(), "outhaul: {message}");
}

/// Starts a daemon. The inner error is the environment's: a reason to run the command without one.
async fn start(mut args: RunArgs) -> Result<anyhow::Result<Started>, Failure> {
    let hold = HoldPolicy {
        is_followed: true,
        ..args.hold.policy(HOLD_TIMEOUT)?
    };
    // What these are for may be the build's own event service.
    let own = match &args.upstream.bes_backend {
        Some(_) => args.upstream.upstream(&mut args.cache, hold)?,
        None => None,
    };
    let limits = args.limits.limits()?;
    let mut policy = args.selection.policy()?;
    policy.limits = limits.build;
    let rules = args.place.rules(Destination::ExecRoot)?;
    let mut placing = args.place.options()?;
    if args.place.min_free_space.is_none() {
        placing.place.space = Mark::ForOptional;
    }
    // The command is the user's own, so it may say where its cache is.
    let mut cache = args.cache.clone();
    take_own_headers(&mut cache, &args.command);
    let source = cache.source_rule(true)?;
    let collector = args.otlp.collector()?;
    let rewrite = args.upstream.rewrite_uris;
    let open = |record| Services::open(record, policy, rules, source, placing, rewrite);
    // Each Bazel gets a listener of its own.
    let options = DaemonOptions {
        hold,
        limits,
        retention: Some(RETENTION),
        ..DaemonOptions::default()
    };
    Ok(launch(args, own, open, (options, collector)).await)
}

/// Starts what is checked.
async fn launch(
    args: RunArgs,
    own: Option<Upstream>,
    open: impl FnOnce(Record) -> io::Result<Services>,
    (options, collector): (DaemonOptions, Option<Collector>),
) -> anyhow::Result<Started> {
    let state_dir = args.state.directory();
    let shims = Shims::new(state_dir.as_deref().ok())?;
    let last = shims.scratch().join("state");
    let opened = tokio::task::spawn_blocking(move || {
        let here = std::env::current_dir().unwrap_or_default();
        let workspace = workspace_around(&here).unwrap_or(here);
        state::open(state_dir, &workspace, &last)
    });
    let kept = opened.await??;
    if let Some(reason) = kept.lost {
        say(&format!(
            "this build is not recorded for later commands: {reason}"
        ));
    }
    let services = open(kept.record)?;
    let exporter = match collector {
        Some(collector) => Some(services.export(&collector, trace_parent())?),
        None => None,
    };
    let hold = options.hold;
    let options = DaemonOptions {
        journal_dir: kept.journal,
        ..options
    };
    let daemon = Daemon::start(services.clone(), options).await?;
    let listeners = daemon.event_listeners();
    let collected = SharedReports::default();
    tokio::spawn(collect(
        services.engine.reports(),
        listeners.clone(),
        collected.clone(),
    ));
    let host = Host {
        listeners,
        services,
        hold,
        keep: args.keep_download_mode,
        cache: args.cache,
        upstream: args.upstream,
        own,
        helper: Some(shims.helper()),
        heard: Mutex::default(),
        untold: Mutex::default(),
    };
    Ok(Started {
        host: Arc::new(host),
        shims,
        reports: collected,
        shutdown: daemon.shutdown_token(),
        exporter,
        serving: tokio::spawn(daemon.join()),
    })
}

/// The span that this `run` is a part of, by its environment.
fn trace_parent() -> Option<TraceParent> {
    let given = std::env::var(TRACEPARENT).ok().filter(|text| !text.is_empty())?;
    match given.parse() {
        Ok(parent) => Some(parent),
        Err(reason) => {
            say(&format!("ignoring {TRACEPARENT}: {reason}"));
            None
        }
    }
}

/// Takes over the headers that the command itself gives, if they are for the cache that is read.
pub(super) fn take_own_headers(cache: &mut CacheArgs, command: &[OsString]) {
    let named = Line::building(command).and_then(|line| line.own_values("remote_cache").pop());
    let is_builds = |cache: &String| cache == FROM_BUILD || named.as_ref() == Some(cache);
    if cache.remote_cache.iter().all(is_builds) {
        cache.remote_header.extend(own_headers(command));
    }
}

/// Headers for the cache that the command itself names: some Bazels leave their values out of what they tell.
fn own_headers(command: &[OsString]) -> Vec<String> {
    let Some(line) = Line::building(command) else {
        return Vec::new();
    };
    let mut headers = ["remote_header", "remote_cache_header"]
        .map(|name| line.own_values(name))
        .concat();
    headers.retain(|header| Header::parse("--remote-header", header).is_ok());
    headers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_that_can_be_sent_are_taken_from_the_command_itself() {
        let words = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        let command =
            words("bazel build --remote_header=a=b --remote_cache_header c=d --remote_header=x //a");
        assert_eq!(own_headers(&command), ["a=b", "c=d"]);
        assert!(own_headers(&words("make --remote_header=a=b")).is_empty());
    }
}
