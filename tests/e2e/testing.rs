//! `bazel test`: what tests leave behind, and the tests' own programs.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::Stdio,
};

use serde_json::{Value, json};

use crate::harness::{Bazel, Daemon, Stage, Version, executed};

for_each_bazel!(real:
    test_outputs_are_in_their_places_and_programs_stay_remote,
    every_attempt_and_run_of_a_test_is_in_its_place,
);

/// Demands that every output that the newest stream wants is on disk; gives their paths below `testlogs`.
#[track_caller]
fn wanted(stage: &Stage, daemon: &Daemon, bazel: &Bazel) -> Vec<String> {
    daemon.settled();
    if stage.cache.is_not_grpc() {
        // What has no digest is counted as present or as failed, and not recorded.
        return bazel.testlogs().0.into_keys().collect();
    }
    let list = daemon
        .outhaul()
        .json(bazel.workspace(), "ls", &["--class=required"]);
    let mut paths = Vec::new();
    for output in list {
        assert_eq!(output["state"], "materialized", "{output:#}");
        let path = output["path"].as_str().unwrap();
        assert!(std::path::Path::new(path).is_file(), "{output:#}");
        if let Some((_, below)) = path.split_once("/testlogs/") {
            paths.push(below.to_owned());
        }
    }
    paths
}

/// The logs of a test, as `outhaul mcp` shows them.
fn told_to_an_agent(daemon: &Daemon, bazel: &Bazel, test: &str) -> Vec<Value> {
    let mut command = daemon.outhaul().command("mcp", bazel.workspace());
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut agent = command.spawn().unwrap();
    let mut input = agent.stdin.take().unwrap();
    let hello = json!({"protocolVersion": "2025-06-18", "capabilities": {},
        "clientInfo": {"name": "test", "version": "1"}});
    let call = json!({"name": "test_log", "arguments": {"target": test}});
    for message in [
        json!({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello}),
        json!({"jsonrpc": "2.0", "method": "notifications/initialized"}),
        json!({"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": call}),
    ] {
        writeln!(input, "{message}").unwrap();
    }
    let lines = BufReader::new(agent.stdout.take().unwrap()).lines();
    let answers = lines.map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    let mut answer = answers
        .into_iter()
        .find(|answer| answer["id"] == 2)
        .expect("an answer");
    drop(input);
    assert!(agent.wait().unwrap().success());
    let Value::Array(logs) = answer["result"]["structuredContent"]["logs"].take() else {
        panic!("{answer:#}");
    };
    logs
}

/// What of `expected` is not among `paths`.
fn lacking<'a>(paths: &[String], expected: &[&'a str]) -> Vec<&'a str> {
    let lacks = |wanted: &&&str| !paths.iter().any(|path| path == **wanted);
    expected.iter().filter(lacks).copied().collect()
}

/// What Bazel must download by itself: with caches other than gRPC ones, the events name no digests of it.
fn logs(stage: &Stage) -> Vec<&'static str> {
    if stage.cache.is_not_grpc() {
        vec!["--remote_download_regex=.*/testlogs/.*"]
    } else {
        Vec::new()
    }
}

pub(crate) fn test_outputs_are_in_their_places_and_programs_stay_remote(stage: &Stage) {
    let cache = stage.cache();
    let daemon = Daemon::start(&cache);
    let bazel = stage.bazel(&cache);
    let asked = [&logs(stage)[..], &["//tests/..."]].concat();
    bazel.test(&asked).ok();
    let before = bazel.testlogs();
    bazel.clean();
    let run = bazel.test(&[&[daemon.bes().as_str()], &asked[..]].concat()).ok();
    assert_eq!(executed(&run), 0, "{run}");
    let paths = wanted(stage, &daemon, &bazel);
    let mut expected = vec![
        "tests/made/test.log",
        "tests/pass/test.log",
        "tests/outputs/test.log",
        "tests/sharded/shard_1_of_2/test.log",
        "tests/sharded/shard_2_of_2/test.log",
    ];
    if stage.version == Version::Seven {
        // Of a test that comes from the cache, Bazel 4 names the log only.
        expected.extend([
            "tests/made/test.xml",
            "tests/pass/test.xml",
            "tests/outputs/test.xml",
            "tests/outputs/test.outputs/outputs.zip",
            "tests/sharded/shard_1_of_2/test.xml",
            "tests/sharded/shard_2_of_2/test.xml",
        ]);
    }
    assert_eq!(
        lacking(&paths, &expected),
        [""; 0],
        "not named as wanted; {paths:#?}"
    );
    let logs = bazel.testlogs();
    for path in expected {
        let (before, now) = (&before.0[path], &logs.0[path]);
        assert_eq!(before.hash(), now.hash(), "{path}: {before:?}, now {now:?}");
    }
    assert!(
        bazel
            .text("bazel-testlogs/tests/pass/test.log")
            .contains("passes")
    );

    let program = "bazel-bin/tests/made";
    assert!(!bazel.has(program), "nobody asked for the test's program");
    let why = daemon.outhaul().why(bazel.workspace(), program);
    assert_eq!(
        (&why["class"], &why["state"]),
        (&"known".into(), &"known".into()),
        "{why:#}"
    );

    let run = bazel.build(&[&daemon.bes(), "//tests:made"]).ok();
    assert_eq!(executed(&run), 0, "{run}");
    assert_eq!(bazel.text(program), "#!/bin/sh\necho made\n");
    let why = daemon.outhaul().why(bazel.workspace(), program);
    assert_eq!(
        (&why["class"], &why["state"]),
        (&"required".into(), &"materialized".into()),
        "{why:#}"
    );
    daemon.settled();
}

pub(crate) fn every_attempt_and_run_of_a_test_is_in_its_place(stage: &Stage) {
    let cache = stage.cache();
    let daemon = Daemon::start(&cache);
    let bazel = stage.bazel(&cache);
    // Tests that fail are not kept by the cache: these ran here, and their logs are there already.
    let bes = daemon.bes();
    let asked = [
        bes.as_str(),
        "--keep_going",
        "//tests:pass",
        "//tests:fail",
        "//tests:flaky_pass",
        "//tests:flaky_fail",
    ];
    bazel.test(&[&asked[..], &logs(stage)[..]].concat()).expect(3);
    let paths = wanted(stage, &daemon, &bazel);
    let expected = [
        "tests/pass/test.log",
        "tests/pass/test.xml",
        "tests/fail/test.log",
        "tests/fail/test.xml",
        "tests/flaky_pass/test.log",
        "tests/flaky_pass/test.xml",
        "tests/flaky_pass/test_attempts/attempt_1.log",
        "tests/flaky_pass/test_attempts/attempt_1.xml",
        "tests/flaky_fail/test.log",
        "tests/flaky_fail/test_attempts/attempt_1.log",
        "tests/flaky_fail/test_attempts/attempt_2.log",
    ];
    assert_eq!(
        lacking(&paths, &expected),
        [""; 0],
        "not named as wanted; {paths:#?}"
    );

    // With a gRPC cache, Bazel uploads them with its events, so they can be downloaded again.
    let log = "bazel-testlogs/tests/flaky_pass/test_attempts/attempt_1.log";
    let before = bazel.text(log);
    assert!(before.contains("fails the first time"), "{before}");
    if !stage.cache.is_not_grpc() {
        bazel.delete(log);
        let got = daemon.outhaul().json(bazel.workspace(), "get", &[log]);
        assert_eq!(got[0]["outcome"], "downloaded", "{got:#?}");
        assert_eq!(bazel.text(log), before);

        // Of the tests that failed, and not of those that passed in the end.
        let outhaul = daemon.outhaul();
        let got = outhaul.json(bazel.workspace(), "get", &["--failed"]);
        let mut tests: Vec<&str> = got
            .iter()
            .filter_map(|one| {
                one["path"]
                    .as_str()?
                    .split_once("/testlogs/tests/")?
                    .1
                    .split('/')
                    .next()
            })
            .collect();
        tests.sort_unstable();
        assert!(tests.len() >= 4, "{got:#?}");
        tests.dedup();
        assert_eq!(tests, ["fail", "flaky_fail"], "{got:#?}");
        let run = outhaul
            .run(bazel.workspace(), "get", &["--failed", "//tests:pass"])
            .expect(3);
        assert!(run.err.contains("none of these tests has failed"), "{run}");

        // For an agent, which leaves the output tree alone.
        bazel.delete(log);
        let logs = told_to_an_agent(&daemon, &bazel, "//tests:flaky_pass");
        let ends: Vec<&str> = logs.iter().filter_map(|log| log["tail"].as_str()).collect();
        assert_eq!(ends.len(), 2, "{logs:#?}");
        assert!(ends.contains(&before.as_str()), "{logs:#?}");
        assert!(!bazel.has(log));
    }

    // Runs and shards, which the cache gives only to those who insist.
    let asked = [
        "--runs_per_test=2",
        "--cache_test_results=yes",
        "//tests:sharded",
        "//tests:pass",
    ];
    let asked = [&logs(stage)[..], &asked[..]].concat();
    bazel.test(&asked).ok();
    bazel.clean();
    let run = bazel.test(&[&[daemon.bes().as_str()], &asked[..]].concat()).ok();
    assert_eq!(executed(&run), 0, "{run}");
    let paths = wanted(stage, &daemon, &bazel);
    let mut expected = vec![
        "tests/pass/run_1_of_2/test.log",
        "tests/pass/run_2_of_2/test.log",
        "tests/sharded/shard_1_of_2_run_1_of_2/test.log",
        "tests/sharded/shard_2_of_2_run_1_of_2/test.log",
        "tests/sharded/shard_1_of_2_run_2_of_2/test.log",
        "tests/sharded/shard_2_of_2_run_2_of_2/test.log",
    ];
    if stage.version == Version::Seven {
        expected.extend([
            "tests/pass/run_2_of_2/test.xml",
            "tests/sharded/shard_2_of_2_run_2_of_2/test.xml",
        ]);
    }
    assert_eq!(
        lacking(&paths, &expected),
        [""; 0],
        "not named as wanted; {paths:#?}"
    );
}
