//! A build as its journal has it: the events, replayed as often as somebody has a question.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::{carried::Carried, select::some};
use crate::{
    bep::{
        Decoder, Event,
        event::{CommandLine, Content, TargetId},
    },
    builds::StreamKey,
    digest::DigestFunction,
    exec_path::ExecPath,
    invocation::{
        build::{Build, Effect, TargetEnd, is_test},
        policy::{DownloadMode, Policy, Rule},
    },
    journal::{JournalError, Record, RecordKind},
    record::{InvocationRow, InvocationState},
    sources::BuildDirectories,
};

/// A build as its journal has it.
#[derive(Debug, Default)]
pub(crate) struct Recorded {
    /// With their numbers.
    events: Vec<(i64, Event)>,
    /// Whether the build tool said that the build ended.
    pub(crate) finished: bool,
    /// The digest function that the build's command line names.
    pub(crate) function: Option<DigestFunction>,
    /// What could not be read, in words.
    pub(crate) notes: Vec<String>,
    /// What came with a build from elsewhere.
    pub(super) carried: Vec<Carried>,
}

impl Recorded {
    /// Reads a journal, as the build's events were read when they came: `function` is that of digests whose build does
    /// not say which it is. Events that cannot be decoded are left out and reported.
    ///
    /// # Errors
    /// When the journal cannot be read, or is damaged.
    pub(crate) fn read(
        records: impl Iterator<Item = Result<Record, JournalError>>,
        function: Option<DigestFunction>,
    ) -> Result<Self, JournalError> {
        let mut recorded = Self::default();
        let mut decoder = Decoder::new(function);
        for record in records {
            let record = record?;
            if record.kind == RecordKind::Runfile {
                recorded.carried.extend(Carried::read(record.payload));
                continue;
            }
            let Some(bytes) = record.build_event() else {
                continue;
            };
            match decoder.decode(&bytes) {
                Ok(framed) => recorded.events.push((record.sequence, framed.event)),
                Err(error) => recorded.notes.push(format!("event {}: {error}", record.sequence)),
            }
        }
        recorded.function = decoder.function();
        let finished = recorded
            .events()
            .any(|event| matches!(event, Event::Finished { .. }));
        recorded.finished = finished;
        Ok(recorded)
    }

    /// What the journal says, in order.
    pub(super) fn events(&self) -> impl Iterator<Item = &Event> {
        self.events.iter().map(|(_, event)| event)
    }

    /// The targets that came to an end, with how.
    pub(crate) fn targets(&self) -> Vec<(TargetId, TargetEnd)> {
        let mut ends = BTreeMap::new();
        for effect in self.replay(Vec::new(), &HashSet::new()) {
            if let Effect::Target(target, end, _) = effect {
                // An abort after a completion says nothing new.
                if end != TargetEnd::Aborted || !ends.contains_key(&*target) {
                    ends.insert((*target).clone(), end);
                }
            }
        }
        ends.into_iter().collect()
    }

    /// What follows from the events under a policy that downloads whatever is named. A set of files that was gone
    /// through under one profile is not gone through under it again, so groups that must be distinguished need rules that
    /// distinguish them.
    /// Completions of the targets in `without` are left out.
    pub(super) fn replay(&self, rules: Vec<Rule>, without: &HashSet<&str>) -> Vec<Effect> {
        let mut build = Build::new(Policy {
            mode: DownloadMode::All,
            rules,
            ..Policy::default()
        });
        let mut effects: Vec<Effect> = self
            .events
            .iter()
            .filter(|(_, event)| match event {
                Event::Completed(completed) => !without.contains(&*completed.target.label),
                _ => true,
            })
            .flat_map(|(sequence, event)| build.handle(*sequence, whole(event.clone())))
            .collect();
        effects.extend(build.end());
        effects
    }

    pub(super) fn groups(&self) -> impl Iterator<Item = &str> {
        self.events()
            .flat_map(|event| match event {
                Event::Completed(completed) => completed.groups.as_slice(),
                _ => &[],
            })
            .map(|group| group.name.as_str())
    }

    /// Labels of the tests, in a command that runs them.
    pub(super) fn tests(&self) -> HashSet<&str> {
        let runs_them = |event: &Event| matches!(event, Event::Started(started) if matches!(&*started.command, "test" | "coverage"));
        if !self.events().any(runs_them) {
            return HashSet::new();
        }
        let tests = self.events().filter_map(|event| match event {
            Event::Configured { label, kind, .. } if is_test(kind) => Some(label.as_str()),
            _ => None,
        });
        tests.collect()
    }

    /// Labels and configurations of the tests that have not passed, not even when they were run again.
    pub(super) fn failed_tests(&self) -> HashSet<(&str, &str)> {
        // By the shard and the run, the last attempt.
        let mut last: HashMap<_, (u32, bool)> = HashMap::new();
        for event in self.events() {
            if let Event::TestResult(result) = event {
                let key = (&*result.label, &*result.configuration, result.shard, result.run);
                let ended = last.entry(key).or_default();
                *ended = (*ended).max((result.attempt, result.passed));
            }
        }
        let failed = last.into_iter().filter(|(_, (_, passed))| !passed);
        failed
            .map(|((label, configuration, ..), _)| (label, configuration))
            .collect()
    }

    /// Roots of trees: a regular expression that matches one picks all of the tree.
    pub(super) fn trees(&self) -> HashSet<&str> {
        let directories = self.events().flat_map(|event| match event {
            Event::Completed(completed) => completed.directories.as_slice(),
            _ => &[],
        });
        directories.map(|directory| &*directory.path).collect()
    }

    /// The directories that relative paths of the command line start from.
    pub(super) fn directories(&self) -> BuildDirectories {
        let started = self.events().find_map(|event| match event {
            Event::Started(started) => Some(started),
            _ => None,
        });
        started.map_or_else(BuildDirectories::default, |started| BuildDirectories {
            workspace: started.workspace.as_str().into(),
            working_directory: match started.working_directory.as_str() {
                "" => started.workspace.as_str().into(),
                directory => directory.into(),
            },
        })
    }

    /// The canonical command line.
    pub(super) fn command_line(&self) -> Option<CommandLine> {
        self.events().find_map(|event| match event {
            Event::CommandLine(line) if line.label == "canonical" => Some(line.clone()),
            _ => None,
        })
    }

    /// What the events say of the build itself, with no output root.
    pub(super) fn row(&self, key: &StreamKey) -> InvocationRow {
        let mut row = InvocationRow {
            invocation_id: key.invocation_id.clone(),
            build_id: key.build_id.clone(),
            state: InvocationState::Interrupted,
            ..InvocationRow::default()
        };
        for event in self.events() {
            match event {
                Event::Started(started) => {
                    row.command.clone_from(&started.command);
                    row.workspace.clone_from(&started.workspace);
                    row.started_ms = started.started_ms;
                    row.build_tool_version.clone_from(&started.build_tool_version);
                }
                Event::ExecRoot(path) => row.exec_root.clone_from(path),
                Event::Finished { exit_code, .. } => {
                    row.exit_code = *exit_code;
                    row.finished = true;
                    row.state = InvocationState::Settled;
                }
                _ => {}
            }
        }
        row
    }

    /// Outputs of which the build tool named no digest, as old ones do of files that are on their own disk alone; `asked` are
    /// those of targets and tests that are asked for.
    pub(super) fn without_digest(&self, asked: &BTreeSet<ExecPath>) -> Option<String> {
        let files = self.events().flat_map(|event| match event {
            Event::NamedSet(set) => set.files.as_slice(),
            _ => &[],
        });
        let in_sets = files
            .filter(|file| file.has_prefix() && file.content == Content::Unknown)
            .map(|file| &*file.path)
            .filter(|path| path.starts_with("bazel-out/"));
        let paths: BTreeSet<&str> = in_sets.chain(asked.iter().map(ExecPath::as_str)).collect();
        let paths: Vec<&str> = paths.into_iter().collect();
        (!paths.is_empty()).then(|| {
            format!(
                "{} outputs cannot be staged, because the build reports no digest for them: {}",
                paths.len(),
                some(&paths)
            )
        })
    }
}

/// An event without the output groups of which a part was not built: what is staged is whole.
fn whole(mut event: Event) -> Event {
    if let Event::Completed(completed) = &mut event {
        completed.groups.retain(|group| !group.incomplete);
    }
    event
}
