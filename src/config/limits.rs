//! How much clients and builds may ask of the daemon.

use anyhow::{Error, anyhow};
use clap::Args;

use super::ConfigError;
use crate::{bes::limits::BesLimits, invocation::limits::BuildLimits, units::parse_named};

/// The flag.
const FLAG: &str = "--limit";

/// What each limit is called, whether it is in bytes, its least and its largest value, and what sets it. 64 bits, as
/// everywhere: no value is cut.
type Named = (&'static str, bool, u64, u64, fn(&mut Limits, u64));

/// All limits. The journal takes no larger messages.
const NAMES: &[Named] = &[
    ("message-size", true, 1 << 10, 256 << 20, |l, n| {
        l.bes.message = n as usize
    }),
    ("header-size", true, 1 << 10, 16 << 20, |l, n| {
        l.bes.headers = n as u32
    }),
    ("streams", false, 1, 1 << 20, |l, n| l.bes.streams = n as usize),
    ("streams-per-connection", false, 1, 1 << 20, |l, n| {
        l.bes.streams_per_connection = n as u32
    }),
    ("queue-memory", true, 1 << 20, 1 << 31, |l, n| {
        l.bes.queue = n as usize
    }),
    ("journal-size", true, 1 << 20, u64::MAX, |l, n| l.bes.journal = n),
    ("lifecycle-calls", false, 1, 1 << 30, |l, n| {
        l.bes.lifecycle_calls = n as usize
    }),
    ("targets", false, 1, u64::MAX, |l, n| l.build.targets = n),
    ("sets", false, 1, u64::MAX, |l, n| l.build.sets = n),
    ("files", false, 1, u64::MAX, |l, n| l.build.files = n),
    ("build-memory", true, 1, u64::MAX, |l, n| l.build.memory = n),
    ("name-length", true, 1, 1 << 30, |l, n| l.build.name = n as usize),
    ("control-message-size", true, 1 << 10, 1 << 31, |l, n| {
        l.control_message = n as usize
    }),
];

/// Flags of limits.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Limits")]
pub(crate) struct LimitArgs {
    /// Change a limit (repeatable): message-size, header-size, streams, streams-per-connection, queue-memory,
    /// journal-size, lifecycle-calls, targets, sets, files, build-memory, name-length, control-message-size
    #[arg(long, value_name = "NAME=VALUE", env = "OUTHAUL_LIMIT", value_delimiter = ',')]
    pub limit: Vec<String>,
}

/// All limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Of the event service.
    pub bes: BesLimits,
    /// Of one build.
    pub build: BuildLimits,
    /// Bytes of one request of the control API. Requests may name very many paths.
    pub control_message: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bes: BesLimits::default(),
            build: BuildLimits::default(),
            control_message: 64 << 20,
        }
    }
}

impl LimitArgs {
    /// The limits, with what was changed.
    ///
    /// # Errors
    /// Naming the limit that is unknown or has an impossible value.
    pub(crate) fn limits(&self) -> Result<Limits, ConfigError> {
        let mut limits = Limits::default();
        for text in &self.limit {
            let error = |reason: Error| ConfigError::new(format!("{FLAG}={text}"), reason);
            let known = || NAMES.iter().map(|(name, bytes, ..)| (*name, *bytes));
            let (at, value) = parse_named(text, known).map_err(error)?;
            let (.., least, most, set) = NAMES[at];
            if !(least..=most).contains(&value) {
                return Err(error(anyhow!("must be from {least} to {most}")));
            }
            set(&mut limits, value);
        }
        Ok(limits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(texts: &[&str]) -> Result<Limits, ConfigError> {
        let limit = texts.iter().map(|text| (*text).to_owned()).collect();
        LimitArgs { limit }.limits()
    }

    #[test]
    fn every_limit_can_be_changed_and_no_other_changes_with_it() {
        for (name, bytes, ..) in NAMES {
            let value = if *bytes { "2MiB" } else { "1234" };
            let changed = limits(&[&format!("{name}={value}")]).unwrap();
            assert_ne!(changed, Limits::default(), "{name}");
            let shown = format!("{changed:?}");
            let number = if *bytes { "2097152" } else { "1234" };
            assert_eq!(shown.matches(number).count(), 1, "{name}: {shown}");
        }
        let both = limits(&["targets=5", "sets=6", "targets=7"]).unwrap();
        assert_eq!((both.build.targets, both.build.sets), (7, 6));
    }

    #[test]
    fn help_names_every_limit() {
        use clap::Args as _;
        let command = LimitArgs::augment_args(clap::Command::new("x"));
        let help = command
            .get_arguments()
            .next()
            .unwrap()
            .get_help()
            .unwrap()
            .to_string();
        for (name, ..) in NAMES {
            assert!(help.contains(name), "{name}");
        }
    }

    #[test]
    fn wrong_limits_are_named() {
        for (text, part) in [
            ("targets", "NAME=VALUE"),
            ("target=5", "expected one of message-size, "),
            ("targets=many", "not a number"),
            ("targets=0", "from 1"),
            ("message-size=1GiB", "from 1024 to 268435456"),
            ("message-size=x", "not a size"),
        ] {
            let error = limits(&[text]).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains(FLAG), "{text}: {error}");
        }
    }
}
