//! What an invocation's task keeps of outputs, and for those who follow it.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::{oneshot, watch};

use crate::{
    action_cache::{Facts, State},
    bep::{event::TargetId, named_sets::SetIndex},
    builds::{Progress, Settlement},
    invocation::{feed::Listeners, tally::RuleIndex},
    materialize::Completion,
    output::{Class, OutputContent, STAMP_AGE},
    record::InvocationRow,
};

/// Hashes paths, of which there are many. Seeded at random, since a stream is not to be trusted.
pub(super) type PathHasher = foldhash::fast::RandomState;

pub(super) struct Wanted {
    pub(super) content: OutputContent,
    pub(super) class: Class,
    /// The rule that has made it wanted.
    pub(super) rule: RuleIndex,
    pub(super) target: Arc<TargetId>,
    pub(super) group: Arc<str>,
    /// The event that calls for it, and the set that has it: see [`crate::invocation::build::Named`].
    pub(super) sequence: i64,
    pub(super) set: Option<SetIndex>,
    pub(super) done: bool,
    /// Its bytes are on disk, as far as we know.
    pub(super) on_disk: bool,
}

/// For how long rows are put off while more come, and how many (some 200 bytes each): they are of no use to the build
/// that waits, and would take its processor time.
const ROWS_PUT_OFF: Duration = Duration::from_secs(1);
const ROWS_AT_ONCE: usize = 1 << 16;

/// An output that is only looked for.
pub(super) struct Sought {
    pub(super) class: Class,
    /// Those that name it.
    pub(super) targets: HashSet<Arc<TargetId>>,
    /// What it should be, if the stream says so.
    pub(super) content: Option<OutputContent>,
}

/// Completions whose rows are not written yet.
#[derive(Default)]
pub(super) struct Unwritten {
    pub(super) ends: Vec<Completion>,
    /// When the last completion came, and the first of these.
    pub(super) last: Option<Instant>,
    pub(super) since: Option<Instant>,
}

impl Unwritten {
    pub(super) const fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Whether they are to be written now.
    pub(super) fn is_due(&self) -> bool {
        self.ends.len() >= ROWS_AT_ONCE
            || self.last.is_some_and(|last| last.elapsed() >= STAMP_AGE)
            || self.since.is_some_and(|since| since.elapsed() >= ROWS_PUT_OFF)
    }
}

/// What the action cache says.
pub(super) enum Known {
    /// These facts.
    Facts(Facts, Arc<State>),
    /// What it reported before.
    Unchanged,
    /// Nothing, for this reason.
    Nothing(String),
}

/// Everyone who is informed of the build's progress.
#[derive(Default)]
pub(super) struct Followers {
    pub(super) progress: watch::Sender<Progress>,
    pub(super) listeners: Listeners,
    /// Who asked where the build is.
    pub(super) asked: Vec<oneshot::Sender<(InvocationRow, u64)>>,
    /// Who waits for what is required.
    pub(super) settled: Vec<oneshot::Sender<Settlement>>,
    /// Who waits for what is optional as well.
    pub(super) done: Vec<oneshot::Sender<()>>,
}
