//! Whether an output was brought to the cache that is asked for it.

use std::{collections::HashMap, sync::Arc};

use super::LeaseContext;
use crate::record::{InvocationRow, Record};

/// Where an output is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// In the cache that is asked, or it was.
    Here,
    /// In another one.
    Elsewhere,
    /// Its build is forgotten, or named no cache.
    Unknown,
}

/// By the invocations that gave outputs their content.
pub(super) struct Origins {
    record: Record,
    /// Endpoints and instance name of the caches that are asked; `None` when there is one for all builds.
    asked: Option<(String, String)>,
    known: HashMap<Arc<str>, Origin>,
}

impl Origins {
    /// When the cache of this build is asked.
    pub(super) fn new(context: &LeaseContext, row: &InvocationRow) -> Self {
        // Only one that is for all builds is for one that names none, too.
        let is_one_for_all = context.sources.of_record("", "").is_ok();
        Self {
            record: context.record.clone(),
            asked: (!is_one_for_all).then(|| (row.remote_cache.clone(), row.remote_instance_name.clone())),
            known: HashMap::new(),
        }
    }

    /// Where an invocation has its outputs. Blocks on the record when it is new.
    pub(super) fn of(&mut self, invocation: &Arc<str>) -> Origin {
        let Some((endpoint, instance_name)) = &self.asked else {
            return Origin::Here;
        };
        if let Some(known) = self.known.get(invocation) {
            return *known;
        }
        let origin = match self.record.invocation(invocation) {
            Some(row) if row.remote_cache.is_empty() => Origin::Unknown,
            // Every store that it may be in is asked, and perhaps others.
            Some(row)
                if row.remote_instance_name == *instance_name
                    && row
                        .remote_cache
                        .split(' ')
                        .all(|of| endpoint.split(' ').any(|asked| asked == of)) =>
            {
                Origin::Here
            }
            Some(_) => Origin::Elsewhere,
            None => Origin::Unknown,
        };
        self.known.insert(invocation.clone(), origin);
        origin
    }
}
