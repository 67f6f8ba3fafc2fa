//! What is told of builds while they go on, to whoever listens.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::engine::Report;
use crate::{exec_path::ExecPath, materialize::Outcome, output::Class, record::TargetRow};

/// Something about a build has changed.
#[derive(Debug, Clone)]
pub enum Change {
    /// It began.
    Begun {
        /// Its workspace on disk.
        workspace: String,
        /// The build tool's command, such as `build`.
        command: String,
    },
    /// A target was completed, settled, has failed or was aborted: the row says which. A target is settled when all
    /// that is required of it is on disk, and failed when some of that could not be had or was not built; the outputs
    /// of its tests are part of it.
    Target(TargetRow),
    /// A wanted output came to its end.
    Output {
        /// Which, below the exec root.
        path: ExecPath,
        /// The target that named it first.
        label: Arc<str>,
        /// How much it was wanted.
        class: Class,
        /// How it ended.
        outcome: Outcome,
    },
    /// Everything that it wanted came to its end. Comes last, unless a broken stream is resumed.
    Settled(Report),
}

/// A change, and whose.
#[derive(Debug, Clone)]
pub struct Told {
    /// The invocation's id.
    pub invocation_id: String,
    /// What has changed.
    pub change: Change,
}

/// Changes that a listener may be behind; then it is left alone.
const BACKLOG: usize = 16_384;

/// Who listens to one build.
#[derive(Debug, Default)]
pub(super) struct Listeners(Vec<mpsc::Sender<Change>>);

impl Listeners {
    /// Adds one, who hears the targets so far first.
    pub(super) fn add(&mut self, so_far: Vec<TargetRow>) -> mpsc::Receiver<Change> {
        let (sender, receiver) = mpsc::channel(BACKLOG.saturating_add(so_far.len()));
        for row in so_far {
            // There is room for all of them.
            let _ = sender.try_send(Change::Target(row));
        }
        self.0.push(sender);
        receiver
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Tells everybody. Who has gone or fell too far behind is told no more.
    pub(super) fn tell(&mut self, change: &Change) {
        self.0
            .retain(|listener| listener.try_send(change.clone()).is_ok());
    }

    /// Lets everybody go.
    pub(super) fn dismiss(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(n: usize) -> TargetRow {
        TargetRow {
            label: format!("//:{n}"),
            ..TargetRow::default()
        }
    }

    #[test]
    fn a_listener_that_falls_behind_is_let_go_and_the_others_hear_everything() {
        let mut listeners = Listeners::default();
        let slow = listeners.add(Vec::new());
        for n in 0..=BACKLOG {
            listeners.tell(&Change::Target(row(n)));
        }
        assert!(listeners.is_empty());
        assert_eq!(slow.len(), BACKLOG);
        let mut late = listeners.add((0..3).map(row).collect());
        listeners.tell(&Change::Target(row(9)));
        listeners.dismiss();
        let mut heard = Vec::new();
        while let Ok(Change::Target(row)) = late.try_recv() {
            heard.push(row.label);
        }
        assert_eq!(heard, ["//:0", "//:1", "//:2", "//:9"]);
        assert!(late.is_closed());
    }
}
