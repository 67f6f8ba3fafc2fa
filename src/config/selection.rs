//! What is downloaded.

use std::{fmt::Display, str::FromStr};

use clap::Args;

use super::{ConfigError, parsed, profiles::ProfileArgs, size};
use crate::invocation::{
    limits::BuildLimits,
    policy::{Policy, Rule},
};

/// Flags of selection.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Selection")]
pub(crate) struct SelectionArgs {
    /// What to download: toplevel (requested outputs), all (every output the build names) or minimal (only what `run`
    /// executes, and what the flags below select)
    #[arg(
        long,
        value_name = "MODE",
        env = "OUTHAUL_DOWNLOAD",
        default_value = "toplevel"
    )]
    pub download: String,

    /// Also download outputs whose whole exec path, or that of their tree artifact, matches; like Bazel's
    /// --remote_download_regex (repeatable)
    #[arg(long, value_name = "REGEX", env = "OUTHAUL_DOWNLOAD_REGEX")]
    pub download_regex: Vec<String>,

    /// Only download these output groups (repeatable)
    #[arg(
        long,
        value_name = "GROUP",
        env = "OUTHAUL_OUTPUT_GROUP",
        value_delimiter = ','
    )]
    pub output_group: Vec<String>,

    /// Only download outputs of targets that match this pattern, or with a leading `-` of those that do not; the last
    /// match counts (repeatable)
    #[arg(
        long,
        value_name = "PATTERN",
        env = "OUTHAUL_TARGET",
        value_delimiter = ',',
        allow_hyphen_values = true
    )]
    pub target: Vec<String>,

    /// Only record outputs larger than this, without downloading them
    #[arg(long, value_name = "SIZE", env = "OUTHAUL_MAX_SIZE")]
    pub max_size: Option<String>,

    /// With Bazel's output service (--experimental_remote_output_service): read the blobs of outputs from the cache and
    /// discard them, so that a bb_clientd at the cache's address has them locally
    #[arg(long, env = "OUTHAUL_WARM_OUTPUT_SERVICE")]
    pub warm_output_service: bool,

    /// Whether to copy blobs from the outputs of other recorded workspaces and output bases on this machine, instead
    /// of downloading them
    #[arg(
        long,
        value_name = "on|off",
        env = "OUTHAUL_LOCAL_SOURCES",
        value_parser = ["on", "off", "true", "false"],
        hide_possible_values = true,
        default_value = "on"
    )]
    pub local_sources: String,

    /// Rule that takes precedence over the flags above; the first match wins: required|optional|known, then any of
    /// test-output or runfiles, status=passed|failed (of the test), label=PATTERN aspect=NAME output-group=GROUP
    /// path=REGEX min-size=SIZE max-size=SIZE (repeatable)
    #[arg(long, value_name = "RULE", env = "OUTHAUL_RULE", value_delimiter = ';')]
    pub rule: Vec<String>,

    /// Also download what these tools read: coverage, debug, ide, or a profile of your own; `outhaul profiles` shows their
    /// rules, which come after those of --rule (repeatable)
    #[arg(long, value_name = "NAME", env = "OUTHAUL_PROFILE", value_delimiter = ',')]
    pub profile: Vec<String>,

    #[command(flatten)]
    pub profiles: ProfileArgs,
}

impl SelectionArgs {
    /// Whether outputs of other output roots are left alone.
    pub(crate) fn no_local_sources(&self) -> bool {
        matches!(&*self.local_sources, "off" | "false")
    }

    /// As what selection takes.
    ///
    /// # Errors
    /// Naming the flag that is wrong.
    pub(crate) fn policy(&self) -> Result<Policy, ConfigError> {
        // The error names the value, too.
        fn all<T: FromStr<Err: Display>>(flag: &str, texts: &[String]) -> Result<Vec<T>, ConfigError> {
            let one = |text: &String| parsed(&format!("{flag}={text}"), text);
            texts.iter().map(one).collect()
        }
        let mut rules: Vec<Rule> = all("--rule", &self.rule)?;
        rules.extend(self.profiles.rules(&self.profile)?);
        Ok(Policy {
            rules,
            mode: parsed("--download", &self.download)?,
            regexes: all("--download-regex", &self.download_regex)?,
            output_groups: self.output_group.clone(),
            targets: all("--target", &self.target)?,
            max_size: self
                .max_size
                .as_deref()
                .map(|text| size("--max-size", text))
                .transpose()?,
            warm_output_service: self.warm_output_service,
            no_local_sources: self.no_local_sources(),
            limits: BuildLimits::default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::invocation::policy::DownloadMode;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        selection: SelectionArgs,
    }

    fn policy(args: &[&str]) -> Result<Policy, ConfigError> {
        let cli = Cli::parse_from(std::iter::once("outhaul").chain(args.iter().copied()));
        cli.selection.policy()
    }

    #[test]
    fn wrong_values_name_their_flag() {
        for (arg, flag) in [
            ("--download=some", "--download"),
            ("--download-regex=(", "--download-regex"),
            ("--target=x", "--target"),
            ("--max-size=big", "--max-size"),
            ("--rule=never", "--rule"),
            ("--profile=none", "--profile"),
            ("--profile-rule=x", "--profile-rule"),
        ] {
            let error = policy(&[arg]).unwrap_err();
            assert!(error.flag.starts_with(flag), "{error}");
        }
    }

    #[test]
    fn flags_become_a_policy() {
        let policy = policy(&[
            "--target=//a/...,-//a/b:all",
            "--output-group=x,y",
            "--profile=mine,debug",
            "--rule=known;optional",
            "--profile-rule=mine=known label=//a",
        ])
        .unwrap();
        assert_eq!(
            (
                policy.targets.len(),
                policy.output_groups.len(),
                policy.rules.len()
            ),
            (2, 2, 7)
        );
        assert_eq!(policy.rules[2].to_string(), "known label=//a:a");
        assert_eq!(policy.mode, DownloadMode::Toplevel);
    }
}
