//! Recorded outputs by the paths that users give.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use tokio_util::sync::CancellationToken;

use super::Service;
use crate::{
    exec_path::ExecPath,
    invocation::rows,
    materialize::place::{Check, PlaceOptions, Placer},
    output::OutputContent,
    record::{OutputRow, RootId},
};

/// A recorded output, found by the path that a user gave.
pub(super) struct Found {
    pub(super) root: RootId,
    pub(super) exec_root: PathBuf,
    pub(super) path: ExecPath,
    pub(super) row: OutputRow,
}

impl Service {
    /// The recorded output at an absolute path, or at an exec path in the root whose newest invocation is newest.
    pub(super) fn find(&self, path: &str, only: Option<RootId>) -> Option<Found> {
        let mut best: Option<(u64, Found)> = None;
        for (root, exec_path, exec_root, version) in self.places(path) {
            if only.is_some_and(|only| only != root) {
                continue;
            }
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
    pub(super) fn find_all(&self, path: &str, gone: &CancellationToken) -> Vec<Found> {
        if let Some(found) = self.find(path, None)
            && found.row.content != OutputContent::Directory
        {
            return vec![found];
        }
        let mut places = self.places(path);
        places.sort_by_key(|(.., version)| std::cmp::Reverse(*version));
        for (root, exec_path, exec_root, _) in places {
            let mut below: Vec<Found> = self
                .record
                .scan_outputs(root, &exec_path)
                .take_while(|_| !gone.is_cancelled())
                .filter(|(path, _)| path.starts_with(&exec_path))
                .map(|(path, row)| Found {
                    root,
                    exec_root: exec_root.clone(),
                    path,
                    row,
                })
                .collect();
            // What no event names is brought with a tree of its own, but not with everything around it.
            if below.iter().any(|found| !rows::is_unasked(&found.row)) {
                below.retain(|found| !rows::is_unasked(&found.row));
            }
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

    pub(super) fn is_present(&self, placers: &mut HashMap<RootId, Option<Placer>>, found: &Found) -> bool {
        matches!(self.check(placers, found), Some(Check::Present { .. }))
    }

    /// Whether something lies in an output's place that is newer than what is known of it: what the action cache alone
    /// tells replaces nothing.
    pub(super) fn is_outdated(&self, placers: &mut HashMap<RootId, Option<Placer>>, found: &Found) -> bool {
        *found.row.event == *rows::ACTION_CACHE && self.check(placers, found) == Some(Check::Differs)
    }

    fn check(&self, placers: &mut HashMap<RootId, Option<Placer>>, found: &Found) -> Option<Check> {
        let placer = placers.entry(found.root).or_insert_with(|| {
            let (_, root) = self.roots.reopen(&found.exec_root).ok()?;
            Some(Placer::new(root.place.clone(), PlaceOptions::default()))
        });
        let stamp = found.row.stamp.as_ref();
        placer
            .as_mut()?
            .check(&found.path, &found.row.content, stamp)
            .ok()
    }
}
