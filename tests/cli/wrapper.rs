//! `dist/bazel/tools/bazel`, in front of a Bazel that only prints its arguments.

use std::{path::PathBuf, process::Command, time::Duration};

use outhaul::digest::{Digest, DigestFunction};
use outhaul_testkit::{Ran, Running, clean, finish};
use tokio::net::TcpListener;

use crate::support::{World, install, program};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/dist/bazel/tools/bazel");

struct Wrapper {
    dir: tempfile::TempDir,
}

impl Wrapper {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("real bazel");
        // Prints its arguments, and has an exit code of its own.
        program(
            &path,
            "#!/bin/sh\nfor arg; do printf '<%s>' \"$arg\"; done\nexit 37\n",
        );
        Self { dir }
    }

    async fn ran(&self, bes: &str, args: &[&str], variables: &[(&str, &str)]) -> Ran {
        let mut command = clean(Command::new(SCRIPT));
        command
            .args(args)
            .env("BAZEL_REAL", self.dir.path().join("real bazel"))
            .env("OUTHAUL_BES", bes)
            .envs(variables.iter().copied());
        finish(command).await
    }

    /// What Bazel was given.
    async fn given(&self, bes: &str, args: &[&str]) -> String {
        self.given_with(bes, args, &[]).await
    }

    async fn given_with(&self, bes: &str, args: &[&str], variables: &[(&str, &str)]) -> String {
        let ran = self.ran(bes, args, variables).await.expect(37);
        assert_eq!(ran.err, "", "nothing is said");
        ran.out()
    }
}

fn shown(args: &[&str]) -> String {
    args.iter().map(|arg| format!("<{arg}>")).collect()
}

/// A listener where nobody is.
async fn closed() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("grpc://{}", listener.local_addr().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn building_commands_get_the_flags_after_their_options() {
    let (world, wrapper) = (World::new().await, Wrapper::new());
    let server = world.serve(&[]).await;
    let address = server.address();
    let backend = format!("--bes_backend={address}");
    let flags = [backend.as_str()];
    for (before, after) in [
        (vec!["build", "//a b", "", "--x= y", "*"], vec!["--", "-//c"]),
        (vec!["--batch", "test", "//...", "--config=late"], vec![]),
        (
            vec!["--output_base", "build", "run", "//a"],
            vec!["--", "--bes_backend=x", "build"],
        ),
        (
            vec!["--bazelrc=x", "--host_jvm_args", "-Xmx1g", "coverage"],
            vec![],
        ),
    ] {
        let args = [&before[..], &after[..]].concat();
        let expected = shown(&[&before[..], &flags[..], &after[..]].concat());
        assert_eq!(wrapper.given(address, &args).await, expected);
        let bare = address.strip_prefix("grpc://").unwrap();
        let given = wrapper.given(bare, &args).await;
        assert_eq!(given, expected, "without a scheme");
    }
}

/// Bazel's downloads are only taken away where somebody asks for it, and never a mode that the command has.
#[tokio::test(flavor = "multi_thread")]
async fn the_download_mode_is_the_commands_own_unless_the_environment_says_otherwise() {
    let (world, wrapper) = (World::new().await, Wrapper::new());
    let server = world.serve(&[]).await;
    let address = server.address();
    let backend = format!("--bes_backend={address}");
    let asked = [("OUTHAUL_DOWNLOAD_MINIMAL", "1")];
    for (args, added) in [
        (vec!["build", "//a"], true),
        (vec!["test", "//a"], true),
        (vec!["build", "//a", "--remote_download_all"], false),
        (vec!["build", "--remote_download_outputs=toplevel", "//a"], false),
        // What is run must be there before our turn comes.
        (vec!["run", "//a"], false),
    ] {
        let more: &[&str] = if added {
            &["--remote_download_minimal"]
        } else {
            &[]
        };
        let expected = shown(&[&args[..], &[&backend], more].concat());
        assert_eq!(wrapper.given_with(address, &args, &asked).await, expected);
        let expected = shown(&[&args[..], &[&backend]].concat());
        assert_eq!(wrapper.given(address, &args).await, expected);
        let off = [("OUTHAUL_DOWNLOAD_MINIMAL", "0")];
        assert_eq!(wrapper.given_with(address, &args, &off).await, expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_commands_and_events_for_others_are_left_alone() {
    let (world, wrapper) = (World::new().await, Wrapper::new());
    let server = world.serve(&[]).await;
    for args in [
        vec![],
        vec!["info"],
        vec!["clean", "--expunge"],
        vec!["help", "build"],
        vec!["--output_base", "build", "shutdown"],
        vec!["query", "build"],
        vec!["--version"],
        vec!["build", "--bes_backend=grpc://elsewhere", "//a"],
        vec!["build", "--bes_backend", "", "//a"],
    ] {
        assert_eq!(wrapper.given(server.address(), &args).await, shown(&args));
    }
    let disabled = [("OUTHAUL_DISABLE", "1")];
    let ran = wrapper.ran(server.address(), &["build", "//a"], &disabled).await;
    assert_eq!(ran.expect(37).out(), shown(&["build", "//a"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_daemon_bazel_runs_as_it_was_called() {
    let wrapper = Wrapper::new();
    let args = ["build", "//a"];
    for bes in [
        closed().await.as_str(),
        "grpc://127.0.0.1",
        "grpcs://127.0.0.1:1",
        "grpc://no.such.host.invalid:1",
        "nonsense",
        "127.0.0.1:$(touch /tmp/x)",
        "unix:/nowhere/at/all",
        "unix:",
    ] {
        assert_eq!(wrapper.given(bes, &args).await, shown(&args), "{bes}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_speaks_something_else_is_no_daemon() {
    let wrapper = Wrapper::new();
    let args = ["build", "//a"];
    for answer in [
        None,
        Some("HTTP/1.1 400 Bad Request\r\n\r\n"),
        Some("220 mail.example ESMTP\r\n"),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("grpc://{}", listener.local_addr().unwrap());
        // Accepts, perhaps says something, and never closes.
        let server = tokio::spawn(async move {
            let mut open = Vec::new();
            while let Ok((mut socket, _)) = listener.accept().await {
                if let Some(answer) = answer {
                    let _ = tokio::io::AsyncWriteExt::write_all(&mut socket, answer.as_bytes()).await;
                }
                open.push(socket);
            }
        });
        let given = tokio::time::timeout(Duration::from_secs(30), wrapper.given(&address, &args)).await;
        assert_eq!(given.expect("it is not waited for"), shown(&args), "{answer:?}");
        server.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unix_sockets_are_reached_by_bazels_proxy_flag() {
    let (world, wrapper) = (World::new().await, Wrapper::new());
    let path = world.path("b.sock");
    let server = world.serve(&[&format!("--bes-listen=unix:{path}")]).await;
    let args = ["build", "//a"];
    let proxy = format!("--bes_proxy=unix:{path}");
    let expected = shown(&["build", "//a", "--bes_backend=grpc://localhost", &proxy]);
    let has = |tool: &str| {
        let found = std::process::Command::new("sh")
            .args(["-c", &format!("command -v {tool}")])
            .output();
        found.unwrap().status.success()
    };
    if has("perl") || has("python3") {
        for bes in [format!("unix:{path}"), format!("unix://{path}")] {
            assert_eq!(wrapper.given(&bes, &args).await, expected);
        }
    }
    // Killed, it leaves the socket's file behind.
    server.signal(rustix::process::Signal::KILL);
    drop(server);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(std::path::Path::new(&path).exists());
    assert_eq!(wrapper.given(&format!("unix:{path}"), &args).await, shown(&args));
}

#[tokio::test]
async fn run_by_hand_it_says_what_is_missing() {
    let ran = finish(clean(Command::new(SCRIPT))).await;
    ran.says(2, &["BAZEL_REAL"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shipped_units_are_well_formed_and_their_command_line_is_a_daemons() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/check-units");
    finish(clean(Command::new(script))).await.expect(0);
    let unit = concat!(env!("CARGO_MANIFEST_DIR"), "/dist/systemd/outhaul.service");
    let unit = std::fs::read_to_string(unit).unwrap();
    let start = unit
        .lines()
        .find_map(|line| line.strip_prefix("ExecStart="))
        .unwrap();
    let args: Vec<&str> = start.split(' ').skip(1).collect();
    let world = World::new().await;
    let mut command = crate::support::outhaul();
    command
        .args(args)
        .args(["--bes-listen=127.0.0.1:0", "--admin-listen=none"])
        .args([world.state(), world.cache_flag()]);
    let server = Running::serve(command).await;
    world.play(&world.build, server.address()).await;
    world.assert_complete();
}

/// A repository with `tools/bazel` and the checksum of a program that prints its arguments, and where that is installed.
struct Pinned {
    wrapper: Wrapper,
    pins: PathBuf,
    installed: PathBuf,
}

impl Pinned {
    fn new(text: &str) -> Self {
        let wrapper = Wrapper::new();
        let dir = wrapper.dir.path();
        let sum = Digest::of(DigestFunction::Sha256, text.as_bytes()).hash_hex();
        let installed = dir.join("outhaul").join(&sum).join("outhaul");
        std::fs::create_dir_all(installed.parent().unwrap()).unwrap();
        program(&installed, text);
        let tools = dir.join("tools");
        std::fs::create_dir(&tools).unwrap();
        install(SCRIPT.as_ref(), tools.join("bazel"));
        let pins = tools.join("outhaul.sha256");
        let other = "0".repeat(64);
        let text = format!("{other}  plan9-mips\n{sum}  linux-{}\n", std::env::consts::ARCH);
        std::fs::write(&pins, text).unwrap();
        Self {
            wrapper,
            pins,
            installed,
        }
    }

    async fn ran(&self, args: &[&str], variables: &[(&str, &str)]) -> Ran {
        let dir = self.wrapper.dir.path();
        let mut command = clean(Command::new(dir.join("tools/bazel")));
        command
            .args(args)
            .env("BAZEL_REAL", dir.join("real bazel"))
            .env("XDG_CACHE_HOME", dir)
            .envs(variables.iter().copied());
        finish(command).await
    }

    /// Bazel has run as it was called, and something was said.
    async fn is_passed_over(&self, said: &str) {
        let args = ["build", "//a"];
        let ran = self.ran(&args, &[]).await;
        let ran = ran.says(37, &["running Bazel without the pinned Outhaul", said]);
        assert_eq!(ran.out(), shown(&args));
    }
}

/// Stands for Outhaul.
const OUTHAUL: &str = "#!/bin/sh\n[ \"$1\" = profiles ] && exit\nprintf 'outhaul: '\nfor arg; do printf '<%s>' \"$arg\"; done\nexit 38\n";

#[tokio::test(flavor = "multi_thread")]
async fn commands_that_build_run_under_the_pinned_program() {
    let pinned = Pinned::new(OUTHAUL);
    let bazel = pinned.wrapper.dir.path().join("real bazel");
    for args in [
        vec!["build", "//a b", ""],
        vec!["--output_base", "build", "run", "//a", "--", "x"],
        // `outhaul run` forwards events.
        vec!["test", "--bes_backend=grpc://elsewhere", "//a"],
    ] {
        let ran = pinned.ran(&args, &[]).await.expect(38);
        let given = [&["run", "--", bazel.to_str().unwrap()][..], &args[..]].concat();
        assert_eq!(ran.out(), format!("outhaul: {}", shown(&given)));
    }
    for (args, variables) in [
        (&["info"][..], &[][..]),
        (&["build", "//a"][..], &[("OUTHAUL_DISABLE", "1")][..]),
    ] {
        let ran = pinned.ran(args, variables).await.expect(37);
        assert_eq!((ran.out(), ran.err.as_str()), (shown(args), ""));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bazel_runs_alone_and_that_is_said_without_exactly_the_pinned_program() {
    let pinned = Pinned::new(OUTHAUL);
    program(&pinned.installed, &format!("{OUTHAUL}\n"));
    pinned.is_passed_over("is another one").await;
    std::fs::remove_file(&pinned.installed).unwrap();
    pinned.is_passed_over("bazel run @outhaul//:wrapper").await;
    for pins in ["", "\n", &format!("{}  plan9-mips\n", "0".repeat(64))] {
        std::fs::write(&pinned.pins, pins).unwrap();
        pinned.is_passed_over("has none for linux-").await;
    }
    // The right one, whose user has a setting that it does not know.
    let unfit = "#!/bin/sh\necho config.toml: new: unknown setting >&2\nexit 2\n";
    Pinned::new(unfit).is_passed_over("new: unknown setting").await;
    // The right one, which does not start.
    let pinned = Pinned::new("\x7fELF\0\0");
    let args = ["build", "//a"];
    let ran = pinned.ran(&args, &[]).await.says(37, &["cannot execute"]);
    assert_eq!(ran.out(), shown(&args));
}

#[tokio::test]
async fn a_tools_bazel_of_another_kind_is_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let theirs = dir.path().join("tools/bazel");
    std::fs::create_dir(dir.path().join("tools")).unwrap();
    std::fs::write(&theirs, "#!/bin/sh\n").unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/dist/bazel/install");
    let mut command = clean(Command::new(script));
    command
        .env("BUILD_WORKSPACE_DIRECTORY", dir.path())
        .env("OUTHAUL_BINARIES", "linux-x86_64/here/outhaul")
        .env("OUTHAUL_WRAPPER", SCRIPT);
    finish(command)
        .await
        .says(1, &["tools/bazel", "is not Outhaul's"]);
    assert_eq!(std::fs::read_to_string(&theirs).unwrap(), "#!/bin/sh\n");
}
