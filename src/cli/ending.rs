//! Signals that end the daemon.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The signals, heeded from when they are listened to.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// From now on they do not end the process by themselves.
    ///
    /// # Errors
    /// When they cannot be listened to.
    pub(super) fn listen() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Cancels `shutdown` on the first SIGTERM or SIGINT, and the token that is returned on one that comes while the
    /// daemon is ending: anyone who asks twice does not want to wait. Nothing that was acknowledged is lost by that; it
    /// is in the journal.
    pub(super) fn heed(self, shutdown: CancellationToken) -> CancellationToken {
        let Self {
            mut terminate,
            mut interrupt,
        } = self;
        let at_once = CancellationToken::new();
        let token = at_once.clone();
        tokio::spawn(async move {
            loop {
                let name = tokio::select! {
                    _ = terminate.recv() => "SIGTERM",
                    _ = interrupt.recv() => "SIGINT",
                };
                if shutdown.is_cancelled() {
                    tracing::warn!("exiting at once: {name}");
                    token.cancel();
                    return;
                }
                tracing::info!("shutting down: {name}");
                shutdown.cancel();
            }
        });
        at_once
    }
}
