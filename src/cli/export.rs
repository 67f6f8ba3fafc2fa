//! `outhaul export`: a recorded build as one file, to be staged from elsewhere.

use std::{
    fs::{self, OpenOptions},
    io::{BufWriter, Write},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use clap::Args;

use super::{
    carried,
    client::Client,
    exit,
    exit::Failure,
    paths::special,
    print, runtime,
    stage::{WhichArgs, failure},
};
use crate::{
    builds::StreamKey,
    config::{CacheArgs, ConfigError, ControlArgs, StateArgs},
    control::staging::nothing_of,
    journal::{Entry, Journal},
    printable::printable,
    proto::outhaul::v1 as pb,
    record::{InvocationRow, with_fields_of},
    stage::{
        Carried,
        archive::{self, Exported},
    },
    units::parse_size,
};

/// Arguments of `outhaul export`.
#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    /// Invocation ID of the build; by default the newest build of the workspace
    #[arg(value_name = "ID", conflicts_with = "workspace")]
    id: Option<String>,

    /// The newest build of this workspace; by default, of the workspace of the current directory, or of any if there is
    /// none
    #[arg(long, value_name = "DIR")]
    workspace: Option<PathBuf>,

    /// File to write, by default ID.outhaul; `-` for standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// With what programs need at run time, so that `outhaul exec --from-export` and `outhaul stage --runfiles` run them on
    /// another machine: the list of it, and the content of sources and of what was made on this machine
    #[arg(long)]
    runfiles: bool,

    /// With --runfiles: how much content goes in; the rest must then be in the remote cache
    #[arg(long, value_name = "SIZE", default_value = "64MiB", requires = "runfiles")]
    runfiles_limit: String,

    #[command(flatten)]
    state: StateArgs,

    #[command(flatten)]
    cache: CacheArgs,
}

pub(super) fn main(args: ExportArgs) -> Result<u8, Failure> {
    let which = WhichArgs {
        invocation: args.id,
        workspace: args.workspace,
    };
    let (invocation_id, workspace) = which.or_around()?;
    let limit = parse_size(&args.runfiles_limit)
        .map_err(|e| ConfigError::new(format!("--runfiles-limit={}", args.runfiles_limit), e))?;
    let (row, entry, runfiles, is_whole) = runtime()?.block_on(async {
        let (mut client, state) = Client::of_build(
            &ControlArgs::default(),
            &args.state,
            &args.cache,
            &invocation_id,
            &workspace,
        )
        .await?;
        let result = async {
            let row = find(&mut client, invocation_id, workspace).await?;
            let entry = entry_of(&row, &state)?;
            let mut runfiles = Vec::new();
            let mut is_whole = true;
            if args.runfiles {
                // What came with a build from elsewhere goes on as it is.
                let came = if row.imported {
                    carried::of_journal(&entry)?
                } else {
                    Vec::new()
                };
                if came.is_empty() {
                    runfiles = carried::of_build(&mut client, &row.invocation_id, limit).await?;
                }
                is_whole = carried::print_missing(came.iter().chain(&runfiles))?;
            }
            Ok::<_, Failure>((row, entry, runfiles, is_whole))
        };
        let result = result.await;
        client.close().await;
        result
    })?;
    let output = args
        .output
        .unwrap_or_else(|| format!("{}.outhaul", row.invocation_id).into());
    let exported = if output == Path::new("-") {
        archive::export(&entry, &row, &runfiles, std::io::stdout().lock())
            .map_err(Failure::failed)?
            .0
    } else {
        to_file(&entry, &row, &runfiles, &output)?
    };
    let mut err = print::err();
    if exported.left_out > 0 {
        writeln!(
            err,
            "outhaul: left out {} events that cannot be read",
            exported.left_out
        )?;
    }
    if output != Path::new("-") {
        writeln!(
            err,
            "outhaul: exported build {} with {} events to {}",
            printable(&exported.header.invocation_id),
            exported.events,
            output.display()
        )?;
    }
    Ok(if is_whole { exit::OK } else { exit::FAILED })
}

/// The journal of a build.
fn entry_of(row: &InvocationRow, state: &StateArgs) -> Result<Entry, Failure> {
    let journal = Journal::view(&state.directory()?.join("journal"));
    let key = StreamKey {
        build_id: row.build_id.clone(),
        invocation_id: row.invocation_id.clone(),
        ..StreamKey::default()
    };
    journal.find_stream(&key).map_err(Failure::not_found)
}

/// The build that staging would take, and what is recorded of it.
async fn find(
    client: &mut Client,
    invocation_id: String,
    workspace: String,
) -> Result<InvocationRow, Failure> {
    let request = pb::StageRequest {
        invocation_id,
        workspace,
        dry_run: true,
        ..pb::StageRequest::default()
    };
    let id = match client.stage(request).await {
        Ok(planned) => planned.invocation_id,
        // A build without outputs to stage is exported too: its targets and its end are in the export.
        Err(status) => nothing_of(&status).ok_or_else(|| failure(&status))?,
    };
    let (row, _) = client.invocation(&id).await?;
    Ok(with_fields_of!(
        row,
        InvocationRow {
            imported: row.without_root,
            finished: row.exit_code.is_some(),
            exit_code: row.exit_code.unwrap_or_default(),
        } invocation_id build_id command workspace exec_root started_ms settled_ms build_tool_version remote_cache
          remote_instance_name,
        ..InvocationRow::default()
    ))
}

/// Whole or not at all, and for the user's own eyes: names of targets and files are in it as they are.
fn to_file(
    entry: &Entry,
    row: &InvocationRow,
    runfiles: &[Carried],
    path: &Path,
) -> Result<Exported, Failure> {
    let failed = |e: std::io::Error| Failure::failed(format!("{}: {e}", path.display()));
    if let Some(file) = special(path).map_err(failed)? {
        let (exported, _) =
            archive::export(entry, row, runfiles, BufWriter::new(file)).map_err(Failure::failed)?;
        return Ok(exported);
    }
    let mut name = path
        .file_name()
        .ok_or_else(|| Failure::usage(format!("--output={}: not a file name", path.display())))?
        .to_owned();
    name.push(format!(".{:016x}", rand::random::<u64>()));
    let beside = path.with_file_name(name);
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&beside)
        .map_err(failed)?;
    let written = archive::export(entry, row, runfiles, BufWriter::new(file))
        .map_err(Failure::failed)
        .and_then(|(exported, _)| {
            fs::rename(&beside, path).map_err(failed)?;
            Ok(exported)
        });
    if written.is_err() {
        // Half a file is of no use to anybody.
        let _ = fs::remove_file(&beside);
    }
    written
}
