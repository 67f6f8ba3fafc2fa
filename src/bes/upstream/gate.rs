//! Holds completions back until they are true.

use std::sync::Arc;

use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::peek::{self, Kind};
use crate::{
    bes::{HoldMode, HoldPolicy},
    builds::{Builds, Progress, StreamKey},
};

/// What becomes of an event.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It goes on.
    Pass,
    /// It must not: strict, and it would say what is not true. With the words for it.
    Refuse(String),
}

/// One stream's gate.
pub(super) struct Gate {
    builds: Arc<dyn Builds>,
    key: StreamKey,
    policy: HoldPolicy,
    /// Whether sets of files are held too.
    sets: bool,
    progress: Option<watch::Receiver<Progress>>,
    shutdown: CancellationToken,
}

impl Gate {
    pub(super) const fn new(
        builds: Arc<dyn Builds>,
        key: StreamKey,
        policy: HoldPolicy,
        sets: bool,
        shutdown: CancellationToken,
    ) -> Self {
        Self {
            builds,
            key,
            policy,
            sets,
            progress: None,
            shutdown,
        }
    }

    /// Begins to follow the build. Called before the stream's first event is looked at: a build that is long settled
    /// when somebody asks has nothing to report any more.
    pub(super) async fn follow(&mut self) {
        if self.policy.mode == HoldMode::Target && self.progress.is_none() {
            self.progress = self.builds.progress(&self.key).await;
        }
    }

    /// The stream has no more events for now.
    pub(super) fn leave(&mut self) {
        self.progress = None;
    }

    /// Whether a request has to be held.
    pub(super) fn holds(&self, request: &[u8]) -> bool {
        self.policy.mode == HoldMode::Target
            && match peek::kind(request) {
                Kind::Completion => true,
                Kind::NamedSet => self.sets,
                Kind::Other => false,
            }
    }

    /// Waits until what the event of this number reports is true, until the hold's timeout after it `came` at the
    /// latest. At a shutdown it waits forever: the engine goes first, and says nothing true any more.
    pub(super) async fn pass(&mut self, sequence: i64, came: Instant) -> Verdict {
        // Since when the outputs are what is waited for: until the build says what they are, no time runs.
        let mut since = Some(came);
        let mut asked = false;
        loop {
            if self.shutdown.is_cancelled() {
                return std::future::pending().await;
            }
            if self.progress.is_none() {
                self.progress = self.builds.progress(&self.key).await;
                asked = true;
            }
            let Some(progress) = &mut self.progress else {
                return Verdict::Pass;
            };
            {
                let now = progress.borrow_and_update();
                if let Some(verdict) = verdict(&now, sequence, self.policy.strict) {
                    return verdict;
                }
                if now.open.is_some_and(|open| open <= sequence) {
                    since = None;
                } else {
                    since.get_or_insert_with(Instant::now);
                }
            }
            let deadline = since.and_then(|since| since.checked_add(self.policy.timeout));
            tokio::select! {
                biased;
                () = self.shutdown.cancelled() => return std::future::pending().await,
                changed = progress.changed() => if changed.is_err() {
                    // The build's task went without having seen the event: the stream came back later, and there is
                    // a new one. If that goes too, it has failed.
                    self.progress = None;
                    if asked && !self.shutdown.is_cancelled() {
                        return Verdict::Pass;
                    }
                },
                () = until(deadline) => return self.timed_out(sequence),
            }
        }
    }

    fn timed_out(&self, sequence: i64) -> Verdict {
        let timeout = self.policy.timeout.as_secs_f64();
        if self.policy.strict {
            return Verdict::Refuse(format!(
                "required outputs were not downloaded within --hold-timeout={timeout}s"
            ));
        }
        tracing::warn!(
            stream = %self.key, sequence, timeout,
            "forwarding a TargetComplete event before its outputs are on disk (see --hold-timeout)"
        );
        Verdict::Pass
    }
}

/// What is to be done with an event, if that can be said yet.
fn verdict(now: &Progress, sequence: i64, strict: bool) -> Option<Verdict> {
    if strict && now.failed_at.is_some_and(|at| at <= sequence) {
        let mut words = "failed to download required outputs".to_owned();
        for message in &now.messages {
            words.push_str("; ");
            words.push_str(message);
        }
        return Some(Verdict::Refuse(words));
    }
    (now.through >= sequence).then_some(Verdict::Pass)
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_refused_only_if_strict_and_only_from_there_on() {
        let now = |through, failed_at| Progress {
            open: None,
            through,
            failed_at,
            messages: vec!["bazel-out/x: evicted".to_owned()],
        };
        assert_eq!(verdict(&now(4, None), 5, true), None);
        assert_eq!(verdict(&now(5, None), 5, true), Some(Verdict::Pass));
        assert_eq!(verdict(&now(5, Some(5)), 5, false), Some(Verdict::Pass));
        assert_eq!(verdict(&now(5, Some(6)), 5, true), Some(Verdict::Pass));
        // At once: what failed does not get better.
        let refused = verdict(&now(0, Some(3)), 5, true);
        assert!(matches!(refused, Some(Verdict::Refuse(words)) if words.ends_with("x: evicted")));
    }
}
