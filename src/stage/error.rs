//! Why outputs cannot be staged, or a build cannot be carried elsewhere.

use std::{io, path::PathBuf};

use crate::{
    collection::{ChoiceError, CollectionError},
    exec_path::ExecPath,
    journal::JournalError,
};

/// What an error means to the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StageErrorKind {
    /// Nothing of that name is recorded.
    NotFound,
    /// The request makes no sense as it is.
    Request,
    /// It is not for the caller.
    Denied,
    /// It should have worked.
    Failed,
}

/// Why nothing was staged. Whatever it says, nothing was written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StageError {
    /// No such invocation, or none at all.
    #[error("{0}")]
    Unknown(String),
    /// The build still runs, so its outputs are not all known.
    #[error("build {0} is still running; stage its outputs when it has ended (see `outhaul wait`)")]
    Running(String),
    /// The journal with the build's outputs is gone or cannot be read.
    #[error("failed to read the events of build {invocation_id}: {source}")]
    Journal {
        /// Invocation ID of the build.
        invocation_id: String,
        /// The journal's error.
        source: JournalError,
    },
    /// A pattern picks no output.
    #[error("{flag}={pattern} matches no output of build {invocation_id}{hint}")]
    NoMatch {
        /// The flag.
        flag: &'static str,
        /// The pattern that matches nothing.
        pattern: String,
        /// Invocation ID of the build.
        invocation_id: String,
        /// What is there instead, in words; may be empty.
        hint: String,
    },
    /// Nothing is asked for that the build has.
    #[error("build {0} names no outputs that can be staged")]
    Nothing(String),
    /// Outputs of failed tests are asked for, and there are none.
    #[error("in build {0}, none of these tests has failed and written anything")]
    NoneFailed(String),
    /// Two outputs would lie at one place.
    #[error("{first} and {second} would both be staged as {place}")]
    Collision {
        /// Exec path of one output.
        first: ExecPath,
        /// Exec path of the other output.
        second: ExecPath,
        /// Below the directory.
        place: ExecPath,
    },
    /// A setting cannot be used.
    #[error("{flag}: {reason}")]
    Setting {
        /// The flag.
        flag: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The directory is not for the caller, or for nobody.
    #[error("cannot stage into {}: {reason}", .directory.display())]
    Denied {
        /// The directory to stage into.
        directory: PathBuf,
        /// Why the directory cannot be used.
        reason: String,
    },
    /// The URL is not for the caller.
    #[error(
        "cannot stage from {from}: callers of this port may only name URLs below those given with --control-stage-from, or those of --remote-cache"
    )]
    DeniedOrigin {
        /// The URL, without what may be secret in it.
        from: String,
    },
    /// A collection cannot be read, or has not what is asked for.
    #[error(transparent)]
    Collection(#[from] CollectionError),
    /// The file is not an archive, or a damaged one.
    #[error("{path} is damaged at byte {offset}: {reason}")]
    Archive {
        /// The file.
        path: PathBuf,
        /// Byte offset of the damage.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// The file has the id of another build that is here.
    #[error(
        "{path} contains invocation {invocation_id} of build {there:?}, but this state directory already has \
         it for build {here:?}; import it into another --state-dir"
    )]
    Taken {
        /// The file.
        path: PathBuf,
        /// Invocation ID of both builds.
        invocation_id: String,
        /// The build of that id here.
        here: String,
        /// Build ID in the file.
        there: String,
    },
    /// A file cannot be read or written.
    #[error("failed to {action} {path}: {source}")]
    Io {
        /// What was tried, such as `write`.
        action: &'static str,
        /// The file or directory of the failed operation.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// A bug or a lack of the system's.
    #[error("{0}")]
    Internal(String),
}

impl StageError {
    /// What it means.
    pub(crate) const fn kind(&self) -> StageErrorKind {
        match self {
            Self::Unknown(_) | Self::NoMatch { .. } | Self::Nothing(_) | Self::NoneFailed(_) => {
                StageErrorKind::NotFound
            }
            Self::Collection(error) => match error {
                CollectionError::Choice(ChoiceError::Pattern { .. }) => StageErrorKind::Request,
                error if error.is_not_found() => StageErrorKind::NotFound,
                _ => StageErrorKind::Failed,
            },
            Self::Setting { .. } => StageErrorKind::Request,
            Self::Denied { .. } | Self::DeniedOrigin { .. } => StageErrorKind::Denied,
            _ => StageErrorKind::Failed,
        }
    }

    /// The journal of a build failed.
    pub(super) fn journal(invocation_id: &str) -> impl Fn(JournalError) -> Self {
        let id = invocation_id.to_owned();
        move |source| Self::Journal {
            invocation_id: id.clone(),
            source,
        }
    }

    pub(super) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}
