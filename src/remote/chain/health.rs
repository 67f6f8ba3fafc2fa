//! Whether a store of a chain is asked at present.

use std::time::Duration;

use tokio::time::Instant;

use crate::transport::{RemoteError, RemoteErrorKind};

/// Requests that fail one after the other before a store is passed over.
const FAILURES: u32 = 3;
/// For how long it is passed over the first time.
const FIRST_DELAY: Duration = Duration::from_secs(30);
/// The longest time.
const LONGEST_DELAY: Duration = Duration::from_secs(5 * 60);

/// What a store's last answers say of it.
#[derive(Debug, Default)]
pub(super) struct Health {
    /// Requests that failed since the last one that did not.
    failures: u32,
    /// Whether it has ever answered: one that has lets us in, and may refuse us a blob.
    has_answered: bool,
    state: State,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Asked,
    /// Until then. One request is let through after that, and decides.
    PassedOver {
        until: Instant,
        delay: Duration,
        reason: RemoteError,
    },
}

/// A request that may be made. Given back with what came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ticket {
    /// As any.
    Request,
    /// It decides whether the store is asked again.
    Probe,
    /// Some stores answer it without asking anybody: only its failure says anything.
    Look,
}

/// What has changed, for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// It is passed over for so long.
    PassedOver(Duration),
    /// It is asked again.
    Back,
}

impl Health {
    /// Whether a request may be made now.
    ///
    /// # Errors
    /// Why the store is passed over.
    pub(super) fn ask(&mut self, now: Instant) -> Result<Ticket, RemoteError> {
        match &mut self.state {
            State::Asked => Ok(Ticket::Request),
            State::PassedOver { until, delay, .. } if now >= *until => {
                // If nothing is ever heard of this request, there will be another one.
                *until = now + *delay;
                Ok(Ticket::Probe)
            }
            State::PassedOver { reason, .. } => Err(not_asked(reason)),
        }
    }

    /// Whether a request may be made now that is not a probe: it leaves that to another one.
    ///
    /// # Errors
    /// Why the store is passed over.
    pub(super) fn look(&self, now: Instant) -> Result<Ticket, RemoteError> {
        match &self.state {
            State::PassedOver { until, reason, .. } if now < *until => Err(not_asked(reason)),
            State::Asked | State::PassedOver { .. } => Ok(Ticket::Look),
        }
    }

    /// While the store is passed over: how much longer, and why.
    pub(super) fn passed_over(&self, now: Instant) -> Option<(Duration, String)> {
        match &self.state {
            State::Asked => None,
            State::PassedOver { until, reason, .. } => {
                Some((until.saturating_duration_since(now), reason.to_string()))
            }
        }
    }

    /// Takes in what came of a request; `None` when the store answered it, whatever it said of a blob.
    pub(super) fn heard(
        &mut self,
        ticket: Ticket,
        now: Instant,
        error: Option<&RemoteError>,
    ) -> Option<News> {
        let error = error.filter(|error| !is_answer(error));
        if error.is_none() && ticket == Ticket::Look {
            return None;
        }
        let Some(error) = error else {
            self.failures = 0;
            self.has_answered = true;
            let was_passed_over = matches!(self.state, State::PassedOver { .. });
            self.state = State::Asked;
            return was_passed_over.then_some(News::Back);
        };
        let keeps_us_out = is_closed(error);
        let at_once = keeps_us_out && (!self.has_answered || error.kind == RemoteErrorKind::Unauthenticated);
        self.failures = self.failures.saturating_add(1);
        let (delay, is_known) = match &self.state {
            State::Asked if at_once || self.failures >= FAILURES => (FIRST_DELAY, false),
            State::PassedOver { until, delay, reason }
                if ticket == Ticket::Probe || ticket == Ticket::Look && now >= *until =>
            {
                ((*delay * 2).min(LONGEST_DELAY), keeps_us_out && is_closed(reason))
            }
            // Requests that were under way when it was passed over say nothing new.
            _ => return None,
        };
        self.state = State::PassedOver {
            until: now + delay,
            delay,
            reason: error.clone(),
        };
        // That changes when somebody lets us in, which may be never: said once.
        (!is_known).then_some(News::PassedOver(delay))
    }
}

/// What is said instead of asking.
fn not_asked(reason: &RemoteError) -> RemoteError {
    let message = if is_closed(reason) {
        format!("not asked again yet: {}", reason.message)
    } else {
        format!("not asked after {FAILURES} failures: {}", reason.message)
    };
    RemoteError {
        message,
        retry_after: None,
        ..reason.clone()
    }
}

/// Whether the store does not let us in: asking again at once is of no use, but a token may be renewed, a right given, a
/// certificate replaced or a clock set.
const fn is_closed(error: &RemoteError) -> bool {
    matches!(
        error.kind,
        RemoteErrorKind::Denied | RemoteErrorKind::Unauthenticated | RemoteErrorKind::Config
    )
}

/// Whether the store is there and answers us, if only to say no.
const fn is_answer(error: &RemoteError) -> bool {
    use RemoteErrorKind as Kind;
    match error.kind {
        Kind::NotFound | Kind::Rejected | Kind::Protocol | Kind::Sink => true,
        Kind::Unavailable | Kind::Timeout | Kind::Denied | Kind::Unauthenticated | Kind::Config => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(kind: RemoteErrorKind) -> RemoteError {
        RemoteError::new(kind, "reading", "gone")
    }

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn three_failures_in_a_row_pass_a_store_over_for_longer_and_longer_with_one_probe_each() {
        let start = Instant::now();
        let mut health = Health::default();
        let (down, absent) = (
            error(RemoteErrorKind::Unavailable),
            error(RemoteErrorKind::NotFound),
        );
        // An answer in between counts from the start again, and so does a timeout like any failure.
        let ticket = health.ask(start).unwrap();
        for reported in [
            Some(&down),
            Some(&down),
            Some(&absent),
            Some(&error(RemoteErrorKind::Timeout)),
            Some(&down),
        ] {
            assert_eq!(health.heard(ticket, start, reported), None);
        }
        assert_eq!(
            health.heard(ticket, start, Some(&down)),
            Some(News::PassedOver(seconds(30)))
        );
        let (left, why) = health.passed_over(start + seconds(10)).unwrap();
        assert!(left == seconds(20) && why.contains("gone"), "{why}");
        let mut now = start;
        for (waits, next) in [(30, 60), (60, 120), (120, 240), (240, 300), (300, 300)] {
            // Those that were under way are no probes.
            assert_eq!(health.heard(ticket, now, Some(&down)), None);
            assert!(health.ask(now + seconds(waits - 1)).is_err());
            now += seconds(waits);
            let probe = health.ask(now).unwrap();
            assert!(health.ask(now).unwrap_err().message.contains("gone"));
            assert_eq!(
                health.heard(probe, now, Some(&down)),
                Some(News::PassedOver(seconds(next)))
            );
        }
        // A probe of which nothing is heard is followed by another.
        now += seconds(300);
        health.ask(now).unwrap();
        assert!(health.ask(now + seconds(299)).is_err());
        let probe = health.ask(now + seconds(300)).unwrap();
        assert_eq!(health.heard(probe, now, None), Some(News::Back));
        for reported in [&down, &down] {
            let ticket = health.ask(now).unwrap();
            assert_eq!(health.heard(ticket, now, Some(reported)), None);
        }
    }

    #[test]
    fn a_store_that_lets_us_in_may_refuse_a_blob() {
        use RemoteErrorKind as Kind;
        for (kind, at_once) in [
            (Kind::Denied, false),
            (Kind::Config, false),
            (Kind::Unauthenticated, true),
        ] {
            let now = Instant::now();
            let mut health = Health::default();
            let ticket = health.ask(now).unwrap();
            let passed_over = Some(News::PassedOver(seconds(30)));
            assert_eq!(health.heard(ticket, now, None), None);
            let news = health.heard(ticket, now, Some(&error(kind)));
            assert_eq!(news, passed_over.filter(|_| at_once), "{kind:?}");
            if at_once {
                continue;
            }
            for reported in [
                Some(&error(kind)),
                Some(&error(Kind::NotFound)),
                Some(&error(kind)),
                Some(&error(kind)),
            ] {
                assert_eq!(health.heard(ticket, now, reported), None, "{kind:?}");
            }
            assert_eq!(
                health.heard(ticket, now, Some(&error(kind))),
                passed_over,
                "{kind:?}"
            );
        }
    }

    #[test]
    fn a_store_that_does_not_let_us_in_is_passed_over_at_once_and_that_is_said_once() {
        use RemoteErrorKind as Kind;
        for kind in [Kind::Denied, Kind::Unauthenticated, Kind::Config] {
            let mut now = Instant::now();
            let mut health = Health::default();
            let ticket = health.ask(now).unwrap();
            let mut news = Some(News::PassedOver(seconds(30)));
            let mut probe = ticket;
            for waits in [30, 60, 120, 240, 300, 300] {
                assert_eq!(health.heard(probe, now, Some(&error(kind))), news.take());
                assert_eq!(health.heard(ticket, now, Some(&error(kind))), None);
                let reported = health.ask(now + seconds(waits - 1)).unwrap_err();
                assert!(
                    reported.kind == kind && reported.message.contains("gone"),
                    "{reported}"
                );
                now += seconds(waits);
                probe = health.ask(now).unwrap();
            }
            assert_eq!(health.heard(probe, now, None), Some(News::Back));
        }
    }

    #[test]
    fn a_look_says_something_only_when_it_fails_and_leaves_the_probe_to_another() {
        let now = Instant::now();
        let down = error(RemoteErrorKind::Unavailable);
        let mut health = Health::default();
        let look = health.look(now).unwrap();
        for reported in [Some(&down), None, Some(&down), None] {
            assert_eq!(health.heard(look, now, reported), None);
        }
        assert_eq!(
            health.heard(look, now, Some(&down)),
            Some(News::PassedOver(seconds(30)))
        );
        assert!(health.look(now + seconds(29)).is_err());
        let now = now + seconds(30);
        assert_eq!(health.heard(look, now, None), None, "it is not back");
        health.look(now).unwrap();
        assert_eq!(health.ask(now).unwrap(), Ticket::Probe);
        assert_eq!(
            health.heard(look, now, Some(&down)),
            None,
            "that is up to the probe"
        );
        assert!(health.look(now).is_err());
        // Where nothing probes, its failure counts.
        let now = now + seconds(30);
        assert_eq!(
            health.heard(look, now, Some(&down)),
            Some(News::PassedOver(seconds(60)))
        );
        assert!(health.ask(now + seconds(59)).is_err());
    }
}
