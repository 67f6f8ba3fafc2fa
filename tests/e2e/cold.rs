//! A build of which nothing is on disk and everything in the cache.

use std::process::Command;

use outhaul_testkit::Ran;

use crate::harness::{Bazel, CacheKind, Daemon, Entry, Outhaul, Stage, Tree, Version, executed};

for_each_bazel!(real:
    top_level_outputs_are_there_when_the_build_returns,
    groups_aspects_and_large_outputs_are_there,
    run_needs_no_configuration,
);
for_each_bazel!(casd with 4 rarely: top_level_outputs_are_there_when_the_build_returns);

/// What Bazel's own toplevel mode brings when everything is a cache hit. Fills the cache.
fn reference(bazel: &Bazel, args: &[&str]) -> Tree {
    let args = [&["--remote_download_toplevel"], args].concat();
    bazel.build(&args).ok();
    bazel.clean();
    bazel.build(&args).ok();
    bazel.bin().without_runfiles()
}

/// Everything that Bazel brings is there with the same bytes and the same mode, and nothing else.
#[track_caller]
fn assert_like(bazel: &Bazel, reference: &Tree, run: &Ran) {
    let bin = bazel.bin().without_runfiles();
    let mut differences = reference.differences(&bin);
    if bazel.version() == Version::Four {
        // Its toplevel mode forgets what aspects make.
        differences.retain(|line| !(line.starts_with("+ ") && line.ends_with(".report.txt")));
    }
    assert!(
        differences.is_empty(),
        "compared with Bazel's toplevel mode:\n{}\n{run}",
        differences.join("\n")
    );
    assert!(bin.files().len() > 10, "{bin}");
    assert!(
        !bazel.has("bazel-bin/gen/middle.txt"),
        "intermediate outputs stay remote"
    );
}

#[track_caller]
fn assert_all_hits(cache: CacheKind, run: &Ran) {
    // buildbox-casd answers that nested trees are missing, so their action runs again.
    let allowed = u64::from(cache == CacheKind::Casd);
    assert!(executed(run) <= allowed, "{run}");
}

pub(crate) fn top_level_outputs_are_there_when_the_build_returns(stage: &Stage) {
    let cache = stage.cache();
    let reference = reference(&stage.bazel(&cache), &["//..."]);
    let daemon = Daemon::start(&cache);
    // Twice: in an output root where nothing was built, and in one that was cleaned.
    let bazel = stage.bazel(&cache);
    for _ in 0..2 {
        let run = bazel.build(&[&daemon.bes(), "//..."]).ok();
        assert_all_hits(stage.cache, &run);
        assert_like(&bazel, &reference, &run);
        let status = daemon.settled();
        assert!(status["downloaded"].as_u64() > Some(10), "{status:#}");
        bazel.clean();
    }
    let bin = bazel.bin();
    assert!(bin.files().is_empty(), "nothing comes back after a clean: {bin}");
}

pub(crate) fn groups_aspects_and_large_outputs_are_there(stage: &Stage) {
    let asked = [
        "//...",
        "//big",
        "--aspects=//rules:defs.bzl%report",
        "--output_groups=+report,+extra",
    ];
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let reference = reference(&bazel, &asked);
    bazel.clean();
    let daemon = Daemon::start(&cache);
    let run = bazel.build(&[&[daemon.bes().as_str()], &asked[..]].concat()).ok();
    assert_all_hits(stage.cache, &run);
    assert_like(&bazel, &reference, &run);
    let bin = bazel.bin();
    for (path, size) in [
        ("big/big.bin", 104_857_600),
        ("gen/empty.txt", 0),
        ("rules/groups.extra.txt", 6),
        ("rules/groups.report.txt", 17),
        ("rules/nested.d/sub/deeper/deeper.txt", 7),
    ] {
        assert!(
            matches!(bin.0.get(path), Some(Entry::File { size: found, mode: 0o555 | 0o544, .. }) if *found == size),
            "{path}: {:?}",
            bin.0.get(path)
        );
    }
    assert!(
        matches!(bin.0.get("rules/hollow.d"), Some(Entry::Directory { .. })),
        "an empty tree is a directory"
    );
    assert_eq!(bazel.text("bazel-bin/rules/link.txt"), "behind a link\n");
    let said = Command::new(bazel.path("bazel-bin/gen/tool.sh"))
        .output()
        .unwrap();
    assert_eq!(said.stdout, b"tool\n");
    daemon.settled();
}

pub(crate) fn run_needs_no_configuration(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let reference = reference(&bazel, &["//..."]);
    bazel.clean();
    let outhaul = Outhaul::reading(cache.settings());
    let mut line = Vec::new();
    if !cache.settings().variables.is_empty() {
        // Nothing in the build says that what Bazel fills is a bucket.
        line.extend(cache.settings().flags.iter().cloned());
    }
    line.push("--".to_owned());
    line.extend(bazel.command_line("build"));
    line.extend(cache.bazel().iter().cloned());
    line.push("//...".to_owned());
    let run = outhaul.run(bazel.workspace(), "run", &line).ok();
    assert_all_hits(stage.cache, &run);
    if stage.version == Version::Four {
        // It is left in its own mode, in which it brings everything itself.
        let mut differences = reference.differences(&bazel.bin().without_runfiles());
        differences.retain(|line| !line.starts_with("+ "));
        assert!(differences.is_empty(), "{}\n{run}", differences.join("\n"));
    } else {
        assert_like(&bazel, &reference, &run);
    }
    assert!(run.err.contains("downloaded"), "one line sums it up: {run}");
    assert!(run.err.contains(" 0 failed"), "{run}");
    let status = outhaul.status();
    assert_eq!(status["state"], "settled", "{status:#}");
}
