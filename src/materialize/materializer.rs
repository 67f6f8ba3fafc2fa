//! The handle on the coordinator.

use std::{io, sync::Arc};

use tokio::sync::{mpsc, oneshot, watch};

use super::{
    coordinator::{COMMANDS, Command, Coordinator, Inbox},
    options::MaterializeOptions,
    pause::Pausing,
    want::{Root, Session, Want},
    writers::Writers,
};
use crate::metrics::Metrics;

/// Brings outputs to disk. Cheap to clone; the work ends when the last clone is gone and nothing is under way.
#[derive(Clone)]
pub struct Materializer {
    commands: mpsc::Sender<Command>,
    closed: watch::Receiver<bool>,
    pausing: Pausing,
}

impl Materializer {
    /// Starts the coordinator on the current tokio runtime, and its threads.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(options: MaterializeOptions, metrics: Metrics) -> io::Result<Self> {
        let (commands, inbox) = mpsc::channel(COMMANDS);
        let (reports, written) = mpsc::unbounded_channel();
        let writers = Writers::start(options.writers, options.place, &reports)?;
        let (done, closed) = watch::channel(false);
        let pausing = Pausing::new();
        let inbox = Inbox {
            commands: inbox,
            written,
            pauses: pausing.changes(),
        };
        tokio::spawn(Coordinator::run(options, metrics, writers, inbox, done));
        Ok(Self {
            commands,
            closed,
            pausing,
        })
    }

    /// Begins a new version of a root. When this returns, nothing of an older version is published any more and all
    /// its wants have been answered as superseded.
    pub async fn begin(&self, root: &Arc<Root>, version: u64) {
        let place = root.clone();
        // Waits for writers that are in the middle of publishing: a few system calls.
        let raised = tokio::task::spawn_blocking(move || place.epoch.begin(version)).await;
        if raised.is_err() {
            tracing::error!(root = %root.place.path().display(), "raising the version of a root panicked");
        }
        let (done, answer) = oneshot::channel();
        if self
            .commands
            .send(Command::Begin(root.clone(), version, done))
            .await
            .is_ok()
        {
            let _ = answer.await;
        }
    }

    /// Wants outputs on disk. Each is answered once through the session's completions.
    pub async fn want(&self, session: &Arc<Session>, wants: Vec<Want>) {
        if !wants.is_empty() {
            // The coordinator ends only after its last handle.
            let _ = self.commands.send(Command::Want(session.clone(), wants)).await;
        }
    }

    /// Gives up everything that a session still wants; it is answered as failed. What is just being placed may still
    /// come, whole.
    pub async fn cancel(&self, session: &Arc<Session>) {
        let _ = self.commands.send(Command::Cancel(session.clone())).await;
    }

    /// Whether downloads are begun at present.
    pub(crate) const fn pausing(&self) -> &Pausing {
        &self.pausing
    }

    /// Ends the work when the other clones are gone, and waits until nothing of any output root is held any more.
    pub async fn close(self) {
        let Self {
            commands, mut closed, ..
        } = self;
        drop(commands);
        // An error means that the coordinator is gone already.
        let _ = closed.wait_for(|closed| *closed).await;
    }

    /// Lets go of a root that is not used any more.
    pub async fn forget(&self, root: &Root) {
        let _ = self.commands.send(Command::Forget(root.id)).await;
    }
}
