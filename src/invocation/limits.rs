//! How much one build's stream may make us keep.
//!
//! A stream is not to be trusted with our memory. One that goes beyond a limit is still acknowledged, journaled and
//! forwarded to its end, and what it named before is still downloaded; what it names from there on is not looked at. So
//! the build does not suffer, nor do others.

use crate::bep::event::{Content, Event, File, OutputGroup, TargetId};

/// The limits of one build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BuildLimits {
    /// Targets and aspects that are completed or aborted.
    pub targets: u64,
    /// Named sets of files.
    pub sets: u64,
    /// Files in all of these and right in events; each mention counts.
    pub files: u64,
    /// Bytes that all events take in memory, roughly.
    pub memory: u64,
    /// Bytes of one label, id or other name.
    pub name: usize,
}

impl Default for BuildLimits {
    fn default() -> Self {
        Self {
            targets: 2_000_000,
            sets: 2_000_000,
            files: 20_000_000,
            memory: 4 << 30,
            name: 16 << 10,
        }
    }
}

/// What is done with an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Admission {
    /// It is taken in.
    Taken,
    /// It alone is not, for this reason.
    Skipped(String),
    /// A limit is reached: neither it nor any that comes, for this reason.
    Over(String),
    /// The limit was reported before.
    Ignored,
}

/// Counts what a build has named.
#[derive(Debug, Clone, Default)]
pub(super) struct Meter {
    limits: BuildLimits,
    targets: u64,
    sets: u64,
    files: u64,
    memory: u64,
    over: bool,
}

/// What an event adds.
#[derive(Default)]
struct Load {
    targets: u64,
    sets: u64,
    files: u64,
    memory: u64,
    longest_name: usize,
    /// A name has a NUL, which is what parts names in the record. Nothing else is refused for its looks: Bazel may give
    /// each byte of a name as a character, so that "ß" comes as U+00C3 U+009F.
    nul: bool,
}

impl Meter {
    pub(super) fn new(limits: BuildLimits) -> Self {
        Self {
            limits,
            ..Self::default()
        }
    }

    /// From here on everything is beyond a limit. True if none was reached before.
    pub(super) const fn close(&mut self) -> bool {
        !std::mem::replace(&mut self.over, true)
    }

    /// Whether an event is taken in. One that keeps nothing always is.
    pub(super) fn admit(&mut self, event: &Event) -> Admission {
        let Some(load) = Load::of(event) else {
            return Admission::Taken;
        };
        if self.over {
            return Admission::Ignored;
        }
        let limits = self.limits;
        if load.nul {
            return Admission::Skipped("skipped an event: it has a name that contains a NUL byte".to_owned());
        }
        if load.longest_name > limits.name {
            return Admission::Skipped(format!(
                "skipped an event: it has a name of {} bytes, which exceeds the limit of {} (raise it with \
                 --limit=name-length=BYTES)",
                load.longest_name, limits.name
            ));
        }
        self.targets += load.targets;
        self.sets += load.sets;
        self.files += load.files;
        self.memory = self.memory.saturating_add(load.memory);
        let reached = [
            (self.targets, limits.targets, "targets", "targets"),
            (self.sets, limits.sets, "named sets", "sets"),
            (self.files, limits.files, "files", "files"),
            (self.memory, limits.memory, "bytes in memory", "build-memory"),
        ];
        let Some((_, limit, what, name)) = reached.into_iter().find(|(now, limit, ..)| now > limit) else {
            return Admission::Taken;
        };
        self.over = true;
        Admission::Over(format!(
            "the build reached the limit of {limit} {what}: outputs named after that are not downloaded (raise \
             it with --limit={name}=NUMBER)"
        ))
    }
}

impl Load {
    /// `None` for an event of which nothing is kept.
    fn of(event: &Event) -> Option<Self> {
        let mut load = Self::default();
        match event {
            Event::NamedSet(set) => {
                load.sets = 1;
                load.names([&set.id]);
                load.names(&set.children);
                load.files(&set.files);
            }
            Event::Completed(completed) => {
                load.targets = 1;
                load.target(&completed.target);
                for group in &completed.groups {
                    load.group(group);
                }
                load.files(&completed.directories);
            }
            Event::Aborted {
                target: Some(target), ..
            } => {
                load.targets = 1;
                load.target(target);
            }
            Event::TestResult(result) => {
                load.names([&result.label, &result.configuration]);
                load.files(&result.files);
            }
            Event::TestSummary {
                label, configuration, ..
            } => load.names([label, configuration]),
            Event::Configuration { id, mnemonic } => load.names([id, mnemonic]),
            Event::Configured {
                label,
                kind,
                completions,
            } => {
                load.names([label, kind]);
                for target in completions {
                    load.target(target);
                }
            }
            Event::Action(action) => {
                load.names([&action.label, &action.primary_output]);
                if let Some(content) = &action.content {
                    load.files += 1;
                    load.memory += of_content(content);
                }
            }
            Event::CombinedReport(file) => load.files(std::slice::from_ref(file)),
            // No names, but as much as the build tool likes.
            Event::CommandLine(line) => {
                load.memory += line
                    .options
                    .iter()
                    .map(|(name, value)| memory(name) + memory(value))
                    .sum::<u64>();
            }
            Event::Skipped(reason) => load.memory += memory(reason),
            Event::Unreadable(paths) => load.memory += paths.iter().map(|path| memory(path)).sum::<u64>(),
            Event::Started(started) => {
                load.names([&started.command, &started.build_tool_version]);
                load.names([&started.workspace, &started.working_directory]);
                // Without it nothing of the build is downloaded, and its names part nothing.
                load.nul = false;
            }
            Event::ExecRoot(path) => {
                load.names([path]);
                load.nul = false;
            }
            Event::Aborted { target: None, .. }
            | Event::ConvenienceSymlinks(_)
            | Event::Finished { .. }
            | Event::Other => return None,
        }
        Some(load)
    }

    fn names<'a>(&mut self, names: impl IntoIterator<Item = &'a String>) {
        for name in names {
            self.memory += memory(name);
            self.longest_name = self.longest_name.max(name.len());
            self.nul |= name.contains('\0');
        }
    }

    fn target(&mut self, target: &TargetId) {
        self.names([&target.label, &target.aspect, &target.configuration]);
    }

    fn group(&mut self, group: &OutputGroup) {
        self.names([&group.name]);
        self.names(&group.sets);
        self.files(&group.files);
    }

    fn files(&mut self, files: &[File]) {
        self.files += files.len() as u64;
        // Paths that are too long are reported one by one: see `ExecPath`.
        self.memory += files
            .iter()
            .map(|file| memory(&file.path) + of_content(&file.content) + 64)
            .sum::<u64>();
    }
}

/// What a text takes, with what keeps it.
const fn memory(text: &str) -> u64 {
    text.len() as u64 + 32
}

fn of_content(content: &Content) -> u64 {
    match content {
        Content::Blob(_) | Content::Unknown => 0,
        Content::Inline(bytes) => bytes.len() as u64,
        Content::Symlink(target) => memory(target),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bep::event::{Completed, NamedSet, Started};

    fn set(id: &str, files: usize) -> Event {
        let file = File {
            path: "bazel-out/x".into(),
            prefix_len: 9,
            content: Content::Unknown,
            uri: None,
        };
        Event::NamedSet(NamedSet {
            id: id.to_owned(),
            files: vec![file; files],
            ..NamedSet::default()
        })
    }

    fn over(limits: BuildLimits, events: &[Event]) -> Option<String> {
        let mut meter = Meter::new(limits);
        events.iter().find_map(|event| match meter.admit(event) {
            Admission::Over(reason) => Some(reason),
            _ => None,
        })
    }

    #[test]
    fn every_limit_is_named_when_it_is_passed_and_not_before() {
        let none = BuildLimits::default();
        let target = Event::Completed(Completed::default());
        let small = |change: fn(&mut BuildLimits)| {
            let mut limits = none;
            change(&mut limits);
            limits
        };
        let cases = [
            (small(|l| l.targets = 2), vec![target; 3], "--limit=targets="),
            (
                small(|l| l.sets = 2),
                vec![set("1", 1), set("2", 1), set("3", 1)],
                "--limit=sets=",
            ),
            (
                small(|l| l.files = 5),
                vec![set("1", 3), set("2", 3)],
                "--limit=files=",
            ),
            (
                small(|l| l.memory = 500),
                vec![set("1", 2), set("2", 30)],
                "--limit=build-memory=",
            ),
        ];
        for (limits, events, part) in cases {
            assert_eq!(over(none, &events), None);
            assert_eq!(over(limits, &events[..events.len() - 1]), None, "{part}");
            let reason = over(limits, &events).expect(part);
            assert!(reason.contains(part), "{reason}");
        }
    }

    #[test]
    fn beyond_a_limit_nothing_is_kept_and_the_rest_still_comes() {
        let mut meter = Meter::new(BuildLimits {
            sets: 1,
            ..BuildLimits::default()
        });
        assert_eq!(meter.admit(&set("1", 1)), Admission::Taken);
        assert!(matches!(meter.admit(&set("2", 1)), Admission::Over(_)));
        assert_eq!(meter.admit(&set("3", 1)), Admission::Ignored);
        let end = Event::Finished {
            exit_code: 0,
            name: String::new(),
            ended_ms: 0,
        };
        assert_eq!(meter.admit(&end), Admission::Taken);
    }

    #[test]
    fn no_name_is_refused_for_its_looks_but_for_a_nul() {
        let mut meter = Meter::new(BuildLimits::default());
        for id in ["a\nb", "\u{1b}[2J", "Stra\u{c3}\u{9f}e", "1"] {
            assert_eq!(meter.admit(&set(id, 1)), Admission::Taken, "{id:?}");
        }
        assert!(matches!(meter.admit(&set("a\0b", 1)), Admission::Skipped(_)));
        assert_eq!(meter.admit(&set("1", 1)), Admission::Taken);
    }

    #[test]
    fn what_all_else_depends_on_is_taken_whatever_its_names_are() {
        let mut meter = Meter::new(BuildLimits::default());
        for name in ["Stra\u{c3}\u{9f}e", "a\nb", "\u{1b}[2J", "a\0b"] {
            let started = Started {
                workspace: name.to_owned(),
                command: name.to_owned(),
                ..Started::default()
            };
            assert_eq!(
                meter.admit(&Event::Started(started)),
                Admission::Taken,
                "{name:?}"
            );
            let root = Event::ExecRoot(name.to_owned());
            assert_eq!(meter.admit(&root), Admission::Taken, "{name:?}");
        }
    }

    #[test]
    fn a_name_without_end_costs_its_own_event_alone() {
        let mut meter = Meter::new(BuildLimits::default());
        let Admission::Skipped(reason) = meter.admit(&set(&"x".repeat(1 << 20), 1)) else {
            panic!("it was taken")
        };
        assert!(reason.contains("--limit=name-length="), "{reason}");
        assert_eq!(meter.admit(&set("1", 1)), Admission::Taken);
    }
}
