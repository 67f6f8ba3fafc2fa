//! How a command runs: for the first time, or once more, and with what flags.

use std::path::Path;

use crate::{bep::event::CommandLine, units::random_uuid};

/// The command that may run again as it is.
pub(super) const REPEATED: &str = "build";
/// Those that may do so without their tests.
const TESTING: [&str; 2] = ["test", "coverage"];
/// Has such a command build what it would have built, and run no test.
const NO_TESTS: [&str; 2] = ["--test_tag_filters=outhaul-runs-no-tests", "--nobuild_tests_only"];
/// Options with files that Bazel writes events into.
const EVENT_FILES: [&str; 3] = [
    "build_event_json_file",
    "build_event_text_file",
    "build_event_binary_file",
];

/// How a command is run; it may have to run again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Attempt {
    /// As always: Bazel uploads what its events name, as it does for any event service, and we download, where that can be.
    First,
    /// The same, and it cannot run again: something else runs it.
    Only,
    /// It uploads nothing for its events, and downloads by itself.
    Again {
        /// Without its caches, it builds whatever is not on disk. Not for one with an executor, which it takes for its cache
        /// then.
        is_cached: bool,
        /// Whether tests run, if it is a command that runs tests.
        runs_tests: bool,
    },
}

impl Attempt {
    /// Whether the command has run before.
    pub(super) const fn is_again(self) -> bool {
        matches!(self, Self::Again { .. })
    }
}

/// How a command may run again to bring outputs that were lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Repeats {
    /// As it is: it only builds.
    Whole,
    /// Without its tests, which may do anything.
    WithoutTests,
    /// Not at all: a program that it runs may do anything, and what a command that builds nothing but tests is to build cannot
    /// be said otherwise.
    Never,
}

impl Repeats {
    /// By the command's word and options.
    pub(super) fn of(word: &str, line: Option<&CommandLine>) -> Self {
        let builds_others = line.is_some_and(|line| line.switch("build_tests_only") != Some(true));
        match word {
            REPEATED => Self::Whole,
            _ if TESTING.contains(&word) && builds_others => Self::WithoutTests,
            _ => Self::Never,
        }
    }
}

/// What has a command that runs again run without its tests, or its caches.
pub(super) fn flags_again(line: Option<&CommandLine>, word: &str, attempt: Attempt) -> Vec<String> {
    let Attempt::Again {
        is_cached,
        runs_tests,
    } = attempt
    else {
        return Vec::new();
    };
    let mut flags = Vec::new();
    if !runs_tests && TESTING.contains(&word) {
        flags.extend(NO_TESTS.map(str::to_owned));
        // These have the tests' results.
        flags.extend(line.into_iter().flat_map(event_files).map(taken_back));
    }
    if !is_cached {
        flags.extend(["remote_cache", "disk_cache"].map(taken_back));
        // It asks the cache as well, and Bazel refuses it without one.
        let downloader = "experimental_remote_downloader";
        if line.is_some_and(|line| line.given(downloader).is_some()) {
            flags.push(taken_back(downloader));
        }
    }
    flags
}

/// Whether Bazel writes events into a file.
pub(super) fn writes_events(line: &CommandLine) -> bool {
    event_files(line).next().is_some()
}

/// Takes back files of events that somebody reads only once, such as named pipes, for a command that runs again: it would wait
/// for another reader.
pub(super) fn read_once(line: &CommandLine, directory: &Path) -> Vec<String> {
    let is_special = |path: &str| {
        let file = std::fs::metadata(directory.join(path));
        file.is_ok_and(|file| !file.is_file())
    };
    event_files(line)
        .filter(|name| line.given(name).is_some_and(is_special))
        .map(taken_back)
        .collect()
}

/// The options that name files of events.
fn event_files(line: &CommandLine) -> impl Iterator<Item = &'static str> {
    EVENT_FILES.into_iter().filter(|name| line.given(name).is_some())
}

/// An option as if it had not been given.
fn taken_back(name: &str) -> String {
    format!("--{name}=")
}

/// Another invocation id for a command that runs again under one of its user's: tests crash Bazel's server the second time
/// (measured with 7.7.1). What a build has come to is looked for under its own.
pub(super) fn other_id(line: Option<&CommandLine>, word: &str, attempt: Attempt) -> Option<String> {
    line?.given("invocation_id")?;
    (attempt.is_again() && word != REPEATED).then(|| format!("--invocation_id={}", random_uuid()))
}

#[cfg(test)]
mod tests {
    use super::{super::probe::Options, *};

    #[test]
    fn pipes_that_events_are_written_into_are_taken_back_when_a_command_runs_again() {
        let dir = tempfile::tempdir().unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            dir.path().join("pipe"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let options = [
            "--build_event_json_file=pipe",
            "--build_event_text_file=file",
            "--build_event_binary_file=new",
        ];
        let flags = read_once(&Options::of(&options).line(), dir.path());
        assert_eq!(flags, ["--build_event_json_file="]);
    }

    #[test]
    fn only_what_does_its_work_as_well_twice_runs_again() {
        for (word, option, expected) in [
            ("build", "--build_tests_only", Repeats::Whole),
            ("test", "--x", Repeats::WithoutTests),
            ("coverage", "--nobuild_tests_only", Repeats::WithoutTests),
            ("test", "--build_tests_only", Repeats::Never),
            ("run", "--x", Repeats::Never),
            ("mobile-install", "--x", Repeats::Never),
        ] {
            let line = Options::of(&[option]).line();
            assert_eq!(Repeats::of(word, Some(&line)), expected, "{word} {option}");
        }
        assert_eq!(Repeats::of("test", None), Repeats::Never);
    }

    #[test]
    fn tests_that_run_again_have_an_id_of_their_own() {
        let own = Options::of(&["--invocation_id=a"]).line();
        let again = Attempt::Again {
            is_cached: true,
            runs_tests: true,
        };
        for (line, word, attempt, changes) in [
            (Some(&own), "test", again, true),
            (Some(&own), "coverage", again, true),
            (Some(&own), "build", again, false),
            (Some(&own), "test", Attempt::First, false),
            (Some(&own), "test", Attempt::Only, false),
            (Some(&Options::of(&[]).line()), "test", again, false),
            (None, "test", again, false),
        ] {
            assert_eq!(
                other_id(line, word, attempt).is_some(),
                changes,
                "{word} {attempt:?}"
            );
        }
    }
}
