//! `outhaul exec`: runs a program of a recorded build, with its runfiles, without the build tool.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use clap::Args;
use rustix::io::Errno;

use super::{
    bare_runtime,
    client::Client,
    exit,
    exit::Failure,
    get::{self, OfBuild, Show, is_target},
    import,
    run::child::{self, Signals},
    runfiles, runtime,
    scratch::Scratch,
    stage::{WhichArgs, failure, print_failures, text},
};
use crate::{
    config::{CacheArgs, ControlArgs, StateArgs},
    control::staging,
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

    /// Copy the program with all that it needs into this directory, as `outhaul stage --runfiles` does, and run it there,
    /// without the workspace and the output base. Created if it does not exist; files that are there are kept
    #[arg(long, value_name = "DIR")]
    to: Option<PathBuf>,

    /// The build in a file that `outhaul export --runfiles` wrote, on any machine. Requires --to
    #[arg(long, value_name = "FILE", requires = "to", conflicts_with_all = ["invocation", "workspace"])]
    from_export: Option<PathBuf>,

    #[command(flatten)]
    state: StateArgs,

    #[command(flatten)]
    cache: CacheArgs,
}

/// A program that is on disk with all that it needs.
struct Ready {
    /// Its absolute path.
    program: String,
    /// The name of the workspace in its runfiles.
    runfiles: String,
    /// The workspace; empty if it is not here.
    workspace: String,
}

/// A state directory for the build in a file, which says what its programs need even if that build is recorded here, too.
struct Apart(Scratch);

impl Apart {
    fn new() -> Result<Self, Failure> {
        Scratch::temporary("outhaul-exec-").map(Self)
    }

    fn state(&self) -> StateArgs {
        StateArgs {
            state_dir: Some(self.0.path().to_owned()),
            control_socket: None,
        }
    }
}

pub(super) fn main(args: &ExecArgs) -> Result<u8, Failure> {
    let ready = match &args.from_export {
        Some(file) => {
            let apart = Apart::new()?;
            let imported = import::take_in(file, &apart.state())?;
            prepare(args, &apart.state(), &imported.header.invocation_id, "")
        }
        None => {
            let (invocation, workspace) = args.which.or_around()?;
            prepare(args, &args.state, &invocation, &workspace)
        }
    };
    run(args, &ready?)
}

fn prepare(args: &ExecArgs, state: &StateArgs, invocation: &str, workspace: &str) -> Result<Ready, Failure> {
    runtime()?.block_on(async {
        let control = ControlArgs::default();
        let found = Client::of_build(&control, state, &args.cache, invocation, workspace).await;
        let bring = async |client: &mut Client| match &args.to {
            Some(directory) => copy(args, directory, client, invocation, workspace).await,
            None => bring(args, client, invocation, workspace).await,
        };
        found?.0.with(bring).await
    })
}

/// The one target that was named.
pub(super) fn target(written: &str) -> Result<pb::StageWish, Failure> {
    let pattern = written.parse::<TargetPattern>();
    let is_one = pattern.is_ok_and(|pattern| pattern.is_exact() && !pattern.is_negative);
    if !is_one {
        return Err(Failure::usage(format!(
            "{written}: name one target, such as //pkg:name"
        )));
    }
    Ok(pb::StageWish {
        targets: vec![written.to_owned()],
        ..pb::StageWish::default()
    })
}

/// Copies the program and its runfiles to a directory.
async fn copy(
    args: &ExecArgs,
    directory: &Path,
    client: &mut Client,
    invocation: &str,
    workspace: &str,
) -> Result<Ready, Failure> {
    let written = args.program.to_str().unwrap_or_default();
    if !is_target(written) {
        return Err(Failure::usage(
            "--to is for targets; name one, such as //pkg:name",
        ));
    }
    let directory = std::path::absolute(directory)?;
    let request = pb::StageRequest {
        invocation_id: invocation.to_owned(),
        workspace: workspace.to_owned(),
        directory: text(&directory, "--to")?,
        wish: Some(pb::StageWish {
            runfiles: true,
            ..target(written)?
        }),
        wait_all: true,
        ..pb::StageRequest::default()
    };
    let staged = match client.stage(request.clone()).await {
        Ok(staged) => {
            print_failures(&staged)?;
            if !staged.staged {
                let message = format!("{written}: not all of it could be copied; it was not run");
                return Err(Failure::failed(message));
            }
            staged
        }
        // Such as without the output base, which a second run does not need.
        Err(status) => match copied_before(client, request).await {
            Some(staged) => staged,
            None => return Err(failure(&status)),
        },
    };
    let path = program_of(written, directory.as_ref(), &staged.outputs)?;
    let (build, _) = client.invocation(&staged.invocation_id).await?;
    let exec_root = Path::new(&build.exec_root).file_name();
    Ok(Ready {
        program: format!("{}/{path}", directory.display()),
        runfiles: exec_root.unwrap_or_default().to_string_lossy().into_owned(),
        workspace: if args.from_export.is_some() {
            String::new()
        } else {
            build.workspace
        },
    })
}

/// What was copied by the same request before, if all of it is there still.
async fn copied_before(client: &mut Client, request: pb::StageRequest) -> Option<pb::StageResponse> {
    let wish = request.wish.clone();
    let directory = request.directory.clone();
    let planned = pb::StageRequest {
        dry_run: true,
        wish: request.wish.map(|wish| pb::StageWish {
            runfiles: false,
            ..wish
        }),
        ..request
    };
    let planned = client.stage(planned).await.ok()?;
    let asked = pb::IsStagedRequest {
        directory,
        invocation_id: planned.invocation_id.clone(),
        wish,
        ..pb::IsStagedRequest::default()
    };
    let answer = staging::is_staged(asked).await.ok()?;
    (answer.staged && answer.complete).then_some(planned)
}

/// Brings the program and its runfiles to disk.
async fn bring(
    args: &ExecArgs,
    client: &mut Client,
    invocation: &str,
    workspace: &str,
) -> Result<Ready, Failure> {
    let written = args.program.to_str().unwrap_or_default();
    let (mut of_build, mut newer) = (None, None);
    let path = if is_target(written) {
        let wish = target(written)?;
        let (build, outputs) = get::of_targets(client, wish, invocation, workspace).await?;
        let exec_path = program_of(written, build.exec_root.as_ref(), &outputs)?;
        let path = format!("{}/{exec_path}", build.exec_root);
        newer = client.newer_of_root(&build).await?;
        of_build = Some(OfBuild::new(&build, outputs));
        path
    } else if args.which.is_given() {
        let message = "--invocation and --workspace are for targets; a path says itself which build it is of";
        return Err(Failure::usage(message));
    } else {
        get::resolved(std::slice::from_ref(&args.program))?.remove(0)
    };
    let (code, there) = get::get(client, &[path], of_build.as_ref(), Show::Failures).await?;
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
    if let (Some(newer), true) = (newer, needed.programs > 0) {
        return Err(Failure::usage(format!(
            "{written}: build {newer} of the same output root is newer, and may have changed what the program needs at run \
             time; build it again"
        )));
    }
    let code = needed.get(client, &there, Show::Failures).await?;
    if code != exit::OK {
        return Err(failed(code));
    }
    let (build, _) = client.invocation(&program.invocation_id).await?;
    let exec_root = Path::new(&program.exec_root).file_name();
    Ok(Ready {
        program: program.absolute_path(),
        runfiles: exec_root.unwrap_or_default().to_string_lossy().into_owned(),
        workspace: build.workspace,
    })
}

/// Which of a target's outputs is its program: the one beside which Bazel has put a manifest of runfiles, or that has the
/// target's name, or the only one.
fn program_of<'a>(label: &str, root: &Path, outputs: &'a [pb::StagedOutput]) -> Result<&'a str, Failure> {
    let name = label.rsplit([':', '/']).next().unwrap_or(label);
    let opened = OutputRoot::open(root, false).ok();
    // What is staged has the files themselves, and no manifest.
    let has_manifest = |path: &&str| {
        let is_staged = || {
            outputs.iter().any(|output| is_runfile_of(output, path))
                || root.join(format!("{path}.runfiles")).is_dir()
        };
        opened
            .as_ref()
            .is_some_and(|opened| opened.has_runfiles_manifest(path))
            || is_staged()
    };
    let paths: Vec<&str> = outputs
        .iter()
        .filter(|output| !output.path.contains(".runfiles/"))
        .map(|output| output.exec_path.as_str())
        .collect();
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

/// Whether an output was staged as a runfile of the program at a path.
fn is_runfile_of(output: &pb::StagedOutput, program: &str) -> bool {
    let below = output.path.strip_prefix(program);
    below.is_some_and(|below| below.starts_with(".runfiles/"))
}

/// What a file is to the system. All outputs are executable for Bazel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// It begins with `#!`.
    Script,
    /// A program.
    Elf(Machine),
    /// A shell would take each line for a command.
    Other,
}

/// What an ELF file says it is for: 32 or 64 bits, the order of bytes, and the number of the machine.
type Machine = [u8; 4];

fn kind(path: &Path) -> io::Result<Kind> {
    let mut begin = Vec::new();
    File::open(path)?.take(20).read_to_end(&mut begin)?;
    Ok(match *begin {
        [b'#', b'!', ..] => Kind::Script,
        // Not what is still to be linked.
        [0x7f, b'E', b'L', b'F', class, order, .., low, high, first, second]
            if begin.len() == 20 && matches!(low.max(high), 2 | 3) =>
        {
            Kind::Elf([class, order, first, second])
        }
        _ => Kind::Other,
    })
}

/// The name of such a machine.
fn machine_name(machine: Machine) -> String {
    const BIG_ENDIAN: u8 = 2;
    let [_, order, first, second] = machine;
    let number = match order {
        BIG_ENDIAN => u16::from_be_bytes([first, second]),
        _ => u16::from_le_bytes([first, second]),
    };
    let name = match number {
        3 => "i386",
        20 => "ppc",
        21 => "ppc64",
        22 => "s390x",
        40 => "arm",
        62 => "x86_64",
        183 => "aarch64",
        243 => "riscv",
        258 => "loongarch",
        other => return format!("the ELF machine {other}"),
    };
    name.to_owned()
}

/// Runs the program in the place of this process, which returns only if that fails; one for another kind of machine as its
/// child.
fn run(args: &ExecArgs, ready: &Ready) -> Result<u8, Failure> {
    let program = &ready.program;
    let path: &Path = program.as_ref();
    let its = kind(path);
    if matches!(its, Ok(Kind::Other)) {
        let message =
            format!("{program}: it is neither an ELF file nor a script that begins with #!; it was not run");
        return Err(Failure::new(exit::NOT_RUN, message));
    }
    let mut command = command(args, ready);
    match (its, kind("/proc/self/exe".as_ref())) {
        (Ok(Kind::Elf(its)), Ok(Kind::Elf(ours))) if its != ours => run_foreign(command, program, its),
        _ => {
            open_files::lower();
            Err(not_run(program, &command.exec()))
        }
    }
}

/// Runs a program of another machine, for which there may be an emulator. If there is none, `exec` of the C library would have
/// a shell read the program, which a child does not.
fn run_foreign(command: Command, program: &str, machine: Machine) -> Result<u8, Failure> {
    bare_runtime()?.block_on(async {
        let mut signals = Signals::listen()?;
        open_files::lower();
        let started = tokio::process::Command::from(command).spawn();
        let mut child = started.map_err(|error| match error.raw_os_error() {
            Some(errno) if errno == Errno::NOEXEC.raw_os_error() => {
                let message = format!(
                    "{program}: this machine cannot run it, as it was built for {}; run it on such a machine, or install an \
                     emulator and register it with binfmt_misc",
                    machine_name(machine)
                );
                Failure::new(exit::NOT_RUN, message)
            }
            _ => not_run(program, &error),
        })?;
        Ok(child::code(signals.see_through(&mut child, |_| {}).await?))
    })
}

/// Why a program that is there was not started.
fn not_run(program: &str, error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::NotFound if Path::new(program).exists() => Failure::new(
            exit::NO_COMMAND,
            format!("{program}: the interpreter or loader that it names does not exist on this machine"),
        ),
        io::ErrorKind::NotFound => Failure::new(exit::NO_COMMAND, format!("{program}: {error}")),
        _ => Failure::new(exit::NOT_RUN, format!("{program}: {error}")),
    }
}

/// How the program is run.
fn command(args: &ExecArgs, ready: &Ready) -> Command {
    let program = &ready.program;
    let mut command = Command::new(program);
    command.args(&args.args);
    // As `bazel run` does it.
    for inherited in [
        "BUILD_WORKSPACE_DIRECTORY",
        "JAVA_RUNFILES",
        "RUNFILES_DIR",
        "RUNFILES_MANIFEST_FILE",
        "RUNFILES_MANIFEST_ONLY",
        "TEST_SRCDIR",
    ] {
        command.env_remove(inherited);
    }
    if !ready.workspace.is_empty() {
        command.env("BUILD_WORKSPACE_DIRECTORY", &ready.workspace);
    }
    if let Ok(here) = std::env::current_dir() {
        command.env("BUILD_WORKING_DIRECTORY", here);
    }
    let tree = PathBuf::from(format!("{program}.runfiles")).join(&ready.runfiles);
    let manifest = PathBuf::from(format!("{program}.runfiles_manifest"));
    if tree.is_dir() {
        command.env("PWD", &tree).current_dir(tree);
    } else if manifest.is_file() {
        // Bazel has made no links, and would make them now.
        command.env("RUNFILES_MANIFEST_FILE", &manifest);
    }
    command
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: ExecArgs,
    }

    #[test]
    fn a_program_starts_in_its_runfiles_and_is_told_so() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("app.runfiles/_main");
        std::fs::create_dir_all(&tree).unwrap();
        let ready = Ready {
            program: dir.path().join("app").display().to_string(),
            runfiles: "_main".to_owned(),
            workspace: "/w".to_owned(),
        };
        let Line { args } = Line::parse_from(["exec", "//:app"]);
        let command = command(&args, &ready);
        assert_eq!(command.get_current_dir(), Some(&*tree));
        for (name, value) in [
            ("PWD", Some(tree.as_os_str())),
            ("BUILD_WORKSPACE_DIRECTORY", Some("/w".as_ref())),
            ("RUNFILES_DIR", None),
        ] {
            let set = command.get_envs().find(|(set, _)| *set == name);
            assert_eq!(set.and_then(|(_, value)| value), value, "{name}");
        }
    }

    #[test]
    fn data_is_no_program_and_a_program_says_what_it_is_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let elf = |header: &[u8]| [b"\x7fELF", header, &[0; 16]].concat()[..20].to_vec();
        let of_type = |what: u8| [&elf(&[2, 1])[..16], &[what, 0, 183, 0]].concat();
        for (bytes, expected) in [
            (b"#!/bin/sh\n".to_vec(), Kind::Script),
            (b"#!".to_vec(), Kind::Script),
            (of_type(2), Kind::Elf([2, 1, 183, 0])),
            (of_type(3), Kind::Elf([2, 1, 183, 0])),
            (of_type(1), Kind::Other),
            (elf(&[1, 2])[..19].to_vec(), Kind::Other),
            (b"rm -rf x\n".to_vec(), Kind::Other),
            (b"PK\x03\x04".to_vec(), Kind::Other),
            (b"#".to_vec(), Kind::Other),
            (Vec::new(), Kind::Other),
        ] {
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(kind(&path).unwrap(), expected, "{bytes:?}");
        }
        for (machine, name) in [
            ([2, 1, 183, 0], "aarch64"),
            ([2, 2, 0, 22], "s390x"),
            ([1, 1, 0, 1], "the ELF machine 256"),
        ] {
            assert_eq!(machine_name(machine), name);
        }
        let own = kind("/proc/self/exe".as_ref()).unwrap();
        assert!(
            matches!(own, Kind::Elf([_, _, machine, other]) if machine != other),
            "{own:?}"
        );
    }

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
            match (program_of(label, root.as_ref(), &outputs), program) {
                (Ok(found), Ok(program)) => assert_eq!(found, program, "{label}"),
                (Err(failure), Err(message)) => {
                    assert!(failure.message.contains(message), "{label}: {}", failure.message);
                }
                (found, _) => panic!("{label}: {found:?}"),
            }
        }
    }
}
