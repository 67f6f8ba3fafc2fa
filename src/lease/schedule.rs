//! Which build's outputs are asked for when. No effects; the clock is the caller's.

use std::{collections::HashMap, time::Duration};

use rand::random_range;
use tokio::time::Instant;

use crate::record::{InvocationRow, Record, RootId};

/// How leases are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseOptions {
    /// From one question about an output to the next, at most: less than the cache's own patience.
    pub interval: Duration,
    /// How long after its end a build's outputs are asked for.
    pub age: Duration,
    /// Digests in a second.
    pub rate: u32,
}

/// How soon after the start the first request is sent: it is unknown when the last one was.
const FIRST: Duration = Duration::from_secs(10);
/// How soon it is tried again when the cache could not be asked.
const AGAIN: Duration = Duration::from_secs(60);
/// Something that is never due.
const FAR: Duration = Duration::from_secs(86_400);

/// The newest build of an output root.
#[derive(Debug, Clone)]
pub(super) struct Build {
    pub(super) root: RootId,
    pub(super) path: String,
    pub(super) row: InvocationRow,
}

/// The newest build of each output root. Blocks on the record.
pub(super) fn newest_builds(record: &Record) -> Vec<Build> {
    record
        .roots()
        .into_iter()
        .filter_map(|(root, known)| {
            Some(Build {
                root,
                path: known.path,
                row: record.newest_invocation(root)?,
            })
        })
        .collect()
}

/// When each root's turn is.
pub(super) struct Schedule {
    options: LeaseOptions,
    turns: HashMap<RootId, Turn>,
}

struct Turn {
    invocation: String,
    due: Instant,
    /// When its leases end. By the monotonic clock, so that the wall clock may jump.
    end: Instant,
}

impl Schedule {
    pub(super) fn new(options: LeaseOptions) -> Self {
        Self {
            options,
            turns: HashMap::new(),
        }
    }

    /// Learns which builds there are.
    pub(super) fn see(&mut self, builds: &[Build], now_ms: i64, now: Instant) {
        let options = self.options;
        self.turns
            .retain(|root, _| builds.iter().any(|build| build.root == *root));
        for build in builds {
            let row = &build.row;
            let turn = self.turns.entry(build.root).or_insert_with(|| {
                let most = FIRST.min(options.interval / 10);
                Turn {
                    invocation: String::new(),
                    due: now + part(most, 0.0),
                    end: now,
                }
            });
            if turn.invocation != row.invocation_id {
                turn.invocation.clone_from(&row.invocation_id);
                // A build that seems to come from the future is as young as can be.
                let age = now_ms.saturating_sub(row.started_ms.max(row.settled_ms)).max(0);
                let age = Duration::from_millis(u64::try_from(age).unwrap_or(0));
                turn.end = now + options.age.saturating_sub(age).min(FAR * 365);
            } else if !row.state.is_over() {
                turn.end = now + options.age.min(FAR * 365);
            }
        }
    }

    /// The build whose turn it is, if it is anybody's.
    pub(super) fn next_due<'b>(&self, builds: &'b [Build], now: Instant) -> Option<&'b Build> {
        let is_due = |build: &&Build| {
            let turn = self.turns.get(&build.root);
            turn.is_some_and(|turn| turn.due <= now && turn.end > now)
        };
        builds
            .iter()
            .filter(is_due)
            .min_by_key(|build| self.turns.get(&build.root).map(|turn| turn.due))
    }

    /// A build's outputs were asked for, or could not be.
    pub(super) fn passed(&mut self, build: &Build, is_ok: bool, begun: Instant, now: Instant) {
        let interval = self.options.interval;
        let Some(turn) = self.turns.get_mut(&build.root) else {
            return;
        };
        turn.due = if is_ok {
            // Never later than promised, and not in step with everybody else who started with us.
            begun + part(interval, 0.85)
        } else {
            now + part(AGAIN.min(interval), 0.5)
        };
        if is_ok && turn.due < now {
            tracing::warn!(
                invocation = build.row.invocation_id,
                "renewing all leases took {:?}, which is longer than --lease-renewal; see --lease-rate",
                now - begun
            );
            // Others have a turn, and the cache some rest.
            turn.due = now + part(AGAIN.min(interval), 0.5);
        }
    }

    /// When the next turn is.
    pub(super) fn next(&self) -> Instant {
        let now = Instant::now();
        self.turns
            .values()
            .filter(|turn| turn.end > now)
            .map(|turn| turn.due)
            .min()
            .unwrap_or(now + FAR)
    }
}

/// Between that part of a duration and all of it.
fn part(of: Duration, least: f64) -> Duration {
    of.mul_f64(random_range(least..=1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::InvocationState;

    const HOUR: Duration = Duration::from_secs(3600);
    const HOUR_MS: i64 = 3_600_000;
    const NOW_MS: i64 = 1_000 * HOUR_MS;

    fn schedule() -> Schedule {
        Schedule::new(LeaseOptions {
            interval: HOUR,
            age: 24 * HOUR,
            rate: 1,
        })
    }

    fn build(id: &str, settled_ms: i64, state: InvocationState) -> Build {
        let dir = tempfile::tempdir().unwrap();
        let (record, _) = Record::open(dir.path()).unwrap();
        Build {
            root: record.root("/r", 1, 2),
            path: "/r".to_owned(),
            row: InvocationRow {
                invocation_id: id.to_owned(),
                started_ms: settled_ms - 1,
                settled_ms,
                state,
                ..InvocationRow::default()
            },
        }
    }

    fn is_due(schedule: &Schedule, build: &Build, at: Instant) -> bool {
        schedule.next_due(std::slice::from_ref(build), at).is_some()
    }

    #[test]
    fn a_build_is_asked_for_soon_and_then_in_time() {
        let (mut schedule, now) = (schedule(), Instant::now());
        let build = build("a", NOW_MS, InvocationState::Settled);
        schedule.see(std::slice::from_ref(&build), NOW_MS, now);
        let first = now + FIRST;
        assert!(is_due(&schedule, &build, first));
        schedule.passed(&build, true, first, first);
        assert!(!is_due(&schedule, &build, first + HOUR.mul_f64(0.8)));
        assert!(is_due(&schedule, &build, first + HOUR));
        schedule.passed(&build, false, first + HOUR, first + HOUR);
        assert!(!is_due(&schedule, &build, first + HOUR));
        assert!(
            is_due(&schedule, &build, first + HOUR + AGAIN),
            "sooner after a failure"
        );
        schedule.passed(&build, true, first, first + 2 * HOUR);
        assert!(!is_due(&schedule, &build, first + 2 * HOUR), "a rest");
        assert!(
            is_due(&schedule, &build, first + 2 * HOUR + AGAIN),
            "but soon when one look takes longer"
        );
    }

    #[test]
    fn leases_end_with_age_and_go_on_with_a_newer_build() {
        let (mut schedule, now) = (schedule(), Instant::now());
        let mut old = build("a", NOW_MS - 23 * HOUR_MS, InvocationState::Settled);
        schedule.see(std::slice::from_ref(&old), NOW_MS, now);
        assert!(is_due(&schedule, &old, now + HOUR.mul_f64(0.9)));
        assert!(!is_due(&schedule, &old, now + HOUR));
        old.row.invocation_id = "b".to_owned();
        old.row.settled_ms = 0;
        old.row.started_ms = NOW_MS;
        old.row.state = InvocationState::Running;
        for hours in [0, 23, 46] {
            schedule.see(std::slice::from_ref(&old), NOW_MS, now + hours * HOUR);
        }
        assert!(is_due(&schedule, &old, now + 60 * HOUR), "it runs, however long");
        assert!(!is_due(&schedule, &old, now + 70 * HOUR));
    }

    #[test]
    fn a_clock_that_jumps_ends_no_lease_and_makes_none_last() {
        let (mut schedule, now) = (schedule(), Instant::now());
        let future = build("a", NOW_MS + 9000 * HOUR_MS, InvocationState::Settled);
        schedule.see(std::slice::from_ref(&future), NOW_MS, now);
        assert!(is_due(&schedule, &future, now + HOUR));
        schedule.see(std::slice::from_ref(&future), i64::MAX, now + HOUR);
        assert!(is_due(&schedule, &future, now + HOUR), "it was seen before");
        schedule.see(std::slice::from_ref(&future), i64::MIN, now + HOUR);
        assert!(!is_due(&schedule, &future, now + 24 * HOUR));
    }
}
