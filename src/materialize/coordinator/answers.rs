//! Answers to sessions, and metrics: collected while reports are processed, and sent together.

use std::sync::Arc;

use super::{
    super::want::{Completion, Outcome, Session},
    Coordinator,
    jobs::Asker,
};
use crate::{exec_path::ExecPath, output::OutputContent};

impl Coordinator {
    pub(super) fn answer(&mut self, asker: Asker, path: ExecPath, content: OutputContent, outcome: Outcome) {
        let completion = Completion {
            path,
            content,
            class: asker.class,
            outcome,
            took: self.now.saturating_duration_since(asker.since),
        };
        self.outbox_of(&asker.session).push(completion);
    }

    pub(super) fn answer_all(&mut self, session: &Arc<Session>, mut completions: Vec<Completion>) {
        if completions.is_empty() {
            return;
        }
        let list = self.outbox_of(session);
        if list.is_empty() {
            *list = completions;
        } else {
            list.append(&mut completions);
        }
    }

    fn outbox_of(&mut self, session: &Arc<Session>) -> &mut Vec<Completion> {
        let is_it = |(of, _): &(Arc<Session>, _)| Arc::ptr_eq(of, session);
        let index = self.outbox.iter().position(is_it).unwrap_or_else(|| {
            self.outbox.push((session.clone(), Vec::new()));
            self.outbox.len() - 1
        });
        &mut self.outbox[index].1
    }

    /// Counts ends, for [`deliver`](Self::deliver) to tell: the metrics' map is too dear for every file.
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

    pub(super) fn deliver(&mut self) {
        for (store, outputs, bytes) in self.stores.drain(..) {
            self.metrics.store(&store, outputs, bytes);
        }
        for (source, outcome, count) in self.ends.drain(..) {
            self.metrics.blobs(source, outcome, count);
        }
        for (session, list) in self.outbox.drain(..) {
            // An asker that is gone does not want to know.
            let _ = session.completions.send(list);
        }
    }
}
