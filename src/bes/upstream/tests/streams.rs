//! Whatever upstream does, it ends with every event, once, in order, unchanged.

use std::{sync::atomic::Ordering, time::Duration};

use bytes::Bytes;
use tonic::{
    Code,
    metadata::{MetadataMap, MetadataValue},
};

use super::{
    fake::{Fake, Plan},
    requests::{last, sequence, with_event},
    rig::{Rig, options, stream},
};
use crate::{
    bes::{HoldMode, upstream::outgoing::Outgoing},
    builds::{StreamEnd, StreamKey},
    journal::{Batch, Journal, JournalOptions, headers, received::Received},
    proto::build_event_stream::{Progress, build_event::Payload},
};

/// All events came, each connection began with the first event that was not acknowledged, and went on in order.
fn assert_complete(fake: &Fake, sent: &[Bytes]) {
    for connection in fake.seen() {
        let Some(first) = connection.requests.first() else {
            continue;
        };
        let first = usize::try_from(sequence(first)).unwrap() - 1;
        let expected = &sent[first..first + connection.requests.len()];
        assert_eq!(connection.requests, expected, "byte for byte, in order");
    }
    for (began, due) in fake.0.began.lock().unwrap().iter() {
        assert_eq!(began, due, "resumed where upstream was");
    }
    let last = sequence(sent.last().unwrap());
    assert_eq!(*fake.0.acked.lock().unwrap(), last);
}

async fn everything_arrives(plans: impl IntoIterator<Item = Plan>, default: Plan) -> (Fake, Rig) {
    let fake = Fake::new(plans, default);
    let mut rig = Rig::start(&fake).await;
    let sent = stream(99);
    rig.send(&sent);
    rig.finish();
    rig.until_finished().await;
    assert_complete(&fake, &sent);
    assert_eq!(rig.status.borrow().acked, 100);
    assert_eq!(
        rig.saved.lock().unwrap().last(),
        Some(&100),
        "kept before it was reported"
    );
    (fake, rig)
}

#[tokio::test]
async fn a_stream_arrives_byte_for_byte_and_is_closed_as_the_client_does() {
    let (fake, _) = everything_arrives([], Plan::Good).await;
    let seen = fake.seen();
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].end, Some(true));
}

#[tokio::test]
async fn an_upstream_that_breaks_after_every_n_events_gets_them_all() {
    for n in [1, 2, 7, 100] {
        let (fake, rig) = everything_arrives([], Plan::CutAfter(n)).await;
        assert!(fake.seen().len() >= 100 / n, "{n}");
        assert!(rig.status.borrow().finished);
    }
}

#[tokio::test]
async fn wrong_answers_are_no_acknowledgements() {
    for plan in [Plan::OutOfOrder, Plan::Wrong] {
        let (fake, _) = everything_arrives([plan, plan, plan], Plan::Good).await;
        assert_eq!(fake.seen().len(), 4);
    }
}

#[tokio::test]
async fn ok_before_everything_is_acknowledged_is_no_end() {
    let plans = [Plan::CloseAt(1), Plan::CloseAt(50), Plan::CloseAt(100)];
    let (fake, _) = everything_arrives(plans, Plan::Good).await;
    assert_eq!(fake.seen().len(), 4);
}

#[tokio::test]
async fn no_status_makes_it_give_up() {
    let codes = (1..=16).map(|code| Plan::Refuse(Code::from(code)));
    everything_arrives(codes, Plan::Good).await;
}

#[tokio::test]
async fn late_acknowledgements_hold_memory_down_not_events_up() {
    let fake = Fake::new([], Plan::Late);
    let address = fake.serve("127.0.0.1:0".parse().unwrap()).await;
    let mut options = options(address);
    options.window_bytes = 20_000;
    let mut rig = Rig::with(options, HoldMode::Invocation, false, 0);
    let mut sent: Vec<_> = (1..=99).map(|n| with_event(n, vec![7; 3000])).collect();
    // One that is larger than the window.
    sent[40] = with_event(41, vec![8; 50_000]);
    sent.push(last(100));
    rig.send(&sent);
    rig.finish();
    fake.until("sent on", |seen| !seen.is_empty() && !seen[0].requests.is_empty())
        .await;
    assert_eq!(rig.status.borrow().acked, 0);
    fake.0.late.add_permits(100);
    rig.until_finished().await;
    assert_complete(&fake, &sent);
    let peak = rig.room.peak.load(Ordering::Acquire);
    assert!((20_000 - 4000..51_000).contains(&peak), "{peak}");
    // All but the large one keep to the window.
    let small = sent.iter().filter(|r| r.len() < 20_000).map(Bytes::len).max();
    assert!(small < Some(20_000));
}

#[tokio::test]
async fn a_service_that_acknowledges_nothing_before_the_end_gets_all_of_a_large_stream() {
    let fake = Fake::new([], Plan::AtTheEnd);
    let mut rig = Rig::start(&fake).await;
    // Many times what gets in before anything is acknowledged.
    let words = crate::proto::build_event_stream::BuildEvent {
        payload: Some(Payload::Progress(Progress {
            stderr: "x".repeat(100_000).into(),
        })),
        ..Default::default()
    };
    let words = prost::Message::encode_to_vec(&words);
    let mut sent: Vec<_> = (1..=40).map(|n| with_event(n, words.clone())).collect();
    sent.push(last(41));
    rig.send(&sent);
    rig.finish();
    rig.until_finished().await;
    assert_complete(&fake, &sent);
    assert_eq!(fake.seen().len(), 1);
}

#[tokio::test]
async fn many_acknowledgements_at_once_are_each_taken() {
    let fake = Fake::new([], Plan::Late);
    let mut rig = Rig::start(&fake).await;
    let sent = stream(2000);
    rig.send(&sent);
    rig.finish();
    fake.until("begun", |seen| !seen.is_empty() && !seen[0].requests.is_empty())
        .await;
    fake.0.late.add_permits(sent.len());
    rig.until_finished().await;
    assert_complete(&fake, &sent);
    assert_eq!(
        fake.seen().len(),
        1,
        "one that is missed would look like a wrong one"
    );
}

#[tokio::test]
async fn an_upstream_that_is_down_at_first_gets_everything_later() {
    let fake = Fake::new([], Plan::Good);
    let place = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = place.local_addr().unwrap();
    drop(place);
    let mut rig = Rig::with(options(address), HoldMode::Invocation, false, 0);
    assert!(rig.status.borrow().healthy, "not tried yet");
    let sent = stream(99);
    rig.send(&sent);
    rig.finish();
    rig.until("down", |status| !status.healthy).await;
    assert!(!rig.upstream.is_healthy());
    fake.serve(address).await;
    rig.until_finished().await;
    assert_complete(&fake, &sent);
    assert!(rig.status.borrow().healthy && rig.upstream.is_healthy());
}

#[tokio::test]
async fn a_connection_that_never_answers_is_noticed() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut options = options(silent.local_addr().unwrap());
    options.connect.keepalive = Some(Duration::from_millis(60));
    let mut rig = Rig::with(options, HoldMode::Invocation, false, 0);
    rig.send(&stream(3));
    let (_open, _) = silent.accept().await.unwrap();
    rig.until("noticed", |status| !status.healthy).await;
    assert!(!rig.status.borrow().finished);
}

#[tokio::test]
async fn what_upstream_has_from_an_earlier_life_is_not_sent_again() {
    let fake = Fake::new([], Plan::Good);
    *fake.0.acked.lock().unwrap() = 42;
    let address = fake.serve("127.0.0.1:0".parse().unwrap()).await;
    let mut rig = Rig::with(options(address), HoldMode::Invocation, false, 42);
    let sent = stream(99);
    rig.send(&sent);
    rig.send(&sent[..60]);
    rig.finish();
    rig.until_finished().await;
    assert_complete(&fake, &sent);
    assert_eq!(fake.numbers(), (43..=100).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_broken_stream_is_cancelled_after_its_events_and_may_go_on() {
    let fake = Fake::new([], Plan::Good);
    let mut rig = Rig::start(&fake).await;
    let sent = stream(99);
    rig.send(&sent[..50]);
    rig.pass(Outgoing::Ended(StreamEnd::Broken("the client died".to_owned())));
    rig.until_finished().await;
    assert_eq!(rig.status.borrow().acked, 50);
    fake.until("cancelled", |seen| seen[0].end == Some(false)).await;
    rig.send(&sent[50..]);
    rig.until("resumed", |status| status.acked == 100).await;
    rig.finish();
    rig.until_finished().await;
    assert_complete(&fake, &sent);
    assert_eq!(fake.seen().len(), 2);
    assert_eq!(fake.seen()[1].end, Some(true));
}

#[tokio::test]
async fn the_clients_headers_go_along_the_newest_ones_at_once() {
    let fake = Fake::new([Plan::Refuse(Code::Unauthenticated)], Plan::Good);
    let address = fake.serve("127.0.0.1:0".parse().unwrap()).await;
    let mut options = options(address);
    // Only the new headers are a reason to try again so soon.
    (options.first_retry, options.longest_retry) = (Duration::from_secs(3600), Duration::from_secs(3600));
    let mut rig = Rig::with(options, HoldMode::Invocation, false, 0);
    let headers = |key| {
        let mut headers = MetadataMap::new();
        headers.insert("x-api-key", MetadataValue::from_static(key));
        Outgoing::Headers(headers)
    };
    rig.pass(headers("expired"));
    let sent = stream(3);
    rig.send(&sent[..3]);
    rig.until("refused", |status| !status.healthy).await;
    rig.pass(headers("new"));
    rig.until("taken", |status| status.acked == 3).await;
    rig.send(&sent[3..]);
    rig.finish();
    rig.until_finished().await;
    assert_eq!(fake.seen()[0].headers.get("x-api-key").unwrap(), "new");
}

#[tokio::test]
async fn what_is_only_in_the_journal_is_read_back_with_the_headers_that_came_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path(), JournalOptions::default()).unwrap();
    let key = StreamKey::default();
    let (mut writer, _) = journal.stream(&key).unwrap();
    let sent = stream(99);
    let mut frame = |events: &[Bytes], key: &'static str| {
        let mut headers = MetadataMap::new();
        headers.insert("x-api-key", MetadataValue::from_static(key));
        let mut batch = Batch::default();
        batch.push_headers(7, sequence(&events[0]), &headers::encode(&headers));
        for event in events {
            batch.push(7, &Received::read(event.clone()).unwrap().unwrap());
        }
        let at = writer.append(&batch).unwrap();
        Outgoing::from(writer.place(at).unwrap())
    };
    let fake = Fake::new([Plan::CloseAt(60)], Plan::Good);
    let mut rig = Rig::start(&fake).await;
    let (first, second) = (frame(&sent[..50], "first"), frame(&sent[50..], "second"));
    rig.pass(first);
    rig.until("sent", |status| status.acked == 50).await;
    rig.pass(second);
    rig.finish();
    rig.until_finished().await;
    assert_complete(&fake, &sent);
    let keys: Vec<_> = fake
        .seen()
        .iter()
        .map(|s| s.headers.get("x-api-key").unwrap().to_str().unwrap().to_owned())
        .collect();
    assert_eq!(keys, ["first", "second"], "each as it was when the call began");
}

#[tokio::test]
async fn a_halt_ends_it_and_keeps_how_far_it_was() {
    let fake = Fake::new([], Plan::Late);
    let mut rig = Rig::start(&fake).await;
    rig.send(&stream(9));
    fake.0.late.add_permits(4);
    rig.until("acknowledged", |status| status.acked == 4).await;
    rig.around.halt.cancel();
    rig.around.forwards.close();
    tokio::time::timeout(outhaul_testkit::PATIENCE, rig.around.forwards.wait())
        .await
        .unwrap();
    assert_eq!(rig.saved.lock().unwrap().last(), Some(&4));
    assert!(!rig.status.borrow().finished);
}
