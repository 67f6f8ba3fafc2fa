//! When a document is posted again.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, StatusCode};

use crate::transport::{Delays, http_head::is_passing, retry_after};

/// How patiently documents are posted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// Number of attempts in all.
    pub(super) tries: u32,
    /// From the first try on; no further one begins later.
    pub(super) within: Duration,
    /// The waits, unless the receiver asks for more.
    pub(super) delays: Delays,
    /// For the head of one try's answer.
    pub(super) deadline: Duration,
}

impl Default for Patience {
    /// Some three minutes, or ten if the receiver asks for it.
    fn default() -> Self {
        Self {
            tries: 8,
            within: Duration::from_secs(600),
            delays: Delays::doubling(Duration::from_secs(1), Duration::from_secs(60)),
            deadline: Duration::from_secs(30),
        }
    }
}

/// How a try went.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The receiver has it.
    Taken,
    /// It may take it later.
    Later {
        reason: String,
        /// How long it wants to be left alone.
        asked: Option<Duration>,
    },
    /// It will not take it.
    Refused(String),
}

impl Answer {
    /// What a response means. Redirections are not followed: where documents go is the user's decision.
    pub(super) fn of(status: StatusCode, headers: &HeaderMap, now: SystemTime) -> Self {
        if status.is_success() {
            return Self::Taken;
        }
        let reason = format!("the receiver answered {status}");
        if !is_passing(status) {
            return Self::Refused(reason);
        }
        Self::Later {
            reason,
            asked: retry_after(headers, now),
        }
    }
}

impl Patience {
    /// How long to wait before the next try, after `tries` failed ones that took `elapsed`; `None` to give up.
    /// `chance` is a number from 0 to 1: waits are spread, so that many daemons do not come back at once.
    pub(super) fn wait(
        &self,
        tries: u32,
        elapsed: Duration,
        asked: Option<Duration>,
        chance: f64,
    ) -> Option<Duration> {
        if tries >= self.tries {
            return None;
        }
        // Never earlier than asked for, and not all at the same moment after that either.
        let wait = match asked {
            Some(asked) => asked.saturating_add(self.delays.first.mul_f64(chance)),
            None => self.delays.after(tries.saturating_sub(1), chance),
        };
        (elapsed.saturating_add(wait) <= self.within).then_some(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, retry_after: Option<&str>) -> Answer {
        let mut headers = HeaderMap::new();
        if let Some(text) = retry_after {
            headers.insert("retry-after", text.parse().unwrap());
        }
        let now = httpdate::parse_http_date("Fri, 31 Dec 1999 23:59:30 GMT").unwrap();
        Answer::of(StatusCode::from_u16(status).unwrap(), &headers, now)
    }

    #[test]
    fn only_what_may_pass_is_tried_again() {
        for status in [200, 201, 202, 204] {
            assert_eq!(answer(status, None), Answer::Taken, "{status}");
        }
        for status in [301, 307, 400, 401, 403, 404, 410, 413] {
            assert!(matches!(answer(status, None), Answer::Refused(_)), "{status}");
        }
        for status in [408, 429, 500, 502, 503, 504] {
            assert!(
                matches!(answer(status, None), Answer::Later { asked: None, .. }),
                "{status}"
            );
        }
    }

    #[test]
    fn a_receiver_may_say_for_how_long() {
        for (text, seconds) in [
            ("7", Some(7)),
            (" 0 ", Some(0)),
            ("Fri, 31 Dec 1999 23:59:59 GMT", Some(29)),
            ("Thu, 30 Dec 1999 23:59:59 GMT", Some(0)),
            ("soon", None),
            ("-1", None),
        ] {
            let Answer::Later { asked, .. } = answer(429, Some(text)) else {
                panic!("not again")
            };
            assert_eq!(asked, seconds.map(Duration::from_secs), "{text}");
        }
    }

    #[test]
    fn waits_grow_are_spread_and_end() {
        let patience = Patience::default();
        let wait = |tries, chance| patience.wait(tries, Duration::ZERO, None, chance);
        let seconds = |n: f64| Some(Duration::from_secs_f64(n));
        assert_eq!(wait(1, 1.0), seconds(1.0));
        assert_eq!(wait(1, 0.0), seconds(0.5));
        assert_eq!(wait(4, 1.0), seconds(8.0));
        assert_eq!(wait(7, 1.0), seconds(60.0));
        assert_eq!(wait(8, 1.0), None);
        // What is asked for counts, as long as there is time for it.
        let asked = |after, elapsed| {
            patience.wait(
                1,
                Duration::from_secs(elapsed),
                Some(Duration::from_secs(after)),
                0.5,
            )
        };
        assert_eq!(asked(100, 0), seconds(100.5));
        assert_eq!(asked(100, 550), None);
        assert_eq!(asked(u64::MAX, 0), None);
    }
}
