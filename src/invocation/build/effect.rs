//! What a build's events come to, as plain data.

use std::{collections::HashMap, sync::Arc};

use crate::{
    bep::{
        event::{ConvenienceSymlink, Started, TargetId},
        named_sets::SetIndex,
    },
    exec_path::ExecPath,
    output::{Class, OutputContent},
};

/// An output that the stream names.
#[derive(Debug, Clone, PartialEq)]
pub struct Named {
    /// Where it belongs.
    pub path: ExecPath,
    /// What it is.
    pub content: OutputContent,
    /// How much it is wanted.
    pub class: Class,
    /// Which rule says so.
    pub rule: Arc<str>,
    /// The output group, or empty.
    pub group: Arc<str>,
    /// The event that named it.
    pub event: Arc<str>,
    /// The number of the event that is settled only once this output is: the one that completed the target, or with
    /// [`Build::holding_sets`](super::Build::holding_sets) the one that brought the set.
    pub sequence: i64,
    /// The set that has it, if one does.
    pub set: Option<SetIndex>,
}

/// What a target came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetEnd {
    /// Completed; whether all of it was built.
    Completed {
        /// Whether all of it was built.
        success: bool,
        /// Whether its tests' outputs still come: [`Effect::Tested`].
        awaits_tests: bool,
    },
    /// It will not be completed.
    Aborted,
}

/// What follows from an event.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// The build began.
    Started(Started),
    /// The build's exec root, absolute, as the build tool sees it. Comes after `Started` and before any outputs.
    ExecRoot(String),
    /// Targets that are to be completed.
    Announced(Vec<TargetId>),
    /// Outputs of one target.
    Outputs(Arc<TargetId>, Vec<Named>),
    /// A target came to its end, by the event of this number; its outputs came before.
    Target(Arc<TargetId>, TargetEnd, i64),
    /// All tests of a target were run, as the event of this number says; their outputs came before.
    Tested(Arc<TargetId>, i64),
    /// Links into the output base.
    ConvenienceSymlinks(Vec<ConvenienceSymlink>),
    /// Outputs of this build that the build tool could not name, because the directories that they belong in were
    /// deleted. Comes at the end.
    Unnamed(Vec<ExecPath>),
    /// A target of whose required outputs the stream names none, and does not say why: so it is when their directories were
    /// deleted. Comes at the end.
    Hollow(Arc<TargetId>),
    /// Something named cannot be an output: why, in words.
    Refused(String),
    /// Outputs of one target that the build tool names without saying their content: a local file of one that names no
    /// digests there. They are on its disk, or cannot be downloaded.
    Undigested(Arc<TargetId>, Vec<(Class, ExecPath)>),
    /// An output that cannot be downloaded, whatever the cache does: its path or its digest is invalid.
    Unusable(Class, String),
    /// The first blob's `bytestream://` authority, once.
    Authority(String),
    /// The build ended.
    Finished {
        /// The build tool's exit code.
        exit_code: i32,
    },
}

/// Takes out of what one event names what has another content than the same path before it. The first counts, as no
/// build tool makes one file twice for one event; what a later event says is newer.
pub(crate) fn take_contradicting(named: &mut Vec<Named>) -> Vec<Named> {
    let mut first: HashMap<&str, &OutputContent> = HashMap::with_capacity(named.len());
    let contradicts: Vec<bool> = named
        .iter()
        .map(|n| {
            !first
                .entry(n.path.as_str())
                .or_insert(&n.content)
                .is_same(&n.content)
        })
        .collect();
    let mut contradicts = contradicts.into_iter();
    named
        .extract_if(.., |_| contradicts.next().unwrap_or_default())
        .collect()
}

/// Why one of those has failed, in words.
pub(crate) fn contradiction(path: &ExecPath) -> String {
    format!("{path}: the same event names it with other content as well")
}
