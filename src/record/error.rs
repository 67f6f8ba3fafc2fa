//! Why the record is not available, and its health.

use std::{io, path::PathBuf};

use super::lock::Holder;

/// Why a record could not be opened at all. A damaged store is no such reason: it is set aside.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Another process has the state directory.
    #[error("the state directory {} is in use by {holder}; stop that process, or use another directory with \
             --state-dir", path.display())]
    Held {
        /// The state directory.
        path: PathBuf,
        /// Who has it.
        holder: Holder,
    },
    /// The state directory cannot be made.
    #[error("failed to create the state directory {} (--state-dir): {source}", path.display())]
    StateDir {
        /// The state directory.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// The lock file cannot be made or locked.
    #[error("failed to lock {} (--state-dir must be on a writable file system with locks): {source}", path.display())]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// The system gives no more threads.
    #[error("failed to start the record's writer: {source}")]
    Thread {
        /// The system's words.
        source: io::Error,
    },
}

/// Rows that were handed over may not be on disk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FlushError {
    /// The store does not take rows at the moment.
    #[error("failed to write the record: {0}")]
    Degraded(String),
    /// The record was closed meanwhile.
    #[error("the record is closed")]
    Closed,
    /// The disk did not answer in time.
    #[error("the record was not written within {0} s")]
    Timeout(u64),
}

/// Whether the record is working.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum HealthState {
    /// Reads and writes work.
    #[default]
    Ok,
    /// There is no working store. Rows are kept in memory as far as they fit, and opening it is tried again.
    Degraded {
        /// What is wrong with the store.
        reason: String,
        /// Since when, in milliseconds since the epoch.
        since_ms: i64,
    },
}

/// How the record fares. Nothing here ever fails a build.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Health {
    /// Whether it is working.
    pub state: HealthState,
    /// Rows given up because the store did not take them.
    pub dropped_rows: u64,
    /// Values that were damaged, or of another version, and answered as absent.
    pub unreadable_values: u64,
    /// Damaged stores set aside since the start.
    pub quarantined: u64,
    /// Rows handed over and not yet in the store.
    pub pending_rows: u64,
}

impl Health {
    /// Whether the record is working.
    pub fn is_ok(&self) -> bool {
        self.state == HealthState::Ok
    }
}

/// What a store operation ran into; decides what becomes of the store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum StoreError {
    /// The store's own data are wrong, or it panicked: it is set aside.
    #[error("damaged: {0}")]
    Damaged(String),
    /// The system refused, as on a full disk: the store is opened again later.
    #[error("{0}")]
    Unavailable(String),
}
