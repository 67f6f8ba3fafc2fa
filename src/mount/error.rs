//! Why something could not be read or mounted.

use std::{path::PathBuf, time::Duration};

use fuser::Errno;

use crate::units::{show_duration, show_size};

/// Why a file or directory could not be read.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum ReadError {
    #[error("{0}")]
    Lost(String),
    #[error(
        "no room in the store: the file has {}, the store {} (--store-size), and files that are open stay in it",
        show_size(*.size),
        show_size(*.bound)
    )]
    Full { size: u64, bound: u64 },
    #[error("{0}")]
    NoSpace(String),
    #[error(
        "not downloaded within {} (--timeout); the download goes on, try again later",
        show_duration(*.0)
    )]
    Late(Duration),
    #[error("the reader was interrupted")]
    Interrupted,
    #[error("outhaul is ending")]
    Ending,
}

impl ReadError {
    /// What the reader is told.
    pub(super) const fn errno(&self) -> Errno {
        match self {
            Self::Lost(_) | Self::Late(_) | Self::Ending => Errno::EIO,
            Self::Full { .. } | Self::NoSpace(_) => Errno::ENOSPC,
            Self::Interrupted => Errno::EINTR,
        }
    }
}

/// Why builds or their outputs could not be read from the record, in words. It is told to all who look in the next moment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Unread(pub(crate) String);

/// Why a mount stays, or has ended by itself.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EndError {
    /// The connection to the kernel failed.
    #[error("failed to read the kernel's requests{}", .0.as_ref().map(|why| format!(": {why}")).unwrap_or_default())]
    Connection(Option<String>),
    /// It can be removed by others only.
    #[error("something else is mounted over it; unmount both, that one first")]
    Covered,
    /// The system does not say which mount it is.
    #[error("/proc/self/mountinfo does not tell which mount it is; run `umount -l {}`", .0.display())]
    Unknown(PathBuf),
    /// The system, or the helper program, refused.
    #[error("{reason}; run `umount -l {}`", .at.display())]
    Refused {
        /// Where it is now.
        at: PathBuf,
        /// Its words.
        reason: String,
    },
}

/// Why nothing is mounted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MountError {
    /// Something is mounted there already.
    #[error("{}: {by} is mounted there; unmount it (umount {}), or choose another directory", .at.display(), .at.display())]
    Mounted {
        /// The mount point.
        at: PathBuf,
        /// What is mounted.
        by: String,
    },
    /// It would be hidden.
    #[error("{}: the directory is not empty; choose an empty or a new one", .0.display())]
    NotEmpty(PathBuf),
    /// What the mount itself needs would be hidden by it.
    #[error("{}: {what} {} would be hidden by the mount; choose another directory", .at.display(), .path.display())]
    Hides {
        /// The mount point.
        at: PathBuf,
        /// What would be hidden, in words.
        what: &'static str,
        /// Where that is.
        path: PathBuf,
    },
    /// The mount of a process that has ended cannot be removed.
    #[error("{}: an earlier `outhaul mount` has left a dead mount that cannot be removed: {reason}; run `umount -l {}`", .at.display(), .at.display())]
    Dead {
        /// The mount point.
        at: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The directory itself.
    #[error("{}: {source}", .at.display())]
    Directory {
        /// The mount point.
        at: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// FUSE is not available.
    #[error("failed to mount {}: {reason}", .at.display())]
    Fuse {
        /// The mount point.
        at: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The store.
    #[error("store {}: {reason}", .at.display())]
    Store {
        /// Its directory.
        at: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
}
