//! Wants whose places on disk are looked at: nothing more is made of them until something is found missing.
//!
//! In a build that changes nothing every want ends here, so it costs the coordinator no job and no entry in a map: a
//! batch of wants is shared with the writer that looks, and what is present is answered straight from it. Wants of one
//! directory go to one thread, and its reports come in order, so the later of two wants of a path is also the later to
//! be known.

use std::{sync::Arc, time::Instant};

use super::{
    super::{
        place::{Check, PlaceError, Vouched},
        want::{Completion, Outcome, Root, Served, Session, Source, Want},
        writers::{BatchId, CheckBatch, CheckItem, JobId, Work},
    },
    Coordinator,
    jobs::{Asker, Job},
};
use crate::output::OutputContent;

/// Wants that go to a writer thread in one message.
const CHECKS_AT_ONCE: usize = 256;

/// Wants that are about to be handed to the writers, by thread. All are of one session.
#[derive(Default)]
pub(super) struct Gathering {
    session: Option<Arc<Session>>,
    wants: Vec<Vec<Want>>,
}

impl Coordinator {
    pub(super) fn want(&mut self, session: &Arc<Session>, wants: Vec<Want>) {
        // Of this process's builds; those of others are looked for by the writers, who may block.
        if session.root.epoch.current() > session.version {
            self.answer_wants(session, wants, &Outcome::Superseded);
            return;
        }
        let gathers = |of: &Arc<Session>| Arc::ptr_eq(of, session);
        if !self.gathering.session.as_ref().is_some_and(gathers) {
            self.send_checks();
            self.gathering.session = Some(session.clone());
            self.gathering.wants.resize_with(self.writers.threads(), Vec::new);
        }
        let mut directory = None::<String>;
        let mut shard = 0;
        for want in wants {
            let Some(want) = self.join(session, want) else {
                continue;
            };
            // A directory's outputs mostly come together.
            let parent = want.path.parent().unwrap_or("");
            if directory.as_deref() != Some(parent) {
                shard = self.writers.shard(&session.root, &want.path);
                directory = Some(parent.to_owned());
            }
            let Some(list) = self.gathering.wants.get_mut(shard) else {
                continue;
            };
            list.push(want);
            if list.len() >= CHECKS_AT_ONCE {
                let wants = std::mem::take(list);
                self.send_check(session.clone(), wants, shard);
            }
        }
    }

    /// Sends what has been gathered so far.
    pub(super) fn send_checks(&mut self) {
        let Some(session) = self.gathering.session.take() else {
            return;
        };
        for shard in 0..self.gathering.wants.len() {
            let wants = std::mem::take(&mut self.gathering.wants[shard]);
            if !wants.is_empty() {
                self.send_check(session.clone(), wants, shard);
            }
        }
    }

    fn send_check(&mut self, session: Arc<Session>, wants: Vec<Want>, shard: usize) {
        let id = self.next_batch;
        self.next_batch += 1;
        let batch = Arc::new(CheckBatch { session, wants });
        self.checks.insert(id, (shard, batch.clone()));
        self.writers.send(shard, Work::CheckBatch(id, batch));
    }

    /// Lets a want wait for the job of its path, if that is after the same. One that is after something else ends: the
    /// later word counts. Gives the want back if it has to go its own way.
    fn join(&mut self, session: &Arc<Session>, want: Want) -> Option<Want> {
        if self.paths.is_empty() {
            return Some(want);
        }
        let Some(&id) = self.paths.get(&(session.root.id, want.path.clone())) else {
            return Some(want);
        };
        if let Some(job) = self.jobs.get_mut(&id)
            && job.content == want.content
        {
            job.askers.push(Asker::new(session, &want));
            job.version = job.version.max(session.version);
            if want.class > job.class {
                job.class = want.class;
                self.promote(id);
            }
            return None;
        }
        self.abort_stream(id);
        self.finish(id, Outcome::Superseded);
        Some(want)
    }

    /// Makes a job of a want for which there is no job yet.
    fn add_job(&mut self, session: &Arc<Session>, want: Want, shard: usize) -> JobId {
        self.paths
            .insert((session.root.id, want.path.clone()), self.jobs.next_id());
        let job = Job {
            root: session.root.clone(),
            version: session.version,
            shard,
            askers: vec![Asker::new(session, &want)],
            path: want.path,
            content: want.content,
            class: want.class,
            recorded: want.recorded,
            source: Source::Inline,
            store: None,
            bytes: 0,
            fetched: None,
            is_new: false,
            missing: None,
            mismatches: 0,
            warms: session.served.is_some(),
        };
        self.jobs.add(job)
    }

    /// A writer has looked at a batch of wants.
    pub(super) fn on_checked_batch(&mut self, id: BatchId, results: Vec<Result<Check, PlaceError>>) {
        // Answered already when a newer build has begun or the asker has given up.
        let Some((shard, batch)) = self.checks.remove(&id) else {
            return;
        };
        let (session, wants) = match Arc::try_unwrap(batch) {
            Ok(batch) => (batch.session, batch.wants),
            Err(shared) => (shared.session.clone(), shared.wants.clone()),
        };
        let mut present = Vec::new();
        let mut place = Vec::new();
        for (want, result) in wants.into_iter().zip(results) {
            if let Some(served) = &session.served {
                self.on_looked(&session, served, want, result, shard);
                continue;
            }
            match result {
                Ok(Check::Present { stamp, how }) => {
                    if let Some(other) = self.job_of_other_content(&session.root, &want) {
                        self.check_after(other, &session, want, shard);
                        continue;
                    }
                    let outcome = Outcome::Present {
                        stamp: Some(stamp),
                        hashed: how == Vouched::Content,
                    };
                    present.push(ended(want, outcome, self.now));
                }
                Ok(found @ (Check::Absent | Check::Differs)) => {
                    if let Some(want) = self.join(&session, want) {
                        let id = self.add_job(&session, want, shard);
                        self.bring(id, found == Check::Absent, &mut place);
                    }
                }
                Err(error) => self.answer_wants(&session, vec![want], &failed(&error)),
            }
        }
        self.answers.ended("disk", "present", present.len() as u64);
        self.answers.add(&session, present);
        self.send_places(place, None);
    }

    /// A writer has looked for an output where it is served from.
    fn on_looked(
        &mut self,
        session: &Arc<Session>,
        served: &Served,
        want: Want,
        result: Result<Check, PlaceError>,
        shard: usize,
    ) {
        let by = &served.by;
        let outcome = match result {
            Ok(Check::Present { .. }) => {
                if served.warm && matches!(&want.content, OutputContent::Blob(digest) if !digest.is_empty()) {
                    if let Some(want) = self.join(session, want) {
                        let id = self.add_job(session, want, shard);
                        self.enqueue(id);
                    }
                    return;
                }
                Outcome::Served { warmed: None }
            }
            Ok(Check::Absent) => Outcome::Failed(format!("{by} does not have it")),
            Ok(Check::Differs) => Outcome::Failed(format!(
                "{by} has something else in its place: its size or type differs from what the build reported"
            )),
            Err(error) => failed(&error),
        };
        self.answer_wants(session, vec![want], &outcome);
    }

    /// The job that is after something else at a want's path.
    fn job_of_other_content(&self, root: &Root, want: &Want) -> Option<JobId> {
        if self.paths.is_empty() {
            return None;
        }
        let id = *self.paths.get(&(root.id, want.path.clone()))?;
        let job = self.jobs.get(&id)?;
        (job.content != want.content).then_some(id)
    }

    /// What a later want is after was there when it was looked for; but an earlier one's bytes may be on their way to
    /// the same path. That ends, and there is another look after whatever it has done.
    fn check_after(&mut self, earlier: JobId, session: &Arc<Session>, want: Want, shard: usize) {
        self.abort_stream(earlier);
        self.finish(earlier, Outcome::Superseded);
        let item = CheckItem {
            job: self.jobs.next_id(),
            path: want.path.clone(),
            content: want.content.clone(),
            recorded: want.recorded,
        };
        self.add_job(session, want, shard);
        self.writers
            .send(shard, Work::Check(session.root.clone(), vec![item]));
    }

    /// Stops a stream that a job alone has begun.
    fn abort_stream(&self, id: JobId) {
        if let Some(job) = self.jobs.get(&id)
            && let OutputContent::Blob(digest) = &job.content
            && let Some(blob) = self.blobs.get(&(job.cache(), digest.clone()))
            && blob.jobs.first() == Some(&id)
            && let Some(abort) = &blob.abort
        {
            abort.abort();
        }
    }

    /// Answers all wants that are being looked at and fit.
    pub(super) fn end_checks(&mut self, fits: impl Fn(&Session) -> bool, outcome: &Outcome) {
        self.send_checks();
        let ended: Vec<Arc<CheckBatch>> = self
            .checks
            .extract_if(|_, (_, batch)| fits(&batch.session))
            .map(|(_, (_, batch))| batch)
            .collect();
        for batch in ended {
            self.answer_wants(&batch.session, batch.wants.clone(), outcome);
        }
    }

    fn answer_wants(&mut self, session: &Arc<Session>, wants: Vec<Want>, outcome: &Outcome) {
        self.answers.ended("none", outcome.name(), wants.len() as u64);
        let now = self.now;
        let completions = wants.into_iter().map(|want| ended(want, outcome.clone(), now));
        self.answers.add(session, completions.collect());
    }
}

/// The end of something wanted that has come to no job.
fn ended(want: Want, outcome: Outcome, now: Instant) -> Completion {
    Completion {
        fetched: None,
        path: want.path,
        content: want.content,
        class: want.class,
        outcome,
        took: now.saturating_duration_since(want.since),
    }
}

/// How a want ends that could not be looked at or placed.
pub(super) fn failed(error: &PlaceError) -> Outcome {
    if error.is_superseded() {
        Outcome::Superseded
    } else if error.is_mismatch() {
        // Bazel alone builds what comes wrong from its cache.
        Outcome::Unavailable(error.to_string())
    } else if error.is_out_of_space() {
        Outcome::NoSpace(error.to_string())
    } else {
        Outcome::Failed(error.to_string())
    }
}
