//! What the stream's effects do: outputs become rows of the record and wants of the coordinator.

use std::{collections::BTreeSet, sync::Arc};

use tokio::task::spawn_blocking;

use super::{
    super::{
        build::{Effect, Named, TargetEnd},
        feed::Change,
        rows::{self, Naming},
    },
    Actor,
};
use crate::{
    bep::event::TargetId,
    exec_path::ExecPath,
    materialize::{Want, place::Seen},
    output::{Class, OutputContent},
    roots::Destination,
};

impl Actor {
    pub(super) async fn apply(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Started(started) => {
                    self.row.command = started.command;
                    self.row.workspace = started.workspace;
                    // The build tool's word, as far as it can be true: a clock that is ahead must not make this the
                    // newest build for years. Read again from the journal, it stays what it was.
                    let now = crate::units::now_ms();
                    if self.row.started_ms == 0 || started.started_ms <= now {
                        self.row.started_ms = started.started_ms.clamp(0, now.max(0));
                    }
                    self.row.build_tool_version = started.build_tool_version;
                    self.save_row();
                    let begun = Change::Begun {
                        workspace: self.row.workspace.clone(),
                        command: self.row.command.clone(),
                    };
                    self.notify(None, &begun);
                }
                Effect::ExecRoot(path) => self.exec_root(path).await,
                Effect::Announced(targets) => self.announce(targets),
                Effect::Outputs(target, named) => self.outputs(target, named).await,
                Effect::Target(target, end, sequence) => self.target_ended(target, end, sequence),
                Effect::Tested(target, sequence) => self.ledger.stream.completed(sequence, target),
                Effect::ConvenienceSymlinks(_) => {}
                Effect::Unnamed(paths) => self.unnamed(paths).await,
                Effect::Hollow(target) => {
                    // An alias of a source directory has no names either.
                    if self.is_package_gone(&target).await {
                        self.ledger.tally.lost += 1;
                    }
                    self.ledger.tally.note(&format!(
                        "{}: the build tool named none of its outputs, as if their directories had been deleted; if \
                         they are missing, build again without --remote_download_minimal",
                        target.label
                    ));
                }
                Effect::Refused(reason) => {
                    self.shared.metrics.fault("refused_output");
                    tracing::warn!(invocation = %self.row.invocation_id, "{reason}");
                    self.ledger.tally.note(&reason);
                }
                Effect::Undigested(target, outputs) => {
                    self.seek(
                        &target,
                        outputs.into_iter().map(|(class, path)| (class, path, None)),
                    );
                }
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

    pub(super) async fn outputs(&mut self, target: Arc<TargetId>, mut named: Vec<Named>) {
        if let Destination::Directory { flatten: true, .. } = self.shared.roots.rules().destination {
            self.ledger.flatten(&mut named);
        }
        self.open_root().await;
        for reason in self.ledger.name(&target, &mut named) {
            tracing::warn!(invocation = %self.row.invocation_id, "{reason}");
        }
        if self.site.read_only().is_some() {
            self.seek(
                &target,
                named.into_iter().map(|n| (n.class, n.path, Some(n.content))),
            );
            return;
        }
        let wanting = named.iter().any(|n| n.class > Class::Known);
        let session = if wanting && self.site.blocked().is_none() {
            self.session().await
        } else {
            None
        };
        let blocked = match session {
            Some(_) => None,
            None => Some(self.site.blocked().unwrap_or("there is no output root")),
        };
        self.ledger.want(&target, &mut named, blocked);
        self.pass_failures_on();
        let Some(place) = self.site.open_root() else {
            return;
        };
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
        let mut elsewhere = self.site.open_root_mut().and_then(|place| place.elsewhere.take());
        let absorb = move || {
            let mut all = Vec::new();
            for (naming, named, wanted) in unasked {
                let wants = rows::absorb(&record, &naming, named);
                if wanted {
                    all.extend(wants);
                }
            }
            if let Some(elsewhere) = &mut elsewhere {
                elsewhere.look(&record, &all);
            }
            (all, elsewhere)
        };
        let (wants, elsewhere) = match spawn_blocking(absorb).await {
            Ok(wanted) => wanted,
            Err(error) => {
                if error.is_panic() {
                    tracing::error!("recording outputs panicked; this is a bug in outhaul");
                }
                return;
            }
        };
        if let Some(place) = self.site.open_root_mut() {
            place.elsewhere = elsewhere;
        }
        if let Some(session) = self.site.session() {
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
            let reason = format!(
                "{path}: the build tool could not name it because its directory had been deleted; outhaul recreates the \
                 directory, so build again"
            );
            self.ledger.tally.lose(path.as_str());
            self.fail(Class::Required, &reason);
            directories.extend(path.parent().and_then(|parent| ExecPath::new(parent).ok()));
        }
        if directories.is_empty() || self.site.blocked().is_some() {
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

    /// Whether the directory of a target's package is not among the outputs.
    async fn is_package_gone(&self, target: &TargetId) -> bool {
        let program = self.build.program(target);
        let package = program.as_deref().and_then(|program| program.rsplit_once('/'));
        let package = package.and_then(|(package, _)| ExecPath::new(package).ok());
        let Some((package, place)) = package.zip(self.site.open_root()) else {
            return false;
        };
        let root = place.root.clone();
        let seen = spawn_blocking(move || root.place.see(&package)).await;
        seen.is_ok_and(|seen| seen == Seen::Nothing)
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
                self.announce_target(index);
            }
        }
    }

    fn target_ended(&mut self, target: Arc<TargetId>, end: TargetEnd, sequence: i64) {
        if let Some(index) = self.ledger.target_ended(target, end, sequence) {
            self.announce_target(index);
        }
    }
}
