//! What is not fetched because there is no space for it.
//!
//! The writers refuse what would not leave enough space. Their word is heeded before the next blobs are asked for, so
//! that a build that is larger than the disk does not come over the line for nothing.

use std::time::Duration;

use super::{super::place::PlaceError, Coordinator, JobId, jobs::CacheId};
use crate::{digest::Digest, output::Class};

/// How long a refusal is a reason to look at every blob.
const LOOK: Duration = Duration::from_secs(1);

impl Coordinator {
    /// Ends the jobs that wait for a blob and would be refused. True if there are no others, and it is not to be
    /// fetched.
    pub(super) fn refuse(&mut self, cache: CacheId, digest: &Digest) -> bool {
        if self.low_space.is_none_or(|at| at.elapsed() > LOOK) {
            self.low_space = None;
            return false;
        }
        let Some(blob) = self.blobs.get(&(cache, digest.clone())) else {
            return false;
        };
        let refused: Vec<(JobId, PlaceError)> = blob
            .jobs
            .iter()
            .filter_map(|id| {
                let job = self.jobs.get(id).filter(|job| !job.warms)?;
                let is_optional = job.class < Class::Required;
                Some((*id, job.root.place.refuses(&job.path, is_optional)?))
            })
            .collect();
        let is_wanted = refused.len() < blob.jobs.len();
        if let Some(blob) = self.blobs.get_mut(&(cache, digest.clone())) {
            blob.jobs
                .retain(|id| !refused.iter().any(|(other, _)| other == id));
        }
        if !is_wanted {
            self.blobs.remove(&(cache, digest.clone()));
        }
        for (id, error) in refused {
            self.metrics.fault("low_space");
            self.fail(id, &error);
        }
        !is_wanted
    }
}
