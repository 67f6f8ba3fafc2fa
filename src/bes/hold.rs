//! Whether and how long a client waits for its last acknowledgement, and what it gets then.

use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::Instant;

use crate::{bep::event::Event, builds::Settlement, units::now_ms};

/// How long a stream's client itself waits for the acknowledgement: what the build says with `--bes_timeout`. Bazel fails
/// the command with exit code 38 when that is over, however good the build was. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub(super) struct Patience(Arc<Said>);

#[derive(Debug, Default)]
struct Said {
    /// 0 for none, in milliseconds.
    timeout: AtomicU64,
    /// By how much our clock is ahead of the client's, in milliseconds, or a little more.
    ahead: OnceLock<i64>,
    /// When the command's end came: the client counts from there, and has files to upload before its last event.
    ended: OnceLock<Instant>,
}

impl Patience {
    /// Looks whether an event says it.
    pub(super) fn learn(&self, event: &Event) {
        match event {
            // The line as it was typed may be overruled by a later option.
            Event::CommandLine(line) if line.label == "canonical" => {
                if let Some(timeout) = line.bes_timeout() {
                    let milliseconds = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
                    self.0.timeout.store(milliseconds, Relaxed);
                }
            }
            Event::Started(started) if started.started_ms > 0 => {
                self.0
                    .ahead
                    .get_or_init(|| now_ms().saturating_sub(started.started_ms));
            }
            Event::Finished { ended_ms, .. } => {
                self.0.ended.get_or_init(|| {
                    // The event comes after those whose files are uploaded first.
                    let late = match (*ended_ms, self.0.ahead.get()) {
                        (0, _) | (_, None) => 0,
                        (ended, Some(ahead)) => now_ms()
                            .saturating_sub(ended)
                            .saturating_sub(*ahead)
                            .clamp(0, LATEST_MS),
                    };
                    let now = Instant::now();
                    now.checked_sub(Duration::from_millis(late.unsigned_abs()))
                        .unwrap_or(now)
                });
            }
            _ => {}
        }
    }

    /// What ends a hold for an event that came then: the policy's time, or the client's own if that is shorter. The client
    /// has counted since the command's end, and has its closing calls to make, so that it is let go a little earlier.
    pub(super) fn limit(&self, policy: &HoldPolicy, came: Instant) -> Limit {
        let hold = Limit {
            flag: HOLD_TIMEOUT,
            timeout: policy.timeout,
            after: policy.timeout,
        };
        let timeout = Duration::from_millis(self.0.timeout.load(Relaxed));
        let ended = self.0.ended.get();
        let before = ended.map_or(Duration::ZERO, |ended| came.saturating_duration_since(*ended));
        let after = timeout.saturating_sub((timeout / 3).min(LEAD) + before);
        if timeout.is_zero() || policy.timeout <= after {
            return hold;
        }
        Limit {
            flag: "the build's --bes_timeout",
            timeout,
            after,
        }
    }
}

const HOLD_TIMEOUT: &str = "--hold-timeout";

/// What ends a hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limit {
    flag: &'static str,
    timeout: Duration,
    /// When it does, counted from the stream's last event.
    pub(super) after: Duration,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}s", self.flag, self.timeout.as_secs_f64())
    }
}

/// What is left of `--bes_timeout` for the acknowledgement's way and the client's closing calls, at most: a third of it
/// where that is less.
const LEAD: Duration = Duration::from_secs(5);
/// The longest time, in milliseconds, by which the news of a command's end is taken to be late: clocks may be set meanwhile.
const LATEST_MS: i64 = 10 * 60 * 1000;

/// What holds an acknowledgement back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HoldMode {
    /// Nothing: everything is acknowledged at once and downloaded afterwards.
    None,
    /// The stream's last acknowledgement waits until the invocation is settled. Bazel's command then returns with
    /// its outputs on disk.
    #[default]
    Invocation,
    /// As [`Self::Invocation`]; and an event that reports a completion goes to the upstream service only once the
    /// required outputs of all events up to it are settled ([`crate::builds::Progress`]).
    Target,
}

/// The rules for holding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HoldPolicy {
    /// What waits for outputs.
    pub mode: HoldMode,
    /// The longest wait, counted from the stream's last event; a shorter `--bes_timeout` of the build goes first.
    pub timeout: Duration,
    /// Whether required outputs that are missing after the wait fail the stream, and so the build tool's command. Has
    /// no effect where nothing holds.
    pub strict: bool,
    /// Whether somebody waits on for outputs that are missing when a wait ends by the build's own limit.
    pub is_followed: bool,
}

impl Default for HoldPolicy {
    fn default() -> Self {
        Self {
            mode: HoldMode::default(),
            timeout: Duration::from_secs(600),
            strict: false,
            is_followed: false,
        }
    }
}

/// How a wait ended.
#[derive(Debug)]
pub(super) enum Waited<'a> {
    /// The engine answered.
    Settled(&'a Settlement),
    /// The deadline passed.
    TimedOut(Limit),
    /// Nothing is downloaded any more, on request.
    Stopped,
    /// The engine will not answer: its task died.
    Unanswered,
}

/// What the client gets.
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
            Waited::TimedOut(limit) if self.is_followed && limit.flag != HOLD_TIMEOUT => Release::Ack,
            Waited::TimedOut(limit) => Release::Fail(format!(
                "outhaul: required outputs were not downloaded within {limit}"
            )),
            Waited::Stopped => Release::Fail(
                "outhaul: downloads are paused (`outhaul pause --all`); run `outhaul resume` and build again"
                    .to_owned(),
            ),
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
    use crate::bep::event::{CommandLine, Started};

    const LIMIT: Limit = Limit {
        flag: "--hold-timeout",
        timeout: Duration::from_secs(600),
        after: Duration::from_secs(600),
    };

    fn line(label: &str, timeout: &str) -> Event {
        Event::CommandLine(CommandLine {
            label: label.to_owned(),
            options: vec![("bes_timeout".to_owned(), timeout.to_owned())],
        })
    }

    #[test]
    fn a_client_is_let_go_before_its_own_patience_ends() {
        let policy = HoldPolicy::default();
        for (label, timeout, after, shown) in [
            ("canonical", "0s", 600.0, "--hold-timeout=600s"),
            ("canonical", "20m", 600.0, "--hold-timeout=600s"),
            ("canonical", "30s", 25.0, "the build's --bes_timeout=30s"),
            ("canonical", "6", 4.0, "the build's --bes_timeout=6s"),
            ("canonical", "600ms", 0.4, "the build's --bes_timeout=0.6s"),
            ("canonical", "soon", 600.0, "--hold-timeout=600s"),
            // The line as it was typed may be overruled by a later option.
            ("original", "1s", 600.0, "--hold-timeout=600s"),
        ] {
            let patience = Patience::default();
            patience.learn(&line(label, timeout));
            let limit = patience.limit(&policy, Instant::now());
            assert_eq!(limit.after.as_secs_f64(), after, "{label} {timeout}");
            assert_eq!(limit.to_string(), shown);
        }
        let short = HoldPolicy {
            timeout: Duration::from_secs(1),
            ..policy
        };
        let patience = Patience::default();
        patience.learn(&line("canonical", "30s"));
        assert_eq!(patience.limit(&short, Instant::now()).after, short.timeout);
    }

    #[tokio::test(start_paused = true)]
    async fn its_patience_begins_with_the_commands_end() {
        // It uploads files before it sends the last event, and some before it says that it has ended.
        for (ahead_ms, late_ms, expected) in [
            (0, None, 20),
            (0, Some(0), 20),
            (0, Some(7_500), 12),
            (0, Some(-5_000), 20),
            (60_000, Some(67_500), 12),
            (-60_000, Some(-52_500), 12),
        ] {
            let patience = Patience::default();
            patience.learn(&line("canonical", "30s"));
            patience.learn(&Event::Started(Started {
                started_ms: now_ms() - ahead_ms,
                ..Started::default()
            }));
            patience.learn(&Event::Finished {
                exit_code: 0,
                name: String::new(),
                ended_ms: late_ms.map_or(0, |late| now_ms() - late),
            });
            tokio::time::advance(Duration::from_secs(5)).await;
            let limit = |came| patience.limit(&HoldPolicy::default(), came).after.as_secs_f64();
            let left = limit(Instant::now());
            assert!(
                (f64::from(expected) - 1.0..=f64::from(expected) + 0.6).contains(&left),
                "{left}"
            );
            tokio::time::advance(Duration::from_secs(60)).await;
            assert_eq!(limit(Instant::now()), 0.0);
        }
    }

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
        for waited in [
            Waited::Settled(&failed(3)),
            Waited::TimedOut(LIMIT),
            Waited::Stopped,
            Waited::Unanswered,
        ] {
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
        assert!(matches!(policy.release(&Waited::TimedOut(LIMIT)), Release::Fail(t) if t.contains("600s")));
        assert!(matches!(policy.release(&Waited::Stopped), Release::Fail(t) if t.contains("outhaul resume")));
        assert!(matches!(policy.release(&Waited::Unanswered), Release::Fail(_)));
    }

    #[test]
    fn the_builds_own_limit_fails_nothing_where_somebody_waits_on() {
        let own = Limit {
            flag: "the build's --bes_timeout",
            ..LIMIT
        };
        for (is_followed, limit, fails) in [
            (false, own, true),
            (true, own, false),
            (false, LIMIT, true),
            (true, LIMIT, true),
        ] {
            let policy = HoldPolicy {
                strict: true,
                is_followed,
                ..HoldPolicy::default()
            };
            let release = policy.release(&Waited::TimedOut(limit));
            assert_eq!(release != Release::Ack, fails, "{is_followed} {limit}");
        }
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
