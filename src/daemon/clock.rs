//! Whether the wall clock can be believed when it says that something is old.
//!
//! A clock may be set, jump to 2038 and back, or begin in 1970. What was acknowledged is not to be lost by that, so
//! nothing is deleted for its age on the day after a leap. Leaps are noticed against a clock that cannot be set and runs
//! through suspends; those between two processes against the time at which something was used last.

use std::time::{Duration, SystemTime};

use rustix::time::{ClockId, clock_gettime};

/// What counts as a leap: more than people adjust, and more than a slow machine sleeps between two looks at clocks.
const LEAP: Duration = Duration::from_secs(600);
/// How much time may lie between two processes. If it was longer, ages are believed a while later, no more.
const PAUSE: Duration = Duration::from_secs(86_400);
/// How long the clock must go on without a leap.
const TRIAL: Duration = Duration::from_secs(86_400);

/// Both clocks at one moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment {
    pub(super) wall: SystemTime,
    /// Time since the machine was started.
    pub(super) up: Duration,
}

impl Moment {
    pub(super) fn now() -> Self {
        let up = clock_gettime(ClockId::Boottime);
        Self {
            wall: SystemTime::now(),
            up: Duration::new(
                u64::try_from(up.tv_sec).unwrap_or(0),
                u32::try_from(up.tv_nsec).unwrap_or(0),
            ),
        }
    }
}

/// The wall clock, watched.
#[derive(Debug, Default)]
pub(super) struct Clock {
    last: Option<Moment>,
    /// Until when, in time since the start of the machine, ages are not believed.
    doubted_until: Option<Duration>,
}

impl Clock {
    /// Whether ages can be believed now. `last_use` is when something was used last, as far as is known; it counts at
    /// the first look.
    pub(super) fn is_trusted(&mut self, now: Moment, last_use: Option<SystemTime>) -> bool {
        let (expected, slack) = match (self.last, last_use) {
            (Some(last), _) => (last.wall + now.up.saturating_sub(last.up), LEAP),
            (None, Some(last_use)) => (last_use, PAUSE),
            (None, None) => (now.wall, LEAP),
        };
        self.last = Some(now);
        let apart = now
            .wall
            .duration_since(expected)
            .unwrap_or_else(|behind| behind.duration());
        if apart > slack {
            tracing::info!(
                "the clock has leapt, or it has been long: nothing is deleted for its age for a day"
            );
            self.doubted_until = Some(now.up + TRIAL);
        }
        self.doubted_until.is_none_or(|until| now.up >= until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn at(wall_hours: u32, up_hours: u32) -> Moment {
        Moment {
            wall: SystemTime::UNIX_EPOCH + wall_hours * HOUR,
            up: up_hours * HOUR,
        }
    }

    #[test]
    fn a_clock_that_goes_on_is_believed() {
        let mut clock = Clock::default();
        assert!(clock.is_trusted(at(1000, 1), None));
        for hour in 1..100 {
            assert!(clock.is_trusted(at(1000 + hour, 1 + hour), None));
        }
        assert!(clock.is_trusted(at(2000, 1001), None), "a machine that slept");
    }

    #[test]
    fn for_a_day_after_a_leap_it_is_not() {
        for leap in [at(300_000, 101), at(0, 101)] {
            let mut clock = Clock::default();
            assert!(clock.is_trusted(at(1000, 100), None));
            assert!(!clock.is_trusted(leap, None));
            assert!(!clock.is_trusted(at(1002, 102), None), "back is a leap as well");
            assert!(!clock.is_trusted(at(1025, 125), None));
            assert!(clock.is_trusted(at(1026, 126), None));
        }
    }

    #[test]
    fn a_leap_between_two_processes_is_noticed_by_what_was_used_last() {
        let last_use = Some(at(1000, 0).wall);
        assert!(Clock::default().is_trusted(at(1010, 1), last_use));
        let mut clock = Clock::default();
        assert!(!clock.is_trusted(at(300_000, 1), last_use));
        assert!(!clock.is_trusted(at(300_001, 2), last_use));
        assert!(clock.is_trusted(at(300_024, 25), last_use), "it stays so");
        assert!(!Clock::default().is_trusted(at(0, 1), last_use));
    }
}
