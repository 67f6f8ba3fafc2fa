//! Answers to sessions, and metrics: collected while reports are processed, and sent together.

use std::sync::Arc;

use super::super::want::{Completion, Session};
use crate::metrics::Metrics;

/// What is not reported yet.
#[derive(Default)]
pub(super) struct Answers {
    outbox: Vec<(Arc<Session>, Vec<Completion>)>,
    /// Ends that the metrics do not know of: source, outcome, how many.
    ends: Vec<(&'static str, &'static str, u64)>,
    /// The same of what several stores gave: name, outputs, bytes.
    stores: Vec<(Arc<str>, u64, u64)>,
}

impl Answers {
    pub(super) fn add(&mut self, session: &Arc<Session>, mut completions: Vec<Completion>) {
        if completions.is_empty() {
            return;
        }
        let list = self.of(session);
        if list.is_empty() {
            *list = completions;
        } else {
            list.append(&mut completions);
        }
    }

    pub(super) fn of(&mut self, session: &Arc<Session>) -> &mut Vec<Completion> {
        let is_it = |(of, _): &(Arc<Session>, _)| Arc::ptr_eq(of, session);
        let index = self.outbox.iter().position(is_it).unwrap_or_else(|| {
            self.outbox.push((session.clone(), Vec::new()));
            self.outbox.len() - 1
        });
        &mut self.outbox[index].1
    }

    /// Counts ends, for [`deliver`](Self::deliver) to report: the metrics' map is too dear for every file.
    pub(super) fn ended(&mut self, source: &'static str, outcome: &'static str, count: u64) {
        if count == 0 {
            return;
        }
        match self
            .ends
            .iter_mut()
            .find(|(s, o, _)| (*s, *o) == (source, outcome))
        {
            Some((.., n)) => *n += count,
            None => self.ends.push((source, outcome, count)),
        }
    }

    /// Counts a file of one of several stores, for [`deliver`](Self::deliver) as well.
    pub(super) fn came_from(&mut self, store: Option<Arc<str>>, bytes: u64) {
        let Some(store) = store else { return };
        match self.stores.iter_mut().find(|(known, ..)| *known == store) {
            Some((_, outputs, sum)) => {
                *outputs += 1;
                *sum += bytes;
            }
            None => self.stores.push((store, 1, bytes)),
        }
    }

    pub(super) fn deliver(&mut self, metrics: &Metrics) {
        for (store, outputs, bytes) in self.stores.drain(..) {
            metrics.store(&store, outputs, bytes);
        }
        for (source, outcome, count) in self.ends.drain(..) {
            metrics.blobs(source, outcome, count);
        }
        for (session, list) in self.outbox.drain(..) {
            // An asker that is gone does not want to know.
            let _ = session.completions.send(list);
        }
    }
}
