//! The jobs by number.

use std::{collections::VecDeque, sync::Arc, time::Instant};

use super::super::{
    want::{Root, Session, Source, Want},
    writers::JobId,
};
use crate::{
    exec_path::ExecPath,
    output::{Class, OutputContent, Stamp},
    remote::Chain,
    telemetry::Trace,
    transport::RemoteError,
};

/// Keys come from build events, a few hundred nanoseconds of hashing each with the standard library's own hasher. This
/// one is seeded as well.
pub(super) type Hashing = foldhash::fast::RandomState;

/// Distinguishes caches: the address of the store, which the entry keeps alive.
pub(super) type CacheId = usize;

pub(super) struct Asker {
    pub(super) session: Arc<Session>,
    pub(super) class: Class,
    pub(super) since: Instant,
}

impl Asker {
    pub(super) fn new(session: &Arc<Session>, want: &Want) -> Self {
        Self {
            session: session.clone(),
            class: want.class,
            since: want.since,
        }
    }
}

pub(super) struct Job {
    pub(super) root: Arc<Root>,
    pub(super) version: u64,
    /// The thread that writes into the path's directory.
    pub(super) shard: usize,
    pub(super) path: ExecPath,
    pub(super) content: OutputContent,
    pub(super) class: Class,
    pub(super) recorded: Option<Stamp>,
    pub(super) askers: Vec<Asker>,
    /// The bytes' way, once they have one.
    pub(super) source: Source,
    /// The store that they came from, where there are several.
    pub(super) store: Option<Arc<str>>,
    pub(super) bytes: u64,
    /// When the cache was asked for them, and when they came.
    pub(super) fetched: Option<(Instant, Instant)>,
    /// Nothing was in its place when it was looked for.
    pub(super) is_new: bool,
    /// The disk was looked at once more after the cache had said that it does not have the blob.
    pub(super) missing: Option<Box<RemoteError>>,
    /// How often bytes came for it that did not match the digest.
    pub(super) mismatches: u8,
    /// Its bytes are read and dropped ([`Served::warm`](super::super::want::Served::warm)).
    pub(super) warms: bool,
}

/// How often wrong bytes are asked for again: twice of each store, however short its memory of them is.
const MOST_MISMATCHES: usize = 2 * Chain::MOST;

impl Job {
    /// Whether a blob whose bytes were wrong is asked for again: they may have been those of one store among several.
    pub(super) fn may_come_right(&self) -> bool {
        let (OutputContent::Blob(digest), Some(asker)) = (&self.content, self.askers.first()) else {
            return false;
        };
        let others_may_have_it = asker.session.store.distrust(digest);
        others_may_have_it && usize::from(self.mismatches) < MOST_MISMATCHES || self.mismatches == 0
    }

    /// That of the build that asked first, if it is traced.
    pub(super) fn trace(&self) -> Option<Arc<Trace>> {
        self.askers.first()?.session.trace.clone()
    }

    pub(super) fn cache(&self) -> CacheId {
        self.askers
            .first()
            .map_or(0, |asker| Arc::as_ptr(&asker.session.store).cast::<()>() as usize)
    }
}

/// All jobs that have not ended.
///
/// Numbers are given in order and never twice, so a job is found by its distance from the oldest one: neighbours, which
/// are checked, fetched and placed together, lie together in memory too. In a map of a hundred thousand every look would
/// miss the processor's caches. A job that outlives those after it costs eight bytes for each of them.
#[derive(Default)]
pub(super) struct Jobs {
    slots: VecDeque<Option<Box<Job>>>,
    /// The number of the first slot.
    first: JobId,
    len: usize,
}

impl Jobs {
    /// The number that the next job will get.
    pub(super) fn next_id(&self) -> JobId {
        self.first + self.slots.len() as u64
    }

    /// Adds a job, and gives its number.
    pub(super) fn add(&mut self, job: Job) -> JobId {
        let id = self.next_id();
        self.slots.push_back(Some(Box::new(job)));
        self.len += 1;
        id
    }

    fn index(&self, id: JobId) -> Option<usize> {
        usize::try_from(id.checked_sub(self.first)?).ok()
    }

    pub(super) fn get(&self, id: &JobId) -> Option<&Job> {
        self.slots.get(self.index(*id)?)?.as_deref()
    }

    pub(super) fn get_mut(&mut self, id: &JobId) -> Option<&mut Job> {
        let index = self.index(*id)?;
        self.slots.get_mut(index)?.as_deref_mut()
    }

    pub(super) fn contains_key(&self, id: &JobId) -> bool {
        self.get(id).is_some()
    }

    pub(super) fn remove(&mut self, id: &JobId) -> Option<Box<Job>> {
        let index = self.index(*id)?;
        let job = self.slots.get_mut(index)?.take()?;
        self.len -= 1;
        while let Some(None) = self.slots.front() {
            self.slots.pop_front();
            self.first += 1;
        }
        Some(job)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (JobId, &mut Job)> {
        let first = self.first;
        let slots = self.slots.iter_mut().enumerate();
        slots.filter_map(move |(index, slot)| Some((first + index as u64, slot.as_deref_mut()?)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{
        super::super::{
            place::{Epoch, OutputRoot},
            want::{Root, Source},
        },
        *,
    };
    use crate::{
        exec_path::ExecPath,
        output::{Class, OutputContent},
    };

    fn job(root: &Arc<Root>, name: &str) -> Job {
        Job {
            root: root.clone(),
            version: 1,
            shard: 0,
            path: ExecPath::new(name).unwrap(),
            content: OutputContent::Directory,
            class: Class::Required,
            recorded: None,
            askers: Vec::new(),
            source: Source::Inline,
            store: None,
            bytes: 0,
            fetched: None,
            is_new: false,
            missing: None,
            mismatches: 0,
            warms: false,
        }
    }

    #[test]
    fn numbers_are_never_used_again() {
        let dir = tempfile::tempdir().unwrap();
        let root = Arc::new(Root {
            id: 1,
            place: Arc::new(OutputRoot::open(dir.path(), true).unwrap()),
            epoch: Epoch::new(),
        });
        let mut jobs = Jobs::default();
        let ids: Vec<JobId> = ["a", "b", "c"].map(|name| jobs.add(job(&root, name))).into();
        assert_eq!(ids, [0, 1, 2]);
        assert!(jobs.remove(&1).is_some());
        assert!(jobs.remove(&1).is_none());
        assert!(jobs.remove(&0).is_some());
        assert_eq!(jobs.get(&2).unwrap().path.as_str(), "c");
        assert!(jobs.get(&0).is_none() && !jobs.contains_key(&1));
        assert_eq!(jobs.iter_mut().map(|(id, _)| id).collect::<Vec<_>>(), [2]);
        assert!(jobs.remove(&2).is_some());
        assert!(jobs.is_empty());
        assert_eq!(jobs.add(job(&root, "d")), 3);
        assert!(jobs.remove(&7).is_none());
    }
}
