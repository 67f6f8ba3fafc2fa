//! What the writer threads are given, and what their reports mean.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;

use super::{
    super::{
        place::{Check, PlaceError, PlaceErrorKind, Placed, Vouched},
        want::{Outcome, Root, Source},
        writers::{JobId, PlaceContent, PlaceJob, Work, Written},
    },
    Coordinator,
};
use crate::{
    output::{Class, OutputContent},
    remote::LOCAL_FILES,
    telemetry::Trace,
};

/// What one thread places together.
struct Group {
    shard: usize,
    root: Arc<Root>,
    version: u64,
    /// That of the build whose output is the first.
    trace: Option<Arc<Trace>>,
    items: Vec<PlaceJob>,
}

impl Coordinator {
    pub(super) fn on_written(&mut self, report: Written) {
        self.now = Instant::now();
        match report {
            Written::CheckedBatch(id, results) => self.on_checked_batch(id, results),
            Written::Checked(results) => {
                let mut place = Vec::new();
                for (id, result) in results {
                    self.on_checked(id, result, &mut place);
                }
                self.send_places(place, None);
            }
            Written::Placed(results) => {
                for (id, result) in results {
                    self.on_placed(id, result);
                }
            }
        }
    }

    pub(super) fn on_checked(
        &mut self,
        id: JobId,
        result: Result<Check, PlaceError>,
        place: &mut Vec<(JobId, PlaceContent)>,
    ) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        match result {
            Ok(Check::Present { stamp, how }) => {
                let hashed = how == Vouched::Content;
                self.finish(
                    id,
                    Outcome::Present {
                        stamp: Some(stamp),
                        hashed,
                    },
                );
            }
            Ok(found @ (Check::Absent | Check::Differs)) => {
                if let Some(error) = job.missing.take() {
                    self.finish(id, Outcome::Evicted(error.to_string()));
                    return;
                }
                self.bring(id, found == Check::Absent, place);
            }
            Err(error) => self.fail(id, &error),
        }
    }

    /// Sees to it that a job's content comes to disk: at once what needs no cache, else through the queue.
    pub(super) fn bring(&mut self, id: JobId, is_new: bool, place: &mut Vec<(JobId, PlaceContent)>) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.is_new = is_new;
        let content = match &job.content {
            OutputContent::Blob(digest) if digest.is_empty() => {
                PlaceContent::Blob(digest.clone(), Bytes::new())
            }
            OutputContent::Blob(_) => {
                self.enqueue(id);
                return;
            }
            OutputContent::Inline(bytes) => {
                job.bytes = bytes.len() as u64;
                PlaceContent::Inline(bytes.clone())
            }
            OutputContent::Symlink(target) => PlaceContent::Symlink(target.clone()),
            OutputContent::Directory => PlaceContent::Directory,
        };
        place.push((id, content));
    }

    pub(super) fn on_placed(&mut self, id: JobId, result: Result<Placed, PlaceError>) {
        match result {
            Ok(placed) => self.finish_placed(id, placed),
            Err(error) => self.on_place_error(id, &error),
        }
    }

    pub(super) fn on_place_error(&mut self, id: JobId, error: &PlaceError) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        if error.is_about_space() {
            let kind = if matches!(error.kind, PlaceErrorKind::LowSpace(_)) {
                self.low_space = Some(self.now);
                "low_space"
            } else {
                "disk_full"
            };
            if error.is_for_required_only() && job.class == Class::Required {
                // Somebody has come to wait for it while it was on its way.
                let is_new = job.is_new;
                let mut place = Vec::new();
                self.bring(id, is_new, &mut place);
                self.send_places(place, None);
                return;
            }
            self.metrics.fault(kind);
            self.fail(id, error);
        } else if job.source == Source::Copy && !error.is_superseded() {
            // The origin was changed under our hands, or cannot be copied: fetch it like any other.
            tracing::debug!(path = %job.path, %error, "failed to copy from another root; downloading instead");
            job.source = Source::Inline;
            self.forget_nearby(id);
            self.enqueue(id);
        } else if error.is_mismatch() {
            let mut from = None;
            if let (OutputContent::Blob(digest), Some(asker)) = (&job.content, job.askers.first()) {
                from = asker.session.store.origin(digest);
            }
            let may_come = job.may_come_right();
            let is_local = from.as_deref() == Some(LOCAL_FILES);
            if !is_local {
                self.metrics.fault("mismatch");
            }
            if may_come && is_local {
                tracing::debug!(path = %job.path, %error, "a local file has changed; downloading instead");
                self.forget_nearby(id);
                self.enqueue(id);
            } else if may_come {
                let from = from.as_deref().unwrap_or("the cache");
                tracing::warn!(path = %job.path, %error, "{from} sent wrong bytes; retrying");
                job.mismatches = job.mismatches.saturating_add(1);
                self.forget_nearby(id);
                self.enqueue(id);
            } else {
                self.fail(id, error);
            }
        } else {
            self.fail(id, error);
        }
    }

    /// Hands bytes to the writers, one message for each thread, root and version.
    pub(super) fn send_places(
        &mut self,
        place: Vec<(JobId, PlaceContent)>,
        permit: Option<Arc<OwnedSemaphorePermit>>,
    ) {
        let mut groups: Vec<Group> = Vec::new();
        for (id, content) in place {
            let Some(job) = self.jobs.get(&id) else { continue };
            if job.source == Source::Batch
                && let PlaceContent::Blob(digest, _) = &content
            {
                self.nearby.placing(job.root.id, digest, id);
            }
            let item = PlaceJob {
                job: id,
                path: job.path.clone(),
                content,
                class: job.class,
                is_new: job.is_new,
            };
            // A few at most: threads, and mostly one build.
            let is_its = |group: &&mut Group| {
                group.shard == job.shard && group.root.id == job.root.id && group.version == job.version
            };
            match groups.iter_mut().find(is_its) {
                Some(group) => group.items.push(item),
                None => groups.push(Group {
                    shard: job.shard,
                    root: job.root.clone(),
                    version: job.version,
                    trace: job.trace(),
                    items: vec![item],
                }),
            }
        }
        for group in groups {
            let permits = permit.iter().cloned().collect();
            let work = Work::Place(group.root, group.version, group.items, permits, group.trace);
            self.writers.send(group.shard, work);
        }
    }
}
