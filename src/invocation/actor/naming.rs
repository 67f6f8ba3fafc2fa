//! What the stream's effects do: outputs become rows of the record and wants of the coordinator.

use std::{
    collections::{BTreeSet, HashSet},
    hash::BuildHasher as _,
    sync::Arc,
};

use tokio::task::spawn_blocking;

use super::{
    super::{
        build::{Effect, Named, TargetEnd, contradiction, take_contradicting},
        feed::Change,
        roots::Destination,
        rows::{self, Naming},
        selection::builds,
        sources::{BuildDirectories, SourceCache},
    },
    Actor, PathHasher, again,
    parts::{Place, Wanted},
};
use crate::{
    bep::event::TargetId,
    exec_path::{ExecPath, is_reserved},
    materialize::{Served, Session, Want},
    output::{Class, OutputContent},
    record::{TargetRow, TargetState},
    remote::{Attribution, Nowhere, without_user_info},
};

/// The row of a target of which nothing more is known.
fn announced(target: &TargetId) -> TargetRow {
    TargetRow {
        label: target.label.clone(),
        aspect: target.aspect.clone(),
        configuration: target.configuration.clone(),
        ..TargetRow::default()
    }
}

/// Leaves the first of what has the same path. Gives what has other content than that.
fn drop_repeated(named: &mut Vec<Named>) -> Vec<Named> {
    let mut seen = HashSet::with_capacity_and_hasher(named.len(), PathHasher::default());
    let first: Vec<bool> = named.iter().map(|n| seen.insert(n.path.as_str())).collect();
    // They are large; nearly always each is there once.
    if !first.contains(&false) {
        return Vec::new();
    }
    let contradicting = take_contradicting(named);
    let mut seen = HashSet::with_capacity_and_hasher(named.len(), PathHasher::default());
    named.retain(|n| seen.insert(n.path.clone()));
    contradicting
}

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
                Effect::Tested(target, sequence) => self.course.completed(sequence, target),
                Effect::ConvenienceSymlinks(_) => {}
                Effect::Unnamed(paths) => self.unnamed(paths).await,
                Effect::Refused(reason) => {
                    self.shared.metrics.fault("refused_output");
                    tracing::warn!(invocation = %self.row.invocation_id, "{reason}");
                    self.tally.note(&reason);
                }
                Effect::Undigested(target, outputs) => self.undigested(&target, outputs),
                Effect::Unusable(class, reason) => {
                    self.shared.metrics.fault("refused_output");
                    tracing::warn!(invocation = %self.row.invocation_id, "{reason}");
                    match class {
                        Class::Known => self.tally.note(&reason),
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
        if builds(&self.row.command) && there.unwrap_or(true) {
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
        for old in self.shared.roots.take_retired() {
            self.shared.materializer.forget(&old).await;
        }
        self.row.exec_root = root.place.path().display().to_string();
        self.row.root = Some(id);
        let parted = self.parted.take();
        if parted.as_ref().is_some_and(|parted| parted.root == root.id) {
            let version = self.row.version;
            self.place = Some(Place { id, root, version });
            return;
        }
        let replayed = self.row.version != 0;
        let version = match self.row.version {
            0 => {
                let root = root.clone();
                let claimed = spawn_blocking(move || root.epoch.claimed()).await;
                self.shared
                    .record
                    .next_version_above(id, claimed.unwrap_or_default())
            }
            replayed => replayed,
        };
        self.row.version = version;
        self.save_row();
        self.shared.materializer.begin(&root, version).await;
        let (claimed, invocation_id) = (root.clone(), self.row.invocation_id.clone());
        match spawn_blocking(move || claimed.epoch.claim(version, &invocation_id)).await {
            Ok(true) => {}
            Ok(false) => self.doubt(root.clone()),
            Err(error) if error.is_panic() => {
                tracing::error!("claiming an output root panicked; this is a bug in outhaul");
            }
            Err(_) => {}
        }
        // Only now, when nothing older is placed any more: the build has just begun, and its bazel-out may still have
        // to be made. One that comes again from the journal has had its own; if that is gone, it was cleaned.
        if version >= root.epoch.current() {
            let place = root.place.clone();
            let begun = spawn_blocking(move || match parted {
                Some(parted) => place.come_back(parted.left),
                None => place.begin_build(!replayed),
            })
            .await;
            if let Ok(Err(error)) = begun {
                self.block(error.to_string());
                return;
            }
        }
        self.place = Some(Place { id, root, version });
    }

    pub(super) fn block(&mut self, reason: String) {
        tracing::error!(invocation = %self.row.invocation_id, "not downloading any outputs: {reason}");
        self.tally.note(&reason);
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
                    self.tally.note(&told);
                }
                if served.is_some() {
                    cache.remote_blobs()
                } else {
                    cache.blobs()
                }
            }
            // What is there is there, whoever brought it. What is not fails, and for this reason.
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
        self.tally.note(&told);
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
            self.flatten(&mut named);
        }
        if let Some(path) = self.awaited_root.take() {
            self.open_root(path).await;
        }
        let counts = self
            .targets
            .entry(target.clone())
            .or_insert_with(|| Arc::new(announced(&target)));
        let counts = Arc::make_mut(counts);
        // A path that one target names twice counts once, as the more that it is.
        if !named.is_sorted_by(|a, b| a.class >= b.class) {
            named.sort_by_key(|n| std::cmp::Reverse(n.class));
        }
        let contradicting = drop_repeated(&mut named);
        for n in &contradicting {
            match n.class {
                Class::Required => counts.required += 1,
                Class::Optional => counts.optional += 1,
                Class::Known => {}
            }
        }
        // An output that is wanted already is not asked for again, nor made less than it is.
        let (wanted, course) = (&self.wanted, &mut self.course);
        named.retain(|n| {
            let Some(old) = wanted.get(&n.path) else {
                return true;
            };
            let anew = n.class > old.class || (n.class > Class::Known && n.content != old.content);
            if !anew && n.class == Class::Required && old.target != target {
                if !old.done {
                    course.share(&n.path, &target);
                } else if !old.on_disk {
                    counts.failed += 1;
                }
            }
            anew
        });
        for n in &named {
            let hash = || self.known.hasher().hash_one(n.path.as_str());
            match n.class {
                // Other sets, groups and targets may have named it before.
                Class::Known => {
                    let hash = hash();
                    if self.known.insert(hash) {
                        counts.known += 1;
                        self.tally.known += 1;
                    }
                }
                class => {
                    if class == Class::Required {
                        counts.required += 1;
                    } else {
                        counts.optional += 1;
                    }
                    let hash = if self.known.is_empty() { None } else { Some(hash()) };
                    if hash.is_some_and(|hash| self.known.remove(&hash)) {
                        self.tally.known -= 1;
                    }
                }
            }
        }
        for n in contradicting {
            let reason = contradiction(&n.path);
            tracing::warn!(invocation = %self.row.invocation_id, "{reason}");
            match n.class {
                Class::Known => self.tally.note(&reason),
                _ => self.refuse(&target, &n, &reason),
            }
        }
        let wanting = named.iter().any(|n| n.class > Class::Known);
        let session = if wanting && self.blocked.is_none() {
            self.session().await
        } else {
            None
        };
        let mut refused = HashSet::new();
        for n in named.iter().filter(|n| n.class > Class::Known) {
            let wanted = &self.wanted;
            let is_file = |path: &str| {
                let there = wanted.get(path);
                there.is_some_and(|there| there.content != OutputContent::Directory)
            };
            let reason = if session.is_none() {
                let reason = self.blocked.as_deref().unwrap_or("there is no output root");
                Some(format!("{}: {reason}", n.path))
            } else {
                let taken_in = self.directories.take_in(&n.path, &n.content, is_file);
                taken_in.err().inspect(|_| {
                    refused.insert(n.path.clone());
                })
            };
            if let Some(reason) = reason {
                self.refuse(&target, n, &reason);
                continue;
            }
            let wanted = Wanted {
                content: n.content.clone(),
                class: n.class,
                target: target.clone(),
                sequence: n.sequence,
                set: n.set,
                done: false,
                on_disk: false,
            };
            let old = self.wanted.insert(n.path.clone(), wanted);
            if old.as_ref().is_some_and(|old| !old.content.is_same(&n.content)) {
                self.tally.note(&format!(
                    "{}: the build names it again with other content, which it ended with",
                    n.path
                ));
            }
            // Its earlier want will be answered as well, and must not count twice.
            match old.filter(|old| !old.done).map(|old| (old.class, old.sequence)) {
                Some((Class::Required, sequence)) => {
                    self.pending_required -= 1;
                    self.course.end(sequence);
                }
                Some(_) => self.pending_optional -= 1,
                None => {}
            }
            match n.class {
                Class::Required => {
                    self.pending_required += 1;
                    self.course.begin(n.sequence);
                }
                _ => self.pending_optional += 1,
            }
        }
        // Of two that contradict each other, the one that was named first counts.
        if !refused.is_empty() {
            named.retain(|n| !refused.contains(&n.path));
        }
        let Some(place) = &self.place else { return };
        let naming = Naming {
            root: place.id,
            version: place.version,
            invocation: self.row.invocation_id.as_str().into(),
            target,
        };
        self.unasked.push((naming, named, session.is_some()));
    }

    /// An output that a target names has failed, whatever is in the cache.
    fn refuse(&mut self, target: &Arc<TargetId>, named: &Named, reason: &str) {
        self.tally.fail(named.class, reason);
        if named.class == Class::Required {
            self.output_failed(named.sequence, named.set);
            if let Some(row) = self.targets.get_mut(target) {
                Arc::make_mut(row).failed += 1;
            }
        }
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

    /// Outputs that the build tool could not name, because their directories were deleted. What they should hold is
    /// not to be had from this stream, and what an earlier one said may be out of date; but with their directories made
    /// again, the next build names them.
    async fn unnamed(&mut self, paths: Vec<ExecPath>) {
        let mut directories = BTreeSet::new();
        for path in paths {
            if self.wanted.contains_key(&path) {
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

    /// Gives every output its bare file name; two of one name are an error that names both, unless
    /// they have the same content.
    fn flatten(&mut self, named: &mut Vec<Named>) {
        named.retain_mut(|n| {
            // Only what goes there takes a name.
            if n.class == Class::Known {
                return true;
            }
            // A file name is a path of one component, and cannot escape.
            let Ok(flat) = ExecPath::new(n.path.file_name()) else {
                return false;
            };
            let refused = match self.flattened.get(&flat) {
                Some((other, content)) if *other != n.path && !content.is_same(&n.content) => {
                    format!("{other} and {} have the same name", n.path)
                }
                _ if is_reserved(flat.as_str()) => {
                    format!(
                        "{} has a name that is reserved for outhaul; do not use --flatten",
                        n.path
                    )
                }
                _ => {
                    self.flattened
                        .insert(flat.clone(), (n.path.clone(), n.content.clone()));
                    n.path = flat;
                    return true;
                }
            };
            self.tally.fail(n.class, &refused);
            if n.class == Class::Required {
                self.output_failed(n.sequence, n.set);
            }
            false
        });
    }

    /// Counts what can't be had whatever the cache does, as of the event that was taken in last.
    pub(super) fn fail(&mut self, class: Class, reason: &str) {
        self.tally.fail(class, reason);
        if class == Class::Required {
            self.output_failed(self.course.taken(), None);
        }
    }

    /// Who waits for a label waits for it in all its configurations.
    fn announce(&mut self, targets: Vec<TargetId>) {
        for target in targets {
            if self.targets.contains_key(&target) {
                continue;
            }
            let row = Arc::new(announced(&target));
            let (index, _) = self.targets.insert_full(Arc::new(target), row);
            self.tell_target(index);
        }
    }

    fn target_ended(&mut self, target: Arc<TargetId>, end: TargetEnd, sequence: i64) {
        let entry = self.targets.entry(target.clone());
        let index = entry.index();
        let row = Arc::make_mut(entry.or_insert_with(|| Arc::new(announced(&target))));
        match end {
            TargetEnd::Completed {
                success,
                awaits_tests,
            } => {
                row.success = success;
                row.state = if success {
                    TargetState::Completed
                } else {
                    TargetState::Failed
                };
                if !awaits_tests {
                    self.course.completed(sequence, target);
                }
            }
            // It can come once more behind the end of the build (Bazel issue 21767); what is complete stays so.
            TargetEnd::Aborted if row.state == TargetState::Announced => row.state = TargetState::Aborted,
            TargetEnd::Aborted => return,
        }
        self.tell_target(index);
    }
}
