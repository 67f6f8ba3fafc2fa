//! `outhaul doctor`, in workspaces whose Bazel has a few lines.

use std::process::{Command, Stdio};

use axum::{Router, http::header::DATE};
use outhaul_testkit::{Ran, Running, finish, free_address};
use serde_json::Value;

use crate::{
    running::Place,
    support::{World, run},
};

const TEST: &[&str] = &["bazel", "test", "//a"];

fn workspace() -> Place {
    let place = Place::new().arg("--json");
    std::fs::write(place.path_of("MODULE.bazel"), "").unwrap();
    place
}

async fn doctor(place: &Place) -> Ran {
    finish(place.calling("doctor", TEST)).await
}

fn findings(ran: &Ran) -> Vec<Value> {
    let out = ran.out();
    out.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// The level of a finding; of several with the same code, the first.
fn level(ran: &Ran, code: &str) -> String {
    let found = findings(ran);
    let found = found.iter().find(|finding| finding["code"] == code);
    found.map_or_else(String::new, |finding| {
        finding["level"].as_str().unwrap().to_owned()
    })
}

#[tokio::test]
async fn bazel_is_not_started_and_nothing_is_written() {
    let place = workspace();
    let ran = doctor(&place).await.expect(0);
    assert_eq!(level(&ran, "bazel"), "ok");
    assert_eq!(level(&ran, "bazel-options"), "note");
    assert_eq!(level(&ran, "state-directory"), "ok");
    assert_eq!(level(&ran, "record"), "ok");
    assert!(place.lines("asked").is_empty() && place.lines("calls").is_empty());
    assert!(!place.path_of(".local").exists());
    for finding in findings(&ran) {
        assert_eq!(finding["fix"].is_null(), finding["level"] == "ok", "{finding}");
    }
}

/// Of a command that runs no Bazel there is nothing to be said, and of a directory without a workspace little.
#[tokio::test]
async fn what_is_no_build_is_said_to_be_none() {
    let place = workspace();
    let query = finish(place.calling("doctor", &["bazel", "query", "//a"])).await;
    query.says(2, &["bazel build"]);
    let empty = Place::new().arg("--json");
    assert_eq!(level(&doctor(&empty).await.expect(1), "workspace"), "error");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bazel_server_that_runs_is_asked() {
    let place = workspace();
    let directory = place.path_of("").canonicalize().unwrap();
    let mut server = Command::new("sh")
        .args(["-c", "read line", "bazel(ws)"])
        .arg(format!("--workspace_directory={}", directory.display()))
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let ran = doctor(&place).await.expect(0);
    drop(server.stdin.take());
    server.wait().unwrap();
    assert_eq!(level(&ran, "bazel-options"), "ok");
    assert_eq!(place.lines("asked").len(), 1);
    assert!(place.lines("calls").is_empty(), "only asked, never run");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_options_of_rc_files_and_their_cache_are_looked_at() {
    let world = World::new().await;
    let rc = format!(
        "\"--remote_cache={}\",\"--bes_timeout=30s\"",
        world.cache.endpoint()
    );
    let place = workspace().arg("--start-bazel").with("RC", &rc);
    let ran = doctor(&place).await.expect(0);
    for (code, expected) in [
        ("bazel-options", "ok"),
        ("bes-backend", "ok"),
        ("bes-timeout", "warning"),
        ("cache", "ok"),
        // This Bazel is a script, which may go on when the time is up.
        ("download-mode", "note"),
        ("output-base", "ok"),
    ] {
        assert_eq!(level(&ran, code), expected, "{code}: {}", ran.out());
    }
    assert!(ran.out().contains("a gRPC cache"), "{}", ran.out());
    doctor(&place.arg("--strict")).await.expect(1);
}

#[tokio::test]
async fn a_cache_that_is_down_is_an_error_and_no_secret_is_shown() {
    let rc = "\"--remote_cache=http://me:hunter2@127.0.0.1:1/x\",\"--remote_header=authorization=Bearer abcdef123\",\
              \"--bes_backend=grpc://me:hunter2@127.0.0.1:1\"";
    let place = workspace().arg("--start-bazel").with("RC", rc);
    let ran = doctor(&place).await.expect(1);
    assert_eq!(level(&ran, "cache"), "error");
    for secret in ["hunter2", "abcdef123"] {
        assert!(
            !ran.out().contains(secret) && !ran.err.contains(secret),
            "{secret}"
        );
    }
    let text = finish({
        let mut command = Place::calling(&place, "doctor", TEST);
        command.env("OUTHAUL_LOG", "debug");
        command
    })
    .await;
    assert!(
        !text.err.contains("hunter2") && !text.err.contains("abcdef123"),
        "{}",
        text.err
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http_caches_clock_is_compared_with_ours() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let app = Router::new().fallback(async || {
        let date = [(DATE, "Thu, 01 Jan 1998 00:00:00 GMT")];
        (axum::http::StatusCode::NOT_FOUND, date)
    });
    tokio::spawn(async move { axum::serve(listener, app).await });
    let rc = format!("\"--remote_cache=http://{address}\"");
    let place = workspace().arg("--start-bazel").with("RC", &rc);
    let ran = doctor(&place).await.expect(0);
    assert_eq!(level(&ran, "cache"), "ok");
    assert_eq!(level(&ran, "clock"), "warning", "{}", ran.out());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_the_port_of_the_rc_file_and_the_record_is_said() {
    let world = World::new().await;
    let server: Running = world.serve(&[]).await;
    let rc = format!("\"--bes_backend={}\"", server.address());
    let place = workspace()
        .arg("--start-bazel")
        .arg(&world.state())
        .with("RC", &rc);
    let ran = doctor(&place).await.expect(0);
    assert_eq!(level(&ran, "port"), "ok");
    let version = format!("outhaul {} listens", env!("CARGO_PKG_VERSION"));
    assert!(ran.out().contains(&version), "{}", ran.out());
    assert!(ran.out().contains("which answers"), "{}", ran.out());
    drop(server);

    let rc = format!("\"--bes_backend=grpc://{}\"", free_address());
    let place = workspace()
        .arg("--start-bazel")
        .arg(&world.state())
        .with("RC", &rc);
    let ran = doctor(&place).await.expect(1);
    assert_eq!(level(&ran, "port"), "error");
    assert!(ran.out().contains("the record opens"), "{}", ran.out());
}

/// For people: a line for what was found, and one for what to do.
#[tokio::test]
async fn each_finding_has_a_line_and_what_to_do_about_it_another() {
    let dir = tempfile::tempdir().unwrap();
    let workspace = format!("--workspace={}", dir.path().display());
    let state = format!("--state-dir={}", dir.path().join("state").display());
    let ran = run(["doctor", &workspace, &state, "--", "/no/bazel", "build"])
        .await
        .expect(1);
    let out = ran.out();
    let lines: Vec<&str> = out.lines().collect();
    let at = lines
        .iter()
        .position(|line| line.starts_with("error    workspace: "))
        .unwrap();
    assert!(lines[at + 1].starts_with("         -> "), "{out}");
    assert!(ran.err.contains("found 2 errors"), "{}", ran.err);
}
