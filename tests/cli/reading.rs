//! The commands that read, with and without a daemon: their exit codes and their JSON.

use std::{collections::BTreeSet, process::Command};

use outhaul::demo::{GeneratedBuild, Setting, play};
use outhaul_testkit::{
    Ran, Running,
    cache::{RequestFault, Rpc, Times},
    clean, finish, in_time, until,
};
use serde_json::Value;

use crate::support::{World, outhaul, run};

const OUTPUT: &[&str] = &[
    "aspect",
    "class",
    "digest",
    "directory",
    "error",
    "event",
    "exec_path",
    "exec_root",
    "invocation_id",
    "label",
    "materialized_at_ms",
    "output_group",
    "path",
    "rule",
    "size",
    "source",
    "store",
    "state",
    "symlink_target",
    "took_us",
];
const INVOCATION: &[&str] = &[
    "build_id",
    "build_tool_version",
    "command",
    "downloaded",
    "downloaded_bytes",
    "errors",
    "evicted",
    "evicted_target_count",
    "evicted_targets",
    "exec_root",
    "exit_code",
    "failed",
    "hold_us",
    "invocation_id",
    "known",
    "pending",
    "present",
    "remote_cache",
    "remote_instance_name",
    "settled_ms",
    "started_ms",
    "state",
    "stores",
    "superseded",
    "workspace",
];
const TARGET: &[&str] = &[
    "aspect",
    "configuration",
    "failed",
    "known",
    "label",
    "optional",
    "required",
    "state",
    "success",
];
const GOT: &[&str] = &["error", "outcome", "output", "path"];

#[track_caller]
fn assert_keys(value: &Value, expected: &[&str]) {
    let keys: BTreeSet<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, expected.iter().copied().collect());
}

/// A build whose outputs are only known, but for one rule's, in a daemon's record.
async fn recorded(world: &World) -> Running {
    let server = world
        .serve(&["--rule=required path=.*/part0.h", "--rule=known"])
        .await;
    world.play(&world.build, server.address()).await;
    server
}

async fn asked(world: &World, args: &[&str]) -> Ran {
    let mut command = outhaul();
    // What follows a `--` is not a flag.
    command.arg(args[0]).arg(world.state()).args(&args[1..]);
    finish(command).await
}

/// Everything that is asked of a daemon, or of the record without one.
async fn questions(world: &World) {
    let wanted = world
        .exec_root()
        .join(&world.file("part0.h").0.path)
        .display()
        .to_string();
    let (app, digest) = world.file("app/app");
    let skipped = world.exec_root().join(&app.path).display().to_string();

    let ran = asked(world, &["stat", "--json", &wanted, &skipped])
        .await
        .expect(0);
    let answers = ran.json();
    answers.iter().for_each(|answer| assert_keys(answer, OUTPUT));
    assert_eq!(
        (&answers[0]["state"], &answers[0]["class"]),
        (&"materialized".into(), &"required".into())
    );
    assert_eq!(
        (&answers[1]["state"], &answers[1]["class"]),
        (&"known".into(), &"known".into())
    );
    assert_eq!(answers[1]["digest"], format!("sha256:{}", digest.hash_hex()));
    assert_eq!(answers[1]["size"], digest.size());
    assert_eq!(answers[1]["label"], "//app:app");

    // A moment after the build's end.
    until("how it came is on record", async || {
        let ran = asked(world, &["why", "--json", &wanted]).await.expect(0);
        let answer = ran.json().remove(0);
        assert_keys(&answer, OUTPUT);
        !answer["source"].is_null()
    })
    .await;
    let text = asked(world, &["why", &wanted, &skipped]).await.expect(0).out();
    assert!(text.contains("downloaded") && text.contains("skipped"), "{text}");

    // An exec path is enough.
    asked(world, &["stat", &app.path]).await.expect(0);

    // So is a path by a link that is not there, dangles, has another prefix, or is looked for in a subdirectory.
    let workspace = std::path::PathBuf::from(world.path("workspace"));
    std::fs::create_dir_all(&workspace).unwrap();
    let _ = std::os::unix::fs::symlink(
        "/from/ob/execroot/_main/bazel-out/c/bin",
        workspace.join("odd-bin"),
    );
    for (link, code) in [
        ("bazel-bin/app/app", 0),
        ("odd-bin/app/app", 0),
        ("dist/bin/app/app", 0),
        ("sub/bazel-bin/app/app", 0),
        ("bazel-out/k8-fastbuild/bin/app/app", 0),
        ("bazel-workspace/bazel-out/k8-fastbuild/bin/app/app", 0),
        ("bazel-testlogs/app/app", 3),
        ("cabin/app/app", 3),
        ("app/app", 3),
    ] {
        let path = workspace.join(link).display().to_string();
        let ran = asked(world, &["stat", "--json", &path]).await.expect(code);
        if code == 0 {
            assert_eq!(ran.json()[0]["exec_path"], app.path, "{link}");
            asked(world, &["why", &path]).await.expect(0);
        }
    }
    let elsewhere = workspace.parent().unwrap().join("elsewhere/bazel-bin/app/app");
    asked(world, &["stat", &elsewhere.display().to_string()])
        .await
        .expect(3);

    let unknown = format!("{wanted}.no");
    let ran = asked(world, &["stat", "--json", &unknown, &wanted]).await;
    let ran = ran.says(3, &[&unknown, "no recorded build"]);
    assert_eq!(ran.json().len(), 1, "what is known is answered all the same");
    asked(world, &["why", &unknown]).await.says(3, &[&unknown]);
    asked(world, &["get", &unknown]).await.says(3, &[&unknown]);
    let ran = asked(world, &["get", "--json", &unknown]).await.expect(3);
    assert_keys(&ran.json()[0], GOT);
    asked(world, &["stat", ""]).await.says(2, &["PATH"]);

    let ran = asked(world, &["status", "--json"]).await.expect(0);
    assert_eq!(ran.json().len(), 1);
    assert_keys(&ran.json()[0], INVOCATION);
    let id = world.build.invocation_id();
    let one = asked(world, &["status", "--json", &id]).await.expect(0).json();
    assert_keys(&one[0], &[INVOCATION, &["targets"]].concat());
    one[0]["targets"]
        .as_array()
        .unwrap()
        .iter()
        .for_each(|t| assert_keys(t, TARGET));
    asked(world, &["status", "nonsense"]).await.says(3, &["nonsense"]);
    let ran = asked(world, &["status", "--watch", "--json"]).await.expect(0);
    assert_eq!(ran.json()[0]["state"], "settled");

    let ran = asked(world, &["ls", "--json"]).await.expect(0);
    let list = ran.json();
    list.iter().for_each(|output| assert_keys(output, OUTPUT));
    assert_eq!(list.len(), world.build.outputs().len());
    let known = asked(world, &["ls", "--json", "--class=required", &id])
        .await
        .expect(0);
    assert_eq!(known.json().len(), 1);
    asked(world, &["ls", "nonsense"]).await.says(3, &["nonsense"]);
    asked(world, &["ls", "--class=nonsense"])
        .await
        .says(2, &["--class"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_and_the_record_alone_answer_alike() {
    let world = World::new().await;
    let mut server = recorded(&world).await;
    questions(&world).await;
    server.signal(rustix::process::Signal::TERM);
    assert_eq!(server.end().await, Some(0));
    questions(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn get_brings_what_is_known_and_names_what_is_evicted() {
    let world = World::new().await;
    let mut server = recorded(&world).await;
    for (name, gone) in [("part1.h", "part3.h"), ("part2.h", "liblib.a")] {
        let output = world.file(name).0;
        let path = world.exec_root().join(&output.path);
        let asked_for = path.display().to_string();
        let ran = asked(&world, &["get", "--json", &asked_for]).await.expect(0);
        assert_keys(&ran.json()[0], GOT);
        assert_eq!(ran.json()[0]["outcome"], "downloaded");
        assert!(path.exists());
        let ran = asked(&world, &["get", "--json", &asked_for]).await.expect(0);
        assert_eq!(ran.json()[0]["outcome"], "present");

        let (evicted, digest) = world.file(gone);
        world.cache.store().remove(digest);
        let path = world.exec_root().join(&evicted.path);
        let ran = asked(&world, &["get", &path.display().to_string()]).await;
        ran.says(1, &[&evicted.path, "evicted", &digest.hash_hex()]);
        assert!(!path.exists());
        let left = std::fs::read_dir(path.parent().unwrap()).map_or(0, |entries| {
            entries
                .filter(|e| {
                    e.as_ref()
                        .unwrap()
                        .file_name()
                        .to_string_lossy()
                        .contains("outhaul")
                })
                .count()
        });
        assert_eq!(left, 0, "nothing partial is left");
        // The second round without a daemon.
        if name == "part1.h" {
            server.signal(rustix::process::Signal::TERM);
            server.end().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_follows_a_build_until_it_is_settled() {
    let world = World::new().await;
    let delay = RequestFault::Delay(std::time::Duration::from_secs(2));
    world
        .cache
        .faults()
        .request(Rpc::StreamRead, delay, Times::Always);
    world.cache.faults().request(Rpc::BatchRead, delay, Times::Always);
    let server = world.serve(&["--hold=none"]).await;
    world.play(&world.build, server.address()).await;
    let ran = asked(&world, &["status", "--watch", "--json"]).await.expect(0);
    let states: Vec<Value> = ran.json().iter().map(|i| i["state"].clone()).collect();
    assert!(states.len() > 1, "{states:?}");
    assert_eq!(*states.last().unwrap(), "settled");
    world.assert_complete();
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_of_a_build_that_failed_us_fails() {
    let world = World::new().await;
    world.cache.store().remove(world.file("part0.h").1);
    let _server = recorded(&world).await;
    let ran = asked(&world, &["status", "--watch"]).await.expect(1);
    assert!(ran.out().contains("part0.h"), "{}", ran.out());
}

#[tokio::test]
async fn nothing_recorded_is_said_with_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("none");
    let flag = format!("--state-dir={}", state.display());
    for command in [
        &["status"][..],
        &["ls"],
        &["stat", "x"],
        &["get", "x"],
        &["why", "x"],
    ] {
        let ran = run(command.iter().copied().chain([flag.as_str()])).await;
        ran.says(3, &[&state.display().to_string()]);
        assert!(!state.exists(), "asking makes nothing");
    }
}

#[tokio::test]
async fn a_closed_pipe_is_no_failure() {
    let mut command = clean(Command::new("sh"));
    let script = "{ \"$0\" --help; echo \"code $?\" >&2; } | true";
    command.args(["-c", script, env!("CARGO_BIN_EXE_outhaul")]);
    let ran = finish(command).await.expect(0);
    assert!(
        ran.err.contains("code 0") && !ran.err.contains("panicked"),
        "{}",
        ran.err
    );
}

#[tokio::test]
async fn the_demo_shows_that_it_works() {
    let dir = tempfile::tempdir().unwrap();
    let flag = format!("--dir={}", dir.path().join("demo").display());
    let ran = run(["demo", &flag]).await.expect(0);
    assert!(ran.out().contains("executes nothing"), "{}", ran.out());
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let ran = run(["demo", &format!("--dir={}/x", file.display())]).await;
    ran.says(2, &[&file.display().to_string()]);
}

#[tokio::test]
async fn help_and_version_are_no_errors_and_nonsense_is_a_usage_error() {
    for args in [
        &["--help"][..],
        &["--version"],
        &["serve", "--help"],
        &["fetch", "bep", "--help"],
    ] {
        run(args).await.expect(0);
    }
    for args in [
        &[][..],
        &["nonsense"],
        &["serve", "--nonsense"],
        &["get"],
        &["run"],
        &["fetch", "blob"],
    ] {
        let ran = run(args).await.expect(2);
        assert!(!ran.err.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn get_takes_targets_packages_expressions_and_wildcards() {
    let world = World::new().await;
    let mut server = Some(recorded(&world).await);
    let wildcard = format!(
        "{}/bazel-out/*/bin/lib/include/part?.h",
        world.exec_root().display()
    );
    // What is asked for, some of what comes, and some of what does not.
    let cases: [(&[&str], &[&str], &[&str]); 10] = [
        // Its own outputs, and the sets that it shares with another target, which named them first or last.
        (
            &["//app:app"],
            &["/app/app", "/liblib.a", "/part0.h"],
            &["/assets/"],
        ),
        (&["//lib/..."], &["/liblib.a"], &["/app/app", "/assets/"]),
        (
            &["--", "//...", "-//app/...", "-//lib/..."],
            &["/assets/"],
            &["/liblib.a", "/app/app"],
        ),
        (
            &["//lib:lib", "--path", ".*/part[0-9]\\.h"],
            &["/part0.h"],
            &["/liblib.a"],
        ),
        (
            &["//broken:broken", "--output-group", "logs"],
            &["/broken/"],
            &["/lib/"],
        ),
        (
            &["--path", "bazel-out/.*/part1\\.h"],
            &["/part1.h"],
            &["/part0.h", "/app/"],
        ),
        (&["--all-of", "//assets/..."], &["/assets/"], &["/lib/", "/app/"]),
        // What is taken already is in its package all the same.
        (
            &["bazel-out/*/bin/lib/**", "--all-of", "//lib/..."],
            &["/liblib.a"],
            &["/app/app"],
        ),
        (&[&wildcard], &["/part0.h", "/part1.h"], &["/liblib.a"]),
        (&["bazel-out/**/liblib.?"], &["/liblib.a"], &["/part0.h"]),
    ];
    // With a daemon and without.
    for _ in 0..2 {
        for (args, some, none) in &cases {
            let mut all = vec!["get", "--json"];
            all.extend(*args);
            let ran = asked(&world, &all).await.expect(0);
            let paths: Vec<String> = ran
                .json()
                .iter()
                .map(|got| got["path"].as_str().unwrap().to_owned())
                .collect();
            let has = |part: &&&str| paths.iter().any(|path| path.contains(**part));
            assert_eq!(some.iter().find(|part| !has(part)), None, "{args:?}: {paths:?}");
            assert_eq!(none.iter().find(has), None, "{args:?}: {paths:?}");
            for path in paths {
                assert!(std::path::Path::new(&path).symlink_metadata().is_ok(), "{path}");
            }
        }
        for (args, code, part) in [
            (&["//nothing:here"][..], 3, "//nothing:here"),
            (&["//app:app", "--invocation", "other"], 3, "other"),
            (
                &["--path", "bazel-out/none"],
                3,
                "--path=bazel-out/none: no recorded output matches",
            ),
            (
                &["bazel-out/none/*"],
                3,
                "bazel-out/none/*: no recorded output matches",
            ),
            (&["--all-of", "//none/..."], 3, "--all-of=//none/..."),
            (&["--all-of", "//app/...,//none/..."], 3, "--all-of=//none/..."),
            (
                &["--all-of", "//assets/...", "--path", "none"],
                3,
                "--path=none: no recorded output of the packages in --all-of matches",
            ),
            (&["--all-of", "//app:app"], 2, "--all-of=//app:app"),
            (&["--path", "("], 2, "--path=("),
            (&["x", "--output-group", "logs"], 2, "--output-group=logs"),
            (&["x", "--invocation", "other"], 2, "--invocation"),
        ] {
            let mut all = vec!["get"];
            all.extend(args);
            asked(&world, &all).await.says(code, &[part]);
        }
        if let Some(mut server) = server.take() {
            server.signal(rustix::process::Signal::TERM);
            assert_eq!(server.end().await, Some(0));
        }
    }
}

/// What `get`, `exec` and `watch` do with the id of a build that a newer one of the same output root has followed, at this
/// path of it.
async fn asked_of(world: &World, id: &str, path: &str) -> (Ran, Ran, Ran) {
    let by_id = format!("--invocation={id}");
    let got = asked(world, &["get", "--json", &by_id, "//app:app"]).await;
    let ran = asked(world, &["exec", &by_id, "//app:app"]).await;
    let watched = asked(world, &["watch", &by_id, &format!("--path={path}")]).await;
    (got, ran, watched)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_build_never_answers_with_the_newest_ones_content() {
    let world = World::new().await;
    let mut server = world.serve(&[]).await;
    let (app, digest) = world.file("app/app");
    world.play(&world.build, server.address()).await;
    let setting = Setting {
        workspace: world.path("workspace"),
        exec_root: world.exec_root().display().to_string(),
        remote_cache: world.cache.endpoint(),
        instance_name: String::new(),
    };
    let newer = GeneratedBuild::new(|bytes| world.cache.store().put(bytes), setting, 2);
    world.play(&newer, server.address()).await;
    let (old, new) = (world.build.invocation_id(), newer.invocation_id());
    let outdated = format!("build {new} is newer");
    for is_alone in [false, true] {
        if is_alone {
            server.signal(rustix::process::Signal::TERM);
            server.end().await;
        }
        let (got, ran, watched) = asked_of(&world, &old, &app.path).await;
        let hint = format!("stage --invocation {old}");
        let got = got.expect(1);
        let one = got.json();
        let one = one
            .iter()
            .find(|one| one["output"]["exec_path"] == *app.path)
            .unwrap();
        assert!(one["outcome"].is_null(), "{one:#}");
        let error = one["error"].as_str().unwrap();
        assert!(error.contains(&outdated) && error.contains(&hint), "{error}");
        ran.says(1, &[&outdated, &hint, "it was not run"]);
        assert_eq!(watched.expect(1).out(), "", "its content is not there any more");
        for args in [
            &["--path=.*"][..],
            &["bazel-out/**"],
            &["--all-of=//app/..."],
            &["//app:app", "--runfiles"],
        ] {
            let args = [&["get", "--invocation", &old], args].concat();
            asked(&world, &args).await.says(2, &[&new, &hint]);
        }
        // Links that are not there stand for directories, alone and with wildcards.
        for (link, code) in [
            ("bazel-bin", 0),
            ("bazel-out", 0),
            ("bazel-testlogs", 3),
            ("bazel-bin/app/*", 0),
            ("bazel-bin/**", 0),
            ("bazel-testlogs/**", 3),
        ] {
            let path = format!("{}/{link}", world.path("workspace"));
            asked(&world, &["get", &path]).await.expect(code);
        }
        let narrowed = ["get", "--json", "--all-of=//...", "--path=.*/app"];
        let narrowed = asked(&world, &narrowed).await.expect(0).json();
        assert!(
            narrowed.len() == 1 && narrowed[0]["output"]["exec_path"] == *app.path,
            "{narrowed:#?}"
        );
        // The newest build's id stands for itself.
        let (got, _, watched) = asked_of(&world, &new, &app.path).await;
        assert_eq!(got.expect(0).json()[0]["outcome"], "present");
        assert_eq!(watched.expect(1).json()[0]["invocation_id"], new);
    }

    // What is as the older build had it is its own still, no matter which build has named it since.
    let mut server = world.serve(&[]).await;
    let again = newer.incremental();
    world.play(&again, server.address()).await;
    let (got, _, watched) = asked_of(&world, &new, &app.path).await;
    assert_eq!(got.expect(0).json()[0]["outcome"], "present");
    assert_ne!(
        watched.expect(1).json()[0]["digest"],
        format!("sha256:{}", digest.hash_hex())
    );
    server.signal(rustix::process::Signal::TERM);
    server.end().await;
    // As after `bazel clean --expunge`.
    std::fs::remove_dir_all(world.exec_root()).unwrap();
    let ran = asked(&world, &["get", "//lib:lib"]).await;
    let ran = ran.says(1, &["deleted", "bazel clean", "stage"]);
    assert_eq!(ran.err.lines().count(), 1, "{ran}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_the_system_cannot_start_is_not_given_to_a_shell() {
    let world = World::new().await;
    let server = world.serve(&[]).await;
    let mut elf = b"\x7fELF\x02\x01\x01; echo a shell has read it\n".to_vec();
    elf.resize(64, b' ');
    // A program for a machine of that number.
    elf[16..20].copy_from_slice(&[2, 0, 0xed, 0xfe]);
    let cases: [(&[u8], _, _); 2] = [
        // No machine has this number, and no emulator.
        (
            &elf,
            126,
            "this machine cannot run it, as it was built for the ELF machine 65261",
        ),
        (
            b"#!/nowhere/to/be/found\n",
            127,
            "the interpreter or loader that it names does not exist",
        ),
    ];
    for (n, (program, code, part)) in (2..).zip(cases) {
        let setting = Setting {
            workspace: world.path("workspace"),
            exec_root: world.exec_root().display().to_string(),
            remote_cache: world.cache.endpoint(),
            instance_name: String::new(),
        };
        let put = |bytes: Vec<u8>| {
            let is_app = bytes.len() == 5_000_000;
            world
                .cache
                .store()
                .put(if is_app { program.to_vec() } else { bytes })
        };
        let build = GeneratedBuild::new(put, setting, n);
        world.play(&build, server.address()).await;
        let ran = asked(&world, &["exec", "//app:app"]).await;
        ran.says(code, &["/app/app: ", part]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn that_an_action_cache_has_no_digests_is_said_where_an_intermediate_output_is_missing() {
    let world = World::new().await;
    let server = world.serve(&[]).await;
    let (id, build_id) = (world.build.invocation_id(), world.build.build_id());
    // What Bazel 4 says is otherwise the same.
    let events = world.build.events().map(|mut bytes| {
        let version = b"7.7.1";
        if let Some(at) = bytes.windows(version.len()).position(|part| part == version) {
            bytes[at..at + version.len()].copy_from_slice(b"4.2.3");
        }
        bytes
    });
    in_time(play(server.address(), &id, &build_id, events))
        .await
        .unwrap();
    for args in [
        ["get", "--all-of=//none/..."],
        ["get", "bazel-out/none/bin/none.txt"],
    ] {
        asked(&world, &args)
            .await
            .says(3, &["the action cache of Bazel 4.2.3 has no digests"]);
    }
}
