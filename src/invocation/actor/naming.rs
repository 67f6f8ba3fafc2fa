//! What the stream's effects do: outputs become rows of the record and wants of the coordinator.

use std::{collections::BTreeSet, sync::Arc};

use tokio::task::spawn_blocking;

use super::{
    super::{
        build::{Effect, Named, TargetEnd},
        feed::Change,
        rows::{self, Naming},
    },
    Actor, again,
    parts::Place,
};
use crate::{
    bep::{commands::has_outputs, event::TargetId},
    exec_path::ExecPath,
    materialize::{Served, Session, Want},
    output::{Class, OutputContent},
    remote::{Attribution, Nowhere},
    roots::Destination,
    sources::{BuildDirectories, SourceCache},
    transport::without_user_info,
};

impl Actor {
    pub(super) async fn apply(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Started(started) => {
                    self.row.command = started.command;
                    self.row.workspace = started.workspace;
                    self.working_directory = started.working_directory;
                    // The build tool's word, as far as it can be true: a clock that is ahead must not make this the
                    // newest build for years. Read again from the journal, it stays what it was.
                    let now = crate::units::now_ms();
                    if self.row.started_ms == 0 || started.started_ms <= now {
                        self.row.started_ms = started.started_ms.clamp(0, now.max(0));
                    }
                    self.row.build_tool_version = started.build_tool_version;
                    self.look_after =
                        self.doubt.is_some() || again::deletes_at_its_end(&self.row.build_tool_version);
                    self.save_row();
                    let begun = Change::Begun {
                        workspace: self.row.workspace.clone(),
                        command: self.row.command.clone(),
                    };
                    self.tell(None, &begun);
                }
                Effect::ExecRoot(path) => self.exec_root(path).await,
                Effect::CommandLine(line) => self.command_line = Some(line),
                Effect::Announced(targets) => self.announce(targets),
                Effect::Outputs(target, named) => self.outputs(target, named).await,
                Effect::Target(target, end, sequence) => self.target_ended(target, end, sequence),
                Effect::Tested(target, sequence) => self.ledger.course.completed(sequence, target),
                Effect::ConvenienceSymlinks(_) => {}
                Effect::Unnamed(paths) => self.unnamed(paths).await,
                Effect::Refused(reason) => {
                    self.shared.metrics.fault("refused_output");
                    tracing::warn!(invocation = %self.row.invocation_id, "{reason}");
                    self.ledger.tally.note(&reason);
                }
                Effect::Undigested(target, outputs) => self.undigested(&target, outputs),
                Effect::Unusable(class, reason) => {
                    self.shared.metrics.fault("refused_output");
                    tracing::warn!(invocation = %self.row.invocation_id, "{reason}");
                    match class {
                        Class::Known => self.ledger.tally.note(&reason),
                        class => self.fail(class, &reason),
                    }
                }
                Effect::Authority(authority) => self.check_authority(&authority),
                Effect::Finished { exit_code } => {
                    self.row.exit_code = exit_code;
                    self.row.finished = true;
                    self.save_row();
                }
            }
        }
    }

    /// Opens the exec root, or leaves that to the first outputs: behind a `clean`, Bazel 4 makes it only after it has
    /// named it, when it begins to execute. A root that is not there has no older work to be stopped either.
    async fn exec_root(&mut self, path: String) {
        self.row.exec_root.clone_from(&path);
        let (shared, looked) = (self.shared.clone(), path.clone());
        let there = spawn_blocking(move || shared.roots.is_there(&looked)).await;
        // What only asks about the build, and has no outputs, does not end the downloads of one that has.
        if has_outputs(&self.row.command) && there.unwrap_or(true) {
            self.open_root(path).await;
        } else {
            self.awaited_root = Some(path);
        }
    }

    pub(super) async fn open_root(&mut self, path: String) {
        let shared = self.shared.clone();
        let opened = spawn_blocking(move || shared.roots.open(&path)).await;
        let (id, root) = match opened.unwrap_or_else(|_| Err("opening the output root panicked".to_owned())) {
            Ok(opened) => opened,
            Err(reason) => {
                self.block(reason);
                return;
            }
        };
        self.row.exec_root = root.place.path().display().to_string();
        self.row.root = Some(id);
        let parted = self.parted.take();
        if parted.as_ref().is_none_or(|parted| parted.root != root.id) {
            self.fill_row();
            let left = parted.map(|parted| parted.left);
            let (roots, materializer) = (&self.shared.roots, &self.shared.materializer);
            match roots.begin(materializer, (id, &root), &mut self.row, left).await {
                Ok(true) => {}
                Ok(false) => self.doubt(root.clone()),
                Err(error) => return self.block(error.to_string()),
            }
        }
        let version = self.row.version;
        self.place = Some(Place { id, root, version });
    }

    pub(super) fn block(&mut self, reason: String) {
        tracing::error!(invocation = %self.row.invocation_id, "not downloading any outputs: {reason}");
        self.ledger.tally.note(&reason);
        self.blocked = Some(reason);
    }

    /// The way to the cache, opened when the first outputs are wanted: by then the build has told its command line.
    pub(super) async fn session(&mut self) -> Option<Arc<Session>> {
        if let Some(session) = &self.session {
            return Some(session.clone());
        }
        let served = self.served().await;
        let place = self.place.as_ref()?;
        let store = match self.source() {
            Ok(cache) => {
                self.row.remote_cache.clone_from(&cache.endpoint);
                self.row.remote_instance_name.clone_from(&cache.instance_name);
                for option in cache.left_out() {
                    let told = format!("not using one of the build's options for its remote cache: {option}");
                    tracing::warn!(invocation = %self.row.invocation_id, "{told}");
                    self.ledger.tally.note(&told);
                }
                if served.is_some() {
                    cache.remote_blobs()
                } else {
                    cache.blobs()
                }
            }
            // What is there is there, no matter who brought it. What is not fails, and for this reason.
            Err(reason) => {
                tracing::warn!(invocation = %self.row.invocation_id, "no remote cache: {reason}");
                Arc::new(Nowhere(reason))
            }
        };
        let session = Arc::new(Session {
            root: place.root.clone(),
            version: place.version,
            store,
            attribution: Arc::new(Attribution {
                invocation_id: self.row.invocation_id.clone(),
                build_id: self.row.build_id.clone(),
                target: String::new(),
            }),
            served,
            completions: self.completions.clone(),
        });
        self.session = Some(session.clone());
        Some(session)
    }

    /// Whether somebody else has the build's outputs, and says so: an output service by the command line, or whatever
    /// `bazel-out` leads to. Bazel makes that link before it executes anything, so it is there when outputs are named.
    async fn served(&mut self) -> Option<Served> {
        if self.shared.roots.rules().destination != Destination::ExecRoot {
            return None;
        }
        let line = self.command_line.as_ref();
        let service = line.and_then(|line| line.given("experimental_remote_output_service"));
        let mut served = match service {
            Some(address) => Served {
                by: format!("the output service {}", without_user_info(address)),
                warm: false,
            },
            None => {
                let root = self.place.as_ref()?.root.clone();
                spawn_blocking(move || Served::by_link(&root.place))
                    .await
                    .ok()??
            }
        };
        served.warm = self.build.warms_output_service();
        let but = if served.warm {
            "; outhaul only reads their blobs from the cache"
        } else {
            ""
        };
        let told = format!(
            "{} provides this build's outputs: outputs that can be read there count as present, and outhaul \
             writes none{but}",
            served.by
        );
        tracing::info!(invocation = %self.row.invocation_id, "{told}");
        self.ledger.tally.note(&told);
        Some(served)
    }

    /// The build's cache, by its own command line or by our settings.
    fn source(&self) -> Result<SourceCache, String> {
        let rules = self.shared.roots.rules();
        let workspace = rules.translate(&self.row.workspace);
        let working_directory = match self.working_directory.as_str() {
            "" => workspace.clone(),
            directory => rules.translate(directory),
        };
        let directories = BuildDirectories {
            workspace,
            working_directory,
        };
        self.shared
            .sources
            .of_build(self.command_line.as_ref(), &directories)
    }

    fn check_authority(&self, authority: &str) {
        if let Ok(cache) = self.source()
            && cache
                .address()
                .is_some_and(|address| address.authority() != authority)
        {
            tracing::info!(
                invocation = %self.row.invocation_id,
                "the stream names blobs at {authority}; downloading them from {} as configured",
                cache.endpoint
            );
        }
    }

    pub(super) async fn outputs(&mut self, target: Arc<TargetId>, mut named: Vec<Named>) {
        if let Destination::Directory { flatten: true, .. } = self.shared.roots.rules().destination {
            self.ledger.flatten(&mut named);
        }
        if let Some(path) = self.awaited_root.take() {
            self.open_root(path).await;
        }
        for reason in self.ledger.name(&target, &mut named) {
            tracing::warn!(invocation = %self.row.invocation_id, "{reason}");
        }
        let wanting = named.iter().any(|n| n.class > Class::Known);
        let session = if wanting && self.blocked.is_none() {
            self.session().await
        } else {
            None
        };
        let blocked = match session {
            Some(_) => None,
            None => Some(self.blocked.as_deref().unwrap_or("there is no output root")),
        };
        self.ledger.want(&target, &mut named, blocked);
        self.pass_failures_on();
        let Some(place) = &self.place else { return };
        let naming = Naming {
            root: place.id,
            version: place.version,
            invocation: self.row.invocation_id.as_str().into(),
            target,
        };
        self.unasked.push((naming, named, session.is_some()));
    }

    /// Records what was named, and then wants what is wanted of it. Not for each target by itself: the way to another
    /// thread and back costs more than the work for a small one.
    pub(super) async fn ask(&mut self) {
        if self.unasked.is_empty() {
            return;
        }
        let (record, unasked) = (self.shared.record.clone(), std::mem::take(&mut self.unasked));
        let absorb = move || {
            let mut all = Vec::new();
            for (naming, named, wanted) in unasked {
                let wants = rows::absorb(&record, &naming, named);
                if wanted {
                    all.extend(wants);
                }
            }
            all
        };
        let wants = match spawn_blocking(absorb).await {
            Ok(wants) => wants,
            Err(error) => {
                if error.is_panic() {
                    tracing::error!("recording outputs panicked; this is a bug in outhaul");
                }
                return;
            }
        };
        if let Some(session) = &self.session {
            self.shared.materializer.want(session, wants).await;
        }
    }

    /// Outputs that the build tool could not name, because their directories were deleted. What they should hold is not
    /// known from this stream, and what an earlier one said may be out of date; but with their directories made again,
    /// the next build names them.
    async fn unnamed(&mut self, paths: Vec<ExecPath>) {
        let mut directories = BTreeSet::new();
        for path in paths {
            if self.ledger.wanted.contains_key(&path) {
                continue;
            }
            self.fail(
                Class::Required,
                &format!(
                    "{path}: the build tool could not name it because its directory had been deleted; outhaul \
                     recreates the directory, so build again"
                ),
            );
            directories.extend(path.parent().and_then(|parent| ExecPath::new(parent).ok()));
        }
        if directories.is_empty() || self.blocked.is_some() {
            return;
        }
        let Some(session) = self.session().await else {
            return;
        };
        let wants = directories
            .into_iter()
            .map(|path| Want::new(path, OutputContent::Directory, Class::Optional, None))
            .collect();
        // Their ends are of no interest: nothing is recorded of them.
        self.shared.materializer.want(&session, wants).await;
    }

    /// Counts what cannot be downloaded whatever the cache does, as of the event that was taken in last.
    pub(super) fn fail(&mut self, class: Class, reason: &str) {
        self.ledger.fail(class, reason);
        self.pass_failures_on();
    }

    /// Who waits for a label waits for it in all its configurations.
    fn announce(&mut self, targets: Vec<TargetId>) {
        for target in targets {
            if let Some(index) = self.ledger.announce(target) {
                self.tell_target(index);
            }
        }
    }

    fn target_ended(&mut self, target: Arc<TargetId>, end: TargetEnd, sequence: i64) {
        if let Some(index) = self.ledger.target_ended(target, end, sequence) {
            self.tell_target(index);
        }
    }
}
