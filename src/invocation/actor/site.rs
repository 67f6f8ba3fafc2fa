//! Where a build's outputs go: its output root, and the way to its cache.

use std::{
    collections::HashMap,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::task::spawn_blocking;

use super::{
    super::{elsewhere::Elsewhere, shared::Trees},
    Actor,
    parts::Known,
};
use crate::{
    bep::commands::has_outputs,
    materialize::{
        Root, Served, Session,
        place::{Left as LeftRoot, looks_like_exec_root, resolve},
    },
    record::RootId,
    remote::{Attribution, BlobStore, LocalFirst, Nowhere},
    roots::{Destination, RootError},
    sources::{BuildDirectories, SourceCache, SourceError},
    transport::without_user_info,
};

/// See the module.
pub(super) enum Site {
    /// Not open. Left with the first outputs, if the stream has named the exec root by then; it is opened before that if
    /// it exists and the command builds something.
    ///
    /// Entered again with what is kept of it when nothing is on its way and the client is gone: it may stay so for
    /// minutes, and there may be hundreds of such builds. Then it is also left when the client or the stream's end comes.
    Closed(Option<Left>),
    /// Open. Left when nothing is on its way after the end of the stream.
    Open(OpenRoot),
    /// Outputs cannot be placed at all. Never left.
    Blocked(Blocked),
}

/// Why outputs cannot be placed at all.
pub(super) struct Blocked {
    reason: String,
    /// The exec root, if it is only a rule that forbids writing there: what Bazel has put there is there.
    read_only: Option<PathBuf>,
}

/// An open output root, and what is needed to request outputs there.
pub(super) struct OpenRoot {
    pub(super) id: RootId,
    pub(super) root: Arc<Root>,
    pub(super) version: u64,
    /// The way to the cache, once outputs are wanted.
    pub(super) session: Option<Arc<Session>>,
    /// What other roots have of them.
    pub(super) elsewhere: Option<Elsewhere>,
    /// What the action cache said after the end of the stream, until it is recorded.
    pub(super) known: Option<(Known, Trees)>,
}

/// What is kept of a closed output root.
pub(super) struct Left {
    /// Says whether the root is still open.
    root: u32,
    left: LeftRoot,
    had_session: bool,
}

impl Site {
    /// The output root, if it is open.
    pub(super) const fn open_root(&self) -> Option<&OpenRoot> {
        match self {
            Self::Open(place) => Some(place),
            _ => None,
        }
    }

    /// The same, to be changed.
    pub(super) const fn open_root_mut(&mut self) -> Option<&mut OpenRoot> {
        match self {
            Self::Open(place) => Some(place),
            _ => None,
        }
    }

    /// The way to the cache, if it is open.
    pub(super) fn session(&self) -> Option<&Arc<Session>> {
        self.open_root()?.session.as_ref()
    }

    /// Why outputs cannot be placed at all.
    pub(super) const fn blocked(&self) -> Option<&str> {
        match self {
            Self::Blocked(blocked) => Some(blocked.reason.as_str()),
            _ => None,
        }
    }

    /// The exec root, if outputs may be looked for there, but not placed.
    pub(super) fn read_only(&self) -> Option<&Path> {
        match self {
            Self::Blocked(blocked) => blocked.read_only.as_deref(),
            _ => None,
        }
    }
}

/// The real place of an exec root that is Outhaul's own user's, whoever else may write there.
async fn own_exec_root(path: PathBuf) -> Option<PathBuf> {
    let look = move || {
        let real = resolve(&path).ok().filter(|real| looks_like_exec_root(real))?;
        let owner = real.symlink_metadata().ok()?.uid();
        (owner == rustix::process::geteuid().as_raw()).then_some(real)
    };
    spawn_blocking(look).await.ok().flatten()
}

impl Actor {
    /// Opens the exec root, or leaves that to the first outputs: after a `clean`, Bazel 4 makes it only after it has
    /// named it, when it begins to execute. A root that is not there has no older work to be stopped either.
    pub(super) async fn exec_root(&mut self, path: String) {
        self.row.exec_root.clone_from(&path);
        let shared = self.shared.clone();
        let there = spawn_blocking(move || shared.roots.is_there(&path)).await;
        // What only asks about the build, and has no outputs, does not end the downloads of one that has.
        if has_outputs(&self.row.command) && there.unwrap_or(true) {
            self.open_root().await;
        }
    }

    /// Opens the exec root, if the stream has named it and it is not open.
    pub(super) async fn open_root(&mut self) {
        let (Site::Closed(left), Some(path)) = (&mut self.site, self.build.exec_root()) else {
            return;
        };
        let (left, path) = (left.take(), path.to_owned());
        let had_session = left.as_ref().is_some_and(|left| left.had_session);
        self.site = match self.open(path.clone(), left).await {
            Ok(place) => Site::Open(place),
            Err(error) => {
                let rules = self.shared.roots.rules();
                let read_only = match error {
                    RootError::NotAllowed(..) if rules.destination == Destination::ExecRoot => {
                        own_exec_root(rules.translate(&path)).await
                    }
                    _ => None,
                };
                // A build that has begun in it before comes from the journal, or its client comes back: `bazel clean` has
                // no use for its outputs either.
                let is_cleaned = self.row.version > 0 && error.is_not_there();
                let reason = if is_cleaned {
                    format!("{error}; it was there when this build began")
                } else {
                    error.to_string()
                };
                let invocation = &self.row.invocation_id;
                if is_cleaned {
                    tracing::info!(%invocation, "not downloading any outputs: {reason}");
                } else {
                    tracing::error!(%invocation, "not downloading any outputs: {reason}");
                }
                self.ledger.tally.note(&reason);
                Site::Blocked(Blocked { reason, read_only })
            }
        };
        if !self.phase.is_open() || self.phase.is_left() {
            self.end_build().await;
        }
        if had_session {
            self.session().await;
        }
    }

    async fn open(&mut self, path: String, left: Option<Left>) -> Result<OpenRoot, RootError> {
        let shared = self.shared.clone();
        let opened = spawn_blocking(move || shared.roots.open(&path)).await;
        let (id, root) = opened.unwrap_or(Err(RootError::Panicked))?;
        self.row.exec_root = root.place.path().display().to_string();
        self.row.root = Some(id);
        if left.as_ref().is_none_or(|left| left.root != root.id) {
            self.fill_row();
            let left = left.map(|left| left.left);
            let (roots, materializer) = (&self.shared.roots, &self.shared.materializer);
            if !roots
                .begin(materializer, (id, &root), &mut self.row, left)
                .await?
            {
                self.doubt(root.clone());
            }
        }
        Ok(OpenRoot {
            id,
            root,
            version: self.row.version,
            session: None,
            elsewhere: None,
            known: None,
        })
    }

    /// From now on it is unknown whether the command is still running. What a newer build holds is its own.
    pub(super) async fn end_build(&self) {
        let Some(OpenRoot { root, version, .. }) = self.site.open_root() else {
            return;
        };
        let (root, version) = (root.clone(), *version);
        // If the root cannot be read, each output says so.
        let _ =
            spawn_blocking(move || (version >= root.epoch.current()).then(|| root.place.end_build())).await;
    }

    /// Lets go of the root, if nothing is done in it until the client comes back: it is closed like any other that
    /// is unused, and opened again when there is more to do.
    pub(super) async fn leave_root(&mut self) {
        let is_quiet = self.ledger.is_quiet()
            && self.recheck.doubt.is_none()
            && self.recheck.others.is_empty()
            && self.unwritten.is_empty()
            && self.unasked.is_empty();
        let (Site::Open(place), true) = (&self.site, self.phase.is_left() && is_quiet) else {
            return;
        };
        let leaving = place.root.clone();
        let Ok(Ok(left)) = spawn_blocking(move || leaving.place.leave()).await else {
            return;
        };
        self.site = Site::Closed(Some(Left {
            root: place.root.id,
            left,
            had_session: place.session.is_some(),
        }));
    }

    /// The stream goes on, and with it the work in the root.
    pub(super) async fn come_back(&mut self) {
        if let Site::Closed(Some(_)) = self.site {
            self.open_root().await;
        }
    }

    /// The way to the cache, opened when the first outputs are wanted: by then the build has sent its command line.
    pub(super) async fn session(&mut self) -> Option<Arc<Session>> {
        if let Some(session) = self.site.session() {
            return Some(session.clone());
        }
        self.site.open_root()?;
        let served = self.served().await;
        let (store, local): (Arc<dyn BlobStore>, _) = match self.source() {
            Ok(cache) => {
                self.note_cache(&cache);
                for option in cache.left_out() {
                    let message =
                        format!("not using one of the build's options for its remote cache: {option}");
                    tracing::warn!(invocation = %self.row.invocation_id, "{message}");
                    self.ledger.tally.note(&message);
                }
                if served.is_some() {
                    (cache.remote_blobs(), None)
                } else {
                    (cache.blobs(), Some(cache.local().clone()))
                }
            }
            // What is there is there, no matter who brought it. What is not fails, and for this reason.
            Err(reason) => {
                tracing::warn!(invocation = %self.row.invocation_id, "no remote cache: {reason}");
                let nowhere = Arc::new(Nowhere(reason.to_string()));
                let store = Arc::new(LocalFirst::new(HashMap::new(), nowhere));
                (store.clone(), Some(store))
            }
        };
        let local = local.filter(|_| served.is_none() && self.build.has_local_sources);
        let Site::Open(place) = &mut self.site else {
            return None;
        };
        let session = Session {
            root: place.root.clone(),
            version: place.version,
            store,
            attribution: Arc::new(Attribution {
                invocation_id: self.row.invocation_id.clone(),
                build_id: self.row.build_id.clone(),
                target: String::new(),
            }),
            served,
            trace: self.trace.clone(),
            completions: self.completions.clone(),
        };
        let record = &self.shared.record;
        place.elsewhere = local.map(|store| Elsewhere::new(record, Some(place.id), store.offer()));
        Some(place.session.insert(Arc::new(session)).clone())
    }

    /// Whether something else provides the build's outputs, and says so: an output service by the command line, or
    /// whatever `bazel-out` leads to. Bazel makes that link before it executes anything, so it is there when outputs are named.
    async fn served(&mut self) -> Option<Served> {
        if self.shared.roots.rules().destination != Destination::ExecRoot {
            return None;
        }
        let line = self.build.command_line();
        let service = line.and_then(|line| line.given("experimental_remote_output_service"));
        let mut served = match service {
            Some(address) => Served {
                by: format!("the output service {}", without_user_info(address)),
                warm: false,
            },
            None => {
                let root = self.site.open_root()?.root.clone();
                spawn_blocking(move || Served::by_link(&root.place))
                    .await
                    .ok()??
            }
        };
        served.warm = self.build.warms_output_service;
        let but = if served.warm {
            "; outhaul only reads their blobs from the cache"
        } else {
            ""
        };
        let message = format!(
            "{} provides this build's outputs: outputs that can be read there count as present, and outhaul \
             writes none{but}",
            served.by
        );
        tracing::info!(invocation = %self.row.invocation_id, "{message}");
        self.ledger.tally.note(&message);
        Some(served)
    }

    /// The build's cache, by its own command line or by our settings.
    fn source(&self) -> Result<SourceCache, SourceError> {
        let rules = self.shared.roots.rules();
        let workspace = rules.translate(&self.row.workspace);
        let working_directory = match self.build.working_directory() {
            "" => workspace.clone(),
            directory => rules.translate(directory),
        };
        let directories = BuildDirectories {
            workspace,
            working_directory,
        };
        self.shared
            .sources
            .of_build(self.build.command_line(), &directories)
    }

    fn note_cache(&mut self, cache: &SourceCache) {
        self.row.remote_cache.clone_from(&cache.endpoint);
        self.row.remote_instance_name.clone_from(&cache.instance_name);
        if let Some(trace) = &self.trace {
            trace.reads_from(&cache.endpoint);
        }
    }

    /// Notes the cache of a build of which nothing was wanted: somebody may ask for its outputs later.
    pub(super) fn note_unused_cache(&mut self) {
        if self.site.open_root().is_some()
            && self.site.session().is_none()
            && let Ok(cache) = self.source()
        {
            self.note_cache(&cache);
        }
    }

    pub(super) fn check_authority(&self, authority: &str) {
        if let Ok(cache) = self.source()
            && !cache.is_at(authority)
        {
            tracing::info!(
                invocation = %self.row.invocation_id,
                "the stream names blobs at {}; downloading them from {} as configured",
                without_user_info(authority),
                cache.endpoint
            );
        }
    }
}
