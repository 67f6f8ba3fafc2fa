//! What an invocation's task keeps of outputs, places and doubts.

use std::sync::Arc;

use crate::{
    action_cache::{Facts, State},
    bep::{event::TargetId, named_sets::SetIndex},
    exec_path::ExecPath,
    materialize::{Outcome, Root},
    output::{Class, OutputContent},
    record::RootId,
};

/// Hashes paths, of which there are many. Seeded at random, since a stream is not to be trusted.
pub(super) type PathHasher = foldhash::fast::RandomState;

/// An output that is on disk.
#[derive(Clone)]
pub(super) struct Placed {
    pub(super) path: ExecPath,
    pub(super) outcome: Outcome,
}

pub(super) struct Wanted {
    pub(super) content: OutputContent,
    pub(super) class: Class,
    pub(super) target: Arc<TargetId>,
    /// The event that calls for it, and the set that has it: see [`crate::invocation::build::Named`].
    pub(super) sequence: i64,
    pub(super) set: Option<SetIndex>,
    pub(super) done: bool,
    /// Its bytes are on disk, as far as we know.
    pub(super) on_disk: bool,
}

/// What is needed to ask for outputs, once the stream has told it.
pub(super) struct Place {
    pub(super) id: RootId,
    pub(super) root: Arc<Root>,
    pub(super) version: u64,
}

/// What the action cache tells.
pub(super) enum Known {
    /// These facts.
    Facts(Facts, Arc<State>),
    /// What it told before.
    Unchanged,
    /// Nothing, for this reason.
    Nothing(String),
}

/// Why what is on disk may not be what was placed or found there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doubt {
    /// Somebody else is in the middle of placing files.
    Placing,
    /// The same, for so long that the build is not held any more.
    Stuck,
    /// They are done, and what is on disk is to be looked at; once more if what is optional was still on its way.
    Done { looked: bool },
}
