//! What Bazel itself has on disk of outputs that no event names: when it is believed, and recording it.

use std::{
    collections::HashSet,
    hash::BuildHasher as _,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::task::spawn_blocking;

use super::{
    super::{
        rows::{self, Naming, Taken},
        runfiles,
    },
    Actor,
    parts::Known,
    site::Site,
};
use crate::{
    action_cache::{self, ActionCacheError, Extent, Facts, Reading, State},
    digest::DigestFunction,
    exec_path::ExecPath,
    invocation::shared::{Remembered, Trees},
    output::OutputContent,
    roots::Destination,
    units::parse_duration,
};

/// Exit codes of Bazel after which its action cache is not written: interrupted, and an internal error.
const UNSAVED: [i32; 2] = [8, 37];
/// For how long Bazel relies on the cache to keep what it has found there (`--experimental_remote_cache_ttl`).
const PROMISED: Duration = Duration::from_secs(3 * 60 * 60);
/// How often a log that is not whole yet is read again, and after which time.
const LOG_TRIES: usize = 10;
const LOG_PAUSE: Duration = Duration::from_millis(200);
/// The newest builds, among which the one before is looked for.
const BUILDS_BEFORE: usize = 100;

impl Actor {
    /// What the action cache says. It is believed only after a build that has written it, and if it agrees with
    /// whatever this build's events name.
    pub(super) async fn action_cache(&self, before: Option<Arc<State>>) -> Known {
        let nothing = |reason: &str| Known::Nothing(reason.to_owned());
        let Some(place) = self.site.open_root() else {
            return nothing("there is no output root");
        };
        let rules = self.shared.roots.rules();
        let output_base = place.root.place.output_base();
        let output_base = output_base.filter(|_| rules.destination == Destination::ExecRoot);
        let Some(output_base) = output_base.map(ToOwned::to_owned) else {
            return nothing("the output root is not inside an output base");
        };
        if rules.no_action_cache {
            return nothing("Bazel's action cache is not read (--no-action-cache)");
        }
        if !self.row.finished || self.phase.is_interrupted() || UNSAVED.contains(&self.row.exit_code) {
            return nothing("the build was interrupted, and has not written its action cache");
        }
        if runfiles::is_off(self.build.command_line(), "use_action_cache") {
            return nothing("the build has no action cache (--nouse_action_cache)");
        }
        let (function, root, version) = (self.digest_function(), place.root.clone(), place.version);
        let read = spawn_blocking(move || {
            let began = Instant::now();
            let reading = action_cache::read(&output_base, function, before.as_deref());
            if let Ok(Reading::Read(facts, _)) = &reading {
                let what = match facts.extent() {
                    Extent::Grown => "what is new in the action cache",
                    _ => "the action cache",
                };
                let (outputs, took) = (facts.outputs().len(), began.elapsed());
                tracing::debug!(
                    "read {what} of {}: {outputs} outputs in {took:?}",
                    output_base.display()
                );
            }
            // A newer build may have begun to write its own.
            (reading, root.epoch.is_newest(version))
        });
        let reading = match read.await {
            Ok((reading, true)) => reading,
            Ok((_, false)) => return nothing("a newer build has started"),
            Err(_) => return nothing("reading the action cache panicked; this is a bug in outhaul"),
        };
        match reading {
            Ok(Reading::Absent) => nothing("there is no action cache"),
            Ok(Reading::Unchanged) => Known::Unchanged,
            Ok(Reading::Read(mut facts, state)) => match self.stale(&facts) {
                Ok(stale) => {
                    facts.forget(&stale);
                    Known::Facts(facts, Arc::new(state))
                }
                Err(path) => self.contradicted(&path),
            },
            Err(error) => {
                if error.is_lasting() {
                    // Once is enough.
                    if self.shared.is_first(&error.to_string()) {
                        tracing::info!("{error}; runfiles that no event names may not be downloaded");
                    }
                } else {
                    self.shared.metrics.fault("action_cache");
                    tracing::warn!(invocation = %self.row.invocation_id, "{error}");
                }
                Known::Nothing(error.to_string())
            }
        }
    }

    /// What the execution log says that the build tool was told to write, if it is this build's.
    async fn execution_log(&self) -> Option<Facts> {
        if !self.row.finished || self.shared.roots.rules().no_action_cache {
            return None;
        }
        let line = self.build.command_line()?;
        let names = [
            "execution_log_compact_file",
            "experimental_execution_log_compact_file",
        ];
        let file = names.into_iter().find_map(|name| line.given(name))?;
        let directory = match self.build.working_directory() {
            "" => self.row.workspace.as_str(),
            directory => directory,
        };
        let path = Path::new(directory).join(file);
        let path = self.shared.roots.rules().translate(path.to_str()?);
        let read = move || {
            let mut read = action_cache::read_own_log(&path);
            for _ in 0..LOG_TRIES {
                // It is written to its end after the last event, maybe.
                if !matches!(read, Err(ActionCacheError::Torn { .. })) {
                    break;
                }
                std::thread::sleep(LOG_PAUSE);
                read = action_cache::read_own_log(&path);
            }
            read
        };
        match spawn_blocking(read).await.ok()? {
            Ok(log) if log.invocation_id == self.row.invocation_id => match self.stale(&log.facts) {
                Ok(_) => Some(log.facts),
                Err(path) => {
                    self.contradicted(&path);
                    None
                }
            },
            Ok(log) => {
                let id = log.invocation_id;
                tracing::info!(invocation = %self.row.invocation_id, "{file} is the execution log of another build, {id:?}");
                None
            }
            Err(error) => {
                tracing::info!(invocation = %self.row.invocation_id, "not using the build's execution log: {error}");
                None
            }
        }
    }

    fn contradicted(&self, path: &ExecPath) -> Known {
        let reason =
            format!("not using Bazel's action cache: it disagrees with this build's events about {path}");
        self.shared.metrics.fault("action_cache");
        tracing::warn!(invocation = %self.row.invocation_id, "{reason}");
        Known::Nothing(reason)
    }

    /// Outputs of which the action cache says something else than the stream, because an action that does not make them any
    /// more still tells of them. An error is one that tells that this is not what the build has written.
    fn stale(&self, facts: &Facts) -> Result<Vec<ExecPath>, ExecPath> {
        let contradicts = |output: &&action_cache::Output| {
            let wanted = self.ledger.wanted.get(&output.path).map(|wanted| &wanted.content);
            // What Bazel has in the cache is not a file that came in an event.
            matches!(wanted, Some(OutputContent::Blob(digest)) if *digest != output.digest)
        };
        let contradictory = facts.outputs().iter().filter(contradicts);
        contradictory
            .map(|output| {
                let path = output.path.clone();
                if output.is_primary { Err(path) } else { Ok(path) }
            })
            .collect()
    }

    /// The build's digest function: that of whatever it names.
    fn digest_function(&self) -> DigestFunction {
        let of_outputs = self
            .ledger
            .wanted
            .values()
            .find_map(|wanted| match &wanted.content {
                OutputContent::Blob(digest) => Some(digest.function()),
                _ => None,
            });
        let of_command = || {
            let name = self.build.command_line()?.last("digest_function")?;
            name.parse().ok()
        };
        of_outputs.or_else(of_command).unwrap_or(DigestFunction::Sha256)
    }

    /// For how long the cache promises to keep what Bazel finds there, by Bazel's reckoning.
    fn promised_ms(&self) -> i64 {
        let line = self.build.command_line();
        let promised = line.and_then(|line| parse_duration(line.last("experimental_remote_cache_ttl")?).ok());
        i64::try_from(promised.unwrap_or(PROMISED).as_millis()).unwrap_or(i64::MAX)
    }

    /// What the action cache says now, or has more than before, with the trees of which nothing new is known.
    async fn read_again(&self, before: Option<Remembered>) -> (Known, Trees) {
        let (state, trees) = before.map(|before| (before.state, before.trees)).unzip();
        let known = self.action_cache(state).await;
        let trees = match &known {
            Known::Facts(facts, _) if facts.extent() == Extent::Grown => {
                let mut trees = Arc::unwrap_or_clone(trees.unwrap_or_default());
                trees.retain(|tree, _| facts.tree(tree.as_str()).next().is_none());
                Arc::new(trees)
            }
            _ => Arc::default(),
        };
        (known, trees)
    }

    /// Records what the action cache says, after everything that the build waits for.
    pub(super) async fn take_in_action_cache(&mut self) {
        let Site::Open(place) = &mut self.site else {
            return;
        };
        let (id, version) = (place.id, place.version);
        let before = self.shared.action_cache(id);
        let (known, trees) = match place.known.take() {
            Some(read) => read,
            None => self.read_again(before).await,
        };
        let (facts, state) = match known {
            Known::Facts(facts, state) => (facts, Some(state)),
            Known::Unchanged => return,
            Known::Nothing(_) => match self.execution_log().await {
                Some(facts) => (facts, None),
                None => return,
            },
        };
        let known = std::mem::take(&mut self.ledger.known);
        let hash = |path: &ExecPath| known.hasher().hash_one(path.as_str());
        let wanted: HashSet<u64> = self.ledger.wanted.keys().map(hash).collect();
        let record = self.shared.record.clone();
        let recorded_in = record.identity();
        let naming = Naming {
            root: id,
            version,
            invocation: self.row.invocation_id.as_str().into(),
            target: Arc::default(),
        };
        let (started_ms, keeps_ms) = (self.row.started_ms, self.promised_ms());
        let take_in = move || {
            let is_named = |path: &ExecPath| {
                let hash = known.hasher().hash_one(path.as_str());
                known.contains(&hash) || wanted.contains(&hash)
            };
            // Builds of one root come one after the other: what was found after the end of the last one that was followed
            // is newer than all that was said.
            let before = record.invocations(BUILDS_BEFORE).into_iter();
            let mut before = before.filter(|row| row.root == Some(id) && row.version < version);
            let ended_ms = before.next().map(|row| row.settled_ms).filter(|ended| *ended > 0);
            let since = ended_ms.map_or(started_ms, |ended| ended.min(started_ms));
            let found_since = since.saturating_add(keeps_ms);
            let taken = rows::take_in(&record, &naming, &facts, found_since, is_named);
            (taken, known)
        };
        let Ok((taken, known)) = spawn_blocking(take_in).await else {
            tracing::error!("recording the action cache panicked; this is a bug in outhaul");
            self.shared.remember_action_cache(id, None);
            return;
        };
        self.ledger.known = known;
        match taken {
            // What a newer build says counts, and what was read before is recorded still.
            Ok(Taken::Nothing) => {}
            Ok(taken) => {
                // A log's facts took the place of the action cache's; and what was dropped is to be read again.
                let state = state.filter(|_| taken == Taken::All);
                let read = state.map(|state| Remembered {
                    state,
                    recorded_in,
                    trees,
                });
                self.shared.remember_action_cache(id, read);
            }
            Err(path) => {
                self.shared.remember_action_cache(id, None);
                self.contradicted(&path);
            }
        }
    }
}
