//! Notifications of the real daemon: posted, signed, given to a command; nobody waits for them.

use std::{
    path::Path,
    sync::{Arc, Mutex},
};

use axum::{Router, extract::State, http::HeaderMap};
use hmac::{Hmac, KeyInit as _, Mac as _};
use outhaul_testkit::{finish, until};
use rustix::process::Signal;
use serde_json::Value;
use sha2::Sha256;
use tokio::net::TcpListener;

use crate::support::{World, outhaul, run};

type Got = Arc<Mutex<Vec<(HeaderMap, Vec<u8>)>>>;

/// A server that takes whatever is posted.
async fn receiver() -> (String, Got) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let got = Got::default();
    let take = async |State(got): State<Got>, headers: HeaderMap, body: bytes::Bytes| {
        got.lock().unwrap().push((headers, body.to_vec()));
    };
    let app = Router::new().fallback(take).with_state(got.clone());
    tokio::spawn(async move { axum::serve(listener, app).await });
    (format!("http://{address}/hook"), got)
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
        .collect()
}

#[tokio::test]
async fn a_builds_targets_and_its_end_are_posted_and_given_to_a_command() {
    let world = World::new().await;
    let (url, got) = receiver().await;
    let secret = world.path("secret");
    std::fs::write(&secret, "between us\n").unwrap();
    let reported = world.dir.path().join("told");
    let server = world
        .serve(&[
            &format!("--notify-url={url}"),
            &format!("--notify-secret-file={secret}"),
            &format!(
                "--on-settled=cat >> '{}'; echo the command speaks",
                reported.display()
            ),
        ])
        .await;
    world.play(&world.build, server.address()).await;
    let is_end = |value: &Value| value["event"] == "invocation_settled";
    until("the command hears of the end", async || {
        lines(&reported).iter().any(is_end)
    })
    .await;
    let posted = || -> Vec<Value> {
        got.lock()
            .unwrap()
            .iter()
            .map(|(_, body)| serde_json::from_slice(body).unwrap())
            .collect()
    };
    until("the end is posted", async || posted().iter().any(is_end)).await;

    // What it prints is with the log.
    server.logged("--on-settled prints: the command speaks").await;

    let documents = posted();
    assert_eq!(documents, lines(&reported), "both get the same in the same order");
    let id = world.build.invocation_id();
    assert!(documents.iter().all(|d| d["invocation_id"] == id.as_str()));
    let state = |label: &str, aspect: bool| {
        let found = documents
            .iter()
            .find(|d| d["target"]["label"] == label && d["target"]["aspect"].is_string() == aspect);
        let found = found.unwrap_or_else(|| panic!("{label} in {documents:#?}"));
        found["target"]["state"].clone()
    };
    assert_eq!(state("//app:app", false), "settled");
    assert_eq!(state("//lib:lib", true), "settled");
    assert_eq!(state("//broken:broken", false), "failed");
    let end = documents.last().unwrap();
    assert!(is_end(end) && end["state"] == "settled", "{end:#}");
    let wanted = world.build.outputs().len() as u64;
    let summary = &end["summary"];
    let there = summary["downloaded"].as_u64().unwrap() + summary["present"].as_u64().unwrap();
    assert!(there == wanted && summary["failed"] == 0, "{end:#}");

    for (headers, body) in got.lock().unwrap().iter() {
        let mut mac = <Hmac<Sha256>>::new_from_slice(b"between us").unwrap();
        mac.update(body);
        let signature = format!("sha256={}", hex::encode(mac.finalize().into_bytes()));
        assert_eq!(headers["x-outhaul-signature-256"], signature.as_str());
    }
}

#[tokio::test]
async fn a_receiver_that_is_not_there_and_a_command_that_hangs_keep_nobody_waiting() {
    let world = World::new().await;
    let mut server = world
        .serve(&[
            "--notify-url=http://user:hush@127.0.0.1:1/hush",
            "--on-settled=sleep 1000",
        ])
        .await;
    world.play(&world.build, server.address()).await;
    world.assert_complete();
    server.signal(Signal::TERM);
    assert_eq!(server.end().await, Some(0));
    let log = server.logged("undelivered notifications").await;
    assert!(
        log.contains("http://127.0.0.1:1") && !log.contains("hush"),
        "{log}"
    );
}

#[tokio::test]
async fn wrong_settings_end_the_daemon_and_name_the_flag() {
    let world = World::new().await;
    for (args, parts) in [
        (&["--notify-url=hush.example.com"][..], &["--notify-url"][..]),
        (
            &["--notify-url=http://h/", "--notify-secret-file=/nowhere"],
            &["--notify-secret-file", "/nowhere"],
        ),
        (&["--on-settled="], &["--on-settled"]),
        (
            &["--notify-events=everything"],
            &["--notify-events", "everything"],
        ),
    ] {
        let (state, cache) = (world.state(), world.cache_flag());
        let all = [&["serve", &state, &cache], args].concat();
        let ran = run(all).await.says(2, parts);
        assert!(!ran.err.contains("hush"), "{}", ran.err);
    }
    // Help shows where settings come from, and none that may be secret.
    let mut command = outhaul();
    command
        .env("OUTHAUL_NOTIFY_URL", "https://hush")
        .args(["serve", "--help"]);
    let help = finish(command).await.expect(0).out();
    assert!(
        help.contains("OUTHAUL_NOTIFY_URL") && !help.contains("hush"),
        "{help}"
    );
}
