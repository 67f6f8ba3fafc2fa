//! What the control API answers, whatever carries it: the daemon's socket, or a command that opens the record
//! itself because no daemon runs.

mod calls;
pub(crate) mod disk;
pub(crate) mod find;
pub(crate) mod finding;
mod materialize;
mod outputs;
mod pause;
pub(super) mod progress;
mod report;
pub(super) mod show;
mod timeline;
pub(crate) mod watch;
pub(crate) mod why;

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::sync::{Semaphore, watch::Receiver};
use tokio_util::task::TaskTracker;
use tonic::Status;

use crate::{
    invocation::{Engine, feed::Waiting, tally::Tally},
    lease::LostOutputs,
    materialize::Materializer,
    proto::outhaul::v1 as pb,
    record::{InvocationRow, InvocationState, Record, Which, with_fields_of},
    remote::Standing,
    roots::Roots,
    sources::Sources,
    stage::{Archives, Reach, Stager},
};

/// Invocations that are listed unless asked otherwise.
const LIST: usize = 50;
/// Invocations that are listed at most.
const LISTED: usize = 10_000;

/// The control API's answers. Cheap to clone.
#[derive(Clone)]
pub struct Service {
    record: Record,
    materializer: Materializer,
    roots: Arc<Roots>,
    sources: Arc<Sources>,
    /// None where no builds are followed.
    engine: Option<Engine>,
    /// How collections are reached that may be staged from.
    archives: Archives,
    /// None without a journal to stage from.
    stager: Option<Stager>,
    /// What the cache has lost, as leases have found.
    lost: LostOutputs,
    /// Calls that wait for something.
    calls: TaskTracker,
    /// Held by the call that removes files.
    evictions: Arc<tokio::sync::Mutex<()>>,
    /// Those that may read now.
    places: Arc<Semaphore>,
    /// Those that can be asked how far they are.
    under_way: progress::UnderWay,
}

impl Service {
    /// Over these services.
    pub fn new(
        record: Record,
        materializer: Materializer,
        roots: Arc<Roots>,
        sources: Arc<Sources>,
        engine: Option<Engine>,
    ) -> Self {
        Self {
            record,
            materializer,
            roots,
            sources,
            engine,
            archives: Archives::default(),
            stager: None,
            lost: LostOutputs::default(),
            calls: TaskTracker::new(),
            evictions: Arc::default(),
            places: Arc::new(Semaphore::new(calls::READING)),
            under_way: progress::UnderWay::default(),
        }
    }

    /// With the way to collections. To be called before the directory of journals is set.
    pub(crate) fn with_archives(mut self, archives: Archives) -> Self {
        self.archives = archives;
        self
    }

    /// With a directory of journals to stage from.
    pub fn with_journal(mut self, directory: PathBuf) -> Self {
        let stager = Stager::new(
            self.record.clone(),
            self.materializer.clone(),
            self.roots.clone(),
            self.sources.clone(),
            self.engine.clone(),
            directory,
        );
        self.stager = Some(stager.with_archives(self.archives.clone()));
        self
    }

    /// As the callers of one listener see it: they may have something staged into what is in their reach, and wait for each
    /// other alone.
    pub(crate) fn for_listener(&self, reach: Reach) -> Self {
        Self {
            stager: self.stager.clone().map(|stager| stager.within(reach)),
            places: Arc::new(Semaphore::new(calls::READING)),
            ..self.clone()
        }
    }

    /// With what leases find.
    pub fn with_lost_outputs(mut self, lost: LostOutputs) -> Self {
        self.lost = lost;
        self
    }

    /// Stages from recorded builds, if there is a journal.
    pub(crate) const fn stager(&self) -> Option<&Stager> {
        self.stager.as_ref()
    }

    /// Whether anything is being fetched, staged or waited for, or is paused: a pause would end with the process.
    pub fn is_busy(&self) -> bool {
        self.materializer.pausing().now().is_some()
            || !self.calls.is_empty()
            || self.stager.as_ref().is_some_and(Stager::is_busy)
    }

    /// Lets go of the output roots' temporary directories, before the process ends. Blocks on the file system.
    pub fn let_go(&self) {
        self.roots.let_go();
    }

    /// Waits until what came of outputs so far is on record, if there are builds in this process.
    async fn catch_up(&self) {
        if let Some(engine) = &self.engine {
            engine.catch_up().await;
        }
    }

    /// The newest invocations.
    pub async fn invocations(&self, limit: u32) -> Vec<pb::Invocation> {
        let limit = match limit as usize {
            0 => LIST,
            limit => limit.min(LISTED),
        };
        let mut list = Vec::new();
        let rows = self
            .read(move |service, _| service.record.invocations(limit))
            .await;
        for row in rows.unwrap_or_default() {
            list.push(self.present(row).await);
        }
        list
    }

    /// One invocation with its targets; the newest build for an empty id.
    pub async fn invocation(&self, id: &str) -> Option<(pb::Invocation, Vec<pb::Target>)> {
        let row = self.row_of(id).await?;
        // A task that is settled has given its targets back.
        let live = match &self.engine {
            Some(engine) => engine.targets(&row.invocation_id).await,
            None => None,
        };
        let targets = match live.filter(|targets| !targets.is_empty()) {
            Some(targets) => targets,
            None => {
                let id = row.invocation_id.clone();
                let targets = self.read(move |service, _| service.record.targets(&id)).await;
                targets.unwrap_or_default()
            }
        };
        let targets = targets.iter().map(show::target).collect();
        Some((self.present(row).await, targets))
    }

    /// The row of an invocation, the newest build's for an empty id.
    async fn row_of(&self, id: &str) -> Option<InvocationRow> {
        let which = Which::of(id);
        let row = self.read(move |service, _| service.record.find_invocation(&which));
        row.await.flatten()
    }

    /// What a build that runs in this process waits for, with at most that many of the outputs that are on their way.
    pub(crate) async fn waiting(&self, id: &str, most: usize) -> Option<Waiting> {
        self.engine.as_ref()?.waiting(id, most).await
    }

    /// Whether the caches in use are asked at present.
    pub(crate) fn caches(&self) -> Vec<Standing> {
        self.sources.standing()
    }

    /// That builds in this process have changed, single outputs left out: see [`Engine::changes`].
    pub(crate) fn changes(&self) -> Option<Receiver<()>> {
        self.engine.as_ref().map(Engine::changes)
    }

    /// A row as it is now, if there is more to it than what is on record.
    async fn present(&self, row: InvocationRow) -> pb::Invocation {
        let live = match &self.engine {
            Some(engine) => engine.unrecorded(&row.invocation_id).await,
            None => None,
        };
        let (row, pending) = live.unwrap_or_else(|| {
            // Its task may have ended since the row was read.
            let mut row = self.record.invocation(&row.invocation_id).unwrap_or(row);
            if !row.state.is_over() {
                // Its process ended before it was settled.
                row.state = InvocationState::Interrupted;
            }
            (row, 0)
        });
        self.shown(row, pending)
    }

    /// A row as it is told, with the number of required outputs that are still on their way.
    fn shown(&self, row: InvocationRow, pending: u64) -> pb::Invocation {
        let outputs = row.outputs;
        let stores = outputs.stores.iter().map(|(name, n)| (name.as_str().into(), *n));
        let bytes = outputs
            .store_bytes
            .iter()
            .map(|(name, n)| (name.as_str().into(), *n));
        let tally = with_fields_of!(outputs, Tally {
            stores: stores.collect(),
            store_bytes: bytes.collect(),
        } downloaded downloaded_bytes present failed known superseded, ..Tally::default());
        let lost = row.root.and_then(|root| self.lost.lost(root, &row.invocation_id));
        let lost = lost.unwrap_or_default();
        let summary = tally.summary(Duration::from_micros(row.hold_us));
        with_fields_of!(row, pb::Invocation {
            evicted: lost.outputs,
            evicted_target_count: lost.target_count(),
            evicted_targets: lost.targets().map(str::to_owned).collect(),
            summary: summary,
            state: pb::InvocationState::from(row.state).into(),
            exit_code: row.finished.then_some(row.exit_code),
            downloaded: outputs.downloaded,
            downloaded_bytes: outputs.downloaded_bytes,
            stores: outputs.stores.into_iter().collect(),
            present: outputs.present,
            failed: outputs.failed,
            known: outputs.known,
            superseded: outputs.superseded,
            pending: pending,
            without_root: row.root.is_none(),
        } invocation_id build_id command workspace exec_root started_ms settled_ms hold_us errors build_tool_version
          remote_cache remote_instance_name)
    }

    /// Gives up what an invocation still wants. False if it is settled.
    ///
    /// # Errors
    /// When there is no such invocation.
    pub async fn cancel(&self, id: &str) -> Result<bool, Status> {
        let running = match &self.engine {
            Some(engine) => engine.snapshot(id).await.map(|(row, _)| !row.state.is_over()),
            None => None,
        };
        match (running, &self.engine) {
            (Some(true), Some(engine)) => Ok(engine.cancel(id).await),
            (None, _) if self.record.invocation(id).is_none() => {
                Err(Status::not_found(format!("invocation {id:?} is not recorded")))
            }
            _ => Ok(false),
        }
    }
}
