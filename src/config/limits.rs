//! How much clients and builds may ask of the daemon.

use clap::Args;

use super::ConfigError;
use crate::{bes::limits::BesLimits, invocation::limits::BuildLimits, units::parse_named};

/// The flag.
const FLAG: &str = "--limit";

/// What each limit is called, what it bounds, and whether it is in bytes.
const NAMES: &[(&str, &str, bool)] = &[
    ("message-size", "bytes of one request of a build tool", true),
    ("header-size", "bytes of a call's headers", true),
    ("streams", "builds that send events at the same time", false),
    ("streams-per-connection", "the same on one connection", false),
    ("queue-memory", "bytes of clients' messages in memory", true),
    ("journal-size", "bytes of a build's journal on disk", true),
    (
        "lifecycle-calls",
        "lifecycle events waiting for --bes-backend",
        false,
    ),
    ("targets", "targets of a build", false),
    ("sets", "named sets of files of a build", false),
    ("files", "mentions of files of a build", false),
    ("build-memory", "bytes that a build's events take in memory", true),
    ("name-length", "bytes of a label, id or other name", true),
    (
        "control-message-size",
        "bytes of one request of the control API",
        true,
    ),
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
            let error = |reason: String| ConfigError::new(format!("{FLAG}={text}"), reason);
            let known = || NAMES.iter().map(|(name, _, bytes)| (*name, *bytes));
            let (at, value) = parse_named(text, known).map_err(error)?;
            limits.set(NAMES[at].0, value).map_err(error)?;
        }
        Ok(limits)
    }
}

impl Limits {
    fn set(&mut self, name: &str, value: u64) -> Result<(), String> {
        let within = |least: u64, most: u64| {
            if (least..=most).contains(&value) {
                Ok(value)
            } else {
                Err(format!("must be from {least} to {most}"))
            }
        };
        // 64 bits, as everywhere: no value is cut.
        let size = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
        match name {
            // The journal takes no larger ones.
            "message-size" => self.bes.message = size(within(1 << 10, 256 << 20)?),
            "header-size" => self.bes.headers = within(1 << 10, 16 << 20)? as u32,
            "streams" => self.bes.streams = size(within(1, 1 << 20)?),
            "streams-per-connection" => self.bes.streams_per_connection = within(1, 1 << 20)? as u32,
            "queue-memory" => self.bes.queue = size(within(1 << 20, 1 << 31)?),
            "journal-size" => self.bes.journal = within(1 << 20, u64::MAX)?,
            "lifecycle-calls" => self.bes.lifecycle_calls = size(within(1, 1 << 30)?),
            "targets" => self.build.targets = within(1, u64::MAX)?,
            "sets" => self.build.sets = within(1, u64::MAX)?,
            "files" => self.build.files = within(1, u64::MAX)?,
            "build-memory" => self.build.memory = within(1, u64::MAX)?,
            "name-length" => self.build.name = size(within(1, 1 << 30)?),
            "control-message-size" => self.control_message = size(within(1 << 10, 1 << 31)?),
            // Not reached: names are looked up before.
            _ => {}
        }
        Ok(())
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
        for (name, _, bytes) in NAMES {
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
