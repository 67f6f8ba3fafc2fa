//! The engine behind the event service: one task for each invocation, and what they share.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures::{
    FutureExt as _,
    future::{BoxFuture, join_all},
};
use parking_lot::{Mutex, RwLock};
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use super::{
    actor::Actor,
    feed::{Hold, InvocationChange, Report, Waiting},
    message::{Message, ask},
    policy::Policy,
    shared::{Shared, Task},
    timeline::Timeline,
    watching::Watch,
};
use crate::{
    bep::event::StreamEvent,
    builds::{Builds, Progress, Settlement, StreamEnd, StreamKey},
    digest::Digest,
    exec_path::ExecPath,
    materialize::Materializer,
    metrics::Metrics,
    record::{InvocationRow, InvocationState, Record, TargetRow},
    roots::Roots,
    sources::Sources,
    telemetry::Traces,
    units::now_ms,
};

/// How long anyone who reads the record waits for what is not on record yet. A build in the middle of many events
/// answers late.
const CATCH_UP: Duration = Duration::from_millis(250);

/// Follows builds. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

impl Engine {
    /// An engine without builds. With `holds_sets`, the events that bring sets of files count as settled only when
    /// what the targets require of the sets is there ([`Progress`]).
    pub fn new(
        policy: Policy,
        holds_sets: bool,
        record: Record,
        materializer: Materializer,
        roots: Arc<Roots>,
        sources: Arc<Sources>,
        metrics: Metrics,
    ) -> Self {
        let (reports, _) = broadcast::channel(64);
        Self {
            shared: Arc::new(Shared {
                policy: RwLock::new(policy),
                record,
                materializer,
                roots,
                sources,
                metrics,
                live: Mutex::default(),
                reports,
                subscribers: Mutex::default(),
                changed: watch::Sender::default(),
                holds_sets,
                linger: OnceLock::new(),
                traces: OnceLock::new(),
                action_caches: Mutex::default(),
                said: Mutex::default(),
            }),
        }
    }

    /// Another selection, for builds that begin from now on.
    pub(crate) fn set_policy(&self, policy: Policy) {
        self.shared.policy.write().reselect(policy);
    }

    /// Whether outputs of other output roots are copied where they have the same bytes.
    pub(crate) fn has_local_sources(&self) -> bool {
        !self.shared.policy.read().no_local_sources
    }

    /// How long the event service remembers a stream; the tasks of builds stay a little longer. To be called before there
    /// are any.
    pub fn linger(&self, streams: Duration) {
        // The first word counts.
        let _ = self.shared.linger.set(streams.saturating_add(streams / 10));
    }

    /// Where the traces of builds go. To be called before there are any.
    pub(crate) fn trace(&self, traces: Traces) {
        // The first word counts.
        let _ = self.shared.traces.set(traces);
    }

    /// Reports of invocations that settle from now on.
    pub fn reports(&self) -> broadcast::Receiver<Report> {
        self.shared.reports.subscribe()
    }

    /// Every change of all invocations from now on, single outputs left out. Nothing is missed, however many come at
    /// once: thousands of targets settle in one go where they share an output. So anyone who listens must take them
    /// without delay, and bound what it keeps.
    pub fn subscribe(&self) -> mpsc::UnboundedReceiver<InvocationChange> {
        let (listener, changes) = mpsc::unbounded_channel();
        let mut listeners = self.shared.subscribers.lock();
        listeners.push(listener);
        changes
    }

    /// That there are changes of any invocation, and not which: nothing is kept for those who do not look.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.shared.changed.subscribe()
    }

    /// The present state of an invocation that has a task, and how many required outputs are still on their way.
    pub async fn snapshot(&self, invocation_id: &str) -> Option<(InvocationRow, u64)> {
        self.ask(invocation_id, Message::Snapshot).await
    }

    /// The same, unless the record has all of it: a list of many builds does not wait for the task of each.
    pub(crate) async fn unrecorded(&self, invocation_id: &str) -> Option<(InvocationRow, u64)> {
        let task = self.task_of(invocation_id)?;
        if task.is_recorded() {
            return None;
        }
        ask(&task.inbox, Message::Snapshot).await
    }

    /// Waits until what came of the outputs of all builds so far is on record, but for builds that still have outputs on
    /// their way, and not long.
    pub(crate) async fn catch_up(&self) {
        let unrecorded: Vec<_> = {
            let live = self.shared.live.lock();
            let tasks = live.values().flat_map(HashMap::values);
            tasks.filter(|task| !task.is_recorded()).cloned().collect()
        };
        let asked = unrecorded.iter().map(|task| ask(&task.inbox, Message::Snapshot));
        let _ = tokio::time::timeout(CATCH_UP, join_all(asked)).await;
    }

    /// The targets so far of an invocation that has a task and is not settled.
    pub async fn targets(&self, invocation_id: &str) -> Option<Vec<TargetRow>> {
        self.ask(invocation_id, Message::Targets).await
    }

    /// What an invocation that has a task waits for, with the first `most` of the outputs that are still on their way.
    pub async fn waiting(&self, invocation_id: &str, most: usize) -> Option<Waiting> {
        self.ask(invocation_id, |answer| Message::Waiting(most, answer))
            .await
    }

    /// How the outputs of an invocation that has a task have come so far.
    pub(crate) async fn timeline(&self, invocation_id: &str) -> Option<Timeline> {
        self.ask(invocation_id, Message::Timeline).await
    }

    /// Follows an invocation that has a task: its targets so far, then every change.
    pub async fn watch(&self, invocation_id: &str) -> Option<Watch> {
        let task = self.task_of(invocation_id)?;
        let begun = ask(&task.inbox, Message::Watch).await?;
        Some(Watch::new(task.inbox, begun))
    }

    /// Gives up what an invocation still wants. False if it has no task.
    pub async fn cancel(&self, invocation_id: &str) -> bool {
        self.ask(invocation_id, Message::Cancel).await.is_some()
    }

    async fn ask<T>(
        &self,
        invocation_id: &str,
        question: impl FnOnce(oneshot::Sender<T>) -> Message,
    ) -> Option<T> {
        ask(&self.task_of(invocation_id)?.inbox, question).await
    }

    fn task_of(&self, invocation_id: &str) -> Option<Task> {
        let mut tasks: Vec<_> = {
            let live = self.shared.live.lock();
            let of_it = live.get(invocation_id).into_iter().flatten();
            of_it
                .filter(|(_, task)| !task.inbox.is_closed())
                .map(|(stream, task)| (stream.clone(), task.clone()))
                .collect()
        };
        if tasks.len() > 1 {
            // The id was used again; the record knows for which build, and the newest attempt at that counts.
            let newest = self.shared.record.invocation(invocation_id);
            tasks.sort_by_key(|(stream, _)| {
                let of_newest = newest.as_ref().is_some_and(|row| row.build_id == stream.build_id);
                (of_newest, stream.attempt)
            });
        }
        tasks.pop().map(|(_, task)| task)
    }

    /// The invocation id and the build id of every stream that has a task.
    pub fn streams(&self) -> Vec<(String, String)> {
        let live = self.shared.live.lock();
        live.values()
            .flat_map(HashMap::keys)
            .map(|stream| (stream.invocation_id.clone(), stream.build_id.clone()))
            .collect()
    }

    /// Whether anything is still on its way for any invocation.
    pub async fn is_busy(&self) -> bool {
        for (id, _) in self.streams() {
            if self.ask(&id, Message::Busy).await == Some(true) {
                return true;
            }
        }
        false
    }

    /// Waits, for `patience` at the most, until each build that has been heard to its end and asks for nothing more is on
    /// record as what it came to. A process that ends calls it when nothing more can be heard.
    pub async fn conclude(&self, patience: Duration) {
        let tasks: Vec<_> = {
            let live = self.shared.live.lock();
            live.values().flat_map(HashMap::values).cloned().collect()
        };
        let concluding = tasks.iter().map(async |task| {
            if let Some((row, 0)) = ask(&task.inbox, Message::Snapshot).await
                && row.finished
            {
                ask(&task.inbox, Message::Done).await;
            }
        });
        // What takes longer is done again from the journal.
        let _ = tokio::time::timeout(patience, join_all(concluding)).await;
    }

    fn task(&self, stream: &StreamKey, create: bool) -> Option<mpsc::Sender<Message>> {
        let mut live = self.shared.live.lock();
        let of_id = live.get(&stream.invocation_id);
        let task = of_id.and_then(|of_id| of_id.get(stream));
        if let Some(task) = task.filter(|task| !task.inbox.is_closed()) {
            return Some(task.inbox.clone());
        }
        if !create {
            return None;
        }
        // An invocation that has been here before, and comes again from the journal, keeps its place in the order.
        let recorded = self.shared.record.invocation(&stream.invocation_id);
        let recorded = recorded.filter(|row| is_of(row, stream));
        let task = Actor::start(self.shared.clone(), stream, recorded);
        let inbox = task.inbox.clone();
        live.entry(stream.invocation_id.clone())
            .or_default()
            .insert(stream.clone(), task);
        Some(inbox)
    }

    /// The same, for those who may be ahead of the stream's first event; but of a build that is done nothing more comes.
    fn task_to_be(&self, stream: &StreamKey) -> Option<mpsc::Sender<Message>> {
        let live = self.task(stream, false);
        live.or_else(|| (!self.is_done(stream)).then(|| self.task(stream, true))?)
    }

    fn send(&self, stream: &StreamKey, create: bool, message: Message) -> BoxFuture<'_, ()> {
        let stream = stream.clone();
        async move {
            if let Some(task) = self.task(&stream, create) {
                // A task that ends between the look and the message has nothing left to do.
                let _ = task.send(message).await;
            }
        }
        .boxed()
    }
}

/// Whether a row is a stream's.
fn is_of(row: &InvocationRow, stream: &StreamKey) -> bool {
    row.build_id == stream.build_id && row.attempt == stream.attempt
}

impl Builds for Engine {
    fn events(&self, stream: &StreamKey, events: Vec<(i64, StreamEvent)>) -> BoxFuture<'_, ()> {
        self.send(stream, true, Message::Events(events))
    }

    fn limited(&self, stream: &StreamKey, reason: String) -> BoxFuture<'_, ()> {
        self.send(stream, true, Message::Limited(reason))
    }

    fn lost(&self, stream: &StreamKey) -> BoxFuture<'_, ()> {
        self.send(stream, false, Message::Lost)
    }

    fn ended(&self, stream: &StreamKey, end: StreamEnd) -> BoxFuture<'_, ()> {
        self.send(stream, false, Message::Ended(end))
    }

    fn settled(&self, stream: &StreamKey) -> BoxFuture<'static, Settlement> {
        let (task, shared) = (self.task(stream, false), self.shared.clone());
        let stream = stream.clone();
        async move {
            if let Some(task) = task
                && let Some(settlement) = ask(&task, Message::Settled).await
            {
                return settlement;
            }
            // Long settled: the record still knows how it went.
            shared
                .record
                .invocation(&stream.invocation_id)
                .filter(|row| is_of(row, &stream))
                .map_or_else(Settlement::default, |row| Settlement {
                    failed: row.outputs.failed,
                    messages: row.errors,
                    superseded: row.outputs.superseded > 0,
                })
        }
        .boxed()
    }

    fn done(&self, stream: &StreamKey) -> BoxFuture<'static, ()> {
        let (task, record) = (self.task(stream, false), self.shared.record.clone());
        async move {
            if let Some(task) = task {
                // A task that ends has nothing on its way any more.
                ask(&task, Message::Done).await;
            }
            // The journal is let go of after this: were the process killed before the record has the build, nobody
            // would know it. A record that cannot be written is no reason to do all of it again.
            if let Err(error) = record.flush().await {
                tracing::debug!(%error, "a settled build is not yet recorded permanently");
            }
        }
        .boxed()
    }

    fn is_done(&self, stream: &StreamKey) -> bool {
        let row = self.shared.record.invocation(&stream.invocation_id);
        let done = |state| matches!(state, InvocationState::Settled | InvocationState::Superseded);
        row.is_some_and(|row| is_of(&row, stream) && done(row.state))
    }

    fn progress(&self, stream: &StreamKey) -> BoxFuture<'static, Option<watch::Receiver<Progress>>> {
        let task = self.task_to_be(stream);
        async move { ask(&task?, Message::Progress).await }.boxed()
    }

    fn local_files(
        &self,
        stream: &StreamKey,
        files: Vec<(Option<ExecPath>, Digest)>,
    ) -> BoxFuture<'static, Vec<Option<PathBuf>>> {
        let task = self.task(stream, false);
        async move {
            let nothing = vec![None; files.len()];
            let Some(task) = task else { return nothing };
            let found = ask(&task, |answer| Message::LocalFiles(files, answer)).await;
            found.unwrap_or(nothing)
        }
        .boxed()
    }

    fn holds(&self, stream: &StreamKey, at_most: Duration, limit: &str) {
        if let Some(task) = self.task_to_be(stream) {
            let at_most = i64::try_from(at_most.as_millis()).unwrap_or(i64::MAX);
            let hold = Hold {
                until_ms: now_ms().saturating_add(at_most),
                limit: limit.to_owned(),
            };
            // Nothing waits for it, and there may be no room for it yet: the build's last events are on their way as well.
            tokio::spawn(async move { task.send(Message::Holds(hold)).await });
        }
    }

    fn stopped(&self) -> BoxFuture<'static, ()> {
        Box::pin(self.shared.materializer.pausing().all_paused())
    }

    fn held(&self, stream: &StreamKey, took: Duration, timed_out: bool) {
        self.shared.metrics.held(took);
        if timed_out {
            self.shared.metrics.fault("hold_timeout");
        }
        if let Some(task) = self.task(stream, false) {
            // Only a note for the record; a full inbox may lose it.
            let _ = task.try_send(Message::Held(took, timed_out));
        }
    }
}
