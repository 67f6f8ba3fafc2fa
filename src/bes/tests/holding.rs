//! The last acknowledgement waits for the outputs, never for ever.

use std::time::{Duration, Instant};

use outhaul_testkit::PATIENCE;
use tonic::Code;

use super::harness::{Daemon, Seen, Upload, options};
use crate::{
    bes::{BesOptions, HoldMode},
    builds::StreamEnd,
};

fn held(timed_out: bool) -> impl Fn(&[Seen]) -> bool {
    move |seen| seen.contains(&Seen::Held("one".into(), timed_out))
}

fn with_timeout(timeout: Duration, strict: bool) -> BesOptions {
    let mut options = options(HoldMode::Invocation);
    options.hold.timeout = timeout;
    options.hold.strict = strict;
    options
}

async fn finished(daemon: &Daemon) -> Upload {
    let mut upload = Upload::open(daemon, "one").await;
    upload.send_all(1..=3);
    upload.finish(4);
    upload.acked(1..=3).await;
    upload
}

#[tokio::test]
async fn the_last_ack_comes_when_the_build_is_settled() {
    let daemon = Daemon::start(options(HoldMode::Invocation), None).await;
    let mut upload = finished(&daemon).await;
    daemon.engine.until_ended(StreamEnd::Finished).await;
    upload.quiet().await;
    daemon.engine.settle(2);
    upload.acked([4]).await;
    upload.closed().await;
    daemon.engine.until("held", held(false)).await;
}

#[tokio::test]
async fn the_deadline_ends_the_hold_with_an_ack() {
    let daemon = Daemon::start(with_timeout(Duration::from_millis(100), false), None).await;
    let mut upload = finished(&daemon).await;
    upload.acked([4]).await;
    upload.closed().await;
    daemon.engine.until("timed out", held(true)).await;
    assert_eq!(daemon.service.counters().hold_timeouts, 1);
}

#[tokio::test]
async fn no_client_waits_for_outputs_that_are_not_downloaded_on_request() {
    for strict in [false, true] {
        for stops_first in [false, true] {
            let daemon = Daemon::start(with_timeout(PATIENCE * 10, strict), None).await;
            daemon.engine.stopped.send_replace(stops_first);
            let mut upload = finished(&daemon).await;
            if !stops_first {
                upload.quiet().await;
                daemon.engine.stopped.send_replace(true);
            }
            if strict {
                let status = upload.refused(Code::FailedPrecondition).await;
                assert!(status.message().contains("outhaul resume"), "{status}");
            } else {
                upload.acked([4]).await;
                upload.closed().await;
            }
            daemon.engine.until("held", held(false)).await;
            assert_eq!(daemon.service.counters().hold_timeouts, 0);
        }
    }
}

#[tokio::test]
async fn a_client_that_waits_for_less_long_is_let_go_before_it_gives_up() {
    for (strict, expected) in [(false, None), (true, Some("the build's --bes_timeout=0.5s"))] {
        let daemon = Daemon::start(with_timeout(PATIENCE * 10, strict), None).await;
        let mut upload = Upload::open(&daemon, "one").await;
        upload.send(1, "--bes_timeout=500ms");
        upload.acked([1]).await;
        daemon.engine.until("taken in", |seen| !seen.is_empty()).await;
        let began = Instant::now();
        upload.finish(2);
        match expected {
            None => upload.acked([2]).await,
            Some(limit) => {
                let status = upload.refused(Code::FailedPrecondition).await;
                assert!(status.message().contains(limit), "{status}");
            }
        }
        // The machine may be slow, but the hold does not end by the policy's time.
        assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
        daemon.engine.until("timed out", held(true)).await;
    }
}

#[tokio::test]
async fn strict_fails_the_stream_without_a_retry_when_outputs_failed() {
    let daemon = Daemon::start(with_timeout(PATIENCE * 10, true), None).await;
    let mut upload = finished(&daemon).await;
    daemon.engine.settle(2);
    let status = upload.refused(Code::FailedPrecondition).await;
    assert!(status.message().contains("2 required outputs"), "{status}");
    assert!(status.message().contains("bazel-out/x: evicted"), "{status}");
}

#[tokio::test]
async fn strict_fails_the_stream_at_the_deadline() {
    let daemon = Daemon::start(with_timeout(Duration::from_millis(100), true), None).await;
    let mut upload = finished(&daemon).await;
    let status = upload.refused(Code::FailedPrecondition).await;
    assert!(status.message().contains("--hold-timeout"), "{status}");
}

#[tokio::test]
async fn strict_acks_when_everything_is_there() {
    let daemon = Daemon::start(with_timeout(PATIENCE * 10, true), None).await;
    let mut upload = finished(&daemon).await;
    daemon.engine.settle(0);
    upload.acked([4]).await;
    upload.closed().await;
}

#[tokio::test]
async fn nobody_waits_any_more_when_the_build_is_to_end() {
    for strict in [false, true] {
        let daemon = Daemon::start(with_timeout(PATIENCE * 10, strict), None).await;
        let mut waiting = finished(&daemon).await;
        daemon.engine.until_ended(StreamEnd::Finished).await;
        waiting.quiet().await;
        daemon.service.hurry();
        waiting.acked([4]).await;
        waiting.closed().await;
        daemon.engine.until("held", held(false)).await;
        // One whose last event comes later does not wait at all.
        let mut late = Upload::open(&daemon, "two").await;
        late.finish(1);
        late.acked([1]).await;
        late.closed().await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_wait_but_not_the_build() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(options(HoldMode::Invocation), Some(dir.path())).await;
    let upload = finished(&daemon).await;
    daemon.engine.until_ended(StreamEnd::Finished).await;
    // The next command started: Bazel cancels.
    drop(upload);
    daemon.engine.until("held", held(false)).await;
    assert_eq!(daemon.engine.seen().len(), 5, "no second end");
    // A client that comes back waits again, for the same.
    let mut upload = Upload::open(&daemon, "one").await;
    upload.finish(4);
    upload.quiet().await;
    daemon.engine.settle(0);
    upload.acked([4]).await;
    upload.closed().await;
    let journal = crate::journal::Journal::view(dir.path());
    assert!(journal.find("one").unwrap().settled);
}

#[tokio::test]
async fn a_panicking_engine_lets_the_build_go() {
    let daemon = Daemon::start(options(HoldMode::Invocation), None).await;
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send(1, "panic");
    upload.send(2, "more");
    upload.finish(3);
    upload.acked(1..=3).await;
    upload.closed().await;
}

#[tokio::test]
async fn a_stuck_engine_lets_the_build_go_at_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::gated(with_timeout(Duration::from_millis(100), false), Some(dir.path())).await;
    let mut upload = finished(&daemon).await;
    upload.acked([4]).await;
    upload.closed().await;
}

#[tokio::test]
async fn a_shutdown_lets_a_held_client_go_and_sends_others_to_the_next_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(options(HoldMode::Invocation), Some(dir.path())).await;
    let mut waiting = finished(&daemon).await;
    let mut open = Upload::open(&daemon, "two").await;
    open.send(1, "a");
    open.acked([1]).await;
    daemon.engine.until_ended(StreamEnd::Finished).await;
    daemon.stop().await;
    waiting.acked([4]).await;
    waiting.closed().await;
    open.refused(Code::Unavailable).await;
    let unfinished = crate::journal::Journal::view(dir.path()).unfinished().unwrap();
    assert_eq!(unfinished.len(), 2);
}

#[tokio::test]
async fn a_strict_shutdown_acks_nothing_that_is_not_settled() {
    let daemon = Daemon::start(with_timeout(PATIENCE * 10, true), None).await;
    let mut upload = finished(&daemon).await;
    daemon.engine.until_ended(StreamEnd::Finished).await;
    daemon.stop().await;
    upload.refused(Code::Unavailable).await;
}
