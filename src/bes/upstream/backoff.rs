//! How long to wait after a failure.

use std::time::Duration;

use tonic::Code;

use crate::transport::Delays;

/// The waits between tries.
#[derive(Debug, Clone, Copy)]
pub(super) struct RetryDelays(Delays);

impl RetryDelays {
    pub(super) const fn new(first: Duration, longest: Duration) -> Self {
        Self(Delays {
            first,
            longest,
            // As for Bazel's uploader.
            factor: 1.6,
            spread: 0.2,
        })
    }

    /// The wait after this many previous failures. What is final waits longest at once.
    pub(super) fn after(&self, failures: u32, code: Code, chance: f64) -> Duration {
        let failures = if is_final(code) { u32::MAX } else { failures };
        self.0.after(failures, chance)
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
        let wait = |failures, code| delays.after(failures, code, 1.0).as_millis();
        assert_eq!(wait(0, Code::Unavailable), 1000);
        assert_eq!(wait(1, Code::Unavailable), 1600);
        assert_eq!(wait(2, Code::Unauthenticated), 2560);
        assert_eq!(wait(9, Code::Unavailable), 60_000);
        assert_eq!(wait(u32::MAX, Code::Internal), 60_000);
        assert_eq!(wait(0, Code::PermissionDenied), 60_000);
        assert_eq!(delays.after(0, Code::Unavailable, 0.0).as_millis(), 800);
    }
}
