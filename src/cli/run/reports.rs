//! What came of this command's builds, as the daemon tells it. Builds of others, which it goes on with from the journal, do
//! not count, and neither does what an earlier attempt is still told of.

use std::{collections::HashSet, io::Write as _, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::broadcast;

use super::super::print;
use crate::{daemon::EventListeners, invocation::Report, printable::printable};

/// The invocation id and the build id of a stream.
type Stream = (String, String);

/// The reports of the attempt that runs.
#[derive(Debug, Default)]
pub(super) struct Reports {
    told: Vec<Report>,
    /// Streams of earlier attempts that were not reported in time.
    late: HashSet<Stream>,
}

/// Several tasks have them.
pub(super) type SharedReports = Arc<Mutex<Reports>>;

impl Reports {
    fn add(&mut self, report: Report) {
        if !self.late.contains(&stream_of(&report)) {
            self.told.push(report);
        }
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.told.len()
    }

    /// That of the build that counts: Bazel starts another one in the same command after an eviction.
    pub(super) fn last(&self) -> Option<&Report> {
        self.told.last()
    }

    /// Takes out what was told. Of these streams, which are all that there are, nothing more is heard.
    pub(super) fn start_over(&mut self, streams: Vec<Stream>) -> Vec<Report> {
        let told: HashSet<Stream> = self.told.iter().map(stream_of).collect();
        let late = streams.into_iter().filter(|stream| !told.contains(stream));
        self.late.extend(late);
        self.take()
    }

    /// Takes out what was told.
    pub(super) fn take(&mut self) -> Vec<Report> {
        std::mem::take(&mut self.told)
    }

    /// Puts back what was taken out, in the place of what there is.
    pub(super) fn put_back(&mut self, reports: Vec<Report>) {
        self.told = reports;
    }
}

fn stream_of(report: &Report) -> Stream {
    (report.invocation_id.clone(), report.build_id.clone())
}

/// Collects the reports of builds that come through the listeners.
pub(super) async fn collect(
    mut reports: broadcast::Receiver<Report>,
    listeners: EventListeners,
    into: SharedReports,
) {
    loop {
        match reports.recv().await {
            Ok(report) if listeners.came_in(&stream_of(&report)) => into.lock().add(report),
            Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

/// One summary line for each invocation (Bazel starts another one in the same command after an eviction).
pub(super) fn tell(reports: &[Report]) -> std::io::Result<()> {
    let mut err = print::err();
    for report in reports {
        for message in &report.messages {
            writeln!(err, "outhaul: {}", printable(message))?;
        }
        writeln!(err, "{}", printable(&report.line))?;
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{invocation::tally::Tally, record::InvocationState};

    pub(in super::super) fn report(id: &str) -> Report {
        Report {
            invocation_id: id.to_owned(),
            build_id: "b".to_owned(),
            workspace: String::new(),
            exec_root: String::new(),
            command: "build".to_owned(),
            state: InvocationState::Settled,
            line: String::new(),
            messages: Vec::new(),
            failed: 0,
            exit_code: Some(0),
            tally: Tally::default(),
        }
    }

    #[test]
    fn what_an_earlier_attempt_is_told_of_late_does_not_count() {
        let stream = |id: &str| (id.to_owned(), "b".to_owned());
        let mut reports = Reports::default();
        reports.add(report("told"));
        let told = reports.start_over(vec![stream("told"), stream("late")]);
        assert_eq!((told.len(), reports.count()), (1, 0));
        for id in ["late", "new"] {
            reports.add(report(id));
        }
        assert_eq!(reports.last().map(|last| &*last.invocation_id), Some("new"));
        assert_eq!(reports.count(), 1);
        // A command that names its ids has the same ones again.
        reports.add(report("told"));
        assert_eq!(reports.take().len(), 2);
    }
}
