//! How long to wait after a failure.

use std::time::Duration;

use tonic::Code;

/// What Bazel's uploader uses too.
const FACTOR: f64 = 1.6;

/// The waits between tries.
#[derive(Debug, Clone, Copy)]
pub(super) struct RetryDelays {
    first: Duration,
    longest: Duration,
}

impl RetryDelays {
    pub(super) const fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest }
    }

    /// The wait after this many previous failures, shortened by up to a fifth by chance (`jitter` is 0 to 1), so that
    /// streams that broke together do not come back together.
    pub(super) fn after(&self, failures: u32, code: Code, jitter: f64) -> Duration {
        // 1.6^40 is more than four years of seconds already.
        let factor = FACTOR.powi(failures.min(40) as i32);
        let wait = if is_final(code) {
            self.longest
        } else {
            let grown = self.first.as_secs_f64() * factor;
            Duration::from_secs_f64(grown.min(self.longest.as_secs_f64()))
        };
        wait.mul_f64(1.0 - 0.2 * jitter.clamp(0.0, 1.0))
    }
}

/// Whether the same request will hardly fare better the next time.
pub(super) const fn is_final(code: Code) -> bool {
    matches!(
        code,
        Code::InvalidArgument
            | Code::PermissionDenied
            | Code::FailedPrecondition
            | Code::Unimplemented
            | Code::NotFound
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_longest_and_what_is_final_waits_longest_at_once() {
        let delays = RetryDelays::new(Duration::from_secs(1), Duration::from_secs(60));
        let wait = |failures, code| delays.after(failures, code, 0.0).as_millis();
        assert_eq!(wait(0, Code::Unavailable), 1000);
        assert_eq!(wait(1, Code::Unavailable), 1600);
        assert_eq!(wait(2, Code::Unauthenticated), 2560);
        assert_eq!(wait(9, Code::Unavailable), 60_000);
        assert_eq!(wait(u32::MAX, Code::Internal), 60_000);
        assert_eq!(wait(0, Code::PermissionDenied), 60_000);
        assert_eq!(delays.after(0, Code::Unavailable, 1.0).as_millis(), 800);
    }
}
