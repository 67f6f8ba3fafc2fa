//! How far something is, how fast it goes, and how long it will take.

use std::{
    collections::VecDeque,
    io::{IsTerminal as _, Write as _, stderr},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::{MissedTickBehavior, interval_at};

use super::print;
use crate::{
    invocation::Engine,
    materialize::Counts,
    units::{show_count, show_duration, show_size},
};

/// The time over which a rate is reckoned.
const WINDOW: Duration = Duration::from_secs(10);
/// How often the line on a terminal changes. What takes less time has none.
const DRAWN: Duration = Duration::from_millis(200);
/// How often bytes are counted where there is no terminal.
const COUNTED: Duration = Duration::from_secs(1);
/// How often a line is written where there is no terminal.
const SAID: Duration = Duration::from_secs(30);
/// Columns of a bar.
pub(super) const BAR: usize = 20;

/// How fast bytes come, as counted in the last seconds.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// When, and how many had come.
    counted: VecDeque<(Duration, u64)>,
}

impl Pace {
    /// So many had come at this time, by a clock that only runs forward.
    pub(super) fn count(&mut self, at: Duration, bytes: u64) {
        let last = self.counted.back().copied();
        if last.is_some_and(|(_, before)| bytes < before) {
            // Another build, or it was begun again.
            self.counted.clear();
        }
        if last.is_some_and(|(before, _)| at < before + WINDOW / 100) {
            return;
        }
        self.counted.push_back((at, bytes));
        // One that is older stays, so that a rate is known where things come seldom.
        while self
            .counted
            .get(1)
            .is_some_and(|(second, _)| *second + WINDOW <= at)
        {
            self.counted.pop_front();
        }
    }

    /// Bytes in a second; unknown while too little was counted.
    pub(super) fn rate(&self) -> Option<u64> {
        let ((from, before), (to, now)) = (self.counted.front()?, self.counted.back()?);
        let took = to.checked_sub(*from).filter(|took| !took.is_zero())?;
        Some((now.saturating_sub(*before) as f64 / took.as_secs_f64()) as u64)
    }
}

/// How far something is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// Files that came to their end.
    pub(super) files: u64,
    /// All of them, if that is known.
    pub(super) all_files: Option<u64>,
    /// Bytes that were downloaded.
    pub(super) bytes: u64,
    /// All that are to be downloaded, if that is known.
    pub(super) all_bytes: Option<u64>,
}

impl From<Counts> for Progress {
    fn from(counts: Counts) -> Self {
        Self {
            files: counts.outputs,
            all_files: Some(counts.all_outputs),
            bytes: counts.bytes,
            all_bytes: Some(counts.all_bytes),
        }
    }
}

impl Progress {
    /// The part that is done, from 0 to 1: by bytes, or by files where there are no bytes.
    pub(super) fn part(&self) -> Option<f64> {
        let part = |done: u64, all: u64| (all > 0).then(|| (done as f64 / all as f64).min(1.0));
        let by_files = || part(self.files, self.all_files?);
        self.all_bytes
            .and_then(|all| part(self.bytes, all))
            .or_else(by_files)
    }

    /// Of outputs that came to their end, and others on their way; and the bytes of both.
    pub(super) const fn of_outputs(ended: u64, pending: u64, bytes: u64, pending_bytes: u64) -> Self {
        Self {
            files: ended,
            all_files: Some(ended.saturating_add(pending)),
            bytes,
            all_bytes: Some(bytes.saturating_add(pending_bytes)),
        }
    }

    /// How long the rest takes at this rate.
    fn left(&self, rate: u64) -> Option<Duration> {
        let rest = self.all_bytes?.saturating_sub(self.bytes);
        (rate > 0 && rest > 0).then(|| Duration::from_secs(rest.div_ceil(rate)))
    }

    /// Whether anything is known yet: before that, there is nothing to say.
    const fn is_any(&self) -> bool {
        self.files > 0 || self.bytes > 0 || !matches!(self.all_files, Some(0))
    }

    /// In words: `12 of 40 files, 3.4 MiB of 10.0 MiB, 2.0 MiB/s, 3.0s left`.
    pub(super) fn words(&self, what: &str, rate: Option<u64>) -> String {
        let of = |done: String, all: Option<String>| match all {
            Some(all) => format!("{done} of {all}"),
            None => done,
        };
        let mut words = String::new();
        if self.files > 0 || self.all_files.is_some() {
            let files = of(show_count(self.files), self.all_files.map(show_count));
            words.push_str(&format!("{files} {what}, "));
        }
        words.push_str(&of(show_size(self.bytes), self.all_bytes.map(show_size)));
        if let Some(rate) = rate {
            words.push_str(&format!(", {}/s", show_size(rate)));
        }
        if let Some(left) = rate.and_then(|rate| self.left(rate)) {
            words.push_str(&format!(", {} left", show_duration(left)));
        }
        words
    }
}

/// A bar that is filled to this part.
pub(super) fn bar(part: f64, columns: usize) -> String {
    let filled = (part.clamp(0.0, 1.0) * columns as f64).round() as usize;
    format!("[{}{}]", "#".repeat(filled), "-".repeat(columns - filled))
}

/// How far the builds of this process are, those that count, all together.
pub(super) async fn of_builds(engine: &Engine, counts: impl Fn(&(String, String)) -> bool) -> Progress {
    let (mut ended, mut pending, mut bytes, mut pending_bytes) = (0, 0, 0_u64, 0_u64);
    for stream in engine.streams().iter().filter(|stream| counts(stream)) {
        let Some((row, _)) = engine.snapshot(&stream.0).await else {
            continue;
        };
        let waiting = engine.waiting(&stream.0, 0).await.unwrap_or_default();
        ended += row.outputs.downloaded + row.outputs.present + row.outputs.failed;
        bytes = bytes.saturating_add(row.outputs.downloaded_bytes);
        pending += waiting.required + waiting.optional;
        pending_bytes = pending_bytes.saturating_add(waiting.bytes);
    }
    Progress::of_outputs(ended, pending, bytes, pending_bytes)
}

/// What is said on standard error while a command works: on a terminal a line that changes and is gone at the end, elsewhere
/// a line every 30 s.
struct Meter {
    what: &'static str,
    /// Only on a terminal.
    bar: Option<ProgressBar>,
    pace: Pace,
    /// When something was said last.
    said: Duration,
}

impl Meter {
    fn new(what: &'static str) -> Self {
        let bar = stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed} {wide_msg}") {
                bar.set_style(style);
            }
            bar
        });
        Self {
            what,
            bar,
            pace: Pace::default(),
            said: Duration::ZERO,
        }
    }

    /// How often it is to be shown something: for a log often enough that there is a rate.
    const fn pause(&self) -> Duration {
        if self.bar.is_some() { DRAWN } else { COUNTED }
    }

    /// The line for this moment; for a log, if it is time for one.
    fn line(&mut self, at: Duration, progress: Progress) -> Option<String> {
        self.pace.count(at, progress.bytes);
        if self.bar.is_none() && at < self.said + SAID || !progress.is_any() {
            return None;
        }
        self.said = at;
        let words = progress.words(self.what, self.pace.rate());
        Some(match (&self.bar, progress.part()) {
            (Some(_), Some(part)) => format!("{} {:3.0}%  {words}", bar(part, BAR), part * 100.0),
            _ => words,
        })
    }

    /// Nobody who cannot be told is a reason to stop.
    fn show(&mut self, at: Duration, progress: Progress) {
        let Some(line) = self.line(at, progress) else {
            return;
        };
        match &self.bar {
            Some(bar) => {
                bar.set_message(line);
                bar.tick();
            }
            None => {
                let _ = writeln!(print::err(), "outhaul: {line}");
            }
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Says how far the work is, until it is done.
pub(super) async fn watched<T>(
    what: &'static str,
    work: impl Future<Output = T>,
    mut look: impl AsyncFnMut() -> Option<Progress>,
) -> T {
    let begun = Instant::now();
    let mut meter = Meter::new(what);
    let mut tick = interval_at(tokio::time::Instant::now() + meter.pause(), meter.pause());
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tokio::pin!(work);
    loop {
        let looked = async {
            tick.tick().await;
            look().await
        };
        tokio::select! {
            done = &mut work => return done,
            progress = looked => if let Some(progress) = progress {
                meter.show(begun.elapsed(), progress);
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_rate_is_that_of_the_last_seconds() {
        let mut pace = Pace::default();
        assert_eq!(pace.rate(), None);
        pace.count(at(0), 0);
        assert_eq!(pace.rate(), None);
        for second in 1..=20 {
            pace.count(at(1000 * second), 100 * second);
        }
        assert_eq!(pace.rate(), Some(100));
        for second in 21..=30 {
            pace.count(at(1000 * second), 2000);
        }
        assert_eq!(pace.rate(), Some(0), "nothing came for the whole window");
        assert!(pace.counted.len() <= 12, "{pace:?}");
        pace.count(at(31_000), 5);
        assert_eq!(pace.rate(), None, "it was begun again");
    }

    #[test]
    fn progress_in_words_says_what_is_known() {
        let all = Progress {
            files: 1200,
            all_files: Some(4000),
            bytes: 1 << 20,
            all_bytes: Some(3 << 20),
        };
        assert_eq!(
            all.words("outputs", Some(1 << 20)),
            "1,200 of 4,000 outputs, 1.0 MiB of 3.0 MiB, 1.0 MiB/s, 2.0s left"
        );
        assert_eq!(all.part(), Some(1.0 / 3.0));
        let some = Progress {
            files: 3,
            bytes: 7,
            ..Progress::default()
        };
        assert_eq!(some.words("files", None), "3 files, 7 B");
        assert_eq!(some.part(), None);
        let bytes = Progress {
            bytes: 7,
            all_bytes: Some(1 << 10),
            ..Progress::default()
        };
        assert_eq!(bytes.words("files", None), "7 B of 1.0 KiB");
        let nothing = Progress {
            all_files: Some(0),
            all_bytes: Some(0),
            ..Progress::default()
        };
        assert_eq!(nothing.part(), None);
        assert_eq!(
            all.words("files", Some(0)),
            "1,200 of 4,000 files, 1.0 MiB of 3.0 MiB, 0 B/s"
        );
    }

    #[test]
    fn a_log_has_a_line_every_thirty_seconds_and_a_terminal_one_each_time() {
        let meter = |bar| Meter {
            what: "outputs",
            bar,
            pace: Pace::default(),
            said: Duration::ZERO,
        };
        let mut log = meter(None);
        let mut said = Vec::new();
        for second in 1..=100 {
            let progress = Progress::of_outputs(second, 100 - second, second << 20, (100 - second) << 20);
            said.extend(log.line(at(1000 * second), progress).map(|line| (second, line)));
        }
        let lines = |second: u64, line: &str| (second, line.to_owned());
        assert_eq!(
            said,
            [
                lines(
                    30,
                    "30 of 100 outputs, 30.0 MiB of 100.0 MiB, 1.0 MiB/s, 1m10s left"
                ),
                lines(
                    60,
                    "60 of 100 outputs, 60.0 MiB of 100.0 MiB, 1.0 MiB/s, 40.0s left"
                ),
                lines(
                    90,
                    "90 of 100 outputs, 90.0 MiB of 100.0 MiB, 1.0 MiB/s, 10.0s left"
                ),
            ]
        );
        let mut terminal = meter(Some(ProgressBar::hidden()));
        let line = terminal.line(at(1), Progress::of_outputs(1, 1, 10, 10));
        let expected = "[##########----------]  50%  1 of 2 outputs, 10 B of 20 B";
        assert_eq!(line.as_deref(), Some(expected));
    }
}
