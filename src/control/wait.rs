//! When a wait is over, and what came of it: decided from what a follower of the build hears.
//!
//! The daemon's `Wait` and the command line feed the same [`Judge`].

use std::{collections::BTreeMap, sync::Arc};

use super::service::{show, watch::News};
use crate::{
    invocation::pattern::{PatternError, TargetPattern},
    proto::outhaul::v1::{self as pb, watch_invocation_response::Event},
    record::{TargetRow, TargetState, with_fields_of},
};

/// Targets in an answer: within what gRPC clients take in one message.
const TARGETS: usize = 10_000;
/// Failures in an answer.
const FAILURES: usize = 100;

/// The build tool's exit codes with which all targets were built: success, failed tests, no tests.
const BUILT: &[i32] = &[0, 3, 4];

/// One target pattern, with the aspect that it may be about.
#[derive(Debug, Clone)]
struct Asked {
    text: String,
    pattern: TargetPattern,
    aspect: Option<String>,
    /// Whether a target was told of that it covers, and one that it stands for first of all.
    found: bool,
    named: bool,
}

impl Asked {
    fn parse(text: &str) -> Result<Self, PatternError> {
        // A label has no %, an aspect's own name has: //tools:lint.bzl%lint.
        let (label, aspect) = match text.split_once('%') {
            Some((label, aspect)) => (label, Some(aspect.to_owned())),
            None => (text, None),
        };
        Ok(Self {
            text: text.to_owned(),
            pattern: label.parse()?,
            aspect,
            found: false,
            named: false,
        })
    }

    fn covers(&self, label: &str, aspect: &str) -> bool {
        let about = match &self.aspect {
            None => true,
            Some(asked) => {
                let plain = |name: &str| name.trim_start_matches('@').to_owned();
                plain(asked) == plain(aspect)
                    || aspect.rsplit_once('%').is_some_and(|(_, name)| name == asked)
            }
        };
        about && self.pattern.covers(label)
    }

    /// Whether a target is what it stands for first of all: an aspect for one that names it, else the target itself.
    fn names(&self, target: &TargetRow) -> bool {
        self.covers(&target.label, &target.aspect) && (self.aspect.is_some() || target.aspect.is_empty())
    }
}

/// Decides one wait.
#[derive(Debug)]
pub(crate) struct Judge {
    asked: Vec<Asked>,
    invocation: Option<pb::Invocation>,
    /// Only those that are waited for. In the daemon, all who wait share the rows.
    targets: BTreeMap<Seen, Note>,
    /// How many of them have not come to their end.
    open: usize,
    /// Outputs of these that failed to download.
    failed_outputs: Vec<String>,
    /// Whether outputs were left to a newer build: what settles from then on may lack some.
    superseded: bool,
}

/// What is noted of a target that is waited for.
#[derive(Debug)]
struct Note {
    /// It was settled only after a newer build had begun.
    superseded: bool,
    /// It was asked for by its name.
    named: bool,
}

/// A target, known by label, aspect and configuration.
#[derive(Debug)]
struct Seen(Arc<TargetRow>);

impl Seen {
    fn key(&self) -> (&str, &str, &str) {
        (&self.0.label, &self.0.aspect, &self.0.configuration)
    }
}

impl PartialEq for Seen {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Seen {}

impl PartialOrd for Seen {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Seen {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

/// A target as another process tells it.
fn row_of(target: &pb::Target) -> TargetRow {
    let (state, target) = (target.state().into(), target.clone());
    with_fields_of!(target, TargetRow { state: state }
        label aspect configuration success required optional failed known,
        ..TargetRow::default())
}

impl Judge {
    /// Waits for what the patterns take in; for the whole invocation without any.
    ///
    /// # Errors
    /// When one is not a pattern.
    pub(crate) fn new<S: AsRef<str>>(patterns: &[S]) -> Result<Self, PatternError> {
        let asked = patterns.iter().map(|text| Asked::parse(text.as_ref()));
        Ok(Self {
            asked: asked.collect::<Result<_, _>>()?,
            invocation: None,
            targets: BTreeMap::new(),
            open: 0,
            failed_outputs: Vec::new(),
            superseded: false,
        })
    }

    /// Whether a target is waited for. As on Bazel's command line, the last pattern that covers it decides.
    pub(crate) fn covers(&self, label: &str, aspect: &str) -> bool {
        let only_out = self.asked.iter().all(|asked| asked.pattern.is_negative);
        self.asked
            .iter()
            .rev()
            .find(|asked| asked.covers(label, aspect))
            .map_or(only_out, |asked| !asked.pattern.is_negative)
    }

    /// Whether an output may belong to a target that is waited for.
    pub(crate) fn covers_output(&self, output: &pb::OutputEnd) -> bool {
        self.covers(&output.label, "")
            || self
                .asked
                .iter()
                .any(|asked| asked.aspect.is_some() && asked.pattern.covers(&output.label))
    }

    /// The same from the daemon's own rows.
    pub(crate) fn hear(&mut self, news: &News) -> Option<pb::WaitResponse> {
        match news {
            News::Target(row) => {
                self.target(row.clone());
                self.all_named_are_over().then(|| self.answer(false))
            }
            News::Other(event) => self.take(event),
        }
    }

    /// Takes what was heard; answers once the wait is over.
    pub(crate) fn take(&mut self, event: &Event) -> Option<pb::WaitResponse> {
        match event {
            Event::Invocation(invocation) => {
                self.superseded |= invocation.superseded > 0;
                self.invocation = Some(invocation.clone());
                None
            }
            Event::TargetKnown(target) | Event::TargetSettled(target) => {
                self.target(Arc::new(row_of(target)));
                self.all_named_are_over().then(|| self.answer(false))
            }
            Event::Output(output) => {
                self.output(output);
                None
            }
            Event::Lagged(_) => None,
            Event::Settled(invocation) => {
                self.superseded |= invocation.superseded > 0;
                self.invocation = Some(invocation.clone());
                Some(self.answer(true))
            }
        }
    }

    /// Takes what a target has come to, if it is waited for.
    fn target(&mut self, row: Arc<TargetRow>) {
        let seen = Seen(row);
        let before = self.targets.remove_entry(&seen);
        // There may be as many patterns as targets: they are compared once, however often a target is told of.
        let named = match &before {
            Some((_, note)) => note.named,
            None if self.covers(&seen.0.label, &seen.0.aspect) => self.find(&seen.0),
            None => return,
        };
        let settled_before = before
            .as_ref()
            .is_some_and(|(seen, note)| seen.0.state == TargetState::Settled && !note.superseded);
        let is_settled = seen.0.state == TargetState::Settled && seen.0.required > 0;
        let superseded = self.superseded && is_settled && !settled_before;
        self.open -= usize::from(before.is_some_and(|(seen, _)| !seen.0.state.is_over()));
        self.open += usize::from(!seen.0.state.is_over());
        self.targets.insert(seen, Note { superseded, named });
    }

    /// Notes which patterns a new target is about; true if one names it.
    fn find(&mut self, target: &TargetRow) -> bool {
        let mut named = false;
        for asked in &mut self.asked {
            let covers = asked.covers(&target.label, &target.aspect);
            asked.found |= covers;
            asked.named |= asked.names(target);
            named |= covers && asked.pattern.is_exact();
        }
        named
    }

    fn output(&mut self, output: &pb::OutputEnd) {
        if output.class() != pb::OutputClass::Required {
            return;
        }
        match output.outcome() {
            pb::OutputOutcome::Superseded => self.superseded = true,
            outcome
                if outcome.is_failure()
                    && self.failed_outputs.len() < FAILURES
                    && self.covers_output(output) =>
            {
                self.failed_outputs.push(format!(
                    "{}: {}: {}",
                    output.exec_path,
                    output.outcome().name(),
                    output.error
                ));
            }
            _ => {}
        }
    }

    /// Whether there are only names, and each of them has come to its end.
    fn all_named_are_over(&self) -> bool {
        !self.asked.is_empty()
            && self
                .asked
                .iter()
                .all(|asked| asked.pattern.is_exact() && !asked.pattern.is_negative)
            && self.open == 0
            && self.asked.iter().all(|asked| asked.named)
    }

    /// What there is when time is up.
    pub(crate) fn timed_out(&self) -> pb::WaitResponse {
        pb::WaitResponse {
            result: pb::WaitResult::TimedOut.into(),
            ..self.answer(false)
        }
    }

    fn answer(&self, build_is_over: bool) -> pb::WaitResponse {
        let mut failures = Vec::new();
        let mut targets: Vec<(bool, &TargetRow)> = Vec::new();
        for (seen, note) in &self.targets {
            let failure = self.failure_of(&seen.0, note, build_is_over);
            targets.push((failure.is_none(), &seen.0));
            failures.extend(failure);
        }
        if build_is_over {
            failures.extend(self.failures_of_all());
        }
        if !failures.is_empty() {
            for output in &self.failed_outputs {
                if !failures.contains(output) {
                    failures.push(output.clone());
                }
            }
        }
        let not_found: Vec<String> = self
            .asked
            .iter()
            .filter(|asked| build_is_over && !asked.pattern.is_negative)
            .filter(|asked| !asked.found)
            .map(|asked| asked.text.clone())
            .collect();
        // That something failed to download weighs more than that something else is not known.
        let result = match (failures.is_empty(), not_found.is_empty()) {
            (false, _) => pb::WaitResult::Failed,
            (true, false) => pb::WaitResult::NotFound,
            (true, true) => pb::WaitResult::Settled,
        };
        // Stable: within those that failed and those that did not, by label.
        targets.sort_by_key(|(fine, _)| *fine);
        let left_out = targets.len().saturating_sub(TARGETS);
        targets.truncate(TARGETS);
        failures.truncate(FAILURES);
        pb::WaitResponse {
            result: result.into(),
            invocation: self.invocation.clone(),
            targets: targets.into_iter().map(|(_, row)| show::target(row)).collect(),
            targets_left_out: left_out as u64,
            failures,
            not_found,
        }
    }

    /// Why a target is not there, if it is not.
    fn failure_of(&self, target: &TargetRow, note: &Note, build_is_over: bool) -> Option<String> {
        let name = match &*target.aspect {
            "" => target.label.clone(),
            aspect => format!("{}%{aspect}", target.label),
        };
        match target.state {
            TargetState::Settled if note.superseded => {
                Some(format!("{name}: outputs are superseded by a newer build"))
            }
            TargetState::Settled => None,
            TargetState::Failed if !target.success => Some(format!("{name}: was not built")),
            TargetState::Failed => Some(format!(
                "{name}: {} of {} required outputs could not be downloaded",
                target.failed, target.required
            )),
            // What the build tool skips, as incompatible with the platform, fails no build that asks for everything.
            TargetState::Aborted if !note.named && self.exit_code() == Some(0) => None,
            TargetState::Aborted => Some(format!("{name}: was not built")),
            _ if build_is_over => Some(format!("{name}: was not completed")),
            _ => None,
        }
    }

    fn exit_code(&self) -> Option<i32> {
        self.invocation
            .as_ref()
            .and_then(|invocation| invocation.exit_code)
    }

    /// What failed beside single targets, of a build that is over.
    fn failures_of_all(&self) -> Vec<String> {
        let Some(invocation) = &self.invocation else {
            return Vec::new();
        };
        let mut failures = Vec::new();
        let names_only = !self.asked.is_empty() && self.asked.iter().all(|asked| asked.pattern.is_exact());
        if !names_only {
            match invocation.state() {
                pb::InvocationState::Interrupted => failures.push("the build was interrupted".to_owned()),
                pb::InvocationState::Superseded => {
                    failures.push("a newer build of the same output root took over".to_owned());
                }
                _ => {}
            }
        }
        if self.asked.is_empty() {
            if invocation.failed > 0 {
                failures.extend(invocation.errors.iter().cloned());
            }
            if let Some(code) = invocation.exit_code.filter(|code| !BUILT.contains(code)) {
                failures.push(format!("the build tool ended with exit code {code}"));
            }
        }
        failures
    }
}

#[cfg(test)]
#[path = "wait_tests.rs"]
mod tests;
