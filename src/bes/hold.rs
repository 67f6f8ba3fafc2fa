//! Whether and how long a client waits for its last acknowledgement, and what it is then told.

use std::time::Duration;

use super::sink::Settlement;

/// What holds an acknowledgement back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum HoldMode {
    /// Nothing: everything is acknowledged at once and downloaded behind.
    None,
    /// The stream's last acknowledgement waits until the invocation is settled. Bazel's command then returns with
    /// its outputs on disk.
    #[default]
    Invocation,
    /// As [`Self::Invocation`]; and an event that reports a completion goes to the upstream service only once the
    /// required outputs of all events up to it are settled ([`super::Progress`]).
    Target,
}

/// The rules for holding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HoldPolicy {
    /// What holds.
    pub mode: HoldMode,
    /// The longest wait, counted from the stream's last event.
    pub timeout: Duration,
    /// Whether required outputs that are missing after the wait fail the stream, and so the build tool's command. Has
    /// no effect where nothing holds.
    pub strict: bool,
}

impl Default for HoldPolicy {
    fn default() -> Self {
        Self {
            mode: HoldMode::default(),
            timeout: Duration::from_secs(600),
            strict: false,
        }
    }
}

/// How a wait ended.
#[derive(Debug)]
pub(super) enum Waited<'a> {
    /// The engine answered.
    Settled(&'a Settlement),
    /// The deadline passed.
    TimedOut,
    /// The engine will not answer: its task died.
    Unanswered,
}

/// What the client is told.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Release {
    /// The last acknowledgement, then OK.
    Ack,
    /// `FAILED_PRECONDITION` with these words: Bazel fails the command and does not retry (the uploader retries
    /// everything except INVALID_ARGUMENT, PERMISSION_DENIED and FAILED_PRECONDITION).
    Fail(String),
}

impl HoldPolicy {
    /// The pure decision at the end of a wait.
    pub(super) fn release(&self, waited: &Waited<'_>) -> Release {
        if !self.strict {
            return Release::Ack;
        }
        match waited {
            Waited::Settled(settlement) if settlement.failed == 0 => Release::Ack,
            Waited::Settled(settlement) => {
                let mut text = match settlement.failed {
                    1 => "outhaul: 1 required output could not be downloaded".to_owned(),
                    n => format!("outhaul: {n} required outputs could not be downloaded"),
                };
                for message in settlement.messages.iter().take(MAX_MESSAGES) {
                    text.push_str("; ");
                    text.extend(message.chars().take(MAX_MESSAGE_CHARS));
                }
                Release::Fail(text)
            }
            Waited::TimedOut => Release::Fail(format!(
                "outhaul: required outputs were not downloaded within --hold-timeout={}s",
                self.timeout.as_secs_f64()
            )),
            Waited::Unanswered => {
                Release::Fail("outhaul: internal error while downloading required outputs".to_owned())
            }
        }
    }
}

/// The status message travels in an HTTP/2 header, whose size clients limit (8 KiB in grpc-java).
const MAX_MESSAGES: usize = 5;
const MAX_MESSAGE_CHARS: usize = 200;

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(n: u64) -> Settlement {
        Settlement {
            failed: n,
            messages: vec!["a: evicted".to_owned(); n as usize],
            superseded: false,
        }
    }

    #[test]
    fn without_strict_nothing_fails_the_build() {
        let policy = HoldPolicy::default();
        for waited in [Waited::Settled(&failed(3)), Waited::TimedOut, Waited::Unanswered] {
            assert_eq!(policy.release(&waited), Release::Ack);
        }
    }

    #[test]
    fn strict_fails_for_missing_outputs_with_their_names() {
        let policy = HoldPolicy {
            strict: true,
            ..HoldPolicy::default()
        };
        assert_eq!(policy.release(&Waited::Settled(&failed(0))), Release::Ack);
        let Release::Fail(text) = policy.release(&Waited::Settled(&failed(2))) else {
            panic!("acknowledged")
        };
        assert!(
            text.contains("2 required outputs") && text.contains("a: evicted"),
            "{text}"
        );
        assert!(matches!(policy.release(&Waited::TimedOut), Release::Fail(t) if t.contains("600s")));
        assert!(matches!(policy.release(&Waited::Unanswered), Release::Fail(_)));
    }

    #[test]
    fn a_thousand_failures_still_fit_into_a_status() {
        let policy = HoldPolicy {
            strict: true,
            ..HoldPolicy::default()
        };
        let settlement = Settlement {
            failed: 1000,
            messages: vec!["é".repeat(5000); 1000],
            superseded: false,
        };
        let Release::Fail(text) = policy.release(&Waited::Settled(&settlement)) else {
            panic!("acknowledged")
        };
        // Non-ASCII is percent-encoded in `grpc-message`: three bytes for each.
        assert!(text.len() * 3 < 8192, "{}", text.len());
    }
}
