//! What comes in goes upstream: all of it, once, in order, as it came.

mod completions;

use std::{path::Path, time::Duration};

use bytes::{BufMut as _, Bytes, BytesMut};
use outhaul_testkit::PATIENCE;
use prost::{Message as _, encoding::encode_varint};
use tonic::{Code, metadata::MetadataMap};

use super::{
    backend::{Backend, Came, client, upload},
    harness::{Daemon, Upload, options, request},
};
use crate::{
    bes::{BesOptions, HoldMode},
    builds::{Progress, StreamEnd},
    journal::Journal,
    proto::google::devtools::build::v1::{
        BuildEvent, OrderedBuildEvent, PublishLifecycleEventRequest, StreamId,
        build_event::{self, BuildComponentStreamFinished},
    },
};

async fn start(backend: &Backend, options: BesOptions, journal: Option<&Path>) -> Daemon {
    Daemon::forwarding(options, journal, Some(backend.upstream())).await
}

/// Waits until the journal says that nothing is left to do.
async fn settled(dir: &Path, invocation: &str) {
    let settled = async {
        while !Journal::view(dir).find(invocation).is_ok_and(|e| e.settled) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, settled).await.expect("settled");
}

/// A field of a message inside another one.
fn field(tag: u64, content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_varint(tag << 3 | 2, &mut bytes);
    encode_varint(content.len() as u64, &mut bytes);
    bytes.extend_from_slice(content);
    bytes
}

/// A request with unknown fields on every level, before and after the known ones, and a known one that is
/// split in two: decoding and encoding it again would change it.
fn strange(sequence: i64, content: &[u8]) -> Bytes {
    let unknown = |n: u8| field(900 + u64::from(n), &[n; 3]);
    let id = [
        unknown(1),
        field(1, b"build"),
        field(6, b"one"),
        vec![3 << 3, 3],
        unknown(2),
    ]
    .concat();
    let mut number = vec![2 << 3];
    encode_varint(sequence as u64, &mut number);
    let any = [field(2, content), unknown(3), field(1, b"type")].concat();
    let event = [unknown(4), field(60, &any), field(1, &[])].concat();
    let (first, rest) = (field(1, &id), [unknown(5), number, field(3, &event)].concat());
    let mut request = BytesMut::new();
    request.put_slice(&field(4, &first));
    request.put_slice(&unknown(6));
    request.put_slice(&field(4, &rest));
    request.put_slice(&field(6, b"project"));
    request.freeze()
}

fn finish(sequence: i64) -> Bytes {
    let event = build_event::Event::ComponentStreamFinished(BuildComponentStreamFinished { r#type: 1 });
    request("one", sequence, event).encode_to_vec().into()
}

#[tokio::test]
async fn every_byte_arrives_with_fields_that_nobody_knows() {
    let dir = tempfile::tempdir().unwrap();
    for journal in [None, Some(dir.path())] {
        let backend = Backend::start().await;
        let daemon = start(&backend, options(HoldMode::None), journal).await;
        let mut headers = MetadataMap::new();
        headers.insert("x-api-key", "secret".parse().unwrap());
        let (sender, mut answers) = upload(&daemon, headers).await;
        let mut large = b"large".to_vec();
        large.resize(10 << 20, 0);
        let sent = [
            strange(1, b"one"),
            strange(2, &large),
            strange(3, b"three"),
            finish(4),
        ];
        for request in &sent {
            sender.send(request.clone()).unwrap();
        }
        drop(sender);
        for n in 1..=4 {
            assert_eq!(answers.message().await.unwrap().unwrap().sequence_number, n);
        }
        backend.until_closed().await;
        assert!(backend.requests() == sent, "not what was sent");
        assert_eq!(backend.headers()[0].get("x-api-key").unwrap(), "secret");
        daemon.engine.until_ended(StreamEnd::Finished).await;
        assert_eq!(daemon.engine.numbers(), [1, 2, 3]);
        daemon.stop().await;
    }
    let records: Vec<_> = Journal::view(dir.path())
        .read("one")
        .unwrap()
        .map(Result::unwrap)
        .collect();
    // The headers come first.
    assert_eq!(records.len(), 5);
    assert_eq!(records[1].payload, strange(1, b"one"));
    assert_eq!(records[3].build_event().unwrap(), "three");
}

#[tokio::test]
async fn a_hundred_thousand_events_go_through_in_order() {
    const EVENTS: i64 = 100_000;
    let dir = tempfile::tempdir().unwrap();
    let backend = Backend::start().await;
    let daemon = start(&backend, options(HoldMode::None), Some(dir.path())).await;
    daemon.engine.settle(0);
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send_all(1..=EVENTS);
    upload.finish(EVENTS + 1);
    upload.acked(1..=EVENTS + 1).await;
    upload.closed().await;
    backend.until_closed().await;
    let numbers = backend.numbers();
    let wrong = numbers.iter().zip(1..).position(|(got, due)| *got != due);
    assert_eq!((wrong, numbers.len() as i64), (None, EVENTS + 1));
    settled(dir.path(), "one").await;
    assert_eq!(daemon.service.counters().forwarded, EVENTS as u64 + 1);
}

#[tokio::test]
async fn the_last_ack_waits_for_a_slow_upstream_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let backend = Backend::start().await;
    backend.ack_up_to(2);
    let daemon = start(&backend, options(HoldMode::Invocation), Some(dir.path())).await;
    daemon.engine.settle(0);
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send_all(1..=3);
    upload.acked(1..=3).await;
    backend.until("three events", |came| came.len() == 3).await;
    upload.finish(4);
    daemon.engine.until_ended(StreamEnd::Finished).await;
    upload.quiet().await;
    assert!(!Journal::view(dir.path()).find("one").unwrap().settled);
    backend.ack_up_to(4);
    upload.acked([4]).await;
    upload.closed().await;
    settled(dir.path(), "one").await;
}

#[tokio::test]
async fn the_deadline_ends_the_wait_for_upstream() {
    let dir = tempfile::tempdir().unwrap();
    let backend = Backend::start().await;
    backend.ack_up_to(0);
    let mut options = options(HoldMode::Invocation);
    options.hold.timeout = Duration::from_millis(500);
    let daemon = start(&backend, options, Some(dir.path())).await;
    daemon.engine.settle(0);
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send_all(1..=3);
    upload.finish(4);
    upload.acked(1..=4).await;
    upload.closed().await;
    assert_eq!(
        daemon.service.counters().hold_timeouts,
        0,
        "the engine was in time"
    );
    backend.ack_up_to(4);
    backend.until_closed().await;
    settled(dir.path(), "one").await;
}

#[tokio::test]
async fn a_dead_upstream_holds_nobody_and_gets_everything_when_it_is_back() {
    let dir = tempfile::tempdir().unwrap();
    for journal in [None, Some(dir.path())] {
        let backend = Backend::start().await;
        let upstream = backend.upstream();
        backend.stop().await;
        let options = options(HoldMode::Invocation);
        let daemon = Daemon::forwarding(options, journal, Some(upstream)).await;
        daemon.engine.settle(0);
        let mut upload = Upload::open(&daemon, "one").await;
        upload.send_all(1..=3);
        upload.finish(4);
        upload.acked(1..=4).await;
        upload.closed().await;
        if journal.is_some() {
            assert!(!Journal::view(dir.path()).find("one").unwrap().settled);
        }
        backend.listen().await;
        backend.until_closed().await;
        assert_eq!(backend.numbers(), [1, 2, 3, 4]);
        if journal.is_some() {
            settled(dir.path(), "one").await;
        }
        daemon.stop().await;
    }
}

#[tokio::test]
async fn builds_that_wait_for_a_dead_upstream_take_no_place_from_others_also_after_a_restart() {
    const LIMIT: usize = 8;
    let dir = tempfile::tempdir().unwrap();
    let backend = Backend::start().await;
    let upstream = backend.upstream();
    backend.stop().await;
    let mut options = options(HoldMode::None);
    options.limits.streams = LIMIT;
    for daemon in 0..2 {
        let service = Some(upstream.clone());
        let daemon_now = Daemon::forwarding(options.clone(), Some(dir.path()), service).await;
        daemon_now.engine.settle(0);
        for build in 0..2 * LIMIT {
            let mut upload = Upload::open(&daemon_now, &format!("{daemon} {build}")).await;
            upload.send_all(1..=2);
            upload.finish(3);
            upload.acked(1..=3).await;
            upload.closed().await;
        }
        assert_eq!(daemon_now.service.counters().refused, 0);
        assert_eq!(
            daemon_now.service.streams(),
            (daemon + 1) * 2 * LIMIT,
            "all wait for upstream"
        );
        daemon_now.stop().await;
    }
    // Nothing was given up for it.
    backend.listen().await;
    let daemon = start(&backend, options, Some(dir.path())).await;
    daemon.engine.settle(0);
    let ends = 4 * LIMIT;
    let all = |came: &[Came]| came.iter().filter(|came| **came == Came::Closed).count() == ends;
    backend.until("closed all", all).await;
    daemon.stop().await;
}

#[tokio::test]
async fn without_a_journal_builds_that_wait_for_a_dead_upstream_keep_their_places() {
    let backend = Backend::start().await;
    let upstream = backend.upstream();
    backend.stop().await;
    let mut options = options(HoldMode::None);
    options.limits.streams = 2;
    let daemon = Daemon::forwarding(options, None, Some(upstream)).await;
    daemon.engine.settle(0);
    for build in ["one", "two"] {
        let mut upload = Upload::open(&daemon, build).await;
        upload.finish(1);
        upload.acked([1]).await;
        upload.closed().await;
    }
    let mut upload = Upload::open(&daemon, "three").await;
    upload.send(1, "x");
    let status = upload.refused(Code::ResourceExhausted).await;
    assert!(status.message().contains("--limit=streams="), "{status}");
    backend.listen().await;
    daemon.stop().await;
}

#[tokio::test]
async fn calls_beyond_those_that_may_wait_for_upstream_are_dropped_and_fail_no_build() {
    let dir = tempfile::tempdir().unwrap();
    let backend = Backend::start().await;
    let upstream = backend.upstream();
    backend.stop().await;
    let mut options = options(HoldMode::None);
    options.limits.lifecycle_calls = 3;
    let daemon = Daemon::forwarding(options, Some(dir.path()), Some(upstream)).await;
    let mut calls = client(&daemon).await;
    for _ in 0..5 {
        let enqueued = call(build_event::Event::BuildEnqueued(Default::default()));
        calls.publish_lifecycle_event(enqueued).await.unwrap();
    }
    assert_eq!(daemon.service.counters().lifecycle_dropped, 2);
    assert_eq!(daemon.service.counters().refused, 0);
    let mut upload = Upload::open(&daemon, "one").await;
    upload.finish(1);
    upload.acked([1]).await;
    upload.closed().await;
    backend.listen().await;
    backend.until_closed().await;
    let reported = [
        Came::Call("build enqueued"),
        Came::Call("build enqueued"),
        Came::Call("build enqueued"),
    ];
    assert_eq!(backend.came()[..3], reported);
    // There is room again.
    let finished = call(build_event::Event::BuildFinished(Default::default()));
    calls.publish_lifecycle_event(finished).await.unwrap();
    let last = |came: &[Came]| came.contains(&Came::Call("build finished"));
    backend.until("the end", last).await;
    daemon.stop().await;
}

#[tokio::test]
async fn a_credential_helper_is_asked_for_headers() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let helper = dir.path().join("helper");
    let text = "#!/bin/sh\ncat > /dev/null\necho '{\"headers\":{\"x-api-key\":[\"helped\"]}}'\n";
    std::fs::write(&helper, text).unwrap();
    std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
    let backend = Backend::start().await;
    let upstream = backend.upstream_with(|options| {
        options.connect.credential_helpers = vec![
            "elsewhere.example.com=/no/such/helper".to_owned(),
            helper.display().to_string(),
        ];
    });
    let daemon = Daemon::forwarding(options(HoldMode::None), None, Some(upstream)).await;
    daemon.engine.settle(0);
    let mut headers = MetadataMap::new();
    headers.insert("x-api-key", "sent".parse().unwrap());
    let (sender, mut answers) = upload(&daemon, headers).await;
    sender.send(strange(1, b"x")).unwrap();
    sender.send(finish(2)).unwrap();
    drop(sender);
    while answers.message().await.unwrap().is_some() {}
    backend.until_closed().await;
    let seen = backend.headers();
    assert_eq!(seen[0].get("x-api-key").unwrap(), "helped");
    daemon.stop().await;
}

#[tokio::test]
async fn googles_credentials_are_sent_upstream() {
    let dir = tempfile::tempdir().unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let file = dir.path().join("user.json");
    let user = serde_json::json!({
        "type": "authorized_user", "client_id": "c", "client_secret": "s", "refresh_token": "r",
        "token_uri": format!("http://{}/", listener.local_addr().unwrap()),
    });
    std::fs::write(&file, user.to_string()).unwrap();
    let app = axum::Router::new().fallback(async || r#"{"access_token":"t0ken","expires_in":3600}"#);
    tokio::spawn(async move { axum::serve(listener, app).await });
    let backend = Backend::start().await;
    let upstream = backend.upstream_with(|options| {
        options.connect.google = Some(crate::transport::Google {
            file: Some(file),
            scopes: vec!["a".to_owned()],
        });
    });
    let daemon = Daemon::forwarding(options(HoldMode::None), None, Some(upstream)).await;
    daemon.engine.settle(0);
    let (sender, mut answers) = upload(&daemon, MetadataMap::new()).await;
    sender.send(strange(1, b"x")).unwrap();
    sender.send(finish(2)).unwrap();
    drop(sender);
    while answers.message().await.unwrap().is_some() {}
    backend.until_closed().await;
    assert_eq!(backend.headers()[0].get("authorization").unwrap(), "Bearer t0ken");
    daemon.stop().await;
}

#[tokio::test]
async fn the_next_daemon_sends_what_upstream_has_not_got() {
    let dir = tempfile::tempdir().unwrap();
    let backend = Backend::start().await;
    backend.ack_up_to(3);
    let daemon = start(&backend, options(HoldMode::None), Some(dir.path())).await;
    daemon.engine.settle(0);
    let mut headers = MetadataMap::new();
    headers.insert("x-api-key", "secret".parse().unwrap());
    let (sender, mut answers) = upload(&daemon, headers).await;
    for n in 1..=5 {
        sender.send(strange(n, b"x")).unwrap();
        assert_eq!(answers.message().await.unwrap().unwrap().sequence_number, n);
    }
    sender.send(finish(6)).unwrap();
    assert_eq!(answers.message().await.unwrap().unwrap().sequence_number, 6);
    drop(sender);
    backend.until("six events", |came| came.len() == 6).await;
    let acked = async {
        while daemon.service.counters().forwarded < 3 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, acked).await.expect("three acks");
    backend.stop().await;
    daemon.stop().await;
    assert!(!Journal::view(dir.path()).find("one").unwrap().settled);

    backend.ack_up_to(i64::MAX);
    backend.listen().await;
    let daemon = start(&backend, options(HoldMode::None), Some(dir.path())).await;
    daemon.engine.settle(0);
    backend.until_closed().await;
    settled(dir.path(), "one").await;
    assert_eq!(backend.numbers(), [1, 2, 3, 4, 5, 6, 4, 5, 6]);
    assert_eq!(backend.requests()[6..8], [strange(4, b"x"), strange(5, b"x")]);
    let headers = backend.headers();
    assert_eq!(headers.last().unwrap().get("x-api-key").unwrap(), "secret");
    daemon.stop().await;

    // Nothing is left: the third daemon sends nothing.
    let before = backend.came().len();
    let daemon = start(&backend, options(HoldMode::None), Some(dir.path())).await;
    daemon.stop().await;
    assert_eq!(backend.came().len(), before);
}

#[tokio::test]
async fn what_a_build_did_is_not_done_again_when_only_upstream_lacks_it() {
    let dir = tempfile::tempdir().unwrap();
    let backend = Backend::start().await;
    backend.ack_up_to(0);
    let daemon = start(&backend, options(HoldMode::None), Some(dir.path())).await;
    daemon.engine.settle(0);
    let (sender, mut answers) = upload(&daemon, MetadataMap::new()).await;
    for n in 1..=3 {
        sender.send(strange(n, b"x")).unwrap();
        answers.message().await.unwrap().unwrap();
    }
    sender.send(finish(4)).unwrap();
    answers.message().await.unwrap().unwrap();
    drop(sender);
    backend.until("four events", |came| came.len() == 4).await;
    backend.stop().await;
    daemon.stop().await;
    assert!(!Journal::view(dir.path()).find("one").unwrap().settled);

    backend.ack_up_to(i64::MAX);
    backend.listen().await;
    let upstream = Some(backend.upstream());
    let daemon = Daemon::behind_one_that_was_done(options(HoldMode::Target), dir.path(), upstream).await;
    daemon.engine.settle(0);
    backend.until_closed().await;
    settled(dir.path(), "one").await;
    assert_eq!(backend.numbers(), [1, 2, 3, 4, 1, 2, 3, 4]);
    assert!(daemon.engine.seen().is_empty(), "{:?}", daemon.engine.seen());
    daemon.stop().await;
}

#[tokio::test]
async fn a_journal_is_not_marked_while_optional_outputs_are_on_their_way() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(options(HoldMode::Invocation), Some(dir.path())).await;
    daemon.engine.rest.send_replace(true);
    let mut upload = super::harness::Upload::open(&daemon, "one").await;
    upload.finish(1);
    daemon.engine.settle(0);
    // The client does not wait for them.
    upload.acked([1]).await;
    upload.closed().await;
    assert!(!Journal::view(dir.path()).find("one").unwrap().settled);
    daemon.engine.rest.send_replace(false);
    settled(dir.path(), "one").await;
    daemon.stop().await;
}

fn call(event: build_event::Event) -> Bytes {
    let request = PublishLifecycleEventRequest {
        build_event: Some(OrderedBuildEvent {
            stream_id: Some(StreamId {
                build_id: "build".to_owned(),
                component: 1,
                invocation_id: String::new(),
            }),
            sequence_number: 1,
            event: Some(BuildEvent {
                event_time: None,
                event: Some(event),
            }),
        }),
        ..PublishLifecycleEventRequest::default()
    };
    request.encode_to_vec().into()
}

#[tokio::test]
async fn calls_about_a_build_stand_around_its_stream() {
    use build_event::Event;
    let expected = [
        Came::Call("build enqueued"),
        Came::Call("invocation attempt started"),
        Came::Event(1),
        Came::Event(2),
        Came::Closed,
        Came::Call("invocation attempt finished"),
        Came::Call("build finished"),
    ];
    let dir = tempfile::tempdir().unwrap();
    let backend = Backend::start().await;
    let daemon = start(&backend, options(HoldMode::None), Some(dir.path())).await;
    daemon.engine.settle(0);
    let mut calls = client(&daemon).await;
    for event in [
        Event::BuildEnqueued(Default::default()),
        Event::InvocationAttemptStarted(Default::default()),
    ] {
        calls.publish_lifecycle_event(call(event)).await.unwrap();
    }
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send_all([1]);
    upload.finish(2);
    upload.acked(1..=2).await;
    upload.closed().await;
    for event in [
        Event::InvocationAttemptFinished(Default::default()),
        Event::BuildFinished(Default::default()),
    ] {
        calls.publish_lifecycle_event(call(event)).await.unwrap();
    }
    backend
        .until("finished", |came| came.last() == expected.last())
        .await;
    assert_eq!(backend.came(), expected);
    daemon.stop().await;
    let journal = Journal::view(dir.path());
    assert_eq!(journal.list().unwrap().len(), 1, "calls are no invocation");
}

#[tokio::test]
async fn a_shutdown_lets_a_healthy_upstream_have_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let backend = Backend::start().await;
    backend.ack_up_to(0);
    let daemon = start(&backend, options(HoldMode::None), Some(dir.path())).await;
    daemon.engine.settle(0);
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send_all(1..=3);
    upload.finish(4);
    upload.acked(1..=4).await;
    upload.closed().await;
    backend.until("four events", |came| came.len() == 4).await;
    let stopping = tokio::spawn(daemon.stop());
    backend.ack_up_to(4);
    stopping.await.unwrap();
    assert!(Journal::view(dir.path()).find("one").unwrap().settled);
}

#[tokio::test]
async fn a_journal_that_was_delivered_but_not_marked_needs_no_call_upstream() {
    let dir = tempfile::tempdir().unwrap();
    let backend = Backend::start().await;
    let daemon = start(&backend, options(HoldMode::None), Some(dir.path())).await;
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send_all([1]);
    upload.finish(2);
    upload.acked(1..=2).await;
    backend.until_closed().await;
    // The engine never settles: the journal stays as it is.
    daemon.stop().await;
    assert!(!Journal::view(dir.path()).find("one").unwrap().settled);
    let before = backend.came();
    let daemon = start(&backend, options(HoldMode::None), Some(dir.path())).await;
    daemon.engine.settle(0);
    settled(dir.path(), "one").await;
    daemon.stop().await;
    assert_eq!(backend.came(), before);
}

#[tokio::test]
async fn a_stream_that_broke_off_goes_on_upstream_when_it_goes_on_here() {
    let dir = tempfile::tempdir().unwrap();
    let backend = Backend::start().await;
    let daemon = start(&backend, options(HoldMode::None), Some(dir.path())).await;
    daemon.engine.settle(0);
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send_all(1..=3);
    upload.acked(1..=3).await;
    drop(upload);
    // What there is has been delivered, so there is nothing left to do.
    settled(dir.path(), "one").await;
    assert_eq!(backend.came(), [Came::Event(1), Came::Event(2), Came::Event(3)]);
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send_all(3..=4);
    upload.finish(5);
    upload.acked(3..=5).await;
    backend.until_closed().await;
    assert_eq!(backend.numbers(), [1, 2, 3, 4, 5]);
    settled(dir.path(), "one").await;
    daemon.stop().await;
}
