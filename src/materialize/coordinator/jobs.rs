//! The jobs by number.

use std::collections::VecDeque;

use super::{super::writers::JobId, Job};

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
            bytes: 0,
            is_new: false,
            missing: None,
            mismatched: false,
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
