//! Recorded outputs to disk, for somebody who asks for them by path.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{sync::mpsc, task::spawn_blocking};

use super::{Service, find::Found, show};
use crate::{
    exec_path::ExecPath,
    invocation::rows,
    materialize::{Completion, Outcome, Served, Session, Want},
    output::Class,
    proto::outhaul::v1 as pb,
    record::OutputState,
    remote::Attribution,
};

/// Outputs that one call brings to disk.
const RESULTS: usize = 1_000_000;
/// How long row updates wait, see `Stamp::recorded_at`.
const STAMP_AGE: Duration = Duration::from_millis(25);

impl Service {
    /// Brings outputs to disk; a directory stands for everything recorded below it.
    pub async fn materialize(&self, paths: Vec<String>) -> Vec<pb::materialize_response::Result> {
        let _call = self.calls.begin();
        let mut results = Vec::new();
        for path in paths {
            let asked = path.clone();
            let found = self
                .read(move |service, gone| service.find_all(&asked, gone))
                .await
                .unwrap_or_default();
            let refused = if found.is_empty() {
                Some("no recorded build has named it".to_owned())
            } else if results.len() + found.len() > RESULTS {
                Some(format!(
                    "one call materializes at most {RESULTS} outputs; request the rest in another call"
                ))
            } else {
                None
            };
            if let Some(error) = refused {
                results.push(pb::materialize_response::Result {
                    error,
                    path,
                    ..Default::default()
                });
                continue;
            }
            for (found, end) in self.fetch(found).await {
                let (outcome, error) = match &end {
                    Ok(Outcome::Downloaded { .. }) => (pb::OutputOutcome::Downloaded, String::new()),
                    Ok(Outcome::Present { .. } | Outcome::Served { .. }) => {
                        (pb::OutputOutcome::Present, String::new())
                    }
                    Ok(Outcome::Superseded) => (
                        pb::OutputOutcome::Unspecified,
                        "a newer build has started; try again when it is done".to_owned(),
                    ),
                    Ok(Outcome::Evicted(reason)) => (
                        pb::OutputOutcome::Unspecified,
                        format!("evicted from the cache: {reason}"),
                    ),
                    Ok(Outcome::Failed(reason)) | Err(reason) => {
                        (pb::OutputOutcome::Unspecified, reason.clone())
                    }
                };
                let output = show::output(&found, error.is_empty());
                results.push(pb::materialize_response::Result {
                    path: found.exec_root.join(found.path.as_path()).display().to_string(),
                    outcome: outcome.into(),
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
        let opened = spawn_blocking(move || {
            let (id, root) = roots.reopen(&exec_root)?;
            let served = Served::by_link(&root.place);
            Ok((id, root, served))
        })
        .await;
        let opened = opened.unwrap_or_else(|_| Err("opening the output root panicked".to_owned()));
        let newest = self.record.newest_invocation(id);
        let (endpoint, instance) = newest
            .as_ref()
            .map(|row| (row.remote_cache.as_str(), row.remote_instance_name.as_str()))
            .unwrap_or_default();
        let ready = opened.and_then(|(opened, root, served)| {
            if opened != id {
                return Err("the output root has been deleted and recreated since; build again".to_owned());
            }
            Ok((root, served, self.sources.of_record(endpoint, instance)?))
        });
        let (root, served, cache) = match ready {
            Ok(ready) => ready,
            Err(reason) => return found.into_iter().map(|f| (f, Err(reason.clone()))).collect(),
        };
        let (completions, mut completed) = mpsc::unbounded_channel();
        let epoch_of = root.clone();
        let session = Arc::new(Session {
            version: root.epoch.current(),
            root,
            store: cache.blobs(),
            attribution: Arc::new(Attribution {
                invocation_id: newest.map(|row| row.invocation_id).unwrap_or_default(),
                ..Attribution::default()
            }),
            served,
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
        let service = self.clone();
        let looked = spawn_blocking(move || {
            let mut placers = HashMap::new();
            found
                .into_iter()
                .partition::<Vec<Found>, _>(|found| service.is_outdated(&mut placers, found))
        });
        let (outdated, found) = looked.await.unwrap_or_default();
        let wants: Vec<Want> = found
            .iter()
            .map(|f| {
                let stamp = f.row.stamp.filter(|_| f.row.state == OutputState::Materialized);
                Want::new(f.path.clone(), f.row.content.clone(), Class::Required, stamp)
            })
            .collect();
        let mut open = wants.len();
        self.materializer.want(&session, wants).await;
        let version = session.version;
        drop(session);
        let mut ends: HashMap<ExecPath, Completion> = HashMap::new();
        while open > 0 {
            let Some(list) = completed.recv().await else { break };
            open = open.saturating_sub(list.len());
            ends.extend(list.into_iter().map(|c| (c.path.clone(), c)));
        }
        tokio::time::sleep(STAMP_AGE).await;
        let claimed = spawn_blocking(move || epoch_of.epoch.claimed());
        let is_followed_elsewhere = claimed.await.is_ok_and(|claimed| claimed > version);
        let (record, list) = (self.record.clone(), ends.values().cloned().collect::<Vec<_>>());
        if spawn_blocking(move || rows::conclude(&record, id, version, &list))
            .await
            .is_err_and(|e| e.is_panic())
        {
            tracing::error!("recording completions panicked; this is a bug in outhaul");
        }
        let outdated = outdated.into_iter().map(|found| {
            let reason = "left unchanged: the file on disk is newer than this output, which only Bazel's \
                          action cache names";
            (found, Err(reason.to_owned()))
        });
        let fetched = found.into_iter().map(|f| {
            let end = match ends.remove(&f.path).map(|c| c.outcome) {
                Some(Outcome::Superseded) if is_followed_elsewhere => Err(
                    "another outhaul process has handled a newer build of this output root, so this record \
                         of its outputs is out of date; ask that process, or build again"
                        .to_owned(),
                ),
                end => end.ok_or_else(|| "it was requested twice".to_owned()),
            };
            (f, end)
        });
        fetched.chain(outdated).collect()
    }
}
