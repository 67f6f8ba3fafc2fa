//! What the record holds, as the rest of Outhaul sees it.

use std::{collections::BTreeMap, fmt, sync::Arc};

use crate::{
    bep::commands::has_outputs,
    output::{Class, OutputContent, Stamp},
};

/// A struct of some fields of its own, and of those that another one has under the same names.
macro_rules! with_fields_of {
    ($from:ident, $($to:ident)::+ {
        $($own:ident $(: $value:expr)?),* $(,)?
    } $($field:ident)* $(, ..$rest:expr)?) => {
        $($to)::+ { $($own $(: $value)?,)* $($field: $from.$field,)* $(..$rest)? }
    };
}
pub(crate) use with_fields_of;

/// An output root's number in the record. Stays valid while the process lives, even when the record is recreated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RootId(pub(super) u32);

impl RootId {
    /// The number, for display and for the control API.
    pub const fn number(self) -> u32 {
        self.0
    }
}

impl fmt::Display for RootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// How far an output has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum OutputState {
    /// Metadata only.
    #[default]
    Known,
    /// Verified bytes were put, or found, under the final name. To be believed only as far as the stamp still
    /// matches.
    Materialized,
    /// The cache does not have the blob, and the disk did not either.
    Evicted,
    /// Fetching or placing failed; the row's `error` says why.
    Failed,
}

impl OutputState {
    /// `known`, `materialized`, `evicted` or `failed`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Known => "known",
            Self::Materialized => "materialized",
            Self::Evicted => "evicted",
            Self::Failed => "failed",
        }
    }
}

/// One output of one root. Texts that many rows share are shared in memory too.
#[derive(Debug, Clone, PartialEq)]
pub struct OutputRow {
    /// What should lie at the path.
    pub content: OutputContent,
    /// How far it has come.
    pub state: OutputState,
    /// How much it is wanted.
    pub class: Class,
    /// Why that class was chosen, in words.
    pub rule: Arc<str>,
    /// The target that named it last.
    pub label: Arc<str>,
    /// That target's aspect, or empty.
    pub aspect: Arc<str>,
    /// The output group that it was in.
    pub output_group: Arc<str>,
    /// The invocation that gave the output its present content.
    pub invocation_id: Arc<str>,
    /// The event that named it, such as `named_set 3`.
    pub event: Arc<str>,
    /// What `lstat` said when the bytes were last known to be right.
    pub stamp: Option<Stamp>,
    /// Where the bytes came from: `batch`, `stream`, `inline`, `copy`, `present`; or empty.
    pub source: Arc<str>,
    /// When it was materialised, in milliseconds since the epoch; 0 for never.
    pub materialized_at_ms: i64,
    /// From being wanted to being in place, in microseconds.
    pub took_us: u64,
    /// Why it failed, or empty.
    pub error: String,
    /// Number of the newest invocation of the root that named it.
    pub version: u64,
}

impl OutputRow {
    /// A row that knows its content and nothing else.
    pub fn known(content: OutputContent) -> Self {
        let empty: Arc<str> = Arc::default();
        Self {
            content,
            state: OutputState::Known,
            class: Class::Known,
            rule: empty.clone(),
            label: empty.clone(),
            aspect: empty.clone(),
            output_group: empty.clone(),
            invocation_id: empty.clone(),
            event: empty.clone(),
            stamp: None,
            source: empty,
            materialized_at_ms: 0,
            took_us: 0,
            error: String::new(),
            version: 0,
        }
    }
}

/// An output root: one exec root on disk.
pub(crate) use crate::proto::outhaul::v1::RecordRoot as RootRow;

/// How far an invocation has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum InvocationState {
    /// Its stream is open.
    #[default]
    Running,
    /// The stream has ended; required outputs are still on their way.
    Draining,
    /// Every required output is there or has failed.
    Settled,
    /// A newer invocation of the same root has started.
    Superseded,
    /// The stream broke off before its end.
    Interrupted,
}

impl InvocationState {
    /// `running`, `draining`, `settled`, `superseded` or `interrupted`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Draining => "draining",
            Self::Settled => "settled",
            Self::Superseded => "superseded",
            Self::Interrupted => "interrupted",
        }
    }

    /// Whether nothing more will happen to it.
    pub(crate) const fn is_over(self) -> bool {
        !matches!(self, Self::Running | Self::Draining)
    }
}

/// What was transferred for outputs, for reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Transfers {
    /// Outputs whose bytes came from a cache.
    pub downloaded: u64,
    /// These bytes.
    pub downloaded_bytes: u64,
    /// Outputs that are on disk without that: they were there, or came from other files or from the events.
    pub without_download: u64,
}

impl Transfers {
    /// With each of its numbers changed by the other's.
    pub(crate) fn changed(self, by: Self, change: fn(u64, u64) -> u64) -> Self {
        Self {
            downloaded: change(self.downloaded, by.downloaded),
            downloaded_bytes: change(self.downloaded_bytes, by.downloaded_bytes),
            without_download: change(self.without_download, by.without_download),
        }
    }
}

/// What became of an invocation's outputs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OutputCounts {
    /// Outputs downloaded.
    pub downloaded: u64,
    /// Bytes of the downloaded outputs.
    pub downloaded_bytes: u64,
    /// How many of the downloaded outputs each cache gave, where there are several.
    pub stores: BTreeMap<String, u64>,
    /// How many bytes of them each gave, where there are several.
    pub store_bytes: BTreeMap<String, u64>,
    /// What was transferred for the outputs that each rule has made wanted. Empty in rows of older versions.
    pub rules: BTreeMap<String, Transfers>,
    /// Outputs that were there already.
    pub present: u64,
    /// Outputs that could not be materialised.
    pub failed: u64,
    /// Outputs only known.
    pub known: u64,
    /// Outputs that a newer invocation took over.
    pub superseded: u64,
}

/// One run of the build tool.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct InvocationRow {
    /// Its id, the row's key.
    pub invocation_id: String,
    /// The build id, which ties several invocations together.
    pub build_id: String,
    /// The output root, once the stream has named it.
    pub root: Option<RootId>,
    /// `build`, `test`, ...
    pub command: String,
    /// The workspace's absolute path.
    pub workspace: String,
    /// The exec root's absolute path.
    pub exec_root: String,
    /// How far it has come.
    pub state: InvocationState,
    /// When it began, in milliseconds since the epoch.
    pub started_ms: i64,
    /// When it was settled; 0 for not yet.
    pub settled_ms: i64,
    /// The build tool's exit code, once `finished`.
    pub exit_code: i32,
    /// Whether the build tool said that the build ended.
    pub finished: bool,
    /// What became of its outputs.
    pub outputs: OutputCounts,
    /// How long completion was held back, in microseconds.
    pub hold_us: u64,
    /// The first failures, one line each.
    pub errors: Vec<String>,
    /// The build tool's version.
    pub build_tool_version: String,
    /// The remote cache, without credentials.
    pub remote_cache: String,
    /// The instance name at the cache.
    pub remote_instance_name: String,
    /// Its number among the root's invocations.
    pub version: u64,
    /// Whether it was brought here from elsewhere.
    pub imported: bool,
    /// How many streams had begun under the same ids before.
    pub attempt: u32,
}

impl InvocationRow {
    /// Whether it has begun, and its command may have outputs. Before its beginning is reported, nothing is known of it.
    pub(crate) fn is_build(&self) -> bool {
        self.started_ms > 0 && has_outputs(&self.command)
    }
}

/// How far a target has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum TargetState {
    /// Named, not yet completed.
    #[default]
    Announced,
    /// The build tool completed it.
    Completed,
    /// Completed, and every required output is there.
    Settled,
    /// The build tool or a required output failed.
    Failed,
    /// It will not come.
    Aborted,
}

impl TargetState {
    /// Whether nothing more is to be expected of it.
    pub(crate) const fn is_over(self) -> bool {
        matches!(self, Self::Settled | Self::Failed | Self::Aborted)
    }

    /// `announced`, `completed`, `settled`, `failed` or `aborted`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Announced => "announced",
            Self::Completed => "completed",
            Self::Settled => "settled",
            Self::Failed => "failed",
            Self::Aborted => "aborted",
        }
    }
}

/// A target, or an aspect on one, of one invocation. Label, aspect and configuration are its key.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TargetRow {
    /// The label.
    pub label: String,
    /// The aspect, or empty.
    pub aspect: String,
    /// The configuration's id.
    pub configuration: String,
    /// How far it has come.
    pub state: TargetState,
    /// Whether the build tool built all of it.
    pub success: bool,
    /// Required outputs.
    pub required: u64,
    /// Optional outputs.
    pub optional: u64,
    /// Required outputs that failed.
    pub failed: u64,
    /// Outputs only known.
    pub known: u64,
    /// What was transferred for its outputs. Those that several targets name are counted for the first.
    pub transfers: Transfers,
}
