//! Recorded outputs to disk, for somebody who asks for them by path.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::Arc,
};

use indexmap::IndexMap;
use tokio::task::spawn_blocking;

use super::{Service, find::Found, show};
use crate::{
    exec_path::ExecPath,
    invocation::{Engine, elsewhere::Elsewhere, rows},
    materialize::{Completion, Counted, Outcome, Root, Served, Session, Want},
    output::Class,
    proto::outhaul::v1 as pb,
    record::{InvocationState, OutputState, RootId, Which},
    remote::Attribution,
    roots::RootError,
    sources::{SourceCache, SourceError},
    stage::StageError,
};

/// Outputs that one call brings to disk.
const RESULTS: usize = 1_000_000;

/// Why an output was not requested.
#[derive(Debug, thiserror::Error)]
pub(super) enum MaterializeError {
    #[error(transparent)]
    Root(#[from] RootError),
    #[error("the output root has been deleted and recreated since; build again")]
    Recreated,
    #[error(
        "the output root has been deleted, such as by `bazel clean`; build again, or copy outputs with `outhaul stage --to \
         DIR`"
    )]
    Deleted,
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("outhaul stopped before it came; try again")]
    Unanswered,
    #[error(
        "another outhaul process has handled a newer build of this output root, so this record of its outputs is out of \
         date; ask that process, or build again"
    )]
    OtherProcess,
    #[error("left unchanged: the file on disk is another one and may be newer, since {0}")]
    Outdated(Unnamed),
}

/// Why the newest build is not known to have named an output.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum Unnamed {
    #[error("no event of the newest build names this output; remove the file to download what is recorded")]
    ByNone,
    #[error(
        "the newest build is still running and may not have named all of its outputs; try again when it has ended"
    )]
    Yet,
    #[error("what the newest build names is unknown ({0}); remove the file to download what is recorded")]
    Unknown(Arc<StageError>),
    #[error(
        "what the newest build names is unknown (no journal is kept); remove the file to download what is recorded"
    )]
    Unkept,
    #[error("the newest build of this output root is unknown; remove the file to download what is recorded")]
    NoBuild,
}

/// What a path that was asked for stands for.
enum Asked {
    /// Nothing, and why.
    Refused(String, String),
    /// These outputs.
    Outputs(Vec<(RootId, ExecPath)>),
}

/// How an output ended, for its caller: the outcome if it is on disk, and why not otherwise.
fn answer(end: &Result<Outcome, Arc<MaterializeError>>) -> (pb::OutputOutcome, String) {
    let outcome = match end {
        Ok(outcome) => outcome,
        Err(error) => return (pb::OutputOutcome::Unspecified, error.to_string()),
    };
    let error = match outcome.state() {
        Some(OutputState::Materialized | OutputState::Known) => {
            return match outcome {
                Outcome::Downloaded { .. } => (pb::OutputOutcome::Downloaded, String::new()),
                _ => (pb::OutputOutcome::Present, String::new()),
            };
        }
        Some(OutputState::Evicted) => format!("evicted from the cache: {}", outcome.reason()),
        Some(OutputState::Failed) => outcome.reason().to_owned(),
        None => "a newer build has started; try again when it is done".to_owned(),
    };
    (pb::OutputOutcome::Unspecified, error)
}

impl Service {
    /// Brings outputs to disk; a directory stands for everything recorded below it. The answers are in the order of the
    /// paths.
    pub async fn materialize(&self, paths: Vec<String>) -> Vec<pb::materialize_response::Result> {
        self.materialize_counted(paths, &Arc::default()).await
    }

    /// The same, counting how far it is.
    pub(in crate::control) async fn materialize_counted(
        &self,
        paths: Vec<String>,
        counted: &Arc<Counted>,
    ) -> Vec<pb::materialize_response::Result> {
        self.catch_up().await;
        let _call = self.calls.token();
        let (asked, by_root) = self.look_up(paths).await;
        let mut got = HashMap::new();
        for found in by_root.into_values() {
            for (found, end) in self.fetch(found, counted).await {
                let (outcome, error) = answer(&end);
                let result = pb::materialize_response::Result {
                    path: found.exec_root.join(found.path.as_path()).display().to_string(),
                    outcome: outcome.into(),
                    output: Some(show::output(&found, error.is_empty())),
                    error,
                };
                got.insert((found.root, found.path), result);
            }
        }
        let unanswered = |path: &ExecPath| pb::materialize_response::Result {
            path: path.to_string(),
            error: MaterializeError::Unanswered.to_string(),
            ..Default::default()
        };
        let answers = asked.into_iter().flat_map(|asked| match asked {
            Asked::Refused(path, error) => vec![pb::materialize_response::Result {
                error,
                path,
                ..Default::default()
            }],
            Asked::Outputs(outputs) => {
                let answers = outputs.into_iter().map(|output| {
                    let result = got.get(&output).cloned();
                    result.unwrap_or_else(|| unanswered(&output.1))
                });
                answers.collect()
            }
        });
        answers.collect()
    }

    /// Finds what paths stand for: for each of them, and once for each root, where it can be fetched together.
    async fn look_up(&self, paths: Vec<String>) -> (Vec<Asked>, IndexMap<RootId, Vec<Found>>) {
        let mut asked = Vec::with_capacity(paths.len());
        let mut by_root = IndexMap::<RootId, Vec<Found>>::new();
        let (mut known, mut count) = (HashSet::new(), 0);
        for path in paths {
            let wanted = path.clone();
            let found = self
                .read(move |service, gone| service.find_all(&wanted, gone))
                .await
                .unwrap_or_default();
            if found.is_empty() {
                let wanted = path.clone();
                let reason = self.read(move |service, _| service.unnamed(&wanted)).await;
                asked.push(Asked::Refused(path, reason.unwrap_or_default()));
                continue;
            }
            if count + found.len() > RESULTS {
                let reason = format!(
                    "one call materializes at most {RESULTS} outputs; request the rest in another call"
                );
                asked.push(Asked::Refused(path, reason));
                continue;
            }
            count += found.len();
            let outputs = found.iter().map(|found| (found.root, found.path.clone()));
            asked.push(Asked::Outputs(outputs.collect()));
            for found in found {
                if known.insert((found.root, found.path.clone())) {
                    by_root.entry(found.root).or_default().push(found);
                }
            }
        }
        (asked, by_root)
    }

    /// Fetches outputs of one root.
    async fn fetch(
        &self,
        mut found: Vec<Found>,
        counted: &Arc<Counted>,
    ) -> Vec<(Found, Result<Outcome, Arc<MaterializeError>>)> {
        let Some(first) = found.first() else {
            return Vec::new();
        };
        let (id, exec_root) = (first.root, first.exec_root.clone());
        let (root, served, cache, invocation_id) = match self.place(id, exec_root).await {
            Ok(ready) => ready,
            Err(error) => {
                let error = Arc::new(error);
                return found.into_iter().map(|f| (f, Err(error.clone()))).collect();
            }
        };
        let version = root.epoch.current();
        let outdated = self.split_outdated(id, &mut found).await;
        let wants = found.iter().map(|f| {
            let stamp = f.row.stamp.filter(|_| f.row.state == OutputState::Materialized);
            Want::new(f.path.clone(), f.row.content.clone(), Class::Required, stamp)
        });
        let wants: Vec<Want> = wants.collect();
        // Offered to the cache's store until the end.
        let _elsewhere = match served {
            None => self.look_elsewhere(id, &cache, &wants).await,
            Some(_) => None,
        };
        let session = |completions| Session {
            version,
            root: root.clone(),
            store: cache.blobs(),
            attribution: Arc::new(Attribution {
                invocation_id,
                ..Attribution::default()
            }),
            trace: None,
            served,
            completions,
        };
        let request = self.materializer.request(session, wants).await;
        let mut request = request.counted_by(counted.clone());
        let mut ends: HashMap<ExecPath, Completion> = HashMap::new();
        while let Some(list) = request.next().await {
            ends.extend(list.into_iter().map(|c| (c.path.clone(), c)));
        }
        request.stamps().await;
        let claimed = spawn_blocking(move || root.epoch.claimed()).await;
        let is_followed_elsewhere = claimed.is_ok_and(|claimed| claimed > version);
        rows::conclude(&self.record, id, version, ends.values().cloned().collect()).await;
        let fetched = found.into_iter().map(|f| {
            let end = match ends.remove(&f.path).map(|c| c.outcome) {
                Some(Outcome::Superseded) if is_followed_elsewhere => Err(MaterializeError::OtherProcess),
                end => end.ok_or(MaterializeError::Unanswered),
            };
            (f, end.map_err(Arc::new))
        });
        let outdated = outdated.into_iter().map(|(found, why)| {
            let error = if is_followed_elsewhere {
                MaterializeError::OtherProcess
            } else {
                MaterializeError::Outdated(why)
            };
            (found, Err(Arc::new(error)))
        });
        fetched.chain(outdated).collect()
    }

    /// Looks for outputs that are not on disk among those of other output roots.
    async fn look_elsewhere(&self, id: RootId, cache: &SourceCache, wants: &[Want]) -> Option<Elsewhere> {
        if !self.engine.as_ref().is_some_and(Engine::has_local_sources) {
            return None;
        }
        let (record, offer, wants) = (self.record.clone(), cache.local().offer(), wants.to_vec());
        let looked = spawn_blocking(move || {
            let mut elsewhere = Elsewhere::new(&record, Some(id), offer);
            elsewhere.look_for_absent(&record, &wants);
            elsewhere
        });
        looked.await.ok()
    }

    /// The output root of a recorded build and what serves it, its cache, and the invocation to attribute requests to.
    pub(super) async fn place(
        &self,
        id: RootId,
        exec_root: PathBuf,
    ) -> Result<(Arc<Root>, Option<Served>, SourceCache, String), MaterializeError> {
        let roots = self.roots.clone();
        let opened = spawn_blocking(move || {
            let (id, root) = roots.reopen(&exec_root)?;
            let served = Served::by_link(&root.place);
            Ok((id, root, served))
        })
        .await;
        let opened = opened.unwrap_or(Err(RootError::Panicked));
        let newest = self.record.newest_invocation(id).unwrap_or_default();
        let (opened, root, served) = opened.map_err(|error| match error {
            error if error.is_not_there() => MaterializeError::Deleted,
            error => error.into(),
        })?;
        if opened != id {
            return Err(MaterializeError::Recreated);
        }
        let cache = self
            .sources
            .of_record(&newest.remote_cache, &newest.remote_instance_name)?;
        Ok((root, served, cache, newest.invocation_id))
    }

    /// Reads the rows again, as late as can be: a build may have named something else there since. Takes out what is
    /// outdated: something else lies in its place, and the newest build does not say that it should not. What the action
    /// cache alone tells, or an older build, replaces nothing.
    async fn split_outdated(&self, id: RootId, found: &mut Vec<Found>) -> Vec<(Found, Unnamed)> {
        let (service, mut all) = (self.clone(), std::mem::take(found));
        let looked = spawn_blocking(move || {
            let paths: Vec<ExecPath> = all.iter().map(|f| f.path.clone()).collect();
            for (found, row) in all.iter_mut().zip(service.record.outputs(id, &paths)) {
                if let Some(row) = row {
                    found.row = row;
                }
            }
            let newest = service.record.newest_invocation(id).unwrap_or_default();
            let mut placers = HashMap::new();
            let (differing, others) = all.into_iter().partition::<Vec<Found>, _>(|found| {
                let is_its_own = *found.row.invocation_id == *newest.invocation_id;
                (!is_its_own || is_of_bazel(found)) && service.differs(&mut placers, found)
            });
            (differing, others, newest)
        });
        let Ok((differing, current, newest)) = looked.await else {
            return Vec::new();
        };
        *found = current;
        // The newest build has named it as an older one did, in most cases.
        let named = match &self.stager {
            _ if differing.iter().all(is_of_bazel) => Ok(HashSet::new()),
            // An empty id would stand for the newest build of any output root.
            _ if newest.invocation_id.is_empty() => Err(Unnamed::NoBuild),
            _ if self.is_heard(&newest.invocation_id).await => Err(Unnamed::Yet),
            None => Err(Unnamed::Unkept),
            Some(stager) => {
                let named = stager.named(&Which::of(&newest.invocation_id)).await;
                named.map_err(|error| Unnamed::Unknown(Arc::new(error)))
            }
        };
        let mut outdated = Vec::new();
        for differing in differing {
            match &named {
                _ if is_of_bazel(&differing) => outdated.push((differing, Unnamed::ByNone)),
                Ok(named) if named.contains(differing.path.as_str()) => found.push(differing),
                Ok(_) => outdated.push((differing, Unnamed::ByNone)),
                Err(why) => outdated.push((differing, why.clone())),
            }
        }
        outdated
    }

    /// Whether events of a build still come.
    async fn is_heard(&self, invocation_id: &str) -> bool {
        match &self.engine {
            Some(engine) => engine
                .snapshot(invocation_id)
                .await
                .is_some_and(|(row, _)| row.state == InvocationState::Running),
            None => false,
        }
    }
}

fn is_of_bazel(found: &Found) -> bool {
    rows::is_of_bazel(&found.row.event)
}
