//! The user's settings: flags, environment and file, checked at startup and converted to the values that other modules
//! take.
//!
//! A flag takes precedence over its environment variable (`OUTHAUL_` and the flag's name), which takes precedence over
//! the file. Every error names the flag.

mod access;
mod cache;
mod control;
mod file;
mod lease;
mod limits;
mod notify;
mod place;
mod selection;
mod state;
mod upstream;

#[cfg(any(test, fuzzing))]
pub(crate) use self::file::file_arguments;
pub(crate) use self::{
    access::AccessArgs,
    cache::CacheArgs,
    control::{ControlAddress, ControlArgs, ControlListenArgs, ControlPort},
    file::{naming_the_file, with_config_file},
    lease::LeaseArgs,
    limits::{LimitArgs, Limits},
    notify::NotifyArgs,
    place::PlaceArgs,
    selection::SelectionArgs,
    state::{HoldArgs, StateArgs},
    upstream::UpstreamArgs,
};
use crate::transport::RemoteError;

/// An invalid setting: the flag, and the reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{flag}: {reason}")]
pub(crate) struct ConfigError {
    /// The flag, with its dashes.
    pub flag: String,
    /// What is wrong with its value.
    pub reason: String,
}

impl ConfigError {
    /// An error about a flag.
    pub(crate) fn new(flag: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        Self {
            flag: flag.into(),
            reason: reason.to_string(),
        }
    }
}

/// An error whose context is the flag.
impl From<RemoteError> for ConfigError {
    fn from(error: RemoteError) -> Self {
        Self::new(error.context, error.message)
    }
}
