//! The writer threads: everything that blocks on the file system.
//!
//! A directory's work always goes to the same thread, so that a directory has one writer at a time: creating files in
//! one directory is serialised by the kernel anyway, and two threads would only fight for its lock. Work is handed
//! over in lists, one message for many files.

use std::{
    borrow::Cow,
    collections::HashMap,
    hash::{BuildHasher, BuildHasherDefault, DefaultHasher},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Weak, mpsc as std_mpsc},
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::{
    place::{Check, Item, LargeFile, PlaceError, PlaceOptions, Placed, Placer},
    traced::end_place,
    want::{Root, Session, Want},
};
use crate::{
    digest::{Digest, DigestFunction},
    exec_path::ExecPath,
    open_files::{self, Spare},
    output::{Class, OutputContent, Stamp},
    telemetry::{Trace, open},
};

/// Work of placing that is joined while it is less than this: files, and bytes, which are in flight until all are placed.
const JOBS_TOGETHER: usize = 1024;
const BYTES_TOGETHER: usize = 2 << 20;

/// After how long without work in a root a thread lets go of it.
const IDLE: Duration = Duration::from_secs(1);

/// Number of a job in the coordinator.
pub(super) type JobId = u64;

/// Number of a batch of checks in the coordinator.
pub(super) type BatchId = u64;

/// Wants of one session whose places on disk are looked at together. The coordinator and the writer share it, so that
/// a want that is present is never more than this.
pub(super) struct CheckBatch {
    pub(super) session: Arc<Session>,
    pub(super) wants: Vec<Want>,
}

/// A check to make.
pub(super) struct CheckItem {
    pub(super) job: JobId,
    pub(super) path: ExecPath,
    pub(super) content: OutputContent,
    pub(super) recorded: Option<Stamp>,
}

/// Something to place.
pub(super) struct PlaceJob {
    pub(super) job: JobId,
    pub(super) path: ExecPath,
    pub(super) content: PlaceContent,
    pub(super) class: Class,
    /// Nothing was there when it was looked for.
    pub(super) is_new: bool,
}

/// What to place.
pub(super) enum PlaceContent {
    /// Bytes that must have this digest.
    Blob(Digest, Bytes),
    /// Bytes that must have this digest, and are placed nowhere.
    Drop(Digest, Bytes),
    /// The bytes of a file of the same root that must have this digest.
    File(Digest, ExecPath),
    /// Bytes that came with the event; there is nothing to verify them against.
    Inline(Bytes),
    /// A symlink's target.
    Symlink(String),
    /// An empty directory.
    Directory,
}

impl PlaceContent {
    /// Bytes that it keeps in memory, now or when it is placed.
    fn len(&self) -> usize {
        match self {
            Self::Blob(_, bytes) | Self::Drop(_, bytes) | Self::Inline(bytes) => bytes.len(),
            Self::File(digest, _) => usize::try_from(digest.size()).unwrap_or(usize::MAX),
            Self::Symlink(_) | Self::Directory => 0,
        }
    }
}

/// Work for a writer thread.
pub(super) enum Work {
    /// Are they there already?
    CheckBatch(BatchId, Arc<CheckBatch>),
    Check(Arc<Root>, Vec<CheckItem>),
    /// The permits are the bytes' share of what may be in flight; they are given back when the files are placed.
    Place(
        Arc<Root>,
        u64,
        Vec<PlaceJob>,
        Vec<Arc<OwnedSemaphorePermit>>,
        Option<Arc<Trace>>,
    ),
    Copy {
        root: Arc<Root>,
        version: u64,
        job: JobId,
        from: ExecPath,
        stamp: Stamp,
        to: ExecPath,
        digest: Digest,
        class: Class,
        trace: Option<Arc<Trace>>,
    },
    BeginLarge(
        Arc<Root>,
        ExecPath,
        Digest,
        Class,
        oneshot::Sender<Result<LargeFile, PlaceError>>,
    ),
    /// The root is not used any more.
    Forget(u32),
}

/// What a writer thread reports.
pub(super) enum Written {
    /// One answer for each want, in their order.
    CheckedBatch(BatchId, Vec<Result<Check, PlaceError>>),
    Checked(Vec<(JobId, Result<Check, PlaceError>)>),
    Placed(Vec<(JobId, Result<Placed, PlaceError>)>),
}

/// The threads that check and write files.
pub(super) struct Writers {
    queues: Vec<std_mpsc::Sender<Work>>,
    threads: Vec<thread::JoinHandle<()>>,
    hasher: BuildHasherDefault<DefaultHasher>,
}

impl Writers {
    /// Starts the threads. They end when this is dropped.
    pub(super) fn start(
        threads: usize,
        options: PlaceOptions,
        reports: &mpsc::UnboundedSender<Written>,
    ) -> std::io::Result<Self> {
        let (mut queues, mut handles) = (Vec::new(), Vec::new());
        for n in 0..threads.max(1) {
            let (queue, work) = std_mpsc::channel();
            let placers: Arc<Placers> = Arc::default();
            let spare: Arc<dyn Spare> = placers.clone();
            open_files::spares(Arc::downgrade(&spare));
            let writer = Writer {
                options,
                current: None,
                placers,
                reports: reports.clone(),
            };
            let handle = thread::Builder::new()
                .name(format!("outhaul-writer-{n}"))
                .spawn(move || writer.run(&work))?;
            queues.push(queue);
            handles.push(handle);
        }
        Ok(Self {
            queues,
            threads: handles,
            hasher: BuildHasherDefault::default(),
        })
    }

    /// Ends the threads and waits for them, so that what they hold of output roots is let go. Blocks.
    pub(super) fn join(self) {
        drop(self.queues);
        for thread in self.threads {
            // A panic was reported when it happened.
            let _ = thread.join();
        }
    }

    pub(super) fn threads(&self) -> usize {
        self.queues.len()
    }

    /// Which thread writes into a path's directory.
    pub(super) fn shard(&self, root: &Root, path: &ExecPath) -> usize {
        let hash = self.hasher.hash_one((root.id, path.parent()));
        usize::try_from(hash % self.queues.len() as u64).unwrap_or(0)
    }

    pub(super) fn send(&self, shard: usize, work: Work) {
        if let Some(queue) = self.queues.get(shard) {
            // A writer ends only with the coordinator, so there is no one left to tell.
            let _ = queue.send(work);
        }
    }

    pub(super) fn forget(&self, root: u32) {
        for queue in &self.queues {
            let _ = queue.send(Work::Forget(root));
        }
    }
}

/// What a thread has of the roots that it worked in, but for the one that it works in just now. What they keep open is
/// closed by any caller that finds no descriptors, as well.
#[derive(Default)]
struct Placers(Mutex<HashMap<u32, Kept>>);

struct Kept {
    /// Gone once the root is unused.
    root: Weak<Root>,
    placer: Placer,
    used: Instant,
}

impl Placers {
    /// Lets go of those that there was no work in for a while, or that nobody uses any more: descriptors of directories
    /// that somebody has deleted, or wants to unmount, are not kept for nothing.
    fn tidy(&self, idle: Duration) {
        let is_over = |kept: &Kept| kept.used.elapsed() >= idle || kept.root.strong_count() == 0;
        let over: Vec<Kept> = (self.0.lock().extract_if(|_, kept| is_over(kept)))
            .map(|(_, kept)| kept)
            .collect();
        for kept in over {
            // Anyone who still places something there has it, or makes another one.
            kept.placer.root().let_go();
        }
    }
}

impl Spare for Placers {
    fn spare(&self) {
        let mut placers = self.0.lock();
        // Temporary directories of those in use stay: another thread may be just making one.
        placers
            .values_mut()
            .for_each(|kept| kept.placer.close_directories());
        let unused: Vec<_> = placers
            .extract_if(|_, kept| kept.root.strong_count() == 0)
            .collect();
        drop(placers);
        drop(unused);
    }
}

struct Writer {
    options: PlaceOptions,
    /// For the work at hand.
    current: Option<Kept>,
    placers: Arc<Placers>,
    reports: mpsc::UnboundedSender<Written>,
}

impl Writer {
    fn run(mut self, work: &std_mpsc::Receiver<Work>) {
        let mut next = None;
        while let Some(mut item) = next.take().or_else(|| self.receive(work)) {
            next = join_places(&mut item, work);
            // A panic below would be a bug; it must cost one piece of work, not every later one.
            let lost = Lost::of(&item);
            let served = catch_unwind(AssertUnwindSafe(|| self.serve(item)));
            let current = self.current.take();
            match served {
                Ok(Some(written)) => {
                    let _ = self.reports.send(written);
                }
                Ok(None) => {}
                Err(_) => {
                    tracing::error!("a writer thread panicked; this is a bug in outhaul");
                    self.placers.0.lock().clear();
                    if let Some(report) = lost.report() {
                        let _ = self.reports.send(report);
                    }
                    continue;
                }
            }
            if let Some(mut kept) = current
                && let Some(root) = kept.root.upgrade()
            {
                kept.used = Instant::now();
                self.placers.0.lock().insert(root.id, kept);
            }
        }
    }

    /// The next piece of work. Meanwhile, roots are let go of.
    fn receive(&mut self, work: &std_mpsc::Receiver<Work>) -> Option<Work> {
        self.placers.tidy(IDLE);
        if !self.placers.0.lock().is_empty() {
            match work.recv_timeout(IDLE) {
                Ok(item) => return Some(item),
                Err(std_mpsc::RecvTimeoutError::Disconnected) => return None,
                Err(std_mpsc::RecvTimeoutError::Timeout) => self.placers.tidy(Duration::ZERO),
            }
        }
        work.recv().ok()
    }

    fn placer(&mut self, root: &Arc<Root>) -> &mut Placer {
        let kept = self.placers.0.lock().remove(&root.id);
        let placer = kept.map_or_else(
            || Placer::new(root.place.clone(), self.options),
            |kept| kept.placer,
        );
        let kept = Kept {
            root: Arc::downgrade(root),
            placer,
            used: Instant::now(),
        };
        &mut self.current.insert(kept).placer
    }

    fn serve(&mut self, work: Work) -> Option<Written> {
        match work {
            Work::CheckBatch(id, batch) => {
                let wants = batch.wants.iter();
                let checked = if batch.session.served.is_some() {
                    let wants = wants.map(|want| (&want.path, &want.content));
                    batch.session.root.place.look(wants)
                } else {
                    let wants = wants.map(|want| (&want.path, &want.content, want.recorded.as_ref()));
                    self.placer(&batch.session.root).check_many(wants)
                };
                // Let go of before the report, so that the coordinator has it for itself.
                drop(batch);
                Some(Written::CheckedBatch(id, checked))
            }
            Work::Check(root, items) => {
                let placer = self.placer(&root);
                let checked = items
                    .into_iter()
                    .map(|item| {
                        (
                            item.job,
                            placer.check(&item.path, &item.content, item.recorded.as_ref()),
                        )
                    })
                    .collect();
                Some(Written::Checked(checked))
            }
            Work::Place(root, version, jobs, permits, trace) => {
                let placed = self.place(&root, version, &jobs, trace.as_ref());
                drop((jobs, permits));
                Some(Written::Placed(placed))
            }
            Work::Copy {
                root,
                version,
                job,
                from,
                stamp,
                to,
                digest,
                class,
                trace,
            } => {
                let span = open(trace.as_ref(), "place");
                let origin = (&from, &stamp);
                let placed = self.placer(&root).copy_within(
                    origin,
                    &to,
                    &digest,
                    class < Class::Required,
                    &root.epoch,
                    version,
                );
                if let Some(span) = span {
                    end_place(span, digest.size(), std::iter::once(&placed));
                }
                Some(Written::Placed(vec![(job, placed)]))
            }
            Work::BeginLarge(root, path, digest, class, reply) => {
                let placer = self.placer(&root);
                let promised = placer.promise(&path, class < Class::Required, digest.size());
                let file = promised.and_then(|promised| {
                    let file = placer.begin_large(&path, &digest)?;
                    Ok(file.with_promise(promised))
                });
                let _ = reply.send(file);
                None
            }
            Work::Forget(root) => {
                self.placers.0.lock().remove(&root);
                None
            }
        }
    }

    fn place(
        &mut self,
        root: &Arc<Root>,
        version: u64,
        jobs: &[PlaceJob],
        trace: Option<&Arc<Trace>>,
    ) -> Vec<(JobId, Result<Placed, PlaceError>)> {
        let span = open(trace, "place");
        let mark = self.options.space;
        let placer = self.placer(root);
        let mut placed = Vec::with_capacity(jobs.len());
        let mut files = Vec::with_capacity(jobs.len());
        // Held until all are written.
        let mut promised = placer.promised();
        for job in jobs {
            if let PlaceContent::Drop(digest, bytes) = &job.content {
                let actual = Digest::of(digest.function(), bytes);
                placed.push((job.job, Placed::nowhere(&job.path, digest, actual)));
                continue;
            }
            let bytes = u64::try_from(job.content.len()).unwrap_or(u64::MAX);
            let is_optional = job.class < Class::Required;
            if let Err(error) = promised.ask(mark, is_optional, bytes, job.path.as_str()) {
                placed.push((job.job, Err(error)));
                continue;
            }
            let mut file = |digest, bytes| {
                files.push(File {
                    dir: job.path.parent().unwrap_or(""),
                    job,
                    digest,
                    bytes,
                });
            };
            match &job.content {
                PlaceContent::Blob(digest, bytes) => file(Cow::Borrowed(digest), Cow::Borrowed(bytes)),
                PlaceContent::File(digest, from) => match placer.read_file(from, digest) {
                    Ok(bytes) => file(Cow::Borrowed(digest), Cow::Owned(bytes)),
                    Err(error) => placed.push((job.job, Err(error))),
                },
                PlaceContent::Inline(bytes) => {
                    // Nothing says what they should be; they are what the event says that they are.
                    let digest = Digest::of(DigestFunction::Sha256, bytes);
                    file(Cow::Owned(digest), Cow::Borrowed(bytes));
                }
                PlaceContent::Symlink(target) => {
                    let made = placer.place_symlink(&job.path, target, &root.epoch, version);
                    placed.push((job.job, made));
                }
                PlaceContent::Directory => {
                    placed.push((job.job, placer.make_directory(&job.path, &root.epoch, version)));
                }
                // It is done with above.
                PlaceContent::Drop(..) => {}
            }
        }
        // One directory's files go together, in the order in which they came.
        if !files.is_sorted_by_key(|file| file.dir) {
            files.sort_by_key(|file| file.dir);
        }
        let items: Vec<Item<'_>> = files
            .iter()
            .map(|file| Item {
                path: &file.job.path,
                digest: &file.digest,
                bytes: &file.bytes,
                is_new: file.job.is_new,
            })
            .collect();
        let results = placer.place_many(&items, &root.epoch, version);
        placed.extend(files.iter().map(|file| file.job.job).zip(results));
        if let Some(span) = span {
            let bytes = jobs.iter().map(|job| job.content.len() as u64).sum();
            end_place(span, bytes, placed.iter().map(|(_, placed)| placed));
        }
        placed
    }
}

/// Adds to a piece of work what is queued after it and of its kind: a batch of blobs mostly ends in the middle of a
/// directory, and a new directory that is filled at once is cheaper. Gives what was taken and does not fit.
fn join_places(item: &mut Work, work: &std_mpsc::Receiver<Work>) -> Option<Work> {
    let Work::Place(root, version, jobs, permits, _) = item else {
        return None;
    };
    // Links and directories are made before files: joined with files that came earlier, they would overtake one that
    // they replace.
    let are_files = |jobs: &[PlaceJob]| {
        let is_file =
            |job: &PlaceJob| !matches!(job.content, PlaceContent::Symlink(_) | PlaceContent::Directory);
        jobs.iter().all(is_file)
    };
    if !are_files(jobs) {
        return None;
    }
    let bytes_of = |jobs: &[PlaceJob]| jobs.iter().map(|job| job.content.len()).sum::<usize>();
    let mut bytes = bytes_of(jobs);
    while jobs.len() < JOBS_TOGETHER && bytes < BYTES_TOGETHER {
        match work.try_recv() {
            Ok(Work::Place(of, as_of, more, theirs, _))
                if of.id == root.id && as_of == *version && are_files(&more) =>
            {
                bytes += bytes_of(&more);
                jobs.extend(more);
                permits.extend(theirs);
            }
            other => return other.ok(),
        }
    }
    None
}

/// A file to place, and where its bytes are.
struct File<'a> {
    dir: &'a str,
    job: &'a PlaceJob,
    digest: Cow<'a, Digest>,
    bytes: Cow<'a, [u8]>,
}

/// What must be answered if a piece of work comes to nothing.
enum Lost {
    Batch(BatchId, usize),
    Checks(Vec<JobId>),
    Places(Vec<JobId>),
    Nothing,
}

impl Lost {
    fn of(work: &Work) -> Self {
        match work {
            Work::CheckBatch(id, batch) => Self::Batch(*id, batch.wants.len()),
            Work::Check(_, items) => Self::Checks(items.iter().map(|i| i.job).collect()),
            Work::Place(_, _, jobs, ..) => Self::Places(jobs.iter().map(|j| j.job).collect()),
            Work::Copy { job, .. } => Self::Places(vec![*job]),
            Work::BeginLarge(..) | Work::Forget(_) => Self::Nothing,
        }
    }

    fn report(self) -> Option<Written> {
        let error = || PlaceError::internal("a writer thread panicked");
        Some(match self {
            Self::Batch(id, len) => Written::CheckedBatch(id, (0..len).map(|_| Err(error())).collect()),
            Self::Checks(jobs) => Written::Checked(jobs.into_iter().map(|job| (job, Err(error()))).collect()),
            Self::Places(jobs) => Written::Placed(jobs.into_iter().map(|job| (job, Err(error()))).collect()),
            Self::Nothing => return None,
        })
    }
}
