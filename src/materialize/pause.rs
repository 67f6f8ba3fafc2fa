//! Downloads that are not begun for a while, because somebody has asked for that.

use std::sync::Arc;

use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use crate::output::Class;

/// What is not downloaded at present.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pause {
    /// Everything, also what is required; else only what is optional.
    pub(crate) all: bool,
    /// When it ends by itself, if it does.
    pub(crate) until: Option<Instant>,
}

impl Pause {
    /// The highest class that is not downloaded.
    pub(super) const fn up_to(self) -> Class {
        if self.all {
            Class::Required
        } else {
            Class::Optional
        }
    }
}

/// Whether downloads are paused. All clones are one.
#[derive(Debug, Clone)]
pub(crate) struct Pausing(Arc<watch::Sender<Option<Pause>>>);

impl Pausing {
    pub(super) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(None)))
    }

    /// What is paused now.
    pub(crate) fn now(&self) -> Option<Pause> {
        *self.0.borrow()
    }

    /// Pauses downloads, in place of a pause that there is already. On a tokio runtime.
    pub(crate) fn pause(&self, pause: Pause) {
        self.0.send_replace(Some(pause));
        let Some(until) = pause.until else { return };
        let sender = Arc::downgrade(&self.0);
        tokio::spawn(async move {
            sleep_until(until).await;
            if let Some(sender) = sender.upgrade() {
                sender.send_if_modified(|now| {
                    let is_it = *now == Some(pause);
                    if is_it {
                        *now = None;
                    }
                    is_it
                });
            }
        });
    }

    /// Ends the pause. Gives it back, if there was one.
    pub(crate) fn resume(&self) -> Option<Pause> {
        self.0.send_replace(None)
    }

    /// Resolves once everything is paused, what is required as well.
    pub(crate) fn all_paused(&self) -> impl Future<Output = ()> + use<> {
        let mut changes = self.changes();
        async move {
            let is_all = |pause: &Option<Pause>| pause.is_some_and(|pause| pause.all);
            if changes.wait_for(is_all).await.is_err() {
                // Nobody can pause anything any more.
                std::future::pending::<()>().await;
            }
        }
    }

    pub(super) fn changes(&self) -> watch::Receiver<Option<Pause>> {
        self.0.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::FutureExt as _;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_pause_ends_by_itself_unless_another_took_its_place() {
        let pausing = Pausing::new();
        let until = |seconds, all| Pause {
            all,
            until: Some(Instant::now() + Duration::from_secs(seconds)),
        };
        assert_eq!(pausing.resume(), None, "what is not paused can be resumed");
        let first = until(10, false);
        pausing.pause(first);
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(pausing.now(), Some(first));
        assert!(pausing.all_paused().now_or_never().is_none());
        let second = until(10, true);
        pausing.pause(second);
        tokio::time::sleep(Duration::from_secs(9)).await;
        assert_eq!(pausing.now(), Some(second));
        assert!(pausing.all_paused().now_or_never().is_some());
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(pausing.now(), None);
        let endless = Pause {
            all: false,
            until: None,
        };
        pausing.pause(endless);
        tokio::time::sleep(Duration::from_secs(1_000_000)).await;
        assert_eq!(pausing.resume(), Some(endless));
        assert_eq!(pausing.now(), None);
    }
}
