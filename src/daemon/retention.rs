//! Forgetting: journals and invocations that are old or too many, and output roots that are gone. Outputs of a root
//! that is there stay known, for they tell what is on disk.

use std::{os::unix::fs::MetadataExt as _, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::{bes::Journal, record};

/// How often it is looked whether there is something to forget.
const LOOK: Duration = Duration::from_secs(3600);
/// Invocations that are kept, however young.
const MAX_INVOCATIONS: usize = 10_000;

/// What is kept.
#[derive(Debug, Clone, Copy)]
pub struct Retention {
    /// How long settled invocations and their journals are kept.
    pub max_age: Duration,
    /// Bytes of journals that are kept; the oldest settled ones go first.
    pub journal_bytes: u64,
}

/// Forgets now, and again every hour until the token is cancelled.
pub(super) async fn keep(
    record: record::Record,
    journal: Option<Journal>,
    retention: Retention,
    stop: CancellationToken,
) {
    loop {
        let (record, journal) = (record.clone(), journal.clone());
        let done = tokio::task::spawn_blocking(move || forget(&record, journal.as_ref(), retention)).await;
        if done.is_err() {
            tracing::error!("forgetting old builds panicked; this is a bug in outhaul");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

fn forget(record: &record::Record, journal: Option<&Journal>, retention: Retention) {
    if let Some(journal) = journal {
        match journal.plan(Some(retention.max_age), Some(retention.journal_bytes)) {
            Ok(plan) => {
                let executed = journal.execute(&plan);
                tracing::debug!(?executed, "old journals were removed");
            }
            Err(error) => tracing::warn!("old journals cannot be looked for: {error}"),
        }
    }
    for (id, row) in record.roots() {
        let gone = match std::fs::metadata(&row.path) {
            Ok(now) => (now.dev(), now.ino()) != (row.device, row.inode),
            Err(error) => error.kind() == std::io::ErrorKind::NotFound,
        };
        if gone {
            tracing::info!(root = %row.path, "an output root that is gone is forgotten");
            record.forget_root(id);
        }
    }
    let plan = record.plan_retention(&record::Retention {
        max_age: Some(retention.max_age),
        max_invocations: Some(MAX_INVOCATIONS),
    });
    record.execute_retention(&plan);
}
