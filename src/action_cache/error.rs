//! Why the action cache was not read.

use std::{io, path::PathBuf};

use super::{FORMATS, WITHOUT_OUTPUTS};

/// Why the action cache was not read. Nothing of it is used then.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ActionCacheError {
    /// The system says no.
    #[error("failed to {operation} {path}: {source}", path = path.display())]
    System {
        /// What was tried.
        operation: &'static str,
        /// The file of the failed operation.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// It is not a file or directory of our own user's.
    #[error("{path} is not used: {reason}", path = path.display())]
    Unfit {
        /// The file that is not used.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The format has another number than those that are known.
    #[error("{path} has format {number}, {}", describe(*number), path = path.display())]
    Format {
        /// The file with that format.
        path: PathBuf,
        /// The format's number.
        number: i64,
    },
    /// The bytes make no sense.
    #[error("{path} is damaged at byte {at}: {what}", path = path.display())]
    Damaged {
        /// The damaged file.
        path: PathBuf,
        /// Where in it, or in the record that begins there.
        at: usize,
        /// What is wrong there.
        what: &'static str,
    },
    /// A log ends in the middle.
    #[error("{path} ends in the middle: it is still being written, or the build was killed", path = path.display())]
    Torn {
        /// The log.
        path: PathBuf,
    },
    /// It was written all the time.
    #[error("{path} changed each time it was read", path = path.display())]
    Busy {
        /// The file that kept changing.
        path: PathBuf,
    },
}

impl ActionCacheError {
    /// Whether it is the same in every build of the output base: a format that is not known, or another user's files.
    pub(crate) const fn is_lasting(&self) -> bool {
        matches!(self, Self::Format { .. } | Self::Unfit { .. })
    }
}

fn describe(number: i64) -> String {
    if (0..=WITHOUT_OUTPUTS).contains(&number) {
        return "which holds no digests of outputs (Bazel 7 and later store them)".to_owned();
    }
    let known: Vec<String> = FORMATS.iter().map(i64::to_string).collect();
    format!(
        "which is not supported; supported formats are {}",
        known.join(", ")
    )
}
