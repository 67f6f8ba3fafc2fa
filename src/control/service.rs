//! What the control API answers, behind whatever carries it: the daemon's socket, or a command that opens the record
//! itself because no daemon runs.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{sync::mpsc, task::spawn_blocking};

use crate::{
    digest::{Digest, DigestFunction},
    exec_path::ExecPath,
    invocation::{Engine, roots::Roots, rows, sources::Sources, tally::Tally},
    materialize::{
        Completion, Materializer, Outcome, Session, Want,
        place::{Check, PlaceOptions, Placer},
    },
    output::{Class, OutputContent},
    proto::outhaul::v1 as pb,
    record::{InvocationRow, InvocationState, OutputRow, OutputState, Record, RootId},
    remote::Attribution,
    stage::Stager,
};

/// Invocations that are listed unless asked otherwise.
const LIST: usize = 50;
/// How long row updates wait, see `Stamp::vouches_for`.
const STAMP_AGE: Duration = Duration::from_millis(25);

/// The control API's answers. Cheap to clone.
#[derive(Clone)]
pub struct Service {
    record: Record,
    materializer: Materializer,
    roots: Arc<Roots>,
    sources: Arc<Sources>,
    /// None where no builds are followed.
    engine: Option<Engine>,
    /// None without a journal to stage from.
    stager: Option<Stager>,
}

/// A recorded output, found by the path that a user gave.
struct Found {
    root: RootId,
    exec_root: PathBuf,
    path: ExecPath,
    row: OutputRow,
}

impl Service {
    /// Over these rooms.
    #[must_use]
    pub fn new(
        record: Record,
        materializer: Materializer,
        roots: Arc<Roots>,
        sources: Arc<Sources>,
        engine: Option<Engine>,
    ) -> Self {
        Self {
            record,
            materializer,
            roots,
            sources,
            engine,
            stager: None,
        }
    }

    /// With a directory of journals to stage from.
    #[must_use]
    pub fn with_journal(mut self, directory: PathBuf) -> Self {
        self.stager = Some(Stager::new(
            self.record.clone(),
            self.materializer.clone(),
            self.sources.clone(),
            self.engine.clone(),
            directory,
        ));
        self
    }

    /// Stages from recorded builds, if there is a journal.
    #[must_use]
    pub const fn stager(&self) -> Option<&Stager> {
        self.stager.as_ref()
    }

    /// Lets go of the output roots' temporary directories, before the process ends. Blocks on the file system.
    pub fn let_go(&self) {
        self.roots.let_go();
    }

    /// The newest invocations.
    pub async fn invocations(&self, limit: u32) -> Vec<pb::Invocation> {
        let limit = if limit == 0 { LIST } else { limit as usize };
        let mut list = Vec::new();
        for row in self.record.invocations(limit) {
            list.push(self.present(row).await);
        }
        list
    }

    /// One invocation with its targets; the newest for an empty id.
    pub async fn invocation(&self, id: &str) -> Option<(pb::Invocation, Vec<pb::Target>)> {
        let row = if id.is_empty() {
            self.record.invocations(1).into_iter().next()?
        } else {
            self.record.invocation(id)?
        };
        let targets = self
            .record
            .targets(&row.invocation_id)
            .into_iter()
            .map(|t| pb::Target {
                state: t.state.name().to_owned(),
                label: t.label,
                aspect: t.aspect,
                configuration: t.configuration,
                success: t.success,
                required: t.required,
                optional: t.optional,
                failed: t.failed,
                known: t.known,
            });
        let targets = targets.collect();
        Some((self.present(row).await, targets))
    }

    /// A row as it is now, if its task still runs.
    async fn present(&self, row: InvocationRow) -> pb::Invocation {
        let live = match &self.engine {
            Some(engine) => engine.snapshot(&row.invocation_id).await,
            None => None,
        };
        let (row, pending) = live.unwrap_or_else(|| {
            // Its task may have ended since the row was read.
            let mut row = self.record.invocation(&row.invocation_id).unwrap_or(row);
            if !row.state.is_over() {
                // Its process ended before it was settled.
                row.state = InvocationState::Interrupted;
            }
            (row, 0)
        });
        let tally = Tally {
            downloaded: row.downloaded,
            downloaded_bytes: row.downloaded_bytes,
            present: row.present,
            failed: row.failed,
            known: row.known,
            superseded: row.superseded,
            ..Tally::default()
        };
        pb::Invocation {
            summary: tally.summary(Duration::from_micros(row.hold_us)),
            invocation_id: row.invocation_id,
            build_id: row.build_id,
            command: row.command,
            workspace: row.workspace,
            exec_root: row.exec_root,
            state: row.state.name().to_owned(),
            started_ms: row.started_ms,
            settled_ms: row.settled_ms,
            exit_code: row.finished.then_some(row.exit_code),
            downloaded: row.downloaded,
            downloaded_bytes: row.downloaded_bytes,
            present: row.present,
            failed: row.failed,
            known: row.known,
            superseded: row.superseded,
            hold_us: row.hold_us,
            errors: row.errors,
            build_tool_version: row.build_tool_version,
            remote_cache: row.remote_cache,
            remote_instance_name: row.remote_instance_name,
            pending,
        }
    }

    /// What is recorded of outputs, with their state checked against the disk; an empty entry for what is not found.
    pub async fn stat(&self, paths: Vec<String>) -> Vec<pb::Output> {
        let service = self.clone();
        let answer = spawn_blocking(move || {
            let mut placers = HashMap::new();
            paths
                .iter()
                .map(|path| match service.find(path) {
                    Some(found) => {
                        let present = service.is_present(&mut placers, &found);
                        output(&found, present)
                    }
                    None => pb::Output::default(),
                })
                .collect()
        });
        answer.await.unwrap_or_default()
    }

    /// Every recorded output of an invocation's root, the newest invocation's for an empty id; of one class, if given.
    /// Answers through the channel, which holds it back.
    ///
    /// # Errors
    /// In words: there is no such invocation, or it has no output root.
    pub async fn outputs(&self, id: &str, class: &str) -> Result<mpsc::Receiver<pb::Output>, String> {
        let row = if id.is_empty() {
            self.record.invocations(1).into_iter().next()
        } else {
            self.record.invocation(id)
        };
        let row = row.ok_or_else(|| match id {
            "" => "no invocation is recorded".to_owned(),
            id => format!("no invocation {id:?} is recorded"),
        })?;
        let exec_root = PathBuf::from(&row.exec_root);
        let (answer, outputs) = mpsc::channel(256);
        let Some(root) = row.root else {
            let named = self.named(row).await?;
            tokio::spawn(super::staging::tell(named, class.to_owned(), answer));
            return Ok(outputs);
        };
        let (service, class) = (self.clone(), class.to_owned());
        spawn_blocking(move || {
            let mut placers = HashMap::new();
            for (path, row) in service.record.scan_outputs(root, "") {
                if !class.is_empty() && row.class.name() != class {
                    continue;
                }
                let found = Found {
                    root,
                    exec_root: exec_root.clone(),
                    path,
                    row,
                };
                let present =
                    found.row.state == OutputState::Materialized && service.is_present(&mut placers, &found);
                if answer.blocking_send(output(&found, present)).is_err() {
                    break;
                }
            }
        });
        Ok(outputs)
    }

    /// Brings outputs to disk; a directory stands for everything recorded below it.
    pub async fn materialize(&self, paths: Vec<String>) -> Vec<pb::materialize_response::Result> {
        let mut results = Vec::new();
        for path in paths {
            let service = self.clone();
            let asked = path.clone();
            let found = spawn_blocking(move || service.find_all(&asked))
                .await
                .unwrap_or_default();
            if found.is_empty() {
                results.push(pb::materialize_response::Result {
                    error: "no build recorded here has named it".to_owned(),
                    path,
                    ..Default::default()
                });
                continue;
            }
            for (found, end) in self.fetch(found).await {
                let (outcome, error) = match &end {
                    Ok(Outcome::Downloaded { .. }) => ("downloaded", String::new()),
                    Ok(Outcome::Present { .. }) => ("present", String::new()),
                    Ok(Outcome::Superseded) => (
                        "",
                        "a newer build has begun; ask again once it is done".to_owned(),
                    ),
                    Ok(Outcome::Evicted(reason)) => ("", format!("evicted from the cache: {reason}")),
                    Ok(Outcome::Failed(reason)) => ("", reason.clone()),
                    Err(reason) => ("", reason.clone()),
                };
                let output = output(&found, error.is_empty());
                results.push(pb::materialize_response::Result {
                    path: found.exec_root.join(found.path.as_path()).display().to_string(),
                    outcome: outcome.to_owned(),
                    error,
                    output: Some(output),
                });
            }
        }
        results
    }

    /// Fetches outputs of one root.
    async fn fetch(&self, found: Vec<Found>) -> Vec<(Found, Result<Outcome, String>)> {
        let Some(first) = found.first() else {
            return Vec::new();
        };
        let (id, exec_root) = (first.root, first.exec_root.clone());
        let roots = self.roots.clone();
        let opened = spawn_blocking(move || roots.reopen(&exec_root)).await;
        let opened = opened.unwrap_or_else(|_| Err("opening the output root panicked".to_owned()));
        let newest = self.record.newest_invocation(id);
        let (endpoint, instance) = newest
            .as_ref()
            .map(|row| (row.remote_cache.as_str(), row.remote_instance_name.as_str()))
            .unwrap_or_default();
        let ready = opened.and_then(|(opened, root)| {
            if opened != id {
                return Err("the output root was deleted and made again since; build once more".to_owned());
            }
            Ok((root, self.sources.of_record(endpoint, instance)?))
        });
        let (root, cache) = match ready {
            Ok(ready) => ready,
            Err(reason) => return found.into_iter().map(|f| (f, Err(reason.clone()))).collect(),
        };
        let (completions, mut completed) = mpsc::unbounded_channel();
        let session = Arc::new(Session {
            version: root.epoch.current(),
            root,
            store: cache.blobs(),
            attribution: Arc::new(Attribution {
                invocation_id: newest.map(|row| row.invocation_id).unwrap_or_default(),
                ..Attribution::default()
            }),
            completions,
        });
        // As late as can be: a build may have named something else there since.
        let record = self.record.clone();
        let paths: Vec<ExecPath> = found.iter().map(|f| f.path.clone()).collect();
        let rows = spawn_blocking(move || record.outputs(id, &paths))
            .await
            .unwrap_or_default();
        let mut found = found;
        for (found, row) in found.iter_mut().zip(rows) {
            if let Some(row) = row {
                found.row = row;
            }
        }
        let wants: Vec<Want> = found
            .iter()
            .map(|f| {
                let stamp = f.row.stamp.filter(|_| f.row.state == OutputState::Materialized);
                Want::new(f.path.clone(), f.row.content.clone(), Class::Required, stamp)
            })
            .collect();
        let mut open = wants.len();
        self.materializer.want(&session, wants).await;
        drop(session);
        let mut ends: HashMap<ExecPath, Completion> = HashMap::new();
        while open > 0 {
            let Some(list) = completed.recv().await else { break };
            open = open.saturating_sub(list.len());
            ends.extend(list.into_iter().map(|c| (c.path.clone(), c)));
        }
        tokio::time::sleep(STAMP_AGE).await;
        let (record, list) = (self.record.clone(), ends.values().cloned().collect::<Vec<_>>());
        if spawn_blocking(move || rows::conclude(&record, id, &list))
            .await
            .is_err()
        {
            tracing::error!("recording completions panicked; this is a bug in outhaul");
        }
        found
            .into_iter()
            .map(|f| {
                let end = ends.remove(&f.path).map(|c| c.outcome);
                (f, end.ok_or_else(|| "it was asked for twice".to_owned()))
            })
            .collect()
    }

    /// The recorded output at an absolute path, or at an exec path in the root whose newest invocation is newest.
    fn find(&self, path: &str) -> Option<Found> {
        let mut best: Option<(u64, Found)> = None;
        for (root, exec_path, exec_root, version) in self.places(path) {
            let Ok(exec_path) = ExecPath::new(&exec_path) else {
                continue;
            };
            let Some(row) = self.record.output(root, &exec_path) else {
                continue;
            };
            if best.as_ref().is_none_or(|(newest, _)| version > *newest) {
                best = Some((
                    version,
                    Found {
                        root,
                        exec_root,
                        path: exec_path,
                        row,
                    },
                ));
            }
        }
        best.map(|(_, found)| found)
    }

    /// The output at a path, or all outputs below it.
    fn find_all(&self, path: &str) -> Vec<Found> {
        if let Some(found) = self.find(path)
            && found.row.content != OutputContent::Directory
        {
            return vec![found];
        }
        let mut places = self.places(path);
        places.sort_by_key(|(.., version)| std::cmp::Reverse(*version));
        for (root, exec_path, exec_root, _) in places {
            let below: Vec<Found> = self
                .record
                .scan_outputs(root, &exec_path)
                .filter(|(path, _)| path.starts_with(&exec_path))
                .map(|(path, row)| Found {
                    root,
                    exec_root: exec_root.clone(),
                    path,
                    row,
                })
                .collect();
            if !below.is_empty() {
                return below;
            }
        }
        Vec::new()
    }

    /// The roots that a path can lie in, with the exec path that it has there.
    fn places(&self, path: &str) -> Vec<(RootId, String, PathBuf, u64)> {
        let mut places = Vec::new();
        for (id, row) in self.record.roots() {
            let exec_root = PathBuf::from(&row.path);
            if path.starts_with('/') {
                if let Ok(below) = Path::new(path).strip_prefix(&exec_root)
                    && let Some(below) = below.to_str()
                {
                    places.push((id, below.to_owned(), exec_root, row.version));
                }
            } else {
                places.push((id, path.to_owned(), exec_root, row.version));
            }
        }
        places
    }

    fn is_present(&self, placers: &mut HashMap<RootId, Option<Placer>>, found: &Found) -> bool {
        let placer = placers.entry(found.root).or_insert_with(|| {
            let (_, root) = self.roots.reopen(&found.exec_root).ok()?;
            Some(Placer::new(root.place.clone(), PlaceOptions::default()))
        });
        placer.as_mut().is_some_and(|placer| {
            let check = placer.check(&found.path, &found.row.content, found.row.stamp.as_ref());
            matches!(check, Ok(Check::Present { .. }))
        })
    }
}

fn shown(digest: &Digest) -> pb::Digest {
    pb::Digest {
        function: digest.function().name().to_owned(),
        hash: digest.hash_hex(),
        size: digest.size(),
    }
}

fn output(found: &Found, present: bool) -> pb::Output {
    let row = &found.row;
    let mut output = pb::Output {
        exec_root: found.exec_root.display().to_string(),
        exec_path: found.path.to_string(),
        state: match row.state {
            _ if present => OutputState::Materialized.name(),
            // It was there once; somebody has deleted or changed it since.
            OutputState::Materialized => OutputState::Known.name(),
            state => state.name(),
        }
        .to_owned(),
        class: row.class.name().to_owned(),
        rule: row.rule.to_string(),
        label: row.label.to_string(),
        aspect: row.aspect.to_string(),
        output_group: row.output_group.to_string(),
        invocation_id: row.invocation_id.to_string(),
        event: row.event.to_string(),
        source: row.source.to_string(),
        materialized_at_ms: row.materialized_at_ms,
        took_us: row.took_us,
        error: row.error.clone(),
        ..Default::default()
    };
    match &row.content {
        OutputContent::Blob(digest) => {
            output.digest = Some(shown(digest));
        }
        OutputContent::Symlink(target) => output.symlink_target.clone_from(target),
        OutputContent::Directory => output.directory = true,
        OutputContent::Inline(bytes) => {
            output.digest = Some(shown(&Digest::of(DigestFunction::Sha256, bytes)));
        }
    }
    output
}
