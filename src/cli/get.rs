//! `outhaul get`: recorded outputs to disk, by path, label or pattern.

pub(super) mod bring;
mod listed;
mod wanted;

use std::{collections::BTreeSet, io::Write as _, path::PathBuf};

use clap::Args;

pub(super) use self::{
    bring::{AT_ONCE, OfBuild, Show, get, worse},
    wanted::is_target,
};
use self::{listed::listed, wanted::Wanted};
use super::{
    client::{AskArgs, Client},
    exit::Failure,
    paths, print, runfiles, runtime,
    stage::{self, WhichArgs},
};
use crate::{printable::printable, proto::outhaul::v1 as pb};

/// Arguments of `outhaul get`.
#[derive(Debug, Args)]
pub(super) struct GetArgs {
    /// Outputs, by path: as you see them (bazel-bin/pkg/x), absolute, or as exec paths (bazel-out/…); a directory
    /// stands for everything in it, and * ? ** match recorded outputs. Or outputs of targets: //pkg:name, //pkg:all,
    /// //pkg/..., or with a leading `-` to exclude (after `--`)
    #[arg(value_name = "PATH|TARGET", required_unless_present_any = ["path", "all_of", "failed"])]
    wanted: Vec<PathBuf>,

    /// Only these output groups of the targets (repeatable)
    #[arg(long, value_name = "GROUP", value_delimiter = ',')]
    output_group: Vec<String>,

    /// Only outputs of the targets whose whole exec path, or that of their tree artifact, matches, and of --all-of; without
    /// these, all recorded outputs whose whole exec path matches (repeatable)
    #[arg(long, value_name = "REGEX")]
    path: Vec<String>,

    /// Everything that is recorded of these packages, with intermediate outputs: //pkg:all or //pkg/... (repeatable)
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    all_of: Vec<String>,

    /// The outputs of failed tests: logs, XML reports and undeclared outputs; with targets, only of these
    #[arg(long)]
    failed: bool,

    /// With everything that the programs among them need at run time (their runfiles), by the manifests that Bazel wrote
    /// beside them on this machine
    #[arg(long)]
    runfiles: bool,

    #[command(flatten)]
    which: WhichArgs,

    #[command(flatten)]
    ask: AskArgs,
}

pub(super) fn main(args: &GetArgs) -> Result<u8, Failure> {
    let wanted = Wanted::read(args)?;
    let mut paths = resolved(&wanted.paths)?;
    let selects = wanted.needs_list() || !wanted.targets.is_empty() || args.failed;
    let (invocation, workspace) = if selects {
        args.which.or_around()?
    } else if args.which.is_given() {
        let message = "--invocation and --workspace are for targets and patterns; a path says itself which build it is of";
        return Err(Failure::usage(message));
    } else {
        (String::new(), String::new())
    };
    runtime()?.block_on(async {
        let client = if selects {
            args.ask.client_of_build(&invocation, &workspace).await?
        } else {
            args.ask.client().await?
        };
        let got = async |client: &mut Client| {
            let mut of_build = None;
            if selects {
                if !invocation.is_empty() && (wanted.needs_list() || args.runfiles) {
                    refuse_older(client, &invocation).await?;
                }
                let selected = selected(client, args, &wanted, &invocation, &workspace).await?;
                paths.extend(selected.0);
                of_build = selected.1;
            }
            let show = if args.ask.json { Show::Json } else { Show::Text };
            let (code, there) = get(client, &paths, of_build.as_ref(), show).await?;
            if !args.runfiles || there.is_empty() {
                return Ok(code);
            }
            let runfiles = runfiles::of(client, &there).await?;
            if runfiles.programs == 0 {
                return Err(Failure::not_found(runfiles::NO_MANIFEST));
            }
            Ok(worse(code, runfiles.get(client, &there, show).await?))
        };
        client.with(got).await
    })
}

/// Refuses a build that is not the newest of its output root: what is recorded there, and what Bazel has written beside
/// programs, may be the newest one's.
async fn refuse_older(client: &mut Client, id: &str) -> Result<(), Failure> {
    let (build, _) = client.invocation(id).await?;
    match client.newer_of_root(&build).await? {
        None => Ok(()),
        Some(newer) => Err(Failure::usage(format!(
            "--invocation={id}: build {newer} of the same output root is newer, and paths, packages and --runfiles are \
             about the newest one; name targets, or use `outhaul stage --invocation {id} --to DIR`"
        ))),
    }
}

/// The absolute paths of what targets and patterns select, and the outputs that are a build's own.
async fn selected(
    client: &mut Client,
    args: &GetArgs,
    wanted: &Wanted,
    invocation: &str,
    workspace: &str,
) -> Result<(BTreeSet<String>, Option<OfBuild>), Failure> {
    let mut paths = BTreeSet::new();
    let mut of_build = None;
    if !wanted.targets.is_empty() || args.failed {
        let wish = pb::StageWish {
            failed: args.failed,
            targets: wanted.targets.clone(),
            output_groups: args.output_group.clone(),
            include: args.path.clone(),
            ..pb::StageWish::default()
        };
        let (build, outputs) = of_targets(client, wish, invocation, workspace).await?;
        let named = OfBuild::new(&build, outputs);
        paths.extend(named.outputs.keys().cloned());
        of_build = Some(named);
    }
    if wanted.needs_list() {
        // Of the build that is meant.
        let id = match (invocation, workspace) {
            ("", "") => String::new(),
            ("", workspace) => client.newest_of_workspace(workspace).await?,
            (id, _) => id.to_owned(),
        };
        listed(client, &id, wanted, &mut paths).await?;
    }
    Ok((paths, of_build))
}

/// What targets of a build select, and the build.
pub(super) async fn of_targets(
    client: &mut Client,
    wish: pb::StageWish,
    invocation: &str,
    workspace: &str,
) -> Result<(pb::Invocation, Vec<pb::StagedOutput>), Failure> {
    let request = pb::StageRequest {
        invocation_id: invocation.to_owned(),
        workspace: workspace.to_owned(),
        wish: Some(wish),
        dry_run: true,
        ..pb::StageRequest::default()
    };
    let found = client.stage(request).await;
    let found = found.map_err(|status| stage::failure(&status))?;
    for note in &found.notes {
        writeln!(print::err(), "outhaul: {}", printable(note))?;
    }
    let (build, _) = client.invocation(&found.invocation_id).await?;
    Ok((build, found.outputs))
}

/// Users' paths as the record knows them.
pub(super) fn resolved(paths: &[PathBuf]) -> Result<Vec<String>, Failure> {
    paths
        .iter()
        .map(|path| {
            let resolved =
                paths::resolve(path).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?;
            resolved.into_os_string().into_string().map_err(|_| {
                Failure::usage(format!(
                    "{}: not UTF-8 (recorded paths always are)",
                    path.display()
                ))
            })
        })
        .collect()
}
