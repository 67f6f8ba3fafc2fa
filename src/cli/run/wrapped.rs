//! The wrapped command beside the daemon: its run, what is waited for after that, and where it runs again.
//!
//! Running again must not hurt: only a command whose work may be done twice does so, only for what a cache has lost, and
//! what comes of it never replaces a success.

use std::{ffi::OsString, fmt, path::Path, time::Duration};

use parking_lot::Mutex;
use rustix::process::Signal;

use super::{
    super::exit::Failure,
    STRICT, Started,
    again::{Attempt, Repeats},
    child::{self, Signals},
    host::Host,
    line::Line,
    probe::{Probe, VARIABLE},
    program,
    reports::{Reports, tell},
    say,
};
use crate::{cli::progress::watched, invocation::Report, open_files};

/// How long optional outputs may still take after the command has ended, and the required ones have come.
const OPTIONAL_WAIT: Duration = Duration::from_secs(600);
/// The same where a signal asked the command for its end.
const LAST_WAIT: Duration = Duration::from_secs(2);
/// How long a single required output may take: a large file on a slow line makes progress all the time.
const REQUIRED_WAIT: Duration = Duration::from_secs(24 * 3600);
/// How long a build may take to say what is on its way.
const ANSWER: Duration = Duration::from_secs(2);
/// How often it is looked whether anything must be waited for.
const LOOK: Duration = Duration::from_millis(500);
/// How long after its builds a report may come, and the build's own event service may take for the rest of its events.
const TOLD: Duration = Duration::from_secs(2);
/// What Bazel's commands end with when files of their events could not be uploaded.
const NOT_UPLOADED: u8 = 38;
/// The same when the build has failed.
const BUILD_FAILED: u8 = 1;
/// The same when the user has interrupted it.
const INTERRUPTED: u8 = 8;
/// What is added to the number of a signal that ended a command.
const SIGNALLED: u8 = 128;
/// What Bazel's commands end with when blobs could not be read from the cache: as an error of the cache, as a crash (7.7.1
/// where a connection breaks in the middle of a blob), and as an error of the blobs.
const NOT_READ: [u8; 3] = [NO_CACHE, 37, 39];
/// The first of these, which is also what they end with when the cache is not there at the beginning.
const NO_CACHE: u8 = 34;
/// What Bazel's commands end with when tests have failed, and all was built.
const TESTS_FAILED: u8 = 3;
/// What those that run tests end with when they have built all, and there was no test.
const NO_TESTS: u8 = 4;
/// What is said before an attempt without caches.
const UNCACHED: &str = "running the command once more without its caches";

/// A command, and what it runs beside.
pub(super) struct Wrapped<'a> {
    pub(super) started: &'a Started,
    pub(super) command: &'a [OsString],
    /// The program, if it is a Bazel.
    pub(super) bazel: Option<&'a Path>,
    /// The `PATH` that it is to have.
    pub(super) path: &'a OsString,
    pub(super) is_building: bool,
    /// Whether missing outputs fail the command.
    pub(super) strict: bool,
}

/// How an attempt ended.
struct Ended {
    code: u8,
    /// Whether a signal has ended the wait for the rest: then the user wants no more.
    is_cut: bool,
}

impl Ended {
    /// A command that was to run without its tests has then done its work.
    const fn of_built(self, repeats: Repeats) -> Self {
        match (self.code, repeats) {
            (NO_TESTS, Repeats::WithoutTests) => Self { code: 0, ..self },
            _ => self,
        }
    }
}

impl Wrapped<'_> {
    /// Runs the command, once more where it must be, and waits for what comes of it.
    pub(super) async fn to_its_end(&self, signals: &mut Signals) -> Result<u8, Failure> {
        let Ended { code, is_cut } = self.attempt(Attempt::First, signals).await?;
        if is_cut || !self.is_building {
            return Ok(code);
        }
        if code == NOT_UPLOADED && self.started.host.uploads_for_us() {
            return self.after_failed_upload(signals).await;
        }
        let is_over =
            matches!(code, 0 | BUILD_FAILED | TESTS_FAILED | NO_TESTS) || self.strict && code == STRICT;
        let repeats = self.started.host.repeats();
        if is_over && repeats != Repeats::Never && self.has_lost_outputs(code, repeats) {
            return Ok(self.after_lost_outputs(code, repeats, signals).await);
        }
        Ok(code)
    }

    /// Runs the command, and waits for the rest.
    async fn attempt(&self, attempt: Attempt, signals: &mut Signals) -> Result<Ended, Failure> {
        let code = self.see_through(attempt, signals).await?;
        let Started { host, reports, .. } = self.started;
        let rest = wait_for_rest(host, reports, code != 0, signals).await;
        let pending = match rest {
            Rest::Came => 0,
            _ => tokio::time::timeout(LAST_WAIT, host.pending())
                .await
                .unwrap_or_default(),
        };
        let told = reports.lock().last().and_then(|report| report.exit_code);
        let code = match self.bazel {
            Some(_) if self.strict => own_code(code, told),
            _ => code,
        };
        let mut ended = Ended {
            code,
            is_cut: matches!(rest, Rest::Cut(_)),
        };
        if pending > 0 {
            say(&format!(
                "{rest} before {pending} required outputs were downloaded; build again to download them"
            ));
        } else if matches!(rest, Rest::GivenUp) {
            tracing::error!("giving up on optional outputs that are still being downloaded");
        }
        if pending > 0 && code == 0 {
            ended.code = match rest {
                // As Bazel ends itself where it downloads.
                Rest::Cut(_) if self.bazel.is_some() => INTERRUPTED,
                Rest::Cut(signal) => child::code_of(signal),
                _ if self.strict => STRICT,
                _ => code,
            };
        }
        Ok(ended)
    }

    /// Runs the command beside the daemon, with what it needs to be heard, to its end.
    async fn see_through(&self, attempt: Attempt, signals: &mut Signals) -> Result<u8, Failure> {
        let mut command = self.command.to_vec();
        let mut environment = Vec::new();
        if let Some(bazel) = self.bazel {
            if *self.path != program::path() {
                // Below another `run`: this one's events come here.
                command[0] = bazel.into();
                environment.push(("PATH", Some(self.path.clone())));
            }
            environment.push((VARIABLE, None));
            if self.is_building {
                let asking = flagged(&command, bazel, self.path, self.started, attempt);
                tokio::select! {
                    flagged = asking => command = flagged,
                    signal = signals.end() => return Ok(child::code_of(signal)),
                }
            }
        } else {
            match self.started.shims.serve(self.started.host.clone()) {
                Ok(()) => environment = self.started.shims.environment(),
                Err(error) => say(&format!(
                    "failed to listen for Bazel invocations of the command: {error}"
                )),
            }
        }
        let asked = |signal| self.started.host.end(signal);
        see_through(&command, &environment, signals, asked).await
    }

    /// Forgets the attempt so far. Gives what was told of it.
    fn start_over(&self) -> Vec<Report> {
        let Started { host, reports, .. } = self.started;
        let told = reports.lock().start_over(host.services.engine.streams());
        host.forget();
        told
    }

    /// Bazel gave up its stream when an upload of files failed, and with that its command.
    async fn after_failed_upload(&self, signals: &mut Signals) -> Result<u8, Failure> {
        let told = self
            .started
            .reports
            .lock()
            .last()
            .and_then(|report| report.exit_code);
        match told.map(u8::try_from) {
            // It has done its work, but for running a program.
            None => {
                let reason = match self.started.host.streams() {
                    0 => "send outhaul its events",
                    _ => "upload files that its events name, which it only does for outhaul",
                };
                say(&format!(
                    "Bazel failed the command because it could not {reason}; running it once more, so that Bazel \
                     downloads outputs itself"
                ));
                self.start_over();
                let again = |is_cached| Attempt::Again {
                    is_cached,
                    runs_tests: true,
                };
                let ended = self.attempt(again(true), signals).await?;
                // Bazel goes on without a cache that goes away, as it did before, and does not begin without it. A program
                // that `bazel run` ran may end with anything.
                let is_run = Line::building(self.command).is_some_and(|line| line.word() == "run");
                let lacks_cache = ended.code == NO_CACHE && !is_run && !ended.is_cut;
                if !lacks_cache || self.started.host.has_executor() {
                    return Ok(ended.code);
                }
                say(UNCACHED);
                self.start_over();
                Ok(self.attempt(again(false), signals).await?.code)
            }
            // A program that `bazel run` ran may end with anything.
            Some(Ok(own)) if Line::building(self.command).is_some_and(|line| line.word() != "run") => {
                say(&format!(
                    "Bazel exited with code {NOT_UPLOADED} because it could not upload files that its events \
                     name, which it only does for outhaul; the exit code of the build itself is {own}"
                ));
                Ok(own)
            }
            Some(_) => Ok(NOT_UPLOADED),
        }
    }

    /// Whether outputs are missing because of the cache, or for want of events.
    fn has_lost_outputs(&self, code: u8, repeats: Repeats) -> bool {
        let Started { host, reports, .. } = self.started;
        let reports = reports.lock();
        let lost = reports.last().map_or(0, |report| match repeats {
            Repeats::WithoutTests => report.tally.lost.saturating_sub(report.tally.lost_of_tests),
            Repeats::Whole | Repeats::Never => report.tally.lost,
        });
        drop(reports);
        lost > 0 || matches!(code, 0 | TESTS_FAILED) && host.is_left_unheard()
    }

    /// Bazel asks no HTTP cache whether that has what its results name, and any cache may be gone in the meantime. Bazel
    /// alone would have built what is lost. The exit code is that of the first build; but where there is no room for the
    /// outputs, Bazel alone would have failed.
    ///
    /// Without its tests, a command does not bring their files; neither would it with them, for Bazel itself remembers tests that
    /// have passed.
    async fn after_lost_outputs(&self, first: u8, repeats: Repeats, signals: &mut Signals) -> u8 {
        let may_drop_caches = !self.started.host.has_executor();
        let is_unheard = self.started.host.is_left_unheard();
        let mut lost = self.start_over();
        // With --strict, Bazel has not ended with its own.
        let own = lost.last().and_then(|report| report.exit_code);
        let own = own.and_then(|code| u8::try_from(code).ok()).unwrap_or(first);
        // The reasons come before what Bazel says of the same, and once.
        let _ = tell(&lost);
        lost.iter_mut().for_each(|report| report.messages.clear());
        let of_tests = lost.last().map_or(0, |report| report.tally.lost_of_tests);
        let is_full = lost.last().is_some_and(|report| report.tally.without_room > 0);
        let mut last = first;
        let are_tests_lacking = repeats == Repeats::WithoutTests && (of_tests > 0 || is_unheard);
        let mut is_cached = true;
        loop {
            say(match (is_cached, repeats) {
                (false, _) => UNCACHED,
                (true, Repeats::WithoutTests) => {
                    "running the command once more without its tests (Bazel will say that it found none), so that Bazel itself \
                     downloads or builds the missing outputs"
                }
                (true, _) => {
                    "running the command once more, so that Bazel itself downloads or builds the missing outputs"
                }
            });
            let attempt = Attempt::Again {
                is_cached,
                runs_tests: repeats == Repeats::Whole,
            };
            let ended = match self.attempt(attempt, signals).await {
                Ok(ended) => ended.of_built(repeats),
                Err(error) => {
                    say(&error.message);
                    break;
                }
            };
            last = ended.code;
            match after(ended.code, own, first) {
                // Nothing would bring their files.
                After::Ends(code) if code == own && are_tests_lacking => break,
                After::Ends(code) => return code,
                After::Uncached if is_cached && may_drop_caches && !ended.is_cut && !is_full => {
                    self.start_over();
                    is_cached = false;
                }
                After::Uncached | After::Missing => break,
            }
        }
        // It is as after the first run: said above, and a fault with --strict.
        say("some outputs are still missing");
        self.started.reports.lock().put_back(lost);
        if is_unheard {
            self.started.host.note_lacking();
        }
        if is_full { last } else { first }
    }
}

/// What a command ends with that was told a failed stream: a build that has failed itself does so with its own code.
fn own_code(code: u8, told: Option<i32>) -> u8 {
    let own = told.and_then(|own| u8::try_from(own).ok());
    own.filter(|own| code == STRICT && *own != 0).unwrap_or(code)
}

/// What follows a run that was to bring what the cache has lost.
#[derive(Debug, PartialEq, Eq)]
enum After {
    /// Nothing: the command ends with this.
    Ends(u8),
    /// It is the cache that fails the build.
    Uncached,
    /// Nothing, and the outputs are missing.
    Missing,
}

/// Decides that by the run's exit code, the build's own before that, and what the command ended with then.
fn after(code: u8, own: u8, first: u8) -> After {
    if code == INTERRUPTED || code >= SIGNALLED {
        After::Ends(code)
    } else if code == 0 || code == own {
        After::Ends(own)
    } else if code == STRICT {
        // The build itself has ended well, and its reports say what is missing.
        After::Ends(first)
    } else if code == BUILD_FAILED || NOT_READ.contains(&code) {
        After::Uncached
    } else {
        After::Missing
    }
}

/// Runs a command to its end. `asked` is told of signals that ask it for that.
pub(super) async fn see_through(
    command: &[OsString],
    environment: &[(&str, Option<OsString>)],
    signals: &mut Signals,
    asked: impl Fn(Signal),
) -> Result<u8, Failure> {
    let mut child = child::start(command, environment)?;
    // Only now: the command is to have the limit that it would have without us.
    open_files::raise();
    let status = signals.see_through(&mut child, asked).await;
    let status =
        status.map_err(|error| Failure::failed(format!("failed to wait for the command: {error}")))?;
    Ok(child::code(status))
}

/// What became of the rest when the command had ended.
#[derive(Debug, Clone, Copy)]
enum Rest {
    /// All of it has come, or has failed.
    Came,
    /// It took too long.
    GivenUp,
    /// A signal ended the command, or the wait.
    Cut(Signal),
}

impl fmt::Display for Rest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Came => f.write_str("ended"),
            Self::GivenUp => write!(f, "gave up after {} s,", OPTIONAL_WAIT.as_secs()),
            Self::Cut(_) => f.write_str("interrupted by a signal"),
        }
    }
}

/// What is optional, or was let go at the deadline, may still be on its way when the command has ended. If a signal ended
/// that, what is almost there gets a moment.
async fn wait_for_rest(
    host: &Host,
    reports: &Mutex<Reports>,
    has_failed: bool,
    signals: &mut Signals,
) -> Rest {
    let asked = host.asked();
    let patience = asked.map_or(OPTIONAL_WAIT, |_| LAST_WAIT);
    // Downloads that make no progress fail by themselves: required ones are waited for, as Bazel does.
    let required = async || match asked {
        None => host.on_its_way().await.0,
        Some(_) => 0,
    };
    let waited = async {
        host.streams_end(has_failed).await;
        while host.services.engine.is_busy().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // What came of a build is told a moment after it is settled.
        let begun = std::time::Instant::now();
        let are_told = || reports.lock().count() >= host.streams();
        while !are_told() && begun.elapsed() < TOLD {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        host.deliver(TOLD).await;
    };
    let ended = async {
        tokio::select! {
            () = waited => Rest::Came,
            () = run_out_of(patience, required) => Rest::GivenUp,
            signal = signals.end() => Rest::Cut(signal),
        }
    };
    let rest = watched("outputs", ended, async || Some(host.progress().await)).await;
    asked.map_or(rest, Rest::Cut)
}

/// Ends after this time without anything that is required, or after [`REQUIRED_WAIT`] in which none of that came. A file system
/// that hangs keeps its build from answering: that is not waited for.
async fn run_out_of(patience: Duration, required: impl AsyncFn() -> u64) {
    let (mut idle_since, mut same_since) = (tokio::time::Instant::now(), tokio::time::Instant::now());
    let mut before = 0;
    while idle_since.elapsed() < patience && same_since.elapsed() < REQUIRED_WAIT {
        tokio::time::sleep(LOOK.min(patience)).await;
        let now = tokio::time::timeout(ANSWER, required()).await.unwrap_or_default();
        if now > 0 {
            idle_since = tokio::time::Instant::now();
        }
        if now != before {
            same_since = tokio::time::Instant::now();
        }
        before = now;
    }
}

/// The command of a Bazel with what it needs to be heard.
async fn flagged(
    command: &[OsString],
    bazel: &Path,
    path: &OsString,
    started: &Started,
    attempt: Attempt,
) -> Vec<OsString> {
    let (Some(line), Some(program)) = (Line::building(command), command.first()) else {
        return command.to_vec();
    };
    let probe = Probe {
        program: bazel,
        path,
        directory: None,
        scratch: started.shims.scratch(),
    };
    let answer = started.host.answer(&probe.ask(&line).await, attempt).await;
    for message in &answer.messages {
        say(message);
    }
    std::iter::once(program.clone())
        .chain(line.with(&answer.flags))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_that_fails_itself_ends_with_its_own_code() {
        for (code, told, expected) in [
            (STRICT, Some(8), 8),
            (STRICT, Some(1), 1),
            (STRICT, Some(0), STRICT),
            (STRICT, None, STRICT),
            (STRICT, Some(-1), STRICT),
            (0, Some(8), 0),
            (37, Some(1), 37),
        ] {
            assert_eq!(own_code(code, told), expected, "{code} {told:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn patience_runs_out_only_for_what_is_not_required() {
        let begun = tokio::time::Instant::now();
        let required = OPTIONAL_WAIT * 5;
        run_out_of(OPTIONAL_WAIT, async || u64::from(begun.elapsed() < required)).await;
        let waited = begun.elapsed();
        assert!(waited >= required + OPTIONAL_WAIT - LOOK && waited < required + 2 * OPTIONAL_WAIT);
        let begun = tokio::time::Instant::now();
        run_out_of(LAST_WAIT, async || 0).await;
        assert!(begun.elapsed() < 2 * LAST_WAIT);
        // One that does not answer, and one that never comes.
        run_out_of(OPTIONAL_WAIT, async || std::future::pending().await).await;
        let begun = tokio::time::Instant::now();
        run_out_of(OPTIONAL_WAIT, async || 1).await;
        assert!(begun.elapsed() < 2 * REQUIRED_WAIT);
    }

    #[test]
    fn a_run_for_what_was_lost_never_replaces_a_success() {
        for (code, own, first, expected) in [
            (0, 0, 0, After::Ends(0)),
            (0, 0, STRICT, After::Ends(0)),
            (0, 1, 1, After::Ends(1)),
            (1, 1, 1, After::Ends(1)),
            (STRICT, 0, STRICT, After::Ends(STRICT)),
            (STRICT, 0, 0, After::Ends(0)),
            // Ended by the user, or somebody else.
            (8, 0, 0, After::Ends(8)),
            (130, 0, STRICT, After::Ends(130)),
            (137, 1, 1, After::Ends(137)),
            // The cache is to blame, or may be.
            (1, 0, 0, After::Uncached),
            (34, 0, 0, After::Uncached),
            (37, 0, STRICT, After::Uncached),
            (39, 1, 1, After::Uncached),
            // Anything else.
            (2, 0, 0, After::Missing),
            (36, 0, 0, After::Missing),
            (NOT_UPLOADED, 0, STRICT, After::Missing),
        ] {
            assert_eq!(after(code, own, first), expected, "{code} {own} {first}");
        }
    }
}
