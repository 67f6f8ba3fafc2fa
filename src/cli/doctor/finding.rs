//! One finding: what was found, and what to do about it.

use std::fmt;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    /// As it should be.
    Ok,
    /// Worth knowing; nothing is missing because of it.
    Note,
    /// Something does not work as one might expect.
    Warning,
    /// Builds fail, or outputs are missing.
    Error,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        })
    }
}

/// What was found. Never has credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Finding {
    /// Its name, which stays the same in later versions.
    pub(super) code: &'static str,
    pub(super) level: Level,
    /// What was found, in one line.
    pub(super) message: String,
    /// What to do, in one line; nothing where all is well.
    pub(super) fix: Option<String>,
}

impl Finding {
    /// All is well.
    pub(super) fn ok(code: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            level: Level::Ok,
            message: message.into(),
            fix: None,
        }
    }

    pub(super) fn note(code: &'static str, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::of(Level::Note, code, message, fix)
    }

    pub(super) fn warning(code: &'static str, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::of(Level::Warning, code, message, fix)
    }

    pub(super) fn error(code: &'static str, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::of(Level::Error, code, message, fix)
    }

    fn of(level: Level, code: &'static str, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            code,
            level,
            message: message.into(),
            fix: Some(fix.into()),
        }
    }
}
