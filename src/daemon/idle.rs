//! Ending by itself: a daemon that a socket starts again need not stay.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::Rooms;
use crate::{bes::BesService, notify::Backlog};

/// What may be under way.
pub(super) struct Work {
    pub(super) rooms: Rooms,
    pub(super) events: BesService,
    /// Notifications, if somebody is told of builds.
    pub(super) notifications: Option<Backlog>,
}

impl Work {
    async fn is_under_way(&self) -> bool {
        self.rooms.service.is_busy()
            || self.events.has_undelivered()
            || self.notifications.as_ref().is_some_and(|n| !n.is_empty())
            || self.rooms.engine.is_busy().await
    }
}

/// Cancels the token once nothing has happened for `timeout`: no event came, nobody waits for an answer, nothing is on
/// its way to the disk, to the upstream service or to those who are notified.
pub(super) async fn watch(work: &Work, timeout: Duration, stop: &CancellationToken) {
    let look = (timeout / 4).clamp(Duration::from_millis(50), Duration::from_secs(5));
    let mut events = work.rooms.metrics.events.get();
    let mut since = Instant::now();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(look) => {}
        }
        let now = work.rooms.metrics.events.get();
        if now != events || work.is_under_way().await {
            events = now;
            since = Instant::now();
        } else if since.elapsed() >= timeout {
            tracing::info!("idle, and so ending");
            stop.cancel();
            return;
        }
    }
}
