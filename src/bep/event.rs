//! The build's events as the rest of Outhaul sees them: small, typed, free of wire formats.

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;

use crate::{digest::Digest, units::parse_duration};

/// One event of a build. Events that say nothing about outputs are [`Event::Other`].
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The build began.
    Started(Started),
    /// Where the build's exec root is on disk; absolute.
    ExecRoot(String),
    /// One of the build's command lines.
    CommandLine(CommandLine),
    /// A configuration was announced.
    Configuration {
        /// The id that other events refer to.
        id: String,
        /// Its directory below `bazel-out`, such as `k8-fastbuild`.
        mnemonic: String,
    },
    /// A target was configured.
    Configured {
        /// The target.
        label: String,
        /// Its kind, such as `sh_test rule`.
        kind: String,
        /// Its completions that are to come: one in each of its configurations.
        completions: Vec<TargetId>,
    },
    /// A node of the graph of named sets.
    NamedSet(NamedSet),
    /// A target, or an aspect on one, was completed.
    Completed(Completed),
    /// One attempt of a test ended.
    TestResult(TestResult),
    /// All attempts of a test ended.
    TestSummary {
        /// The test's label.
        label: String,
        /// Its configuration's id.
        configuration: String,
        /// How many shards it had; 0 or 1 for none.
        shard_count: u32,
        /// How many times each shard was run.
        run_count: u32,
    },
    /// An action was reported: a failed one, or any with `--build_event_publish_all_actions`.
    Action(Action),
    /// Something announced will not come.
    Aborted {
        /// The target or aspect that it was about, if any.
        target: Option<TargetId>,
        /// The reason's name, such as `SKIPPED`.
        reason: String,
        /// The build tool's words.
        description: String,
    },
    /// The build tool's links into the output base.
    ConvenienceSymlinks(Vec<ConvenienceSymlink>),
    /// The report of all tests' coverage together, of `--combined_report=lcov`, which comes among the build tool's logs.
    CombinedReport(File),
    /// The build ended.
    Finished {
        /// The build tool's exit code.
        exit_code: i32,
        /// Its name, such as `SUCCESS`.
        name: String,
        /// When the command ended, in milliseconds since the epoch; 0 if that is not told.
        ended_ms: i64,
    },
    /// Output files that the build tool wanted to name and could not, because they are not there; absolute paths. Bazel
    /// says so in its own output alone: it leaves a file out of the stream when the directory that it belongs in was
    /// deleted, although it knows the file's digest.
    Unreadable(Vec<String>),
    /// In the place of an event that cannot be decoded: why, in words. Outputs that only it names are unknown.
    Skipped(String),
    /// An event that is not used.
    Other,
}

/// An event with its place in the stream.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamEvent {
    /// The decoded event.
    pub event: Event,
    /// Whether the stream says that this was its last.
    pub last: bool,
}

/// A target or aspect in one configuration.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct TargetId {
    /// The target's label.
    pub label: String,
    /// The aspect, or empty for the target itself.
    pub aspect: String,
    /// The configuration's id.
    pub configuration: String,
}

impl fmt::Display for TargetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.label)?;
        if !self.aspect.is_empty() {
            write!(f, " (aspect {})", self.aspect)?;
        }
        Ok(())
    }
}

/// The build's beginning.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Started {
    /// The invocation id.
    pub invocation_id: String,
    /// `build`, `test`, `run`, `coverage`, ...
    pub command: String,
    /// The build tool's version.
    pub build_tool_version: String,
    /// The workspace's absolute path.
    pub workspace: String,
    /// Where the build tool's client was started; absolute.
    pub working_directory: String,
    /// When it began, in milliseconds since the epoch.
    pub started_ms: i64,
}

/// A command line, taken apart into options.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CommandLine {
    /// `original`, `canonical` or `tool`.
    pub label: String,
    /// Options of all sections in order: name and value (`1`/`0` or empty for switches, as the tool wrote it).
    pub options: Vec<(String, String)>,
}

impl CommandLine {
    /// The last value given for an option.
    pub fn last(&self, name: &str) -> Option<&str> {
        self.options
            .iter()
            .rev()
            .find(|(n, _)| n == name)
            .map(|(_, v)| v.as_str())
    }

    /// The same, unless it is empty: an empty value takes back what came before.
    pub fn given(&self, name: &str) -> Option<&str> {
        self.last(name).filter(|value| !value.is_empty())
    }

    /// How long the build tool waits for its event service, where it says so; 0 is no limit.
    pub(crate) fn bes_timeout(&self) -> Option<Duration> {
        let timeout = parse_duration(self.given("bes_timeout")?).ok()?;
        (!timeout.is_zero()).then_some(timeout)
    }

    /// The last word on a switch, in either spelling: `--x`, `--x=false`, `--nox`.
    pub(crate) fn switch(&self, name: &str) -> Option<bool> {
        self.options.iter().rev().find_map(|(option, value)| {
            if option == name {
                Some(!matches!(
                    &*value.to_ascii_lowercase(),
                    "0" | "false" | "no" | "n" | "f"
                ))
            } else {
                (option.strip_prefix("no") == Some(name)).then_some(false)
            }
        })
    }

    /// The remote cache, with the option that names it. As Bazel: an executor is its own cache unless another is named.
    pub fn remote_cache(&self) -> Option<(&'static str, &str)> {
        ["remote_cache", "remote_executor"]
            .into_iter()
            .find_map(|name| Some((name, self.given(name)?)))
    }

    /// Every value given for an option, in order.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.options
            .iter()
            .filter(move |(n, _)| n == name)
            .map(|(_, v)| v.as_str())
    }

    /// The download mode that the last option about it asks for: `minimal`, `toplevel`, `all`.
    pub(crate) fn download_mode(&self) -> Option<&str> {
        self.options
            .iter()
            .rev()
            .find_map(|(name, value)| match name.as_str() {
                "remote_download_outputs" | "experimental_remote_download_outputs" => Some(value.as_str()),
                "remote_download_minimal" => Some("minimal"),
                "remote_download_toplevel" => Some("toplevel"),
                "remote_download_all" => Some("all"),
                _ => None,
            })
    }
}

/// A named set: files and further sets.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct NamedSet {
    /// Its id, valid within the stream.
    pub id: String,
    /// Its own files.
    pub files: Vec<File>,
    /// Ids of the sets it includes.
    pub children: Vec<String>,
    /// Where the first of its files that has a `bytestream://` URI is said to be: the host and port in it.
    pub authority: Option<Box<str>>,
}

/// A file as an event names it.
#[derive(Debug, Clone, PartialEq)]
pub struct File {
    /// `path_prefix` and `name`, joined. For source files and old test results there is no prefix. Shared with whatever
    /// names the file later: a build of a million files has each path once.
    pub path: Arc<str>,
    /// How many bytes of `path` are prefix, without the slash; 0 for none.
    pub prefix_len: usize,
    /// What is known of its content.
    pub content: Content,
    /// The file's URI as the event gave it, where its content is [`Content::Unknown`]: else that says it all.
    pub uri: Option<Box<str>>,
}

impl File {
    /// Whether the artifact root is named: outputs have one, source files have none.
    pub const fn has_prefix(&self) -> bool {
        self.prefix_len > 0
    }

    /// The path below the artifact root.
    pub fn name(&self) -> &str {
        if self.prefix_len == 0 {
            &self.path
        } else {
            self.path.get(self.prefix_len + 1..).unwrap_or("")
        }
    }
}

/// What an event says of a file's content.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// A blob, by digest: from the event's own field, or else from its `bytestream://` URI.
    Blob(Digest),
    /// The bytes themselves.
    Inline(Bytes),
    /// An unresolved symlink's target.
    Symlink(String),
    /// Neither digest nor bytes: a `file://` URI of an old build tool, or nothing at all.
    Unknown,
}

/// A completed target or aspect.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Completed {
    /// The completed target.
    pub target: TargetId,
    /// Whether all of it was built.
    pub success: bool,
    /// Its output groups, as far as they were asked for.
    pub groups: Vec<OutputGroup>,
    /// Roots of its tree artifacts.
    pub directories: Vec<File>,
}

/// An output group.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct OutputGroup {
    /// Name of the file.
    pub name: String,
    /// Ids of its named sets.
    pub sets: Vec<String>,
    /// Files named right in the event.
    pub files: Vec<File>,
    /// Whether some of its artifacts were not built.
    pub incomplete: bool,
}

/// A test attempt's result.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TestResult {
    /// The test's label.
    pub label: String,
    /// Its configuration's id.
    pub configuration: String,
    /// Number of the run, from 1.
    pub run: u32,
    /// Number of the shard, from 1; 0 or 1 where the test is not sharded.
    pub shard: u32,
    /// Number of the attempt, from 1.
    pub attempt: u32,
    /// Whether it passed.
    pub passed: bool,
    /// Its files, with symbolic names such as `test.log`.
    pub files: Vec<File>,
}

/// A reported action.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Action {
    /// Exec path of its first output.
    pub primary_output: String,
    /// The target that it belongs to.
    pub label: String,
    /// Whether it succeeded.
    pub success: bool,
    /// That output's content, from the URI.
    pub content: Option<Content>,
}

/// One convenience symlink.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ConvenienceSymlink {
    /// Path below the workspace.
    pub path: String,
    /// Target relative to the output base; `None` when the link was deleted.
    pub target: Option<String>,
}
