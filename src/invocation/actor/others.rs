//! Another process that was in the middle of placing an older build's file when this build began.
//!
//! Its file may come late, over what this build has found in its place or put there. So nothing is reported as on disk
//! until the other process is done and all of it was looked at once more. A process that was stopped must not stop
//! builds, though: after [`HELD`] this one goes on with a warning, and looks when the other one is done.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::task::spawn_blocking;

use super::{
    Actor,
    again::{Doubt, deletes_at_its_end},
    phase::{Phase, Step},
};
use crate::{materialize::Root, units::show_duration};

/// For how long a build is held for others who are placing files.
const HELD: Duration = Duration::from_secs(10);
/// For how long they are watched after that, and how often while the build is held, and when it is not.
const WATCHED: Duration = Duration::from_secs(600);
const SOON: Duration = Duration::from_millis(20);
const LATER: Duration = Duration::from_millis(500);

impl Actor {
    /// Another process is placing files in this root.
    pub(super) fn doubt(&mut self, root: Arc<Root>) {
        self.recheck.doubt = Some(Doubt::Placing);
        self.watch_others(root, HELD, SOON);
    }

    /// Finds out when they are done, or after some time that they are not.
    fn watch_others(&mut self, root: Arc<Root>, patience: Duration, pause: Duration) {
        let began = Instant::now();
        self.recheck.others.spawn(async move {
            loop {
                let root = root.clone();
                if spawn_blocking(move || root.epoch.is_alone())
                    .await
                    .unwrap_or(true)
                {
                    return true;
                }
                if began.elapsed() > patience {
                    return false;
                }
                tokio::time::sleep(pause).await;
            }
        });
    }

    /// They are done, or are not after all this time.
    pub(super) fn on_others(&mut self, alone: bool) {
        match (self.recheck.doubt, self.site.open_root()) {
            (Some(_), _) if alone => self.recheck.doubt = Some(Doubt::Done { looked: false }),
            (Some(Doubt::Placing), Some(place)) => {
                let message = format!(
                    "gave up waiting for another outhaul process, which has been placing a file of an older \
                     build for {}; if it replaces an output late, this process corrects that while it runs",
                    show_duration(HELD)
                );
                tracing::warn!(invocation = %self.row.invocation_id, "{message}");
                self.ledger.tally.note(&message);
                self.recheck.doubt = Some(Doubt::Stuck);
                self.watch_others(place.root.clone(), WATCHED, LATER);
            }
            _ => self.recheck.doubt = None,
        }
    }

    /// Looks at what is on disk once the others are done, and wants once more what they have replaced.
    pub(super) async fn look_after_others(&mut self) {
        let Some(Doubt::Done { looked }) = self.recheck.doubt else {
            return;
        };
        // What is on its way may have been looked at before they were done.
        let is_last = self.ledger.optional == 0;
        if self.ledger.required > 0 || (looked && !is_last) {
            return;
        }
        self.recheck.doubt = (!is_last).then_some(Doubt::Done { looked: true });
        let outputs = self.want_again(self.recheck.placed.clone()).await;
        if is_last && !deletes_at_its_end(&self.row.build_tool_version) {
            self.recheck.placed = Vec::new();
        }
        if outputs > 0 {
            // A build that was reported as settled is reported again.
            if let Phase::Settled { end, .. } = self.phase {
                let next = Step::Settle;
                self.phase = Phase::Ended { end, next };
            }
            tracing::warn!(
                invocation = %self.row.invocation_id,
                outputs,
                "another outhaul process was placing files of an older build when this one started: checking \
                 again what it may have replaced"
            );
        }
    }
}
