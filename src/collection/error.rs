//! Why archives were not fetched.

use std::{io, path::PathBuf};

use super::{Checksum, ChecksumError, ChoiceError, SIDECAR};
use crate::{
    archive::ArchiveError,
    transport::{RemoteError, RemoteErrorKind},
};

/// Why an archive, or all of them, were not fetched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CollectionError {
    /// Where it comes from.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// It cannot be unpacked.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// A thread ended without doing its work.
    #[error("failed to unpack: {0}")]
    Stopped(io::Error),
    /// A pattern is wrong, or matches nothing.
    #[error(transparent)]
    Choice(#[from] ChoiceError),
    /// A file with checksums cannot be used.
    #[error("{file}: {reason} (to download without checksums, use --checksum=none)")]
    Checksum {
        /// The file.
        file: String,
        /// What is wrong.
        reason: ChecksumError,
    },
    /// There is no checksum, but there must be one.
    #[error(
        "{name}: no checksum, so its upload may be unfinished: no --checksum-file names it, and there is no \
         {name}{SIDECAR} beside it (to download it without a checksum, use --checksum=auto)"
    )]
    NoChecksum {
        /// The archive's file name.
        name: String,
    },
    /// The bytes are not those of the checksum.
    #[error("{name}: the bytes have the digest {actual}, but its checksum is {expected}")]
    Wrong {
        /// The archive.
        name: String,
        /// What its checksum says.
        expected: Checksum,
        /// What its bytes have.
        actual: Checksum,
    },
    /// The name does not say what it is.
    #[error(
        "{name}: is not a file name of an archive that can be unpacked (.tar, .tar.gz, .tgz, .tar.zst, .tzst, \
         .tar.xz, .txz or .zip); write NAME=URL or NAME=DIGEST to give it one, end the URL of a directory with a slash, or \
         do not unpack it (`fetch archive --no-extract`, or `stage` without --extract or --flatten)"
    )]
    NoArchive {
        /// The name.
        name: String,
    },
    /// Its name is one that no file is given.
    #[error("{name}: is not a usable file name, or is one that outhaul keeps for its own files; rename it")]
    NoFileName {
        /// The name.
        name: String,
    },
    /// Its name is not a name for a directory.
    #[error(
        "{name}: without its ending, it is not the name of a directory to unpack into; leave it out with --exclude"
    )]
    NoDirectory {
        /// The name.
        name: String,
    },
    /// Two archives have one place.
    #[error(
        "{first} and {second} would both go to {place}; write NAME=URL or NAME=DIGEST to give one of them another name, or \
         leave one out with --exclude"
    )]
    SamePlace {
        /// The one.
        first: String,
        /// The other.
        second: String,
        /// The name below the output directory.
        place: String,
    },
    /// Two files have one name.
    #[error(
        "{first} and {second} are both called {name}; write NAME=URL or NAME=DIGEST to give one of them another name, or \
         leave one out with --exclude"
    )]
    SameName {
        /// The one.
        first: String,
        /// The other.
        second: String,
        /// Their name.
        name: String,
    },
    /// There is nothing to fetch.
    #[error("{0}: no archives")]
    Nothing(String),
    /// The bytes could not be handed on.
    #[error("failed to read {name}: {source}")]
    Read {
        /// The archive.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// The file system refuses.
    #[error("failed to write {}: {source}", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl CollectionError {
    /// A thread ended without doing its work.
    pub(super) fn stopped(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Stopped(io::Error::other(error))
    }

    /// Whether reading the archive once more, from its beginning, may help: it changed, or came damaged.
    pub(super) const fn is_worth_another_try(&self) -> bool {
        match self {
            Self::Wrong { .. } => true,
            Self::Remote(error) => matches!(error.kind, RemoteErrorKind::Protocol),
            _ => false,
        }
    }

    /// Whether what was asked for is not there.
    pub(crate) const fn is_not_found(&self) -> bool {
        match self {
            Self::Remote(error) => error.is_not_found(),
            Self::Choice(ChoiceError::NoMatch { .. }) | Self::Nothing(_) => true,
            _ => false,
        }
    }
}
