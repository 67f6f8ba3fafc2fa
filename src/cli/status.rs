//! `outhaul status`: what became of builds.

use std::{
    io::{IsTerminal as _, Write as _},
    time::Duration,
};

use clap::Args;
use serde_json::json;

use super::{
    client::{AskArgs, Client},
    exit,
    exit::Failure,
    print, view,
};

/// How often `--watch` looks.
const LOOK: Duration = Duration::from_millis(500);

/// Arguments of `outhaul status`.
#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    /// Show this invocation and its targets; by default, list the newest invocations
    #[arg(value_name = "ID")]
    id: Option<String>,

    /// Show each change until the invocation (by default the newest) is settled
    #[arg(long)]
    watch: bool,

    /// How many invocations to list
    #[arg(long, value_name = "N", default_value_t = 10)]
    limit: u32,

    #[command(flatten)]
    ask: AskArgs,
}

pub(super) fn main(args: &StatusArgs) -> Result<u8, Failure> {
    args.ask.ask(args.id.as_deref(), async |client| {
        if let Some(pause) = client.paused().await {
            writeln!(print::err(), "outhaul: {}", pause.words())?;
        }
        if args.watch {
            watch(args, client).await
        } else if let Some(id) = &args.id {
            one(args, client, id).await
        } else {
            list(args, client).await
        }
    })
}

async fn list(args: &StatusArgs, client: &mut Client) -> Result<u8, Failure> {
    let invocations = client.invocations(args.limit).await?;
    let mut out = print::out();
    for invocation in &invocations {
        if args.ask.json {
            writeln!(out, "{}", view::invocation_json(invocation))?;
        } else {
            view::invocation(&mut out, invocation)?;
        }
    }
    if invocations.is_empty() && !args.ask.json {
        writeln!(out, "no invocations are recorded")?;
    }
    Ok(exit::OK)
}

async fn one(args: &StatusArgs, client: &mut Client, id: &str) -> Result<u8, Failure> {
    let (invocation, targets) = client.invocation(id).await?;
    let mut out = print::out();
    if args.ask.json {
        let mut value = view::invocation_json(&invocation);
        if let Some(object) = value.as_object_mut() {
            object.insert(
                "targets".to_owned(),
                json!(targets.iter().map(view::target_json).collect::<Vec<_>>()),
            );
        }
        writeln!(out, "{value}")?;
    } else {
        view::invocation(&mut out, &invocation)?;
        for target in &targets {
            view::target(&mut out, target)?;
        }
    }
    Ok(exit::OK)
}

async fn watch(args: &StatusArgs, client: &mut Client) -> Result<u8, Failure> {
    let id = args.id.as_deref().unwrap_or("");
    let terminal = std::io::stdout().is_terminal() && !args.ask.json;
    let mut shown = None;
    loop {
        let (invocation, _) = client.invocation(id).await?;
        if shown.as_ref() != Some(&invocation) {
            let mut out = print::out();
            if args.ask.json {
                writeln!(out, "{}", view::invocation_json(&invocation))?;
            } else {
                if terminal && shown.is_some() {
                    // Back to the top left, and clear what was there.
                    write!(std::io::stdout(), "\x1b[H\x1b[J")?;
                } else if terminal {
                    write!(std::io::stdout(), "\x1b[2J\x1b[H")?;
                }
                view::invocation(&mut out, &invocation)?;
            }
            out.flush()?;
        }
        let over = invocation.state().is_over();
        let failed = invocation.failed > 0;
        shown = Some(invocation);
        if over {
            return Ok(if failed { exit::FAILED } else { exit::OK });
        }
        tokio::time::sleep(LOOK).await;
    }
}
