//! How far something is, how fast it goes, and how long it will take.

use std::{collections::VecDeque, time::Duration};

use crate::units::{show_count, show_duration, show_size};

/// The time over which a rate is reckoned.
const WINDOW: Duration = Duration::from_secs(10);

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

impl Progress {
    /// The part that is done, from 0 to 1: by bytes, or by files where there are no bytes.
    pub(super) fn part(&self) -> Option<f64> {
        let part = |done: u64, all: u64| (all > 0).then(|| (done as f64 / all as f64).min(1.0));
        let by_files = || part(self.files, self.all_files?);
        self.all_bytes
            .and_then(|all| part(self.bytes, all))
            .or_else(by_files)
    }

    /// How long the rest takes at this rate.
    fn left(&self, rate: u64) -> Option<Duration> {
        let rest = self.all_bytes?.saturating_sub(self.bytes);
        (rate > 0 && rest > 0).then(|| Duration::from_secs(rest.div_ceil(rate)))
    }

    /// In words: `12 of 40 files, 3.4 MiB of 10.0 MiB, 2.0 MiB/s, 3.0s left`.
    pub(super) fn words(&self, what: &str, rate: Option<u64>) -> String {
        let of = |done: String, all: Option<String>| match all {
            Some(all) => format!("{done} of {all}"),
            None => done,
        };
        let mut words = of(show_count(self.files), self.all_files.map(show_count));
        words.push_str(&format!(" {what}, "));
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
}
