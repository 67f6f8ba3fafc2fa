//! What the user wants on disk: Bazel's modes, and rules on top of them.

use std::{fmt, str::FromStr};

use anyhow::{anyhow, bail};
use regex::{Regex, RegexBuilder};

use super::{limits::BuildLimits, pattern::TargetPattern};
use crate::output::Class;

/// The mode, with Bazel's names (`--remote_download_outputs`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DownloadMode {
    /// What was requested: outputs of the targets named, and of their tests.
    #[default]
    Toplevel,
    /// Everything that the stream names.
    All,
    /// Nothing but what `run` is about to execute, and what rules and regexes pick.
    Minimal,
}

impl FromStr for DownloadMode {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        match text {
            "toplevel" => Ok(Self::Toplevel),
            "all" => Ok(Self::All),
            "minimal" => Ok(Self::Minimal),
            _ => bail!("expected toplevel, all or minimal, got {text:?}"),
        }
    }
}

impl fmt::Display for DownloadMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Toplevel => "toplevel",
            Self::All => "all",
            Self::Minimal => "minimal",
        })
    }
}

/// A regular expression that must match a whole exec path, as Bazel's `--remote_download_regex` does.
#[derive(Debug, Clone)]
pub struct PathRegex {
    regex: Regex,
    text: String,
}

impl PathRegex {
    /// What one may come to, in bytes.
    pub const SIZE: usize = 10 << 20;

    /// Reads an expression that comes to this many bytes at most once it is compiled, and to as many again while it is
    /// used.
    ///
    /// # Errors
    /// When it is invalid or too large.
    pub fn within(text: &str, size: usize) -> Result<Self, regex::Error> {
        let compiled = |text: &str| {
            let mut builder = RegexBuilder::new(text);
            builder.size_limit(size).dfa_size_limit(size.min(2 << 20));
            builder.build()
        };
        let whole = compiled(&format!("^(?:{text})$"));
        // Alone as well, so that the message shows the user's own text, and an unbalanced group does not pair up with
        // ours.
        if whole.is_err() || text.contains(')') {
            compiled(text)?;
        }
        Ok(Self {
            regex: whole?,
            text: text.to_owned(),
        })
    }

    /// Whether the whole path matches.
    pub fn matches(&self, path: &str) -> bool {
        self.regex.is_match(path)
    }
}

impl FromStr for PathRegex {
    type Err = regex::Error;

    fn from_str(text: &str) -> Result<Self, regex::Error> {
        Self::within(text, Self::SIZE)
    }
}

impl fmt::Display for PathRegex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl PartialEq for PathRegex {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

/// What outputs are besides those of output groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A test's: logs, reports and what else it wrote.
    TestOutput,
    /// What a program needs at run time.
    Runfiles,
}

impl Kind {
    const ALL: [Self; 2] = [Self::TestOutput, Self::Runfiles];

    const fn name(self) -> &'static str {
        match self {
            Self::TestOutput => "test-output",
            Self::Runfiles => "runfiles",
        }
    }
}

/// One rule of the user's: if everything that it names matches, its verdict counts.
///
/// Written `VERDICT KEY=VALUE…`, such as `optional label=//docs/... path=.*\.pdf min-size=10MiB`.
#[derive(Debug, Clone, PartialEq)]
pub struct Rule {
    /// What becomes of an output that matches.
    pub verdict: Class,
    /// Whether it only adds: an output that is wanted more without it stays so. Not part of what is written.
    pub raises: bool,
    /// Only outputs of this kind.
    pub kind: Option<Kind>,
    /// Only outputs of tests that have passed, or have not.
    pub passed: Option<bool>,
    /// Only outputs of these targets.
    pub label: Option<TargetPattern>,
    /// Only outputs of this aspect; `*` for any, empty for none.
    pub aspect: Option<String>,
    /// Only outputs of this group.
    pub output_group: Option<String>,
    /// Only exec paths, or tree roots, that match as a whole.
    pub path: Option<PathRegex>,
    /// Only from this size in bytes.
    pub min_size: Option<u64>,
    /// Only up to this size in bytes.
    pub max_size: Option<u64>,
}

impl Rule {
    /// Whether an output of matching circumstances has a matching path and size.
    pub(crate) fn picks(&self, path: &str, tree_root: Option<&str>, size: Option<u64>) -> bool {
        let path_matches = self
            .path
            .as_ref()
            .is_none_or(|regex| regex.matches(path) || tree_root.is_some_and(|root| regex.matches(root)));
        let size_matches = match size {
            Some(size) => {
                self.min_size.is_none_or(|min| size >= min) && self.max_size.is_none_or(|max| size <= max)
            }
            None => self.min_size.is_none(),
        };
        path_matches && size_matches
    }

    /// One that matches every output.
    pub(crate) const fn of(verdict: Class) -> Self {
        Self {
            verdict,
            raises: false,
            kind: None,
            passed: None,
            label: None,
            aspect: None,
            output_group: None,
            path: None,
            min_size: None,
            max_size: None,
        }
    }
}

impl FromStr for Rule {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let mut words = text.split_whitespace();
        let verdict = words.next().ok_or_else(|| anyhow!("empty rule"))?;
        let verdict = Class::named(verdict)
            .ok_or_else(|| anyhow!("expected required, optional or known, got {verdict:?}"))?;
        let mut rule = Self::of(verdict);
        for word in words {
            if let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.name() == word) {
                if rule.kind.is_some() {
                    bail!("it names two kinds of outputs, and no output is of both");
                }
                rule.kind = Some(kind);
                continue;
            }
            let (key, value) = word
                .split_once('=')
                .ok_or_else(|| anyhow!("{word:?} is not of the form KEY=VALUE"))?;
            let bad = |e: anyhow::Error| anyhow!("{key}: {e}");
            match key {
                "status" => {
                    rule.passed = match value {
                        "passed" => Some(true),
                        "failed" => Some(false),
                        _ => bail!("{key}: expected passed or failed, got {value:?}"),
                    }
                }
                "label" => rule.label = Some(value.parse().map_err(|e| anyhow!("{key}: {e}"))?),
                "aspect" => rule.aspect = Some(value.to_owned()),
                "output-group" => rule.output_group = Some(value.to_owned()),
                "path" => rule.path = Some(value.parse().map_err(|e: regex::Error| bad(e.into()))?),
                "min-size" => rule.min_size = Some(crate::units::parse_size(value).map_err(bad)?),
                "max-size" => rule.max_size = Some(crate::units::parse_size(value).map_err(bad)?),
                _ => bail!(
                    "unknown key {key:?}; expected status, label, aspect, output-group, path, min-size or max-size"
                ),
            }
        }
        Ok(rule)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.verdict.name())?;
        if let Some(kind) = self.kind {
            write!(f, " {}", kind.name())?;
        }
        if let Some(passed) = self.passed {
            write!(f, " status={}", if passed { "passed" } else { "failed" })?;
        }
        if let Some(label) = &self.label {
            write!(f, " label={label}")?;
        }
        if let Some(aspect) = &self.aspect {
            write!(f, " aspect={aspect}")?;
        }
        if let Some(group) = &self.output_group {
            write!(f, " output-group={group}")?;
        }
        if let Some(path) = &self.path {
            write!(f, " path={path}")?;
        }
        if let Some(size) = self.min_size {
            write!(f, " min-size={size}")?;
        }
        if let Some(size) = self.max_size {
            write!(f, " max-size={size}")?;
        }
        Ok(())
    }
}

/// All of the user's settings for selection.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Policy {
    /// The mode.
    pub mode: DownloadMode,
    /// Rules, first match wins, before everything else.
    pub rules: Vec<Rule>,
    /// Exec paths, or tree roots, that are required whatever the mode says.
    pub regexes: Vec<PathRegex>,
    /// Only these output groups of top-level targets; empty for all that the build reports.
    pub output_groups: Vec<String>,
    /// Only these targets; empty for all.
    pub targets: Vec<TargetPattern>,
    /// Larger outputs are only known; in bytes.
    pub max_size: Option<u64>,
    /// Whether the blobs of outputs that an output service has are read, so that it has them near.
    pub warm_output_service: bool,
    /// Whether outputs of other output roots of this machine are no sources.
    pub no_local_sources: bool,
    /// How much of a stream is looked at.
    pub limits: BuildLimits,
}

impl Policy {
    /// Whether outputs may be required that Bazel's own top-level mode does not download.
    pub(crate) fn asks_for_more(&self) -> bool {
        self.mode == DownloadMode::All || !self.rules.is_empty() || !self.regexes.is_empty()
    }

    /// Another selection in the place of this one. The limits stay: they count for as long as the daemon runs.
    pub(crate) fn reselect(&mut self, other: Self) {
        let limits = self.limits;
        *self = Self { limits, ..other };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_selection_leaves_the_limits_as_they_are() {
        let mut policy = Policy::default();
        policy.limits.targets = 7;
        policy.reselect(Policy {
            max_size: Some(3),
            ..Policy::default()
        });
        assert_eq!((policy.max_size, policy.limits.targets), (Some(3), 7));
    }

    #[test]
    fn rules_print_as_they_are_written() {
        for text in [
            "required",
            "known label=//a/... aspect=//x.bzl%y output-group=foo path=.*\\.o min-size=1 max-size=4096",
            "optional label=-//b:all",
            "required test-output status=failed label=//a/...",
            "known runfiles",
        ] {
            assert_eq!(text.parse::<Rule>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn bad_rules_say_which_part_is_wrong() {
        for (text, part) in [
            ("", "empty"),
            ("maybe label=//a", "maybe"),
            ("known size=3", "unknown key \"size\""),
            ("known label", "KEY=VALUE"),
            ("known status=flaky", "passed or failed, got \"flaky\""),
            ("known runfiles test-output", "two kinds"),
            ("known path=(", "path"),
            ("known min-size=lots", "min-size"),
            ("known label=a", "label"),
        ] {
            let error = text.parse::<Rule>().expect_err(text);
            assert!(error.to_string().contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn a_regex_matches_whole_paths_only() {
        let regex: PathRegex = "a|bazel-out/.*/x".parse().unwrap();
        assert!(regex.matches("bazel-out/k8/x"));
        assert!(!regex.matches("bazel-out/k8/xy"));
        assert!(!regex.matches("ab"));
        assert!("a)(b".parse::<PathRegex>().is_err());
        let deep = format!("{}a{}", "(".repeat(50_000), ")".repeat(50_000));
        assert!(deep.parse::<PathRegex>().is_err());
        assert!(PathRegex::within(r"\pL{200}", 100_000).is_err());
        assert!(PathRegex::within("bazel-out/.*\\.so", 100_000).is_ok());
    }
}
