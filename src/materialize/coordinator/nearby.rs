//! Blobs that need no fetching, since a file of the same output root has their bytes.
//!
//! Wants of one blob come in pieces over time: the second may come while the first one's bytes are queued or fetched,
//! which [`enqueue`](Coordinator::enqueue) joins, but also while they are being written, or long after that. Then it
//! waits for the file, or reads it. Nothing is believed: whatever is read is verified like bytes from the cache, and
//! fetched from there when it is not what it was.

use std::{collections::HashMap, hash::BuildHasher as _, sync::Arc};

use super::{
    super::{
        want::{Outcome, Source},
        writers::{JobId, PlaceContent},
    },
    Coordinator,
    jobs::Hashing,
};
use crate::{
    digest::Digest,
    exec_path::ExecPath,
    output::{OutputContent, Stamp},
    remote::LOCAL_FILES,
};

/// Files of which it is known what they hold; of as many again it may be known. About 200 bytes each, with the path.
const KNOWN: usize = 1 << 15;

/// From this size on the file system is asked to copy; below it, writing the bytes again is faster.
const COPY: u64 = 256 << 10;

/// Bytes that are read and written in one piece of work.
const LOCAL_BYTES: u64 = 1 << 20;

/// Where a blob's bytes are. Small, since there is one for every file.
enum Nearby {
    /// On their way to the disk for this job.
    Placing(JobId),
    /// In a file.
    File(Box<File>),
}

/// A file that was seen to hold a blob.
struct File {
    path: ExecPath,
    stamp: Stamp,
    digest: Digest,
    /// Set if its bytes came from a file of this machine: so do those of its copies.
    store: Option<Arc<str>>,
}

/// The store that a copy's bytes came from: that of its original, if that is a file of this machine.
pub(super) fn from_here(store: Option<&Arc<str>>) -> Option<Arc<str>> {
    store.filter(|store| ***store == *LOCAL_FILES).cloned()
}

/// A root and a blob, hashed: anyone who finds another blob's file has its digest to compare.
type Key = u64;

/// What lies in which output root.
#[derive(Default)]
pub(super) struct NearbyBlobs {
    hashing: Hashing,
    recent: HashMap<Key, Nearby, Hashing>,
    /// Those from before there were too many recent ones. All are files.
    older: HashMap<Key, Nearby, Hashing>,
    /// Jobs that are to have their bytes from what another one places.
    waiting: HashMap<JobId, Vec<JobId>>,
    /// How many recent ones are too many, when that is more than [`KNOWN`].
    most: usize,
}

impl NearbyBlobs {
    fn key(&self, root: u32, digest: &Digest) -> Key {
        self.hashing.hash_one((root, digest))
    }

    /// The bytes are going to be written for a job.
    pub(super) fn placing(&mut self, root: u32, digest: &Digest, lead: JobId) {
        self.make_room();
        let key = self.key(root, digest);
        self.recent.entry(key).or_insert(Nearby::Placing(lead));
    }

    /// Lets the recent ones be older ones when there are too many. What is being placed stays among the recent ones; if
    /// that is nearly all of them, the next time is only after as many more, or every file would be gone through again
    /// for every file.
    fn make_room(&mut self) {
        if self.recent.len() < self.most.max(KNOWN) {
            return;
        }
        self.older = std::mem::take(&mut self.recent);
        let placing = self
            .older
            .extract_if(|_, nearby| matches!(nearby, Nearby::Placing(_)));
        self.recent.extend(placing);
        self.most = 2 * self.recent.len();
    }

    /// A job that had the bytes has ended. Gives the jobs that have waited for it.
    fn settle(&mut self, root: u32, digest: &Digest, id: JobId, file: Option<File>) -> Vec<JobId> {
        let key = self.key(root, digest);
        let old = match file {
            Some(file) => {
                self.make_room();
                self.recent.insert(key, Nearby::File(Box::new(file)))
            }
            // The others that have the same bytes may have more luck.
            None if matches!(self.recent.get(&key), Some(Nearby::Placing(lead)) if *lead != id) => None,
            None => self.recent.remove(&key),
        };
        self.waiting_for(old)
    }

    /// What was known is not so. Gives the jobs that have waited for it.
    fn forget(&mut self, root: u32, digest: &Digest) -> Vec<JobId> {
        let key = self.key(root, digest);
        self.older.remove(&key);
        let old = self.recent.remove(&key);
        self.waiting_for(old)
    }

    fn waiting_for(&mut self, old: Option<Nearby>) -> Vec<JobId> {
        match old {
            Some(Nearby::Placing(lead)) if !self.waiting.is_empty() => {
                self.waiting.remove(&lead).unwrap_or_default()
            }
            _ => Vec::new(),
        }
    }
}

impl Coordinator {
    /// Brings a job's blob from a file nearby, or lets it wait for one. False if it must be fetched.
    pub(super) fn bring_from_nearby(&mut self, id: JobId) -> bool {
        let Some(job) = self.jobs.get_mut(&id).filter(|job| !job.warms) else {
            return false;
        };
        let OutputContent::Blob(digest) = &job.content else {
            return false;
        };
        let nearby = &mut self.nearby;
        let key = nearby.key(job.root.id, digest);
        match nearby.recent.get(&key).or_else(|| nearby.older.get(&key)) {
            Some(Nearby::Placing(lead)) if *lead != id => nearby.waiting.entry(*lead).or_default().push(id),
            // A file that is wanted again itself is not what it was.
            Some(Nearby::File(file)) if file.path != job.path && file.digest == *digest => {
                job.source = Source::Copy;
                job.store.clone_from(&file.store);
                job.bytes = digest.size();
                if digest.size() < COPY {
                    let content = PlaceContent::File(digest.clone(), file.path.clone());
                    self.local_places.push((id, content));
                } else {
                    let (origin, digest) = ((job.root.clone(), file.path.clone()), digest.clone());
                    let (stamp, store) = (file.stamp, file.store.clone());
                    self.copy_or_fetch(id, Some((&origin, stamp)), store, &digest);
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
    pub(super) fn settle_nearby(&mut self, id: JobId, job: &super::jobs::Job, outcome: &Outcome) {
        let OutputContent::Blob(digest) = &job.content else {
            return;
        };
        if job.warms || !matches!(job.source, Source::Batch | Source::Stream) {
            return;
        }
        let file = match outcome {
            Outcome::Downloaded {
                stamp: Some(stamp), ..
            } => Some(File {
                path: job.path.clone(),
                stamp: *stamp,
                digest: digest.clone(),
                store: from_here(job.store.as_ref()),
            }),
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
        for waiting in self.nearby.forget(job.root.id, digest) {
            self.enqueue(waiting);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DigestFunction;

    fn digest(n: usize) -> Digest {
        Digest::of(DigestFunction::Sha256, &n.to_le_bytes())
    }

    #[test]
    fn many_files_being_placed_are_not_gone_through_for_each_of_them() {
        let mut nearby = NearbyBlobs::default();
        let count = KNOWN + 1000;
        let mut rotations = 0;
        for n in 0..count {
            let before = nearby.most;
            nearby.placing(1, &digest(n), n as JobId);
            rotations += usize::from(nearby.most != before);
        }
        assert_eq!(
            (nearby.recent.len(), rotations),
            (count, 1),
            "all are being placed"
        );
    }

    #[test]
    fn what_is_known_of_files_is_bounded() {
        let mut nearby = NearbyBlobs::default();
        for n in 0..3 * KNOWN {
            let file = File {
                path: ExecPath::new("bazel-out/x").unwrap(),
                stamp: Stamp::default(),
                digest: digest(n),
                store: None,
            };
            let waiting = nearby.settle(1, &digest(n), n as JobId, Some(file));
            assert!(waiting.is_empty());
        }
        assert!(nearby.recent.len() + nearby.older.len() <= 2 * KNOWN);
    }
}
