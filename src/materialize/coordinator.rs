//! The coordinator: one task that owns what is wanted, what is being fetched, and what is being placed.
//!
//! A want becomes a *job*: one output path of one root as of one version. A job is first checked on disk; if its
//! content is not there, its blob is queued. A blob is fetched once however many jobs wait for it, and its bytes go to
//! the writer threads, which verify and place them. Every job ends with one [`Completion`] for each asker.
//!
//! Versions decide who wins. [`Command::Begin`] ends all jobs of older versions of the root; what they still have on
//! the way is dropped when it arrives, and the root's epoch keeps a writer from publishing it in the meantime.

mod fetching;
mod placing;

use std::{collections::HashMap, sync::Arc, time::Instant};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch},
    task::AbortHandle,
};

use super::{
    MaterializeOptions,
    large::LargeError,
    place::{PlaceError, Placed},
    queue::BlobQueue,
    want::{Completion, Outcome, Root, Session, Source, Want},
    writers::{CheckItem, JobId, PlaceJob, Work, Writers, Written},
};
use crate::{
    digest::Digest,
    exec_path::ExecPath,
    metrics::Metrics,
    output::{Class, OutputContent, Stamp},
    remote::{BatchAnswer, RemoteError},
};

/// Checks that go to a writer thread in one message.
const CHECKS_AT_ONCE: usize = 256;
/// Bytes are counted in flight in units of this many, so that the semaphore's 32 bits are enough.
const BUDGET_UNIT: u64 = 1024;

/// Why a want that was given up has failed.
const CANCELLED: &str = "cancelled on request";

/// What the coordinator is told.
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

/// Work for the writers by thread, root and version.
type Grouped = HashMap<(usize, u32, u64), (Arc<Root>, Vec<PlaceJob>)>;

/// What fetches report.
enum Fetched {
    Batch(CacheId, Vec<BatchAnswer>, OwnedSemaphorePermit),
    Large(CacheId, Digest, JobId, Result<Placed, LargeError>),
}

/// Tells caches apart: the address of the store, which the entry keeps alive.
type CacheId = usize;

struct Asker {
    session: Arc<Session>,
    class: Class,
    since: Instant,
}

struct Job {
    root: Arc<Root>,
    version: u64,
    path: ExecPath,
    content: OutputContent,
    class: Class,
    recorded: Option<Stamp>,
    askers: Vec<Asker>,
    /// The bytes' way, once they have one.
    source: Source,
    bytes: u64,
    /// The disk was looked at once more after the cache had said that it does not have the blob.
    missing: Option<RemoteError>,
    /// Bytes that did not match the digest came for it once.
    mismatched: bool,
}

impl Job {
    fn cache(&self) -> CacheId {
        self.askers
            .first()
            .map_or(0, |asker| Arc::as_ptr(&asker.session.store).cast::<()>() as usize)
    }
}

/// A blob that is queued or being fetched. Once its bytes are here it is none of the coordinator's business any more.
struct Blob {
    jobs: Vec<JobId>,
    session: Arc<Session>,
    in_flight: bool,
    /// Bytes that did not match came once already; another connection is tried.
    suspect: bool,
    abort: Option<AbortHandle>,
}

pub(super) struct Coordinator {
    options: MaterializeOptions,
    metrics: Metrics,
    writers: Writers,
    next_job: JobId,
    jobs: HashMap<JobId, Job>,
    paths: HashMap<(u32, ExecPath), JobId>,
    blobs: HashMap<(CacheId, Digest), Blob>,
    small: BlobQueue<CacheId>,
    large: BlobQueue<CacheId>,
    batches_in_flight: usize,
    large_in_flight: usize,
    budget: Arc<Semaphore>,
    fetched: mpsc::UnboundedSender<Fetched>,
    outbox: Vec<(Arc<Session>, Vec<Completion>)>,
}

impl Coordinator {
    /// Runs until every sender of commands is gone and nothing is under way.
    pub(super) async fn run(
        options: MaterializeOptions,
        metrics: Metrics,
        writers: Writers,
        mut written: mpsc::UnboundedReceiver<Written>,
        mut commands: mpsc::Receiver<Command>,
        closed: watch::Sender<bool>,
    ) {
        let (fetched_tx, mut fetched) = mpsc::unbounded_channel();
        let budget = usize::try_from(options.bytes_in_flight / BUDGET_UNIT).unwrap_or(usize::MAX);
        let mut this = Self {
            budget: Arc::new(Semaphore::new(budget.clamp(1, Semaphore::MAX_PERMITS))),
            options,
            metrics,
            writers,
            next_job: 0,
            jobs: HashMap::new(),
            paths: HashMap::new(),
            blobs: HashMap::new(),
            small: BlobQueue::new(),
            large: BlobQueue::new(),
            batches_in_flight: 0,
            large_in_flight: 0,
            fetched: fetched_tx,
            outbox: Vec::new(),
        };
        let mut open = true;
        while open || !this.jobs.is_empty() {
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
                    Some(command) => this.on_command(command),
                    None => open = false,
                },
            }
            this.pump();
            this.deliver();
        }
        let writers = this.writers;
        // Nothing is left to do for them; they only let go of what they hold.
        let _ = tokio::task::spawn_blocking(move || writers.join()).await;
        // Nobody has to wait for it.
        let _ = closed.send(true);
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Begin(root, version, done) => {
                self.supersede(&root, version);
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
        let mut answers = Vec::new();
        let mut orphans = Vec::new();
        for (id, job) in &mut self.jobs {
            let (gone, stay) = std::mem::take(&mut job.askers)
                .into_iter()
                .partition::<Vec<Asker>, _>(|asker| Arc::ptr_eq(&asker.session, session));
            job.askers = stay;
            if job.askers.is_empty() {
                orphans.push(*id);
            }
            let content = &job.content;
            answers.extend(
                gone.into_iter()
                    .map(|asker| (asker, job.path.clone(), content.clone())),
            );
        }
        for (asker, path, content) in answers {
            self.answer(&asker, &path, &content, Outcome::Failed(CANCELLED.to_owned()));
        }
        for id in orphans {
            self.finish(id, Outcome::Failed(CANCELLED.to_owned()));
        }
        self.drop_unwanted_blobs();
    }

    /// Ends every job of the root that is older than `version`.
    fn supersede(&mut self, root: &Arc<Root>, version: u64) {
        let old: Vec<JobId> = self
            .jobs
            .iter()
            .filter(|(_, job)| job.root.id == root.id && job.version < version)
            .map(|(id, _)| *id)
            .collect();
        for id in old {
            self.finish(id, Outcome::Superseded);
        }
        self.drop_unwanted_blobs();
    }

    /// Forgets blobs that no job waits for any more.
    fn drop_unwanted_blobs(&mut self) {
        let jobs = &self.jobs;
        let (small, large) = (&mut self.small, &mut self.large);
        self.blobs.retain(|(cache, digest), blob| {
            blob.jobs.retain(|job| jobs.contains_key(job));
            if blob.jobs.is_empty() {
                small.remove(*cache, digest);
                large.remove(*cache, digest);
                if let Some(abort) = &blob.abort {
                    abort.abort();
                }
            }
            // What is in flight stays until its answer comes.
            !blob.jobs.is_empty() || blob.in_flight
        });
    }

    fn want(&mut self, session: &Arc<Session>, wants: Vec<Want>) {
        let mut checks: Vec<Vec<CheckItem>> = (0..self.writers.threads()).map(|_| Vec::new()).collect();
        let superseded = session.root.epoch.current() > session.version;
        for want in wants {
            let asker = Asker {
                session: session.clone(),
                class: want.class,
                since: want.since,
            };
            if superseded {
                self.answer(&asker, &want.path, &want.content, Outcome::Superseded);
                continue;
            }
            let key = (session.root.id, want.path.clone());
            if let Some(&id) = self.paths.get(&key) {
                if let Some(job) = self.jobs.get_mut(&id)
                    && job.content == want.content
                {
                    job.askers.push(asker);
                    job.version = job.version.max(session.version);
                    if want.class > job.class {
                        job.class = want.class;
                        self.promote(id);
                    }
                    continue;
                }
                // The same path with other content: the later word counts, and what streams for the earlier one must
                // not come behind it.
                if let Some(job) = self.jobs.get(&id)
                    && let OutputContent::Blob(digest) = &job.content
                    && let Some(blob) = self.blobs.get(&(job.cache(), digest.clone()))
                    && blob.jobs.first() == Some(&id)
                    && let Some(abort) = &blob.abort
                {
                    abort.abort();
                }
                self.finish(id, Outcome::Superseded);
            }
            let id = self.next_job;
            self.next_job += 1;
            let shard = self.writers.shard(&session.root, &want.path);
            if let Some(list) = checks.get_mut(shard) {
                list.push(CheckItem {
                    job: id,
                    path: want.path.clone(),
                    content: want.content.clone(),
                    recorded: want.recorded,
                });
                if list.len() >= CHECKS_AT_ONCE {
                    let work = Work::Check(session.root.clone(), std::mem::take(list));
                    self.writers.send(shard, work);
                }
            }
            self.paths.insert(key, id);
            self.jobs.insert(
                id,
                Job {
                    root: session.root.clone(),
                    version: session.version,
                    path: want.path,
                    content: want.content,
                    class: want.class,
                    recorded: want.recorded,
                    askers: vec![asker],
                    source: Source::Inline,
                    bytes: 0,
                    missing: None,
                    mismatched: false,
                },
            );
        }
        for (shard, list) in checks
            .into_iter()
            .enumerate()
            .filter(|(_, list)| !list.is_empty())
        {
            self.writers.send(shard, Work::Check(session.root.clone(), list));
        }
    }

    fn fail(&mut self, id: JobId, error: &PlaceError) {
        let outcome = if error.is_superseded() {
            Outcome::Superseded
        } else {
            Outcome::Failed(error.to_string())
        };
        self.finish(id, outcome);
    }

    fn finish_placed(&mut self, id: JobId, placed: Placed) {
        let Some(job) = self.jobs.get(&id) else { return };
        let outcome = Outcome::Downloaded {
            source: job.source,
            stamp: Some(placed.stamp),
            bytes: job.bytes,
        };
        self.finish(id, outcome);
    }

    /// Ends a job and tells everybody who asked.
    fn finish(&mut self, id: JobId, outcome: Outcome) {
        let Some(job) = self.jobs.remove(&id) else { return };
        let key = (job.root.id, job.path.clone());
        if self.paths.get(&key) == Some(&id) {
            self.paths.remove(&key);
        }
        let source = match &outcome {
            Outcome::Downloaded { source, bytes, .. } => {
                self.metrics.downloaded_bytes.inc_by(*bytes);
                source.name()
            }
            Outcome::Present { .. } => "disk",
            _ => "none",
        };
        self.metrics.blob(source, outcome.name());
        for asker in &job.askers {
            self.answer(asker, &job.path, &job.content, outcome.clone());
        }
    }

    fn answer(&mut self, asker: &Asker, path: &ExecPath, content: &OutputContent, outcome: Outcome) {
        let completion = Completion {
            path: path.clone(),
            content: content.clone(),
            class: asker.class,
            outcome,
            took: asker.since.elapsed(),
        };
        match self
            .outbox
            .iter_mut()
            .find(|(session, _)| Arc::ptr_eq(session, &asker.session))
        {
            Some((_, list)) => list.push(completion),
            None => self.outbox.push((asker.session.clone(), vec![completion])),
        }
    }

    fn deliver(&mut self) {
        for (session, list) in self.outbox.drain(..) {
            // An asker that is gone does not want to know.
            let _ = session.completions.send(list);
        }
    }
}
