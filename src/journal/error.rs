//! Why the journal failed.

use std::{io, path::PathBuf};

use crate::open_files::Want;

/// A failure of the journal, with the file it is about.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The system refused.
    #[error("failed to {action} {path}: {source}")]
    Io {
        /// What was tried, such as `append to`.
        action: &'static str,
        /// The file or directory of the failed operation.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// Another process has the directory.
    #[error("journal {path} is in use by another process (see --state-dir)")]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The journal was opened for reading only.
    #[error("journal {path} was opened for reading only")]
    ReadOnly {
        /// The directory.
        path: PathBuf,
    },
    /// Not a journal file, or its head is damaged.
    #[error("{path} is not a journal file of this version: {reason}")]
    NotAJournal {
        /// The file.
        path: PathBuf,
        /// What is wrong with its head.
        reason: &'static str,
    },
    /// A frame's checksum is right but its inside cannot be read.
    #[error("{path} is damaged at byte {offset}: {reason}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where the frame begins.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// A frame would be larger than a reader accepts.
    #[error("{size} bytes of events exceed the size of a frame of {path}")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Bytes of the records before compression.
        size: usize,
    },
    /// A file would become larger than it may.
    #[error("{path} reached the limit of {limit} bytes (raise it with --limit=journal-size=SIZE)")]
    Full {
        /// The file.
        path: PathBuf,
        /// Bytes that it may have.
        limit: u64,
    },
    /// No journal for that invocation.
    #[error("no journal for invocation {invocation_id}")]
    Unknown {
        /// The invocation asked for.
        invocation_id: String,
    },
}

impl JournalError {
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}

impl Want for JournalError {
    fn is_want(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.is_want())
    }
}
