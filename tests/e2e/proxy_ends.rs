//! Commands that end otherwise than they meant to, with a build event service behind the daemon.

use std::{path::Path, time::Duration};

use outhaul_testkit::eventually;
use rustix::process::Signal;

use crate::harness::{Daemon, Expected, Proxy, Stage, Upstream};

for_each_bazel!(real with 4 rarely:
    an_interrupted_build_leaves_its_outputs_and_a_stream_without_gaps,
    a_command_that_would_give_up_waiting_ends_well_and_leaves_downloads_and_delivery_going_on,
    a_cancelled_stream_leaves_downloads_going_on_until_superseded,
);

/// Bazel's exit code of an interrupted command.
const INTERRUPTED: i32 = 8;

/// An output that is there at once, and an action that takes for ever.
const ENDLESS: &str = r#"
genrule(
    name = "endless",
    outs = ["endless.txt"],
    cmd = "sleep 1000; echo done > $@",
)
"#;

fn an_interrupted_build_leaves_its_outputs_and_a_stream_without_gaps(stage: &Stage) {
    let cache = stage.cache();
    let proxy = Proxy::start(&cache);
    let bazel = stage.bazel(&cache);
    std::fs::create_dir(bazel.workspace().join("endless")).unwrap();
    bazel.write("endless/BUILD", ENDLESS);
    let expected = Expected::of(&bazel, &["//:a", "//gen:many"]);
    let upstream = Upstream::start();
    let daemon = Daemon::with(&[
        &format!("--remote-cache={}", proxy.url()),
        "--hold=target",
        &upstream.flag(),
    ]);
    proxy.hold();
    let running = bazel.start("build", &[&daemon.bes(), "//:a", "//gen:many", "//endless"]);
    eventually("the build has outputs", || {
        daemon
            .outhaul()
            .statuses()
            .first()
            .is_some_and(|status| status["pending"].as_u64() >= Some(4))
    });
    running.signal(Signal::INT);
    // It waits for its stream, which waits for the outputs.
    proxy.flow();
    running.wait().expect(INTERRUPTED);
    eventually("the invocation is over", || {
        let status = daemon.outhaul().status();
        status["pending"] == 0 && status["state"] != "running" && status["state"] != "draining"
    });
    expected.are_there(&bazel, &daemon.log());
    let id = daemon.outhaul().status()["invocation_id"]
        .as_str()
        .unwrap()
        .to_owned();
    let stream = upstream.complete(&id, || daemon.log());
    assert!(stream.len() > 10, "{} events", stream.len());
}

fn a_command_that_would_give_up_waiting_ends_well_and_leaves_downloads_and_delivery_going_on(stage: &Stage) {
    let cache = stage.cache();
    let proxy = Proxy::start(&cache);
    let bazel = stage.bazel(&cache);
    let targets = ["//:a", "//gen:many"];
    let expected = Expected::of(&bazel, &targets);
    let upstream = Upstream::start();
    let daemon = Daemon::with(&[
        &format!("--remote-cache={}", proxy.url()),
        "--hold=target",
        "--hold-timeout=5m",
        &upstream.flag(),
    ]);
    proxy.hold();
    let bes = daemon.bes();
    let run = bazel
        .build(&[&[bes.as_str(), "--bes_timeout=3s"], &targets[..]].concat())
        .ok();
    assert!(run.took >= Duration::from_secs(2), "{run}");
    let status = daemon.outhaul().status();
    assert!(status["pending"].as_u64() > Some(0), "{status:#}");
    let id = status["invocation_id"].as_str().unwrap().to_owned();
    proxy.flow();
    eventually("the outputs have come", || expected.missing(&bazel).is_empty());
    upstream.complete(&id, || daemon.log());
    let log = daemon.log();
    assert!(
        log.contains("the build's --bes_timeout=3s") && !log.contains("--hold-timeout"),
        "{log}"
    );
}

fn a_cancelled_stream_leaves_downloads_going_on_until_superseded(stage: &Stage) {
    let cache = stage.cache();
    let proxy = Proxy::start(&cache);
    let bazel = stage.bazel(&cache);
    let targets = ["//:a", "//gen:many"];
    let expected = Expected::of(&bazel, &targets);
    let upstream = Upstream::start();
    let daemon = Daemon::with(&[
        &format!("--remote-cache={}", proxy.url()),
        "--hold=target",
        &upstream.flag(),
    ]);
    let bes = daemon.bes();
    let unwaited = || {
        let known = daemon.outhaul().statuses().len();
        let flags = [bes.as_str(), "--bes_upload_mode=nowait_for_upload_complete"];
        bazel.build(&[&flags[..], &targets[..]].concat()).ok();
        // Its events may still be on their way.
        eventually("the outputs are waited for", || {
            let list = daemon.outhaul().statuses();
            list.len() > known && list[0]["pending"].as_u64() > Some(0)
        });
        let status = daemon.outhaul().status();
        status["invocation_id"].as_str().unwrap().to_owned()
    };
    proxy.hold();
    let first = unwaited();
    // Waits for the stream for five seconds, and cancels it.
    let run = bazel.run("info", &["release"]).ok();
    assert!(run.err.contains("Cancel"), "{run}");
    let status = || {
        let list = daemon.outhaul().statuses();
        let of = |id: &str| {
            let found = list.iter().find(|status| status["invocation_id"] == id);
            found.expect("it is recorded").clone()
        };
        of(&first)
    };
    assert!(status()["pending"].as_u64() > Some(0), "{:#}", status());
    proxy.flow();
    eventually("the outputs have come", || expected.missing(&bazel).is_empty());
    upstream.complete(&first, || daemon.log());

    // Once more, and now a newer build takes over.
    bazel.delete("bazel-bin/gen/many.d/first.txt");
    proxy.hold();
    let second = unwaited();
    bazel.run("info", &["release"]).ok();
    let running = bazel.start("build", &[&[bes.as_str()], &targets[..]].concat());
    eventually("the older build is given up", || {
        let list = daemon.outhaul().json(Path::new("/"), "status", &[&second]);
        list[0]["state"] == "superseded"
    });
    proxy.flow();
    running.wait().ok();
    expected.are_there(&bazel, &daemon.log());
    daemon.settled();
    upstream.complete(&second, || daemon.log());
    assert_eq!(upstream.invocations().len(), 3);
    let third = upstream.invocations().pop().unwrap();
    upstream.complete(&third, || daemon.log());
}
