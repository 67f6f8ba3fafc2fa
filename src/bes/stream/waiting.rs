//! What a stream's task waits for.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::super::command::Connection;
use crate::builds::{Builds, Progress, Settlement};

/// How long a build that may go on must have survived what its journal asked for.
const CAUGHT_UP: Duration = Duration::from_secs(2);

/// A moment from now, or so late that it does not matter.
pub(super) fn after(duration: Duration) -> Instant {
    later(Instant::now(), duration)
}

pub(super) fn later(from: Instant, duration: Duration) -> Instant {
    from.checked_add(duration)
        .unwrap_or_else(|| from + Duration::from_secs(1 << 30))
}

pub(super) async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Resolves when the engine has answered; `None` if it panicked.
pub(super) async fn settled(
    settling: Option<&mut AbortOnDropHandle<Option<Settlement>>>,
) -> Option<Settlement> {
    match settling {
        Some(settling) => settling.await.ok().flatten(),
        None => std::future::pending().await,
    }
}

/// Resolves when optional outputs that were on their way came to their end, or the engine panicked.
pub(super) async fn done(rest: &mut Option<AbortOnDropHandle<()>>) {
    match rest {
        Some(rest) => {
            let _ = rest.await;
        }
        None => std::future::pending().await,
    }
}

/// Resolves when what events up to a number ask for is there or has failed, and a moment after, for what is optional.
pub(super) async fn caught_up(
    progress: impl Future<Output = Option<tokio::sync::watch::Receiver<Progress>>>,
    highest: i64,
) {
    if let Some(mut progress) = progress.await {
        // Its sender goes when nothing is on its way any more.
        let _ = progress.wait_for(|progress| progress.through >= highest).await;
    }
    tokio::time::sleep(CAUGHT_UP).await;
}

/// For how long outputs are waited for that are not downloaded: what is on disk, or needs no download, is there by then.
pub(super) const STOPPING: Duration = Duration::from_secs(2);

/// Resolves when the outputs that a client waits for, since then, are not downloaded any more, on request.
pub(super) async fn stopped(waiting: Option<(&dyn Builds, Instant)>) {
    match waiting {
        Some((builds, since)) => {
            builds.stopped().await;
            tokio::time::sleep_until(since + STOPPING).await;
        }
        None => std::future::pending().await,
    }
}

/// Resolves when a client that waits has gone.
pub(super) async fn left(waiting: Option<&Connection>) {
    match waiting {
        Some(connection) => connection.acks.closed().await,
        None => std::future::pending().await,
    }
}
