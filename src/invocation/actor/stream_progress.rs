//! What of a build is not settled yet, by the numbers of its events.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use crate::{bep::event::TargetId, exec_path::ExecPath};

/// What is on its way, and what is not settled for it.
#[derive(Default)]
pub(super) struct StreamProgress {
    /// Required outputs on their way, by the number of the event that calls for them.
    pending: BTreeMap<i64, u64>,
    /// The highest number that was taken in.
    taken: i64,
    pub(super) failed_at: Option<i64>,
    /// Completed targets that are not settled, by the number of the event that completed them.
    unsettled: BTreeMap<i64, Vec<Arc<TargetId>>>,
    /// Targets that named an output which another had asked for already.
    sharers: HashMap<ExecPath, Vec<Arc<TargetId>>>,
}

impl StreamProgress {
    /// An event was taken in. `false` if it was before: a stream that broke off and is resumed after the event service
    /// has forgotten it comes again from its first event.
    pub(super) fn take(&mut self, sequence: i64) -> bool {
        let new = sequence > self.taken || self.taken <= 0;
        self.taken = self.taken.max(sequence);
        new
    }

    pub(super) const fn taken(&self) -> i64 {
        self.taken
    }

    /// A required output is on its way.
    pub(super) fn begin(&mut self, sequence: i64) {
        *self.pending.entry(sequence).or_default() += 1;
    }

    /// It is not any more.
    pub(super) fn end(&mut self, sequence: i64) {
        if let Some(count) = self.pending.get_mut(&sequence) {
            *count -= 1;
            if *count == 0 {
                self.pending.remove(&sequence);
            }
        }
    }

    /// It failed to download.
    pub(super) fn fail(&mut self, sequence: i64) {
        self.failed_at = Some(self.failed_at.map_or(sequence, |at| at.min(sequence)));
    }

    /// A target is completed by the event of this number.
    pub(super) fn completed(&mut self, sequence: i64, target: Arc<TargetId>) {
        self.unsettled.entry(sequence).or_default().push(target);
    }

    /// A target names an output that is on its way for another one.
    pub(super) fn share(&mut self, path: &ExecPath, target: &Arc<TargetId>) {
        self.sharers.entry(path.clone()).or_default().push(target.clone());
    }

    /// Who else has named an output.
    pub(super) fn sharers(&mut self, path: &ExecPath) -> Vec<Arc<TargetId>> {
        if self.sharers.is_empty() {
            return Vec::new();
        }
        self.sharers.remove(path).unwrap_or_default()
    }

    /// Everything up to this number is settled, given the lowest number whose outputs are not even known.
    pub(super) fn through(&self, open: Option<i64>) -> i64 {
        let lowest = self.pending.keys().next().copied().into_iter().chain(open).min();
        lowest.map_or(self.taken, |lowest| self.taken.min(lowest.saturating_sub(1)))
    }

    /// Targets that are settled now, in their order.
    pub(super) fn settled(&mut self, through: i64) -> Vec<Arc<TargetId>> {
        let mut settled = Vec::new();
        while let Some(entry) = self.unsettled.first_entry().filter(|e| *e.key() <= through) {
            settled.extend(entry.remove());
        }
        settled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_number_that_misses_something_is_what_holds() {
        let mut stream = StreamProgress::default();
        for sequence in 1..=9 {
            stream.take(sequence);
        }
        assert_eq!(stream.through(None), 9);
        stream.begin(4);
        stream.begin(4);
        stream.begin(7);
        assert_eq!(stream.through(None), 3);
        assert_eq!(stream.through(Some(2)), 1);
        stream.end(4);
        assert_eq!(stream.through(None), 3);
        stream.end(4);
        assert_eq!(stream.through(None), 6);
        assert_eq!(stream.through(Some(8)), 6);
        stream.end(7);
        assert_eq!((stream.through(Some(8)), stream.through(None)), (7, 9));
    }

    #[test]
    fn a_stream_that_comes_again_from_its_beginning_is_taken_once() {
        let mut stream = StreamProgress::default();
        let taken: Vec<_> = [1, 2, 3, 1, 2, 3, 4].map(|n| stream.take(n)).into();
        assert_eq!(taken, [true, true, true, false, false, false, true]);
        assert_eq!(stream.through(None), 4);
    }

    #[test]
    fn targets_settle_in_the_order_of_their_events() {
        let mut stream = StreamProgress::default();
        let target = |label: &str| {
            Arc::new(TargetId {
                label: label.to_owned(),
                ..TargetId::default()
            })
        };
        stream.completed(5, target("//:b"));
        stream.completed(3, target("//:a"));
        stream.completed(8, target("//:c"));
        let labels = |list: Vec<Arc<TargetId>>| list.iter().map(|t| t.label.clone()).collect::<Vec<_>>();
        assert_eq!(labels(stream.settled(2)), Vec::<String>::new());
        assert_eq!(labels(stream.settled(5)), ["//:a", "//:b"]);
        assert_eq!(labels(stream.settled(9)), ["//:c"]);
    }

    #[test]
    fn the_earliest_failure_counts() {
        let mut stream = StreamProgress::default();
        stream.fail(7);
        stream.fail(3);
        stream.fail(5);
        assert_eq!(stream.failed_at, Some(3));
    }
}
