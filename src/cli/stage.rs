//! `outhaul stage`: named outputs of a recorded build to a directory.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::Args;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tonic::Status;

pub(super) use super::paths::text;
use super::{
    client::{Client, DaemonAddress},
    exit,
    exit::Failure,
    files::FilesArgs,
    paths, print,
    progress::watched,
    runtime,
    scratch::Scratch,
    view,
};
use crate::{
    collection::Checking,
    config::{CacheArgs, ControlArgs, StateArgs},
    printable::printable,
    proto::outhaul::v1 as pb,
    record::with_fields_of,
    stage::Manner,
    units::{random_uuid, show_size},
};

/// How many failures are shown.
const SHOWN: usize = 10;
/// How long another process may keep the record.
const PATIENCE: Duration = Duration::from_secs(600);
/// How often it is looked whether it is free.
const LOOK: Duration = Duration::from_millis(100);

/// Flags that select outputs.
#[derive(Debug, Clone, Args)]
pub(super) struct WishArgs {
    /// Targets whose outputs to stage: //pkg:name, //pkg:all, //pkg/..., or with a leading `-` to exclude (after `--`);
    /// by default all
    #[arg(value_name = "TARGET")]
    pub(super) targets: Vec<String>,

    /// Only these output groups (repeatable)
    #[arg(long, value_name = "GROUP", value_delimiter = ',')]
    pub(super) output_group: Vec<String>,

    /// Only outputs whose whole exec path, or that of their tree artifact, matches (repeatable)
    #[arg(long, value_name = "REGEX")]
    pub(super) include: Vec<String>,

    /// Exclude outputs whose whole exec path, or that of their tree artifact, matches (repeatable)
    #[arg(long, value_name = "REGEX")]
    pub(super) exclude: Vec<String>,

    /// Outputs that must be staged; all others are then optional (repeatable)
    #[arg(long, value_name = "REGEX")]
    pub(super) required: Vec<String>,

    /// Outputs that may be missing; without --required, all others must be staged (repeatable)
    #[arg(long, value_name = "REGEX")]
    pub(super) optional: Vec<String>,

    /// Put all files directly into the directory, by file name, instead of at their exec paths. With --from: unpack
    /// all archives directly into the directory, without the stage directories that artifact_manifest.txt, the first member of
    /// each, names
    #[arg(long)]
    pub(super) flatten: bool,

    /// Unpack archives (.tar, .tar.gz, .tar.zst, .tar.xz, .zip), each into a directory with its name without the ending;
    /// one that --from itself names, directly into the directory
    #[arg(long)]
    pub(super) extract: bool,

    /// With what the programs among the outputs need at run time, in PROGRAM.runfiles beside each, sources included, so
    /// that they run without the workspace and Bazel: by the manifests that Bazel wrote on this machine
    #[arg(long, conflicts_with_all = ["from", "extract"])]
    pub(super) runfiles: bool,

    /// Only the outputs of failed tests: logs, XML reports and undeclared outputs
    #[arg(long, conflicts_with = "from")]
    pub(super) failed: bool,
}

impl WishArgs {
    pub(super) fn wish(&self) -> pb::StageWish {
        let wish = self.clone();
        with_fields_of!(wish, pb::StageWish { output_groups: wish.output_group }
            targets include exclude required optional flatten extract runfiles failed)
    }
}

/// Flag that names collections instead of a build.
#[derive(Debug, Clone, Args)]
pub(super) struct FromArgs {
    /// Files to stage instead of outputs of a recorded build (repeatable): those right in file:///DIR/ or
    /// s3://BUCKET/PREFIX/ (gs://, az://), the one at file:///DIR/FILE, s3://BUCKET/FILE or https://HOST/PATH/FILE, or the
    /// blob with a digest (HASH/SIZE, or FUNCTION/HASH/SIZE) in the remote cache. NAME= gives the URL of a file or a digest another file name. With it, --include and the like are searched in the file name
    #[arg(
        long,
        value_name = "[NAME=]URL|DIGEST",
        conflicts_with_all = ["targets", "output_group", "invocation", "workspace"]
    )]
    pub(super) from: Vec<String>,
}

/// Flags that choose a build.
#[derive(Debug, Clone, Args)]
pub(super) struct WhichArgs {
    /// Invocation ID of the build
    #[arg(long, value_name = "ID", conflicts_with = "workspace")]
    pub(super) invocation: Option<String>,

    /// The newest build of this workspace; by default, of the workspace of the current directory, or of any if there is
    /// none
    #[arg(long, value_name = "DIR")]
    pub(super) workspace: Option<PathBuf>,
}

impl WhichArgs {
    /// Whether a build was named.
    pub(super) const fn is_given(&self) -> bool {
        self.invocation.is_some() || self.workspace.is_some()
    }

    /// The invocation's id, and the workspace; either or both empty.
    pub(super) fn given(&self) -> Result<(String, String), Failure> {
        let invocation = self.invocation.clone().unwrap_or_default();
        Ok((invocation, workspace_named(self.workspace.as_deref())?))
    }

    /// With the workspace around the current directory where neither is given.
    pub(super) fn or_around(&self) -> Result<(String, String), Failure> {
        let (invocation, mut workspace) = self.given()?;
        if invocation.is_empty() && workspace.is_empty() {
            let here = std::env::current_dir()?;
            if let Some(around) = paths::workspace_around(&here) {
                workspace = text(&around, "--workspace")?;
            }
        }
        Ok((invocation, workspace))
    }
}

/// The workspace that `--workspace` names; empty without it.
pub(super) fn workspace_named(path: Option<&Path>) -> Result<String, Failure> {
    path.map_or(Ok(String::new()), |path| {
        text(&std::path::absolute(path)?, "--workspace")
    })
}

/// Arguments of `outhaul stage`.
#[derive(Debug, Args)]
pub(super) struct StageArgs {
    #[command(flatten)]
    wish: WishArgs,

    #[command(flatten)]
    which: WhichArgs,

    #[command(flatten)]
    from: FromArgs,

    #[command(flatten)]
    files: FilesArgs,

    /// Directory to stage into; created if it does not exist
    #[arg(long, value_name = "DIR")]
    to: PathBuf,

    /// Also wait for optional outputs
    #[arg(long)]
    wait_all: bool,

    /// Only show what would be staged
    #[arg(long)]
    dry_run: bool,

    /// Print JSON, one object per line for each output
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    state: StateArgs,

    #[command(flatten)]
    cache: CacheArgs,
}

impl StageArgs {
    /// Refuses what would have no effect.
    fn check(&self) -> Result<(), Failure> {
        if !self.from.from.is_empty() {
            return Ok(());
        }
        let files = &self.files;
        let needs_from = [
            (files.checksum.is_some(), "--checksum"),
            (!files.checksum_file.is_empty(), "--checksum-file"),
        ];
        if let Some((_, flag)) = needs_from.iter().find(|(is_given, _)| *is_given) {
            return Err(Failure::usage(format!(
                "{flag}: requires --from; outputs of a build are verified against their digests"
            )));
        }
        let needs_archives = [
            (files.jobs != Manner::JOBS, "--jobs"),
            (!files.limit.is_empty(), "--limit"),
        ];
        match needs_archives.iter().find(|(is_given, _)| *is_given) {
            Some((_, flag)) if !self.wish.extract => {
                Err(Failure::usage(format!("{flag}: requires --from or --extract")))
            }
            _ => Ok(()),
        }
    }
}

pub(super) fn main(args: &StageArgs) -> Result<u8, Failure> {
    args.check()?;
    let (invocation_id, workspace) = if args.from.from.is_empty() {
        args.which.or_around()?
    } else {
        <(String, String)>::default()
    };
    let known = (invocation_id.clone(), workspace.clone());
    let request = pb::StageRequest {
        invocation_id,
        workspace,
        wish: Some(args.wish.wish()),
        directory: text(&std::path::absolute(&args.to)?, "--to")?,
        wait_all: args.wait_all,
        dry_run: args.dry_run,
        from: args.from.from.clone(),
        checking: match args.files.checking() {
            Checking::Auto => pb::Checking::Auto,
            Checking::Require => pb::Checking::Require,
            Checking::None => pb::Checking::None,
        }
        .into(),
        checksums: args.files.checksums()?.0,
        jobs: args.files.jobs.into(),
        limits: args.files.limit.clone(),
        so_far: false,
        progress_id: random_uuid(),
    };
    let mut scratch = None;
    runtime()?.block_on(async {
        let client = patiently(args, &known.0, &known.1, &mut scratch).await?;
        client
            .with(async |client| stage(args, client, request).await)
            .await
    })
}

/// The daemon, or the record; where another process has that, such as a second `stage` or a wrapped build, after it. What is
/// of no build needs no record.
async fn patiently(
    args: &StageArgs,
    invocation_id: &str,
    workspace: &str,
    scratch: &mut Option<Scratch>,
) -> Result<Client, Failure> {
    let begun = Instant::now();
    let mut is_announced = false;
    loop {
        let control = ControlArgs::default();
        let opened = if args.from.from.is_empty() {
            let found = Client::of_build(&control, &args.state, &args.cache, invocation_id, workspace);
            found.await.map(|(client, _)| client)
        } else {
            of_collection(args, &control, scratch).await
        };
        match opened {
            Err(failure) if failure.held && begun.elapsed() < PATIENCE => {
                if !is_announced && begun.elapsed() > Duration::from_secs(1) {
                    writeln!(print::err(), "outhaul: waiting: {}", failure.message)?;
                    is_announced = true;
                }
                tokio::time::sleep(LOOK).await;
            }
            opened => return opened,
        }
    }
}

/// The daemon, or this process, with a record of its own for as long as it takes.
async fn of_collection(
    args: &StageArgs,
    control: &ControlArgs,
    scratch: &mut Option<Scratch>,
) -> Result<Client, Failure> {
    let address = DaemonAddress::new(control, &args.state, args.cache.tls.files())?;
    match address.connect().await {
        Ok(daemon) => Ok(daemon),
        Err(refused) => {
            let own = scratch.insert(Scratch::temporary("outhaul-stage-")?);
            let refused = refused.to_string();
            Client::here(&address, &refused, &args.state, Some(own.path()), &args.cache).await
        }
    }
}

async fn stage(args: &StageArgs, client: &mut Client, request: pb::StageRequest) -> Result<u8, Failure> {
    let look = client.asks_progress(&request.progress_id);
    let staging = async {
        let Some((service, _)) = &client.here else {
            return Ok((client.stage(request).await?, None));
        };
        let answered = service.begin_stage(request, &CancellationToken::new()).await?;
        Ok(if args.wait_all {
            (answered.finish().await, None)
        } else {
            (answered.response.clone(), Some(answered))
        })
    };
    let staged: Result<_, Status> = watched("outputs", staging, look).await;
    let (response, rest) = staged.map_err(|status| failure(&status))?;
    let code = show(args, &response)?;
    if let Some(answered) = rest {
        // Nobody else would go on with what is optional.
        let response = answered.finish().await;
        print_failures(&response)?;
    }
    Ok(code)
}

fn show(args: &StageArgs, response: &pb::StageResponse) -> Result<u8, Failure> {
    let mut err = print::err();
    for note in &response.notes {
        writeln!(err, "outhaul: {}", printable(note))?;
    }
    let mut out = print::out();
    for output in &response.outputs {
        if args.json {
            writeln!(out, "{}", output_json(output))?;
        } else if args.dry_run {
            writeln!(
                out,
                "{:8}  {:>10}  {}",
                output.class().name(),
                size(output),
                printable(&output.path)
            )?;
        }
    }
    if args.dry_run {
        return Ok(exit::OK);
    }
    print_failures(response)?;
    let count = |outcome| response.outputs.iter().filter(|o| o.outcome() == outcome).count();
    let pending = match response.pending {
        0 => String::new(),
        n => format!(", {n} optional still downloading"),
    };
    let failed = response.outputs.iter().filter(|o| !o.error.is_empty()).count();
    writeln!(
        err,
        "outhaul: {} downloaded, {} copied, {} already present, {failed} failed{pending}; {} {}",
        count(pb::OutputOutcome::Downloaded),
        count(pb::OutputOutcome::Copied),
        count(pb::OutputOutcome::Present),
        if response.staged {
            "staged in"
        } else {
            "not marked as staged:"
        },
        args.to.display()
    )?;
    Ok(if response.staged { exit::OK } else { exit::FAILED })
}

pub(super) fn print_failures(response: &pb::StageResponse) -> Result<(), Failure> {
    let mut err = print::err();
    let failed: Vec<&pb::StagedOutput> = response.outputs.iter().filter(|o| !o.error.is_empty()).collect();
    for output in failed.iter().take(SHOWN) {
        writeln!(
            err,
            "outhaul: {} ({}): {}",
            printable(&output.exec_path),
            output.class().name(),
            printable(&output.error)
        )?;
    }
    if failed.len() > SHOWN {
        writeln!(err, "outhaul: and {} more", failed.len() - SHOWN)?;
    }
    Ok(())
}

fn size(output: &pb::StagedOutput) -> String {
    match &output.digest {
        Some(digest) => show_size(digest.size),
        None if output.directory => "directory".to_owned(),
        None if output.symlink_target.is_empty() => "-".to_owned(),
        None => "symlink".to_owned(),
    }
}

fn output_json(output: &pb::StagedOutput) -> Value {
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    json!({
        "path": output.path,
        "exec_path": output.exec_path,
        "label": output.label,
        "aspect": some(&output.aspect),
        "output_group": some(&output.output_group),
        "class": output.class().name(),
        "digest": output.digest.as_ref().map(view::digest),
        "size": output.digest.as_ref().map(|d| d.size),
        "symlink_target": some(&output.symlink_target),
        "directory": output.directory,
        "outcome": some(&output.outcome().name()),
        "error": some(&output.error),
    })
}

/// What a status means to a script.
pub(super) fn failure(status: &Status) -> Failure {
    match status.code() {
        tonic::Code::NotFound => Failure::not_found(status.message()),
        tonic::Code::InvalidArgument => Failure::usage(status.message()),
        tonic::Code::FailedPrecondition => Failure::failed(status.message()),
        code => Failure::failed(format!("the daemon answered {code}: {}", status.message())),
    }
}
