//! What a `run` answers each Bazel command below it: a listener for its events, and the flags that bring them there.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::anyhow;
use parking_lot::Mutex;
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use tokio::time::error::Elapsed;

use super::{
    again::{Attempt, REPEATED, Repeats, flags_again, other_id, read_once, writes_events},
    forward::{directories_of, has_google, has_way, upstream_at},
    mode::{Mode, Setting, decide, exec_root, names_a_cache, waits, waits_for_all},
    probe::CommandInfo,
    reach::{Reach, reach_of},
};
use crate::{
    bep::event::CommandLine,
    bes::{BesService, HoldPolicy, Upstream},
    cli::progress::{Progress, of_builds},
    config::{CacheArgs, FROM_BUILD, UpstreamArgs},
    daemon::{Deleted, EventListeners, Services},
    transport::without_user_info,
};

/// How long a cache may take to answer at all before Bazel's downloads are left to Bazel.
const CACHE: Duration = Duration::from_secs(10);
/// How long a stream may take to begin whose command did not wait for it.
const BEGINNING: Duration = Duration::from_secs(10);
/// The same where the command failed: it may have given up before there were any events.
const BEGINNING_FAILED: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(20);
/// Has Bazel download nothing. Not --remote_download_outputs=minimal, which some versions refuse without what only this one
/// expands into.
const MINIMAL: &str = "--remote_download_minimal";
/// Where the listeners are.
const LOOPBACK: &str = "127.0.0.1";
/// Has Bazel end without waiting for the upload of its events, which cannot fail it then.
const NO_WAIT: &str = "--bes_upload_mode=nowait_for_upload_complete";
/// Has Bazel upload no files for its events.
const NO_UPLOAD: &str = "--experimental_build_event_upload_strategy=local";
/// Bazels that upload all outputs that were made here for their events, and then fail a good build if that fails.
const UPLOADING: std::ops::Range<u32> = 4..7;

/// What a Bazel command is to be run with.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Answer {
    /// Flags for the end of its options.
    pub(super) flags: Vec<String>,
    /// What the user should hear.
    pub(super) messages: Vec<String>,
}

/// The daemon of this `run`, as its Bazels meet it.
pub(super) struct Host {
    pub(super) listeners: EventListeners,
    pub(super) services: Services,
    pub(super) hold: HoldPolicy,
    /// Whether Bazel's download mode is left alone.
    pub(super) keep: bool,
    /// What was said to us of caches and event services; a command's own words come first.
    pub(super) cache: CacheArgs,
    pub(super) upstream: UpstreamArgs,
    /// The event service that was named to us.
    pub(super) own: Option<Upstream>,
    /// A credential helper that has no credentials.
    pub(super) helper: Option<PathBuf>,
    /// The commands that were answered.
    pub(super) heard: Mutex<Vec<Heard>>,
    /// What no report tells.
    pub(super) untold: Mutex<Untold>,
}

/// What becomes of a `run` beside what the reports of its builds say.
#[derive(Debug, Default)]
pub(super) struct Untold {
    /// Whether another `run` below this one has heard Bazels.
    inner: bool,
    /// Whether a Bazel has refused its command.
    refused: bool,
    /// Whether anything required is missing: there, or of builds whose end was not waited for.
    lacks: bool,
    /// The signal that asked the command for its end, if none of its Bazels has begun since.
    asked: Option<Signal>,
}

/// A command that was answered.
pub(super) struct Heard {
    /// As users know it.
    name: String,
    /// What came through its listener, if it got one.
    events: Option<BesService>,
    /// Why its options are not known, if they are not.
    unknown: Option<String>,
    /// The event service that gets its events from us.
    backend: Option<String>,
    /// Whether Bazel waits for the end of its stream.
    waits: bool,
    /// Whether Bazel uploads what its events name for nobody but us.
    uploads_for_us: bool,
    /// Whether Bazel was told to leave the downloads to us.
    leaves_downloads: bool,
    /// How it may run again to bring what is missing.
    repeats: Repeats,
    /// Whether Bazel has its actions executed elsewhere.
    has_executor: bool,
}

impl Heard {
    fn came(&self) -> bool {
        self.events.as_ref().is_some_and(|e| e.counters().connections > 0)
    }

    /// Whether its own event service took what it was sent last.
    fn is_upstream_healthy(&self) -> bool {
        self.events.as_ref().is_some_and(BesService::is_upstream_healthy)
    }

    /// Whether its own event service still has to get something.
    fn is_undelivered(&self) -> bool {
        self.events.as_ref().is_some_and(BesService::has_undelivered)
    }

    /// Whether its stream has come, and is over.
    fn is_over(&self) -> bool {
        let over = |events: &BesService| {
            let counts = events.counters();
            // Bazel tries again, and then gives the stream up, if the end of it does not come there.
            counts.connections > 0 && counts.finished + counts.broken > 0 && !events.is_answering()
        };
        self.events.as_ref().is_none_or(over)
    }
}

impl Host {
    /// Opens a listener for a command, if its events may be taken, and decides who downloads.
    pub(super) async fn answer(&self, info: &CommandInfo, attempt: Attempt) -> Answer {
        // A command that goes on after a signal has made something else of it.
        self.untold.lock().asked = None;
        let line = info.options.as_ref().ok().map(super::probe::Options::line);
        let mut answer = Answer::default();
        if info.is_refused {
            // It builds nothing: a script may look whether Bazel knows an option.
            self.untold.lock().refused = true;
            return answer;
        }
        let events = match self.way(info, line.as_ref(), &mut answer).await {
            Ok((events, upstream, reach)) => {
                let is_reached = self
                    .attempted(info, line.as_ref(), attempt, reach, &mut answer)
                    .await;
                // Then an upload that fails the build is its own.
                let has_others = upstream.is_some() || line.as_ref().is_none_or(writes_events);
                let is_unknown = line.is_none() || reach == Reach::Unknown;
                let flags = match (is_unknown, has_others) {
                    // Bazel may be where our port cannot be reached: `run` waits in its place.
                    (true, _) => vec![NO_WAIT],
                    (false, true) => Vec::new(),
                    (false, false) => upload_flags(info.version, line.as_ref(), attempt, is_reached),
                };
                answer.flags.extend(flags.into_iter().map(str::to_owned));
                Some((events, upstream, has_others))
            }
            Err(reason) => {
                answer.flags.clear();
                answer.messages.push(format!(
                    "{reason}; outhaul does not receive Bazel's events and downloads nothing"
                ));
                None
            }
        };
        answer
            .flags
            .extend(flags_again(line.as_ref(), &info.word, attempt));
        let (events, backend, has_others) = events
            .map_or((None, None, true), |(events, backend, has_others)| {
                (Some(events), backend, has_others)
            });
        let heard = Heard {
            name: format!("`bazel {}` in {}", info.word, info.directory.display()),
            events,
            unknown: info.options.as_ref().err().cloned(),
            backend,
            waits: line.as_ref().is_some_and(waits) && !answer.flags.iter().any(|flag| flag == NO_WAIT),
            uploads_for_us: !has_others,
            leaves_downloads: answer.flags.iter().any(|flag| flag == MINIMAL),
            has_executor: line
                .as_ref()
                .is_some_and(|line| line.given("remote_executor").is_some()),
            repeats: Repeats::of(&info.word, line.as_ref()),
        };
        self.heard.lock().push(heard);
        if self.asked().is_some() {
            self.hurry();
        }
        answer
    }

    /// A listener that Bazel can reach, as far as that can be seen.
    async fn way(
        &self,
        info: &CommandInfo,
        line: Option<&CommandLine>,
        answer: &mut Answer,
    ) -> anyhow::Result<(BesService, Option<String>, Reach)> {
        if let Some(line) = line {
            has_way(info, line)?;
        }
        let reach = reach_of(info)?;
        let (events, upstream) = self.event_listener(info, line, answer).await?;
        Ok((events, upstream, reach))
    }

    /// What an attempt wants of Bazel's downloads and caches. False if its cache does not answer, or is not asked.
    async fn attempted(
        &self,
        info: &CommandInfo,
        line: Option<&CommandLine>,
        attempt: Attempt,
        reach: Reach,
        answer: &mut Answer,
    ) -> bool {
        answer.flags.extend(other_id(line, &info.word, attempt));
        if let Some(line) = line.filter(|_| attempt.is_again()) {
            answer.flags.extend(read_once(line, &info.directory));
        }
        match attempt {
            Attempt::First | Attempt::Only if reach == Reach::Unknown => false,
            Attempt::First | Attempt::Only => {
                // Tests, and a program that it runs, have run.
                let repeats = attempt == Attempt::First && info.word == REPEATED;
                // The next step of a program, or the one that `bazel run` starts, needs the outputs.
                let is_last = attempt == Attempt::First && info.word != "run" && !info.is_script;
                let is_waited_for = is_last || line.is_some_and(waits_for_all);
                self.downloads(info, line, (repeats, is_waited_for), answer).await
            }
            Attempt::Again { .. } => false,
        }
    }

    /// A listener for the command's events, with the flags that lead there; and the other service that they go on to.
    async fn event_listener(
        &self,
        info: &CommandInfo,
        line: Option<&CommandLine>,
        answer: &mut Answer,
    ) -> anyhow::Result<(BesService, Option<String>)> {
        let mut upstream = self.upstream(info, info.backend.as_deref(), None)?;
        let mut more = Vec::new();
        let mut host = LOOPBACK;
        if let Some(line) = line {
            let named = |name: &str| line.given(name);
            let has_google = has_google(info, line)?;
            upstream = self.upstream(info, named("bes_backend"), Some(line))?;
            if let Some(upstream) = upstream.as_ref().filter(|_| named("bes_backend").is_some()) {
                let checked = upstream.check().await;
                checked.map_err(|reason| {
                    anyhow!("outhaul cannot forward events to the build's own event service: {reason}")
                })?;
            }
            if let (Some(theirs), Some(ours)) = (named("bes_backend"), &self.upstream.bes_backend)
                && theirs != ours
                && self.own.is_some()
            {
                answer.messages.push(format!(
                    "events go to the build's own event service {}, not to --bes-backend",
                    without_user_info(theirs)
                ));
            }
            if named("bes_proxy").is_some() {
                more.push("--bes_proxy=".to_owned());
            }
            let helpers = ["credential_helper", "experimental_credential_helper"];
            let given = helpers.into_iter().find(|name| named(name).is_some());
            if let Some(name) = given.or(has_google.then_some(helpers[0])) {
                // One that does not know our address would fail the upload, and so the command; and Google's token is
                // not for us. But the command's own servers may be on this machine, too, and want theirs.
                let servers = [
                    "remote_cache",
                    "remote_executor",
                    "experimental_remote_downloader",
                ];
                if servers
                    .into_iter()
                    .filter_map(named)
                    .any(|url| url.contains(LOOPBACK))
                {
                    host = "localhost";
                }
                let helper = self.helper.as_deref().and_then(Path::to_str);
                let helper =
                    helper.ok_or_else(|| anyhow!("failed to create a directory for a credential helper"))?;
                more.push(format!("--{name}={host}={helper}"));
            }
        }
        let backend = upstream.as_ref().map(Upstream::name);
        let listener = self.listeners.open(upstream).await?;
        let address = listener.address.to_string().replace(LOOPBACK, host);
        answer.flags.push(format!("--bes_backend=grpc://{address}"));
        answer.flags.append(&mut more);
        Ok((listener.service, backend))
    }

    /// The event service that the command's events would go to without us; or else the one that was named to us.
    fn upstream(
        &self,
        info: &CommandInfo,
        backend: Option<&str>,
        line: Option<&CommandLine>,
    ) -> anyhow::Result<Option<Upstream>> {
        let Some(backend) = backend.filter(|backend| !backend.is_empty()) else {
            return Ok(self.own.clone());
        };
        let mut upstream = self.upstream.clone();
        if self.own.is_some() && upstream.bes_backend.as_deref() != Some(backend) {
            // They are for the service that was named to us.
            upstream.bes_header.clear();
        }
        upstream_at(backend, info, line, (upstream, self.cache.clone()), self.hold)
    }

    /// Has Bazel told to download nothing, if that can be. False if the command names a cache that does not answer.
    async fn downloads(
        &self,
        info: &CommandInfo,
        line: Option<&CommandLine>,
        (repeats, is_waited_for): (bool, bool),
        answer: &mut Answer,
    ) -> bool {
        let base = info
            .options
            .as_ref()
            .ok()
            .and_then(|options| options.output_base.as_ref());
        let mut setting = Setting {
            keep: self.keep,
            word: &info.word,
            repeats,
            version: info.version,
            options: line.ok_or_else(|| info.options.as_ref().err().map_or("", String::as_str)),
            place: base.map_or(Ok(()), |base| {
                self.services.allows(base).map_err(|error| error.to_string())
            }),
            cache: Ok(()),
            is_builds_cache: self.reads_builds_cache(line),
            reads_action_cache: self.services.reads_action_cache(),
            is_waited_for,
        };
        if let Some(line) = line.filter(|line| names_a_cache(line)) {
            let directories = directories_of(info);
            let asking = tokio::time::timeout(CACHE, self.services.reaches_cache(line, &directories));
            setting.cache = match asking.await {
                Ok(answer) => answer.map_err(|error| error.to_string()),
                Err(_) => Err("the remote cache does not answer".to_owned()),
            };
        }
        let is_reached = setting.cache.is_ok() || line.is_none_or(|line| line.remote_cache().is_none());
        let mut mode = decide(&setting);
        // Another run would bring these outputs as well, but files where Bazel has symlinks.
        if mode == Mode::Minimal {
            let directory = directories_of(info).workspace;
            let exec_root = line.and_then(|line| exec_root(&directory, line, info.version));
            mode = match self.deleted(base, line, exec_root).await {
                Ok(Deleted::Nothing) => mode,
                Ok(Deleted::Unknown) => Mode::Own(
                    "only Bazel's server knows what it takes for present: the last build was interrupted, or Bazel has no \
                     action cache",
                ),
                Ok(Deleted::Directory(directory)) => Mode::Unable(format!(
                    "Bazel downloads outputs itself: {} is not there, and it may not name what belongs there if it downloads nothing",
                    directory.display()
                )),
                Err(_) => {
                    Mode::Own("it takes too long to find out whether directories of outputs were deleted")
                }
            };
        }
        match mode {
            Mode::Minimal => answer.flags.push(MINIMAL.to_owned()),
            Mode::Own(reason) => tracing::info!("leaving Bazel's download mode unchanged: {reason}"),
            Mode::Unable(reason) => answer.messages.push(reason),
        }
        is_reached
    }

    async fn deleted(
        &self,
        base: Option<&PathBuf>,
        line: Option<&CommandLine>,
        exec_root: Option<String>,
    ) -> Result<Deleted, Elapsed> {
        let Some(base) = base.cloned() else {
            return Ok(Deleted::Nothing);
        };
        let function = line.and_then(|line| line.last("digest_function"));
        let function = function.and_then(|name| name.parse().ok());
        let services = self.services.clone();
        let looking =
            tokio::task::spawn_blocking(move || services.deleted(&base, function, exec_root.as_deref()));
        tokio::time::timeout(CACHE, looking)
            .await
            .map(|looked| looked.unwrap_or(Deleted::Unknown))
    }

    /// Whether the cache that is read is the build's own.
    fn reads_builds_cache(&self, line: Option<&CommandLine>) -> bool {
        let named = line.and_then(CommandLine::remote_cache).map(|(_, url)| url);
        let is_it = |cache: &String| cache == FROM_BUILD || Some(cache.as_str()) == named;
        self.cache.remote_cache.first().is_none_or(is_it)
    }

    /// Waits for the end of all streams. A command that waits for its own has mostly seen it: but Bazel 4 may return when
    /// it has sent its last event.
    pub(super) async fn streams_end(&self, has_failed: bool) {
        let patience = if has_failed { BEGINNING_FAILED } else { BEGINNING };
        let begun = Instant::now();
        self.clients_ended();
        let is_awaited = |heard: &Heard| {
            let may_begin = !heard.waits && begun.elapsed() < patience;
            !heard.is_over() && (heard.came() || may_begin)
        };
        while self.any(is_awaited) {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The commands have ended. Those that do not wait for their streams may still be sending.
    fn clients_ended(&self) {
        let heard = self.heard.lock();
        heard
            .iter()
            .filter(|heard| heard.waits)
            .filter_map(|heard| heard.events.as_ref())
            .for_each(BesService::clients_ended);
    }

    /// A signal has asked the command for its end: nothing waits for outputs any more.
    pub(super) fn end(&self, signal: Signal) {
        self.untold.lock().asked = Some(signal);
        self.hurry();
    }

    /// The signal that asked the command for its end, if any did.
    pub(super) fn asked(&self) -> Option<Signal> {
        self.untold.lock().asked
    }

    fn hurry(&self) {
        let heard = self.heard.lock();
        heard
            .iter()
            .filter_map(|heard| heard.events.as_ref())
            .for_each(BesService::hurry);
    }

    /// How many required outputs are still on their way. Takes note of those, and of any that have failed already: their
    /// builds report nothing before they are settled.
    pub(super) async fn pending(&self) -> u64 {
        let (pending, failed) = self.on_its_way().await;
        self.untold.lock().lacks |= pending + failed > 0;
        pending
    }

    /// How many required outputs are still on their way, and how many have failed in builds that are not settled.
    pub(super) async fn on_its_way(&self) -> (u64, u64) {
        let (mut pending, mut failed) = (0, 0);
        for stream in self.services.engine.streams() {
            if self.listeners.came_in(&stream)
                && let Some((row, required)) = self.services.engine.snapshot(&stream.0).await
            {
                pending += required;
                failed += row.outputs.failed;
            }
        }
        (pending, failed)
    }

    /// How far the outputs of this command's builds are.
    pub(super) async fn progress(&self) -> Progress {
        let is_ours = |stream: &(String, String)| self.listeners.came_in(stream);
        of_builds(&self.services.engine, is_ours).await
    }

    /// How many streams came.
    pub(super) fn streams(&self) -> usize {
        self.heard.lock().iter().filter(|heard| heard.came()).count()
    }

    fn any(&self, is_so: impl Fn(&Heard) -> bool) -> bool {
        self.heard.lock().iter().any(is_so)
    }

    /// Waits until the commands' own event services have got all events, for `timeout` at most.
    pub(super) async fn deliver(&self, timeout: Duration) {
        let begun = Instant::now();
        while self.any(Heard::is_undelivered) {
            // One that takes events, on a machine whose disk is slow, gets the time for it.
            let takes = !self.any(|heard| heard.is_undelivered() && !heard.is_upstream_healthy());
            if begun.elapsed() >= if takes { timeout * 5 } else { timeout } {
                return;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Whether an upload fails only because we want events: Bazel alone would have uploaded nothing.
    pub(super) fn uploads_for_us(&self) -> bool {
        !self.any(|heard| !heard.uploads_for_us)
    }

    /// Whether Bazel left downloads to us, and told us nothing: a wrapper around it may have the last word on its flags.
    pub(super) fn is_left_unheard(&self) -> bool {
        self.any(|heard| heard.leaves_downloads && !heard.came())
    }

    /// How the command may run again to bring outputs that were lost, if Bazel left downloads to us.
    pub(super) fn repeats(&self) -> Repeats {
        let heard = self.heard.lock();
        let left = heard.iter().find(|heard| heard.leaves_downloads);
        left.map_or(Repeats::Never, |heard| heard.repeats)
    }

    /// Whether a command names a remote executor.
    pub(super) fn has_executor(&self) -> bool {
        self.any(|heard| heard.has_executor)
    }

    /// Forgets the commands so far: one of them runs again.
    pub(super) fn forget(&self) {
        self.heard.lock().clear();
    }

    /// Takes note that something required is missing that no report tells of.
    pub(super) fn note_lacking(&self) {
        self.untold.lock().lacks = true;
    }

    /// Takes note that another `run` below this one has heard Bazels, and whether it lacks anything.
    pub(super) fn note_inner(&self, has_failed: bool) {
        let mut untold = self.untold.lock();
        untold.inner = true;
        untold.lacks |= has_failed;
    }

    /// Whether any command that builds was answered, here or by a `run` below this one.
    pub(super) fn has_heard_any(&self) -> bool {
        let untold = self.untold.lock();
        let is_any = untold.inner || untold.refused;
        drop(untold);
        is_any || !self.heard.lock().is_empty()
    }

    /// What did not go as it should with the commands' events, and whether that is anything. A command that has failed
    /// and told nothing has said itself why.
    pub(super) fn faults(&self, has_failed: bool) -> (bool, Vec<String>) {
        let heard = self.heard.lock();
        // What, has been said.
        let (mut any, mut messages) = (self.untold.lock().lacks, Vec::new());
        for heard in heard.iter() {
            let name = &heard.name;
            any |= !heard.came();
            if let Some(reason) = &heard.unknown {
                if has_failed && !heard.came() {
                    continue;
                }
                any = true;
                messages.push(format!(
                    "failed to determine Bazel's options ({reason}), so Bazel downloads outputs itself, and an \
                     event service named in rc files may get no events of {name}"
                ));
            }
            if heard.events.is_some() && !heard.came() {
                messages.push(format!(
                    "received no events of {name}, so none of its outputs were downloaded"
                ));
            }
            if let Some(backend) = heard.backend.as_ref().filter(|_| heard.is_undelivered()) {
                any = true;
                messages.push(format!(
                    "{backend} has not received all events of {name} yet; the next `outhaul run` in this \
                     workspace sends the rest"
                ));
            }
        }
        (any, messages)
    }
}

/// What keeps Bazel from failing, or uploading what it would not have, only because we want its events.
fn upload_flags(
    version: Option<u32>,
    line: Option<&CommandLine>,
    attempt: Attempt,
    is_reached: bool,
) -> Vec<&'static str> {
    let uploads = version.is_some_and(|version| UPLOADING.contains(&version));
    let is_minimal = line.is_some_and(|line| line.download_mode() == Some("minimal"));
    let forbids = line.is_some_and(|line| line.switch("remote_upload_local_results") == Some(false));
    // It uploads its logs there for any event service. What comes by us needs the digests of what is uploaded.
    let uploads_nothing = !is_reached || uploads && forbids && !is_minimal;
    // It downloads by itself in a further attempt, after the first one may have failed for our sake.
    let is_again = attempt.is_again();
    // What comes by us must be there before a program's next step; `run` itself waits for its own command.
    let must_wait = attempt == Attempt::Only && is_minimal && is_reached;
    let waits_not = is_again || uploads && !must_wait;
    [(uploads_nothing, NO_UPLOAD), (waits_not, NO_WAIT)]
        .into_iter()
        .filter_map(|(is_set, flag)| is_set.then_some(flag))
        .collect()
}
