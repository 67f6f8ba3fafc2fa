//! Ending by itself: a daemon that a socket starts again need not stay.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::Rooms;
use crate::stage::Stager;

/// Cancels the token once nothing has happened for `timeout`: no event came, nothing is on its way.
pub(super) async fn watch(rooms: &Rooms, timeout: Duration, stop: &CancellationToken) {
    let look = (timeout / 4).clamp(Duration::from_millis(50), Duration::from_secs(5));
    let mut events = rooms.metrics.events.get();
    let mut since = Instant::now();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(look) => {}
        }
        let now = rooms.metrics.events.get();
        let staging = rooms.service.stager().is_some_and(Stager::is_busy);
        if now != events || staging || rooms.engine.is_busy().await {
            events = now;
            since = Instant::now();
        } else if since.elapsed() >= timeout {
            tracing::info!("idle, and so ending");
            stop.cancel();
            return;
        }
    }
}
