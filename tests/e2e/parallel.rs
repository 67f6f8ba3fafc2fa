//! Builds at the same time: of two workspaces, and of one.

use std::collections::BTreeSet;

use outhaul_testkit::eventually;
use serde_json::Value;

use crate::harness::{Daemon, Expected, Stage, Way, executed};

for_each_bazel!(real with 4 rarely:
    two_workspaces_build_at_the_same_time_against_one_daemon,
    a_newer_build_wins_over_what_an_older_one_still_downloads,
);

pub(crate) fn two_workspaces_build_at_the_same_time_against_one_daemon(stage: &Stage) {
    let cache = stage.cache();
    let way = Way::to(&cache);
    let daemon = Daemon::reading(way.settings(), &[]);
    let bazels = [stage.bazel(&cache), stage.bazel(&cache)];
    // Paths that both have, with bytes of their own.
    bazels[1].write("gen/source.txt", "the other workspace\n");
    let expected = bazels.each_ref().map(|bazel| Expected::of(bazel, &["//..."]));

    if let Some(proxy) = way.wire() {
        proxy.hold();
    }
    let runs = bazels
        .each_ref()
        .map(|bazel| bazel.start("build", &[&daemon.bes(), "//..."]));
    if let Some(proxy) = way.wire() {
        eventually("both builds wait for outputs", || {
            let list = daemon.outhaul().statuses();
            list.len() == 2 && list.iter().all(|status| status["pending"].as_u64() > Some(0))
        });
        proxy.flow();
    }
    for run in runs {
        run.wait().ok();
    }
    for (bazel, expected) in bazels.iter().zip(&expected) {
        expected.are_there(bazel, &daemon.log());
    }
    assert_eq!(
        bazels[1].text("bazel-bin/gen/from_source.txt"),
        "the other workspace\n"
    );
    assert_eq!(bazels[0].text("bazel-bin/gen/from_source.txt"), "a source file\n");
    let list = daemon.outhaul().statuses();
    for status in &list {
        assert!(
            status["state"] == "settled" && status["failed"] == 0 && status["exit_code"] == 0,
            "{status:#}"
        );
    }
    let workspaces: BTreeSet<&str> = list.iter().filter_map(|s| s["workspace"].as_str()).collect();
    assert_eq!(
        workspaces,
        bazels.iter().map(|b| b.workspace().to_str().unwrap()).collect()
    );
}

/// Of a source, one small output and one of 32 MiB.
const RACE: &str = r#"
genrule(
    name = "small",
    srcs = ["//gen:source.txt"],
    outs = ["small.txt"],
    cmd = "cat $< > $@",
)

genrule(
    name = "large",
    srcs = ["//gen:source.txt"],
    outs = ["large.txt"],
    cmd = "yes \"$$(cat $<)\" 2>/dev/null | head -c 33554432 > $@ || test -s $@",
)
"#;

pub(crate) fn a_newer_build_wins_over_what_an_older_one_still_downloads(stage: &Stage) {
    let cache = stage.cache();
    let way = Way::to(&cache);
    let daemon = Daemon::reading(way.settings(), &[]);
    let bazel = stage.bazel(&cache);
    std::fs::create_dir(bazel.workspace().join("race")).unwrap();
    bazel.write("race/BUILD", RACE);
    let gen_build = std::fs::read_to_string(bazel.workspace().join("gen/BUILD")).unwrap();
    bazel.write(
        "gen/BUILD",
        &format!("exports_files([\"source.txt\"])\n{gen_build}"),
    );
    let targets = ["//race:small", "//race:large", "//gen:one"];
    let texts = ["the older source\n", "the newer source\n"];
    let [_, expected] = texts.map(|text| {
        bazel.write("gen/source.txt", text);
        Expected::of(&bazel, &targets)
    });

    let bes = daemon.bes();
    let in_the_background = |text: &str| {
        bazel.write("gen/source.txt", text);
        let args = [&[bes.as_str(), "--bes_upload_mode=fully_async"], &targets[..]].concat();
        let run = bazel.build(&args).ok();
        assert_eq!(executed(&run), 0, "{run}");
    };
    let Some(proxy) = way.wire() else {
        // From a directory, there is no telling how far the older build has come.
        for text in texts {
            in_the_background(text);
        }
        eventually("both builds are over", || {
            let list = daemon.outhaul().statuses();
            list.len() == 2
                && list
                    .iter()
                    .all(|status| status["pending"] == 0 && status["state"] != "running")
        });
        expected.are_there(&bazel, &daemon.log());
        assert_eq!(bazel.text("bazel-bin/race/small.txt"), texts[1]);
        return;
    };
    // Slow enough that neither output is there when the second build begins: the large one is in the middle, the
    // bytes of the small one are on the wire.
    proxy.slow(2 << 20);
    let before = proxy.passed();
    for text in texts {
        in_the_background(text);
        if text == texts[0] {
            eventually("the older build's download is under way", || {
                proxy.passed() - before > 1 << 20
            });
        }
    }
    let both = || -> Option<[Value; 2]> { daemon.outhaul().statuses().try_into().ok() };
    eventually("the older build is given up", || {
        both().is_some_and(|[_, older]| older["state"] == "superseded")
    });
    assert!(
        proxy.passed() - before < 30 << 20,
        "the test was too slow to mean anything"
    );
    proxy.flow();
    eventually("the newer build is settled", || {
        both().is_some_and(|[newer, _]| newer["state"] == "settled")
    });
    expected.are_there(&bazel, &daemon.log());
    assert_eq!(bazel.text("bazel-bin/race/small.txt"), texts[1]);
    let [newer, older] = both().unwrap();
    assert!(
        newer["failed"] == 0 && newer["downloaded"].as_u64() >= Some(2),
        "{newer:#}"
    );
    assert!(
        older["failed"] == 0 && older["superseded"].as_u64() >= Some(1) && older["pending"] == 0,
        "{older:#}"
    );
    let why = daemon
        .outhaul()
        .why(bazel.workspace(), "bazel-bin/race/large.txt");
    assert_eq!(why["invocation_id"], newer["invocation_id"], "{why:#}");
    // The command after finds nothing to do: what the older one had under way has not come in late.
    bazel
        .build(&[&[daemon.bes().as_str()], &targets[..]].concat())
        .ok();
    expected.are_there(&bazel, &daemon.log());
    assert_eq!(daemon.settled()["downloaded"], 0);
}
