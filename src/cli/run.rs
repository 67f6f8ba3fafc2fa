//! `outhaul run -- bazel build //…`: a build tool's command with a daemon of its own.
//!
//! The daemon lives in this process, on a free port of the loopback interface; nothing else has to run, and nothing
//! stays behind. Bazel is told of it by flags put right behind its command word, so that the user's own flags, which
//! come later, win where they disagree.

use std::{
    ffi::{OsStr, OsString},
    hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher},
    io::Write as _,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::ExitStatus,
    time::Duration,
};

use clap::Args;
use tokio::{
    process::Command,
    signal::unix::{Signal, SignalKind, signal},
    sync::broadcast,
};

use super::{exit::Failure, runtime};
use crate::{
    bes::{BesAddress, BesListener},
    config::{CacheArgs, HoldArgs, LimitArgs, PlaceArgs, SelectionArgs, StateArgs, UpstreamArgs},
    daemon::{Daemon, DaemonOptions, Retention, Rooms},
    invocation::{Report, roots::Destination},
    record::{Record, RecordError},
};

/// Commands of Bazel's that build something; and those that build nothing but share the analysis of the ones that do,
/// which a flag of difference would throw away. `query` and `fetch` send events, too, but have no outputs, and old
/// Bazels refuse flags about outputs there.
const BUILDING: &[&str] = &[
    "build",
    "test",
    "run",
    "coverage",
    "mobile-install",
    "aquery",
    "cquery",
];
/// What is kept of old builds where no daemon looks after that.
const RETENTION: Retention = Retention {
    max_age: Duration::from_secs(14 * 24 * 3600),
    journal_bytes: 0,
};
/// Bazel's other commands: a word of the list above behind one of these is no command.
const OTHER: &[&str] = &[
    "analyze-profile",
    "canonicalize-flags",
    "clean",
    "config",
    "dump",
    "fetch",
    "help",
    "info",
    "license",
    "mod",
    "print_action",
    "query",
    "shutdown",
    "sync",
    "vendor",
    "version",
];
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
    runtime()?.block_on(run(args))
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
        writeln!(
            std::io::stderr(),
            "outhaul: the command has an empty --bes_backend, so its events go nowhere; it is run as it is, and nothing \
             is brought to disk"
        )?;
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
    // Ctrl-C reaches the whole terminal group: Bazel ends its build on it, and we stay to see that through.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let status = spawn(&command, &mut interrupt, &mut terminate).await?;
    // What is optional, or was let go at the deadline, may still be on its way.
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
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    // The command's code counts, also when nobody reads what we say.
    let _ = tell(&mut reports);
    shutdown.cancel();
    drop(rooms);
    match serving.await {
        Ok(Ok(())) => {}
        Ok(Err(reason)) => tracing::error!("{reason}"),
        Err(error) => tracing::error!("{error}"),
    }
    Ok(code(status))
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

fn flags(address: &str, keep_download_mode: bool) -> Vec<OsString> {
    let mut flags = vec![
        OsString::from(format!("--bes_backend=grpc://{address}")),
        // The command is to return when its outputs are there.
        "--bes_upload_mode=wait_for_upload_complete".into(),
        "--bes_timeout=0s".into(),
    ];
    if !keep_download_mode {
        // Not --remote_download_outputs=minimal: in old Bazels (4.x) that alone is refused, for it needs two more flags,
        // into which only this one expands.
        flags.push("--remote_download_minimal".into());
    }
    flags
}

/// The command with flags behind Bazel's command word. Without such a word the command is left as it is.
fn with_flags(command: &[OsString], flags: &[OsString]) -> Vec<OsString> {
    let word = command
        .iter()
        .skip(1)
        .position(|arg| {
            arg.to_str()
                .is_some_and(|arg| BUILDING.contains(&arg) || OTHER.contains(&arg))
        })
        .filter(|at| {
            command
                .get(at + 1)
                .and_then(|arg| arg.to_str())
                .is_some_and(|arg| BUILDING.contains(&arg))
        });
    let mut command = command.to_vec();
    if let Some(word) = word {
        command.splice(word + 2..word + 2, flags.iter().cloned());
    }
    command
}

/// The command without its word of where its events go, and that word: they come here first and are passed on. Bazel
/// has one such place, and the last word wins.
fn without_backend(command: &[OsString]) -> (Vec<OsString>, Option<String>) {
    let mut kept = Vec::with_capacity(command.len());
    let mut backend = None;
    let mut args = command.iter();
    while let Some(arg) = args.next() {
        match arg.to_str() {
            Some("--") => {
                kept.push(arg.clone());
                break;
            }
            Some("--bes_backend") => {
                backend = args.next().map(|value| value.to_string_lossy().into_owned());
            }
            Some(text) if text.starts_with("--bes_backend=") => {
                backend = text.split_once('=').map(|(_, value)| value.to_owned());
            }
            _ => kept.push(arg.clone()),
        }
    }
    kept.extend(args.cloned());
    (kept, backend)
}

async fn spawn(
    command: &[OsString],
    interrupt: &mut Signal,
    terminate: &mut Signal,
) -> Result<ExitStatus, Failure> {
    let program: &OsStr = command.first().map_or(OsStr::new(""), OsString::as_os_str);
    let mut child = Command::new(program)
        .args(command.iter().skip(1))
        .spawn()
        .map_err(|e| Failure::usage(format!("{}: {e}", PathBuf::from(program).display())))?;
    loop {
        tokio::select! {
            status = child.wait() => return Ok(status?),
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {
                if let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()).and_then(rustix::process::Pid::from_raw) {
                    // It may have ended just now.
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
                }
            }
        }
    }
}

/// One summary line for each invocation (Bazel starts another one in the same command after an eviction).
fn tell(reports: &mut broadcast::Receiver<Report>) -> Result<(), Failure> {
    let mut err = std::io::stderr().lock();
    loop {
        match reports.try_recv() {
            Ok(report) => {
                for message in &report.messages {
                    writeln!(err, "outhaul: {message}")?;
                }
                writeln!(err, "{}", report.line)?;
            }
            Err(broadcast::error::TryRecvError::Lagged(_)) => {}
            Err(_) => return Ok(()),
        }
    }
}

/// The command's own code; 128 and the signal's number when a signal ended it, as shells have it.
fn code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(1);
    u8::try_from(code & 0xff).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn bazel_is_told_to_download_nothing_in_a_way_that_every_version_takes() {
        let told = |keep| flags("127.0.0.1:1", keep).contains(&"--remote_download_minimal".into());
        assert!(told(false) && !told(true));
    }

    #[test]
    fn flags_stand_right_behind_the_command_word() {
        for (command, expected) in [
            ("bazel build //a", "bazel build -F //a"),
            (
                "bazel --batch test -k //a -- -//b",
                "bazel --batch test -F -k //a -- -//b",
            ),
            (
                "bazel --output_base /x run //a -- build",
                "bazel --output_base /x run -F //a -- build",
            ),
            ("bazel info", "bazel info"),
            ("bazel help build", "bazel help build"),
            ("bazel query //a", "bazel query //a"),
            ("make", "make"),
        ] {
            assert_eq!(with_flags(&words(command), &words("-F")), words(expected));
        }
    }

    #[test]
    fn a_backend_of_the_commands_own_is_taken_out_and_used() {
        for (command, kept, backend) in [
            (
                "bazel build --bes_backend=grpc://x //a",
                "bazel build //a",
                Some("grpc://x"),
            ),
            (
                "bazel build --bes_backend grpc://x //a",
                "bazel build //a",
                Some("grpc://x"),
            ),
            (
                "bazel build --bes_backend=a --bes_backend=b //a -- --bes_backend=c",
                "bazel build //a -- --bes_backend=c",
                Some("b"),
            ),
            ("bazel build --bes_backend= //a", "bazel build //a", Some("")),
            (
                "bazel run //a -- --bes_backend=grpc://x",
                "bazel run //a -- --bes_backend=grpc://x",
                None,
            ),
        ] {
            assert_eq!(
                without_backend(&words(command)),
                (words(kept), backend.map(str::to_owned)),
                "{command}"
            );
        }
    }

    #[test]
    fn the_exit_code_is_the_commands_own() {
        assert_eq!(code(ExitStatus::from_raw(38 << 8)), 38);
        assert_eq!(code(ExitStatus::from_raw(9)), 137);
        assert_eq!(code(ExitStatus::from_raw(0)), 0);
    }
}
