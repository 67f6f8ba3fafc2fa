//! The engine behind the doors: one task for each invocation, and what they share.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError, RwLock},
    time::Duration,
};

use futures::{
    FutureExt as _,
    future::{BoxFuture, join_all},
};
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use super::{
    actor::{Actor, Message, action_cache::Remembered},
    feed::{Change, Told},
    policy::Policy,
    roots::Roots,
    sources::Sources,
    tally::Tally,
    watching::Watch,
};
use crate::{
    bep::event::Framed,
    builds::{Builds, Progress, Settlement, StreamEnd, StreamKey},
    digest::Digest,
    exec_path::ExecPath,
    materialize::Materializer,
    metrics::Metrics,
    record::{InvocationRow, InvocationState, Record, RootId, TargetRow},
};

/// What became of an invocation, told once it is settled.
#[derive(Debug, Clone)]
pub struct Report {
    /// Which.
    pub invocation_id: String,
    /// The id of its build request: Bazel may begin a build anew in the same command.
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
    /// Required outputs that could not be had.
    pub failed: u64,
    /// The build tool's exit code, if it told one.
    pub exit_code: Option<i32>,
    /// Its outputs in numbers.
    pub tally: Tally,
}

/// What all invocations share.
pub(super) struct Shared {
    pub(super) policy: RwLock<Policy>,
    pub(super) record: Record,
    pub(super) materializer: Materializer,
    pub(super) roots: Arc<Roots>,
    pub(super) sources: Arc<Sources>,
    pub(super) metrics: Metrics,
    /// By both ids: an invocation id may be used again, for another build.
    live: Mutex<HashMap<StreamKey, mpsc::Sender<Message>>>,
    reports: broadcast::Sender<Report>,
    /// Who is told of every change.
    told: Mutex<Vec<mpsc::UnboundedSender<Told>>>,
    /// Whether the outputs of a set are settled as of the event that brings the set.
    pub(super) holds_sets: bool,
    /// How long a task stays after its end.
    linger: OnceLock<Duration>,
    /// What was read of the build tool's action caches last.
    action_caches: Mutex<HashMap<RootId, Remembered>>,
    /// Why they are not read, as it was said.
    said: Mutex<HashSet<String>>,
}

/// How long a task stays after its end, for a client that comes back to the same stream, unless told otherwise. Longer
/// than the event service remembers the stream ([`crate::bes::BesOptions`]), so that one which resumes it finds the task
/// that has heard its beginning.
const LINGER: Duration = Duration::from_secs(330);

impl Shared {
    /// How long a task stays after its end.
    pub(super) fn linger(&self) -> Duration {
        self.linger.get().copied().unwrap_or(LINGER)
    }

    /// Whether this was not said before.
    pub(super) fn is_first(&self, message: &str) -> bool {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        said.insert(message.to_owned())
    }

    pub(super) fn action_cache(&self, root: RootId) -> Option<Remembered> {
        let caches = self.action_caches.lock().unwrap_or_else(PoisonError::into_inner);
        caches.get(&root).cloned()
    }

    pub(super) fn remember_action_cache(&self, root: RootId, read: Option<Remembered>) {
        let mut caches = self.action_caches.lock().unwrap_or_else(PoisonError::into_inner);
        match read {
            Some(read) => caches.insert(root, read),
            None => caches.remove(&root),
        };
    }

    pub(super) fn forget(&self, stream: &StreamKey) {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        if live.get(stream).is_some_and(mpsc::Sender::is_closed) {
            live.remove(stream);
        }
    }

    pub(super) fn report(&self, report: Report) {
        // Nobody has to listen.
        let _ = self.reports.send(report);
    }

    pub(super) fn tell(&self, invocation_id: &str, change: &Change) {
        let mut listeners = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.retain(|listener| {
            // Who has gone is told no more.
            let told = Told {
                invocation_id: invocation_id.to_owned(),
                change: change.clone(),
            };
            listener.send(told).is_ok()
        });
    }
}

async fn ask<T>(
    task: &mpsc::Sender<Message>,
    question: impl FnOnce(oneshot::Sender<T>) -> Message,
) -> Option<T> {
    let (answer, answered) = oneshot::channel();
    task.send(question(answer)).await.ok()?;
    answered.await.ok()
}

/// Follows builds. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

impl Engine {
    /// An engine without builds. With `holds_sets`, the events that bring sets of files count as settled only when
    /// what the targets require of the sets is there ([`Progress`]).
    #[must_use]
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
                told: Mutex::default(),
                holds_sets,
                linger: OnceLock::new(),
                action_caches: Mutex::default(),
                said: Mutex::default(),
            }),
        }
    }

    /// Another selection, for builds that begin from now on.
    pub fn set_policy(&self, policy: Policy) {
        self.shared
            .policy
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .reselect(policy);
    }

    /// How long the event service remembers a stream; the tasks of builds stay a little longer. To be called before there
    /// are any.
    pub fn linger(&self, streams: Duration) {
        // The first word counts.
        let _ = self.shared.linger.set(streams.saturating_add(streams / 10));
    }

    /// Reports of invocations that settle from now on.
    #[must_use]
    pub fn reports(&self) -> broadcast::Receiver<Report> {
        self.shared.reports.subscribe()
    }

    /// Every change of all invocations from now on, single outputs left out. Nothing is missed, however many come at
    /// once: thousands of targets settle in one go where they share an output. So whoever listens must take them
    /// without delay, and bound what it keeps.
    #[must_use]
    pub fn told(&self) -> mpsc::UnboundedReceiver<Told> {
        let (listener, told) = mpsc::unbounded_channel();
        let mut listeners = self.shared.told.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.push(listener);
        told
    }

    /// The present state of an invocation that has a task, and how many required outputs are still on their way.
    pub async fn snapshot(&self, invocation_id: &str) -> Option<(InvocationRow, u64)> {
        self.ask(invocation_id, Message::Snapshot).await
    }

    /// The targets so far of an invocation that has a task and is not settled.
    pub async fn targets(&self, invocation_id: &str) -> Option<Vec<TargetRow>> {
        self.ask(invocation_id, Message::Targets).await
    }

    /// Follows an invocation that has a task: its targets so far, then every change.
    pub async fn watch(&self, invocation_id: &str) -> Option<Watch> {
        let task = self.task_of(invocation_id)?;
        let begun = ask(&task, Message::Watch).await?;
        Some(Watch::new(task, begun))
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
        ask(&self.task_of(invocation_id)?, question).await
    }

    fn task_of(&self, invocation_id: &str) -> Option<mpsc::Sender<Message>> {
        let mut tasks: Vec<_> = {
            let live = self.shared.live.lock().unwrap_or_else(PoisonError::into_inner);
            let of_it = live
                .iter()
                .filter(|(stream, _)| stream.invocation_id == invocation_id);
            of_it
                .filter(|(_, task)| !task.is_closed())
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
    #[must_use]
    pub fn streams(&self) -> Vec<(String, String)> {
        let live = self.shared.live.lock().unwrap_or_else(PoisonError::into_inner);
        live.keys()
            .map(|stream| (stream.invocation_id.clone(), stream.build_id.clone()))
            .collect()
    }

    /// Whether anything is still on its way for any invocation.
    pub async fn is_busy(&self) -> bool {
        let ids: Vec<String> = {
            let live = self.shared.live.lock().unwrap_or_else(PoisonError::into_inner);
            live.keys().map(|stream| stream.invocation_id.clone()).collect()
        };
        for id in ids {
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
            let live = self.shared.live.lock().unwrap_or_else(PoisonError::into_inner);
            live.values().cloned().collect()
        };
        let concluding = tasks.iter().map(async |task| {
            if let Some((row, 0)) = ask(task, Message::Snapshot).await
                && row.finished
            {
                ask(task, Message::Done).await;
            }
        });
        // What takes longer is done again from the journal.
        let _ = tokio::time::timeout(patience, join_all(concluding)).await;
    }

    fn task(&self, stream: &StreamKey, create: bool) -> Option<mpsc::Sender<Message>> {
        let mut live = self.shared.live.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(task) = live.get(stream).filter(|task| !task.is_closed()) {
            return Some(task.clone());
        }
        if !create {
            return None;
        }
        // An invocation that has been here before, and comes again from the journal, keeps its place in the order.
        let recorded = self.shared.record.invocation(&stream.invocation_id);
        let recorded = recorded.filter(|row| is_of(row, stream));
        let task = Actor::start(self.shared.clone(), stream, recorded);
        live.insert(stream.clone(), task.clone());
        Some(task)
    }

    async fn tell(&self, stream: &StreamKey, create: bool, message: Message) {
        if let Some(task) = self.task(stream, create) {
            // A task that ends between the look and the message has nothing left to do.
            let _ = task.send(message).await;
        }
    }
}

/// Whether a row is a stream's.
fn is_of(row: &InvocationRow, stream: &StreamKey) -> bool {
    row.build_id == stream.build_id && row.attempt == stream.attempt
}

impl Builds for Engine {
    fn events(&self, stream: &StreamKey, events: Vec<(i64, Framed)>) -> BoxFuture<'_, ()> {
        let stream = stream.clone();
        async move { self.tell(&stream, true, Message::Events(events)).await }.boxed()
    }

    fn limited(&self, stream: &StreamKey, reason: String) -> BoxFuture<'_, ()> {
        let stream = stream.clone();
        async move { self.tell(&stream, true, Message::Limited(reason)).await }.boxed()
    }

    fn ended(&self, stream: &StreamKey, end: StreamEnd) -> BoxFuture<'_, ()> {
        let stream = stream.clone();
        async move { self.tell(&stream, false, Message::Ended(end)).await }.boxed()
    }

    fn settled(&self, stream: &StreamKey) -> BoxFuture<'static, Settlement> {
        let (task, shared) = (self.task(stream, false), self.shared.clone());
        let stream = stream.clone();
        async move {
            if let Some(task) = task {
                let (answer, settlement) = oneshot::channel();
                if task.send(Message::Settled(answer)).await.is_ok()
                    && let Ok(settlement) = settlement.await
                {
                    return settlement;
                }
            }
            // Long settled: the record still knows how it went.
            shared
                .record
                .invocation(&stream.invocation_id)
                .filter(|row| is_of(row, &stream))
                .map_or_else(Settlement::default, |row| Settlement {
                    failed: row.failed,
                    messages: row.errors,
                    superseded: row.superseded > 0,
                })
        }
        .boxed()
    }

    fn done(&self, stream: &StreamKey) -> BoxFuture<'static, ()> {
        let (task, record) = (self.task(stream, false), self.shared.record.clone());
        async move {
            let (answer, done) = oneshot::channel();
            if let Some(task) = task
                && task.send(Message::Done(answer)).await.is_ok()
            {
                // A task that ends has nothing on its way any more.
                let _ = done.await;
            }
            // The journal is let go of after this: were the process killed before the record has the build, nobody
            // would know it. A record that can't be written is no reason to do all of it again.
            if let Err(error) = record.flush().await {
                tracing::debug!(%error, "a settled build is not on record for good yet");
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
        // Whoever asks may be ahead of the stream's first event; but of a build that is done nothing more comes.
        let live = self.task(stream, false);
        let task = match live {
            None if !self.is_done(stream) => self.task(stream, true),
            live => live,
        };
        async move {
            let (answer, progress) = oneshot::channel();
            task?.send(Message::Progress(answer)).await.ok()?;
            progress.await.ok()
        }
        .boxed()
    }

    fn local_files(
        &self,
        stream: &StreamKey,
        files: Vec<(Option<ExecPath>, Digest)>,
    ) -> BoxFuture<'static, Vec<Option<PathBuf>>> {
        let task = self.task(stream, false);
        async move {
            let nothing = vec![None; files.len()];
            let (answer, found) = oneshot::channel();
            let Some(task) = task else { return nothing };
            if task.send(Message::LocalFiles(files, answer)).await.is_err() {
                return nothing;
            }
            found.await.unwrap_or(nothing)
        }
        .boxed()
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
