//! A stream that begins again under ids that are known.

use std::time::Duration;

use tonic::Code;

use super::harness::{Daemon, Seen, Upload, options};
use crate::{bes::HoldMode, builds::StreamEnd, journal::Journal};

/// An upload of three events and the end, whose events say which attempt it is of.
async fn attempt(daemon: &Daemon, name: &str) -> Upload {
    let mut upload = Upload::open(daemon, "one").await;
    for n in 1..=3 {
        upload.send(n, format!("{name} {n}"));
    }
    upload.finish(4);
    upload.acked(1..=4).await;
    upload.closed().await;
    upload
}

fn texts(daemon: &Daemon) -> Vec<String> {
    daemon.engine.texts()
}

fn ends(seen: &[Seen]) -> usize {
    seen.iter().filter(|seen| matches!(seen, Seen::Ended(..))).count()
}

#[tokio::test]
async fn another_first_event_under_known_ids_is_a_new_attempt_and_is_journalled_and_delivered() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(options(HoldMode::None), Some(dir.path())).await;
    attempt(&daemon, "first").await;
    daemon.engine.until_ended(StreamEnd::Finished).await;
    attempt(&daemon, "second").await;
    daemon.engine.until("both ended", |seen| ends(seen) == 2).await;
    let expected: Vec<String> = ["first", "second"]
        .iter()
        .flat_map(|name| (1..=3).map(move |n| format!("{name} {n}")))
        .collect();
    assert_eq!(texts(&daemon), expected);
    assert_eq!(daemon.service.counters().duplicates, 0);
    daemon.stop().await;
    let kept = Journal::view(dir.path()).list().unwrap();
    let attempts: Vec<_> = kept.iter().map(|entry| entry.key.attempt).collect();
    assert_eq!(attempts.len(), 2);
    assert!(attempts.contains(&0) && attempts.contains(&1), "{attempts:?}");
    for entry in kept {
        assert_eq!(entry.read().unwrap().count(), 4);
    }
}

#[tokio::test]
async fn the_same_first_event_again_is_a_repetition_no_matter_who_remembers_it() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(options(HoldMode::None), Some(dir.path())).await;
    attempt(&daemon, "first").await;
    attempt(&daemon, "first").await;
    assert_eq!(daemon.engine.numbers(), [1, 2, 3]);
    daemon.stop().await;
    // The next process has it from the journal.
    let daemon = Daemon::start(options(HoldMode::None), Some(dir.path())).await;
    daemon.engine.until("replayed", |seen| ends(seen) == 1).await;
    attempt(&daemon, "first").await;
    assert_eq!(daemon.engine.numbers(), [1, 2, 3]);
    attempt(&daemon, "second").await;
    daemon.engine.until("both ended", |seen| ends(seen) == 2).await;
    assert_eq!(daemon.engine.numbers(), [1, 2, 3, 1, 2, 3]);
    daemon.stop().await;
    assert_eq!(Journal::view(dir.path()).list().unwrap().len(), 2);
}

/// Its journal may have gone to make room, and its row in the record is kept for longer.
#[tokio::test]
async fn a_build_that_is_only_on_record_begins_a_new_attempt() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(options(HoldMode::None), Some(dir.path())).await;
    daemon
        .engine
        .done
        .store(true, std::sync::atomic::Ordering::Relaxed);
    attempt(&daemon, "second").await;
    daemon.stop().await;
    let kept = Journal::view(dir.path()).list().unwrap();
    let attempts: Vec<_> = kept.iter().map(|entry| entry.key.attempt).collect();
    assert_eq!(attempts, [1]);
}

#[tokio::test]
async fn a_new_attempt_does_not_wait_for_one_whose_client_vanished() {
    let mut options = options(HoldMode::None);
    options.reconnect_grace = Duration::from_secs(600);
    let daemon = Daemon::start(options, None).await;
    let (mut vanished, wire) = Upload::through_a_wire(&daemon, "one").await;
    vanished.send(1, "first 1");
    vanished.send(2, "first 2");
    vanished.acked(1..=2).await;
    wire.abort();
    attempt(&daemon, "second").await;
    daemon.engine.until("both ended", |seen| ends(seen) == 2).await;
    assert_eq!(
        texts(&daemon),
        ["first 1", "first 2", "second 1", "second 2", "second 3"]
    );
}

#[tokio::test]
async fn a_client_that_is_still_there_hears_that_another_took_its_ids() {
    let daemon = Daemon::start(options(HoldMode::None), None).await;
    let mut first = Upload::open(&daemon, "one").await;
    first.send(1, "first 1");
    first.acked([1]).await;
    attempt(&daemon, "second").await;
    first.refused(Code::Aborted).await;
}

#[tokio::test]
async fn a_resumed_stream_belongs_to_the_newest_attempt() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(options(HoldMode::None), Some(dir.path())).await;
    attempt(&daemon, "first").await;
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send(1, "second 1");
    upload.acked([1]).await;
    daemon.stop().await;
    let mut options = options(HoldMode::None);
    options.reconnect_grace = Duration::from_secs(600);
    let daemon = Daemon::start(options, Some(dir.path())).await;
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send(2, "second 2");
    upload.finish(3);
    upload.acked(2..=3).await;
    daemon.engine.until("both ended", |seen| ends(seen) == 2).await;
    // The journals of the two are read at the same time.
    let mut seen = texts(&daemon);
    seen.retain(|text| text.starts_with("second"));
    assert_eq!(seen, ["second 1", "second 2"]);
    assert_eq!(daemon.service.counters().gaps, 0);
}
