//! What the daemon does besides serving: leases, forgetting, ending when idle.

use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::DaemonError;

/// Runs a background task until the daemon stops. If one fails, the daemon keeps running: builds continue without it.
pub(super) async fn background(
    name: &'static str,
    doing: impl Future<Output = ()> + Send + 'static,
    stop: CancellationToken,
) -> Result<(), DaemonError> {
    let ended = AbortOnDropHandle::new(tokio::spawn(doing)).await;
    // Nobody but an ending runtime cancels it: then the process ends without having stopped its daemon.
    let is_cut_off = ended.as_ref().is_err_and(tokio::task::JoinError::is_cancelled);
    if !stop.is_cancelled() && !is_cut_off {
        let reason = ended.err().map(|e| e.to_string()).unwrap_or_default();
        tracing::error!("{name} has ended; this is a bug in outhaul: {reason}");
        stop.cancelled().await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_task_that_breaks_off_ends_nothing_before_the_daemon_stops() {
        for panics in [true, false] {
            let stop = CancellationToken::new();
            let doing = async move { assert!(!panics, "as it may happen") };
            let mut running = tokio::spawn(background("a task", doing, stop.clone()));
            let early = tokio::time::timeout(Duration::from_millis(100), &mut running).await;
            assert!(early.is_err(), "it stays");
            stop.cancel();
            assert!(running.await.unwrap().is_ok());
        }
    }
}
