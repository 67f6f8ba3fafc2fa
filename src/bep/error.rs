//! What can be wrong with an event or with the file it comes from.

use std::{io, path::PathBuf};

/// Why an event could not be read.
#[derive(Debug, thiserror::Error)]
pub enum BepError {
    /// The bytes are no `BuildEvent` message; also when a string in it is not UTF-8.
    #[error("not a build event: {0}")]
    Decode(#[from] prost::DecodeError),
    /// The line is not a `BuildEvent` in JSON.
    #[error("not a build event in json: {0}")]
    Json(#[from] serde_json::Error),
    /// One event of a file is bad; the ones after it can still be read.
    #[error("event at byte {offset} of {path:?}: {source}")]
    Event {
        /// The event file.
        path: PathBuf,
        /// Where the event's frame or line begins, in bytes.
        offset: u64,
        /// What is wrong with it.
        source: Box<BepError>,
    },
    /// The file could not be opened.
    #[error("cannot open event file {path:?}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Failed to read the file.
    #[error("cannot read event file {path:?} at byte {offset}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// How far it was read, in bytes.
        offset: u64,
        /// The system's reason.
        source: io::Error,
    },
    /// The file ends within an event: its writer was killed, or still writes.
    #[error("event file {path:?} ends within the event at byte {offset}: only {have} bytes are there")]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Where the incomplete event begins, in bytes.
        offset: u64,
        /// Bytes of it that are there, its length prefix included.
        have: u64,
    },
    /// There is no event where one should begin.
    #[error("no build event at byte {offset} of {path:?}: {reason}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where the event should begin, in bytes.
        offset: u64,
        /// What is there instead.
        reason: &'static str,
    },
    /// An event is larger than is believable.
    #[error(
        "event at byte {offset} of {path:?} has at least {size} bytes, which exceeds the limit of {limit}"
    )]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Where the event begins, in bytes.
        offset: u64,
        /// Its size in bytes, as far as it is known.
        size: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// While it was followed, the file became another one.
    #[error("event file {path:?} was {how} while it was being read, at byte {offset}")]
    Changed {
        /// The file.
        path: PathBuf,
        /// How far it was read, in bytes.
        offset: u64,
        /// What happened to it: `truncated`, `replaced` or `removed`.
        how: &'static str,
    },
}

impl BepError {
    /// Whether only one event is lost, and the next one can be asked for.
    pub(crate) const fn is_skippable(&self) -> bool {
        matches!(self, Self::Decode(_) | Self::Json(_) | Self::Event { .. })
    }

    /// Whether it is a line of JSON that lacks its end.
    pub(super) fn is_cut_short(&self) -> bool {
        matches!(self, Self::Json(error) if error.is_eof())
    }
}
