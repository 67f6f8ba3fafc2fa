//! Exit codes, for scripts.

use std::fmt::Display;

use crate::printable::printable;

/// Success.
pub(super) const OK: u8 = 0;
/// Something failed.
pub(super) const FAILED: u8 = 1;
/// The command line or a setting is wrong.
pub(super) const USAGE: u8 = 2;
/// The record has nothing of that name.
pub(super) const NOT_FOUND: u8 = 3;
/// The command timed out.
pub(super) const TIMED_OUT: u8 = 4;
/// Of `outhaul run`: the command exists but cannot be run. Like the next code, this is what shells use.
pub(super) const NOT_RUN: u8 = 126;
/// Of `outhaul run`: command not found.
pub(super) const NO_COMMAND: u8 = 127;

/// Shown under `--help`.
pub(super) const HELP: &str = "Exit codes: 0 success; 1 something failed; 2 invalid command line or setting; 3 \
                               not found in the record; 4 timed out. `outhaul run` exits with the code of the \
                               command it runs; 126 if that cannot be run, 127 if it does not exist.";

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
