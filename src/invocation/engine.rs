//! The engine behind the doors: one task for each invocation, and what they share.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use tokio::sync::{broadcast, mpsc, oneshot};

use super::{
    actor::{Actor, Message},
    policy::Policy,
    roots::Roots,
    sources::Sources,
};
use crate::{
    bep::event::Framed,
    bes::{Builds, Settlement, StreamEnd, StreamKey},
    materialize::Materializer,
    metrics::Metrics,
    record::{InvocationRow, Record},
};

/// What became of an invocation, told once it is settled.
#[derive(Debug, Clone)]
pub struct Report {
    /// Which.
    pub invocation_id: String,
    /// The summary line.
    pub line: String,
    /// The first failures and warnings.
    pub messages: Vec<String>,
    /// Required outputs that could not be had.
    pub failed: u64,
    /// The build tool's exit code, if it told one.
    pub exit_code: Option<i32>,
}

/// What all invocations share.
pub(super) struct Shared {
    pub(super) policy: Policy,
    pub(super) record: Record,
    pub(super) materializer: Materializer,
    pub(super) roots: Arc<Roots>,
    pub(super) sources: Arc<Sources>,
    pub(super) metrics: Metrics,
    /// By both ids: an invocation id may be used again, for another build.
    live: Mutex<HashMap<StreamKey, mpsc::Sender<Message>>>,
    reports: broadcast::Sender<Report>,
}

impl Shared {
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
}

/// Follows builds. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

impl Engine {
    /// An engine without builds.
    #[must_use]
    pub fn new(
        policy: Policy,
        record: Record,
        materializer: Materializer,
        roots: Arc<Roots>,
        sources: Arc<Sources>,
        metrics: Metrics,
    ) -> Self {
        let (reports, _) = broadcast::channel(64);
        Self {
            shared: Arc::new(Shared {
                policy,
                record,
                materializer,
                roots,
                sources,
                metrics,
                live: Mutex::default(),
                reports,
            }),
        }
    }

    /// Reports of invocations that settle from now on.
    #[must_use]
    pub fn reports(&self) -> broadcast::Receiver<Report> {
        self.shared.reports.subscribe()
    }

    /// The present state of an invocation that has a task, and how many required outputs are still on their way.
    pub async fn snapshot(&self, invocation_id: &str) -> Option<(InvocationRow, u64)> {
        let task = {
            let live = self.shared.live.lock().unwrap_or_else(PoisonError::into_inner);
            live.iter()
                .find(|(stream, task)| stream.invocation_id == invocation_id && !task.is_closed())
                .map(|(_, task)| task.clone())
        }?;
        let (answer, snapshot) = oneshot::channel();
        task.send(Message::Snapshot(answer)).await.ok()?;
        snapshot.await.ok()
    }

    /// Whether anything is still on its way for any invocation.
    pub async fn is_busy(&self) -> bool {
        let ids: Vec<String> = {
            let live = self.shared.live.lock().unwrap_or_else(PoisonError::into_inner);
            live.keys().map(|stream| stream.invocation_id.clone()).collect()
        };
        for id in ids {
            if let Some((row, _)) = self.snapshot(&id).await
                && !row.state.is_over()
            {
                return true;
            }
        }
        false
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
        let version = self
            .shared
            .record
            .invocation(&stream.invocation_id)
            .filter(|row| row.build_id == stream.build_id)
            .map(|row| row.version)
            .filter(|version| *version > 0);
        let task = Actor::start(self.shared.clone(), stream, version);
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

impl Builds for Engine {
    fn event(&self, stream: &StreamKey, _sequence: i64, event: Framed) -> BoxFuture<'_, ()> {
        let stream = stream.clone();
        async move { self.tell(&stream, true, Message::Event(event)).await }.boxed()
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
                .filter(|row| row.build_id == stream.build_id)
                .map_or_else(Settlement::default, |row| Settlement {
                    failed: row.failed,
                    messages: row.errors,
                    superseded: row.superseded > 0,
                })
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
