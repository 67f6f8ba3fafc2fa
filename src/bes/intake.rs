//! A stream's new events on their way: into the journal first, then to the engine's queue.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::{
    counters::Counters,
    delivery::{Delivery, RawEvent, Work},
    journal::{Batch, JournalError, Recovered, Writer},
    server::Shared,
    sink::{StreamEnd, StreamKey},
};
use crate::proto::google::devtools::build::v1::{OrderedBuildEvent, build_event};

/// A frame is closed when it holds so many bytes.
const FRAME_BYTES: usize = 4 << 20;

/// One stream's way in. Owned by the stream's task.
pub(super) struct Intake {
    key: StreamKey,
    counters: Arc<Counters>,
    /// `None` without journalling, or after it failed.
    journal: Option<Writer>,
    delivery: mpsc::UnboundedSender<Work>,
    /// New events on their way to the journal.
    batch: Batch,
    /// The same, on their way to the engine, with their weight and the room that they hold.
    fresh: Vec<RawEvent>,
    bytes: usize,
    room: Option<OwnedSemaphorePermit>,
}

impl Intake {
    /// Opens the stream's journal and says what is in it. Without a journal, or when it can't be opened, the stream
    /// goes on without one.
    pub(super) async fn open(key: &StreamKey, shared: &Shared) -> (Self, Recovered) {
        let (delivery, queue) = mpsc::unbounded_channel();
        let task = Delivery {
            key: key.clone(),
            builds: Arc::clone(&shared.builds),
            decoder: Arc::clone(&shared.decoder),
            counters: Arc::clone(&shared.counters),
            undecodable: 0,
        };
        shared.tasks.spawn(task.run(queue, shared.shutdown.clone()));
        let mut intake = Self {
            key: key.clone(),
            counters: Arc::clone(&shared.counters),
            journal: None,
            delivery,
            batch: Batch::default(),
            fresh: Vec::new(),
            bytes: 0,
            room: None,
        };
        let Some(journal) = shared.journal.clone() else {
            return (intake, Recovered::default());
        };
        let stream = key.clone();
        let opened = tokio::task::spawn_blocking(move || journal.stream(&stream)).await;
        let recovered = match opened {
            Ok(Ok((writer, recovered))) => {
                intake.journal = Some(writer);
                recovered
            }
            Ok(Err(error)) => intake.journal_failed(&error.to_string()),
            Err(error) => intake.journal_failed(&error.to_string()),
        };
        (intake, recovered)
    }

    /// Hands the journal's events to the engine again.
    pub(super) fn replay(&self, recovered: &Recovered) {
        let (Some(writer), Some(highest)) = (&self.journal, recovered.highest) else {
            return;
        };
        tracing::info!(stream = %self.key, highest, "stream taken up from the journal");
        for at in &recovered.frames {
            self.pass(Work::Journaled {
                file: writer.file(),
                path: writer.path(),
                at: *at,
            });
        }
    }

    /// Takes a new event; its bytes are moved out of it. All events between two flushes are of one connection.
    pub(super) fn push(
        &mut self,
        received_ms: u64,
        event: &mut OrderedBuildEvent,
        room: Option<OwnedSemaphorePermit>,
    ) {
        if self.journal.is_some() {
            self.batch.push(received_ms, event);
        }
        let sequence = event.sequence_number;
        if let Some(build_event::Event::BazelEvent(any)) = event.event.as_mut().and_then(|e| e.event.as_mut())
        {
            self.bytes += any.value.len();
            self.fresh.push((sequence, std::mem::take(&mut any.value).into()));
        }
        match (&mut self.room, room) {
            (Some(held), Some(more)) => held.merge(more),
            (held, more) => *held = held.take().or(more),
        }
    }

    /// Whether it is time to flush.
    pub(super) const fn is_full(&self) -> bool {
        self.bytes >= FRAME_BYTES
    }

    /// Journals what is new, then queues it for the engine: in memory, or if that is `crowded`, by its place in the
    /// journal. Returns when the events may be acknowledged.
    pub(super) async fn flush(&mut self, crowded: bool) {
        let journaled = self.append().await;
        self.bytes = 0;
        let events = std::mem::take(&mut self.fresh);
        let room = self.room.take();
        if events.is_empty() {
            return;
        }
        self.pass(match journaled {
            Some(place) if crowded => {
                Counters::add(&self.counters.spilled_frames);
                place
            }
            _ => Work::Events { events, room },
        });
    }

    /// Writes the batch, and says where it is; `None` if there is nothing to write or no journal to write to.
    async fn append(&mut self) -> Option<Work> {
        if self.batch.is_empty() {
            return None;
        }
        let mut writer = self.journal.take()?;
        let mut batch = std::mem::take(&mut self.batch);
        let written = tokio::task::spawn_blocking(move || {
            let at = writer.append(&batch);
            batch.clear();
            (writer, batch, at)
        });
        let error = match written.await {
            Ok((writer, batch, Ok(at))) => {
                self.batch = batch;
                let (file, path) = (writer.file(), writer.path());
                self.journal = Some(writer);
                return Some(Work::Journaled { file, path, at });
            }
            Ok((_, _, Err(error))) => JournalError::to_string(&error),
            Err(error) => error.to_string(),
        };
        self.journal_failed(&error);
        None
    }

    /// Queues the end behind the events. The receiver hears when the engine has been told, or an error if the
    /// engine panicked before.
    pub(super) fn end(&self, end: StreamEnd) -> oneshot::Receiver<()> {
        let (told, heard) = oneshot::channel();
        self.pass(Work::Ended { end, told });
        heard
    }

    /// Marks the journal as settled.
    pub(super) async fn settle(&mut self) {
        let Some(mut writer) = self.journal.take() else {
            return;
        };
        let marked = tokio::task::spawn_blocking(move || {
            let marked = writer.settle();
            (writer, marked)
        });
        if let Ok((writer, marked)) = marked.await {
            if let Err(error) = marked {
                tracing::warn!(stream = %self.key, %error, "journal can't be marked as settled");
            }
            self.journal = Some(writer);
        }
    }

    fn pass(&self, work: Work) {
        // Closed only at shutdown, or when the engine panicked; then the settlement goes unanswered.
        let _ = self.delivery.send(work);
    }

    /// The build goes on; only a restart would lose what is not journalled.
    fn journal_failed(&self, error: &str) -> Recovered {
        Counters::add(&self.counters.journal_failures);
        tracing::error!(stream = %self.key, error, "journalling stopped for this build; a restart would forget it");
        Recovered::default()
    }
}
