//! A stream's new events on their way: into the journal first, then to the engine's queue and the upstream service's.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    time::Instant,
};
use tonic::metadata::MetadataMap;

use super::{
    budget::{Reserved, weight},
    context::Context,
    counters::Counters,
    delivery::{Delivery, RawEvent, Work},
    following::Following,
    hold::{HoldMode, HoldPolicy, Limit, Patience},
    upstream::{Outgoing, OutgoingEvent},
};
use crate::{
    builds::{StreamEnd, StreamKey},
    journal::{
        self, Batch, JournalError, RecordKind, Recovered, Replaying, StoredFrame, Writer, received::Received,
    },
    open_files,
};

/// A frame is closed when it holds this many bytes.
const FRAME_BYTES: usize = 4 << 20;

/// One stream's way in. Owned by the stream's task.
pub(super) struct Intake {
    key: StreamKey,
    counters: Arc<Counters>,
    /// `None` without journaling, or after it failed.
    journal: Option<Writer>,
    /// The journal after it failed: it can still be marked when nothing is left to do.
    failed: Option<Writer>,
    /// While the build is gone on with from the journal.
    replaying: Option<Replaying>,
    delivery: mpsc::UnboundedSender<Work>,
    upstream: Option<Way>,
    /// The upstream service does not get the rest, which has not been reported yet.
    given_up: bool,
    /// New events on their way to the journal.
    batch: Batch,
    /// The same, on their way to the engine, with their weight and the room that they hold.
    fresh: Vec<RawEvent>,
    bytes: usize,
    room: Option<Reserved>,
    /// As far as the engine has got with the events.
    patience: Patience,
    /// The hash of the request with number 1 of a journal that was there already.
    first: Option<blake3::Hash>,
}

/// The way upstream.
struct Way {
    queue: mpsc::UnboundedSender<Outgoing>,
    /// Bytes of all streams' events that may wait in memory; what finds no room is read back from the journal.
    budget: Arc<Semaphore>,
    /// The same where there is no journal to read them back from.
    unjournaled: Arc<Semaphore>,
    /// Bytes that it is for.
    most: usize,
    /// How long the build waits for room there.
    stall: Duration,
    /// New events on their way.
    fresh: Vec<OutgoingEvent>,
    /// Headers of the newest connection that the journal has not got.
    headers: Option<Bytes>,
}

impl Intake {
    /// Opens the stream's journal and says what is in it, and how far it has gone upstream. Without a journal, or when
    /// it cannot be opened, the stream goes on without one.
    pub(super) async fn open(key: &StreamKey, context: &Context) -> (Self, Recovered, Following) {
        let (delivery, queue) = mpsc::unbounded_channel();
        let patience = Patience::default();
        let task = Delivery {
            key: key.clone(),
            builds: Arc::clone(&context.builds),
            decoder: (context.decoders)(),
            patience: patience.clone(),
            counters: Arc::clone(&context.counters),
            budget: context.budget.clone(),
            undecodable: 0,
        };
        context.tasks.spawn(task.run(queue, context.shutdown.clone()));
        let mut intake = Self {
            key: key.clone(),
            counters: Arc::clone(&context.counters),
            journal: None,
            failed: None,
            replaying: None,
            delivery,
            upstream: None,
            given_up: false,
            batch: Batch::default(),
            fresh: Vec::new(),
            bytes: 0,
            room: None,
            patience,
            first: None,
        };
        let recovered = intake.open_journal(context).await;
        let following = intake.open_upstream(context, &recovered).await;
        (intake, recovered, following)
    }

    async fn open_journal(&mut self, context: &Context) -> Recovered {
        let Some(journal) = context.journal.clone() else {
            return Recovered::default();
        };
        let stream = self.key.clone();
        let opened = tokio::task::spawn_blocking(move || {
            open_files::patient(|| {
                // Before it is read.
                let replaying = journal.replaying(&stream);
                let (writer, recovered) = journal.stream(&stream)?;
                let first = first(&writer, &recovered);
                Ok::<_, JournalError>((replaying, first, writer, recovered))
            })
        });
        match opened.await {
            Ok(Ok((replaying, first, writer, recovered))) => {
                self.first = first;
                self.journal = Some(writer);
                self.replaying = replaying.filter(|_| recovered.highest.is_some());
                return recovered;
            }
            Ok(Err(error)) => self.journal_failed(&error.to_string()),
            Err(error) => self.journal_failed(&error.to_string()),
        }
        Recovered::default()
    }

    /// Starts the forwarder after what upstream has. A stream that is settled and finished needs none.
    async fn open_upstream(&mut self, context: &Context, recovered: &Recovered) -> Following {
        let Some(upstream) = &context.upstream else {
            return Following::nothing();
        };
        if recovered.settled && recovered.finished.is_some() {
            return Following::nothing();
        }
        let cursor = match (&context.journal, &self.journal) {
            (Some(journal), Some(_)) => Some(Arc::new(journal.cursor(&self.key).at(&upstream.name()))),
            _ => None,
        };
        let acked = match cursor.clone() {
            Some(cursor) => tokio::task::spawn_blocking(move || cursor.load())
                .await
                .unwrap_or(0),
            None => 0,
        };
        let save = move |acked| {
            if let Some(cursor) = &cursor {
                cursor.save(acked);
            }
        };
        let (queue, status) = upstream.forward(&context.surroundings(), &self.key, acked, Arc::new(save));
        self.upstream = Some(Way {
            queue,
            budget: Arc::clone(&context.outgoing),
            unjournaled: Arc::clone(&context.unjournaled),
            most: context.options.limits.queue,
            stall: context.options.stall,
            fresh: Vec::new(),
            headers: None,
        });
        let hold = context.options.hold;
        let mut following = Following::forwarder(status, hold.mode == HoldMode::Target && hold.strict);
        following.handed(recovered.highest.unwrap_or(0));
        following
    }

    /// The hash of the request with number 1, if the journal was there already and begins with it.
    pub(super) const fn first(&self) -> Option<blake3::Hash> {
        self.first
    }

    /// Hands the journal's events to the engine again, and upstream what it has not got.
    pub(super) fn replay(&self, recovered: &Recovered) {
        let (Some(writer), Some(highest)) = (&self.journal, recovered.highest) else {
            return;
        };
        tracing::info!(stream = %self.key, highest, "resumed a stream from the journal");
        for at in &recovered.frames {
            let Some(place) = writer.place(*at) else { return };
            if let Some(upstream) = &self.upstream {
                upstream.pass(Outgoing::from(place.clone()));
            }
            self.pass(Work::Journaled(place));
        }
    }

    /// Whether the build is being gone on with from the journal.
    pub(super) const fn is_replaying(&self) -> bool {
        self.replaying.is_some()
    }

    /// The journal answered every request, and no task panicked.
    pub(super) fn replayed(&mut self) {
        self.replaying = None;
    }

    /// Hands upstream what it has not got of a stream that the engine is done with, and its end.
    pub(super) fn replay_upstream(&self, recovered: &Recovered) {
        let (Some(writer), Some(upstream)) = (&self.journal, &self.upstream) else {
            return;
        };
        tracing::info!(stream = %self.key, "forwarding the rest of a settled build upstream");
        for at in &recovered.frames {
            if let Some(place) = writer.place(*at) {
                upstream.pass(Outgoing::from(place));
            }
        }
        upstream.pass(Outgoing::Ended(StreamEnd::Finished));
    }

    /// A connection's headers; its events come next.
    pub(super) fn connected(&mut self, headers: MetadataMap) {
        if let Some(upstream) = &mut self.upstream {
            upstream.headers = Some(journal::headers::encode(&headers));
            upstream.pass(Outgoing::Headers(headers));
        }
    }

    /// Takes a new event. All events between two flushes are of one connection.
    pub(super) fn push(&mut self, received_ms: u64, event: Received, room: Option<Reserved>) {
        self.bytes += event.request.len();
        if self.journal.is_some() {
            if let Some(headers) = self.upstream.as_mut().and_then(|u| u.headers.take()) {
                self.batch.push_headers(received_ms, event.sequence, &headers);
            }
            self.batch.push(received_ms, &event);
        }
        let Received {
            sequence,
            kind,
            bazel_event,
            request,
            ..
        } = event;
        if let Some(upstream) = &mut self.upstream {
            upstream.fresh.push(OutgoingEvent {
                sequence,
                kind,
                request,
            });
        }
        if let Some(bytes) = bazel_event {
            self.fresh.push((sequence, bytes));
        }
        match (&mut self.room, room) {
            (Some(held), Some(more)) => held.merge(more),
            (held, more) => *held = held.take().or(more),
        }
    }

    /// Says that events did not come, after those so far.
    pub(super) fn missing(&mut self, from: i64, before: i64) {
        self.pass(Work::Missing { from, before });
    }

    /// What ends the client's hold, for a last event that came then.
    pub(super) fn limit(&self, policy: &HoldPolicy, came: Instant) -> Limit {
        self.patience.limit(policy, came)
    }

    /// Whether a restart can go on with the stream.
    pub(super) const fn is_journaled(&self) -> bool {
        self.journal.is_some()
    }

    /// Whether the upstream service does not get the rest. Reported once.
    pub(super) fn has_given_up(&mut self) -> bool {
        std::mem::take(&mut self.given_up)
    }

    /// Whether it is time to flush.
    pub(super) const fn is_full(&self) -> bool {
        self.bytes >= FRAME_BYTES
    }

    /// Journals what is new, then queues it for the engine and for upstream: in memory, or if that is `crowded`, by
    /// its place in the journal. Returns when the events may be acknowledged.
    pub(super) async fn flush(&mut self, crowded: bool) {
        let place = self.append().await;
        self.bytes = 0;
        if let Some(upstream) = &mut self.upstream
            && !upstream.flush(place.as_ref()).await
        {
            tracing::error!(
                stream = %self.key,
                "the upstream event service is too slow and there is no journal to buffer in: it will not get \
                 the rest of this build (--limit=queue-memory=SIZE)"
            );
            self.upstream = None;
            self.given_up = true;
        }
        let events = std::mem::take(&mut self.fresh);
        let room = self.room.take();
        let crowded = crowded || room.as_ref().is_some_and(Reserved::is_large);
        if events.is_empty() {
            return;
        }
        self.pass(match place {
            Some(place) if crowded => {
                Counters::add(&self.counters.spilled_frames);
                Work::Journaled(place)
            }
            _ => Work::Events { events, room },
        });
    }

    /// Writes the batch, and says where it is; `None` if there is nothing to write or no journal to write to.
    async fn append(&mut self) -> Option<StoredFrame> {
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
                let place = writer.place(at);
                self.journal = Some(writer);
                return place;
            }
            Ok((writer, _, Err(error))) => {
                self.failed = Some(writer);
                if let JournalError::Full { limit, .. } = error {
                    self.pass(Work::Limited(format!(
                        "the build's journal reached the limit of {limit} bytes: outputs named after that are \
                         not downloaded (raise it with --limit=journal-size=SIZE)"
                    )));
                }
                error.to_string()
            }
            Err(error) => error.to_string(),
        };
        self.journal_failed(&error);
        None
    }

    /// No client is connected, but one may come back, and there may be many such streams: what can be opened again is
    /// closed.
    pub(super) fn let_go(&mut self) {
        if let Some(writer) = &mut self.journal {
            writer.close();
        }
        self.pass(Work::Lost);
    }

    /// Queues the end after the events. The receiver gets a message once the engine knows, or an error if the engine
    /// panicked before.
    pub(super) fn end(&self, end: StreamEnd) -> oneshot::Receiver<()> {
        if let Some(upstream) = &self.upstream {
            upstream.pass(Outgoing::Ended(end.clone()));
        }
        let (done, heard) = oneshot::channel();
        self.pass(Work::Ended { end, done });
        heard
    }

    /// Marks the journal as settled.
    pub(super) async fn settle(&mut self) {
        let failed = self.journal.is_none();
        let Some(mut writer) = self.journal.take().or_else(|| self.failed.take()) else {
            return;
        };
        let marked = tokio::task::spawn_blocking(move || {
            let marked = writer.settle();
            (writer, marked)
        });
        if let Ok((writer, marked)) = marked.await {
            if let Err(error) = marked {
                tracing::warn!(stream = %self.key, %error, "failed to mark the journal as settled");
            }
            let kept = if failed {
                &mut self.failed
            } else {
                &mut self.journal
            };
            *kept = Some(writer);
        }
    }

    fn pass(&self, work: Work) {
        // Closed only at shutdown, or when the engine panicked; then the settlement goes unanswered.
        let _ = self.delivery.send(work);
    }

    /// The build goes on; only a restart would lose what is not journaled.
    fn journal_failed(&self, error: &str) {
        Counters::add(&self.counters.journal_failures);
        tracing::error!(
            stream = %self.key, error,
            "stopped journaling this build: it continues from memory, and a restart would forget it"
        );
    }
}

/// The hash of the request with number 1, if a journal begins with it. Blocks.
fn first(writer: &Writer, recovered: &Recovered) -> Option<blake3::Hash> {
    let place = writer.place(*recovered.frames.first()?)?;
    let mut records = place.read().ok()?.into_iter();
    let first = records.find(|record| record.sequence == 1 && record.kind != RecordKind::Headers)?;
    Some(blake3::hash(&first.payload))
}

impl Way {
    /// Queues what is new. If memory is full, the journal has it, without waiting; without a journal, the
    /// build waits for room as it would for a slow event service. `false` if that takes too long.
    async fn flush(&mut self, place: Option<&StoredFrame>) -> bool {
        if self.fresh.is_empty() {
            return true;
        }
        let events = std::mem::take(&mut self.fresh);
        let bytes: usize = events.iter().map(|e| weight(e.request.len())).sum();
        let permits = u32::try_from(bytes);
        let room = match (permits, place) {
            (Ok(permits), Some(_)) => Arc::clone(&self.budget).try_acquire_many_owned(permits).ok(),
            (Err(_), Some(_)) => None,
            (_, None) => {
                // More than there is at all has to do with that.
                let permits = u32::try_from(bytes.min(self.most)).unwrap_or(u32::MAX);
                let room = Arc::clone(&self.unjournaled).acquire_many_owned(permits);
                match tokio::time::timeout(self.stall, room).await {
                    Ok(room) => room.ok(),
                    Err(_) => {
                        let why = "outhaul has no memory for more events".to_owned();
                        self.pass(Outgoing::Ended(StreamEnd::Broken(why)));
                        return false;
                    }
                }
            }
        };
        self.pass(match (room, place) {
            (None, Some(place)) => Outgoing::from(place.clone()),
            (room, _) => Outgoing::Events {
                events,
                room: room.map(Arc::new),
            },
        });
        true
    }

    fn pass(&self, outgoing: Outgoing) {
        // Closed only when the forwarder panicked; the journal stays unfinished then.
        let _ = self.queue.send(outgoing);
    }
}

impl From<StoredFrame> for Outgoing {
    fn from(place: StoredFrame) -> Self {
        let StoredFrame { file, path, at } = place;
        Self::Journaled { file, path, at }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use prost::Message as _;

    use super::*;
    use crate::proto::google::devtools::build::v1::build_event;
    use crate::{
        bes::{
            BesService,
            tests::harness::{Engine, decode, key, options, request},
        },
        journal::{Journal, JournalOptions},
    };

    fn event(sequence: i64) -> Received {
        let any = prost_types::Any {
            type_url: String::new(),
            value: sequence.to_string().into_bytes(),
        };
        let request = request("one", sequence, build_event::Event::BazelEvent(any));
        Received::read(request.encode_to_vec().into()).unwrap().unwrap()
    }

    fn service(engine: &Arc<Engine>, dir: &Path) -> BesService {
        let journal = Journal::open(dir, JournalOptions::default()).unwrap();
        BesService::new(
            engine.clone(),
            Arc::new(|| Box::new(decode)),
            Some(journal),
            None,
            options(HoldMode::None),
        )
    }

    #[tokio::test]
    async fn when_the_disk_is_full_a_stream_goes_on_from_memory_and_the_next_one_journals_again() {
        let dir = tempfile::tempdir().unwrap();
        let engine = Arc::new(Engine::open());
        let service = service(&engine, dir.path());
        let context = service.context();
        let (mut intake, ..) = Intake::open(&key("one"), context).await;
        for n in 1..=4 {
            if n == 3 {
                intake.journal.as_mut().unwrap().fill_the_disk();
            }
            intake.push(1, event(n), None);
            // Crowded or not: there is nowhere but memory.
            intake.flush(n == 4).await;
        }
        tokio::time::timeout(Duration::from_secs(20), intake.end(StreamEnd::Finished))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(engine.numbers(), [1, 2, 3, 4]);
        assert_eq!(service.counters().journal_failures, 1, "logged once");
        let journal = context.journal.as_ref().unwrap();
        assert!(!journal.find("one").unwrap().settled);
        intake.settle().await;
        assert!(journal.find("one").unwrap().settled, "that needs no room");

        let (mut intake, ..) = Intake::open(&key("two"), context).await;
        intake.push(1, event(1), None);
        intake.flush(false).await;
        let kept = |id| journal.read(id).unwrap().count();
        assert_eq!((kept("one"), kept("two")), (2, 1));
    }
}
