//! The coordinator: one task that owns what is wanted, what is being fetched, and what is being placed.
//!
//! A want is first looked for on disk, in batches. If its content is not there, it becomes a *job*: one output path of
//! one root as of one version, and its blob is queued. A blob is fetched once however many jobs wait for it, and its
//! bytes go to the writer threads, which verify and place them. Every want ends with one [`Completion`].
//!
//! Versions decide who wins. [`Command::Begin`] ends all wants of older versions of the root; what they still have on
//! the way is dropped when it arrives, and the root's epoch keeps a writer from publishing it in the meantime.

mod answers;
mod checking;
mod fetching;
mod jobs;
mod lanes;
mod nearby;
mod placing;
mod space;
mod window;

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
    time::Instant,
};

use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, oneshot, watch},
    task::AbortHandle,
};

use self::{
    answers::Answers,
    checking::Gathering,
    jobs::{Asker, CacheId, Hashing, Job, Jobs},
    lanes::Lanes,
    nearby::NearbyBlobs,
};
use super::{
    large::LargeError,
    options::MaterializeOptions,
    pause::Pause,
    place::{PlaceError, Placed},
    want::{Completion, Outcome, Root, Session, Want},
    writers::{BatchId, CheckBatch, JobId, PlaceContent, Writers, Written},
};
use crate::{
    digest::Digest,
    exec_path::ExecPath,
    metrics::Metrics,
    output::{Class, OutputContent},
    remote::BatchAnswer,
};

/// Commands that may wait.
pub(super) const COMMANDS: usize = 64;

/// Why a want that was given up has failed.
const CANCELLED: &str = "cancelled on request";

/// A message to the coordinator.
pub(super) enum Command {
    /// A new invocation of a root begins: older ones are superseded.
    Begin(Arc<Root>, u64, oneshot::Sender<()>),
    /// Outputs are wanted.
    Want(Arc<Session>, Vec<Want>),
    /// An asker gives up.
    Cancel(Arc<Session>),
    /// A root is not used any more.
    Forget(u32),
}

/// Where the coordinator hears of what others do.
pub(super) struct Inbox {
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) written: mpsc::UnboundedReceiver<Written>,
    pub(super) pauses: watch::Receiver<Option<Pause>>,
}

/// What fetches report.
enum Fetched {
    Batch(CacheId, Vec<BatchAnswer>, OwnedSemaphorePermit),
    Large(CacheId, Digest, JobId, Result<Placed, LargeError>),
}

/// A blob that is queued or being fetched. Once its bytes have arrived, the coordinator forgets it.
struct Blob {
    jobs: Vec<JobId>,
    session: Arc<Session>,
    in_flight: bool,
    /// When it was asked for.
    asked: Instant,
    /// Bytes that did not match came once already; another connection is tried.
    suspect: bool,
    abort: Option<AbortHandle>,
}

pub(super) struct Coordinator {
    options: MaterializeOptions,
    metrics: Metrics,
    writers: Writers,
    /// Wants that no writer has yet.
    gathering: Gathering,
    next_batch: BatchId,
    /// Wants that are being looked for on disk, and the thread that does.
    checks: HashMap<BatchId, (usize, Arc<CheckBatch>)>,
    jobs: Jobs,
    paths: HashMap<(u32, ExecPath), JobId, Hashing>,
    blobs: HashMap<(CacheId, Digest), Blob, Hashing>,
    nearby: NearbyBlobs,
    /// What is going to be read from a file nearby.
    local_places: Vec<(JobId, PlaceContent)>,
    lanes: Lanes,
    fetched: mpsc::UnboundedSender<Fetched>,
    answers: Answers,
    /// When the last report or command came: the clock is not asked for every file.
    now: Instant,
    /// When a file was refused last because space is to stay free.
    low_space: Option<Instant>,
}

impl Coordinator {
    /// Runs until every sender of commands is gone and nothing is under way.
    pub(super) async fn run(
        options: MaterializeOptions,
        metrics: Metrics,
        writers: Writers,
        inbox: Inbox,
        closed: watch::Sender<bool>,
    ) {
        let Inbox {
            mut commands,
            mut written,
            mut pauses,
        } = inbox;
        let (fetched_tx, mut fetched) = mpsc::unbounded_channel();
        let mut this = Self {
            lanes: Lanes::new(&options),
            options,
            metrics,
            writers,
            gathering: Gathering::default(),
            next_batch: 0,
            checks: HashMap::new(),
            jobs: Jobs::default(),
            paths: HashMap::default(),
            blobs: HashMap::default(),
            nearby: NearbyBlobs::default(),
            local_places: Vec::new(),
            fetched: fetched_tx,
            answers: Answers::default(),
            now: Instant::now(),
            low_space: None,
        };
        let mut open = true;
        while open || !this.jobs.is_empty() || !this.checks.is_empty() {
            // Results first: they free what new work would have to wait for.
            tokio::select! {
                biased;
                Some(report) = written.recv() => {
                    this.on_written(report);
                    while let Ok(report) = written.try_recv() {
                        this.on_written(report);
                    }
                }
                Some(report) = fetched.recv() => this.on_fetched(report),
                command = commands.recv(), if open => match command {
                    Some(command) => this.on_commands(command, &mut commands),
                    None => {
                        open = false;
                        // Nobody can resume it any more.
                        this.pause(None);
                    }
                },
                Ok(()) = pauses.changed(), if open => pauses.mark_changed(),
            }
            // Before the next download, whatever else there was to do.
            if open && pauses.has_changed().is_ok_and(|has_changed| has_changed) {
                let pause = *pauses.borrow_and_update();
                this.pause(pause);
            }
            this.send_local_places();
            this.pump();
            this.answers.deliver(&this.metrics);
        }
        let writers = this.writers;
        // Nothing is left to do for them; they only let go of what they hold.
        let _ = tokio::task::spawn_blocking(move || writers.join()).await;
        // Nothing waits for it.
        let _ = closed.send(true);
    }

    /// Begins no downloads that are paused until further notice.
    fn pause(&mut self, pause: Option<Pause>) {
        let up_to = pause.map(Pause::up_to);
        self.lanes.pause(up_to);
        self.metrics.paused("required", up_to >= Some(Class::Required));
        self.metrics.paused("optional", up_to >= Some(Class::Optional));
    }

    /// Takes a command and those that wait, so that what small targets want goes to the writers together. No more at once
    /// than the channel holds, so that results are not kept waiting.
    fn on_commands(&mut self, first: Command, commands: &mut mpsc::Receiver<Command>) {
        self.on_command(first);
        for _ in 0..COMMANDS {
            let Ok(command) = commands.try_recv() else { break };
            self.on_command(command);
        }
        self.send_checks();
    }

    fn on_command(&mut self, command: Command) {
        self.now = Instant::now();
        match command {
            Command::Begin(root, version, done) => {
                self.supersede(&root, version);
                self.answers.deliver(&self.metrics);
                // The asker may have gone away.
                let _ = done.send(());
            }
            Command::Want(session, wants) => self.want(&session, wants),
            Command::Cancel(session) => self.cancel(&session),
            Command::Forget(root) => self.writers.forget(root),
        }
    }

    /// Answers everything that a session still wants, and ends what nobody else wants.
    fn cancel(&mut self, session: &Arc<Session>) {
        let given_up = Outcome::Failed(CANCELLED.to_owned());
        self.end_checks(|of| std::ptr::eq(of, &**session), &given_up);
        let mut answers = Vec::new();
        let mut orphans = Vec::new();
        for (id, job) in self.jobs.iter_mut() {
            let (gone, stay) = std::mem::take(&mut job.askers)
                .into_iter()
                .partition::<Vec<Asker>, _>(|asker| Arc::ptr_eq(&asker.session, session));
            job.askers = stay;
            if job.askers.is_empty() {
                orphans.push(id);
            }
            let content = &job.content;
            answers.extend(
                gone.into_iter()
                    .map(|asker| (asker, job.path.clone(), content.clone())),
            );
        }
        for (asker, path, content) in answers {
            self.answer(asker, path, content, given_up.clone(), None);
        }
        for id in orphans {
            self.finish(id, given_up.clone());
        }
        self.drop_unwanted_blobs();
    }

    /// Ends every want and job of the root that is older than `version`.
    fn supersede(&mut self, root: &Arc<Root>, version: u64) {
        let is_old = |of: &Session| of.root.id == root.id && of.version < version;
        self.end_checks(is_old, &Outcome::Superseded);
        let old: Vec<JobId> = self
            .jobs
            .iter_mut()
            .filter(|(_, job)| job.root.id == root.id && job.version < version)
            .map(|(id, _)| id)
            .collect();
        for id in old {
            self.finish(id, Outcome::Superseded);
        }
        self.drop_unwanted_blobs();
    }

    /// Forgets blobs that no job waits for any more.
    fn drop_unwanted_blobs(&mut self) {
        let jobs = &self.jobs;
        let lanes = &mut self.lanes;
        self.blobs.retain(|(cache, digest), blob| {
            blob.jobs.retain(|job| jobs.contains_key(job));
            if blob.jobs.is_empty() {
                lanes.remove(*cache, digest);
                if let Some(abort) = &blob.abort {
                    abort.abort();
                }
            }
            // What is in flight stays until its answer comes.
            !blob.jobs.is_empty() || blob.in_flight
        });
    }

    fn fail(&mut self, id: JobId, error: &PlaceError) {
        self.finish(id, checking::failed(error));
    }

    fn finish_placed(&mut self, id: JobId, placed: Placed) {
        let Some(job) = self.jobs.get(&id) else { return };
        let outcome = if job.warms {
            Outcome::Served {
                warmed: Some(job.bytes),
            }
        } else {
            Outcome::Downloaded {
                source: job.source,
                store: job.store.clone(),
                stamp: Some(placed.stamp),
                bytes: job.bytes,
            }
        };
        self.finish(id, outcome);
    }

    fn answer(
        &mut self,
        asker: Asker,
        path: ExecPath,
        content: OutputContent,
        outcome: Outcome,
        fetched: Option<(Instant, Instant)>,
    ) {
        let after = |time: Instant| time.saturating_duration_since(asker.since);
        let completion = Completion {
            path,
            content,
            class: asker.class,
            outcome,
            took: after(self.now),
            fetched: fetched.map(|(asked, came)| (after(asked), after(came))),
        };
        self.answers.of(&asker.session).push(completion);
    }

    /// Ends a job and tells everybody who asked.
    fn finish(&mut self, id: JobId, outcome: Outcome) {
        let Some(job) = self.jobs.remove(&id) else { return };
        // A later want of the path may have taken its place.
        if let Entry::Occupied(entry) = self.paths.entry((job.root.id, job.path.clone()))
            && *entry.get() == id
        {
            entry.remove();
        }
        let source = match &outcome {
            Outcome::Downloaded {
                source, store, bytes, ..
            } => {
                self.metrics.downloaded_bytes.inc_by(*bytes);
                let (source, store) = (source.name(), store.clone());
                self.answers.came_from(store, *bytes);
                source
            }
            Outcome::Served { warmed } => {
                self.metrics.downloaded_bytes.inc_by(warmed.unwrap_or_default());
                job.source.name()
            }
            Outcome::Present { .. } => "disk",
            _ => "none",
        };
        self.answers.ended(source, outcome.name(), 1);
        self.settle_nearby(id, &job, &outcome);
        let Job {
            path,
            content,
            mut askers,
            fetched,
            ..
        } = *job;
        let Some(last) = askers.pop() else { return };
        for asker in askers {
            self.answer(asker, path.clone(), content.clone(), outcome.clone(), fetched);
        }
        self.answer(last, path, content, outcome, fetched);
    }
}
