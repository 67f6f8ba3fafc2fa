//! A build event service behind the daemon that breaks off, lags or is away; a daemon that dies on the way there.

use std::time::Duration;

use outhaul_testkit::eventually;

use crate::harness::{Bazel, Daemon, Expected, Stage, Upstream};

for_each_bazel!(real with 4 rarely:
    an_upstream_that_breaks_off_again_and_again_gets_every_event_once,
    an_upstream_that_acknowledges_late_gets_every_event_once,
    an_upstream_that_is_away_for_a_whole_build_gets_it_later,
    a_daemon_that_is_killed_anywhere_forwards_every_event,
);

fn daemon(cache: &str, upstream: &Upstream) -> Daemon {
    Daemon::with(&[
        &format!("--remote-cache={cache}"),
        "--hold=target",
        &upstream.flag(),
    ])
}

/// Builds, and gives the invocation's id.
#[track_caller]
fn build(daemon: &Daemon, bazel: &Bazel, args: &[&str]) -> String {
    let run = bazel.build(&[&[daemon.bes().as_str()], args].concat()).ok();
    let status = daemon.settled();
    assert_eq!(status["exit_code"], 0, "{run}");
    status["invocation_id"].as_str().unwrap().to_owned()
}

fn an_upstream_that_breaks_off_again_and_again_gets_every_event_once(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let upstream = Upstream::start();
    let daemon = daemon(cache.url(), &upstream);
    for (every, targets) in [(40, "//..."), (6, "//:a")] {
        upstream.cut_after(every);
        let before = upstream.calls();
        let id = build(&daemon, &bazel, &[targets]);
        // What is left does not fit into one call's share, unless the test is over by then.
        let stream = upstream.complete(&id, || daemon.log());
        upstream.repeats_only_what_was_unacknowledged(&id);
        assert!(
            upstream.calls() - before >= 3,
            "{} calls for {} events, broken after {every} each",
            upstream.calls() - before,
            stream.len()
        );
    }
}

fn an_upstream_that_acknowledges_late_gets_every_event_once(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let upstream = Upstream::start();
    let daemon = daemon(cache.url(), &upstream);
    upstream.late(Duration::from_secs(2));
    let id = build(&daemon, &bazel, &["//..."]);
    // The command's last acknowledgement is upstream's last one: everything is there when it has returned.
    let stream = upstream.stream(&id);
    assert!(stream.last().is_some_and(|seen| seen.is_end()));
    upstream.complete(&id, || daemon.log());
    assert_eq!(upstream.seen(&id).len(), stream.len(), "nothing came twice");
}

fn an_upstream_that_is_away_for_a_whole_build_gets_it_later(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let expected = Expected::of(&bazel, &["//..."]);
    let mut upstream = Upstream::start();
    let mut daemon = daemon(cache.url(), &upstream);
    upstream.go_down();
    // Neither command waits for what is not there: each is done long before --hold-timeout.
    let first = build(&daemon, &bazel, &["//..."]);
    expected.are_there(&bazel, &daemon.log());
    // The daemon does not forget it either.
    daemon.restart();
    let second = build(&daemon, &bazel, &["//:a"]);
    assert_eq!(upstream.invocations(), Vec::<String>::new());
    upstream.come_back();
    for id in [first, second] {
        upstream.complete(&id, || daemon.log());
    }
    // Those of the first build ended with the daemon that was restarted.
    eventually("the second build's lifecycle calls have come", || {
        upstream.lifecycle().len() >= 4
    });
    eventually("both deliveries are over", || {
        let journals = std::fs::read_dir(daemon.outhaul().state_dir().join("journal")).unwrap();
        let settled = |entry: &std::fs::DirEntry| entry.path().extension().is_some_and(|e| e == "settled");
        journals.flatten().filter(settled).count() == 2
    });
    // What was delivered once is not delivered again after another start.
    let calls = upstream.calls();
    daemon.restart();
    build(&daemon, &bazel, &["//:a"]);
    let third = upstream.invocations().pop().unwrap();
    upstream.complete(&third, || daemon.log());
    assert_eq!(upstream.calls(), calls + 1);
}

fn a_daemon_that_is_killed_anywhere_forwards_every_event(stage: &Stage) {
    const POINTS: i64 = 10;
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let upstream = Upstream::start();
    let mut daemon = daemon(cache.url(), &upstream);
    let whole = build(&daemon, &bazel, &["//..."]);
    // Later builds have about as many events: they begin and end with the same ones.
    let length = i64::try_from(upstream.complete(&whole, || daemon.log()).len()).unwrap() * 2 / 3;
    for round in 0..POINTS {
        // In each tenth of the stream, the first and the last event that is sure to come included.
        let (low, high) = (1 + length * round / POINTS, 1 + length * (round + 1) / POINTS);
        let point = match round {
            0 => 1,
            _ => rand::random_range(low..high.max(low + 1)),
        };
        upstream.pause_at(point);
        let known = upstream.invocations();
        let running = bazel.start("build", &[&daemon.bes(), "//..."]);
        eventually("the stream has come so far", || upstream.is_paused());
        daemon.kill();
        upstream.pause_at(0);
        daemon.restart();
        let run = running.wait();
        let note = format!(
            "killed at event {point} of about {length}; {run}\n{}",
            daemon.log()
        );
        assert_eq!(run.code, Some(0), "{note}");
        let new: Vec<String> = upstream
            .invocations()
            .into_iter()
            .filter(|id| !known.contains(id))
            .collect();
        let [id] = new.as_slice() else {
            panic!("one stream was to come, not {new:?}; {note}");
        };
        let stream = upstream.complete(id, || note.clone());
        let last = stream
            .iter()
            .rev()
            .find_map(|seen| seen.decoded())
            .expect("an event");
        assert!(last.last_message, "{note}");
    }
}
