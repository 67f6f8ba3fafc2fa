//! The calls about a build's life on their way upstream: kept before they are answered, and until upstream has them.
//!
//! A build tool makes them one by one and fails when they fail. So they are answered at once, and a restart goes on
//! with what upstream has not got.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use bytes::Bytes;
use tokio::sync::watch;
use tonic::metadata::MetadataMap;

use super::{
    counters::Counters,
    journal::{self, Batch, Cursor, Journal, JournalError, RecordKind, Writer},
    raw::Call,
    server::Shared,
    sink::StreamKey,
    upstream::{LifecycleEvent, Upstream},
};

/// As how many calls one counts: they are small, and a client that makes large ones can have fewer of them waiting.
fn weight(request: &Bytes) -> usize {
    1 + request.len() / (4 << 10)
}

/// Every build that upstream still has to get calls of.
pub(super) struct Lifecycle {
    builds: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Build>>>>,
    /// Calls that upstream has not got, by their [`weight`].
    pending: watch::Sender<usize>,
    /// It was told that there are too many.
    overflowing: AtomicBool,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self {
            builds: Mutex::default(),
            pending: watch::Sender::new(0),
            overflowing: AtomicBool::new(false),
        }
    }
}

/// One build's calls.
#[derive(Default)]
struct Build {
    opened: bool,
    /// `None` without journalling, or after it failed.
    writer: Option<Writer>,
    cursor: Option<Arc<Cursor>>,
    /// The number of the last call.
    last: i64,
    /// Upstream has all calls up to this one, and those.
    through: i64,
    done: BTreeSet<i64>,
}

/// A build whose calls the last process did not get rid of.
pub(super) struct Left {
    build_id: String,
    calls: Vec<(i64, Call, Bytes, MetadataMap)>,
}

impl Lifecycle {
    /// Keeps a call and passes it on. Returns when it may be answered.
    pub(super) async fn take(
        &self,
        shared: &Arc<Shared>,
        upstream: &Upstream,
        call: &Call,
        request: Bytes,
        headers: MetadataMap,
    ) {
        let build = self.build(&call.build_id);
        let mut build = build.lock().await;
        if !build.opened {
            build.open(shared, &call.build_id).await;
        }
        build.last += 1;
        let number = build.last;
        let mut batch = Batch::default();
        let now = journal::now_ms();
        batch.push_headers(now, number, &journal::headers::encode(&headers));
        batch.push_call(now, number, &request);
        build.append(shared, &call.build_id, batch).await;
        self.pass(shared, upstream, call, number, request, headers);
    }

    /// What the journal has of calls that upstream has not got. Their openings are passed on here, before any stream
    /// is taken up; [`Self::close`] does the rest.
    pub(super) async fn recover(&self, shared: &Arc<Shared>, upstream: &Upstream) -> Vec<Left> {
        let Some(journal) = &shared.journal else {
            return Vec::new();
        };
        let journal = journal.calls();
        let read = tokio::task::spawn_blocking(move || left(&journal)).await;
        let left = match read
            .map_err(|e| e.to_string())
            .and_then(|l| l.map_err(|e| e.to_string()))
        {
            Ok(left) => left,
            Err(error) => {
                tracing::error!(
                    error,
                    "calls about builds' lives are lost: the journal can't be read"
                );
                return Vec::new();
            }
        };
        for build in &left {
            let entry = self.build(&build.build_id);
            entry.lock().await.open(shared, &build.build_id).await;
        }
        self.pass_left(shared, upstream, &left, true);
        left
    }

    /// Passes on the calls that go behind the builds' streams.
    pub(super) fn close(&self, shared: &Arc<Shared>, upstream: &Upstream, left: &[Left]) {
        self.pass_left(shared, upstream, left, false);
    }

    fn pass_left(&self, shared: &Arc<Shared>, upstream: &Upstream, left: &[Left], opening: bool) {
        let calls = left.iter().flat_map(|build| &build.calls);
        for (number, call, request, headers) in calls.filter(|(_, call, ..)| call.opening == opening) {
            self.pass(shared, upstream, call, *number, request.clone(), headers.clone());
        }
    }

    fn pass(
        &self,
        shared: &Arc<Shared>,
        upstream: &Upstream,
        call: &Call,
        number: i64,
        request: Bytes,
        headers: MetadataMap,
    ) {
        let weight = weight(&request);
        self.pending.send_modify(|pending| *pending += weight);
        let event = LifecycleEvent {
            number: number.unsigned_abs(),
            opening: call.opening,
            request,
            headers,
        };
        // What waits is kept by `shared` itself.
        let (sharing, build_id) = (Arc::downgrade(shared), call.build_id.clone());
        let done = Box::new(move || {
            if let Some(shared) = sharing.upgrade() {
                let forwards = shared.forwards.clone();
                forwards.spawn(async move { shared.lifecycle.done(&build_id, number, weight).await });
            }
        });
        upstream.lifecycle(shared, &call.build_id, event, done);
    }

    /// Upstream has a call.
    async fn done(&self, build_id: &str, number: i64, weight: usize) {
        let entry = self.build(build_id);
        let mut build = entry.lock().await;
        build.done.insert(number);
        loop {
            let next = build.through + 1;
            if !build.done.remove(&next) {
                break;
            }
            build.through = next;
        }
        if let Some(cursor) = &build.cursor {
            cursor.save(build.through);
        }
        if build.through == build.last {
            build.settle().await;
            let mut builds = self.builds.lock().unwrap_or_else(PoisonError::into_inner);
            // The map's and ours: ways to a build are only made under this lock, so nobody waits for it.
            if Arc::strong_count(&entry) == 2 {
                builds.remove(build_id);
            }
        }
        drop(build);
        self.pending
            .send_modify(|pending| *pending = pending.saturating_sub(weight));
    }

    /// Whether one more call may wait for upstream. If not, it is counted as dropped; the log tells of the first one,
    /// and again when half of the others had gone in between.
    pub(super) fn has_room(&self, counters: &Counters, most: usize) -> bool {
        let waiting = *self.pending.borrow();
        if waiting <= most / 2 {
            self.overflowing.store(false, Relaxed);
        }
        if waiting < most {
            return true;
        }
        Counters::add(&counters.lifecycle_dropped);
        if !self.overflowing.swap(true, Relaxed) {
            tracing::warn!(
                "{most} lifecycle calls wait for upstream: it does not get the next ones (--limit=lifecycle-calls=NUMBER)"
            );
        }
        false
    }

    /// Waits until upstream has all calls.
    pub(super) async fn drained(&self) {
        // The sender is ours, so it can't be gone.
        let _ = self.pending.subscribe().wait_for(|pending| *pending == 0).await;
    }

    fn build(&self, build_id: &str) -> Arc<tokio::sync::Mutex<Build>> {
        let mut builds = self.builds.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(builds.entry(build_id.to_owned()).or_default())
    }
}

fn key(build_id: &str) -> StreamKey {
    StreamKey {
        build_id: build_id.to_owned(),
        invocation_id: String::new(),
        ..StreamKey::default()
    }
}

/// Reads what upstream has not got. Blocks.
fn left(journal: &Journal) -> Result<Vec<Left>, JournalError> {
    if !journal.dir().exists() {
        return Ok(Vec::new());
    }
    let mut builds = Vec::new();
    for entry in journal.unfinished()? {
        let acked = journal.cursor(&entry.key).load();
        let mut headers = MetadataMap::new();
        let mut calls = Vec::new();
        for record in entry.read()? {
            let record = match record {
                Ok(record) => record,
                Err(error) => {
                    tracing::error!(%error, "calls about a build's life are lost");
                    break;
                }
            };
            if let Some(found) = record.headers() {
                headers = found;
            } else if record.kind == RecordKind::Call
                && record.sequence > acked
                && let Ok(call) = Call::read(&record.payload)
            {
                calls.push((record.sequence, call, record.payload, headers.clone()));
            }
        }
        builds.push(Left {
            build_id: entry.key.build_id,
            calls,
        });
    }
    Ok(builds)
}

impl Build {
    async fn open(&mut self, shared: &Shared, build_id: &str) {
        self.opened = true;
        let Some(journal) = &shared.journal else {
            return;
        };
        let (journal, key) = (journal.calls(), key(build_id));
        let opened = tokio::task::spawn_blocking(move || {
            let (writer, recovered) = journal.stream(&key)?;
            let cursor = journal.cursor(&key);
            let acked = cursor.load();
            Ok::<_, JournalError>((writer, recovered.highest.unwrap_or(0), cursor, acked))
        });
        match opened
            .await
            .map_err(|e| e.to_string())
            .and_then(|o| o.map_err(|e| e.to_string()))
        {
            Ok((writer, highest, cursor, acked)) => {
                self.writer = Some(writer);
                self.cursor = Some(Arc::new(cursor));
                self.last = highest.max(acked);
                self.through = acked;
                if self.through == self.last {
                    // All done, but killed before the file was marked.
                    self.settle().await;
                }
            }
            Err(error) => journal_failed(shared, build_id, &error),
        }
    }

    async fn append(&mut self, shared: &Shared, build_id: &str, batch: Batch) {
        let Some(mut writer) = self.writer.take() else {
            return;
        };
        let written = tokio::task::spawn_blocking(move || writer.append(&batch).map(|_| writer)).await;
        match written
            .map_err(|e| e.to_string())
            .and_then(|w| w.map_err(|e| e.to_string()))
        {
            Ok(writer) => self.writer = Some(writer),
            Err(error) => journal_failed(shared, build_id, &error),
        }
    }

    /// Marks the journal: nothing is left to do.
    async fn settle(&mut self) {
        let Some(mut writer) = self.writer.take() else {
            return;
        };
        let settled = tokio::task::spawn_blocking(move || {
            let settled = writer.settle();
            (writer, settled)
        });
        if let Ok((writer, settled)) = settled.await {
            if let Err(error) = settled {
                tracing::warn!(%error, "journal of a build's calls can't be marked as settled");
            }
            self.writer = Some(writer);
        }
    }
}

fn journal_failed(shared: &Shared, build_id: &str, error: &str) {
    Counters::add(&shared.counters.journal_failures);
    tracing::error!(
        build_id,
        error,
        "calls about a build's life go upstream without being kept; a restart would forget them"
    );
}
