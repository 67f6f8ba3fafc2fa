//! Why an archive was not unpacked.

use std::{io, path::PathBuf};

use rustix::io::Errno;

use super::{Archive, Limit, OnConflict};
use crate::materialize::place::PlaceError;

/// Why nothing was published.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArchiveError {
    /// The bytes of the archive could not be read to their end.
    #[error("failed to read {archive}: {source}")]
    Source {
        /// The archive.
        archive: String,
        /// The error of the source.
        source: io::Error,
    },
    /// It is not an archive of its format, or it is damaged or incomplete.
    #[error("{archive} is damaged: {reason}")]
    Damaged {
        /// The archive.
        archive: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A member, or the archive, needs something that is not supported.
    #[error("{archive} cannot be unpacked: {member:?} {reason}")]
    Unsupported {
        /// The archive.
        archive: String,
        /// The member.
        member: String,
        /// What it needs.
        reason: String,
    },
    /// A member has a name that leads elsewhere, or that no file can have.
    #[error("{archive} has a member with the name {member:?}, which is not allowed: {reason}")]
    Name {
        /// The archive.
        archive: String,
        /// The name.
        member: String,
        /// Why it is not allowed.
        reason: String,
    },
    /// A link leads where it must not.
    #[error("{archive} has a link {member:?} to {target:?}, which is not allowed: {reason}")]
    Link {
        /// The archive.
        archive: String,
        /// The link.
        member: String,
        /// Where it leads.
        target: String,
        /// Why that is not allowed.
        reason: &'static str,
    },
    /// Two members cannot both be unpacked.
    #[error("{path:?} of {second} conflicts with {first}: {reason}{}", hint(.on_conflict))]
    Conflict {
        /// The path in the target.
        path: String,
        /// The archive that has it already.
        first: String,
        /// The archive that has it as well; it may be the same one.
        second: String,
        /// How they differ.
        reason: &'static str,
        /// What would be done about it; `None` if nothing can be.
        on_conflict: Option<OnConflict>,
    },
    /// It is over a limit.
    #[error(
        "{archive} is over the limit {limit}={}; if it is meant to be, raise that limit with --limit", .limit.shown(*.allowed)
    )]
    Limit {
        /// The archive.
        archive: String,
        /// Which limit.
        limit: Limit,
        /// Its value.
        allowed: u64,
    },
    /// There would be too many paths to keep in mind.
    #[error(
        "{archive} cannot be staged: all archives of one stage may have {most} files and directories; stage fewer at a time"
    )]
    Listed {
        /// The archive with one more.
        archive: String,
        /// How many there may be.
        most: u64,
    },
    /// The first member of an archive that is flattened is not TheRock's manifest, or is damaged, or lacks a member.
    #[error("{archive} cannot be flattened: {reason}")]
    Manifest {
        /// The archive.
        archive: String,
        /// What is wrong.
        reason: String,
    },
    /// Only a part of an archive was unpacked, because of an error or because it is still under way.
    #[error("only a part of {archive} was unpacked, so nothing is published")]
    Unfinished {
        /// The archive.
        archive: String,
    },
    /// The file system refuses.
    #[error("failed to {operation} {}: {source}", .path.display())]
    Place {
        /// What was tried, such as `create`.
        operation: &'static str,
        /// On what: a path in the target, or the target.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// Something in the target must not be replaced.
    #[error("{} cannot be replaced: {reason}", .path.display())]
    InTheWay {
        /// What is in the way.
        path: PathBuf,
        /// What it is.
        reason: &'static str,
    },
}

fn hint(on_conflict: &Option<OnConflict>) -> &'static str {
    match on_conflict {
        Some(OnConflict::Fail) => "; `fetch archive --on-conflict=last` takes the last archive's file",
        Some(OnConflict::Last) | None => "",
    }
}

impl Archive<'_> {
    pub(super) fn damaged(&self, reason: String) -> ArchiveError {
        let archive = self.name.to_owned();
        ArchiveError::Damaged { archive, reason }
    }

    pub(super) fn over(&self, limit: Limit) -> ArchiveError {
        ArchiveError::Limit {
            archive: self.name.to_owned(),
            limit,
            allowed: self.limits[limit],
        }
    }

    pub(super) fn unsupported(&self, member: &str, reason: String) -> ArchiveError {
        ArchiveError::Unsupported {
            archive: self.name.to_owned(),
            member: member.to_owned(),
            reason,
        }
    }

    pub(super) fn link(&self, member: &str, target: &[u8], reason: &'static str) -> ArchiveError {
        ArchiveError::Link {
            archive: self.name.to_owned(),
            member: member.to_owned(),
            target: String::from_utf8_lossy(target).into_owned(),
            reason,
        }
    }
}

/// What the file system refuses, with words about it.
pub(super) fn place(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(Errno) -> ArchiveError {
    let path = path.into();
    move |errno| ArchiveError::Place {
        operation,
        path,
        source: errno.into(),
    }
}

impl From<PlaceError> for ArchiveError {
    fn from(error: PlaceError) -> Self {
        Self::Place {
            operation: error.operation,
            source: match error.errno {
                Some(errno) => io::Error::from_raw_os_error(errno),
                None => io::Error::other(error.kind.clone()),
            },
            path: error.path,
        }
    }
}
