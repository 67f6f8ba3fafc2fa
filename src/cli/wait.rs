//! `outhaul wait`: until a build, or some of its targets, are on disk.

use std::{
    io::{IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

use clap::Args;
use serde_json::{Value, json};

use super::{
    client::Client,
    exit,
    exit::Failure,
    follow::{ChoiceArgs, DaemonArgs, Follower, Hears, say_lost},
    print, runtime, view,
};
use crate::{
    config::ConfigError,
    control::wait::Judge,
    materialize::split_source,
    printable::printable,
    proto::outhaul::v1::{self as pb, watch_invocation_response::Event},
    units::{parse_duration, show_count, show_size},
};

/// How often the line on the terminal changes.
const REDRAW: Duration = Duration::from_millis(100);

/// Arguments of `outhaul wait`.
#[derive(Debug, Args)]
pub(super) struct WaitArgs {
    /// Target patterns as Bazel writes them (//pkg:name, //pkg:all, //pkg/..., @repo//...; LABEL%ASPECT for an
    /// aspect); by default the whole build
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,

    #[command(flatten)]
    choice: ChoiceArgs,

    /// Maximum time to wait
    #[arg(long, value_name = "DURATION", env = "OUTHAUL_TIMEOUT")]
    timeout: Option<String>,

    /// Print JSON, one object per line: each change, and finally the result
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    daemon: DaemonArgs,
}

pub(super) fn main(args: &WaitArgs) -> Result<u8, Failure> {
    // Before anything else: it counts from here.
    let choice = args.choice.choice()?;
    let mut waiting = Waiting {
        judge: Judge::new(&args.targets).map_err(Failure::usage)?,
        shown: Shown::new(args.json),
    };
    let timeout = timeout(args)?;
    let mut follower = Follower::new(&args.daemon)?;
    runtime()?.block_on(async {
        let followed = follower.follow(choice, &mut waiting);
        let answer = match timeout {
            None => Some(followed.await),
            Some(timeout) => tokio::time::timeout(timeout, followed).await.ok(),
        };
        waiting.shown.clear();
        let answer = match answer {
            Some(answer) => answer?,
            None => waiting.judge.timed_out(),
        };
        let code = code(&answer);
        if args.json {
            object(&result_json(&answer, code))?;
        } else {
            print_for_people(args, &answer)?;
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

/// What was heard of what is waited for.
struct Waiting {
    judge: Judge,
    shown: Shown,
}

impl Hears for Waiting {
    type Answer = pb::WaitResponse;

    async fn event(&mut self, _client: &mut Client, event: Event) -> Result<Option<Self::Answer>, Failure> {
        self.shown.event(&self.judge, &event)?;
        Ok(self.judge.take(&event))
    }

    fn found(&mut self) -> std::io::Result<()> {
        if self.shown.json {
            return object(&json!({"event": "waiting"}));
        }
        Ok(())
    }

    fn lost(&mut self, reason: &str) -> std::io::Result<()> {
        self.shown.clear();
        if self.shown.json {
            return object(&json!({"event": "lost", "reason": reason}));
        }
        say_lost(reason)
    }
}

/// What is shown while waiting.
struct Shown {
    json: bool,
    terminal: bool,
    drawn: Option<Instant>,
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
            invocation: String::new(),
            targets: 0,
            outputs: 0,
            bytes: 0,
        }
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
pub(super) fn object(value: &Value) -> std::io::Result<()> {
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
                "output_group": view::non_empty(&output.output_group),
                "digest": output.digest.as_ref().map(view::digest),
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

/// The exit code for a result.
pub(super) fn code(answer: &pb::WaitResponse) -> u8 {
    match answer.result() {
        pb::WaitResult::Settled => exit::OK,
        pb::WaitResult::NotFound => exit::NOT_FOUND,
        pb::WaitResult::TimedOut => exit::TIMED_OUT,
        _ => exit::FAILED,
    }
}

/// Says what failed, and which patterns no target matched.
pub(super) fn print_problems(answer: &pb::WaitResponse) -> std::io::Result<()> {
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
    Ok(())
}

/// The result for people.
fn print_for_people(args: &WaitArgs, answer: &pb::WaitResponse) -> Result<(), Failure> {
    print_problems(answer)?;
    let Some(invocation) = &answer.invocation else {
        writeln!(print::err(), "outhaul: timed out: no matching build has started")?;
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
