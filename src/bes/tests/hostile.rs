//! Clients that are malicious or badly broken: they get an error, and no other client notices.

use std::{collections::BTreeSet, time::Duration};

use outhaul_testkit::{PATIENCE, number};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Request};

use super::harness::{Daemon, Upload, options, request};
use crate::{
    bes::{BesOptions, HoldMode, limits::BesLimits},
    proto::google::devtools::build::v1::{
        OrderedBuildEvent, PublishLifecycleEventRequest, StreamId,
        build_event::{self, BuildComponentStreamFinished},
    },
};

fn limited(change: impl FnOnce(&mut BesLimits)) -> BesOptions {
    let mut options = options(HoldMode::None);
    change(&mut options.limits);
    options
}

/// A build like any other still goes through.
async fn serves_others(daemon: &Daemon, name: &str) {
    let mut upload = Upload::open(daemon, name).await;
    upload.send_all(1..=3);
    upload.finish(4);
    upload.acked(1..=4).await;
    upload.closed().await;
}

#[tokio::test]
async fn invalid_numbers_are_refused() {
    let daemon = Daemon::start(options(HoldMode::None), None).await;
    for (n, number) in [0, -1, i64::MIN, i64::MAX].into_iter().enumerate() {
        // As the first one, and later.
        let mut upload = Upload::open(&daemon, &format!("first {n}")).await;
        upload.send(number, "x");
        let status = upload.refused(Code::InvalidArgument).await;
        assert!(status.message().contains("sequence_number"), "{status}");
        let mut upload = Upload::open(&daemon, &format!("later {n}")).await;
        upload.send_all([1, 2]);
        upload.acked([1, 2]).await;
        upload.send(number, "x");
        upload.refused(Code::InvalidArgument).await;
    }
    let mut upload = Upload::open(&daemon, "large").await;
    upload.send_all([1, i64::MAX - 2]);
    upload.finish(i64::MAX - 1);
    upload.acked([1, i64::MAX - 2, i64::MAX - 1]).await;
    upload.closed().await;
    serves_others(&daemon, "other").await;
    daemon.stop().await;
}

#[tokio::test]
async fn ids_that_change_are_too_long_or_would_write_to_a_terminal_are_refused() {
    let daemon = Daemon::start(options(HoldMode::None), None).await;
    let started = || build_event::Event::BuildEnqueued(Default::default());
    for id in [
        "x".repeat(2000),
        "a\nb".to_owned(),
        "\u{1b}]0;owned\u{7}".to_owned(),
    ] {
        let mut upload = Upload::open(&daemon, "bad").await;
        upload.raw(request(&id, 1, started()));
        upload.refused(Code::InvalidArgument).await;
    }
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send(1, "x");
    upload.acked([1]).await;
    upload.raw(request("another", 2, started()));
    let status = upload.refused(Code::InvalidArgument).await;
    assert!(status.message().contains("changed"), "{status}");
    let mut upload = Upload::open(&daemon, "none").await;
    let mut nameless = request("none", 1, started());
    if let Some(event) = &mut nameless.ordered_build_event {
        event.stream_id = None;
    }
    upload.raw(nameless);
    upload.refused(Code::InvalidArgument).await;
    let mut upload = Upload::open(&daemon, "empty").await;
    upload.raw(Default::default());
    upload.refused(Code::InvalidArgument).await;
    // "ß" as Bazel may give it.
    serves_others(&daemon, "other \u{c3}\u{9f}").await;
    daemon.stop().await;
}

#[tokio::test]
async fn a_request_beyond_the_limit_is_refused_by_name_and_not_tried_again() {
    let daemon = Daemon::start(limited(|l| l.message = 64 << 10), None).await;
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send(1, "small");
    upload.acked([1]).await;
    upload.send(2, vec![b'x'; 100 << 10]);
    let status = upload.refused(Code::InvalidArgument).await;
    assert!(status.message().contains("--limit=message-size"), "{status}");
    assert_eq!(daemon.service.counters().refused, 1);
    serves_others(&daemon, "other").await;
    daemon.stop().await;
}

#[tokio::test]
async fn streams_beyond_the_limit_are_refused_until_others_end() {
    let daemon = Daemon::start(limited(|l| l.streams = 2), None).await;
    let mut open = Vec::new();
    for name in ["one", "two"] {
        let mut upload = Upload::open(&daemon, name).await;
        upload.send(1, "x");
        upload.acked([1]).await;
        open.push(upload);
    }
    let requests = UnboundedReceiverStream::new(tokio::sync::mpsc::unbounded_channel().1);
    let status = daemon
        .client()
        .await
        .publish_build_tool_event_stream(requests)
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("--limit=streams="), "{status}");
    let mut first = open.remove(0);
    first.finish(2);
    first.acked([2]).await;
    first.closed().await;
    drop(first);
    // Its settled build goes as well, although settled builds stay for a while where there is room.
    daemon.engine.settle(0);
    let mut tries = 0;
    loop {
        let (sender, requests) = tokio::sync::mpsc::unbounded_channel();
        let event = build_event::Event::BuildEnqueued(Default::default());
        sender.send(request("three", 1, event)).unwrap();
        let mut client = daemon.client().await;
        let answer = client
            .publish_build_tool_event_stream(UnboundedReceiverStream::new(requests))
            .await;
        if let Ok(answer) = answer
            && let Ok(Some(_)) = answer.into_inner().message().await
        {
            break;
        }
        tries += 1;
        assert!(tries < 400, "it is never taken");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    daemon.stop().await;
}

#[tokio::test]
async fn many_streams_of_one_connection_wait_for_each_other() {
    let daemon = Daemon::start(limited(|l| l.streams_per_connection = 2), None).await;
    let mut client = daemon.client().await;
    let mut open = Vec::new();
    for name in ["one", "two"] {
        let mut upload = Upload::on(&mut client, name).await;
        upload.send(1, "x");
        upload.acked([1]).await;
        open.push(upload);
    }
    let mut third = client.clone();
    let third = tokio::spawn(async move { Upload::on(&mut third, "three").await });
    // Others do not wait for any of these.
    serves_others(&daemon, "other").await;
    assert!(!third.is_finished());
    drop(open);
    let mut third = tokio::time::timeout(PATIENCE, third).await.unwrap().unwrap();
    third.send(1, "x");
    third.acked([1]).await;
    daemon.stop().await;
}

#[tokio::test]
async fn headers_beyond_the_limit_are_refused() {
    let daemon = Daemon::start(limited(|l| l.headers = 4 << 10), None).await;
    let mut call = Request::new(PublishLifecycleEventRequest::default());
    call.metadata_mut()
        .insert("x-large", "x".repeat(64 << 10).parse().unwrap());
    let mut client = daemon.client().await;
    let refused = tokio::time::timeout(PATIENCE, client.publish_lifecycle_event(call));
    assert!(refused.await.unwrap().is_err());
    serves_others(&daemon, "other").await;
    daemon.stop().await;
}

#[tokio::test]
async fn lifecycle_calls_in_any_order_are_answered() {
    let daemon = Daemon::start(options(HoldMode::None), None).await;
    let mut client = daemon.client().await;
    let id = StreamId {
        build_id: "b\n\u{1b}[2J".to_owned(),
        ..StreamId::default()
    };
    let events = [
        None,
        Some(build_event::Event::BuildFinished(Default::default())),
        Some(build_event::Event::InvocationAttemptFinished(Default::default())),
        Some(build_event::Event::BuildEnqueued(Default::default())),
        Some(build_event::Event::BuildEnqueued(Default::default())),
        Some(build_event::Event::ComponentStreamFinished(Default::default())),
    ];
    for (event, sequence_number) in events.into_iter().zip([i64::MIN, -1, 0, 0, 7, i64::MAX]) {
        let event = crate::proto::google::devtools::build::v1::BuildEvent {
            event,
            ..Default::default()
        };
        let call = PublishLifecycleEventRequest {
            build_event: Some(OrderedBuildEvent {
                stream_id: Some(id.clone()),
                sequence_number,
                event: Some(event),
            }),
            ..PublishLifecycleEventRequest::default()
        };
        client.publish_lifecycle_event(call).await.unwrap();
    }
    client
        .publish_lifecycle_event(PublishLifecycleEventRequest::default())
        .await
        .unwrap();
    serves_others(&daemon, "other").await;
    daemon.stop().await;
}

#[tokio::test]
async fn events_of_many_streams_stay_within_the_memory_for_all() {
    let dir = tempfile::tempdir().unwrap();
    // An engine that takes nothing.
    let daemon = Daemon::gated(limited(|l| l.queue = 1 << 20), Some(dir.path())).await;
    let mut uploads = Vec::new();
    for stream in 0..8 {
        let upload = Upload::open(&daemon, &stream.to_string()).await;
        for n in 1..=20 {
            let mut bytes = n.to_string().into_bytes();
            bytes.resize(100 << 10, 0);
            upload.send(n, bytes);
        }
        uploads.push(upload);
    }
    // 16 MB in all, acknowledged nevertheless: the journal has what there is no room for.
    for upload in &mut uploads {
        upload.acked(1..=20).await;
    }
    assert!(daemon.service.counters().spilled_frames > 0);
    assert_eq!(daemon.service.counters().stalls, 0);
    daemon.engine.gate.close();
    for upload in &mut uploads {
        upload.finish(21);
        upload.acked([21]).await;
    }
    let all = |seen: &[super::harness::Seen]| {
        let events = seen
            .iter()
            .filter(|s| matches!(s, super::harness::Seen::Event(..)));
        events.count() == 8 * 20
    };
    daemon.engine.until("delivered all", all).await;
    daemon.stop().await;
}

/// Sends random messages to a stream; returns what was sent.
async fn torment(daemon: &Daemon, name: &str, random: &mut StdRng) {
    let mut sent = BTreeSet::new();
    let mut uploads = Vec::new();
    for _ in 0..random.random_range(1..4) {
        let mut upload = Upload::open(daemon, name).await;
        let mut next = random.random_range(1..20);
        for _ in 0..random.random_range(1..30) {
            next = match random.random_range(0..10) {
                0 => next,
                1 => (next - random.random_range(0..10)).max(1),
                2 => next + random.random_range(0..1_i64 << 40),
                3 => random.random_range(1..i64::MAX),
                _ => next.saturating_add(1).min(i64::MAX - 1),
            };
            sent.insert(next);
            match random.random_range(0..12) {
                0 => upload.send(next, "bad"),
                1 => {
                    let event = build_event::Event::ComponentStreamFinished(BuildComponentStreamFinished {
                        r#type: random.random_range(-3..9),
                    });
                    upload.raw(request(name, next, event));
                }
                2 => upload.raw(request(
                    name,
                    next,
                    build_event::Event::BuildEnqueued(Default::default()),
                )),
                3 => {
                    let mut nothing =
                        request(name, next, build_event::Event::BuildEnqueued(Default::default()));
                    if let Some(event) = &mut nothing.ordered_build_event {
                        event.event = None;
                    }
                    upload.raw(nothing);
                }
                _ => upload.send(next, next.to_string()),
            }
        }
        match random.random_range(0..4) {
            // An invalid number, an end without a half-close, a client that disappears, or one that stays.
            0 => upload.send(0, "x"),
            1 => upload.half_close(),
            2 => continue,
            _ => {}
        }
        uploads.push(upload);
    }
    // A client that is still connected gets an acknowledgement for what it sent and nothing else, and then a status.
    for mut upload in uploads {
        upload.half_close();
        loop {
            match upload.answer().await {
                Ok(Some(acked)) => assert!(sent.contains(&acked), "{acked} was never sent"),
                Ok(None) => break,
                Err(status) => {
                    let expected = [Code::InvalidArgument, Code::Aborted];
                    assert!(expected.contains(&status.code()), "{status}");
                    break;
                }
            }
        }
    }
}

/// `OUTHAUL_HOSTILE_CASES` is how many streams there are, `OUTHAUL_HOSTILE_SEED` repeats one.
#[tokio::test]
async fn streams_of_nonsense_end_and_nobody_else_notices() {
    let cases = number("OUTHAUL_HOSTILE_CASES").unwrap_or(40);
    let first = number("OUTHAUL_HOSTILE_SEED").unwrap_or_else(|| rand::rng().random_range(0..1 << 32));
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(options(HoldMode::None), Some(dir.path())).await;
    for seed in first..first.saturating_add(cases) {
        eprintln!("OUTHAUL_HOSTILE_SEED={seed} OUTHAUL_HOSTILE_CASES=1");
        let name = format!("nonsense {seed}");
        torment(&daemon, &name, &mut StdRng::seed_from_u64(seed)).await;
        daemon
            .engine
            .until("ended", |seen| {
                let ended = seen
                    .iter()
                    .any(|s| matches!(s, super::harness::Seen::Ended(n, _) if *n == name));
                // One of which no event was ever taken has no end either.
                ended
                    || !seen
                        .iter()
                        .any(|s| matches!(s, super::harness::Seen::Event(n, ..) if *n == name))
            })
            .await;
        for (key, numbers) in daemon.engine.delivered() {
            assert!(numbers.is_sorted_by(|a, b| a < b), "{key:?}: {numbers:?}");
        }
    }
    serves_others(&daemon, "other").await;
    daemon.stop().await;
}
