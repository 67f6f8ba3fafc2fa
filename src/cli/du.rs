//! `outhaul du`: how much of the disk recorded outputs take.

use std::{io::Write as _, path::PathBuf};

use clap::{Args, ValueEnum};
use serde_json::json;

use super::{client::AskArgs, exit, exit::Failure, paths::recorded_workspace, print, runtime};
use crate::{
    printable::printable,
    proto::outhaul::v1 as pb,
    units::{show_count, show_size},
};

/// Arguments of `outhaul du`.
#[derive(Debug, Args)]
pub(super) struct DuArgs {
    /// What to group by: the workspace, the target, or the build that made the outputs
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = By::Workspace)]
    by: By,

    /// Only outputs of the workspace that this directory is in; by default, of all
    #[arg(long, value_name = "DIR")]
    workspace: Option<PathBuf>,

    #[command(flatten)]
    ask: AskArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum By {
    Workspace,
    Target,
    Build,
}

pub(super) fn main(args: &DuArgs) -> Result<u8, Failure> {
    let by = match args.by {
        By::Workspace => pb::DiskUsageBy::Workspace,
        By::Target => pb::DiskUsageBy::Target,
        By::Build => pb::DiskUsageBy::Invocation,
    };
    let request = pb::DiskUsageRequest {
        workspace: recorded_workspace(args.workspace.as_deref())?,
        by: by.into(),
    };
    runtime()?.block_on(async {
        let mut client = args.ask.client().await?;
        let usage = client.disk_usage(request).await;
        client.close().await;
        show(args, &usage?)
    })
}

fn show(args: &DuArgs, usage: &pb::DiskUsageResponse) -> Result<u8, Failure> {
    let mut out = print::out();
    for entry in &usage.entries {
        if args.ask.json {
            let value = json!({
                "name": entry.name,
                "outputs": entry.outputs,
                "bytes": entry.bytes,
                "used_ms": entry.used_ms,
            });
            writeln!(out, "{value}")?;
        } else {
            writeln!(
                out,
                "{:>10}  {:>9}  {}",
                show_size(entry.bytes),
                show_count(entry.outputs),
                match &*entry.name {
                    "" => "(unknown)".into(),
                    name => printable(name),
                }
            )?;
        }
    }
    writeln!(
        print::err(),
        "outhaul: {} in {} recorded outputs on disk",
        show_size(usage.bytes),
        show_count(usage.outputs)
    )?;
    Ok(exit::OK)
}
