//! What a `run` answers each Bazel command below it: a listener for its events, and the flags that bring them there.

use std::{
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{anyhow, bail};
use parking_lot::Mutex;
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use super::{
    super::paths::workspace_around,
    mode::{Mode, Setting, decide, names_a_cache},
    probe::CommandInfo,
};
use crate::{
    bep::event::CommandLine,
    bes::{BesService, HoldPolicy, Upstream},
    config::{CacheArgs, FROM_BUILD, UpstreamArgs},
    daemon::{EventListeners, Services},
    sources::{BuildDirectories, google_of},
    transport::{ConnectOptions, Endpoint, Header, auth::has_helper, netrc, without_user_info},
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
/// The command that may run again.
pub(super) const REPEATED: &str = "build";
/// Where the listeners are.
const LOOPBACK: &str = "127.0.0.1";
/// The oldest Bazel that has credential helpers of this name, and a way to an address that is not encrypted where there are
/// Google's credentials: older ones fail there.
const GOOGLE_UNENCRYPTED: u32 = 7;
/// The oldest Bazel that reads a `.netrc`.
const NETRC: u32 = 5;
/// Has Bazel end without waiting for the upload of its events, which cannot fail it then.
const NO_WAIT: &str = "--bes_upload_mode=nowait_for_upload_complete";
/// Has Bazel upload no files for its events.
const NO_UPLOAD: &str = "--experimental_build_event_upload_strategy=local";
/// Bazels that upload all outputs that were made here for their events, and then fail a good build if that fails.
const UPLOADING: std::ops::Range<u32> = 4..7;

/// How a command is run; it may have to run again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Attempt {
    /// As always: Bazel uploads what its events name, as it does for any event service, and we download, where that can be.
    First,
    /// The same, and it cannot run again: something else runs it.
    Only,
    /// It uploads nothing for its events, and downloads by itself.
    Alone,
    /// The same without its caches: it builds whatever is not on disk. Not for one with an executor, which it takes for its
    /// cache then.
    Uncached,
}

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
            has_executor: line.is_some_and(|line| line.given("remote_executor").is_some()),
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
        // Java's own proxies lead elsewhere than we get, and the service may not be reached otherwise.
        let has_proxy = info.options.as_ref().is_ok_and(|options| options.has_proxy);
        if has_proxy && line.is_some_and(|line| line.given("bes_backend").is_some()) {
            bail!("outhaul cannot forward events through the proxy that Bazel's --host_jvm_args name");
        }
        let reach = reach_of(info);
        if reach == Reach::Apart {
            bail!("Bazel's server runs in another network namespace, from which it cannot reach outhaul");
        }
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
        match attempt {
            Attempt::First | Attempt::Only if reach == Reach::Unknown => false,
            Attempt::First | Attempt::Only => {
                // Tests, and a program that it runs, have run.
                let repeats = attempt == Attempt::First && info.word == REPEATED;
                self.downloads(info, line, repeats, answer).await
            }
            Attempt::Alone => false,
            Attempt::Uncached => {
                answer
                    .flags
                    .extend(["--remote_cache=", "--disk_cache="].map(str::to_owned));
                // It asks the cache as well, and Bazel refuses it without one.
                let downloader = "experimental_remote_downloader";
                if line.is_some_and(|line| line.given(downloader).is_some()) {
                    answer.flags.push(format!("--{downloader}="));
                }
                false
            }
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
        repeats: bool,
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
        let mode = decide(&setting);
        match mode {
            Mode::Minimal => answer.flags.push(MINIMAL.to_owned()),
            Mode::Own(reason) => tracing::info!("leaving Bazel's download mode unchanged: {reason}"),
            Mode::Unable(reason) => answer.messages.push(reason),
        }
        is_reached
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
        let is_awaited = |heard: &Heard| {
            let may_begin = !heard.waits && begun.elapsed() < patience;
            !heard.is_over() && (heard.came() || may_begin)
        };
        while self.any(is_awaited) {
            tokio::time::sleep(LOOK).await;
        }
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

    /// Whether Bazel left downloads to us.
    pub(super) fn is_left_downloads(&self) -> bool {
        self.any(|heard| heard.leaves_downloads)
    }

    /// Whether a command names a remote executor.
    pub(super) fn has_executor(&self) -> bool {
        self.any(|heard| heard.has_executor)
    }

    /// Forgets the commands so far: one of them runs again.
    pub(super) fn forget(&self) {
        self.heard.lock().clear();
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
                     event service named in rc files gets no events of {name}"
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

/// Whether a command has Google's credentials.
///
/// # Errors
/// When it sends no events to an address that is not encrypted then.
fn has_google(info: &CommandInfo, line: &CommandLine) -> anyhow::Result<bool> {
    let has_google = google_of(line, Path::new("")).is_some();
    if has_google && info.version.is_none_or(|version| version < GOOGLE_UNENCRYPTED) {
        bail!("with Google's credentials, this Bazel sends events only over encrypted connections");
    }
    Ok(has_google)
}

/// The event service at an address that a command names, with the command's own words on how it is reached.
fn upstream_at(
    backend: &str,
    info: &CommandInfo,
    line: Option<&CommandLine>,
    (mut upstream, mut cache): (UpstreamArgs, CacheArgs),
    hold: HoldPolicy,
) -> anyhow::Result<Option<Upstream>> {
    let named = |name: &str| line?.given(name);
    upstream.bes_backend = Some(match named("bes_proxy") {
        None => backend.to_owned(),
        Some(proxy) if proxy.starts_with("unix:") && backend.starts_with("grpc://") => proxy.to_owned(),
        Some(proxy) => {
            bail!(
                "outhaul cannot forward events through --bes_proxy={}",
                without_user_info(proxy)
            );
        }
    });
    if let Some(line) = line {
        // Bazel's server runs in the workspace, where relative files are looked for.
        let workspace = directories_of(info).workspace;
        let path = |name| Some(workspace.join(line.given(name)?));
        let tls = &mut cache.tls;
        for (file, name) in [
            (&mut tls.tls_certificate, "tls_certificate"),
            (&mut tls.tls_client_certificate, "tls_client_certificate"),
            (&mut tls.tls_client_key, "tls_client_key"),
        ] {
            *file = file.take().or_else(|| path(name));
        }
        upstream.credential_helper = ["credential_helper", "experimental_credential_helper"]
            .into_iter()
            .flat_map(|name| line.all(name))
            .map(|helper| helper.replace("%workspace%", &workspace.to_string_lossy()))
            .collect();
        upstream.google = google_of(line, &workspace);
        let has_netrc = info.version.is_none_or(|version| version >= NETRC);
        let login = |host: &str| netrc::of_user(host).filter(|_| has_netrc);
        authorize(&mut upstream, line, backend, login);
        upstream.workspace = Some(workspace);
    }
    upstream
        .upstream(&mut cache, hold)
        .map_err(|e| anyhow!("outhaul cannot forward events to the build's own event service: {e}"))
}

/// Whether events of a command can go by us to the event service that it names, if it names one.
///
/// # Errors
/// When they cannot, with the reason.
pub(in crate::cli) fn can_forward(
    info: &CommandInfo,
    line: &CommandLine,
    (mut upstream, cache): (UpstreamArgs, CacheArgs),
) -> anyhow::Result<()> {
    has_google(info, line)?;
    let Some(backend) = line.given("bes_backend") else {
        return Ok(());
    };
    if upstream.bes_backend.as_deref() != Some(backend) {
        upstream.bes_header.clear();
    }
    upstream_at(
        backend,
        info,
        Some(line),
        (upstream, cache),
        HoldPolicy::default(),
    )
    .map(drop)
}

/// Where a command's relative files are.
pub(in crate::cli) fn directories_of(info: &CommandInfo) -> BuildDirectories {
    let working_directory = info.directory.clone();
    BuildDirectories {
        workspace: workspace_around(&working_directory).unwrap_or_else(|| working_directory.clone()),
        working_directory,
    }
}

/// Whether Bazel's server gets to a port of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    Sure,
    /// It is not to be seen from here.
    Unknown,
    /// It has a network of its own.
    Apart,
}

/// Looks where a command's server is. It runs since the command's options were asked for.
fn reach_of(info: &CommandInfo) -> Reach {
    let base = info.options.as_ref().ok().and_then(|o| o.output_base.as_deref());
    // One that serves a single command, with --batch, leaves no number.
    let Some((base, pid)) = base.and_then(|base| {
        let pid = std::fs::read_to_string(base.join("server/server.pid.txt")).ok()?;
        Some((base, pid.trim().parse::<u32>().ok()?))
    }) else {
        return Reach::Sure;
    };
    let network = |of: &str| std::fs::read_link(format!("/proc/{of}/ns/net"));
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let named = base.as_os_str().as_bytes();
    let is_server = !named.is_empty() && words.windows(named.len()).any(|part| part == named);
    match (network(&pid.to_string()), network("self")) {
        (Ok(theirs), Ok(ours)) if is_server && theirs == ours => Reach::Sure,
        (Ok(_), Ok(_)) if is_server => Reach::Apart,
        _ => Reach::Unknown,
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
    let is_again = matches!(attempt, Attempt::Alone | Attempt::Uncached);
    // What comes by us must be there before a program's next step; `run` itself waits for its own command.
    let must_wait = attempt == Attempt::Only && is_minimal && is_reached;
    let waits_not = is_again || uploads && !must_wait;
    [(uploads_nothing, NO_UPLOAD), (waits_not, NO_WAIT)]
        .into_iter()
        .filter_map(|(is_set, flag)| is_set.then_some(flag))
        .collect()
}

/// What the command's own event service is shown. What Bazel shows our address by itself is for us.
fn authorize(
    upstream: &mut UpstreamArgs,
    line: &CommandLine,
    backend: &str,
    login: impl Fn(&str) -> Option<(String, String)>,
) {
    let says_who = |header: &str| {
        let name = header.split('=').next().unwrap_or_default();
        name.eq_ignore_ascii_case("authorization")
    };
    if line.all("bes_header").any(says_who) || upstream.bes_header.iter().any(|h| says_who(h)) {
        return;
    }
    upstream.is_authorized_here = true;
    if upstream.google.is_none()
        && let Ok(endpoint) = Endpoint::parse("--bes_backend", backend)
        && let Some((user, password)) = endpoint.host().and_then(login)
        && !is_helped(upstream, endpoint)
    {
        let header = Header::basic(&user, &password);
        upstream
            .bes_header
            .push(format!("{}={}", header.name(), header.value()));
    }
}

/// Whether one of the command's helpers is for a server.
fn is_helped(upstream: &UpstreamArgs, endpoint: Endpoint) -> bool {
    let mut connect = ConnectOptions::new(endpoint);
    connect.credential_helpers.clone_from(&upstream.credential_helper);
    has_helper(&connect)
}

/// Whether Bazel writes events into a file.
fn writes_events(line: &CommandLine) -> bool {
    let files = [
        "build_event_json_file",
        "build_event_text_file",
        "build_event_binary_file",
    ];
    files.iter().any(|name| line.given(name).is_some())
}

/// Whether Bazel waits until its stream is acknowledged to the end.
fn waits(line: &CommandLine) -> bool {
    line.last("bes_upload_mode")
        .is_none_or(|mode| mode == "wait_for_upload_complete")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::{super::probe::Options, *};

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        upstream: UpstreamArgs,
    }

    #[test]
    fn what_bazel_shows_our_address_is_not_for_another_service() {
        let login = |host: &str| (host == "events").then(|| ("me".to_owned(), "secret".to_owned()));
        let basic = Header::basic("me", "secret").value().to_owned();
        let of_netrc = format!("authorization={basic}");
        for (own, options, expected, is_authorized_here) in [
            (&[][..], &[][..], &[of_netrc.as_str()][..], true),
            (&[], &["--bes_header=x=y"], &[&of_netrc], true),
            (&[], &["--bes_header=Authorization=Bearer x"], &[], false),
            (
                &["--bes-header=authorization=Bearer x"],
                &[],
                &["authorization=Bearer x"],
                false,
            ),
        ] {
            let mut upstream = Cli::parse_from([&["outhaul"], own].concat()).upstream;
            authorize(
                &mut upstream,
                &Options::of(options).line(),
                "grpcs://events",
                login,
            );
            assert_eq!(upstream.bes_header, expected, "{own:?} {options:?}");
            assert_eq!(
                upstream.is_authorized_here, is_authorized_here,
                "{own:?} {options:?}"
            );
        }
        let mut other = Cli::parse_from(["outhaul"]).upstream;
        authorize(&mut other, &Options::of(&[]).line(), "grpc://other:1", login);
        assert_eq!((other.bes_header.len(), other.is_authorized_here), (0, true));
    }

    #[test]
    fn a_server_is_found_by_its_number_and_its_output_base() {
        let base = tempfile::tempdir().unwrap();
        let mut options = Options::of(&[]);
        options.output_base = Some(base.path().to_owned());
        let info = CommandInfo {
            word: "build".to_owned(),
            directory: PathBuf::new(),
            version: Some(7),
            backend: None,
            options: Ok(options),
            is_refused: false,
        };
        assert_eq!(reach_of(&info), Reach::Sure, "without a server");
        std::fs::create_dir(base.path().join("server")).unwrap();
        let write = |pid: u32| std::fs::write(base.path().join("server/server.pid.txt"), pid.to_string());
        let sleep = |of: &Path| {
            let mut command = std::process::Command::new("sh");
            command.args(["-c", "read line"]).arg(of);
            command.stdin(std::process::Stdio::piped()).spawn().unwrap()
        };
        for (of, expected) in [(base.path(), Reach::Sure), (Path::new("/other"), Reach::Unknown)] {
            let mut server = sleep(of);
            // It may just be about to become what it is to be.
            let words = || std::fs::read(format!("/proc/{}/cmdline", server.id())).unwrap_or_default();
            while !words().starts_with(b"sh\0") {
                std::thread::yield_now();
            }
            write(server.id()).unwrap();
            assert_eq!(reach_of(&info), expected, "{}", of.display());
            server.kill().unwrap();
            server.wait().unwrap();
        }
        assert_eq!(reach_of(&info), Reach::Unknown, "there is none any more");
    }
}
