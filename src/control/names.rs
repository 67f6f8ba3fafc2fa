//! The protocol's enumerations: from the values that the rooms have, and by the names that commands print.

use std::time::Duration;

use crate::{
    materialize::Outcome,
    output::Class,
    proto::outhaul::v1 as pb,
    record::{InvocationState, OutputState, TargetState},
    stage::Brought,
    units::{now_ms, show_duration},
};

macro_rules! names {
    ($($value:ident: $prefix:literal),* $(,)?) => {$(
        impl pb::$value {
            /// The name as commands print it, in lowercase; empty for the unspecified value.
            pub fn name(self) -> String {
                let name = self.as_str_name();
                match name.strip_prefix($prefix).unwrap_or(name) {
                    "UNSPECIFIED" => String::new(),
                    name => name.to_ascii_lowercase(),
                }
            }
        }
    )*};
}

names! {
    InvocationState: "INVOCATION_STATE_",
    OutputClass: "OUTPUT_CLASS_",
    OutputOutcome: "OUTPUT_OUTCOME_",
    OutputState: "OUTPUT_STATE_",
    TargetState: "TARGET_STATE_",
    WaitResult: "WAIT_RESULT_",
}

impl pb::Output {
    /// Where it is, or would be.
    pub(crate) fn absolute_path(&self) -> String {
        format!("{}/{}", self.exec_root, self.exec_path)
    }
}

impl pb::Pause {
    /// What is paused, and how it ends.
    pub(crate) fn words(&self) -> String {
        let (what, flag) = if self.all {
            ("all downloads", " --all")
        } else {
            ("downloads of optional outputs", "")
        };
        let left = match self.until_ms {
            0 => String::new(),
            until_ms => {
                let left = u64::try_from(until_ms.saturating_sub(now_ms())).unwrap_or_default();
                format!(" for another {}", show_duration(Duration::from_millis(left)))
            }
        };
        format!("{what} are paused{left} (`outhaul pause{flag}`); `outhaul resume` resumes them")
    }
}

impl pb::InvocationState {
    /// Whether nothing more will happen to the build.
    pub(crate) const fn is_over(self) -> bool {
        !matches!(self, Self::Running | Self::Draining)
    }
}

impl pb::Invocation {
    /// The state that people are shown: a build that lacks outputs has failed, whatever the build tool says.
    pub(crate) fn shown_state(&self) -> &'static str {
        match self.state() {
            pb::InvocationState::Running => "running",
            pb::InvocationState::Draining => "draining",
            _ if self.failed > 0 => "failed",
            pb::InvocationState::Superseded => "superseded",
            pb::InvocationState::Interrupted => "interrupted",
            pb::InvocationState::Settled | pb::InvocationState::Unspecified => "settled",
        }
    }
}

impl pb::TargetState {
    /// Where people are shown it: what failed first, then what is not there yet.
    pub(crate) const fn rank(self) -> u8 {
        match self {
            Self::Failed => 0,
            Self::Aborted => 1,
            Self::Completed => 2,
            Self::Announced | Self::Unspecified => 3,
            Self::Settled => 4,
        }
    }
}

impl pb::OutputOutcome {
    /// Whether the output came to its end, and is neither on disk nor left to a newer build.
    pub(crate) const fn is_failure(self) -> bool {
        matches!(self, Self::Evicted | Self::Failed)
    }
}

/// Each of a kind has its counterpart of the same name.
macro_rules! counterparts {
    ($($ours:ident => $theirs:ident: $($name:ident),+;)*) => {$(
        impl From<$ours> for pb::$theirs {
            fn from(ours: $ours) -> Self {
                match ours {
                    $($ours::$name => Self::$name,)+
                }
            }
        }
    )*};
}

counterparts! {
    Class => OutputClass: Known, Optional, Required;
    OutputState => OutputState: Known, Materialized, Evicted, Failed;
    InvocationState => InvocationState: Running, Draining, Settled, Superseded, Interrupted;
    TargetState => TargetState: Announced, Completed, Settled, Failed, Aborted;
    Brought => OutputOutcome: Downloaded, Copied, Present;
}

/// One that is not known counts as announced: its end is still to come.
impl From<pb::TargetState> for TargetState {
    fn from(state: pb::TargetState) -> Self {
        match state {
            pb::TargetState::Unspecified | pb::TargetState::Announced => Self::Announced,
            pb::TargetState::Completed => Self::Completed,
            pb::TargetState::Settled => Self::Settled,
            pb::TargetState::Failed => Self::Failed,
            pb::TargetState::Aborted => Self::Aborted,
        }
    }
}

impl From<&Outcome> for pb::OutputOutcome {
    fn from(outcome: &Outcome) -> Self {
        match outcome {
            Outcome::Downloaded { .. } => Self::Downloaded,
            Outcome::Present { .. } => Self::Present,
            Outcome::Served { .. } => Self::Served,
            Outcome::Evicted(_) => Self::Evicted,
            Outcome::Unavailable(_) | Outcome::NoSpace(_) | Outcome::Failed(_) => Self::Failed,
            Outcome::Superseded => Self::Superseded,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_print_the_names_that_the_record_has() {
        for state in [
            OutputState::Known,
            OutputState::Materialized,
            OutputState::Evicted,
            OutputState::Failed,
        ] {
            assert_eq!(pb::OutputState::from(state).name(), state.name());
        }
        for state in [TargetState::Announced, TargetState::Settled, TargetState::Aborted] {
            assert_eq!(pb::TargetState::from(state).name(), state.name());
            assert_eq!(TargetState::from(pb::TargetState::from(state)), state);
        }
        assert_eq!(
            pb::OutputClass::from(Class::Optional).name(),
            Class::Optional.name()
        );
        assert_eq!(pb::WaitResult::TimedOut.name(), "timed_out");
        assert_eq!(pb::OutputOutcome::Unspecified.name(), "");
        assert!(pb::InvocationState::Superseded.is_over() && !pb::InvocationState::Draining.is_over());
    }

    #[test]
    fn a_pause_is_told_with_its_end_and_the_way_out() {
        let words = |all, until_ms| pb::Pause { all, until_ms }.words();
        assert_eq!(
            words(true, 0),
            "all downloads are paused (`outhaul pause --all`); `outhaul resume` resumes them"
        );
        assert_eq!(
            words(false, 1),
            "downloads of optional outputs are paused for another 0.00s (`outhaul pause`); `outhaul resume` resumes \
             them"
        );
    }
}
