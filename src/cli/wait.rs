//! `outhaul wait`: until a build, or some of its targets, are on disk.

use std::{
    io::{IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::Args;
use serde_json::{Value, json};

use super::{
    client::{Client, Door, Lost},
    exit,
    exit::Failure,
    paths, print, runtime, view,
};
use crate::{
    config::{CacheArgs, ConfigError, ControlArgs, StateArgs},
    control::wait::Judge,
    materialize::split_source,
    printable::printable,
    proto::outhaul::v1::{self as pb, watch_invocation_response::Event},
    transport::TlsFiles,
    units::{now_ms, parse_duration, show_count, show_size},
};

/// How long after a lost connection the daemon is looked for again.
const AGAIN: Duration = Duration::from_millis(200);
/// How long the record may be another process's without a word of it.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often the line on the terminal changes.
const REDRAW: Duration = Duration::from_millis(100);

/// Arguments of `outhaul wait`.
#[derive(Debug, Args)]
pub(super) struct WaitArgs {
    /// Target patterns as Bazel writes them (//pkg:name, //pkg:all, //pkg/..., @repo//...; LABEL%ASPECT for an
    /// aspect); by default the whole build
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,

    /// Invocation ID of the build; it does not need to have started
    #[arg(long, value_name = "ID", conflicts_with_all = ["workspace", "next"])]
    invocation: Option<String>,

    /// The newest build of this workspace, or its first if there is none yet; by default, of the workspace of the
    /// current directory, or of any if there is none
    #[arg(long, value_name = "DIR")]
    workspace: Option<PathBuf>,

    /// Wait for the next build instead of one that has already started
    #[arg(long)]
    next: bool,

    /// Maximum time to wait
    #[arg(long, value_name = "DURATION", env = "OUTHAUL_TIMEOUT")]
    timeout: Option<String>,

    /// Print JSON, one object per line: each change, and finally the result
    #[arg(long)]
    json: bool,

    /// PEM file of the certificate authorities for a daemon named with --control
    #[arg(long, value_name = "FILE", env = "OUTHAUL_TLS_CERTIFICATE")]
    tls_certificate: Option<PathBuf>,

    /// PEM file of the client certificate, for a daemon that requires one
    #[arg(
        long,
        value_name = "FILE",
        env = "OUTHAUL_TLS_CLIENT_CERTIFICATE",
        requires = "tls_client_key"
    )]
    tls_client_certificate: Option<PathBuf>,

    /// PEM file of the key of --tls-client-certificate
    #[arg(long, value_name = "FILE", env = "OUTHAUL_TLS_CLIENT_KEY")]
    tls_client_key: Option<PathBuf>,

    #[command(flatten)]
    control: ControlArgs,

    #[command(flatten)]
    state: StateArgs,
}

pub(super) fn main(args: &WaitArgs) -> Result<u8, Failure> {
    // Before anything else: it counts from here.
    let choice = choice(args)?;
    let judge = Judge::new(&args.targets).map_err(Failure::usage)?;
    let timeout = timeout(args)?;
    let files = TlsFiles {
        certificate: args.tls_certificate.clone(),
        client_certificate: args.tls_client_certificate.clone(),
        client_key: args.tls_client_key.clone(),
    };
    let door = Door::new(&args.control, &args.state, files)?;
    let cache = CacheArgs::from_environment()?;
    let mut waiting = Waiting {
        args,
        door,
        cache,
        choice,
        judge,
        shown: Shown::new(args.json),
    };
    runtime()?.block_on(async {
        let answer = match timeout {
            None => Some(waiting.follow().await),
            Some(timeout) => tokio::time::timeout(timeout, waiting.follow()).await.ok(),
        };
        waiting.shown.clear();
        let answer = match answer {
            Some(answer) => answer?,
            None => waiting.judge.timed_out(),
        };
        let code = match answer.result() {
            pb::WaitResult::Settled => exit::OK,
            pb::WaitResult::NotFound => exit::NOT_FOUND,
            pb::WaitResult::TimedOut => exit::TIMED_OUT,
            _ => exit::FAILED,
        };
        if args.json {
            object(&result_json(&answer, code))?;
        } else {
            tell(args, &answer)?;
        }
        Ok(code)
    })
}

fn timeout(args: &WaitArgs) -> Result<Option<Duration>, Failure> {
    let Some(text) = &args.timeout else {
        return Ok(None);
    };
    let flag = || format!("--timeout={text}");
    match parse_duration(text) {
        Ok(timeout) if timeout.is_zero() => Err(ConfigError::new(
            flag(),
            "must be greater than zero; use `outhaul status` to look without waiting",
        )
        .into()),
        Ok(timeout) => Ok(Some(timeout)),
        Err(error) => Err(ConfigError::new(flag(), error).into()),
    }
}

/// Which invocation the flags mean.
fn choice(args: &WaitArgs) -> Result<pb::InvocationChoice, Failure> {
    if let Some(id) = &args.invocation {
        return Ok(by_id(id));
    }
    let workspace = match &args.workspace {
        Some(workspace) => {
            let absolute = std::path::absolute(workspace)
                .map_err(|e| ConfigError::new(format!("--workspace={}", workspace.display()), e))?;
            Some(absolute)
        }
        None => std::env::current_dir()
            .ok()
            .and_then(|directory| paths::workspace_around(&directory)),
    };
    // Bazel tells the real path. A workspace of another machine is not here to be looked at.
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let workspace = workspace.map(|path| real(&path).display().to_string());
    Ok(pb::InvocationChoice {
        invocation_id: String::new(),
        workspace: workspace.unwrap_or_default(),
        next: args.next,
        since_ms: 0,
    })
}

fn by_id(id: &str) -> pb::InvocationChoice {
    pb::InvocationChoice {
        invocation_id: id.to_owned(),
        ..pb::InvocationChoice::default()
    }
}

/// One wait, over as many connections as it takes.
struct Waiting<'a> {
    args: &'a WaitArgs,
    door: Door,
    cache: CacheArgs,
    choice: pb::InvocationChoice,
    judge: Judge,
    shown: Shown,
}

impl Waiting<'_> {
    async fn follow(&mut self) -> Result<pb::WaitResponse, Failure> {
        let asked_at = now_ms();
        // Once a daemon has answered, its record is left to it: it may be starting again.
        let mut met = false;
        loop {
            let mut client = match self.door.connect().await {
                Ok(daemon) => {
                    met = true;
                    Client::Daemon(daemon)
                }
                Err(reason) if met => {
                    self.shown.lost(&reason)?;
                    tokio::time::sleep(AGAIN).await;
                    continue;
                }
                Err(refused) => {
                    match Client::here(&self.door, &refused, &self.args.state, &self.cache).await {
                        Ok(client) => client,
                        // A daemon that is starting, or a command that will be done.
                        Err(failure) if failure.held => {
                            self.shown.held(&failure.message)?;
                            tokio::time::sleep(AGAIN).await;
                            continue;
                        }
                        Err(failure) => return Err(failure),
                    }
                }
            };
            let ended = self.hear(&mut client).await;
            client.close().await;
            match ended {
                Ok(answer) => return Ok(answer),
                Err(Lost::Connection(reason)) => self.shown.lost(&reason)?,
                Err(Lost::Refused(failure)) if failure.code == exit::NOT_FOUND && !met => {
                    return Err(Failure::not_found(format!(
                        "{}, and no daemon answers on {}",
                        failure.message, self.door
                    )));
                }
                Err(Lost::Refused(failure)) => return Err(failure),
            }
            if self.choice.next && self.choice.since_ms == 0 {
                // What began while nobody listened is still the next one.
                self.choice.since_ms = asked_at;
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn hear(&mut self, client: &mut Client) -> Result<pb::WaitResponse, Lost> {
        let mut following = client.watch(self.choice.clone()).await?;
        if let Client::Daemon(_) = client {
            self.shown.found().map_err(|e| Lost::Refused(e.into()))?;
        }
        while let Some(event) = following.next().await? {
            if let Event::Invocation(invocation) = &event {
                self.choice = by_id(&invocation.invocation_id);
            }
            self.shown
                .event(&self.judge, &event)
                .map_err(|e| Lost::Refused(e.into()))?;
            if let Some(answer) = self.judge.take(&event) {
                return Ok(answer);
            }
        }
        Err(Lost::Connection("the daemon has closed the stream".to_owned()))
    }
}

/// What is shown while waiting.
struct Shown {
    json: bool,
    terminal: bool,
    drawn: Option<Instant>,
    lost: bool,
    begun: Instant,
    held: bool,
    invocation: String,
    targets: u64,
    outputs: u64,
    bytes: u64,
}

impl Shown {
    fn new(json: bool) -> Self {
        Self {
            json,
            terminal: !json && std::io::stderr().is_terminal(),
            drawn: None,
            lost: false,
            begun: Instant::now(),
            held: false,
            invocation: String::new(),
            targets: 0,
            outputs: 0,
            bytes: 0,
        }
    }

    /// Says once that the daemon is away.
    fn lost(&mut self, reason: &str) -> std::io::Result<()> {
        if std::mem::replace(&mut self.lost, true) {
            return Ok(());
        }
        self.clear();
        if self.json {
            return object(&json!({"event": "lost", "reason": reason}));
        }
        writeln!(
            print::err(),
            "outhaul: lost the connection to the daemon ({reason}); reconnecting"
        )
    }

    /// Says once that another process has the record. One that is only starting or ending is not worth a word.
    fn held(&mut self, reason: &str) -> std::io::Result<()> {
        if self.held || self.begun.elapsed() < PATIENCE {
            return Ok(());
        }
        self.held = true;
        writeln!(print::err(), "outhaul: waiting: {}", printable(reason))
    }

    /// A daemon listens: from now on nothing is missed.
    fn found(&mut self) -> std::io::Result<()> {
        self.lost = false;
        if self.json {
            return object(&json!({"event": "waiting"}));
        }
        Ok(())
    }

    /// Shows a change, if it is about something that is waited for.
    fn event(&mut self, judge: &Judge, event: &Event) -> std::io::Result<()> {
        match event {
            Event::TargetKnown(target) | Event::TargetSettled(target)
                if !judge.covers(&target.label, &target.aspect) =>
            {
                return Ok(());
            }
            Event::Output(output) if !judge.covers_output(output) => return Ok(()),
            Event::Invocation(invocation) => self.invocation.clone_from(&invocation.invocation_id),
            Event::TargetSettled(_) => self.targets += 1,
            Event::Output(output) => {
                self.outputs += 1;
                self.bytes += output.bytes;
            }
            _ => {}
        }
        if self.json {
            object(&event_json(event))?;
        }
        self.draw();
        Ok(())
    }

    fn draw(&mut self) {
        if !self.terminal || self.drawn.is_some_and(|at| at.elapsed() < REDRAW) {
            return;
        }
        self.drawn = Some(Instant::now());
        // A terminal that does not take it is no reason to stop.
        let _ = write!(
            std::io::stderr(),
            "\r\x1b[K{}: {} targets settled, {} outputs, {}",
            printable(&self.invocation),
            show_count(self.targets),
            show_count(self.outputs),
            show_size(self.bytes)
        );
    }

    fn clear(&mut self) {
        if self.drawn.take().is_some() {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

/// One object, at once: anyone who reads may be waiting for it.
fn object(value: &Value) -> std::io::Result<()> {
    let mut out = print::out();
    writeln!(out, "{value}")?;
    out.flush()
}

fn event_json(event: &Event) -> Value {
    match event {
        Event::Invocation(invocation) => {
            json!({"event": "invocation", "invocation": view::invocation_json(invocation)})
        }
        Event::TargetKnown(target) => {
            json!({"event": "target_known", "target": view::target_json(target)})
        }
        Event::TargetSettled(target) => {
            json!({"event": "target_settled", "target": view::target_json(target)})
        }
        Event::Output(output) => json!({
            "event": "output",
            "output": {
                "store": split_source(&output.source).1,
                "exec_path": output.exec_path,
                "label": output.label,
                "class": output.class().name(),
                "outcome": output.outcome().name(),
                "source": view::non_empty(split_source(&output.source).0),
                "bytes": output.bytes,
                "error": view::non_empty(&output.error),
            },
        }),
        Event::Settled(invocation) => {
            json!({"event": "settled", "invocation": view::invocation_json(invocation)})
        }
        Event::Lagged(_) => json!({"event": "lagged"}),
    }
}

fn result_json(answer: &pb::WaitResponse, code: u8) -> Value {
    json!({
        "event": "result",
        "result": answer.result().name(),
        "exit_code": code,
        "invocation": answer.invocation.as_ref().map(view::invocation_json),
        "targets": answer.targets.iter().map(view::target_json).collect::<Vec<_>>(),
        "targets_left_out": answer.targets_left_out,
        "failures": answer.failures,
        "not_found": answer.not_found,
    })
}

/// The result for people.
fn tell(args: &WaitArgs, answer: &pb::WaitResponse) -> Result<(), Failure> {
    let mut err = print::err();
    for failure in &answer.failures {
        writeln!(err, "outhaul: {}", printable(failure))?;
    }
    for pattern in &answer.not_found {
        writeln!(
            err,
            "outhaul: {}: no such target in the build",
            printable(pattern)
        )?;
    }
    let Some(invocation) = &answer.invocation else {
        writeln!(err, "outhaul: timed out: no matching build has started")?;
        return Ok(());
    };
    let mut out = print::out();
    writeln!(
        out,
        "{}  {}  {}  {}",
        printable(&invocation.invocation_id),
        printable(&invocation.command),
        answer.result().name().replace('_', " "),
        printable(&invocation.workspace)
    )?;
    if args.targets.is_empty() {
        writeln!(out, "  {}", printable(&invocation.summary))?;
    } else {
        for target in &answer.targets {
            let aspect = match &*target.aspect {
                "" => String::new(),
                aspect => format!(" ({aspect})"),
            };
            writeln!(
                out,
                "  {:9} {}",
                target.state,
                printable(&format!("{}{aspect}", target.label))
            )?;
        }
    }
    Ok(())
}
