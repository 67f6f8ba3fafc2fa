//! What the mount tells about itself: who waits, what failed and why.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Write as _,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::error::ReadError;
use crate::{printable::printable, units::show_duration};

/// How long a failure is not told again.
const MOMENT: Duration = Duration::from_secs(5);

/// How many failures are kept.
const KEPT: usize = 100;

#[derive(Default)]
struct State {
    last: u64,
    waiting: BTreeMap<u64, (String, Instant)>,
    failed: VecDeque<(String, String, Instant)>,
    fetched: u64,
    failures: u64,
}

/// What happens. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Report(Arc<Mutex<State>>);

/// A reader that waits for a path.
pub(super) struct Waiting {
    report: Report,
    number: u64,
}

impl Report {
    /// Somebody waits for this path, until the answer is told.
    pub(super) fn waits(&self, path: String) -> Waiting {
        let mut state = self.0.lock();
        state.last += 1;
        let number = state.last;
        state.waiting.insert(number, (path, Instant::now()));
        Waiting {
            report: self.clone(),
            number,
        }
    }

    /// Something failed for everybody. Told once for all who look in the same moment.
    pub(super) fn failed(&self, path: &str, reason: &str) {
        let mut state = self.0.lock();
        let is_known = |(of, why, at): &(String, String, Instant)| {
            (&**of, &**why) == (path, reason) && at.elapsed() < MOMENT
        };
        if state.failed.back().is_some_and(is_known) {
            return;
        }
        tracing::error!(path = %printable(path), reason = %printable(reason), "failed to read");
        state.failures += 1;
        state
            .failed
            .push_back((path.to_owned(), reason.to_owned(), Instant::now()));
        if state.failed.len() > KEPT {
            state.failed.pop_front();
        }
    }

    /// As text, newest failures first.
    pub(super) fn text(&self) -> String {
        let state = self.0.lock();
        let mut text = format!(
            "downloaded for readers: {}\nwaiting: {}\n",
            state.fetched,
            state.waiting.len()
        );
        for (path, since) in state.waiting.values() {
            let _ = writeln!(
                text,
                "  for {}: {}",
                show_duration(since.elapsed()),
                printable(path)
            );
        }
        let _ = writeln!(text, "failed: {}", state.failures);
        for (path, reason, at) in state.failed.iter().rev() {
            let (path, reason) = (printable(path), printable(reason));
            let _ = writeln!(text, "  {} ago: {path}: {reason}", show_duration(at.elapsed()));
        }
        text
    }
}

impl Waiting {
    /// It has come, or not.
    pub(super) fn ended(self, error: Option<&ReadError>) {
        let path = self
            .report
            .0
            .lock()
            .waiting
            .get(&self.number)
            .map(|(path, _)| path.clone());
        match error {
            None => self.report.0.lock().fetched += 1,
            // The reader's own doing.
            Some(ReadError::Interrupted) => {}
            Some(error) => self.report.failed(&path.unwrap_or_default(), &error.to_string()),
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.report.0.lock().waiting.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_names_who_waits_and_what_failed_newest_first() {
        let report = Report::default();
        let waiting = report.waits("bazel-out/slow".to_owned());
        report.waits("bazel-out/there".to_owned()).ended(None);
        for n in 0..KEPT {
            report.failed(&format!("bazel-out/{n}"), "evicted");
            report.failed(&format!("bazel-out/{n}"), "evicted");
        }
        report
            .waits("bazel-out/late\n".to_owned())
            .ended(Some(&ReadError::Interrupted));
        let lost = ReadError::Lost("no such blob".to_owned());
        report.waits("bazel-out/lost".to_owned()).ended(Some(&lost));
        let text = report.text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "downloaded for readers: 1");
        assert_eq!(lines[1], "waiting: 1");
        assert!(lines[2].ends_with(": bazel-out/slow"), "{text}");
        assert_eq!(lines[3], "failed: 101");
        assert!(lines[4].ends_with(" ago: bazel-out/lost: no such blob"), "{text}");
        assert_eq!(lines.len(), 4 + KEPT);
        drop(waiting);
        assert!(report.text().contains("waiting: 0"));
    }
}
