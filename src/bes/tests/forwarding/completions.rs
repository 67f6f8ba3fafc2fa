//! Completions that are held until they are true.

use super::*;

/// A build event with the id of a completed target.
fn completion() -> Vec<u8> {
    field(1, &field(5, &field(1, b"//a:a")))
}

async fn gated(dir: &Path, backend: &Backend, strict: bool) -> (Daemon, Upload) {
    let mut options = options(HoldMode::Target);
    options.hold.strict = strict;
    let daemon = start(backend, options, Some(dir)).await;
    daemon.engine.progress.send_replace(Some(Progress::default()));
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send(1, "a");
    upload.send(2, completion());
    upload.send(3, "b");
    // The build tool's memory is not what holds it.
    upload.acked(1..=3).await;
    upload.finish(4);
    daemon.engine.until_ended(StreamEnd::Finished).await;
    backend.until("the first", |came| came == [Came::Event(1)]).await;
    upload.quiet().await;
    assert_eq!(backend.numbers(), [1]);
    (daemon, upload)
}

#[tokio::test]
async fn a_completion_goes_upstream_when_it_is_true_and_what_follows_after_it() {
    let dir = tempfile::tempdir().unwrap();
    let backend = Backend::start().await;
    let (daemon, mut upload) = gated(dir.path(), &backend, false).await;
    daemon.engine.progress.send_replace(Some(Progress {
        open: None,
        through: 2,
        ..Progress::default()
    }));
    backend.until_closed().await;
    assert_eq!(backend.numbers(), [1, 2, 3, 4]);
    upload.quiet().await;
    daemon.engine.settle(0);
    upload.acked([4]).await;
    upload.closed().await;
    settled(dir.path(), "one").await;
}

#[tokio::test]
async fn with_strict_a_completion_that_is_not_true_ends_both_streams() {
    let dir = tempfile::tempdir().unwrap();
    let backend = Backend::start().await;
    let (daemon, mut upload) = gated(dir.path(), &backend, true).await;
    daemon.engine.progress.send_replace(Some(Progress {
        open: None,
        through: 4,
        failed_at: Some(2),
        messages: vec!["bazel-out/x: evicted".to_owned()],
    }));
    daemon.engine.settle(1);
    let status = upload.refused(tonic::Code::FailedPrecondition).await;
    assert!(status.message().contains("bazel-out/x: evicted"), "{status}");
    // Nothing is left to do for it.
    settled(dir.path(), "one").await;
    daemon.stop().await;
    assert_eq!(backend.came(), [Came::Event(1)]);
}

#[tokio::test]
async fn a_shutdown_does_not_wait_for_what_is_held_and_the_next_daemon_sends_it() {
    let dir = tempfile::tempdir().unwrap();
    let backend = Backend::start().await;
    let (daemon, mut upload) = gated(dir.path(), &backend, false).await;
    daemon.stop().await;
    upload.acked([4]).await;
    assert_eq!(backend.numbers(), [1], "nothing is passed on that may be untrue");
    let daemon = start(&backend, options(HoldMode::Target), Some(dir.path())).await;
    daemon.engine.settle(0);
    backend.until_closed().await;
    assert_eq!(backend.numbers(), [1, 2, 3, 4]);
    settled(dir.path(), "one").await;
    daemon.stop().await;
}
