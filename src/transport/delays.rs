//! Waits between tries.

use std::time::Duration;

/// Waits that grow from failure to failure, up to the longest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Delays {
    pub(crate) first: Duration,
    pub(crate) longest: Duration,
    /// How many times as long each further one is.
    pub(crate) factor: f64,
    /// The part of a wait that is left to chance, so that clients whose server went away together do not come back
    /// together.
    pub(crate) spread: f64,
}

impl Delays {
    /// Each further one is twice as long, and half of it is left to chance.
    pub(crate) const fn doubling(first: Duration, longest: Duration) -> Self {
        Self {
            first,
            longest,
            factor: 2.0,
            spread: 0.5,
        }
    }

    /// The wait after this many previous failures. `chance` is a number from 0 to 1: the higher, the longer.
    pub(crate) fn after(&self, failures: u32, chance: f64) -> Duration {
        // 1.6^80 is more than a billion years of seconds already.
        let grown = self.first.as_secs_f64() * self.factor.powi(failures.min(80) as i32);
        let wait = grown.min(self.longest.as_secs_f64());
        Duration::from_secs_f64(wait * (1.0 - self.spread * (1.0 - chance.clamp(0.0, 1.0))))
    }
}
