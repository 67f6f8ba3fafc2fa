//! `outhaul exec`: runs a program of a recorded build, with its runfiles, without the build tool.

use std::{
    ffi::OsString,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
};

use clap::Args;

use super::{
    client::Client,
    exit,
    exit::Failure,
    get::{self, Show, is_target},
    runfiles, runtime,
    stage::WhichArgs,
    view,
};
use crate::{
    config::{CacheArgs, ControlArgs, StateArgs},
    invocation::pattern::TargetPattern,
    materialize::place::OutputRoot,
    open_files,
    proto::outhaul::v1 as pb,
};

/// How many outputs a message names.
const SHOWN: usize = 5;

/// Arguments of `outhaul exec`.
#[derive(Debug, Args)]
pub(super) struct ExecArgs {
    /// The program: a target (//pkg:name), or its path (bazel-bin/pkg/name)
    #[arg(value_name = "TARGET|PATH")]
    program: PathBuf,

    /// Arguments of the program
    #[arg(value_name = "ARG", last = true)]
    args: Vec<OsString>,

    #[command(flatten)]
    which: WhichArgs,

    #[command(flatten)]
    state: StateArgs,

    #[command(flatten)]
    cache: CacheArgs,
}

/// A program that is on disk with all that it needs.
struct Ready {
    program: pb::Output,
    build: pb::Invocation,
}

pub(super) fn main(args: &ExecArgs) -> Result<u8, Failure> {
    let (invocation, workspace) = args.which.or_around()?;
    let ready = runtime()?.block_on(async {
        let control = ControlArgs::default();
        let found = Client::of_build(&control, &args.state, &args.cache, &invocation, &workspace).await;
        let bring = async |client: &mut Client| bring(args, client, &invocation, &workspace).await;
        found?.0.with(bring).await
    })?;
    Err(run(args, &ready))
}

/// Brings the program and its runfiles to disk.
async fn bring(
    args: &ExecArgs,
    client: &mut Client,
    invocation: &str,
    workspace: &str,
) -> Result<Ready, Failure> {
    let written = args.program.to_str().unwrap_or_default();
    let path = if is_target(written) {
        let pattern = written.parse::<TargetPattern>();
        let is_one = pattern.is_ok_and(|pattern| pattern.is_exact() && !pattern.is_negative);
        if !is_one {
            return Err(Failure::usage(format!(
                "{written}: name one target, such as //pkg:name"
            )));
        }
        let wish = pb::StageWish {
            targets: vec![written.to_owned()],
            ..pb::StageWish::default()
        };
        let (build, outputs) = get::of_targets(client, wish, invocation, workspace).await?;
        let exec_path = program_of(written, &build.exec_root, &outputs)?;
        format!("{}/{exec_path}", build.exec_root)
    } else if args.which.is_given() {
        let message = "--invocation and --workspace are for targets; a path says itself which build it is of";
        return Err(Failure::usage(message));
    } else {
        get::resolved(std::slice::from_ref(&args.program))?.remove(0)
    };
    let (code, there) = get::get(client, &[path], Show::Failures).await?;
    let failed = |code| {
        Failure::new(
            code,
            format!("{written}: not all of it is on disk; it was not run"),
        )
    };
    if code != exit::OK {
        return Err(failed(code));
    }
    let [program] = &*there else {
        return Err(Failure::usage(format!(
            "{written}: a directory cannot be run; name one file"
        )));
    };
    let needed = runfiles::of(client, &there).await?;
    let code = needed.get(client, &there, Show::Failures).await?;
    if code != exit::OK {
        return Err(failed(code));
    }
    let (build, _) = client.invocation(&program.invocation_id).await?;
    Ok(Ready {
        program: program.clone(),
        build,
    })
}

/// Which of a target's outputs is its program: the one beside which Bazel has put a manifest of runfiles, or that has the
/// target's name, or the only one.
fn program_of<'a>(label: &str, exec_root: &str, outputs: &'a [pb::StagedOutput]) -> Result<&'a str, Failure> {
    let name = label.rsplit([':', '/']).next().unwrap_or(label);
    let root = OutputRoot::open(Path::new(exec_root), false).ok();
    let has_manifest = |path: &&str| root.as_ref().is_some_and(|root| root.has_runfiles_manifest(path));
    let paths: Vec<&str> = outputs.iter().map(|output| output.exec_path.as_str()).collect();
    let is_named = |path: &&str| path.rsplit('/').next() == Some(name);
    let with_manifest: Vec<&str> = paths.iter().copied().filter(has_manifest).collect();
    let named: Vec<&str> = paths.iter().copied().filter(is_named).collect();
    for candidates in [&with_manifest, &named, &paths] {
        if let [path] = **candidates {
            return Ok(path);
        }
    }
    Err(match paths.first() {
        None => Failure::not_found(format!("{label}: the build has no outputs of it")),
        Some(_) => {
            let several = [with_manifest, named, paths]
                .into_iter()
                .find(|found| !found.is_empty());
            let several = several.unwrap_or_default();
            let shown = several.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ");
            Failure::usage(format!(
                "{label}: {} of its outputs may be its program; give the path of one: {shown}",
                several.len()
            ))
        }
    })
}

/// Runs the program in the place of this process. Returns only if that fails.
fn run(args: &ExecArgs, ready: &Ready) -> Failure {
    let program = view::absolute(&ready.program);
    let mut command = open_files::command(program.as_ref()).into_std();
    command.args(&args.args);
    // As `bazel run` does it.
    for inherited in [
        "JAVA_RUNFILES",
        "RUNFILES_DIR",
        "RUNFILES_MANIFEST_FILE",
        "RUNFILES_MANIFEST_ONLY",
        "TEST_SRCDIR",
    ] {
        command.env_remove(inherited);
    }
    command.env("BUILD_WORKSPACE_DIRECTORY", &ready.build.workspace);
    if let Ok(here) = std::env::current_dir() {
        command.env("BUILD_WORKING_DIRECTORY", here);
    }
    let workspace = Path::new(&ready.program.exec_root)
        .file_name()
        .unwrap_or_default();
    let tree = PathBuf::from(format!("{program}.runfiles")).join(workspace);
    let manifest = PathBuf::from(format!("{program}.runfiles_manifest"));
    if tree.is_dir() {
        command.current_dir(tree);
    } else if manifest.is_file() {
        // Bazel has made no links, and would make them now.
        command.env("RUNFILES_MANIFEST_FILE", &manifest);
    }
    let error = command.exec();
    let code = match error.kind() {
        std::io::ErrorKind::NotFound => exit::NO_COMMAND,
        _ => exit::NOT_RUN,
    };
    Failure::new(code, format!("{program}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_targets_program_has_a_manifest_or_its_name_or_is_alone() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_str().unwrap();
        std::fs::create_dir_all(dir.path().join("bin/link.sh.runfiles")).unwrap();
        for manifest in ["bin/go_/go.runfiles_manifest", "bin/link.sh.runfiles/MANIFEST"] {
            std::fs::create_dir_all(dir.path().join(manifest).parent().unwrap()).unwrap();
            std::fs::write(dir.path().join(manifest), "").unwrap();
        }
        for (label, outputs, program) in [
            ("//p:go", &["bin/go.h", "bin/go_/go"][..], Ok("bin/go_/go")),
            ("//p:link", &["bin/link.txt", "bin/link.sh"], Ok("bin/link.sh")),
            ("//p/x", &["bin/x.jar", "bin/x"], Ok("bin/x")),
            ("//p:sub/x", &["bin/sub/x", "bin/x.params"], Ok("bin/sub/x")),
            ("//p:other", &["bin/x"], Ok("bin/x")),
            (
                "//p:x",
                &["bin/k8/x", "bin/arm/x", "bin/y"],
                Err("2 of its outputs may be its program; give the path of one: bin/k8/x, bin/arm/x"),
            ),
            ("//p:z", &["bin/a", "bin/b"], Err("2 of its outputs")),
            ("//p:none", &[], Err("no outputs")),
        ] {
            let outputs: Vec<_> = outputs
                .iter()
                .map(|path| pb::StagedOutput {
                    exec_path: (*path).to_owned(),
                    ..pb::StagedOutput::default()
                })
                .collect();
            match (program_of(label, root, &outputs), program) {
                (Ok(found), Ok(program)) => assert_eq!(found, program, "{label}"),
                (Err(failure), Err(message)) => {
                    assert!(failure.message.contains(message), "{label}: {}", failure.message);
                }
                (found, _) => panic!("{label}: {found:?}"),
            }
        }
    }
}
