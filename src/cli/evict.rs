//! `outhaul evict`: removes downloaded outputs that the cache still has.

use std::{io::Write as _, path::PathBuf};

use clap::Args;

use super::{client::AskArgs, exit, exit::Failure, paths::recorded_workspace, print, runtime, view};
use crate::{
    config::ConfigError,
    printable::printable,
    proto::outhaul::v1 as pb,
    units::{parse_size, show_count, show_size},
};

/// Arguments of `outhaul evict`.
#[derive(Debug, Args)]
pub(super) struct EvictArgs {
    /// Remove outputs until this much disk space is freed, such as 20GiB; the least recently used first
    #[arg(long, value_name = "SIZE")]
    to_free: String,

    /// Only outputs of the workspace that this directory is in; by default, of all
    #[arg(long, value_name = "DIR")]
    workspace: Option<PathBuf>,

    /// Also remove outputs that the newest build of a workspace wants; the next build downloads them again
    #[arg(long)]
    include_newest: bool,

    /// Only show what would be removed
    #[arg(long)]
    dry_run: bool,

    #[command(flatten)]
    ask: AskArgs,
}

pub(super) fn main(args: &EvictArgs) -> Result<u8, Failure> {
    let bytes =
        parse_size(&args.to_free).map_err(|e| ConfigError::new(format!("--to-free={}", args.to_free), e))?;
    let request = pb::EvictRequest {
        bytes,
        workspace: recorded_workspace(args.workspace.as_deref())?,
        include_newest: args.include_newest,
        dry_run: args.dry_run,
    };
    let (mut freed, mut outputs) = (0, 0);
    let mut left = Vec::new();
    runtime()?.block_on(async {
        let mut client = args.ask.client().await?;
        let result = client
            .evict(request, |part| {
                freed += part.bytes;
                outputs += part.outputs.len() as u64;
                left.extend(part.left);
                part.outputs.iter().try_for_each(|output| show(args, output))
            })
            .await;
        client.close().await;
        result
    })?;
    summarize(args, bytes, (freed, outputs), &left)
}

fn show(args: &EvictArgs, output: &pb::Output) -> Result<(), Failure> {
    let mut out = print::out();
    if args.ask.json {
        writeln!(out, "{}", view::output_json(output))?;
    } else {
        writeln!(
            out,
            "{:>10}  {}",
            printable(&view::content(output)),
            printable(&output.absolute_path())
        )?;
    }
    Ok(())
}

fn summarize(
    args: &EvictArgs,
    wanted: u64,
    (freed, outputs): (u64, u64),
    left: &[pb::evict_response::Left],
) -> Result<u8, Failure> {
    let mut err = print::err();
    writeln!(
        err,
        "outhaul: {} {} outputs ({})",
        if args.dry_run { "would remove" } else { "removed" },
        show_count(outputs),
        show_size(freed)
    )?;
    if freed >= wanted {
        return Ok(exit::OK);
    }
    for left in left {
        let count = match left.outputs {
            0 => "all".to_owned(),
            outputs => format!("{} ({})", show_count(outputs), show_size(left.bytes)),
        };
        writeln!(err, "  left in place: {count} {}", printable(&left.reason))?;
    }
    Err(Failure::failed(format!(
        "--to-free={}: only {} can be freed",
        args.to_free,
        show_size(freed)
    )))
}
