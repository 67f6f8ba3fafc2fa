//! The `PublishBuildEvent` service: reads connections and passes their events to the streams' tasks.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt as _, stream::BoxStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Code, Request, Response, Status, Streaming, metadata::MetadataMap};

use super::{
    budget::{Budget, Room},
    counted::Handed,
    counters::{Counters, CountersNow},
    hold::HoldPolicy,
    inbound::{Inbound, Message},
    lifecycle::{Call, Lifecycle},
    limits::BesLimits,
    raw::PublishBuildEvent,
    stream::{Command, Connection, Departure, Incoming, UPSTREAM_DRAIN},
    streams::Streams,
    upstream::{LifecycleEvent, Upstream},
};
use crate::{
    bep::wire::Malformed,
    builds::{Builds, Decoders, StreamKey},
    journal::{Entry, Journal, JournalError, MOST_LOST, received::Received},
    metrics::Count,
    proto::google::devtools::build::v1::PublishBuildToolEventStreamResponse,
};

/// How the service behaves.
#[derive(Debug, Clone, PartialEq)]
pub struct BesOptions {
    /// Holding.
    pub hold: HoldPolicy,
    /// How long a lost client may take to come back before the engine is told that no more events come. Bazel's
    /// retries wait 1, 1.6, 2.6 and 4.1 seconds.
    pub reconnect_grace: Duration,
    /// How long a settled stream's task stays, so that a late reconnection needs no look into the journal.
    pub linger: Duration,
    /// Bytes of one stream's events in memory.
    pub stream_bytes: usize,
    /// Without a journal to overflow into, how long a reader waits for an engine that takes nothing before it goes
    /// on beyond `stream_bytes`.
    pub stall: Duration,
    /// What clients may ask for.
    pub limits: BesLimits,
}

impl Default for BesOptions {
    fn default() -> Self {
        Self {
            hold: HoldPolicy::default(),
            reconnect_grace: Duration::from_secs(15),
            linger: Duration::from_secs(300),
            stream_bytes: 32 << 20,
            stall: Duration::from_secs(30),
            limits: BesLimits::default(),
        }
    }
}

/// What every connection and stream shares.
pub(super) struct Shared {
    pub(super) builds: Arc<dyn Builds>,
    pub(super) decoders: Decoders,
    pub(super) journal: Option<Journal>,
    pub(super) options: BesOptions,
    pub(super) counters: Arc<Counters>,
    pub(super) streams: Streams,
    /// Connections, streams and deliveries; they end at `shutdown`.
    pub(super) tasks: TaskTracker,
    pub(super) shutdown: CancellationToken,
    /// What takes events and calls upstream, if anything does.
    pub(super) upstream: Option<Upstream>,
    pub(super) lifecycle: Lifecycle,
    /// Bytes of events that may wait in memory for upstream, for all streams.
    pub(super) outgoing: Arc<Semaphore>,
    /// The same of streams without a journal, which is all there is of them.
    pub(super) unjournaled: Arc<Semaphore>,
    /// Memory for what clients send, until it has gone on.
    pub(super) budget: Budget,
    /// Streams that may still be opened.
    openings: Arc<Semaphore>,
    /// Forwarders; they end at `halt`, which comes a moment after `shutdown`.
    pub(super) forwards: TaskTracker,
    pub(super) halt: CancellationToken,
    connections: AtomicU64,
    /// Streams of answers that were not sent to their end yet.
    answers: TaskTracker,
}

/// The service. Cheap to clone.
#[derive(Clone)]
pub struct BesService {
    shared: Arc<Shared>,
}

/// Longest id taken from the network. Bazel's are UUIDs.
const MAX_ID: usize = 1024;
/// Bytes of events in memory that wait for upstream; the others are in the journal.
const OUTGOING: usize = 32 << 20;
/// How long a stream may be open without an event: it takes one of the places.
const FIRST_EVENT: Duration = Duration::from_secs(120);
/// A client half-closes right after its last event; the stream is closed when it has, or after so long.
const HALF_CLOSE_WAIT: Duration = Duration::from_secs(1);
/// How long the daemon has been up before it goes on with a build in whose replay another one died, and how long it has
/// eyes for that one alone. Whoever ends it during the start ends it for another reason.
const CAREFUL: Duration = Duration::from_secs(3);
const ALONE: Duration = Duration::from_secs(30);
/// How often it looks whether that is over.
const LOOK: Duration = Duration::from_millis(200);

impl BesService {
    /// A service without connections. Without a journal, nothing outlives the process. With an upstream service,
    /// streams and lifecycle calls are forwarded to it.
    #[must_use]
    pub fn new(
        builds: Arc<dyn Builds>,
        decoders: Decoders,
        journal: Option<Journal>,
        upstream: Option<Upstream>,
        options: BesOptions,
    ) -> Self {
        let limits = options.limits;
        let shared = Shared {
            budget: Budget::new(limits.queue),
            openings: Arc::new(Semaphore::new(limits.streams)),
            builds,
            decoders,
            journal,
            options,
            counters: Arc::default(),
            streams: Streams::default(),
            tasks: TaskTracker::new(),
            shutdown: CancellationToken::new(),
            upstream,
            lifecycle: Lifecycle::default(),
            outgoing: Arc::new(Semaphore::new(OUTGOING)),
            unjournaled: Arc::new(Semaphore::new(limits.queue)),
            forwards: TaskTracker::new(),
            halt: CancellationToken::new(),
            connections: AtomicU64::new(0),
            answers: TaskTracker::new(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Goes on from the journal: the events of every unfinished stream are handed to the engine again, then their
    /// end, unless their client comes back in time. What upstream has not got is sent there. Call it once, before
    /// serving. Returns how many streams it was. Those that a process has died of are gone on with a little later, one
    /// after the other, so that it is known which one it was if that happens again.
    ///
    /// # Errors
    /// When the journal can't be listed.
    pub async fn recover(&self) -> Result<usize, JournalError> {
        let Some(journal) = self.shared.journal.clone() else {
            return Ok(0);
        };
        let dir = journal.dir().to_owned();
        let listed = tokio::task::spawn_blocking(move || {
            let listed = journal.unfinished()?.into_iter();
            let counted = listed.map(|entry| (journal.lost_replays(&entry), entry));
            // What could not be set aside stays where it is.
            Ok(counted.filter(|(lost, _)| *lost < MOST_LOST).collect::<Vec<_>>())
        });
        let unfinished = listed
            .await
            .map_err(|e| JournalError::io("list", dir)(e.into()))??;
        let streams = unfinished.len();
        let shared = &self.shared;
        let (mut opened, mut suspects) = (Vec::new(), Vec::new());
        for (lost, entry) in unfinished {
            // Whoever asks about the build as soon as the doors are open must find it at work, however long its journal
            // takes to read: asking for its progress makes the engine know it.
            let (builds, key) = (Arc::clone(&shared.builds), entry.key.clone());
            let done = tokio::task::spawn_blocking(move || builds.is_done(&key)).await;
            if !done.unwrap_or(false) {
                let _ = shared.builds.progress(&entry.key).await;
            }
            if lost > 0 {
                suspects.push(entry);
            } else {
                opened.push(shared.take_up(&entry.key).await);
            }
        }
        let has_suspects = !suspects.is_empty();
        for answered in opened {
            // It does not answer only if it panicked.
            let _ = answered.await;
        }
        let (shared, stop) = (Arc::clone(shared), shared.shutdown.clone());
        let rest = async move {
            for entry in &suspects {
                shared.take_up_alone(entry).await;
            }
        };
        if has_suspects {
            self.shared.tasks.spawn(stop.run_until_cancelled_owned(rest));
        }
        Ok(streams)
    }

    #[cfg(test)]
    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// What clients may ask for.
    #[must_use]
    pub fn limits(&self) -> BesLimits {
        self.shared.options.limits
    }

    /// Memory for what clients send. Other services beside this one share it.
    #[must_use]
    pub fn budget(&self) -> Budget {
        self.shared.budget.clone()
    }

    /// Whether a client is still there that was not answered to the end.
    #[must_use]
    pub fn is_answering(&self) -> bool {
        !self.shared.answers.is_empty()
    }

    /// The counts.
    #[must_use]
    pub fn counters(&self) -> CountersNow {
        self.shared.counters.now()
    }

    /// The counts, for as long as the service lives, and behind it.
    pub fn counting(&self) -> impl Fn() -> Vec<Count> + Send + Sync + 'static {
        let counters = Arc::clone(&self.shared.counters);
        move || counters.each().collect()
    }

    /// Streams that are open, being settled, or ended a short while ago.
    #[must_use]
    pub fn streams(&self) -> usize {
        self.shared.streams.len()
    }

    /// Whether the upstream service still has to get something: also of builds that may go on.
    #[must_use]
    pub fn has_undelivered(&self) -> bool {
        self.shared
            .upstream
            .as_ref()
            .is_some_and(Upstream::has_undelivered)
    }

    /// Ends every connection: held ones with what they wait for (unless strict), others with `UNAVAILABLE`, so that
    /// Bazel tries again and finds the next daemon. Returns when all tasks are done. Unsettled streams stay
    /// unfinished in the journal.
    pub async fn close(&self) {
        self.shared.shutdown.cancel();
        self.shared.tasks.close();
        let halt = async {
            // Streams have their own patience with upstream. Calls that still wait are lost.
            let drained = self.shared.lifecycle.drained();
            if self.shared.upstream.as_ref().is_some_and(Upstream::is_healthy) {
                let _ = tokio::time::timeout(UPSTREAM_DRAIN, drained).await;
            }
        };
        tokio::join!(self.shared.tasks.wait(), halt);
        self.shared.halt.cancel();
        self.shared.forwards.close();
        self.shared.forwards.wait().await;
        if let Some(journal) = self.shared.journal.clone() {
            let _ = tokio::task::spawn_blocking(move || journal.forget_replays()).await;
        }
    }
}

#[tonic::async_trait]
impl PublishBuildEvent for BesService {
    /// Lifecycle events (build enqueued, invocation attempt started and finished, build finished) come on the
    /// component `CONTROLLER` and say nothing that the stream does not say as well; only upstream may want them.
    async fn publish_lifecycle_event(&self, request: Request<Bytes>) -> Result<Response<()>, Status> {
        let shared = &self.shared;
        Counters::add(&shared.counters.lifecycle_events);
        let (headers, _, request) = request.into_parts();
        let call = Call::read(&request).map_err(malformed)?;
        tracing::debug!(
            build_id = call.build_id,
            invocation_id = call.invocation_id,
            event = call.name,
            "lifecycle event"
        );
        if let Some(upstream) = &shared.upstream {
            if call.build_id.len() > MAX_ID {
                return Err(Status::invalid_argument("build_id is too long"));
            }
            let most = shared.options.limits.lifecycle_calls;
            if !shared.lifecycle.has_room(&shared.counters, most) {
                // Refusing it would fail the build because upstream is away.
                return Ok(Response::new(()));
            }
            let event = LifecycleEvent {
                opening: call.opening,
                _pending: shared.lifecycle.count(&request),
                request,
                headers,
            };
            upstream.lifecycle(shared, &call.build_id, event);
        }
        Ok(Response::new(()))
    }

    type PublishBuildToolEventStreamStream =
        BoxStream<'static, Result<PublishBuildToolEventStreamResponse, Status>>;

    async fn publish_build_tool_event_stream(
        &self,
        request: Request<Streaming<Bytes>>,
    ) -> Result<Response<Self::PublishBuildToolEventStreamStream>, Status> {
        if self.shared.shutdown.is_cancelled() {
            return Err(shutting_down());
        }
        let most = self.shared.options.limits.streams;
        let Ok(place) = Arc::clone(&self.shared.openings).try_acquire_owned() else {
            return Err(self.shared.refused("streams", most, "streams are open"));
        };
        // Unbounded, but of small items: a client has at most one acknowledgement per event that it sent.
        let (acks, responses) = mpsc::unbounded_channel();
        let reader = Reader {
            shared: Arc::clone(&self.shared),
            id: self.shared.connections.fetch_add(1, Ordering::Relaxed),
            room: Arc::new(Semaphore::new(self.shared.options.stream_bytes)),
            stalled: false,
            _place: place,
        };
        let (headers, extensions, _) = request.into_parts();
        let mut inbound = extensions
            .get::<Handed>()
            .and_then(Handed::take)
            .ok_or_else(|| Status::internal("the stream has no messages; this is a bug in outhaul"))?;
        inbound.stalling(self.shared.options.stall, self.shared.journal.is_some());
        self.shared.tasks.spawn(reader.run(headers, inbound, acks));
        let open = self.shared.answers.token();
        let responses = UnboundedReceiverStream::new(responses).inspect(move |_| _ = &open);
        Ok(Response::new(responses.boxed()))
    }
}

pub(super) fn shutting_down() -> Status {
    Status::unavailable("outhaul is shutting down")
}

fn malformed(error: Malformed) -> Status {
    Status::invalid_argument(format!("the request can't be decoded: {error}"))
}

type Acks = mpsc::UnboundedSender<Result<PublishBuildToolEventStreamResponse, Status>>;

/// Room for events: in the budget of their connection, and in that of all.
pub(super) struct Reserved {
    stream: Option<OwnedSemaphorePermit>,
    all: Room,
}

impl Reserved {
    /// See [`Room::is_large`].
    pub(super) const fn is_large(&self) -> bool {
        self.all.is_large()
    }

    pub(super) fn merge(&mut self, other: Self) {
        match (&mut self.stream, other.stream) {
            (Some(held), Some(more)) => held.merge(more),
            (held, more) => *held = held.take().or(more),
        }
        self.all.merge(other.all);
    }
}

/// Reads one connection.
struct Reader {
    shared: Arc<Shared>,
    id: u64,
    /// Bytes of this connection's events in memory.
    room: Arc<Semaphore>,
    /// The engine was waited for once, in vain.
    stalled: bool,
    /// One of the streams that may be open.
    _place: OwnedSemaphorePermit,
}

impl Reader {
    async fn run(mut self, headers: MetadataMap, mut inbound: Inbound, acks: Acks) {
        let shutdown = self.shared.shutdown.clone();
        let first = tokio::time::timeout(FIRST_EVENT, inbound.message());
        let first = match shutdown.run_until_cancelled(first).await {
            Some(Ok(Ok(Some(first)))) => first,
            Some(Ok(Ok(None))) => return,
            Some(Ok(Err(status))) => return fail(&acks, self.shared.received(status)),
            Some(Err(_)) => return fail(&acks, Status::deadline_exceeded("no event came")),
            None => return fail(&acks, shutting_down()),
        };
        let Message { bytes, room } = first;
        let (key, event) = match open(bytes) {
            Ok(admitted) => admitted,
            Err(status) => return fail(&acks, status),
        };
        Counters::add(&self.shared.counters.connections);
        let most = self.shared.options.limits.streams;
        let Some((key, stream)) = self.stream(key, &event, most).await else {
            return fail(
                &acks,
                self.shared.refused("streams", most, "builds are not settled"),
            );
        };
        let released = CancellationToken::new();
        let connection = Connection {
            id: self.id,
            acks: acks.clone(),
            released: released.clone(),
            room: Arc::clone(&self.room),
            headers,
        };
        tracing::debug!(stream = %key, connection = self.id, from = event.sequence, "stream opened");
        // A stream's task ends only when nobody has a way to it, or at shutdown: its answers are on `acks` then.
        if stream.send(Command::Attach(connection)).await.is_err() {
            return fail(&acks, shutting_down());
        }
        let mut event = Some((event, room));
        let closing = released_for(&released);
        tokio::pin!(closing);
        let departure = loop {
            if let Some((event, room)) = event.take() {
                let room = self.reserve(&event, room).await;
                let incoming = Incoming {
                    connection: self.id,
                    received_ms: crate::journal::now_ms(),
                    event,
                    room,
                };
                if stream.send(Command::Event(incoming)).await.is_err() {
                    return fail(&acks, shutting_down());
                }
            }
            let message = tokio::select! {
                message = inbound.message() => message,
                () = &mut closing => break Departure::HalfClosed,
            };
            match message {
                Ok(Some(Message { bytes, room })) => match admit(bytes, &key) {
                    Ok(next) => event = Some((next, room)),
                    Err(status) => {
                        let why = status.message().to_owned();
                        fail(&acks, status);
                        break Departure::Cancelled(why);
                    }
                },
                Ok(None) => break Departure::HalfClosed,
                Err(status) => {
                    let status = self.shared.received(status);
                    let departure = departure(&status);
                    fail(&acks, status);
                    break departure;
                }
            }
        };
        let _ = stream.send(Command::Gone(self.id, departure)).await;
    }

    /// The way to the stream that a client's first event belongs to: the newest with its ids, or a new one where that
    /// has begun with another event.
    async fn stream(
        &self,
        key: StreamKey,
        event: &Received,
        most: usize,
    ) -> Option<(StreamKey, mpsc::Sender<Command>)> {
        let shared = Arc::clone(&self.shared);
        let newest =
            tokio::task::spawn_blocking(move || shared.streams.newest(&key, shared.journal.as_ref()));
        let mut key = newest.await.ok()?;
        loop {
            let stream = self.shared.streams.open(&key, &self.shared, most)?;
            if event.sequence != 1 {
                return Some((key, stream));
            }
            let (answer, answered) = oneshot::channel();
            let request = event.request.clone();
            // A stream that does not answer is at its end with the process.
            if stream.send(Command::Begins(request, answer)).await.is_err() || answered.await != Ok(true) {
                return Some((key, stream));
            }
            key = key.next_attempt();
        }
    }

    /// Waits until the connection may have one more event in memory, which has its room in the budget of all already. An
    /// engine that takes nothing for too long costs memory, not the build: an unread last event would hang it without a
    /// deadline.
    async fn reserve(&mut self, event: &Received, all: Option<Room>) -> Option<Reserved> {
        // Never more than a slow engine leaves: from half of it on, what comes is queued by its place in the journal.
        let options = &self.shared.options;
        let most = options.stream_bytes / 2;
        let bytes = u32::try_from(weight(event.request.len()).min(most)).unwrap_or(u32::MAX);
        let Some(all) = all else {
            self.stall();
            return None;
        };
        if self.stalled {
            return Some(Reserved { stream: None, all });
        }
        let reserved = tokio::time::timeout(options.stall, Arc::clone(&self.room).acquire_many_owned(bytes));
        let stream = match self.shared.shutdown.run_until_cancelled(reserved).await? {
            Ok(stream) => stream.ok(),
            Err(_) => {
                self.stall();
                None
            }
        };
        Some(Reserved { stream, all })
    }

    fn stall(&mut self) {
        if std::mem::replace(&mut self.stalled, true) {
            return;
        }
        Counters::add(&self.shared.counters.stalls);
        tracing::warn!(
            connection = self.id,
            "events are taken too slowly; memory use goes beyond what is meant for them"
        );
    }
}

impl Shared {
    /// Makes a stream take up its journal; answered when it has.
    async fn take_up(self: &Arc<Self>, key: &StreamKey) -> oneshot::Receiver<()> {
        let (answer, answered) = oneshot::channel();
        let _ = self.streams.sender(key, self).send(Command::Opened(answer)).await;
        answered
    }

    /// The same of one that a process has died of, after a while; returns when it has come through, or a while later.
    async fn take_up_alone(self: &Arc<Self>, entry: &Entry) {
        tracing::warn!(
            stream = %entry.key,
            "outhaul died while it went on with this build; it is gone on with in {CAREFUL:?}, and if outhaul dies of that \
             again, its journal is set aside"
        );
        tokio::time::sleep(CAREFUL).await;
        let _ = self.take_up(&entry.key).await.await;
        let through = async {
            while let Some(journal) = self.journal.clone() {
                let entry = entry.clone();
                let lost = tokio::task::spawn_blocking(move || journal.lost_replays(&entry)).await;
                if lost.unwrap_or(0) == 0 {
                    return;
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        let _ = tokio::time::timeout(ALONE, through).await;
    }

    /// Refuses one client that asks for more than there is for all; it may try again.
    fn refused(&self, limit: &str, most: usize, what: &str) -> Status {
        Counters::add(&self.counters.refused);
        tracing::warn!("a client was refused: {most} {what} (--limit={limit}=NUMBER)");
        Status::resource_exhausted(format!(
            "{most} {what}, and outhaul takes no more (--limit={limit}=NUMBER)"
        ))
    }

    /// What is told of a message that did not come. One that is too large will be so again: `INVALID_ARGUMENT` keeps a
    /// build tool from trying.
    fn received(&self, status: Status) -> Status {
        if status.code() != Code::OutOfRange {
            return status;
        }
        Counters::add(&self.counters.refused);
        let most = self.options.limits.message;
        tracing::warn!("a request was refused: it is larger than {most} bytes (--limit=message-size=SIZE)");
        Status::invalid_argument(format!(
            "the request is larger than {most} bytes, and outhaul takes no larger ones (--limit=message-size=SIZE)"
        ))
    }

    /// How long a settled stream's task stays.
    pub(super) fn linger(&self) -> Duration {
        if self.streams.is_crowded(self.options.limits.streams) {
            Duration::ZERO
        } else {
            self.options.linger
        }
    }

    /// Whether little is left of the memory for events.
    pub(super) fn is_crowded(&self) -> bool {
        self.budget.is_crowded()
    }
}

/// Checks a stream's first message, and tells which stream it is.
fn open(message: Bytes) -> Result<(StreamKey, Received), Status> {
    let event = read(message)?;
    let id = event
        .stream_id
        .as_ref()
        .ok_or_else(|| Status::invalid_argument("stream_id is missing"))?;
    if id.build_id.len().max(id.invocation_id.len()) > MAX_ID {
        return Err(Status::invalid_argument("stream_id is too long"));
    }
    // They are in every line of the log. (A build tool may give each byte beyond ASCII as a character, so others are not
    // refused.)
    if [&id.build_id, &id.invocation_id]
        .iter()
        .any(|id| id.contains(|c: char| c.is_ascii_control()))
    {
        return Err(Status::invalid_argument("stream_id has control characters"));
    }
    let key = StreamKey {
        build_id: id.build_id.clone(),
        invocation_id: id.invocation_id.clone(),
        ..StreamKey::default()
    };
    Ok((key, event))
}

/// Checks a later message; it may leave the stream's name out.
fn admit(message: Bytes, key: &StreamKey) -> Result<Received, Status> {
    let event = read(message)?;
    match &event.stream_id {
        Some(id) if id.build_id != key.build_id || id.invocation_id != key.invocation_id => {
            Err(Status::invalid_argument("stream_id changed within a stream"))
        }
        _ => Ok(event),
    }
}

fn read(message: Bytes) -> Result<Received, Status> {
    let event = Received::read(message)
        .map_err(malformed)?
        .ok_or_else(|| Status::invalid_argument("ordered_build_event is missing"))?;
    // The protocol counts from 1. The largest number means "all of them" here.
    if event.sequence < 1 || event.sequence == i64::MAX {
        return Err(Status::invalid_argument(format!(
            "sequence_number {} is none",
            event.sequence
        )));
    }
    Ok(event)
}

/// Bytes that a request of this size takes in memory, roughly.
pub(super) const fn weight(len: usize) -> usize {
    len + 256
}

/// Tells the client, if it is still there.
fn fail(acks: &Acks, status: Status) {
    let _ = acks.send(Err(status));
}

/// A client that reset its stream meant it; anything else may be the network, and the client may come back.
fn departure(status: &Status) -> Departure {
    match status.code() {
        Code::Cancelled => Departure::Cancelled("the client cancelled the stream".to_owned()),
        _ => Departure::Lost(status.message().to_owned()),
    }
}

async fn released_for(released: &CancellationToken) {
    released.cancelled().await;
    tokio::time::sleep(HALF_CLOSE_WAIT).await;
}
