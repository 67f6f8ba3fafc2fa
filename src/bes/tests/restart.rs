//! What was acknowledged outlives the process.

use std::{os::unix::fs::PermissionsExt as _, time::Duration};

use super::harness::{Daemon, Seen, Upload, key, options};
use crate::{
    bes::HoldMode,
    builds::StreamEnd,
    journal::{Journal, JournalOptions},
};

#[tokio::test]
async fn the_next_daemon_replays_and_goes_on_where_the_last_one_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let daemon = Daemon::start(options(HoldMode::Invocation), Some(&path)).await;
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send_all(1..=5);
    upload.acked(1..=5).await;
    daemon.stop().await;

    let mut options = options(HoldMode::Invocation);
    options.reconnect_grace = Duration::from_secs(60);
    let daemon = Daemon::start(options, Some(&path)).await;
    daemon.engine.until("replayed", |seen| seen.len() == 5).await;
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send_all(4..=7);
    upload.finish(8);
    upload.acked(4..=7).await;
    daemon.engine.until_ended(StreamEnd::Finished).await;
    assert_eq!(daemon.engine.numbers(), (1..=7).collect::<Vec<_>>());
    let counts = daemon.service.counters();
    assert_eq!((counts.duplicates, counts.gaps), (2, 0));
    daemon.engine.settle(0);
    upload.acked([8]).await;
    upload.closed().await;
    daemon.stop().await;

    let journal = Journal::view(&path);
    assert!(journal.unfinished().unwrap().is_empty());
    let records: Vec<_> = journal.read("one").unwrap().map(Result::unwrap).collect();
    assert_eq!(
        records.iter().map(|r| r.sequence).collect::<Vec<_>>(),
        (1..=8).collect::<Vec<_>>()
    );
    assert_eq!(records[6].build_event().unwrap(), "7");
    let entry = journal.find("one").unwrap();
    assert_eq!(entry.key, key("one"));
    let mode = |path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(entry.path.as_path()), mode(path.as_path())), (0o600, 0o700));
}

#[tokio::test]
async fn a_finished_build_is_settled_after_a_restart_without_its_client() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(options(HoldMode::None), Some(dir.path())).await;
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send_all(1..=2);
    upload.finish(3);
    upload.acked(1..=3).await;
    upload.closed().await;
    daemon.stop().await;

    let daemon = Daemon::start(options(HoldMode::None), Some(dir.path())).await;
    daemon.engine.until_ended(StreamEnd::Finished).await;
    assert_eq!(daemon.engine.numbers(), [1, 2]);
    daemon.engine.settle(0);
    // Its client missed the last acknowledgement.
    let mut upload = Upload::open(&daemon, "one").await;
    upload.finish(3);
    upload.acked([3]).await;
    upload.closed().await;
    let settled = async {
        while !Journal::view(dir.path()).find("one").unwrap().settled {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), settled)
        .await
        .unwrap();
    daemon.stop().await;

    // Settled: nothing is replayed, and a client that comes even now is let go.
    let daemon = Daemon::start(options(HoldMode::Invocation), Some(dir.path())).await;
    let mut upload = Upload::open(&daemon, "one").await;
    upload.finish(3);
    upload.acked([3]).await;
    upload.closed().await;
    assert_eq!(daemon.engine.numbers(), Vec::<i64>::new());
}

#[tokio::test]
async fn a_build_that_settles_while_its_client_reconnects_still_acks_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(options(HoldMode::Invocation), Some(dir.path())).await;
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send_all(1..=2);
    upload.finish(3);
    upload.acked(1..=2).await;
    daemon.engine.until_ended(StreamEnd::Finished).await;
    daemon.stop().await;

    let daemon = Daemon::start(options(HoldMode::Invocation), Some(dir.path())).await;
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send_all([2]);
    upload.acked([2]).await;
    daemon.engine.settle(0);
    let settled = async {
        while !Journal::view(dir.path()).find("one").unwrap().settled {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), settled)
        .await
        .unwrap();
    upload.finish(3);
    upload.acked([3]).await;
    upload.closed().await;
}

#[tokio::test]
async fn an_orphan_of_the_last_daemon_is_given_up_after_the_grace() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(options(HoldMode::None), Some(dir.path())).await;
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send_all(1..=2);
    upload.acked(1..=2).await;
    daemon.stop().await;

    let daemon = Daemon::start(options(HoldMode::None), Some(dir.path())).await;
    let why = "the client did not reconnect".to_owned();
    daemon.engine.until_ended(StreamEnd::Broken(why)).await;
    assert_eq!(daemon.engine.numbers(), [1, 2]);
}

#[tokio::test]
async fn a_journal_that_cannot_be_written_does_not_stop_the_build() {
    let dir = tempfile::tempdir().unwrap();
    // Something is in the way of the file.
    let journal = Journal::open(dir.path(), JournalOptions::default()).unwrap();
    let (writer, _) = journal.stream(&key("one")).unwrap();
    let file = writer.path();
    drop((writer, journal));
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();

    let daemon = Daemon::start(options(HoldMode::None), Some(dir.path())).await;
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send_all(1..=3);
    upload.finish(4);
    upload.acked(1..=4).await;
    upload.closed().await;
    daemon.engine.until_ended(StreamEnd::Finished).await;
    assert_eq!(daemon.service.counters().journal_failures, 1);
    let events = daemon
        .engine
        .seen()
        .into_iter()
        .filter(|s| matches!(s, Seen::Event(..)));
    assert_eq!(events.count(), 3);
}
