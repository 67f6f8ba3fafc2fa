//! From what a stream names, and from what became of it, to rows of the record.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use tokio::task::spawn_blocking;

use super::build::Named;
use crate::{
    action_cache::{Extent, Facts, Output},
    bep::event::TargetId,
    digest::{Digest, DigestFunction},
    exec_path::ExecPath,
    materialize::{Completion, Outcome, Want},
    output::{Class, OutputContent, Stamp},
    record::{OutputRow, OutputState, Record, RootId, SeenOutput, with_fields_of},
    units::{now_ms, now_ns},
};

/// In the place of the event that has named an output: Bazel's action cache reports it.
pub(crate) const ACTION_CACHE: &str = "action_cache";
/// The same: the execution log that the build tool was told to write.
pub(crate) const EXECUTION_LOG: &str = "execution_log";
/// Why these are known.
const NAMED_BY_NONE: &str = "in Bazel's action cache; no event names it";
const SINCE_NAMED_BY_NONE: &str = "in Bazel's action cache; named by an event of an earlier build";
const LOGGED: &str = "in Bazel's execution log; no event names it";
const SINCE_LOGGED: &str = "in Bazel's execution log; named by an event of an earlier build";
/// Bytes of a file that came in an event and stay on record. Of larger ones, digest and size do: anyone who wants those
/// back when the file is gone has to find them in the cache, or build once more.
const KEPT: usize = 64 << 10;
/// Rows that are made at once, some hundred bytes each.
const TAKEN_IN_AT_ONCE: usize = 10_000;

/// Whether an output was neither wanted nor ever named: it is only in Bazel's action cache.
pub(crate) fn is_unasked(row: &OutputRow) -> bool {
    is_of_bazel(&row.event) && row.class == Class::Known && row.label.is_empty()
}

/// Whether no event names an output, but a file of the build tool's does.
pub(crate) fn is_of_bazel(event: &str) -> bool {
    matches!(event, ACTION_CACHE | EXECUTION_LOG)
}

/// The first Bazel whose action cache has digests.
const FULL_ACTION_CACHE: u32 = 7;

/// Whether only events tell what a build tool of this version has made: its action cache has no digests.
pub(crate) fn is_known_by_events_alone(build_tool_version: &str) -> bool {
    let major = build_tool_version.split('.').next();
    major
        .and_then(|major| major.parse().ok())
        .is_some_and(|major: u32| major < FULL_ACTION_CACHE)
}

/// Who names outputs.
#[derive(Debug, Clone)]
pub(super) struct Naming {
    pub(super) root: RootId,
    pub(super) version: u64,
    pub(super) invocation: Arc<str>,
    pub(super) target: Arc<TargetId>,
}

/// What was known of an output that is named again.
enum Before {
    Nothing,
    /// An output with other content.
    Other,
    /// The same, and its row stays as it is. The stamp, if it is wanted and was materialised.
    Same(Option<Stamp>),
    /// The same content, but other words about who wants it.
    Reworded(Box<OutputRow>),
}

/// What is on record in the place of bytes that are too many for it.
fn digested(content: &OutputContent) -> Option<OutputContent> {
    match content {
        OutputContent::Inline(bytes) if bytes.len() > KEPT => {
            Some(OutputContent::Blob(Digest::of(DigestFunction::Sha256, bytes)))
        }
        _ => None,
    }
}

/// Records outputs and gives back what is wanted of them, with the stamps that the record has. Rows that would stay
/// as they are, are not written again. Blocks on the record.
pub(super) fn absorb(record: &Record, naming: &Naming, named: Vec<Named>) -> Vec<Want> {
    // A newer invocation of the root has begun: what it has recorded is its own, and stays. (The versions in rows do
    // not say, since a row that would stay as it is, is not written again.)
    let superseded = record
        .root_row(naming.root)
        .is_some_and(|root| root.version > naming.version);
    let mut large: HashMap<usize, OutputContent> = named
        .iter()
        .enumerate()
        .filter_map(|(i, named)| Some((i, digested(&named.content)?)))
        .collect();
    let mut before: Vec<Before> = Vec::new();
    before.resize_with(named.len(), || Before::Nothing);
    record.see_outputs(
        naming.root,
        &named,
        |named| &named.path,
        |i, row| {
            let content = large.get(&i).unwrap_or(&named[i].content);
            before[i] = compare(&named[i], content, &row, superseded);
        },
    );
    let label: Arc<str> = naming.target.label.as_str().into();
    let aspect: Arc<str> = naming.target.aspect.as_str().into();
    let none: Arc<str> = Arc::default();
    let mut changed = Vec::new();
    let mut wants = Vec::new();
    for (i, (named, before)) in named.into_iter().zip(before).enumerate() {
        if named.class > Class::Known {
            let recorded = match &before {
                Before::Same(stamp) => *stamp,
                Before::Reworded(old) if old.state == OutputState::Materialized => old.stamp,
                _ => None,
            };
            wants.push(Want::new(
                named.path.clone(),
                named.content.clone(),
                named.class,
                recorded,
            ));
        }
        let old = match before {
            Before::Same(_) => continue,
            Before::Other if superseded => continue,
            Before::Nothing | Before::Other => None,
            Before::Reworded(old) => Some(*old),
        };
        let mut row = OutputRow {
            content: large.remove(&i).unwrap_or(named.content),
            state: OutputState::Known,
            class: named.class,
            rule: named.rule,
            label: label.clone(),
            aspect: aspect.clone(),
            output_group: named.group,
            invocation_id: naming.invocation.clone(),
            event: named.event,
            stamp: None,
            source: none.clone(),
            materialized_at_ms: 0,
            took_us: 0,
            error: String::new(),
            version: naming.version,
        };
        if let Some(old) = old {
            // The bytes' story goes on; only who wants them has changed.
            row.state = old.state;
            row.stamp = old.stamp;
            row.source = old.source;
            row.materialized_at_ms = old.materialized_at_ms;
            row.took_us = old.took_us;
            row.invocation_id = old.invocation_id;
        }
        changed.push((named.path, row));
    }
    record.put_outputs(naming.root, changed);
    wants
}

fn compare(named: &Named, content: &OutputContent, row: &SeenOutput<'_>, superseded: bool) -> Before {
    if !row.content_is(content) {
        return Before::Other;
    }
    let unchanged =
        row.class() == named.class && *row.rule() == *named.rule && *row.output_group() == *named.group;
    if unchanged || superseded {
        let is_asked = named.class > Class::Known && row.state() == OutputState::Materialized;
        return Before::Same(if is_asked { row.stamp() } else { None });
    }
    match row.to_row() {
        Some(old) => Before::Reworded(Box::new(old)),
        None => Before::Other,
    }
}

/// What is recorded of what the action cache says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Taken {
    All,
    /// A writer that lags far behind took no more.
    Part,
    /// A newer build has begun, and what it says counts.
    Nothing,
}

/// Records what the action cache, or a log, says of outputs that no event names, and forgets what the action cache said
/// before and does not say any more. Where the action that makes an output says something else than this build's stream
/// (`is_named`), nothing is recorded, and that output is given back. What a stream of an earlier build has said stays, unless Bazel has found the
/// output since: then the cache's promise to keep it ends at `found_since` or later. Blocks on the record.
pub(super) fn take_in(
    record: &Record,
    naming: &Naming,
    facts: &Facts,
    found_since: i64,
    is_named: impl Fn(&ExecPath) -> bool,
) -> Result<Taken, ExecPath> {
    let root = naming.root;
    // What a newer invocation has said is its own.
    if record
        .root_row(root)
        .is_some_and(|root| root.version > naming.version)
    {
        return Ok(Taken::Nothing);
    }
    let dropped = record.health().dropped_rows;
    let is_found = |output: &Output| output.expires_ms >= found_since;
    let is_logged = facts.extent() == Extent::Log;
    let known = OutputRow {
        rule: if is_logged { LOGGED } else { NAMED_BY_NONE }.into(),
        event: if is_logged { EXECUTION_LOG } else { ACTION_CACHE }.into(),
        invocation_id: naming.invocation.clone(),
        version: naming.version,
        ..OutputRow::known(OutputContent::Directory)
    };
    let (is_new, replaced) = compare_facts(record, root, facts.outputs(), is_found, &is_named)?;
    let since = if is_logged {
        SINCE_LOGGED
    } else {
        SINCE_NAMED_BY_NONE
    };
    replace(record, naming, &replaced, &known, &since.into());
    let new = facts.outputs().iter().zip(is_new);
    let mut new = new.filter(|(_, is_new)| *is_new).map(|(output, _)| {
        let content = OutputContent::Blob(output.digest.clone());
        (
            output.path.clone(),
            OutputRow {
                content,
                ..known.clone()
            },
        )
    });
    loop {
        let rows: Vec<(ExecPath, OutputRow)> = new.by_ref().take(TAKEN_IN_AT_ONCE).collect();
        if rows.is_empty() {
            break;
        }
        record.put_outputs(root, rows);
    }
    let mut gone = said_before(record, naming, facts, is_found);
    gone.retain(|path| facts.get(path.as_str()).is_none() && !is_named(path));
    record.remove_outputs(root, &gone);
    Ok(if record.health().dropped_rows == dropped {
        Taken::All
    } else {
        Taken::Part
    })
}

/// Which outputs need a row of their own, and which replace what an earlier build's stream has said. An error is an
/// output of which this build's stream says something else than the action that makes it.
fn compare_facts<'a>(
    record: &Record,
    root: RootId,
    outputs: &'a [Output],
    is_found: impl Fn(&Output) -> bool,
    is_named: impl Fn(&ExecPath) -> bool,
) -> Result<(Vec<bool>, Vec<&'a Output>), ExecPath> {
    let mut is_new = vec![true; outputs.len()];
    let mut replaced = Vec::new();
    let mut contradicts = None;
    record.see_outputs(
        root,
        outputs,
        |output| &output.path,
        |i, row| {
            let output = &outputs[i];
            let content = OutputContent::Blob(output.digest.clone());
            let is_same = row.content_is(&content);
            let is_its_own = is_of_bazel(row.event());
            is_new[i] = !is_same && is_its_own;
            if is_same || is_its_own {
                return;
            }
            if is_named(&output.path) {
                // Any other action may be gone since.
                if output.is_primary {
                    contradicts.get_or_insert_with(|| output.path.clone());
                }
            } else if is_found(output) {
                replaced.push(output);
            }
        },
    );
    contradicts.map_or(Ok((is_new, replaced)), Err)
}

/// Gives rows of earlier builds the content that Bazel has found since. They are still what was asked for then.
fn replace(record: &Record, naming: &Naming, replaced: &[&Output], known: &OutputRow, since: &Arc<str>) {
    // The next build may have begun meanwhile, and what it says is newer.
    record.update_outputs(
        naming.root,
        replaced,
        |output| &output.path,
        |i, row| {
            let old = row.to_row()?;
            if old.version > naming.version || is_of_bazel(&old.event) {
                return None;
            }
            Some(with_fields_of!(old, OutputRow {
                content: OutputContent::Blob(replaced[i].digest.clone()),
                rule: since.clone(),
            } label aspect output_group class, ..known.clone()))
        },
    );
}

/// Recorded outputs that may be gone: what Bazel has said before, and what is recorded in the place of trees that it has
/// found since.
fn said_before(
    record: &Record,
    naming: &Naming,
    facts: &Facts,
    is_found: impl Fn(&Output) -> bool,
) -> Vec<ExecPath> {
    let (root, outputs) = (naming.root, facts.outputs());
    let mut before = if facts.extent() == Extent::Whole {
        record.outputs_named_by(root, is_of_bazel)
    } else {
        Vec::new()
    };
    // Whether each tree that it reports is found.
    let mut trees: BTreeMap<&ExecPath, bool> = BTreeMap::new();
    for output in outputs {
        if let Some(tree) = &output.tree {
            *trees.entry(tree).or_default() |= is_found(output);
        }
    }
    trees.retain(|_, is_found| *is_found || facts.extent() == Extent::Grown);
    for (tree, is_found) in trees {
        // What a stream has named in its place, or what it had in an earlier build.
        let is_replaced = |row: &OutputRow| is_found && row.version <= naming.version;
        // What Bazel said before of a tree that it names again.
        let is_named_again = |row: &OutputRow| facts.extent() == Extent::Grown && is_of_bazel(&row.event);
        if record.output(root, tree).is_some_and(|row| is_replaced(&row)) {
            before.push(tree.clone());
        }
        let files = record.scan_outputs(root, &format!("{tree}/"));
        let older = files.filter(|(_, row)| is_replaced(row) || is_named_again(row));
        before.extend(older.map(|(path, _)| path));
    }
    before
}

/// Records what became of wants. A row that meanwhile has other content belongs to a newer build and is left alone.
///
/// Call it [`STAMP_AGE`](crate::output::STAMP_AGE) after the files were placed.
///
/// `version` is that of the invocation whose wants they were. After a newer one, only rows that know nothing yet are
/// written: the others say what that one has found.
pub(crate) async fn conclude(record: &Record, root: RootId, version: u64, ends: Vec<Completion>) {
    let record = record.clone();
    if spawn_blocking(move || write_ends(&record, root, version, &ends))
        .await
        .is_err_and(|e| e.is_panic())
    {
        tracing::error!("recording completions panicked; this is a bug in outhaul");
    }
}

/// The same. Blocks on the record.
fn write_ends(record: &Record, root: RootId, version: u64, ends: &[Completion]) {
    let superseded = record.root_row(root).is_some_and(|root| root.version > version);
    let mut end = End {
        superseded,
        now_ms: now_ms(),
        now_ns: now_ns(),
        sources: Vec::new(),
    };
    let mut changed = Vec::new();
    record.see_outputs(
        root,
        ends,
        |completion| &completion.path,
        |i, row| {
            let row = end.row(&ends[i], &row);
            changed.extend(row.map(|row| (ends[i].path.clone(), row)));
        },
    );
    record.put_outputs(root, changed);
}

/// Makes rows of what became of wants.
struct End {
    /// A newer invocation of the root has begun.
    superseded: bool,
    now_ms: i64,
    now_ns: i64,
    /// Sources that were named already: rows share the texts.
    sources: Vec<Arc<str>>,
}

impl End {
    /// The output's row from now on, if it changes.
    fn row(&mut self, completion: &Completion, old: &SeenOutput<'_>) -> Option<OutputRow> {
        let outcome = &completion.outcome;
        let state = outcome.state()?;
        let stays = outcome.is_unread() && old.state() == state;
        let stays = stays || (self.superseded && old.state() != OutputState::Known);
        if stays {
            return None;
        }
        let large = digested(&completion.content);
        if !old.content_is(large.as_ref().unwrap_or(&completion.content)) {
            return None;
        }
        let mut row = old.to_row()?;
        let is_new = matches!(outcome, Outcome::Downloaded { .. });
        match state {
            OutputState::Materialized
                if is_new || row.state != OutputState::Materialized || row.source.is_empty() =>
            {
                row.source = match &*outcome.source() {
                    "" => self.source("present"),
                    source => self.source(source),
                };
                row.materialized_at_ms = self.now_ms;
                row.took_us = u64::try_from(completion.took.as_micros()).unwrap_or(u64::MAX);
            }
            OutputState::Known => {
                row.source = self.source("");
                row.materialized_at_ms = 0;
            }
            OutputState::Materialized | OutputState::Evicted | OutputState::Failed => {}
        }
        row.state = state;
        outcome.reason().clone_into(&mut row.error);
        row.stamp = outcome.stamp();
        if is_new {
            // The stamp of what was there already is as old as the look was: anyone who made the file may have changed
            // it right after.
            row.stamp = row.stamp.map(|stamp| stamp.recorded_at(self.now_ns));
        }
        Some(row)
    }

    fn source(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.sources.iter().find(|known| ***known == *name) {
            return known.clone();
        }
        let source: Arc<str> = name.into();
        self.sources.push(source.clone());
        source
    }
}

#[cfg(test)]
mod tests;
