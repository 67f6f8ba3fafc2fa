//! Reads one connection, and passes its events to the stream's task.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, metadata::MetadataMap};

use super::{
    budget::{Reserved, Room, weight},
    command::{Command, Connection, Departure, Incoming},
    context::{Context, shutting_down},
    counters::Counters,
    inbound::{Inbound, Message},
    stream,
};
use crate::{
    bep::wire::Malformed, builds::StreamKey, journal::received::Received,
    proto::google::devtools::build::v1::PublishBuildToolEventStreamResponse,
};

type Acks = mpsc::UnboundedSender<Result<PublishBuildToolEventStreamResponse, Status>>;

/// Longest id taken from the network. Bazel's are UUIDs.
pub(super) const MAX_ID: usize = 1024;
/// How long a stream may be open without an event: it takes one of the places.
const FIRST_EVENT: Duration = Duration::from_secs(120);
/// A client half-closes right after its last event; the stream is closed when it has, or after so long.
const HALF_CLOSE_WAIT: Duration = Duration::from_secs(1);

/// Reads one connection.
pub(super) struct Reader {
    context: Arc<Context>,
    id: u64,
    /// Bytes of this connection's events in memory.
    room: Arc<Semaphore>,
    /// The engine was waited for once, in vain.
    stalled: bool,
    /// One of the streams that may be open.
    _place: OwnedSemaphorePermit,
}

impl Reader {
    pub(super) fn new(context: &Arc<Context>, id: u64, place: OwnedSemaphorePermit) -> Self {
        Self {
            room: Arc::new(Semaphore::new(context.options.stream_bytes)),
            context: Arc::clone(context),
            id,
            stalled: false,
            _place: place,
        }
    }

    pub(super) async fn run(mut self, headers: MetadataMap, mut inbound: Inbound, acks: Acks) {
        let shutdown = self.context.shutdown.clone();
        let first = tokio::time::timeout(FIRST_EVENT, inbound.message());
        let first = match shutdown.run_until_cancelled(first).await {
            Some(Ok(Ok(Some(first)))) => first,
            Some(Ok(Ok(None))) => return,
            Some(Ok(Err(status))) => return fail(&acks, self.context.received(status)),
            Some(Err(_)) => return fail(&acks, Status::deadline_exceeded("no events arrived")),
            None => return fail(&acks, shutting_down()),
        };
        let Message { bytes, room } = first;
        let (key, event) = match open(bytes) {
            Ok(admitted) => admitted,
            Err(status) => return fail(&acks, status),
        };
        Counters::add(&self.context.counters.connections);
        let most = self.context.options.limits.streams;
        let Some((key, stream)) = self.stream(key, &event, most).await else {
            return fail(&acks, self.context.refused("streams", most, "unsettled builds"));
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
        // A stream's task ends only when there is no handle to it, or at shutdown: its answers are on `acks` then.
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
                    let status = self.context.received(status);
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
        let context = Arc::clone(&self.context);
        let begins = event.sequence == 1;
        let newest = tokio::task::spawn_blocking(move || {
            let (newest, is_kept) = context.streams.newest(&key, context.journal.as_ref());
            // What is on record of a build outlives its journal: this is another one of the same ids.
            if begins && !is_kept && context.builds.is_done(&newest) {
                return newest.next_attempt();
            }
            newest
        });
        let mut key = newest.await.ok()?;
        loop {
            let stream = stream::open(&key, &self.context, most)?;
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
        let options = &self.context.options;
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
        let stream = match self.context.shutdown.run_until_cancelled(reserved).await? {
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
        Counters::add(&self.context.counters.stalls);
        tracing::warn!(
            connection = self.id,
            "events are processed too slowly; memory use exceeds the limit for events"
        );
    }
}

/// Checks a stream's first message, and says which stream it is.
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
        return Err(Status::invalid_argument("stream_id contains control characters"));
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
            "invalid sequence_number {}",
            event.sequence
        )));
    }
    Ok(event)
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

pub(super) fn malformed(error: Malformed) -> Status {
    Status::invalid_argument(format!("failed to decode the request: {error}"))
}
