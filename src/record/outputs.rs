//! Outputs in the record.

use std::{
    collections::{BTreeSet, HashSet},
    ops::ControlFlow,
    sync::Arc,
};

use super::{
    block::{Block, Builder, Row, split},
    handle::Record,
    row::{OutputRow, OutputState, RootId},
    scan::OutputScan,
};
use crate::{
    digest::Digest,
    exec_path::ExecPath,
    output::{OutputContent, Stamp},
};

/// Bytes of rows that are handed over at once; others get at the queue in between.
const HANDED_OVER: usize = 4 << 20;

/// Rows that are read and changed as one: few, so that seldom somebody else writes meanwhile.
const CHANGED_AT_ONCE: usize = 200;
/// How often it is tried.
const TRIES: usize = 20;

impl Record {
    /// What is known of some outputs of a root, in their order. Fastest when a directory's follow each other.
    pub fn outputs(&self, root: RootId, paths: &[ExecPath]) -> Vec<Option<OutputRow>> {
        let mut rows = vec![None; paths.len()];
        self.see_outputs(root, paths, |path| path, |i, row| rows[i] = row.to_row());
        rows
    }

    /// Shows what is known of outputs that each of `wanted` has the path of. Nothing is decoded that is not asked for.
    pub(crate) fn see_outputs<T>(
        &self,
        root: RootId,
        wanted: &[T],
        path: impl Fn(&T) -> &ExecPath,
        see: impl FnMut(usize, Row<'_>),
    ) {
        self.shared()
            .look_up_outputs(root, wanted, |wanted| path(wanted).as_str(), see);
    }

    /// What is known of an output.
    pub fn output(&self, root: RootId, path: &ExecPath) -> Option<OutputRow> {
        self.outputs(root, std::slice::from_ref(path)).pop().flatten()
    }

    /// Every output of a root whose path begins with `prefix`, byte by byte, in the order of the paths. For a
    /// directory's, end it with a slash; empty for all.
    pub fn scan_outputs(
        &self,
        root: RootId,
        prefix: &str,
    ) -> impl Iterator<Item = (ExecPath, OutputRow)> + Send + use<> {
        let mut scan = OutputScan::new(self.shared().clone(), root, prefix);
        std::iter::from_fn(move || {
            loop {
                let entry = scan.next_with(|row| Some((row.path()?, row.to_row()?)))?;
                if entry.is_some() {
                    return entry;
                }
            }
        })
    }

    /// Shows the outputs of a root that come after a path, in the order of the paths, until `see` says that it is enough.
    /// Whether they were all. Nothing is decoded that is not asked for.
    pub(crate) fn see_outputs_after(
        &self,
        root: RootId,
        path: &str,
        mut see: impl FnMut(Row<'_>) -> ControlFlow<()>,
    ) -> bool {
        let mut scan = OutputScan::after(self.shared().clone(), root, path);
        while let Some(seen) = scan.next_with(&mut see) {
            if seen.is_break() {
                return false;
            }
        }
        true
    }

    /// The outputs of a root that were named by such an event. Walks over all of them.
    pub(crate) fn outputs_named_by(&self, root: RootId, is_it: impl Fn(&str) -> bool) -> Vec<ExecPath> {
        let mut scan = OutputScan::new(self.shared().clone(), root, "");
        let mut found = Vec::new();
        while let Some(path) = scan.next_with(|row| is_it(row.event()).then(|| row.path()).flatten()) {
            found.extend(path);
        }
        found
    }

    /// The files of a root that are on record with one of these contents, each with its stamp, and how many rows were
    /// looked at. Walks over the rows, but over no more than `most`.
    pub(crate) fn files_with(
        &self,
        root: RootId,
        digests: &HashSet<&Digest>,
        most: usize,
    ) -> (Vec<(ExecPath, Digest, Stamp)>, usize) {
        let hashes: HashSet<&[u8]> = digests.iter().map(|digest| digest.hash()).collect();
        let mut scan = OutputScan::new(self.shared().clone(), root, "");
        let mut found = Vec::new();
        let mut rows = 0;
        while rows < most {
            let file = scan.next_with(|row| {
                if row.state() != OutputState::Materialized || !hashes.contains(row.hash()?) {
                    return None;
                }
                match row.parts()? {
                    (OutputContent::Blob(digest), Some(stamp), ..) => Some((row.path()?, digest, stamp)),
                    _ => None,
                }
            });
            let Some(file) = file else { break };
            rows += 1;
            found.extend(file.filter(|(_, digest, _)| digests.contains(digest)));
        }
        (found, rows)
    }

    /// Names right below a directory that outputs of a root lie below, sorted. As many look-ups as there are names.
    pub(crate) fn directories_in(&self, root: RootId, directory: &str) -> BTreeSet<String> {
        let prefix = format!("{directory}/");
        let mut names = BTreeSet::new();
        let mut from = prefix.clone();
        while let Some(next) = self.shared().next_directory(root, &from) {
            let Some(below) = next.strip_prefix(&*prefix) else {
                break;
            };
            // After the directory itself, or after everything in it: `0` follows `/`.
            let (name, after) = match below.split_once('/') {
                Some((name, _)) => (name, '0'),
                None => (below, '\u{1}'),
            };
            from = format!("{prefix}{name}{after}");
            names.insert(name.to_owned());
        }
        names
    }

    /// How many outputs of a root begin with `prefix`. Walks over them.
    pub fn count_outputs(&self, root: RootId, prefix: &str) -> usize {
        let mut scan = OutputScan::new(self.shared().clone(), root, prefix);
        std::iter::from_fn(|| scan.next_with(|_| ())).count()
    }

    /// Records outputs of a root, in place of what was known of them. They are read back at once, and written in the
    /// background. Waits up to a second for a writer that lags far behind, then drops the rows.
    pub fn put_outputs(&self, root: RootId, rows: Vec<(ExecPath, OutputRow)>) {
        self.hand_over(
            root,
            &rows,
            |(path, _)| path,
            |builder, directory, name, (_, row)| {
                builder.push(directory, name, row);
            },
        );
    }

    /// Changes outputs of a root that are known: `change` sees a row and says what it is from now on, if it is to be
    /// another. Unlike reading and then putting, this replaces nothing that it has not seen: when somebody else writes
    /// meanwhile, `change` is asked again. Those that are written all the time stay as they are.
    ///
    /// Gives back which were changed.
    pub(crate) fn update_outputs<T>(
        &self,
        root: RootId,
        wanted: &[T],
        path: impl Fn(&T) -> &ExecPath,
        mut change: impl FnMut(usize, Row<'_>) -> Option<OutputRow>,
    ) -> Vec<usize> {
        let mut changed = Vec::new();
        for (number, chunk) in wanted.chunks(CHANGED_AT_ONCE).enumerate() {
            let first = number * CHANGED_AT_ONCE;
            for _ in 0..TRIES {
                let turn = self.shared().state().queue.outputs_turn(root);
                let mut rows: Vec<(usize, OutputRow)> = Vec::new();
                self.see_outputs(root, chunk, &path, |i, seen| {
                    rows.extend(change(first + i, seen).map(|row| (i, row)));
                });
                let named: Vec<(&ExecPath, &OutputRow)> =
                    rows.iter().map(|(i, row)| (path(&chunk[*i]), row)).collect();
                let mut blocks = Vec::new();
                in_blocks(
                    &named,
                    |(path, _)| *path,
                    |builder, directory, name, (_, row)| builder.push(directory, name, row),
                    |some| blocks.extend(some),
                );
                if self.shared().put_outputs_at(root, blocks, turn) {
                    changed.extend(rows.iter().map(|(i, _)| first + i));
                    break;
                }
            }
        }
        changed
    }

    /// Forgets outputs of a root. The space on disk is used again.
    pub(crate) fn remove_outputs(&self, root: RootId, paths: &[ExecPath]) {
        self.hand_over(
            root,
            paths,
            |path| path,
            |builder, directory, name, _| {
                builder.push_removal(directory, name);
            },
        );
    }

    fn hand_over<T>(
        &self,
        root: RootId,
        changes: &[T],
        path: impl Fn(&T) -> &ExecPath,
        push: impl FnMut(&mut Builder, &Arc<str>, &str, &T),
    ) {
        in_blocks(changes, path, push, |blocks| {
            self.shared().put_outputs(root, blocks);
        });
    }
}

/// Makes blocks of changes, one for each directory, and hands them over. The last change of a path wins.
fn in_blocks<T>(
    changes: &[T],
    path: impl Fn(&T) -> &ExecPath,
    mut push: impl FnMut(&mut Builder, &Arc<str>, &str, &T),
    mut hand_over: impl FnMut(Vec<Block>),
) {
    let mut order: Vec<(&str, &str, &T)> = changes
        .iter()
        .map(|change| {
            let (directory, name) = split(path(change).as_str());
            (directory, name, change)
        })
        .collect();
    let in_order = |a: &(&str, &str, &T), b: &(&str, &str, &T)| (a.0, a.1) < (b.0, b.1);
    if !order.is_sorted_by(in_order) {
        // Stable, and turned around: the last of several of the same path comes first, and stays.
        order.reverse();
        order.sort_by(|a, b| (a.0, a.1).cmp(&(b.0, b.1)));
        order.dedup_by(|a, b| (a.0, a.1) == (b.0, b.1));
    }
    let mut blocks: Vec<Block> = Vec::new();
    let mut bytes = 0;
    for rows in order.chunk_by(|a, b| a.0 == b.0) {
        let directory: Arc<str> = rows[0].0.into();
        let mut builder = Builder::default();
        for (_, name, change) in rows {
            if builder.size() > HANDED_OVER {
                blocks.push(std::mem::take(&mut builder).finish());
                hand_over(std::mem::take(&mut blocks));
                bytes = 0;
            }
            push(&mut builder, &directory, name, change);
        }
        bytes += builder.size();
        blocks.push(builder.finish());
        if bytes > HANDED_OVER {
            hand_over(std::mem::take(&mut blocks));
            bytes = 0;
        }
    }
    hand_over(blocks);
}
