//! Every event is acknowledged once, in order, and delivered once, in order.

use std::time::Duration;

use outhaul_testkit::PATIENCE;
use tonic::Code;

use super::harness::{Daemon, Seen, Upload, options, request};
use crate::{
    bes::{BesAddress, HoldMode},
    builds::StreamEnd,
    proto::google::devtools::build::v1::{
        OrderedBuildEvent, PublishBuildToolEventStreamRequest, PublishLifecycleEventRequest, build_event,
    },
};

async fn whole_build(daemon: &Daemon, count: i64) {
    let mut upload = Upload::open(daemon, "one").await;
    upload.send_all(1..=count);
    upload.finish(count + 1);
    upload.acked(1..=count + 1).await;
    upload.closed().await;
    daemon.engine.until_ended(StreamEnd::Finished).await;
    assert_eq!(daemon.engine.numbers(), (1..=count).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_build_of_5000_events_is_acked_and_delivered_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(options(HoldMode::None), Some(dir.path())).await;
    whole_build(&daemon, 5000).await;
    let counts = daemon.service.counters();
    assert_eq!((counts.events, counts.gaps, counts.duplicates), (5001, 0, 0));
    daemon.stop().await;
}

#[tokio::test]
async fn it_works_without_a_journal_and_over_a_unix_socket() {
    let dir = tempfile::tempdir().unwrap();
    let address = BesAddress::Unix(dir.path().join("bes.sock"));
    let daemon = Daemon::listen(options(HoldMode::None), None, &address).await;
    whole_build(&daemon, 20).await;
    daemon.stop().await;
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        0,
        "socket removed"
    );
}

#[tokio::test]
async fn an_event_of_10_mib_passes() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(options(HoldMode::None), Some(dir.path())).await;
    let mut upload = Upload::open(&daemon, "one").await;
    let mut bytes = b"large".to_vec();
    bytes.resize(10 << 20, 0);
    upload.send(1, bytes);
    upload.send(2, "small");
    upload.finish(3);
    upload.acked(1..=3).await;
    upload.closed().await;
    daemon.engine.until_ended(StreamEnd::Finished).await;
    assert_eq!(
        daemon.engine.seen()[..2],
        [
            Seen::Event("one".into(), 1, "large".into()),
            Seen::Event("one".into(), 2, "small".into())
        ]
    );
}

#[tokio::test]
async fn an_undecodable_event_is_acked_and_skipped() {
    let daemon = Daemon::start(options(HoldMode::None), None).await;
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send(1, "fine");
    upload.send(2, "bad");
    upload.raw(request(
        "one",
        3,
        build_event::Event::BuildEnqueued(Default::default()),
    ));
    upload.send(4, "fine");
    upload.finish(5);
    upload.acked(1..=5).await;
    upload.closed().await;
    daemon.engine.until_ended(StreamEnd::Finished).await;
    // The engine hears that there was one, which may have named outputs.
    assert_eq!(daemon.engine.numbers(), [1, 2, 4]);
    assert_eq!(daemon.service.counters().undecodable, 1);
}

#[tokio::test]
async fn a_reconnected_client_goes_on_and_its_duplicates_are_acked_but_not_delivered() {
    let daemon = Daemon::start(options(HoldMode::None), None).await;
    let mut first = Upload::open(&daemon, "one").await;
    first.send_all(1..=5);
    first.acked(1..=5).await;
    // It takes over while the first is still open; from its side only three were acknowledged.
    let mut second = Upload::open(&daemon, "one").await;
    second.send_all(4..=8);
    second.acked(4..=8).await;
    first.refused(Code::Aborted).await;
    second.finish(9);
    second.acked([9]).await;
    second.closed().await;
    daemon.engine.until_ended(StreamEnd::Finished).await;
    assert_eq!(daemon.engine.numbers(), (1..=8).collect::<Vec<_>>());
    let counts = daemon.service.counters();
    assert_eq!((counts.duplicates, counts.takeovers), (2, 1));
    // Its last acknowledgement was lost as well.
    let mut third = Upload::open(&daemon, "one").await;
    third.finish(9);
    third.acked([9]).await;
    third.closed().await;
    assert_eq!(daemon.service.counters().finished, 1);
}

#[tokio::test]
async fn events_that_did_not_come_are_counted_and_told_to_the_engine() {
    let daemon = Daemon::start(options(HoldMode::None), None).await;
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send_all([40, 41, 45]);
    upload.finish(46);
    upload.acked([40, 41, 45, 46]).await;
    upload.closed().await;
    daemon.engine.until_ended(StreamEnd::Finished).await;
    assert_eq!(daemon.engine.numbers(), [39, 40, 41, 44, 45]);
    let missing = |event: &&Seen| matches!(event, Seen::Event(_, _, text) if text == "skipped");
    assert_eq!(daemon.engine.seen().iter().filter(missing).count(), 2);
    assert_eq!(daemon.service.counters().gaps, 2);
}

#[tokio::test]
async fn a_cancelled_stream_ends_at_once_but_may_be_resumed() {
    let daemon = Daemon::start(options(HoldMode::None), None).await;
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send_all(1..=3);
    upload.acked(1..=3).await;
    drop(upload);
    let broken = |seen: &[Seen]| {
        seen.iter()
            .any(|s| matches!(s, Seen::Ended(_, StreamEnd::Broken(_))))
    };
    daemon.engine.until("broken off", broken).await;
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send_all(4..=5);
    upload.finish(6);
    upload.acked(4..=6).await;
    upload.closed().await;
    daemon.engine.until_ended(StreamEnd::Finished).await;
    assert_eq!(daemon.engine.numbers(), (1..=5).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_lost_connection_is_no_end_if_the_client_comes_back_in_time() {
    let mut options = options(HoldMode::None);
    options.reconnect_grace = PATIENCE * 10;
    let daemon = Daemon::start(options, None).await;
    let (mut upload, cut) = Upload::through_a_wire(&daemon, "one").await;
    upload.send_all(1..=3);
    upload.acked(1..=3).await;
    cut.abort();
    upload.answer().await.expect_err("cut");
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send_all(2..=4);
    upload.finish(5);
    upload.acked(2..=5).await;
    upload.closed().await;
    daemon.engine.until_ended(StreamEnd::Finished).await;
    assert_eq!(daemon.engine.numbers(), [1, 2, 3, 4]);
    assert_eq!(daemon.service.counters().broken, 0);
}

#[tokio::test]
async fn a_lost_connection_is_given_up_at_once_when_the_clients_have_ended() {
    let mut options = options(HoldMode::None);
    options.reconnect_grace = PATIENCE * 10;
    let daemon = Daemon::start(options, None).await;
    let is_broken = |key: &'static str| {
        move |seen: &[Seen]| {
            seen.iter()
                .any(|s| matches!(s, Seen::Ended(stream, StreamEnd::Broken(_)) if stream.contains(key)))
        }
    };
    let (mut lost, cut) = Upload::through_a_wire(&daemon, "lost").await;
    let (mut kept, cut_later) = Upload::through_a_wire(&daemon, "kept").await;
    for upload in [&mut lost, &mut kept] {
        upload.send_all(1..=2);
        upload.acked(1..=2).await;
    }
    cut.abort();
    lost.answer().await.expect_err("cut");
    daemon.service.clients_ended();
    daemon.engine.until("lost", is_broken("lost")).await;
    // One that still sends is heard to its end.
    kept.send(3, "a");
    kept.acked([3]).await;
    assert!(!is_broken("kept")(&daemon.engine.seen()));
    cut_later.abort();
    daemon.engine.until("kept", is_broken("kept")).await;
}

#[tokio::test]
async fn a_lost_connection_is_given_up_after_the_grace() {
    let daemon = Daemon::start(options(HoldMode::None), None).await;
    let (mut upload, cut) = Upload::through_a_wire(&daemon, "one").await;
    upload.send(1, "a");
    upload.acked([1]).await;
    cut.abort();
    let lost = |seen: &[Seen]| {
        seen.iter().any(
            |s| matches!(s, Seen::Ended(_, StreamEnd::Broken(why)) if why.contains("connection was lost")),
        )
    };
    daemon.engine.until("given up", lost).await;
}

#[tokio::test]
async fn a_half_closed_stream_without_its_last_event_is_broken_and_closed() {
    let daemon = Daemon::start(options(HoldMode::Invocation), None).await;
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send_all(1..=2);
    upload.half_close();
    upload.acked(1..=2).await;
    upload.closed().await;
    let why = "the client closed the stream without its last event".to_owned();
    daemon.engine.until_ended(StreamEnd::Broken(why)).await;
}

#[tokio::test]
async fn streams_of_two_builds_do_not_mix() {
    let daemon = Daemon::start(options(HoldMode::None), None).await;
    let mut client = daemon.client().await;
    let mut a = Upload::on(&mut client, "a").await;
    let mut b = Upload::on(&mut client, "b").await;
    for n in 1..=50 {
        a.send(n, "a");
        b.send(n, "b");
    }
    a.finish(51);
    b.finish(51);
    a.acked(1..=51).await;
    b.acked(1..=51).await;
    let ends = |seen: &[Seen]| seen.iter().filter(|s| matches!(s, Seen::Ended(..))).count() == 2;
    daemon.engine.until("ended twice", ends).await;
    for seen in daemon.engine.seen() {
        if let Seen::Event(stream, _, text) = seen {
            assert_eq!(stream, text);
        }
    }
    assert_eq!(daemon.engine.numbers().len(), 100);
}

#[tokio::test]
async fn a_slow_engine_delays_no_ack_and_gets_everything_from_the_journal() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(HoldMode::None);
    options.stream_bytes = 64 << 10;
    let daemon = Daemon::gated(options, Some(dir.path())).await;
    let mut upload = Upload::open(&daemon, "one").await;
    for n in 1..=300 {
        let mut bytes = n.to_string().into_bytes();
        bytes.resize(2000, 0);
        upload.send(n, bytes);
    }
    upload.finish(301);
    upload.acked(1..=301).await;
    upload.closed().await;
    assert_eq!(daemon.engine.numbers(), Vec::<i64>::new());
    assert!(daemon.service.counters().spilled_frames > 0);
    daemon.engine.gate.close();
    daemon.engine.until_ended(StreamEnd::Finished).await;
    let events: Vec<_> = daemon.engine.seen();
    for (n, seen) in (1..=300).zip(&events) {
        assert_eq!(*seen, Seen::Event("one".into(), n, n.to_string()));
    }
}

#[tokio::test]
async fn without_a_journal_a_stuck_engine_costs_memory_but_not_the_build() {
    let mut options = options(HoldMode::None);
    options.stream_bytes = 4 << 10;
    options.stall = Duration::from_millis(100);
    let daemon = Daemon::gated(options, None).await;
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send_all(1..=100);
    upload.finish(101);
    upload.acked(1..=101).await;
    upload.closed().await;
    assert_eq!(daemon.service.counters().stalls, 1);
}

#[tokio::test]
async fn a_stuck_engine_does_not_delay_the_shutdown() {
    let mut options = options(HoldMode::None);
    options.stream_bytes = 1 << 10;
    options.stall = PATIENCE * 10;
    let daemon = Daemon::gated(options, None).await;
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send_all(1..=100);
    upload.acked([1]).await;
    tokio::time::timeout(PATIENCE, daemon.service.close())
        .await
        .unwrap();
}

#[tokio::test]
async fn malformed_streams_are_refused() {
    let daemon = Daemon::start(options(HoldMode::None), None).await;
    let mut upload = Upload::open(&daemon, "one").await;
    upload.raw(PublishBuildToolEventStreamRequest::default());
    upload.refused(Code::InvalidArgument).await;
    let mut upload = Upload::open(&daemon, &"x".repeat(2000)).await;
    upload.send(1, "a");
    upload.refused(Code::InvalidArgument).await;
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send(1, "a");
    upload.acked([1]).await;
    upload.raw(request(
        "other",
        2,
        build_event::Event::BuildEnqueued(Default::default()),
    ));
    upload.refused(Code::InvalidArgument).await;
}

#[tokio::test]
async fn lifecycle_events_health_and_reflection_answer() {
    let daemon = Daemon::start(options(HoldMode::None), None).await;
    let mut client = daemon.client().await;
    client
        .publish_lifecycle_event(PublishLifecycleEventRequest {
            build_event: Some(OrderedBuildEvent::default()),
            ..PublishLifecycleEventRequest::default()
        })
        .await
        .unwrap();
    assert_eq!(daemon.service.counters().lifecycle_events, 1);
    let channel = tonic::transport::Channel::from_shared(format!("http://{}", daemon.address))
        .unwrap()
        .connect()
        .await
        .unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    let answer = health
        .check(tonic_health::pb::HealthCheckRequest {
            service: "google.devtools.build.v1.PublishBuildEvent".to_owned(),
        })
        .await
        .unwrap();
    assert_eq!(answer.into_inner().status, 1, "serving");
    daemon.stop().await;
}
