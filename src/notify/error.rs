//! Why nobody is notified.

use std::{io, time::Duration};

use super::url::NotifyUrl;
use crate::units::show_duration;

/// What is wrong with a receiver or the secret before anything was sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotifyError {
    /// The secret's file cannot be read.
    #[error(transparent)]
    SecretFile(io::Error),
    /// The secret's file is empty.
    #[error("contains no secret")]
    NoSecret,
    /// There is no client for the receiver: the system has no certificate authorities.
    #[error("{receiver}: {error}")]
    Client {
        /// The receiver, without what is secret of it.
        receiver: Box<NotifyUrl>,
        /// The system's words.
        error: io::Error,
    },
}

/// Why the command of `--on-settled` did not run to its end.
#[derive(Debug, thiserror::Error)]
pub(super) enum HookError {
    #[error("failed to create a pipe for its output: {0}")]
    Pipe(io::Error),
    #[error("failed to start sh: {0}")]
    Start(io::Error),
    #[error(transparent)]
    Wait(io::Error),
    #[error("killed after {} (--on-settled-timeout)", show_duration(*.0))]
    TimedOut(Duration),
}

/// Why a receiver does not get a document.
#[derive(Debug, thiserror::Error)]
pub(super) enum DeliveryError {
    #[error("{0}")]
    Refused(String),
    #[error("{reason} ({tries} tries)")]
    GivenUp { reason: String, tries: u32 },
}
