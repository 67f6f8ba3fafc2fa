//! How far a stream's forwarding is, as its task follows it.

use tokio::sync::watch;

use super::upstream::ForwardStatus;

/// What is known of the way upstream. Without an upstream service, there is nothing to wait for.
pub(super) struct Following {
    receiver: Option<watch::Receiver<ForwardStatus>>,
    now: ForwardStatus,
    /// The highest number that was handed over.
    handed: i64,
    /// Whether the forwarder may have done its work without having sent everything.
    may_refuse: bool,
}

impl Following {
    /// No forwarder.
    pub(super) fn nothing() -> Self {
        Self::new(None, false)
    }

    /// Follows a forwarder. It `may_refuse` events, or sends all of them.
    pub(super) fn forwarder(receiver: watch::Receiver<ForwardStatus>, may_refuse: bool) -> Self {
        Self::new(Some(receiver), may_refuse)
    }

    fn new(receiver: Option<watch::Receiver<ForwardStatus>>, may_refuse: bool) -> Self {
        let now = match &receiver {
            Some(receiver) => receiver.borrow().clone(),
            None => ForwardStatus {
                acked: i64::MAX,
                finished: true,
                healthy: false,
            },
        };
        Self {
            receiver,
            now,
            handed: 0,
            may_refuse,
        }
    }

    /// Whether upstream has everything and the stream there is closed. What a forwarder says may be older than what
    /// it was handed last.
    pub(super) const fn is_finished(&self) -> bool {
        self.now.finished && (self.may_refuse || self.now.acked >= self.handed)
    }

    /// Whether it is worth waiting for upstream to have this event.
    pub(super) const fn is_expected(&self, sequence: i64) -> bool {
        self.now.healthy && !self.now.finished && self.now.acked < sequence
    }

    /// Events up to this number were handed over.
    pub(super) fn handed(&mut self, sequence: i64) {
        self.handed = self.handed.max(sequence);
        self.now.finished &= self.receiver.is_none();
    }

    /// Resolves when something has changed; never without a forwarder.
    pub(super) async fn changed(&mut self) {
        let Some(receiver) = &mut self.receiver else {
            return std::future::pending().await;
        };
        match receiver.changed().await {
            Ok(()) => self.now = receiver.borrow_and_update().clone(),
            // It panicked: nothing should wait for it, and the journal stays unfinished for the next process.
            Err(_) => {
                self.receiver = None;
                self.now.healthy = false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(acked: i64, finished: bool, healthy: bool) -> ForwardStatus {
        ForwardStatus {
            acked,
            finished,
            healthy,
        }
    }

    #[test]
    fn without_an_upstream_nothing_is_waited_for() {
        let mut following = Following::nothing();
        following.handed(7);
        assert!(following.is_finished() && !following.is_expected(7));
    }

    #[tokio::test]
    async fn only_a_healthy_upstream_is_waited_for() {
        let (sender, receiver) = watch::channel(status(0, false, false));
        let mut following = Following::forwarder(receiver, false);
        assert!(!following.is_expected(3), "down");
        sender.send_replace(status(2, false, true));
        following.changed().await;
        assert!(following.is_expected(3) && !following.is_expected(2) && !following.is_finished());
        sender.send_replace(status(3, true, true));
        following.changed().await;
        assert!(following.is_finished());
        following.handed(4);
        assert!(!following.is_finished(), "it goes on");
        sender.send_replace(status(3, true, true));
        following.changed().await;
        assert!(!following.is_finished(), "that was of before");
        following.may_refuse = true;
        assert!(following.is_finished(), "it will not send more");
        following.may_refuse = false;
        drop(sender);
        following.changed().await;
        assert!(
            !following.is_expected(9) && !following.is_finished(),
            "it panicked"
        );
    }
}
