//! Forgetting: journals and invocations that are old or too many, and output roots that are gone. Outputs of a root
//! that is there stay known, for they say what is on disk. Planned first, so that it can be shown, then executed.

use std::{collections::HashSet, os::unix::fs::MetadataExt as _, sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use super::recovery::blocking;
use crate::{
    journal::{self, Journal, JournalError},
    record::{self, RetentionPlan, RootId},
    roots::Roots,
};

/// How often it is looked whether there is something to forget; more often where little is kept for long.
const LOOK: Duration = Duration::from_secs(3600);
const LOOK_OFTEN: Duration = Duration::from_secs(10);
/// Invocations that are kept, however young.
const MAX_INVOCATIONS: usize = 10_000;

/// What is kept.
#[derive(Debug, Clone, Copy)]
pub struct Retention {
    /// How long settled invocations and their journals are kept after they were used last.
    pub max_age: Duration,
    /// Bytes of journals that are kept; those that were not used for longest go first.
    pub journal_bytes: u64,
}

/// What is to be forgotten.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// Journals to delete.
    pub journals: journal::Plan,
    /// Invocations to forget.
    pub invocations: RetentionPlan,
    /// Output roots that are gone, with their paths.
    pub roots: Vec<(RootId, String)>,
}

impl Retention {
    /// Plans what to forget. An invocation stays as long as its journal does: a user may have staged from it lately.
    /// Blocks on the file system.
    ///
    /// # Errors
    /// When the journals cannot be listed.
    pub fn plan(&self, record: &record::Record, journal: Option<&Journal>) -> Result<Plan, JournalError> {
        let mut plan = Plan::default();
        let mut in_use = HashSet::new();
        if let Some(journal) = journal {
            plan.journals = journal.plan(Some(self.max_age), Some(self.journal_bytes))?;
            let deleted: HashSet<_> = plan.journals.delete.iter().map(|entry| &entry.path).collect();
            for entry in journal.list()? {
                if !deleted.contains(&entry.path) {
                    in_use.insert(entry.key.invocation_id);
                }
            }
        }
        plan.invocations = record.plan_retention(&record::Retention {
            max_age: Some(self.max_age),
            max_invocations: Some(MAX_INVOCATIONS),
        });
        let planned = plan.invocations.remove.len();
        plan.invocations.remove.retain(|id| !in_use.contains(id));
        plan.invocations.kept += planned - plan.invocations.remove.len();
        for (id, row) in record.roots() {
            let gone = match std::fs::metadata(&row.path) {
                Ok(now) => (now.dev(), now.ino()) != (row.device, row.inode),
                Err(error) => error.kind() == std::io::ErrorKind::NotFound,
            };
            if gone {
                plan.roots.push((id, row.path));
            }
        }
        Ok(plan)
    }
}

impl Plan {
    /// Forgets what was planned. Blocks on the file system.
    pub(crate) fn execute(&self, record: &record::Record, journal: Option<&Journal>) -> journal::Executed {
        let executed = journal.map_or_else(journal::Executed::default, |j| j.execute(&self.journals));
        for (id, path) in &self.roots {
            tracing::info!(root = %path, "deleted the record of an output root that no longer exists");
            record.forget_root(*id);
        }
        record.execute_retention(&self.invocations);
        executed
    }
}

/// Forgets now, and again every hour until the token is cancelled.
pub(super) async fn keep(
    record: record::Record,
    journal: Option<Journal>,
    roots: Arc<Roots>,
    retention: Retention,
    stop: CancellationToken,
) {
    loop {
        let (record, journal, roots) = (record.clone(), journal.clone(), roots.clone());
        blocking("deleting old builds", move || {
            forget(&record, journal.as_ref(), retention);
            roots.give_up_gone();
        })
        .await;
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep((retention.max_age / 4).clamp(LOOK_OFTEN, LOOK)) => {}
        }
    }
}

fn forget(record: &record::Record, journal: Option<&Journal>, retention: Retention) {
    match retention.plan(record, journal) {
        Ok(plan) => {
            let executed = plan.execute(record, journal);
            tracing::debug!(?executed, "deleted old journals");
        }
        Err(error) => tracing::warn!("failed to look for old builds: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        record::{InvocationRow, InvocationState},
        units::now_ms,
    };

    const DAY_MS: i64 = 86_400_000;
    const RETENTION: Retention = Retention {
        max_age: Duration::from_secs(7 * 86_400),
        journal_bytes: u64::MAX,
    };

    /// A record with builds that started this many days ago, each with its own number as its id.
    fn record(days_ago: &[i64]) -> (tempfile::TempDir, record::Record) {
        let dir = tempfile::tempdir().unwrap();
        let (record, _) = record::Record::open(dir.path()).unwrap();
        for days in days_ago {
            record.put_invocation(&InvocationRow {
                invocation_id: days.to_string(),
                state: InvocationState::Settled,
                started_ms: now_ms() - days * DAY_MS,
                settled_ms: now_ms() - days * DAY_MS,
                ..InvocationRow::default()
            });
        }
        (dir, record)
    }

    #[test]
    fn a_build_of_the_future_has_no_age_and_stops_no_forgetting_of_old_ones() {
        let (_dir, record) = record(&[0, 10, -1000]);
        let plan = RETENTION.plan(&record, None).unwrap();
        assert_eq!(plan.invocations.remove, ["10"]);
        assert_eq!(plan.invocations.kept, 2);
    }
}
