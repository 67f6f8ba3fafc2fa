//! `outhaul run -- bazel build //…`: a build tool's command with a daemon of its own.
//!
//! The daemon lives in this process, on free ports of the loopback interface; nothing else has to run, and nothing
//! stays behind. A Bazel is asked what its options come to ([`probe`]), gets a door for its events and flags that lead
//! there ([`host`]), and is told to download nothing only where all of it is sure to come by us ([`mode`]). Any other
//! program runs as it is, with a `PATH` on which Bazels below it are found by us first ([`shims`]).

mod child;
mod host;
mod line;
mod mode;
mod probe;
mod program;
mod shims;
mod state;

use std::{
    collections::{HashMap, HashSet},
    ffi::OsString,
    io::{self, Write as _},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use clap::Args;
use tokio::{sync::broadcast, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use self::{
    child::Signals,
    host::{Attempt, Host},
    line::Line,
    probe::Probe,
    shims::{Shims, is_ours, path_without},
};
pub(super) use self::{shims::called_as_another, state::own as own_states};
use super::{bare_runtime, exit::Failure, paths::workspace_around, print};
use crate::{
    bes::Upstream,
    config::{CacheArgs, HoldArgs, LimitArgs, PlaceArgs, SelectionArgs, StateArgs, UpstreamArgs},
    daemon::{Daemon, DaemonError, DaemonOptions, Retention, Rooms},
    invocation::Report,
    open_files,
    printable::printable,
    record::Record,
    roots::Destination,
    transport::Header,
};

/// What is kept of old builds, as `serve` does by default.
const RETENTION: Retention = Retention {
    max_age: Duration::from_secs(14 * 24 * 3600),
    journal_bytes: 1 << 30,
};
/// How long optional outputs may still take after the command has ended.
const OPTIONAL_WAIT: Duration = Duration::from_secs(600);
/// What Bazel's commands end with when --strict fails them.
const STRICT: u8 = 45;
/// What Bazel's commands end with when files of their events could not be uploaded.
const NOT_UPLOADED: u8 = 38;
/// The same when the build has failed, or only tests have.
const BUILD_FAILED: u8 = 1;
const TESTS_FAILED: u8 = 3;
/// The same when blobs could not be read from the cache: as an error of the cache, and as one of the blobs.
const NOT_READ: [u8; 2] = [34, 39];
/// How a command runs again whose outputs the cache has lost. Bazel fails where it finds that a blob is lost, and forgets
/// then that it was there; and where the cache is lost, only without it.
const AGAIN: [Attempt; 3] = [Attempt::Alone, Attempt::Alone, Attempt::Uncached];
/// How long after its builds a report may come, and the build's own event service may take for the rest of its events.
const TOLD: Duration = Duration::from_secs(2);

/// Arguments of `outhaul run`.
#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// Do not add --remote_download_minimal: leave it to Bazel's options what Bazel itself downloads
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
}

pub(super) fn main(args: RunArgs) -> Result<u8, Failure> {
    bare_runtime()?.block_on(run(args))
}

/// A daemon of our own.
struct Started {
    host: Arc<Host>,
    shims: Shims,
    reports: Arc<Mutex<Vec<Report>>>,
    shutdown: CancellationToken,
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
            let code = see_through(&command, &[], &mut signals).await?;
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
    };
    let mut ended = run.see_through(Attempt::First, &mut signals).await;
    if let Ok(NOT_UPLOADED) = ended
        && is_building
        && started.host.uploads_for_us()
    {
        ended = run.after_failed_upload(&mut signals).await;
    } else if let Ok(code @ (0 | BUILD_FAILED | TESTS_FAILED | STRICT)) = ended
        && run.may_run_again()
    {
        ended = run.after_lost_outputs(code, &mut signals).await;
    }
    let Started {
        host,
        shims,
        reports,
        shutdown,
        serving,
    } = started;
    if let Ok(code) = ended {
        wait_for_rest(&host, &reports, code != 0, &mut signals).await;
    }
    // Whatever came of the command: a daemon whose runtime is taken away would take that for a fault of its own.
    shutdown.cancel();
    let reports = std::mem::take(&mut *lock(&reports));
    let has_failed = ended
        .as_ref()
        .is_ok_and(|code| outcome(&host, &reports, bazel.is_none().then_some(&name), *code != 0));
    drop(host);
    match serving.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!("{error}"),
        Err(error) => tracing::error!("{error}"),
    }
    drop(shims);
    let code = ended?;
    Ok(if strict && has_failed && code == 0 {
        STRICT
    } else {
        code
    })
}

/// A command, and what it runs beside.
struct Wrapped<'a> {
    started: &'a Started,
    command: &'a [OsString],
    /// The program, if it is a Bazel.
    bazel: Option<&'a Path>,
    /// The `PATH` that it is to have.
    path: &'a OsString,
    is_building: bool,
}

impl Wrapped<'_> {
    /// Runs the command beside the daemon, with what it needs to be heard, to its end.
    async fn see_through(&self, attempt: Attempt, signals: &mut Signals) -> Result<u8, Failure> {
        let mut command = self.command.to_vec();
        let mut environment = Vec::new();
        if let Some(bazel) = self.bazel {
            if *self.path != program::path() {
                // Below another `run`: this one's events come here.
                command[0] = bazel.into();
                environment.push(("PATH", Some(self.path.clone())));
            }
            environment.push((shims::VARIABLE, None));
            if self.is_building {
                let asking = flagged(&command, bazel, self.path, self.started, attempt);
                tokio::select! {
                    flagged = asking => command = flagged,
                    signal = signals.end() => return Ok(child::code_of(signal)),
                }
            }
        } else {
            match self.started.shims.serve(self.started.host.clone()) {
                Ok(()) => environment = self.started.shims.environment(),
                Err(error) => say(&format!(
                    "failed to listen for Bazel invocations of the command: {error}"
                )),
            }
        }
        see_through(&command, &environment, signals).await
    }

    /// Bazel gave up its stream when an upload of files failed, and with that its command.
    async fn after_failed_upload(&self, signals: &mut Signals) -> Result<u8, Failure> {
        let Started { host, reports, .. } = self.started;
        wait_for_rest(host, reports, true, signals).await;
        let told = lock(reports).last().and_then(|report| report.exit_code);
        match told.map(u8::try_from) {
            // It has done its work, but for running a program.
            None => {
                say(
                    "Bazel failed the command because it could not upload files that its events name, which it \
                     only does for outhaul; running it once more without outhaul, so Bazel downloads outputs \
                     itself",
                );
                host.forget();
                lock(reports).clear();
                self.see_through(Attempt::Alone, signals).await
            }
            // A program that `bazel run` ran may end with anything.
            Some(Ok(own)) if Line::building(self.command).is_some_and(|line| line.word() != "run") => {
                say(&format!(
                    "Bazel exited with code {NOT_UPLOADED} because it could not upload files that its events \
                     name, which it only does for outhaul; the exit code of the build itself is {own}"
                ));
                Ok(own)
            }
            Some(_) => Ok(NOT_UPLOADED),
        }
    }

    /// Whether the command runs again if outputs are missing that Bazel left to us. One that runs a program does not.
    fn may_run_again(&self) -> bool {
        self.is_building
            && self.started.host.is_left_downloads()
            && Line::building(self.command).is_some_and(|line| line.word() != "run")
    }

    /// Outputs that Bazel left to us may be missing: it asks no HTTP cache whether that has what its results name, and any
    /// cache may be gone in the meantime. Bazel alone would have built them. The exit code is that of the first build.
    async fn after_lost_outputs(&self, first: u8, signals: &mut Signals) -> Result<u8, Failure> {
        let Started { host, reports, .. } = self.started;
        wait_for_rest(host, reports, first != 0, signals).await;
        if lock(reports).last().is_none_or(|report| report.failed == 0) {
            return Ok(first);
        }
        let mut lost = std::mem::take(&mut *lock(reports));
        // With --strict, Bazel has not ended with its own.
        let own = lost.last().and_then(|report| report.exit_code);
        let own = own.and_then(|code| u8::try_from(code).ok()).unwrap_or(first);
        // The reasons come before what Bazel says of the same, and once.
        let _ = tell(&lost);
        lost.iter_mut().for_each(|report| report.messages.clear());
        for attempt in AGAIN {
            say(match attempt {
                Attempt::Uncached => "running the command once more without its caches",
                _ => {
                    "running the command once more, so that Bazel itself downloads or builds the missing outputs"
                }
            });
            host.forget();
            lock(reports).clear();
            let code = self.see_through(attempt, signals).await?;
            if code == 0 || code == own {
                return Ok(own);
            }
            if code != BUILD_FAILED && !NOT_READ.contains(&code) {
                return Ok(code);
            }
        }
        // It is as after the first run: said above, and a fault with --strict.
        *lock(reports) = lost;
        Ok(first)
    }
}

/// Runs a command to its end.
async fn see_through(
    command: &[OsString],
    environment: &[(&str, Option<OsString>)],
    signals: &mut Signals,
) -> Result<u8, Failure> {
    let mut child = child::start(command, environment)?;
    // Only now: the command is to have the limit that it would have without us.
    open_files::raise();
    let status = signals.see_through(&mut child).await;
    let status =
        status.map_err(|error| Failure::failed(format!("failed to wait for the command: {error}")))?;
    Ok(child::code(status))
}

/// What is optional, or was let go at the deadline, may still be on its way when the command has ended.
async fn wait_for_rest(host: &Host, reports: &Mutex<Vec<Report>>, has_failed: bool, signals: &mut Signals) {
    let waited = tokio::time::timeout(OPTIONAL_WAIT, async {
        host.streams_end(has_failed).await;
        while host.rooms.engine.is_busy().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // What came of a build is told a moment after it is settled.
        let begun = std::time::Instant::now();
        let are_told = || lock(reports).len() >= host.streams();
        while !are_told() && begun.elapsed() < TOLD {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        host.deliver(TOLD).await;
    });
    tokio::select! {
        waited = waited => {
            if waited.is_err() {
                tracing::error!("giving up on outputs that are still being downloaded");
            }
        }
        _ = signals.end() => {}
    }
}

/// Says what came of it, and whether something did not come. `wrapped` is the program, if it is no Bazel.
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
    // Bazel starts another build in the same command after an eviction: the last one counts.
    let last: HashMap<_, _> = reports
        .iter()
        .map(|report| (report.build_id.as_str(), report.failed))
        .collect();
    any_fault || last.values().any(|failed| *failed > 0)
}

fn lock(reports: &Mutex<Vec<Report>>) -> MutexGuard<'_, Vec<Report>> {
    reports.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says something, if anybody hears it.
fn say(message: &str) {
    let _ = writeln!(print::err(), "outhaul: {message}");
}

/// Starts a daemon. The inner error is the environment's: a reason to run the command without one.
async fn start(mut args: RunArgs) -> Result<Result<Started, String>, Failure> {
    let hold = args.hold.policy()?;
    // What these are for may be the build's own event service.
    let own = match &args.upstream.bes_backend {
        Some(_) => args.upstream.upstream(&mut args.cache, hold)?,
        None => None,
    };
    let limits = args.limits.limits()?;
    let mut policy = args.selection.policy()?;
    policy.limits = limits.build;
    let rules = args.place.rules(Destination::ExecRoot)?;
    let placing = args.place.options()?;
    // The command is the user's own, so it may say where its cache is.
    let mut cache = args.cache.clone();
    cache.remote_header.extend(own_headers(&args.command));
    let source = cache.source_rule(true)?;
    let rewrite = args.upstream.rewrite_uris;
    let open = |record| Rooms::open(record, policy, rules, source, placing, rewrite);
    // Each Bazel gets a door of its own.
    let options = DaemonOptions {
        hold,
        limits,
        retention: Some(RETENTION),
        ..DaemonOptions::default()
    };
    Ok(launch(args, own, open, options).await)
}

/// Starts what is checked.
async fn launch(
    args: RunArgs,
    own: Option<Upstream>,
    open: impl FnOnce(Record) -> io::Result<Rooms>,
    options: DaemonOptions,
) -> Result<Started, String> {
    let state_dir = args.state.directory().map_err(|e| e.to_string());
    let shims = Shims::new(state_dir.as_deref().ok())?;
    let last = shims.scratch().join("state");
    let opened = tokio::task::spawn_blocking(move || {
        let here = std::env::current_dir().unwrap_or_default();
        let workspace = workspace_around(&here).unwrap_or(here);
        state::open(state_dir, &workspace, &last)
    });
    let kept = opened.await.map_err(|e| e.to_string())??;
    if let Some(reason) = kept.lost {
        say(&format!(
            "this build is not recorded for later commands: {reason}"
        ));
    }
    let rooms = open(kept.record).map_err(|e| e.to_string())?;
    let hold = options.hold;
    let options = DaemonOptions {
        journal_dir: kept.journal,
        ..options
    };
    let daemon = Daemon::start(rooms.clone(), options)
        .await
        .map_err(|e| e.to_string())?;
    // Those that go on from the journal are not this command's.
    let others: HashSet<_> = rooms.engine.streams().into_iter().collect();
    let collected = Arc::<Mutex<Vec<Report>>>::default();
    tokio::spawn(collect(rooms.engine.reports(), others, collected.clone()));
    let host = Host {
        doors: daemon.event_doors(),
        rooms,
        hold,
        keep: args.keep_download_mode,
        cache: args.cache,
        upstream: args.upstream,
        own,
        helper: Some(shims.helper()),
        heard: Mutex::default(),
    };
    Ok(Started {
        host: Arc::new(host),
        shims,
        reports: collected,
        shutdown: daemon.shutdown_token(),
        serving: tokio::spawn(daemon.join()),
    })
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

/// The command of a Bazel with what it needs to be heard.
async fn flagged(
    command: &[OsString],
    bazel: &Path,
    path: &OsString,
    started: &Started,
    attempt: Attempt,
) -> Vec<OsString> {
    let (Some(line), Some(program)) = (Line::building(command), command.first()) else {
        return command.to_vec();
    };
    let probe = Probe {
        program: bazel,
        path,
        scratch: started.shims.scratch(),
    };
    let answer = started.host.answer(&probe.ask(&line).await, attempt).await;
    for message in &answer.messages {
        say(message);
    }
    std::iter::once(program.clone())
        .chain(line.with(&answer.flags))
        .collect()
}

async fn collect(
    mut reports: broadcast::Receiver<Report>,
    others: HashSet<(String, String)>,
    into: Arc<Mutex<Vec<Report>>>,
) {
    loop {
        match reports.recv().await {
            Ok(report) if others.contains(&(report.invocation_id.clone(), report.build_id.clone())) => {}
            Ok(report) => lock(&into).push(report),
            Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

/// One summary line for each invocation (Bazel starts another one in the same command after an eviction).
fn tell(reports: &[Report]) -> std::io::Result<()> {
    let mut err = print::err();
    for report in reports {
        for message in &report.messages {
            writeln!(err, "outhaul: {}", printable(message))?;
        }
        writeln!(err, "{}", printable(&report.line))?;
    }
    Ok(())
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
