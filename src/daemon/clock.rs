//! Whether the wall clock can be believed when it says that something is old.
//!
//! A clock may be set, jump to 2038 and back, or begin in 1970. What was acknowledged is not to be lost by that, so
//! nothing is deleted for its age on the day after a leap. Leaps are noticed against a clock that cannot be set and runs
//! through suspends; those between two processes against the time at which something was used last.
//!
//! One file with a time in the future, from a restored backup or from a clock that was ahead once, is no leap of the
//! clock that goes now. But a clock that is behind looks the same; with it nothing seems older than it is, so only what
//! is forgotten for being of the future has to wait.

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

/// What may be forgotten for its age.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Trust {
    /// Nothing.
    Nothing,
    /// What is old.
    Old,
    /// What is old, and what is of a time to come.
    All,
}

/// The wall clock, watched.
#[derive(Debug, Default)]
pub(super) struct Clock {
    last: Option<Moment>,
    /// Until when, in time since the start of the machine, ages are not believed.
    doubted_until: Option<Duration>,
    /// The same for times in the future.
    future_until: Option<Duration>,
}

impl Clock {
    /// What can be believed now. `uses` tells when things were used, as far as is known; it is asked at the first look.
    pub(super) fn trust(&mut self, now: Moment, uses: impl FnOnce() -> Vec<SystemTime>) -> Trust {
        let (expected, slack) = match self.last {
            Some(last) => (last.wall + now.up.saturating_sub(last.up), LEAP),
            None => (self.expected_first(now, &uses()), PAUSE),
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
        let is_over = |until: Option<Duration>| until.is_none_or(|until| now.up >= until);
        match (is_over(self.doubted_until), is_over(self.future_until)) {
            (false, _) => Trust::Nothing,
            (true, false) => Trust::Old,
            (true, true) => Trust::All,
        }
    }

    /// The time that was used last, leaving out such as cannot be; now, if nothing was used ever.
    fn expected_first(&mut self, now: Moment, uses: &[SystemTime]) -> SystemTime {
        let is_ahead = |at: &SystemTime| at.duration_since(now.wall).is_ok_and(|ahead| ahead > PAUSE);
        let newest = uses.iter().max().copied();
        let newest_sane = uses.iter().filter(|at| !is_ahead(at)).max().copied();
        if newest_sane.is_some() && newest != newest_sane {
            tracing::info!("there are times in the future; what has them is kept for a day at least");
            self.future_until = Some(now.up + TRIAL);
        }
        newest_sane.or(newest).unwrap_or(now.wall)
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

    fn trust(clock: &mut Clock, now: Moment) -> Trust {
        clock.trust(now, Vec::new)
    }

    /// At a process's first look.
    fn first(now: Moment, uses: &[u32]) -> Trust {
        Clock::default().trust(now, || uses.iter().map(|hours| at(*hours, 0).wall).collect())
    }

    #[test]
    fn a_clock_that_goes_on_is_believed() {
        let mut clock = Clock::default();
        for hour in 0..100 {
            assert_eq!(trust(&mut clock, at(1000 + hour, 1 + hour)), Trust::All);
        }
        let slept = trust(&mut clock, at(2000, 1001));
        assert_eq!(slept, Trust::All, "a machine that slept");
    }

    #[test]
    fn for_a_day_after_a_leap_it_is_not() {
        for leap in [at(300_000, 101), at(0, 101)] {
            let mut clock = Clock::default();
            assert_eq!(trust(&mut clock, at(1000, 100)), Trust::All);
            assert_eq!(trust(&mut clock, leap), Trust::Nothing);
            let back = trust(&mut clock, at(1002, 102));
            assert_eq!(back, Trust::Nothing, "back is a leap as well");
            assert_eq!(trust(&mut clock, at(1025, 125)), Trust::Nothing);
            assert_eq!(trust(&mut clock, at(1026, 126)), Trust::All);
        }
    }

    #[test]
    fn a_leap_between_two_processes_is_noticed_by_what_was_used_last() {
        assert_eq!(first(at(1010, 1), &[1000]), Trust::All);
        assert_eq!(first(at(300_000, 1), &[900, 1000]), Trust::Nothing);
        assert_eq!(first(at(0, 1), &[1000]), Trust::Nothing);
        let mut clock = Clock::default();
        let used = || vec![at(1000, 0).wall];
        assert_eq!(clock.trust(at(300_000, 1), used), Trust::Nothing);
        assert_eq!(clock.trust(at(300_001, 2), used), Trust::Nothing);
        assert_eq!(clock.trust(at(300_024, 25), used), Trust::All, "it stays so");
    }

    #[test]
    fn a_time_in_the_future_is_no_leap_where_others_go_with_the_clock() {
        assert_eq!(first(at(1010, 1), &[900, 1000, 300_000]), Trust::Old);
        assert_eq!(first(at(1010, 1), &[1000, 1030]), Trust::All, "less than a day");
        assert_eq!(
            first(at(1010, 1), &[100, 300_000]),
            Trust::Nothing,
            "it has been long"
        );
        let mut clock = Clock::default();
        let uses = || vec![at(1000, 0).wall, at(300_000, 0).wall];
        assert_eq!(clock.trust(at(1010, 1), uses), Trust::Old);
        assert_eq!(clock.trust(at(1033, 24), uses), Trust::Old);
        assert_eq!(clock.trust(at(1034, 25), uses), Trust::All);
    }
}
