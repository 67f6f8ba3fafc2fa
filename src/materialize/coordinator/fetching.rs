//! Fetching: which blob is asked for next, and what its answer means for the jobs that wait for it.

use std::{collections::HashSet, sync::Arc, time::Instant};

use bytes::Bytes;
use tokio::{
    sync::{OwnedSemaphorePermit, oneshot},
    task::JoinHandle,
};

use super::{
    super::{
        large::{self, Download, LargeError},
        place::{PlaceError, Placed},
        rate::Pace,
        traced,
        want::{Outcome, Root, Source},
        writers::{CheckItem, JobId, PlaceContent, Work},
    },
    Blob, Coordinator, Fetched,
    jobs::CacheId,
    lanes::BUDGET_UNIT,
    nearby::from_here,
};
use crate::{
    digest::Digest,
    exec_path::ExecPath,
    output::{Class, OutputContent, Stamp},
    remote::BatchAnswer,
    telemetry::{Open, open},
    transport::{RemoteError, RemoteErrorKind},
};

/// An answer for every digest that was asked for: somebody waits for each, whatever became of the question.
fn all_answered(asked: Vec<Digest>, mut answers: Vec<BatchAnswer>) -> Vec<BatchAnswer> {
    let same = |(digest, answer): (&Digest, &BatchAnswer)| *digest == answer.0;
    if asked.len() == answers.len() && asked.iter().zip(&answers).all(same) {
        return answers;
    }
    let answered: HashSet<Digest> = answers.iter().map(|(digest, _)| digest.clone()).collect();
    for digest in asked {
        if !answered.contains(&digest) {
            let what = "downloading it ended without a result; this is a bug in outhaul";
            let context = format!("a batch with {digest}");
            let error = RemoteError::protocol(context, what);
            answers.push((digest, Err(error)));
        }
    }
    answers
}

impl Coordinator {
    /// Makes a job wait for its blob.
    pub(super) fn enqueue(&mut self, id: JobId) {
        if self.bring_from_nearby(id) {
            return;
        }
        let Some(job) = self.jobs.get(&id) else { return };
        let (OutputContent::Blob(digest), Some(asker)) = (&job.content, job.askers.first()) else {
            return;
        };
        let (digest, class, cache) = (digest.clone(), job.class, job.cache());
        let blob = self.blobs.entry((cache, digest.clone())).or_insert_with(|| Blob {
            jobs: Vec::new(),
            session: asker.session.clone(),
            in_flight: false,
            asked: self.now,
            suspect: false,
            abort: None,
        });
        blob.suspect |= job.mismatches > 0;
        blob.jobs.push(id);
        if !blob.in_flight {
            self.lanes.push(cache, &digest, class);
        }
    }

    /// Moves a job's blob to the lane of the job's class, if it still waits.
    pub(super) fn promote(&mut self, id: JobId) {
        let Some(job) = self.jobs.get(&id) else { return };
        let OutputContent::Blob(digest) = &job.content else {
            return;
        };
        let cache = job.cache();
        if self
            .blobs
            .get(&(cache, digest.clone()))
            .is_some_and(|blob| !blob.in_flight)
        {
            self.lanes.push(cache, digest, job.class);
        }
    }

    /// Starts as many fetches as budgets allow.
    pub(super) fn pump(&mut self) {
        while self.lanes.batches_in_flight < self.options.batches_in_flight && !self.lanes.small.is_empty() {
            let Some(most) = self.lanes.window.next_batch(self.options.batch_bytes) else {
                break;
            };
            // A batch's bytes are asked for before its size is known exactly; what it did not need is given back. Its
            // first blob comes whole, however large.
            let reserved = most.max(self.options.small_limit.min(self.options.bytes_in_flight));
            let all = self.options.bytes_in_flight.div_ceil(BUDGET_UNIT).max(1);
            let units = u32::try_from(reserved.div_ceil(BUDGET_UNIT).min(all)).unwrap_or(u32::MAX);
            let Ok(mut permit) = self.lanes.budget.clone().try_acquire_many_owned(units) else {
                break;
            };
            let Some((cache, mut digests)) = self.lanes.small.pop_batch(most, self.options.batch_count)
            else {
                break;
            };
            digests.retain(|digest| !self.refuse(cache, digest));
            if digests.is_empty() {
                continue;
            }
            let bytes: u64 = digests.iter().map(Digest::size).sum();
            let needed = usize::try_from(bytes.div_ceil(BUDGET_UNIT)).unwrap_or(usize::MAX);
            if let Some(spare) = (units as usize).checked_sub(needed).filter(|n| *n > 0) {
                drop(permit.split(spare));
            }
            self.start_batch(cache, digests, permit);
        }
        while self.lanes.large_in_flight < self.options.large_in_flight {
            let Some((cache, digest)) = self.lanes.large.pop() else {
                break;
            };
            if !self.refuse(cache, &digest) {
                self.start_large(cache, digest);
            }
        }
        let (required, optional) = self.lanes.small.depths();
        self.metrics.queue_depth("required", required);
        self.metrics.queue_depth("optional", optional);
        self.metrics.queue_depth("large", self.lanes.large.len());
        let free = self.lanes.budget.available_permits() as u64 * BUDGET_UNIT;
        let used = self.options.bytes_in_flight.saturating_sub(free);
        self.metrics
            .bytes_in_flight
            .set(i64::try_from(used).unwrap_or(i64::MAX));
    }

    pub(super) fn start_batch(&mut self, cache: CacheId, digests: Vec<Digest>, permit: OwnedSemaphorePermit) {
        let mut session = None;
        let mut avoid = false;
        let mut class = Class::Known;
        for digest in &digests {
            if let Some(blob) = self.blobs.get_mut(&(cache, digest.clone())) {
                blob.in_flight = true;
                blob.asked = self.now;
                avoid |= blob.suspect;
                session.get_or_insert_with(|| blob.session.clone());
                let classes = blob.jobs.iter().filter_map(|id| self.jobs.get(id));
                class = classes.map(|job| job.class).fold(class, Class::max);
            }
        }
        let Some(session) = session else { return };
        self.lanes.batches_in_flight += 1;
        self.metrics.request("batch");
        let fetched = self.fetched.clone();
        let asked = digests.clone();
        let window = self.lanes.window.clone();
        let (begun, bytes) = (Instant::now(), digests.iter().map(Digest::size).sum());
        window.begin(bytes);
        let pace = Pace::new(self.lanes.rate.as_ref(), class);
        let took = self.metrics.transfer("batch");
        let mut span = open(session.trace.as_ref(), "download batch").map(Open::calling);
        let task = tokio::spawn(async move {
            pace.take(bytes).await;
            let store = &*session.store;
            let reading = store.read_batch(&digests, &session.attribution, avoid);
            let answers = traced::asked(span.as_mut(), reading).await;
            if let Some(span) = span {
                traced::end_batch(span, store, &answers);
            }
            answers
        });
        tokio::spawn(async move {
            let answers = task.await.unwrap_or_default();
            let answers = all_answered(asked, answers);
            window.end(bytes, begun);
            took.observe(begun.elapsed().as_secs_f64());
            // The coordinator outlives its fetches.
            let _ = fetched.send(Fetched::Batch(cache, answers, permit));
        });
    }

    pub(super) fn start_large(&mut self, cache: CacheId, digest: Digest) {
        let Some(blob) = self.blobs.get_mut(&(cache, digest.clone())) else {
            return;
        };
        let jobs = &self.jobs;
        blob.jobs.retain(|id| jobs.contains_key(id));
        let Some((&lead, job)) = blob.jobs.first().and_then(|id| Some((id, self.jobs.get(id)?))) else {
            self.blobs.remove(&(cache, digest));
            return;
        };
        blob.in_flight = true;
        blob.asked = self.now;
        self.lanes.large_in_flight += 1;
        self.metrics.request("stream");
        let download = Download {
            store: blob.session.store.clone(),
            digest: digest.clone(),
            attribution: blob.session.attribution.clone(),
            avoid: blob.suspect,
            pace: Pace::new(self.lanes.rate.as_ref(), job.class),
            trace: blob.session.trace.clone(),
        };
        let task = if job.warms {
            let path = job.path.clone();
            tokio::spawn(large::read(download, path))
        } else {
            let (file_tx, file) = oneshot::channel();
            let shard = self.writers.shard(&job.root, &job.path);
            let (root, path) = (job.root.clone(), job.path.clone());
            let begin = Work::BeginLarge(root.clone(), path, digest.clone(), job.class, file_tx);
            self.writers.send(shard, begin);
            let version = job.version;
            tokio::spawn(large::fetch(download, file, root, version))
        };
        blob.abort = Some(task.abort_handle());
        self.report_large(task, cache, digest, lead);
    }

    /// Tells the coordinator when a large blob's task has ended, however.
    fn report_large(
        &self,
        task: JoinHandle<Result<Placed, LargeError>>,
        cache: CacheId,
        digest: Digest,
        lead: JobId,
    ) {
        let fetched = self.fetched.clone();
        let (took, begun) = (self.metrics.transfer("stream"), Instant::now());
        tokio::spawn(async move {
            let result = task.await.unwrap_or_else(|e| {
                Err(if e.is_cancelled() {
                    LargeError::Cancelled
                } else {
                    LargeError::Place(PlaceError::internal("downloading a large file panicked"))
                })
            });
            took.observe(begun.elapsed().as_secs_f64());
            let _ = fetched.send(Fetched::Large(cache, digest, lead, result));
        });
    }

    pub(super) fn on_fetched(&mut self, report: Fetched) {
        self.now = Instant::now();
        match report {
            Fetched::Batch(cache, answers, permit) => {
                self.lanes.batches_in_flight -= 1;
                let mut place = Vec::new();
                for (digest, answer) in answers {
                    self.on_answer(cache, &digest, answer, &mut place);
                }
                self.send_places(place, Some(Arc::new(permit)));
            }
            Fetched::Large(cache, digest, lead, result) => {
                self.lanes.large_in_flight -= 1;
                self.on_large(cache, digest, lead, result);
            }
        }
    }

    pub(super) fn on_answer(
        &mut self,
        cache: CacheId,
        digest: &Digest,
        answer: Result<Bytes, RemoteError>,
        place: &mut Vec<(JobId, PlaceContent)>,
    ) {
        let Some(blob) = self.blobs.remove(&(cache, digest.clone())) else {
            return;
        };
        let bytes = match answer {
            Ok(bytes) => bytes,
            Err(error) => return self.on_remote_error(blob.jobs, &error),
        };
        let store = blob.session.store.origin(digest);
        for id in blob.jobs {
            let Some(job) = self.jobs.get_mut(&id) else {
                continue;
            };
            job.source = Source::Batch;
            job.fetched = Some((blob.asked, self.now));
            job.store.clone_from(&store);
            job.bytes = digest.size();
            let content = if job.warms {
                PlaceContent::Drop
            } else {
                PlaceContent::Blob
            };
            place.push((id, content(digest.clone(), bytes.clone())));
        }
    }

    pub(super) fn on_remote_error(&mut self, jobs: Vec<JobId>, error: &RemoteError) {
        for id in jobs {
            let Some(job) = self.jobs.get_mut(&id) else {
                continue;
            };
            if error.is_not_found() && job.warms {
                self.finish(id, Outcome::Evicted(error.to_string()));
            } else if error.is_not_found() && job.missing.is_none() {
                // A bytestream:// name is no promise that the blob was ever uploaded: it may be a local output that
                // the build tool has written only now.
                job.missing = Some(Box::new(error.clone()));
                let item = CheckItem {
                    job: id,
                    path: job.path.clone(),
                    content: job.content.clone(),
                    recorded: job.recorded,
                };
                let shard = self.writers.shard(&job.root, &job.path);
                self.writers
                    .send(shard, Work::Check(job.root.clone(), vec![item]));
            } else if error.kind == RemoteErrorKind::Protocol && (job.mismatches == 0 || job.may_come_right())
            {
                // No answer, or one of the wrong size or that cannot be unpacked, is like wrong bytes: asked for once
                // more, another way.
                tracing::warn!(path = %job.path, %error, "the cache gave no usable answer; retrying");
                self.metrics.fault("unusable_answer");
                job.mismatches = job.mismatches.saturating_add(1);
                self.enqueue(id);
            } else if matches!(error.kind, RemoteErrorKind::Sink | RemoteErrorKind::Config) {
                // Ours, and not the cache's.
                self.finish(id, Outcome::Failed(error.to_string()));
            } else {
                self.finish(id, Outcome::Unavailable(error.to_string()));
            }
        }
    }

    pub(super) fn on_large(
        &mut self,
        cache: CacheId,
        digest: Digest,
        lead: JobId,
        result: Result<Placed, LargeError>,
    ) {
        let Some(blob) = self.blobs.remove(&(cache, digest.clone())) else {
            return;
        };
        let store = blob.session.store.origin(&digest);
        let followers: Vec<JobId> = blob.jobs.into_iter().filter(|id| *id != lead).collect();
        match result {
            Ok(placed) => {
                let from_here = from_here(store.as_ref());
                let origin = self.jobs.get_mut(&lead).and_then(|job| {
                    job.source = Source::Stream;
                    job.fetched = Some((blob.asked, self.now));
                    job.store = store;
                    job.bytes = digest.size();
                    (!job.warms).then(|| (job.root.clone(), job.path.clone()))
                });
                self.finish_placed(lead, placed);
                for id in followers {
                    if let Some(job) = self.jobs.get_mut(&id).filter(|job| job.warms) {
                        job.source = Source::Stream;
                        job.bytes = digest.size();
                        self.finish_placed(id, placed);
                        continue;
                    }
                    let origin = origin.as_ref().map(|origin| (origin, placed.stamp));
                    self.copy_or_fetch(id, origin, from_here.clone(), &digest);
                }
            }
            Err(LargeError::Place(error)) => {
                // A wrong path is the lead's trouble alone, and wrong bytes are asked for once more.
                self.on_place_error(lead, &error);
                for id in followers {
                    if error.is_mismatch() {
                        self.on_place_error(id, &error);
                    } else {
                        self.enqueue(id);
                    }
                }
            }
            Err(LargeError::Cancelled) => {
                self.finish(lead, Outcome::Superseded);
                for id in followers {
                    self.enqueue(id);
                }
            }
            Err(LargeError::Remote(error)) => {
                self.on_remote_error(std::iter::once(lead).chain(followers).collect(), &error);
            }
        }
    }

    pub(super) fn copy_or_fetch(
        &mut self,
        id: JobId,
        origin: Option<(&(Arc<Root>, ExecPath), Stamp)>,
        store: Option<Arc<str>>,
        digest: &Digest,
    ) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        match origin {
            Some(((root, from), stamp)) if root.id == job.root.id => {
                job.source = Source::Copy;
                job.store = store;
                job.bytes = digest.size();
                let work = Work::Copy {
                    root: job.root.clone(),
                    version: job.version,
                    job: id,
                    from: from.clone(),
                    stamp,
                    to: job.path.clone(),
                    digest: digest.clone(),
                    class: job.class,
                    trace: job.trace(),
                };
                let shard = self.writers.shard(&job.root, &job.path);
                self.writers.send(shard, work);
            }
            // Another output root: fetched once more, rather than trusting a path across roots.
            _ => self.enqueue(id),
        }
    }
}
