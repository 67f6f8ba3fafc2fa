//! `outhaul run`: the command's own code, its signals, its limits, and another `outhaul run` inside.

use std::{os::unix::process::CommandExt as _, process::Command, time::Duration};

use outhaul::digest::Digest;
use outhaul_testkit::{Running, clean, finish, until};
use rustix::process::Signal;

use crate::support::{World, outhaul, program, run};

/// A program of this text.
fn script(world: &World, name: &str, text: &str) -> String {
    let path = world.path(name);
    program(&path, text);
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_cannot_be_run_is_reported_as_by_a_shell_and_never_called_a_bug() {
    let world = World::new().await;
    let plain = world.path("plain");
    std::fs::write(&plain, "echo x").unwrap();
    let binary = script(&world, "binary", "\u{7f}ELF\0\0nothing of the kind");
    let lost = script(&world, "lost", "#!/nonexistent/interpreter\n");
    let directory = world.dir.path().display().to_string();
    // The faults were of a race with the process's end.
    for _ in 0..5 {
        for (command, code, part) in [
            ("/nonexistent", 127, "command not found"),
            ("no-such-command-anywhere", 127, "command not found"),
            ("", 127, "command not found"),
            (&*lost, 127, "interpreter"),
            (&*plain, 126, "ermission denied"),
            (&*directory, 126, "is a directory"),
            (&*binary, 126, "xec format"),
        ] {
            let ran = run(["run", &world.state(), "--", command]).await.expect(code);
            assert!(
                ran.err.contains(part) && ran.err.contains("failed to run"),
                "{}",
                ran.err
            );
            assert_eq!(ran.err.lines().count(), 1, "{}", ran.err);
        }
    }
    let script = script(&world, "script", "echo \"$1\"; exit 9\n");
    let ran = run(["run", &world.state(), "--", &script, "a b"]).await.expect(9);
    assert_eq!(
        ran.out(),
        "a b\n",
        "a script without a first line for the system is one of the shell's"
    );
    run(["run", &world.state(), "--", "sh", "-c", "kill -9 $$"])
        .await
        .expect(137);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_has_the_limit_of_open_files_that_it_would_have_alone() {
    let world = World::new().await;
    let shown = script(&world, "shown", "#!/bin/sh\nulimit -S -n; ulimit -H -n\n");
    let mut alone = Command::new("sh");
    alone.args(["-c", &format!("ulimit -S -n 256; exec {shown}")]);
    let expected = finish(clean(alone)).await.expect(0).out();
    assert!(expected.starts_with("256\n"));
    let mut command = Command::new("sh");
    command.args([
        "-c",
        &format!(
            "ulimit -S -n 256; exec '{}' run {} -- {shown}",
            env!("CARGO_BIN_EXE_outhaul"),
            world.state()
        ),
    ]);
    assert_eq!(finish(clean(command)).await.expect(0).out(), expected);
}

/// `outhaul run` of a command that lives until it is told to end, and reports signals.
async fn living(world: &World, before: &str) -> (Running, String) {
    let reported = world.path("told");
    let _ = std::fs::remove_file(&reported);
    let text = format!(
        "#!/bin/bash\nfor s in HUP INT QUIT TERM USR1 USR2 ALRM; do trap \"echo $s >> '{reported}'; exit 33\" $s; done\n\
         trap 'echo CONT >> {reported}' CONT\necho $$ > '{reported}.part'; mv '{reported}.part' '{reported}.pid'\n\
         while :; do sleep 0.05; done\n"
    );
    let living = script(world, "living", &text);
    let _ = std::fs::remove_file(format!("{reported}.pid"));
    // What runs the tests may ignore signals itself, as behind `nohup` or in a shell's background.
    let mut command = Command::new("env");
    command.args([
        "--default-signal=HUP,INT,QUIT,TERM,USR1,USR2,ALRM",
        "sh",
        "-c",
        &format!(
            "{before} exec '{}' run {} -- {living}",
            env!("CARGO_BIN_EXE_outhaul"),
            world.state()
        ),
    ]);
    let mut command = clean(command);
    // A group of its own, which is in no terminal's foreground.
    command.process_group(0);
    let child = Running::start(command);
    let pid = format!("{reported}.pid");
    until("the command", async || std::path::Path::new(&pid).exists()).await;
    (child, reported)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_for_run_alone_reaches_the_command_which_is_never_left_behind() {
    let world = World::new().await;
    for (signal, name) in [
        (Signal::HUP, "HUP"),
        (Signal::INT, "INT"),
        (Signal::QUIT, "QUIT"),
        (Signal::TERM, "TERM"),
        (Signal::USR1, "USR1"),
        (Signal::USR2, "USR2"),
        (Signal::ALARM, "ALRM"),
    ] {
        let (mut child, reported) = living(&world, "").await;
        child.signal(signal);
        assert_eq!(child.end().await, Some(33), "{name}");
        assert_eq!(std::fs::read_to_string(&reported).unwrap(), format!("{name}\n"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_run_was_started_to_ignore_stays_ignored() {
    let world = World::new().await;
    let (mut child, reported) = living(&world, "trap '' HUP;").await;
    child.signal(Signal::HUP);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!std::path::Path::new(&reported).exists());
    child.signal(Signal::TERM);
    assert_eq!(child.end().await, Some(33));
}

#[tokio::test(flavor = "multi_thread")]
async fn run_stops_with_its_command_and_goes_on_with_it() {
    let world = World::new().await;
    let (mut child, reported) = living(&world, "").await;
    let command: String = std::fs::read_to_string(format!("{reported}.pid")).unwrap();
    let state = |pid: &str| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit(") ").next().unwrap().chars().next().unwrap()
    };
    let run = child.id().to_string();
    let stopped = [run.as_str(), command.trim()];
    child.signal(Signal::TSTP);
    until("both are stopped", async || {
        stopped.iter().all(|pid| state(pid) == 'T')
    })
    .await;
    child.signal(Signal::CONT);
    until("both go on", async || stopped.iter().all(|pid| state(pid) != 'T')).await;
    child.signal(Signal::TERM);
    assert_eq!(child.end().await, Some(33));
}

#[tokio::test(flavor = "multi_thread")]
async fn outhaul_may_run_outhaul() {
    let world = World::new().await;
    let bazel = script(
        &world,
        "bazel",
        "#!/bin/sh\nfor arg; do echo \"$arg\"; done\nexit 5\n",
    );
    let own = env!("CARGO_BIN_EXE_outhaul");
    let mut command = outhaul();
    command.args(["run", &world.state(), "--", own, "run", &world.state(), "--"]);
    command.args([own, "run", &world.state()]);
    command.args(["--", &bazel, "build", "//a"]);
    let ran = finish(command).await.expect(5);
    let out = ran.out();
    let given: Vec<&str> = out.lines().collect();
    assert_eq!(given.first(), Some(&"build"));
    assert!(given.contains(&"//a"), "{given:?}");
    let backends = given
        .iter()
        .filter(|arg| arg.starts_with("--bes_backend="))
        .count();
    assert_eq!(
        backends, 1,
        "each passes events on to the one around it: {given:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipe_that_is_named_for_a_blob_is_written_into_and_not_replaced() {
    let world = World::new().await;
    let digest = world.file("").1;
    let pipe = world.path("pipe");
    let made = Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    let read = tokio::task::spawn_blocking({
        let pipe = pipe.clone();
        move || std::fs::read(pipe).unwrap()
    });
    let mut fetching = outhaul();
    fetching.args([
        "fetch",
        "blob",
        &digest.to_string(),
        &world.cache_flag(),
        "-o",
        &pipe,
    ]);
    finish(fetching).await;
    assert_eq!(Digest::of(digest.function(), &read.await.unwrap()), *digest);
    assert!(!std::fs::metadata(&pipe).unwrap().is_file());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_credential_helper_has_the_limit_of_open_files_that_it_would_have_alone() {
    let world = World::new().await;
    let shown = world.path("shown");
    let text = format!("#!/bin/sh\nulimit -S -n > '{shown}'\ncat >/dev/null\necho '{{\"headers\":{{}}}}'\n");
    let helper = script(&world, "helper", &text);
    let digest = world.file("").1.to_string();
    let mut command = Command::new("sh");
    command.args([
        "-c",
        &format!(
            "ulimit -S -n 256; exec '{}' fetch blob {digest} {} --credential-helper={helper} -o -",
            env!("CARGO_BIN_EXE_outhaul"),
            world.cache_flag()
        ),
    ]);
    finish(clean(command)).await;
    assert_eq!(std::fs::read_to_string(&shown).unwrap(), "256\n");
    let mut missing = outhaul();
    missing.args(["fetch", "blob", &digest, &world.cache_flag(), "-o", "-"]);
    missing.arg("--credential-helper=/nonexistent/helper");
    finish(missing)
        .await
        .says(1, &["/nonexistent/helper", "failed to start"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cache_of_a_build_of_which_nothing_was_wanted_is_known_to_who_asks_later() {
    let world = World::new().await;
    let from_build = ["--remote-cache=from-build", "--download=minimal"];
    let allowed = format!("--allow-remote-cache={}", world.cache.endpoint());
    let mut server = world.serve_alone(&[&from_build[..], &[&allowed]].concat()).await;
    world.play(&world.build, server.address()).await;
    server.signal(Signal::TERM);
    server.end().await;
    let (output, _) = world.file("app/app");
    let path = world.exec_root().join(&output.path);
    assert!(!path.exists());
    // Bazel makes it for every build.
    std::fs::create_dir_all(world.exec_root().join("bazel-out")).unwrap();
    let status = run(["status", &world.state(), "--json"]).await.expect(0);
    assert_eq!(status.json()[0]["remote_cache"], world.cache.endpoint());
    run(["get", &world.state(), path.to_str().unwrap()])
        .await
        .expect(0);
    assert!(path.exists());
}
