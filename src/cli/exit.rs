//! Exit codes, for scripts.

use std::fmt::Display;

use crate::printable::printable;

/// Everything asked for is there.
pub(super) const OK: u8 = 0;
/// Something asked for could not be had.
pub(super) const FAILED: u8 = 1;
/// The command line or a setting is wrong.
pub(super) const USAGE: u8 = 2;
/// Nothing of that name is recorded.
pub(super) const NOT_FOUND: u8 = 3;
/// What was waited for did not come in time.
pub(super) const TIMED_OUT: u8 = 4;
/// Of `outhaul run`: there is the command, but it can't be run. As shells have it, and so is the next.
pub(super) const NOT_RUN: u8 = 126;
/// Of `outhaul run`: there is no such command.
pub(super) const NO_COMMAND: u8 = 127;

/// Shown under `--help`.
pub(super) const HELP: &str = "Exit codes: 0 everything asked for is there; 1 something could not be had; \
2 the command line or a setting is wrong; 3 nothing of that name is recorded; \
4 it did not come in time. \
`outhaul run` exits with the wrapped command's own code; 126 it cannot be run; 127 there is no such command.";

/// Why a command ends without success.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) code: u8,
    /// For standard error; may be empty when all was said.
    pub(super) message: String,
    /// Whether another process has what is needed, and will be done with it.
    pub(super) held: bool,
}

impl Failure {
    /// On one line, whatever names it quotes.
    pub(super) fn new(code: u8, message: impl Display) -> Self {
        Self {
            code,
            message: printable(&message.to_string()).into_owned(),
            held: false,
        }
    }

    /// Another process has what is needed just now.
    pub(super) fn held(message: impl Display) -> Self {
        Self {
            held: true,
            ..Self::failed(message)
        }
    }

    pub(super) fn failed(message: impl Display) -> Self {
        Self::new(FAILED, message)
    }

    /// The user's own flags and files are to blame, some of which are shown with lines of theirs.
    pub(super) fn usage(message: impl Display) -> Self {
        Self {
            code: USAGE,
            message: message.to_string(),
            held: false,
        }
    }

    pub(super) fn not_found(message: impl Display) -> Self {
        Self::new(NOT_FOUND, message)
    }
}

impl From<crate::config::ConfigError> for Failure {
    fn from(error: crate::config::ConfigError) -> Self {
        Self::usage(error)
    }
}

impl From<std::io::Error> for Failure {
    /// Writing to standard output failed: a closed pipe is the reader's business, and nothing to complain of.
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::BrokenPipe => Self::new(OK, ""),
            _ => Self::failed(error),
        }
    }
}
