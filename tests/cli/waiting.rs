//! `outhaul wait`: before a build, during it and after it; what fails, what never comes, and what is cut off.

use std::time::Duration;

use outhaul_testkit::{
    Ran,
    cache::{RequestFault, Rpc, Times},
    finish, in_time,
};
use rustix::process::Signal;
use serde_json::Value;
use tokio::{
    io::{BufReader, Lines},
    process::{Child, ChildStdout},
};

use crate::support::{World, following, outhaul, run};

/// What a stalled cache gets: tried again and again, at once.
pub const PERSISTENT: &[&str] = &[
    "--hold=none",
    "--remote-timeout=500ms",
    "--remote-retries=1000",
    "--remote-retry-max-delay=50ms",
];

/// A wait that goes on.
struct Waiting {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Waiting {
    /// Starts one, and returns once nothing can be missed any more.
    async fn start(world: &World, args: &[&str]) -> Self {
        let mut waiting = Self::unheard(world, args);
        waiting.hear("waiting").await;
        waiting
    }

    fn unheard(world: &World, args: &[&str]) -> Self {
        let mut command = outhaul();
        command.args(["wait", "--json"]).arg(world.state()).args(args);
        let (child, lines) = following(command);
        Self { child, lines }
    }

    async fn next(&mut self) -> Value {
        let line = in_time(self.lines.next_line()).await;
        let line = line.unwrap().expect("ended early");
        serde_json::from_str(&line).unwrap()
    }

    /// The next event of that name, whatever comes before it.
    async fn hear(&mut self, event: &str) -> Value {
        loop {
            let value = self.next().await;
            if value["event"] == event {
                return value;
            }
            assert_ne!(value["event"], "result", "no {event:?} before {value:#}");
        }
    }

    /// The result, which is the last line, and with whose code it ends.
    async fn end(mut self) -> Value {
        let result = self.hear("result").await;
        assert!(self.lines.next_line().await.unwrap().is_none());
        let status = in_time(self.child.wait()).await;
        assert_eq!(
            status.unwrap().code().map(Value::from),
            Some(result["exit_code"].clone())
        );
        result
    }
}

async fn waited(world: &World, args: &[&str]) -> Ran {
    let mut command = outhaul();
    command.args(["wait", "--json"]).arg(world.state()).args(args);
    finish(command).await
}

fn result(ran: &Ran) -> Value {
    let last = ran.json().pop().unwrap();
    assert_eq!(last["event"], "result", "{last:#}");
    last
}

/// Lets the cache go on.
pub fn unblock(world: &World) {
    world.cache.faults().clear();
    world.cache.faults().sever_connections();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_that_begins_before_the_build_hears_it_and_ends_with_its_files_on_disk() {
    let world = World::new().await;
    let server = world.serve(&["--hold=none"]).await;
    let workspace = format!("--workspace={}", world.path("workspace"));
    let id = format!("--invocation={}", world.build.invocation_id());
    // Two at once for the same, one of the next build, one by the id, and one for another workspace.
    let one = Waiting::start(&world, &[&workspace, "//app:app"]).await;
    let two = Waiting::start(&world, &[&workspace, "--next", "//app/...", "//lib:all"]).await;
    let by_id = Waiting::start(&world, &[&id, "//lib:lib%lint"]).await;
    let elsewhere = Waiting::start(&world, &["--workspace=/elsewhere", "--timeout=6s"]).await;
    world.play(&world.build, server.address()).await;
    let answer = one.end().await;
    assert_eq!(
        (&answer["result"], &answer["exit_code"]),
        (&"settled".into(), &0.into()),
        "{answer:#}"
    );
    assert_eq!(answer["targets"][0]["label"], "//app:app");
    let (app, digest) = world.file("app/app");
    let bytes = std::fs::read(world.exec_root().join(&app.path)).unwrap();
    assert_eq!(bytes.len() as u64, digest.size());
    for waiting in [two, by_id] {
        let answer = waiting.end().await;
        assert_eq!(answer["result"], "settled", "{answer:#}");
        assert_eq!(answer["invocation"]["invocation_id"], world.build.invocation_id());
    }
    let answer = elsewhere.end().await;
    assert_eq!(
        (&answer["result"], &answer["exit_code"]),
        (&"timed_out".into(), &4.into())
    );
    assert_eq!(answer["invocation"], Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_during_the_build_reports_each_change_and_only_of_what_was_asked() {
    let world = World::new().await;
    world
        .cache
        .faults()
        .request(Rpc::StreamRead, RequestFault::Stall, Times::Always);
    let server = world.serve(PERSISTENT).await;
    world.play(&world.build, server.address()).await;
    let mut waiting = Waiting::unheard(&world, &["//app:app"]);
    let opening = waiting.hear("invocation").await;
    assert_eq!(opening["invocation"]["state"], "draining", "{opening:#}");
    let known = waiting.hear("target_known").await;
    assert_eq!(known["target"]["label"], "//app:app", "{known:#}");
    // The whole build cannot be settled either.
    let ran = waited(&world, &["--timeout=300ms"]).await.expect(4);
    let timed_out = result(&ran);
    assert_eq!(timed_out["result"], "timed_out");
    unblock(&world);
    // Its small outputs may have come after the question as well.
    loop {
        let heard = waiting.hear("output").await;
        let output = &heard["output"];
        assert_eq!(
            (&output["label"], &output["outcome"]),
            (&"//app:app".into(), &"downloaded".into()),
            "{heard:#}"
        );
        if output["bytes"] == 5_000_000 {
            assert_eq!(output["source"], "stream", "{heard:#}");
            break;
        }
    }
    assert_eq!(waiting.hear("target_settled").await["target"]["state"], "settled");
    assert_eq!(waiting.end().await["result"], "settled");
}

#[tokio::test(flavor = "multi_thread")]
async fn after_the_build_everything_is_answered_from_what_is_known() {
    let world = World::new().await;
    world.cache.store().remove(world.file("liblib.a").1);
    let mut server = world.serve(&[]).await;
    world.play(&world.build, server.address()).await;
    for daemon in [true, false] {
        let settled = waited(&world, &["//assets/...", "//app:current"]).await.expect(0);
        assert_eq!(result(&settled)["targets"].as_array().unwrap().len(), 3);
        // Evicted; and shared by another target.
        for lost in ["//lib:lib", "//app:app"] {
            let failed = result(&waited(&world, &[lost]).await.expect(1));
            assert_eq!(failed["result"], "failed");
            assert!(
                failed["failures"][0].as_str().unwrap().contains(lost),
                "{failed:#}"
            );
        }
        // Failed to build; and so the whole build did.
        let unbuilt = result(&waited(&world, &["//broken:broken"]).await.expect(1));
        assert_eq!(unbuilt["failures"][0], "//broken:broken: was not built");
        let whole = result(&waited(&world, &[]).await.expect(1));
        assert!(whole["failures"].to_string().contains("liblib.a"), "{whole:#}");
        // Never there.
        let missing = result(&waited(&world, &["//no:such", "//app:current"]).await.expect(3));
        assert_eq!(missing["not_found"], serde_json::json!(["//no:such"]));
        let mut text = outhaul();
        text.args(["wait", "//no:such"]).arg(world.state());
        finish(text).await.says(3, &["//no:such", "no such target"]);
        // What has not begun may still come to a daemon, and to nobody else.
        let timeout = if daemon { "--timeout=300ms" } else { "--timeout=1m" };
        let unknown = waited(&world, &["--invocation=nonsense", timeout]).await;
        let next = waited(&world, &["--next", timeout]).await;
        if daemon {
            unknown.expect(4);
            next.expect(4);
            server.signal(Signal::TERM);
            assert_eq!(server.end().await, Some(0));
        } else {
            unknown.says(3, &["nonsense", "no daemon answers"]);
            next.says(3, &["no daemon answers"]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_build_of_the_workspace_is_meant() {
    let world = World::new().await;
    let server = world.serve(&[]).await;
    world.play(&world.build, server.address()).await;
    let second = world.build.incremental();
    world.play(&second, server.address()).await;
    let newest = result(&waited(&world, &["//app:app"]).await.expect(0));
    assert_eq!(newest["invocation"]["invocation_id"], second.invocation_id());
    // That around the directory, as Bazel finds it.
    std::fs::create_dir_all(world.path("workspace/pkg")).unwrap();
    std::fs::write(world.path("workspace/MODULE.bazel"), "").unwrap();
    std::fs::create_dir_all(world.path("other")).unwrap();
    std::fs::write(world.path("other/WORKSPACE"), "").unwrap();
    for (directory, code) in [("workspace/pkg", 0), ("other", 4)] {
        let mut command = outhaul();
        command
            .args(["wait", "--timeout=1m", "//app:app"])
            .arg(world.state())
            .current_dir(world.path(directory));
        if code == 4 {
            command.arg("--timeout=300ms");
        }
        finish(command).await.expect(code);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_outlives_the_daemon() {
    let world = World::new().await;
    world
        .cache
        .faults()
        .request(Rpc::StreamRead, RequestFault::Stall, Times::Always);
    let mut server = world.serve(PERSISTENT).await;
    let mut next = Waiting::start(&world, &["--next", "//app:app"]).await;
    let mut later = Waiting::start(&world, &["--invocation=later", "--timeout=1m"]).await;
    // Ending is not held up by those who wait.
    server.signal(Signal::TERM);
    assert_eq!(server.end().await, Some(0));
    let log = server.logged("shutting down: SIGTERM").await;
    assert!(!log.contains("cut"), "{log}");
    next.hear("lost").await;
    later.hear("lost").await;

    let mut server = world.serve(PERSISTENT).await;
    next.hear("waiting").await;
    later.hear("waiting").await;
    world.play(&world.build, server.address()).await;
    next.hear("target_known").await;
    server.signal(Signal::KILL);
    server.end().await;
    next.hear("lost").await;

    let _server = world.serve(PERSISTENT).await;
    let opening = next.hear("invocation").await;
    assert_eq!(
        opening["invocation"]["invocation_id"],
        world.build.invocation_id()
    );
    unblock(&world);
    let answer = next.end().await;
    assert_eq!(answer["result"], "settled", "{answer:#}");
    later.child.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_build_that_takes_over_fails_the_wait_for_the_older_one() {
    let world = World::new().await;
    world
        .cache
        .faults()
        .request(Rpc::StreamRead, RequestFault::Stall, Times::Always);
    let server = world.serve(PERSISTENT).await;
    world.play(&world.build, server.address()).await;
    let mut older = Waiting::start(&world, &["//app:app"]).await;
    older.hear("target_known").await;
    let second = world.build.incremental();
    let newer = Waiting::start(&world, &["--next", "//app:app"]).await;
    world.play(&second, server.address()).await;
    let answer = older.end().await;
    assert_eq!(answer["result"], "failed", "{answer:#}");
    assert!(
        answer["failures"].to_string().contains("newer build"),
        "{answer:#}"
    );
    unblock(&world);
    let answer = newer.end().await;
    assert_eq!(answer["invocation"]["invocation_id"], second.invocation_id());
    assert_eq!(answer["result"], "settled", "{answer:#}");
}

#[tokio::test]
async fn wrong_questions_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let state = format!("--state-dir={}", dir.path().join("none").display());
    for (args, parts) in [
        (&["app:app"][..], &["app:app", "target pattern"][..]),
        (&["--timeout=x"], &["--timeout=x"]),
        (&["--timeout=0s"], &["--timeout=0s"]),
        (&["--invocation=a", "--next"], &["--next"]),
        (&["--control=grpc://127.0.0.1:1"], &["--control-token-file"]),
    ] {
        let all = ["wait", &state].into_iter().chain(args.iter().copied());
        run(all).await.says(2, parts);
    }
    // Nothing is there, and nothing can come.
    run(["wait", &state]).await.says(3, &["nothing is recorded"]);
    let named = format!("--control=unix:{}", dir.path().join("no.sock").display());
    run(["wait", &state, &named]).await.says(1, &["no.sock"]);
}

/// Of a daemon that was started just now, and has not opened its listeners yet.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_another_process_holds_is_waited_for() {
    let world = World::new().await;
    let mut server = world.serve(&[]).await;
    world.play(&world.build, server.address()).await;
    server.signal(Signal::TERM);
    assert_eq!(server.end().await, Some(0));
    let held = std::path::PathBuf::from(world.path("state"));
    let (record, _) = tokio::task::spawn_blocking(move || outhaul::record::Record::open(&held).unwrap())
        .await
        .unwrap();
    let waited_for = waited(&world, &["--timeout=300ms", "//app:app"]).await;
    waited_for.expect(4);
    let waiting = Waiting::unheard(&world, &["//app:app"]);
    tokio::task::spawn_blocking(move || record.close()).await.unwrap();
    assert_eq!(waiting.end().await["result"], "settled");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_is_not_idle_while_somebody_waits() {
    let world = World::new().await;
    let mut server = world.serve(&["--idle-timeout=200ms"]).await;
    let waiting = Waiting::start(&world, &["--next", "//app:app"]).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(server.is_running(), "a build may begin at any time");
    world.play(&world.build, server.address()).await;
    assert_eq!(waiting.end().await["result"], "settled");
    assert_eq!(server.end().await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_is_not_idle_while_upstream_has_not_got_everything() {
    let world = World::new().await;
    let args = ["--idle-timeout=200ms", "--bes-backend=grpc://127.0.0.1:1"];
    let mut server = world.serve(&args).await;
    world.play(&world.build, server.address()).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(server.is_running(), "upstream may come back");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_a_record_that_another_process_has_says_so() {
    let world = World::new().await;
    // It holds the record, and nobody finds its socket.
    let hidden = format!("--control-socket={}", world.path("hidden.sock"));
    let _server = world.serve(&[&hidden]).await;
    let ran = waited(&world, &["--timeout=3s"]).await;
    assert_eq!(ran.err.matches("outhaul: waiting: ").count(), 1, "{}", ran.err);
    // Nobody listens.
    assert!(ran.json().iter().all(|line| line["event"] != "waiting"));
    assert_eq!(result(&ran)["result"], "timed_out");
}
