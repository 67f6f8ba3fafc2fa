//! What goes wrong on the way: the build's own result stays what it was, and the reason is reported.

use std::path::Path;

use outhaul_testkit::{Ran, eventually, peers};
use serde_json::Value;

use crate::harness::{Bazel, Daemon, Expected, Stage, Way};

for_each_bazel!(real:
    a_cache_that_goes_away_fails_a_strict_build_only,
    a_full_disk_is_reported_and_fails_a_strict_build_only,
    a_read_only_output_tree_is_reported_and_fails_a_strict_build_only,
    a_damaged_record_costs_no_build_anything,
);

/// Bazel's exit code when its event stream failed for good (PERSISTENT_BUILD_EVENT_SERVICE_UPLOAD_ERROR).
const STREAM_FAILED: i32 = 45;

/// Demands that a build's end says why an output is missing: in `status`, and with the summary in the log.
#[track_caller]
fn reported(daemon: &Daemon, run: &Ran, output: &str, reason: &str) -> Value {
    // A strict daemon fails the stream a moment before it notes the end.
    eventually("the invocation is settled", || {
        daemon.outhaul().status()["state"] == "settled"
    });
    let (status, log) = (daemon.outhaul().status(), daemon.log());
    let errors = status["errors"].as_array().expect("a list");
    assert!(
        errors
            .iter()
            .filter_map(Value::as_str)
            .any(|error| error.contains(output) && error.to_lowercase().contains(reason)),
        "no error names {output}: {reason}\n{status:#}\n{run}\n{log}"
    );
    let failed = status["failed"].as_u64().expect("a number");
    assert!(failed > 0, "{status:#}");
    let id = status["invocation_id"].as_str().expect("a text");
    let mut lines = log.lines().filter(|line| line.contains(id));
    assert!(
        lines
            .clone()
            .any(|line| line.contains(output) && line.to_lowercase().contains(reason)),
        "{log}"
    );
    let summary = format!("already present, {failed} failed");
    assert!(lines.any(|line| line.contains(&summary)), "{log}");
    status
}

/// As a strict build's user sees it.
#[track_caller]
fn fails_strictly(run: Ran, output: &str) -> Ran {
    let run = run.expect(STREAM_FAILED);
    assert!(run.err.contains("Build completed successfully"), "{run}");
    assert!(run.err.contains("outhaul: ") && run.err.contains(output), "{run}");
    run
}

pub(crate) fn a_cache_that_goes_away_fails_a_strict_build_only(stage: &Stage) {
    let cache = stage.cache();
    let way = Way::to(&cache);
    let hasty = ["--remote-retries=1", "--remote-retry-max-delay=100ms"];
    let bazel = stage.bazel(&cache);
    let expected = Expected::of(&bazel, &["//:a", "//big"]);
    let mut daemon = Daemon::reading(way.settings(), &[&hasty[..], &["--strict"]].concat());

    let bes = daemon.bes();
    // The way to the cache is cut in the middle of the large output; or before it, where the cache is a directory.
    let start = |args: &[&str]| {
        if let Some(proxy) = way.wire() {
            proxy.slow(10 << 20);
            let before = proxy.passed();
            let build = bazel.start("build", args);
            eventually("the download is under way", || proxy.passed() - before > 3 << 20);
            build
        } else {
            // Bazel itself must not miss it.
            way.flow();
            bazel.build(&[&bes, "//:a"]).ok();
            bazel.build(&["//big"]).ok();
            if bazel.has("bazel-bin/big/big.bin") {
                bazel.delete("bazel-bin/big/big.bin");
            }
            way.cut();
            bazel.start("build", args)
        }
    };
    let build = start(&[&daemon.bes(), "//:a", "//big"]);
    way.cut();
    let run = fails_strictly(build.wait(), "big.bin");
    reported(&daemon, &run, "big/big.bin", "");
    assert!(!bazel.has("bazel-bin/big/big.bin"), "nothing is there in part");

    daemon.restart_with(&way.settings().and(&hasty));
    way.flow();
    let build = start(&[&daemon.bes(), "//:a", "//big"]);
    way.cut();
    let run = build.wait().ok();
    reported(&daemon, &run, "big/big.bin", "");
    assert!(!bazel.has("bazel-bin/big/big.bin"), "nothing is there in part");
    assert_eq!(bazel.text("bazel-bin/a.txt"), "this is a\n");

    // A build that fails by itself does so with its own code.
    way.flow();
    let build = start(&[&daemon.bes(), "--keep_going", "//gen:broken", "//big"]);
    way.cut();
    let run = build.wait().expect(1);
    reported(&daemon, &run, "big/big.bin", "");

    // It comes back, and the next build brings what was missing.
    way.flow();
    bazel.build(&[&daemon.bes(), "//:a", "//big"]).ok();
    expected.are_there(&bazel, &daemon.log());
    daemon.settled();

    // The real end of a real cache.
    bazel.delete("bazel-bin/big/big.bin");
    let build = start(&[&daemon.bes(), "//:a", "//big"]);
    cache.kill();
    way.flow();
    let run = build.wait().ok();
    reported(&daemon, &run, "big/big.bin", "");
}

/// A command that becomes another one, with the outputs of a Bazel as that one sees them changed by a script: in a
/// mount namespace of its own, so that Bazel is not concerned, and nothing is left mounted whatever happens.
fn in_a_mount_namespace(bazel: &Bazel, script: &str) -> Option<Vec<String>> {
    let line = [
        "unshare",
        "--mount",
        "--propagation=private",
        "--",
        "sh",
        "-c",
        &format!("set -e; {script}; shift 2; exec \"$@\""),
        "sh",
        &bazel.output_user_root().display().to_string(),
        &bazel.exec_root().display().to_string(),
    ]
    .map(ToString::to_string);
    let tried = std::process::Command::new(&line[0])
        .args(&line[1..])
        .arg("true")
        .output();
    if tried.as_ref().is_ok_and(|output| output.status.success()) {
        return Some(line.to_vec());
    }
    let message = format!("SKIPPED: the rest of a test: it may not mount file systems: {tried:?}");
    // Where that Bazel runs, mounting is permitted.
    assert!(!peers::is_required("bazel7"), "{message}");
    // Past the test runner, which shows nothing of a test that passes.
    let _ = std::io::Write::write_all(&mut std::io::stderr().lock(), format!("\n{message}\n").as_bytes());
    None
}

/// Builds with a daemon whose output tree has something wrong with it; then with the same daemon in good order.
fn with_a_broken_tree(stage: &Stage, script: &str, reason: &str) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let targets = ["//gen:one", "//rules:flat", "//big"];
    let expected = Expected::of(&bazel, &targets);
    // Makes the exec root, which `clean` has removed; nothing of it is asked for below.
    bazel.build(&["//:b"]).ok();
    let Some(wrapper) = in_a_mount_namespace(&bazel, script) else {
        return;
    };
    let wrapper: Vec<&str> = wrapper.iter().map(String::as_str).collect();
    let mut daemon = Daemon::start(&cache);
    let (lenient, strict) = (cache.settings().and(&[]), cache.settings().and(&["--strict"]));

    daemon.restart_after(&wrapper, &lenient);
    let run = bazel
        .build(&[&[daemon.bes().as_str()], &targets[..]].concat())
        .ok();
    reported(&daemon, &run, "big/big.bin", reason);

    daemon.restart_after(&wrapper, &strict);
    let run = bazel.build(&[&[daemon.bes().as_str()], &targets[..]].concat());
    let run = fails_strictly(run, "big.bin");
    reported(&daemon, &run, "big/big.bin", reason);

    // Nothing that was noted in bad times is believed in good ones.
    daemon.restart_after(&[], &strict);
    bazel
        .build(&[&[daemon.bes().as_str()], &targets[..]].concat())
        .ok();
    expected.are_there(&bazel, &daemon.log());
    daemon.settled();
}

pub(crate) fn a_full_disk_is_reported_and_fails_a_strict_build_only(stage: &Stage) {
    // The large output does not fit, the others do.
    with_a_broken_tree(
        stage,
        "mount -t tmpfs -o size=16m outhaul-test \"$1\"; mkdir -p \"$2\"",
        "no space left",
    );
}

pub(crate) fn a_read_only_output_tree_is_reported_and_fails_a_strict_build_only(stage: &Stage) {
    with_a_broken_tree(
        stage,
        "mount --bind \"$1\" \"$1\"; mount -o remount,bind,ro \"$1\"",
        "read-only",
    );
}

/// What happens to a file's bytes.
type Damage = fn(&mut Vec<u8>);

pub(crate) fn a_damaged_record_costs_no_build_anything(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let targets = ["//:a", "//gen:many", "//rules:flat"];
    let expected = Expected::of(&bazel, &targets);
    let mut daemon = Daemon::reading(cache.settings(), &["--strict"]);
    let bes = daemon.bes();
    let args = [&[bes.as_str()], &targets[..]].concat();
    bazel.build(&args).ok();
    expected.are_there(&bazel, &daemon.log());

    let damages: [(&str, Damage); 4] = [
        ("a flipped bit in each KiB", |bytes| {
            for piece in bytes.chunks_mut(1024) {
                let at = rand::random_range(0..piece.len());
                piece[at] ^= 1 << rand::random_range(0..8);
            }
        }),
        ("a single flipped bit", |bytes| {
            if !bytes.is_empty() {
                let at = rand::random_range(0..bytes.len());
                bytes[at] ^= 1 << rand::random_range(0..8);
            }
        }),
        ("cut in half", |bytes| bytes.truncate(bytes.len() / 2)),
        ("garbage", |bytes| {
            let length = bytes.len().max(100);
            *bytes = std::iter::repeat_with(rand::random).take(length).collect();
        }),
    ];
    for (damage, apply) in damages {
        daemon.terminate();
        let record = daemon.outhaul().state_dir().join("record");
        assert!(
            damage_files(&record, apply) > 0,
            "nothing is in {}",
            record.display()
        );
        daemon.restart();
        bazel.delete("bazel-bin/gen/many.txt");
        let run = bazel.build(&args).ok();
        let log = daemon.log();
        assert_eq!(
            expected.missing(&bazel),
            Vec::<String>::new(),
            "{damage}; {run}\n{log}"
        );
        assert!(!log.contains("bug in outhaul"), "{damage}\n{log}");
        daemon.settled();
        if damage == "garbage" {
            assert!(log.contains("the record was damaged"), "{damage}\n{log}");
        }
    }
}

/// Changes every file below a directory. Gives their number.
fn damage_files(dir: &Path, apply: Damage) -> usize {
    let mut count = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            count += damage_files(&path, apply);
        } else {
            let mut bytes = std::fs::read(&path).unwrap();
            apply(&mut bytes);
            std::fs::write(&path, bytes).unwrap();
            count += 1;
        }
    }
    count
}
