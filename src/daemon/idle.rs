//! What a daemon does when it has nothing to do: it gives memory back, and may end, since a socket starts it again.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::{Services, memory};
use crate::{bes::BesService, notify::Backlog};

/// How long nothing happens before memory is given back.
const QUIET: Duration = Duration::from_secs(5);

/// What may be under way.
pub(super) struct Work {
    pub(super) services: Services,
    pub(super) events: BesService,
    /// Notifications, if there are receivers.
    pub(super) notifications: Option<Backlog>,
}

impl Work {
    /// Whether something is on its way. A client that only waits or watches is not.
    async fn is_under_way(&self) -> bool {
        self.events.has_undelivered()
            || self.notifications.as_ref().is_some_and(|n| !n.is_empty())
            || self.services.engine.is_busy().await
    }
}

/// Gives memory back whenever nothing has happened for a few seconds, and cancels the token once nothing has for `timeout`,
/// if there is one: no event came, no caller waits for an answer, nothing is on its way to the disk, the upstream service
/// or to those who are notified.
pub(super) async fn watch(work: &Work, timeout: Option<Duration>, stop: &CancellationToken) {
    let look = timeout.map_or(QUIET, |timeout| {
        (timeout / 4).clamp(Duration::from_millis(50), QUIET)
    });
    let mut events = work.services.metrics.events.get();
    let (mut idle_since, mut quiet_since) = (Instant::now(), Instant::now());
    let (mut has_worked, mut is_asked) = (false, false);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(look) => {}
        }
        let now = work.services.metrics.events.get();
        if now != events || work.is_under_way().await {
            events = now;
            quiet_since = Instant::now();
            has_worked = true;
        }
        let was_asked = std::mem::replace(&mut is_asked, work.services.service.is_busy());
        if is_asked {
            idle_since = Instant::now();
        }
        has_worked |= was_asked && !is_asked;
        idle_since = idle_since.max(quiet_since);
        if timeout.is_some_and(|timeout| idle_since.elapsed() >= timeout) {
            tracing::info!("exiting because of --idle-timeout");
            stop.cancel();
            return;
        }
        if has_worked && quiet_since.elapsed() >= QUIET {
            has_worked = false;
            // If it panics, or the runtime ends, nothing is lost but memory.
            let _ = tokio::task::spawn_blocking(memory::give_back).await;
        }
    }
}
