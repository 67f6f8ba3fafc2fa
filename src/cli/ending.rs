//! Signals that end the daemon.

use std::task::Poll;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The signals, heeded from when they are listened to.
pub(super) struct Signals(Vec<(&'static str, Signal)>);

impl Signals {
    /// From now on they do not end the process by themselves.
    ///
    /// # Errors
    /// When they cannot be listened to.
    pub(super) fn listen() -> std::io::Result<Self> {
        Ok(Self(vec![
            ("SIGTERM", signal(SignalKind::terminate())?),
            ("SIGINT", signal(SignalKind::interrupt())?),
        ]))
    }

    /// The same with what a terminal sends when it is closed, or on Ctrl-\: of a process that must not leave anything
    /// behind. Under `nohup` it outlives the terminal.
    ///
    /// # Errors
    /// When they cannot be listened to.
    #[cfg(feature = "mount")]
    pub(super) fn listen_to_terminal() -> std::io::Result<Self> {
        let mut signals = Self::listen()?;
        let ignored = Ignored::here();
        for (name, kind) in [("SIGHUP", SignalKind::hangup()), ("SIGQUIT", SignalKind::quit())] {
            if !ignored.has(kind) {
                signals.0.push((name, signal(kind)?));
            }
        }
        Ok(signals)
    }

    /// Cancels `shutdown` on the first signal, and the token that is returned on one that comes while the
    /// daemon is ending: anyone who asks twice does not want to wait. Nothing that was acknowledged is lost by that; it
    /// is in the journal.
    pub(super) fn heed(self, shutdown: CancellationToken) -> CancellationToken {
        let Self(mut signals) = self;
        let at_once = CancellationToken::new();
        let token = at_once.clone();
        tokio::spawn(async move {
            loop {
                let next = std::future::poll_fn(|context| {
                    let mut all = signals.iter_mut();
                    let came =
                        all.find_map(|(name, signal)| signal.poll_recv(context).is_ready().then_some(*name));
                    came.map_or(Poll::Pending, Poll::Ready)
                });
                let name = next.await;
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

/// The signals that a process ignores, a bit for each. What it was started to ignore, as by `nohup`, it should go on ignoring.
pub(super) struct Ignored(u64);

impl Ignored {
    /// Those of this process.
    pub(super) fn here() -> Self {
        Self::read(&std::fs::read_to_string("/proc/self/status").unwrap_or_default())
    }

    /// By the text of a process's `/proc/PID/status`.
    fn read(status: &str) -> Self {
        let mut lines = status.lines();
        let bits = lines.find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
        Self(bits.unwrap_or(0))
    }

    pub(super) const fn has(&self, kind: SignalKind) -> bool {
        self.0 >> (kind.as_raw_value() - 1) & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nohup_ignores_stays_ignored() {
        let status = "Name:\touthaul\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000000001\n";
        assert!(Ignored::read(status).has(SignalKind::hangup()));
        assert!(!Ignored::read(status).has(SignalKind::quit()));
        assert!(!Ignored::read("").has(SignalKind::hangup()));
    }

    #[test]
    fn what_is_ignored_is_read_from_the_systems_words() {
        let status = "Name:\tx\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\nSigCgt:\t0\n";
        let is = |kind| Ignored::read(status).has(kind);
        assert!(is(SignalKind::hangup()) && is(SignalKind::pipe()) && !is(SignalKind::interrupt()));
        assert_eq!(Ignored::read("SigIgn:\tx").0, 0);
    }
}
