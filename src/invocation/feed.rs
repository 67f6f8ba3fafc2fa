//! What listeners learn about builds while they run.

use std::{path::Path, sync::Arc};

use tokio::sync::broadcast;

use super::tally::Tally;
use crate::{
    bep::event::TargetId,
    exec_path::ExecPath,
    materialize::Outcome,
    output::{Class, OutputContent},
    record::{InvocationState, TargetRow},
};

/// The result of an invocation, reported once it is settled.
#[derive(Debug, Clone)]
pub struct Report {
    /// The invocation that changed.
    pub invocation_id: String,
    /// The id of its build request: Bazel may begin a build again in the same command.
    pub build_id: String,
    /// Its workspace on disk.
    pub workspace: String,
    /// Its exec root, absolute.
    pub exec_root: String,
    /// The build tool's command, such as `build`.
    pub command: String,
    /// What it came to.
    pub state: InvocationState,
    /// The summary line.
    pub line: String,
    /// The first failures and warnings.
    pub messages: Vec<String>,
    /// Required outputs that failed to download.
    pub failed: u64,
    /// The build tool's exit code, if it sent one.
    pub exit_code: Option<i32>,
    /// Its outputs in numbers.
    pub tally: Tally,
}

/// Until when the end of a build's stream is held back, so that the build tool's command does not return yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    /// When it is let go in any case, in milliseconds since the epoch.
    pub until_ms: i64,
    /// What says so, such as `--hold-timeout=600s`.
    pub limit: String,
}

/// A wanted output that is still on its way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingOutput {
    /// Which, below the root.
    pub path: ExecPath,
    /// The target that named it first.
    pub target: Arc<TargetId>,
    /// Its bytes, as far as they are known.
    pub bytes: u64,
    /// How much it is wanted.
    pub class: Class,
}

/// What a build waits for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Waiting {
    /// Set while the build tool's command waits.
    pub hold: Option<Hold>,
    /// Required outputs that are still on their way.
    pub required: u64,
    /// Optional ones.
    pub optional: u64,
    /// The bytes of all of them, as far as they are known.
    pub bytes: u64,
    /// Some of them, required ones first, and large ones before small ones.
    pub outputs: Vec<PendingOutput>,
}

/// How a wanted output ended.
#[derive(Debug)]
pub struct OutputEnded {
    /// Absolute path of the root that it lies below.
    pub exec_root: Arc<Path>,
    /// Which, below the root.
    pub path: ExecPath,
    /// What should be there.
    pub content: OutputContent,
    /// The target that named it first.
    pub target: Arc<TargetId>,
    /// The output group that it was in, or empty.
    pub output_group: Arc<str>,
    /// How much it was wanted.
    pub class: Class,
    /// How it ended.
    pub outcome: Outcome,
}

/// Something about a build has changed.
#[derive(Debug, Clone)]
pub enum Change {
    /// The invocation has started.
    Begun {
        /// Its workspace on disk.
        workspace: String,
        /// The build tool's command, such as `build`.
        command: String,
    },
    /// A target was completed, settled, has failed or was aborted: the row says which. A target is settled when all
    /// that is required of it is on disk, and failed when some of that failed to download or was not built; the outputs
    /// of its tests are part of it.
    Target(Arc<TargetRow>),
    /// A wanted output came to its end.
    Output(Arc<OutputEnded>),
    /// Everything that it wanted came to its end. Comes last, unless a broken stream is resumed.
    Settled(Box<Report>),
}

/// A change, and whose.
#[derive(Debug, Clone)]
pub struct InvocationChange {
    /// The invocation's id.
    pub invocation_id: String,
    /// What has changed.
    pub change: Change,
}

/// How many changes a listener may lag behind; one that lags further is dropped.
const BACKLOG: usize = 16_384;

/// A change of one build, with its number and the place of the target that it is about, among all of the build's.
#[derive(Debug)]
pub(super) struct Numbered {
    pub(super) number: u64,
    pub(super) target: Option<usize>,
    pub(super) change: Change,
}

/// Who listens to one build. All of them hear the same copy of a change, so that what waits for those who take nothing
/// is as much for one as for thousands.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    /// While there are listeners.
    changes: Option<broadcast::Sender<Arc<Numbered>>>,
    /// Changes so far.
    number: u64,
}

impl Listeners {
    /// Adds one, who hears what changes from now on.
    pub(super) fn add(&mut self) -> broadcast::Receiver<Arc<Numbered>> {
        self.changes
            .get_or_insert_with(|| broadcast::Sender::new(BACKLOG))
            .subscribe()
    }

    /// Whether there are no listeners.
    pub(super) const fn is_empty(&self) -> bool {
        self.changes.is_none()
    }

    /// How many changes there were so far.
    pub(super) const fn number(&self) -> u64 {
        self.number
    }

    /// Notifies everybody.
    pub(super) fn notify(&mut self, target: Option<usize>, change: &Change) {
        self.number += 1;
        let Some(changes) = &self.changes else { return };
        let numbered = Numbered {
            number: self.number,
            target,
            change: change.clone(),
        };
        if changes.send(Arc::new(numbered)).is_err() {
            // All of them have gone.
            self.changes = None;
        }
    }

    /// Lets everybody go.
    pub(super) fn dismiss(&mut self) {
        self.changes = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use broadcast::error::TryRecvError;

    fn change(n: usize) -> Change {
        Change::Target(Arc::new(TargetRow {
            label: format!("//:{n}"),
            ..TargetRow::default()
        }))
    }

    #[test]
    fn listeners_share_one_copy_and_one_that_falls_behind_hears_so() {
        let mut listeners = Listeners::default();
        let mut slow = listeners.add();
        let mut quick: Vec<_> = (0..100).map(|_| listeners.add()).collect();
        let first = change(0);
        listeners.notify(None, &first);
        let Change::Target(row) = &first else { panic!() };
        // Here, and once for all of them.
        assert_eq!(Arc::strong_count(row), 2);
        for n in 1..=BACKLOG {
            for quick in &mut quick {
                assert_eq!(quick.try_recv().unwrap().number, n as u64);
            }
            listeners.notify(Some(n), &change(n));
        }
        assert_eq!(Arc::strong_count(row), 1, "nobody is waited for");
        assert_eq!(slow.try_recv().unwrap_err(), TryRecvError::Lagged(1));
        drop((slow, quick));
        listeners.notify(None, &first);
        assert!(listeners.is_empty() && Arc::strong_count(row) == 1);
        assert_eq!(listeners.number(), BACKLOG as u64 + 2);
        let mut late = listeners.add();
        listeners.notify(None, &first);
        listeners.dismiss();
        assert!(late.try_recv().is_ok());
        assert_eq!(late.try_recv().unwrap_err(), TryRecvError::Closed);
    }
}
