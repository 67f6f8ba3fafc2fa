//! One stream: its numbers, its acknowledgements and its hold, all owned by one task.
//!
//! Events go through in this order: journal, queues of the engine and of the upstream service, acknowledgement. What
//! came in while a write was busy is written together. The engine is called from other tasks, so that
//! neither a slow nor a broken engine delays an acknowledgement beyond the hold's deadline. Only the last
//! acknowledgement is ever held: until the engine is done and, while the upstream service takes what it is sent, until
//! it has acknowledged everything.

mod client;
mod waiting;

use std::{sync::Arc, time::Duration};

use futures::FutureExt as _;
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tokio_util::task::AbortOnDropHandle;

use self::waiting::{after, caught_up, done, later, left, settled, sleep_until, stopped};
use super::{
    command::{Command, Connection, Incoming},
    context::{Context, shutting_down},
    counters::Counters,
    following::Following,
    hold::HoldMode,
    intake::Intake,
    streams::StreamSlot,
};
use crate::{
    builds::{Settlement, StreamEnd, StreamKey},
    journal::{RecordKind, Recovered},
    proto::google::devtools::build::v1::{PublishBuildToolEventStreamResponse, StreamId},
};

/// Where a stream is in its life.
enum Phase {
    /// Events may come. While no client is connected, `give_up` says until when one may come back.
    Open { give_up: Instant, why: String },
    /// The engine knows that no more events come. With `finish`, it was the event of that number that said so;
    /// else the client went away, and a new event re-opens the stream.
    Settling {
        finish: Option<i64>,
        since: Instant,
        settling: AbortOnDropHandle<Option<Settlement>>,
    },
    /// Every required output is there or has failed; `None` if the engine never said. The task goes at `forget`, if
    /// upstream has everything.
    Settled {
        finish: Option<i64>,
        settlement: Option<Settlement>,
        forget: Instant,
    },
}

impl Phase {
    /// The engine's answer, while it is awaited.
    const fn settling(&mut self) -> Option<&mut AbortOnDropHandle<Option<Settlement>>> {
        match self {
            Self::Settling { settling, .. } => Some(settling),
            Self::Open { .. } | Self::Settled { .. } => None,
        }
    }
}

/// A client's last acknowledgement, held back.
struct Held {
    ack: PublishBuildToolEventStreamResponse,
    since: Instant,
    /// What the time that ends the hold is counted from.
    counted_from: Instant,
}

struct Stream {
    key: StreamKey,
    context: Arc<Context>,
    phase: Phase,
    /// The highest number seen.
    highest: Option<i64>,
    /// The hash of the request with number 1, once it was seen in this life of the process.
    first: Option<blake3::Hash>,
    /// How many times numbers were left out.
    gaps: u64,
    connection: Option<Connection>,
    /// Whether there was a connection in this life of the process.
    had_client: bool,
    held: Option<Held>,
    intake: Intake,
    following: Following,
    /// While optional outputs of a settled build are on their way.
    rest: Option<AbortOnDropHandle<()>>,
    /// While what the journal of a stream that may go on has asked for is on its way.
    replaying: Option<AbortOnDropHandle<()>>,
    /// The number of the finishing event, until it is flushed.
    finishing: Option<i64>,
    /// What to acknowledge at the next flush; `true` for the event that finishes the stream.
    unacked: Vec<(PublishBuildToolEventStreamResponse, bool)>,
    /// While a client is there, or the build is not settled.
    place: Option<StreamSlot>,
}

/// How long a client's last acknowledgement waits for a healthy upstream service, however long it may wait for outputs.
pub(super) const UPSTREAM_WAIT: Duration = Duration::from_secs(10 * 60);

/// How long a healthy upstream service may take for the rest at a shutdown.
pub(super) const UPSTREAM_DRAIN: Duration = Duration::from_secs(5);

/// How many gaps of a stream are logged, and told to the engine.
const LOGGED: u64 = 3;

/// Commands handled between two looks at everything else.
const COMMANDS: usize = 512;

/// Why the task woke.
enum Wake {
    Commands,
    Settled(Option<Settlement>),
    Upstream,
    Done,
    Replayed,
    Deadline,
    ClientLeft,
    Shutdown,
}

/// The handle to a stream's task, which is started if it does not run.
pub(super) fn task(key: &StreamKey, context: &Arc<Context>) -> mpsc::Sender<Command> {
    context.streams.sender(key, |commands, place| {
        let stream = Stream::run(key.clone(), Arc::clone(context), commands, place);
        context.tasks.spawn(stream);
    })
}

/// The same for a client's stream, which is not begun when there are `most` already.
pub(super) fn open(key: &StreamKey, context: &Arc<Context>, most: usize) -> Option<mpsc::Sender<Command>> {
    context.streams.may_open(key, most).then(|| task(key, context))
}

impl Stream {
    /// A stream's task.
    async fn run(
        key: StreamKey,
        context: Arc<Context>,
        mut commands: mpsc::Receiver<Command>,
        place: StreamSlot,
    ) {
        let mut stream = Self::open(key, context, place).await;
        let (shutdown, hurry) = (stream.context.shutdown.clone(), stream.context.hurry.clone());
        let clients_ended = stream.context.clients_ended.clone();
        let builds = Arc::clone(&stream.context.builds);
        let mut received = Vec::with_capacity(COMMANDS);
        loop {
            stream.keep_place();
            let held = stream.held.as_ref().filter(|_| stream.awaits_outputs());
            let awaited = held.map(|held| (&*builds, held.counted_from));
            let deadline = stream.deadline();
            let wake = tokio::select! {
                biased;
                () = shutdown.cancelled() => Wake::Shutdown,
                _ = commands.recv_many(&mut received, COMMANDS) => Wake::Commands,
                settlement = settled(stream.phase.settling()) => Wake::Settled(settlement),
                () = stream.following.changed() => Wake::Upstream,
                () = done(&mut stream.rest) => Wake::Done,
                () = done(&mut stream.replaying) => Wake::Replayed,
                () = sleep_until(deadline) => Wake::Deadline,
                () = hurry.cancelled(), if stream.held.is_some() => Wake::Deadline,
                () = clients_ended.cancelled(), if stream.awaits_client() => Wake::Deadline,
                () = stopped(awaited) => Wake::Deadline,
                () = left(stream.held.as_ref().and(stream.connection.as_ref())) => Wake::ClientLeft,
            };
            match wake {
                Wake::Commands => stream.handle(&mut received).await,
                Wake::Settled(settlement) => stream.settled(settlement).await,
                Wake::Upstream => stream.forwarded().await,
                Wake::Done => {
                    stream.rest = None;
                    stream.conclude().await;
                }
                Wake::Replayed => {
                    stream.replaying = None;
                    stream.intake.replayed();
                }
                Wake::Deadline => {
                    if stream.overdue() && stream.context.streams.retire(&stream.key, &commands) {
                        return;
                    }
                }
                Wake::ClientLeft => stream.leave(),
                Wake::Shutdown => return stream.shut_down().await,
            }
        }
    }

    /// Takes up what the journal has of the stream.
    async fn open(key: StreamKey, context: Arc<Context>, place: StreamSlot) -> Self {
        let (intake, recovered, following) = Intake::open(&key, &context).await;
        let mut stream = Self {
            phase: Phase::Open {
                give_up: after(context.options.reconnect_grace),
                why: "the client did not reconnect".to_owned(),
            },
            key,
            context,
            highest: recovered.highest,
            first: None,
            gaps: 0,
            connection: None,
            had_client: false,
            held: None,
            intake,
            following,
            rest: None,
            replaying: None,
            finishing: None,
            unacked: Vec::new(),
            place: Some(place),
        };
        let (builds, key) = (Arc::clone(&stream.context.builds), stream.key.clone());
        let done = tokio::task::spawn_blocking(move || builds.is_done(&key)).await;
        stream.take_up(recovered, done.unwrap_or(false));
        stream
    }

    /// The engine gets the events of an unsettled stream again. A settled one needs that only if more can come, or
    /// if its result matters to the client, for the journal does not keep it. One that the engine was `done` with, which
    /// upstream has not got yet, must not be done again: its outputs may have changed since.
    fn take_up(&mut self, recovered: Recovered, done: bool) {
        let settled = recovered.settled && recovered.finished.is_some();
        if settled || (done && recovered.finished.is_some()) {
            self.intake.replayed();
        }
        if settled && !self.context.options.hold.strict {
            self.phase = Phase::Settled {
                finish: recovered.finished,
                settlement: Some(Settlement::default()),
                forget: after(self.context.linger()),
            };
            return;
        }
        if done && recovered.finished.is_some() {
            self.intake.replay_upstream(&recovered);
            self.await_settlement(recovered.finished, None);
            return;
        }
        self.intake.replay(&recovered);
        if recovered.highest.is_some() && recovered.finished.is_none() {
            self.intake.let_go();
        }
        if recovered.finished.is_some() {
            self.end(StreamEnd::Finished, recovered.finished);
        } else if let Some(highest) = recovered.highest.filter(|_| self.intake.is_replaying()) {
            self.replaying = Some(AbortOnDropHandle::new(tokio::spawn(caught_up(
                self.context.builds.progress(&self.key),
                highest,
            ))));
        }
    }

    async fn handle(&mut self, received: &mut Vec<Command>) {
        for command in received.drain(..) {
            match command {
                Command::Event(incoming) => {
                    self.take(incoming).await;
                    if self.intake.is_full() {
                        self.flush().await;
                    }
                }
                Command::Attach(connection) => {
                    self.flush().await;
                    self.attach(connection);
                }
                Command::Gone(id, departure) => {
                    self.flush().await;
                    self.gone(id, departure);
                }
                Command::Opened(answer) => {
                    let _ = answer.send(());
                }
                Command::Begins(request, answer) => {
                    self.flush().await;
                    let is_another = self.began_with_another(&request);
                    if is_another {
                        self.make_way();
                    }
                    let _ = answer.send(is_another);
                }
            }
        }
        self.flush().await;
    }

    /// Puts an event into the batch, if it is new, and its acknowledgement after it.
    async fn take(&mut self, incoming: Incoming) {
        if self
            .connection
            .as_ref()
            .is_none_or(|c| c.id != incoming.connection)
        {
            // Another connection took over; it brings the event again.
            return;
        }
        let Incoming {
            received_ms,
            mut event,
            room,
            ..
        } = incoming;
        let sequence = event.sequence;
        let finishes = event.kind == RecordKind::Finished;
        let stream_id = event.stream_id.take().unwrap_or_else(|| self.id());
        if self.is_new(sequence) {
            let next = self.highest.unwrap_or(0).saturating_add(1);
            if sequence > next {
                self.miss(next, sequence).await;
            }
            Counters::add(&self.context.counters.events);
            self.highest = Some(sequence);
            self.reopen();
            if finishes {
                self.finishing = Some(sequence);
            }
            self.following.handed(sequence);
            if sequence == 1 {
                self.first = Some(blake3::hash(&event.request));
            }
            self.intake.push(received_ms, event, room);
        } else {
            Counters::add(&self.context.counters.duplicates);
        }
        let ack = PublishBuildToolEventStreamResponse {
            stream_id: Some(stream_id),
            sequence_number: sequence,
        };
        self.unacked.push((ack, finishes));
    }

    /// Counts events that did not come, and says so after those that did.
    async fn miss(&mut self, from: i64, before: i64) {
        Counters::add(&self.context.counters.gaps);
        self.gaps += 1;
        if self.gaps > LOGGED {
            return;
        }
        tracing::warn!(
            stream = %self.key, sequence = before, highest = self.highest,
            "events are missing; outputs that only they name are not downloaded"
        );
        self.flush().await;
        self.intake.missing(from, before);
    }

    /// Whether an event was not seen before. Nothing is new after the event that finishes a stream.
    fn is_new(&self, sequence: i64) -> bool {
        let finished = match &self.phase {
            Phase::Open { .. } => self.finishing,
            Phase::Settling { finish, .. } | Phase::Settled { finish, .. } => *finish,
        };
        finished.is_none() && self.highest.is_none_or(|highest| sequence > highest)
    }

    /// A broken stream goes on.
    fn reopen(&mut self) {
        if !matches!(self.phase, Phase::Open { .. }) {
            tracing::info!(stream = %self.key, "resumed a broken stream");
            self.rest = None;
            self.intake.replayed();
            self.phase = Phase::Open {
                give_up: after(self.context.options.reconnect_grace),
                why: String::new(),
            };
        }
    }

    /// Journals what is new, hands it over, then acknowledges.
    async fn flush(&mut self) {
        let half = self.context.options.stream_bytes / 2;
        let crowded = self
            .connection
            .as_ref()
            .is_some_and(|c| c.room.available_permits() < half || self.context.is_crowded());
        self.intake.flush(crowded).await;
        if self.intake.has_given_up() {
            self.following = Following::nothing();
        }
        if let Some(sequence) = self.finishing.take() {
            Counters::add(&self.context.counters.finished);
            self.end(StreamEnd::Finished, Some(sequence));
        }
        for (ack, finishes) in std::mem::take(&mut self.unacked) {
            if finishes {
                let since = Instant::now();
                let counted_from = match &self.phase {
                    Phase::Settling { since, .. } => *since,
                    // Upstream may still be waited for.
                    Phase::Open { .. } | Phase::Settled { .. } => since,
                };
                self.held = Some(Held {
                    ack,
                    since,
                    counted_from,
                });
                self.try_release();
                self.say_held();
            } else if let Some(connection) = &self.connection {
                let _ = connection.acks.send(Ok(ack));
            }
        }
    }

    /// Tells the engine that no more events come, and asks when it is done.
    fn end(&mut self, end: StreamEnd, finish: Option<i64>) {
        if let StreamEnd::Broken(why) = &end {
            Counters::add(&self.context.counters.broken);
            tracing::info!(stream = %self.key, why, "stream broken");
        }
        let heard = self.intake.end(end);
        self.await_settlement(finish, Some(heard));
    }

    /// Asks when the engine is done, once it has `heard` of the stream's end, if it still has to.
    fn await_settlement(&mut self, finish: Option<i64>, heard: Option<oneshot::Receiver<()>>) {
        let builds = Arc::clone(&self.context.builds);
        let key = self.key.clone();
        let settling = tokio::spawn(async move {
            if let Some(heard) = heard {
                heard.await.ok()?;
            }
            Some(builds.settled(&key).await)
        });
        self.phase = Phase::Settling {
            finish,
            since: Instant::now(),
            settling: AbortOnDropHandle::new(settling),
        };
    }

    /// The engine is done, or will never say.
    async fn settled(&mut self, settlement: Option<Settlement>) {
        let Phase::Settling { finish, .. } = self.phase else {
            return;
        };
        if settlement.is_none() {
            tracing::error!(stream = %self.key, "the engine failed; the build's outputs may be missing");
        } else {
            let mut done = self.context.builds.done(&self.key);
            if (&mut done).now_or_never().is_none() {
                self.rest = Some(AbortOnDropHandle::new(tokio::spawn(done)));
            }
        }
        self.phase = Phase::Settled {
            finish,
            settlement,
            forget: after(self.context.linger()),
        };
        self.conclude().await;
        self.try_release();
    }

    /// Upstream got something, or cannot be reached any more.
    async fn forwarded(&mut self) {
        self.conclude().await;
        self.try_release();
    }

    /// Marks the journal when nothing is left to do: the engine is done, also with what is optional, and upstream has
    /// everything.
    async fn conclude(&mut self) {
        let finished = self.following.is_finished() && self.rest.is_none();
        if let Phase::Settled {
            settlement: Some(_), ..
        } = &self.phase
            && self.rest.is_none()
        {
            self.replaying = None;
            self.intake.replayed();
        }
        if let Phase::Settled {
            settlement: Some(_),
            forget,
            ..
        } = &mut self.phase
            && finished
        {
            *forget = after(self.context.linger());
            self.intake.settle().await;
        }
    }

    /// Holds a place while there is work, or events wait for upstream in memory alone.
    fn keep_place(&mut self) {
        let settled = matches!(self.phase, Phase::Settled { .. }) && self.connection.is_none();
        if settled && (self.following.is_finished() || self.intake.is_journaled()) {
            self.place = None;
        } else if self.place.is_none() {
            self.place = Some(self.context.streams.place());
        }
    }

    /// Tells the engine of a hold that has just begun.
    fn say_held(&self) {
        if let Some(held) = &self.held {
            let limit = self.intake.limit(&self.context.options.hold, held.counted_from);
            let left = limit.after.saturating_sub(held.counted_from.elapsed());
            self.context.builds.holds(&self.key, left, &limit.to_string());
        }
    }

    /// Whether a client that has lost its connection may come back.
    const fn awaits_client(&self) -> bool {
        self.had_client
            && matches!(self.phase, Phase::Open { .. })
            && self.connection.is_none()
            && self.held.is_none()
    }

    /// Whether a client waits for the engine's answer.
    const fn awaits_outputs(&self) -> bool {
        self.held.is_some() && matches!(self.phase, Phase::Settling { .. })
    }

    /// When to wake if nothing happens.
    fn deadline(&self) -> Option<Instant> {
        if let Some(held) = &self.held {
            let limit = self.intake.limit(&self.context.options.hold, held.counted_from);
            let after = match self.phase {
                Phase::Settled { .. } => limit.after.min(UPSTREAM_WAIT),
                Phase::Open { .. } | Phase::Settling { .. } => limit.after,
            };
            return Some(later(held.counted_from, after));
        }
        match &self.phase {
            Phase::Open { give_up, .. } => self.connection.is_none().then_some(*give_up),
            Phase::Settling { .. } => None,
            Phase::Settled { forget, .. } => {
                let concluded = self.following.is_finished() && self.rest.is_none();
                (self.connection.is_none() && concluded).then_some(*forget)
            }
        }
    }

    /// The deadline came; `true` if it was the stream's own.
    fn overdue(&mut self) -> bool {
        if self.held.is_some() {
            self.try_release();
            return false;
        }
        match &mut self.phase {
            Phase::Open { why, .. } => {
                let why = std::mem::take(why);
                self.end(StreamEnd::Broken(why), None);
                false
            }
            Phase::Settling { .. } => false,
            Phase::Settled { forget, .. } => {
                // In case a client is just about to attach.
                *forget = after(self.context.linger());
                true
            }
        }
    }

    /// Lets the client go, and gives upstream a moment for the rest. What is not settled, or not upstream, stays
    /// unfinished in the journal.
    async fn shut_down(mut self) {
        if let Some(connection) = self.connection.take() {
            let answer = match self.held.take() {
                Some(held) if !self.context.options.hold.strict => {
                    self.context.builds.held(&self.key, held.since.elapsed(), false);
                    Ok(held.ack)
                }
                _ => Err(shutting_down()),
            };
            let _ = connection.acks.send(answer);
            connection.released.cancel();
        }
        let last = match &self.phase {
            Phase::Settled { .. } => i64::MAX,
            // What waits for outputs would wait in vain.
            _ if self.context.options.hold.mode == HoldMode::Target => 0,
            // Not closed yet, so it cannot be finished.
            Phase::Open { .. } | Phase::Settling { .. } => self.highest.unwrap_or(0),
        };
        let drained = async {
            while self.following.is_expected(last) {
                self.following.changed().await;
            }
        };
        let _ = tokio::time::timeout(UPSTREAM_DRAIN, drained).await;
        self.conclude().await;
        if !self.following.is_finished() && !self.intake.is_journaled() && self.highest.is_some() {
            tracing::error!(
                stream = %self.key,
                "the upstream event service will not get the rest of this build: it was not journaled"
            );
        }
    }

    fn id(&self) -> StreamId {
        StreamId {
            build_id: self.key.build_id.clone(),
            component: crate::proto::google::devtools::build::v1::stream_id::BuildComponent::Tool.into(),
            invocation_id: self.key.invocation_id.clone(),
        }
    }
}
