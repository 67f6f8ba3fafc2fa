//! Blobs that need no fetching, since a file of the same output root has their bytes.
//!
//! Wants of one blob come in pieces over time: the second may come while the first one's bytes are queued or fetched,
//! which [`enqueue`](Coordinator::enqueue) joins, but also while they are being written, or long after that. Then it
//! waits for the file, or reads it. Nothing is believed: whatever is read is verified like bytes from the cache, and
//! fetched from there when it is not what it was.

use std::collections::HashMap;

use super::{
    super::{
        want::{Outcome, Source},
        writers::{JobId, PlaceContent},
    },
    Coordinator, Hashing,
};
use crate::{
    digest::Digest,
    exec_path::ExecPath,
    output::{OutputContent, Stamp},
};

/// Files of which it is known what they hold; of as many again it may be known. About 200 bytes each, with the path.
const KNOWN: usize = 1 << 15;

/// From this size on the file system is asked to copy; below it, writing the bytes again is faster.
const COPY: u64 = 256 << 10;

/// Bytes that are read and written in one piece of work.
const LOCAL_BYTES: u64 = 1 << 20;

/// Where a blob's bytes are.
enum Nearby {
    /// On their way to the disk for this job. The others are to have them from there.
    Placing { lead: JobId, waiting: Vec<JobId> },
    /// In a file that had this stamp.
    File { path: ExecPath, stamp: Stamp },
}

/// What lies in which output root.
#[derive(Default)]
pub(super) struct NearbyBlobs {
    recent: HashMap<(u32, Digest), Nearby, Hashing>,
    /// Those from before there were too many recent ones. All are files.
    older: HashMap<(u32, Digest), Nearby, Hashing>,
}

impl NearbyBlobs {
    /// The bytes are going to be written for a job.
    pub(super) fn placing(&mut self, root: u32, digest: &Digest, lead: JobId) {
        if self.recent.len() >= KNOWN {
            self.older = std::mem::take(&mut self.recent);
            let placing = self
                .older
                .extract_if(|_, nearby| matches!(nearby, Nearby::Placing { .. }));
            self.recent.extend(placing);
        }
        self.recent
            .entry((root, digest.clone()))
            .or_insert_with(|| Nearby::Placing {
                lead,
                waiting: Vec::new(),
            });
    }

    /// A job that had the bytes has ended. Gives the jobs that have waited for it.
    fn settle(
        &mut self,
        root: u32,
        digest: &Digest,
        id: JobId,
        file: Option<(&ExecPath, Stamp)>,
    ) -> Vec<JobId> {
        let key = (root, digest.clone());
        let file = file.map(|(path, stamp)| Nearby::File {
            path: path.clone(),
            stamp,
        });
        match (self.recent.get_mut(&key), file) {
            (Some(Nearby::Placing { lead, .. }), None) if *lead != id => Vec::new(),
            (Some(nearby @ Nearby::Placing { .. }), Some(file)) => match std::mem::replace(nearby, file) {
                Nearby::Placing { waiting, .. } => waiting,
                Nearby::File { .. } => Vec::new(),
            },
            (_, None) => self.forget(&key),
            (_, Some(file)) => {
                self.recent.insert(key, file);
                Vec::new()
            }
        }
    }

    /// What was known is not so. Gives the jobs that have waited for it.
    fn forget(&mut self, key: &(u32, Digest)) -> Vec<JobId> {
        self.older.remove(key);
        match self.recent.remove(key) {
            Some(Nearby::Placing { waiting, .. }) => waiting,
            _ => Vec::new(),
        }
    }

    /// A root is not used any more.
    pub(super) fn forget_root(&mut self, root: u32) {
        let stays = |of: u32, nearby: &Nearby| of != root || matches!(nearby, Nearby::Placing { .. });
        self.recent.retain(|(of, _), nearby| stays(*of, nearby));
        self.older.retain(|(of, _), nearby| stays(*of, nearby));
    }
}

impl Coordinator {
    /// Brings a job's blob from a file nearby, or lets it wait for one. False if it must be fetched.
    pub(super) fn bring_from_nearby(&mut self, id: JobId) -> bool {
        let Some(job) = self.jobs.get_mut(&id) else {
            return false;
        };
        let OutputContent::Blob(digest) = &job.content else {
            return false;
        };
        let key = (job.root.id, digest.clone());
        let nearby = &mut self.nearby;
        match nearby.recent.get_mut(&key).or_else(|| nearby.older.get_mut(&key)) {
            Some(Nearby::Placing { lead, waiting }) if *lead != id => waiting.push(id),
            // A file that is wanted again itself is not what it was.
            Some(Nearby::File { path, stamp }) if *path != job.path => {
                job.source = Source::Copy;
                job.bytes = digest.size();
                let (path, stamp) = (path.clone(), *stamp);
                if digest.size() < COPY {
                    self.local_places
                        .push((id, PlaceContent::File(digest.clone(), path)));
                } else {
                    let root = job.root.clone();
                    self.copy_or_fetch(id, Some(&(root, path)), Some(stamp), &key.1);
                }
            }
            _ => return false,
        }
        true
    }

    /// Hands what is to be read and written again to the writers, in pieces that they read at once.
    pub(super) fn send_local_places(&mut self) {
        let mut bytes = 0;
        let mut piece = Vec::new();
        for (id, content) in std::mem::take(&mut self.local_places) {
            if let PlaceContent::File(digest, _) = &content {
                bytes += digest.size();
            }
            piece.push((id, content));
            if bytes >= LOCAL_BYTES {
                bytes = 0;
                self.send_places(std::mem::take(&mut piece), None);
            }
        }
        if !piece.is_empty() {
            self.send_places(piece, None);
        }
    }

    /// A job has ended that may have left a file nearby, or may have been the one that others wait for.
    pub(super) fn settle_nearby(&mut self, id: JobId, job: &super::Job, outcome: &Outcome) {
        let OutputContent::Blob(digest) = &job.content else {
            return;
        };
        if !matches!(job.source, Source::Batch | Source::Stream) {
            return;
        }
        let file = match outcome {
            Outcome::Downloaded {
                stamp: Some(stamp), ..
            } => Some((&job.path, *stamp)),
            _ => None,
        };
        for waiting in self.nearby.settle(job.root.id, digest, id, file) {
            self.enqueue(waiting);
        }
    }

    /// The bytes that a job had, or was to have from a file, were not right. It is left to the caller.
    pub(super) fn forget_nearby(&mut self, id: JobId) {
        let Some(job) = self.jobs.get(&id) else { return };
        let OutputContent::Blob(digest) = &job.content else {
            return;
        };
        for waiting in self.nearby.forget(&(job.root.id, digest.clone())) {
            self.enqueue(waiting);
        }
    }
}
