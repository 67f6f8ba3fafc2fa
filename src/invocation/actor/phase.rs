//! Where a build is in its life.

use std::time::Instant;

use crate::invocation::feed::Report;

/// See the module.
pub(super) enum Phase {
    /// It was only asked about. Every build begins so; left with the first events, or with the end of the stream.
    Unheard,
    /// Its stream goes on. Entered with events, from every phase, since a client can resume a broken stream; left when
    /// the stream ends.
    Open {
        /// When the last event that names outputs came, if it has come.
        ended_at: Option<Instant>,
        /// Whether the client's connection was lost, and neither the client nor the end has come since.
        lost: bool,
    },
    /// Its stream has ended. Entered with the end of the stream, also of a build that is settled, and again when outputs
    /// of a settled build are checked once more; left when nothing is on its way.
    Ended {
        /// The stream's end.
        end: End,
        /// What is to be done next.
        next: Step,
    },
    /// It is settled, and that has been reported. Entered when nothing is on its way after the end of the stream.
    Settled {
        /// The stream's end.
        end: End,
        /// What was reported.
        report: Report,
    },
    /// The same, and what only more events would need was given back. Entered when a build is settled whose stream has
    /// not broken off; only events can follow.
    Unloaded(Report),
}

/// How a stream ended.
#[derive(Clone, Copy)]
pub(super) struct End {
    /// When the last event that names outputs came, or else when the stream ended.
    pub(super) at: Instant,
    /// Whether the stream has broken off, and can be resumed.
    pub(super) interrupted: bool,
}

/// What is done after the end of a stream, each once and in this order.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Wanting what programs need at run time. At once.
    BringRunfiles,
    /// Checking outputs that the build tool may have deleted. When nothing required is on its way.
    CheckAgain,
    /// Settling the build. When nothing is on its way.
    Settle,
}

impl Phase {
    /// Whether the stream has not ended.
    pub(super) const fn is_open(&self) -> bool {
        matches!(self, Self::Unheard | Self::Open { .. })
    }

    /// When the last event that names outputs came, or the stream ended.
    pub(super) const fn ended_at(&self) -> Option<Instant> {
        match self {
            Self::Open { ended_at, .. } => *ended_at,
            Self::Ended { end, .. } | Self::Settled { end, .. } => Some(end.at),
            Self::Unheard | Self::Unloaded(_) => None,
        }
    }

    /// Whether the stream has broken off, and can be resumed.
    pub(super) const fn is_interrupted(&self) -> bool {
        matches!(self, Self::Ended { end, .. } | Self::Settled { end, .. } if end.interrupted)
    }

    /// Whether the client is gone, may come back, and is not waited for.
    pub(super) const fn is_left(&self) -> bool {
        match self {
            Self::Open { lost, .. } => *lost,
            Self::Settled { end, .. } => end.interrupted,
            Self::Unheard | Self::Ended { .. } | Self::Unloaded(_) => false,
        }
    }

    /// Whether everything on disk was checked again after the end of the stream.
    pub(super) const fn has_checked_again(&self) -> bool {
        !self.is_open() && !matches!(self, Self::Ended { next, .. } if !matches!(next, Step::Settle))
    }

    /// What was reported of a settled build.
    pub(super) const fn report(&self) -> Option<&Report> {
        match self {
            Self::Settled { report, .. } | Self::Unloaded(report) => Some(report),
            Self::Unheard | Self::Open { .. } | Self::Ended { .. } => None,
        }
    }

    /// Whether this step is next. If so, the one after it is from now on.
    pub(super) fn takes(&mut self, step: Step) -> bool {
        let Self::Ended { next, .. } = self else {
            return false;
        };
        let is_next = *next == step;
        if is_next {
            *next = match step {
                Step::BringRunfiles => Step::CheckAgain,
                Step::CheckAgain | Step::Settle => Step::Settle,
            };
        }
        is_next
    }
}
