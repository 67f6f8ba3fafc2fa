//! When a build tool's command returns.

use std::time::Duration;

use outhaul_testkit::{eventually, free_address};

use crate::harness::{Daemon, Expected, Proxy, Stage, Version};

for_each_bazel!(real:
    a_build_is_let_go_at_the_deadline_and_its_downloads_go_on,
    without_holding_a_build_returns_before_its_outputs,
);
for_each_bazel!(embedded: without_a_daemon_the_default_upload_mode_alone_fails);

fn a_build_is_let_go_at_the_deadline_and_its_downloads_go_on(stage: &Stage) {
    let took = returns_early(stage, &["--hold-timeout=1s"], |log, status| {
        assert!(log.contains("--hold-timeout"), "{log}");
        assert!(
            status["errors"].to_string().contains("was released after"),
            "{status:#}"
        );
    });
    assert!(took >= Duration::from_secs(1), "held for {took:?} only");
}

fn without_holding_a_build_returns_before_its_outputs(stage: &Stage) {
    returns_early(stage, &["--hold=none"], |_, status| {
        assert_eq!(status["errors"].as_array().map(Vec::len), Some(0), "{status:#}");
    });
}

/// Demands that a command returns while the cache sends nothing, that the outputs come when it does, and something of
/// the log and the status in between. Gives how long the command took.
fn returns_early(stage: &Stage, args: &[&str], check: fn(&str, &serde_json::Value)) -> Duration {
    let cache = stage.cache();
    let proxy = Proxy::start(&cache);
    let cache_flag = format!("--remote-cache={}", proxy.url());
    let daemon = Daemon::with(&[args, &[cache_flag.as_str()]].concat());
    let bazel = stage.bazel(&cache);
    let targets = ["//:a", "//gen:many", "//rules:nested"];
    let expected = Expected::of(&bazel, &targets);
    proxy.hold();
    let run = bazel
        .build(&[&[daemon.bes().as_str()], &targets[..]].concat())
        .ok();
    // With nothing held, the events may still be on their way through the daemon.
    eventually("the outputs are waited for", || {
        let status = daemon.outhaul().status();
        status["state"] == "draining" && status["pending"].as_u64() > Some(0)
    });
    assert!(!bazel.has("bazel-bin/a.txt"));
    check(&daemon.log(), &daemon.outhaul().status());
    proxy.flow();
    eventually("the outputs have come", || {
        daemon.outhaul().status()["state"] == "settled"
    });
    expected.are_there(&bazel, &daemon.log());
    daemon.settled();
    run.took
}

fn without_a_daemon_the_default_upload_mode_alone_fails(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let nobody = format!("--bes_backend=grpc://{}", free_address());
    let build = |mode: &str| bazel.build(&[&nobody, &format!("--bes_upload_mode={mode}"), "//:a"]);
    build("fully_async").ok();
    build("nowait_for_upload_complete").ok();
    // It tries for 16 s, so one of the Bazels has to do.
    if stage.version == Version::Seven {
        build("wait_for_upload_complete").expect(38);
    }
    // A command without events is not affected.
    bazel.build(&["//:a"]).ok();
}
