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
mod otlp;
mod place;
mod profiles;
mod selection;
mod state;
mod upstream;

use std::{fmt::Display, str::FromStr, time::Duration};

#[cfg(any(test, fuzzing))]
pub(crate) use self::file::file_arguments;
pub(crate) use self::{
    access::{AccessArgs, BES_LISTEN},
    cache::{CacheArgs, FROM_BUILD, TlsArgs},
    control::{ControlAddress, ControlArgs, ControlListenArgs, ControlPort},
    file::{naming_the_file, with_config_file},
    lease::LeaseArgs,
    limits::{LimitArgs, Limits},
    notify::NotifyArgs,
    otlp::OtlpArgs,
    place::PlaceArgs,
    profiles::ProfileArgs,
    selection::SelectionArgs,
    state::{HoldArgs, StateArgs},
    upstream::UpstreamArgs,
};
use crate::{
    transport::RemoteError,
    units::{parse_duration, parse_size},
};

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

/// What the environment's settings and the defaults come to, for commands that do not have these flags.
///
/// # Errors
/// When a variable of the environment has an invalid value.
pub(crate) fn from_environment<A: clap::Args>() -> Result<A, ConfigError> {
    use clap::Parser as _;
    #[derive(clap::Parser)]
    struct Alone<A: clap::Args> {
        #[command(flatten)]
        args: A,
    }
    Alone::try_parse_from(["outhaul"])
        .map(|alone| alone.args)
        .map_err(|e| ConfigError::new("the environment", e))
}

/// A flag's value.
fn parsed<T: FromStr<Err: Display>>(flag: &str, text: &str) -> Result<T, ConfigError> {
    text.parse().map_err(|e| ConfigError::new(flag, e))
}

/// All values of a flag. The error names only the flag.
fn all_parsed<T: FromStr<Err: Display>>(flag: &str, texts: &[String]) -> Result<Vec<T>, ConfigError> {
    texts.iter().map(|text| parsed(flag, text)).collect()
}

/// A flag's duration.
fn duration(flag: &str, text: &str) -> Result<Duration, ConfigError> {
    parse_duration(text).map_err(|e| ConfigError::new(flag, e))
}

/// A flag's size.
fn size(flag: &str, text: &str) -> Result<u64, ConfigError> {
    parse_size(text).map_err(|e| ConfigError::new(flag, e))
}
