//! From what a stream names, and from what became of it, to rows of the record.

use std::{collections::HashMap, sync::Arc};

use tokio::task::spawn_blocking;

use super::build::Named;
use crate::{
    action_cache::Facts,
    bep::event::TargetId,
    digest::{Digest, DigestFunction},
    exec_path::ExecPath,
    materialize::{Completion, Outcome, Want},
    output::{Class, OutputContent, Stamp},
    record::{OutputRow, OutputState, Record, RootId, SeenOutput},
    units::{now_ms, now_ns},
};

/// In the place of the event that has named an output: Bazel's action cache tells of it.
pub(crate) const ACTION_CACHE: &str = "action_cache";
/// Why these are known.
const NAMED_BY_NONE: &str = "in Bazel's action cache; no event names it";
/// Bytes of a file that came in an event and stay on record. Of larger ones, digest and size do: anyone who wants those
/// back when the file is gone has to find them in the cache, or build once more.
const KEPT: usize = 64 << 10;
/// Rows that are made at once, some hundred bytes each.
const TAKEN_IN_AT_ONCE: usize = 10_000;

/// Whether an output was neither wanted nor named: it is only in Bazel's action cache.
pub(crate) fn is_unasked(row: &OutputRow) -> bool {
    *row.event == *ACTION_CACHE && row.class == Class::Known
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
    // not tell, since a row that would stay as it is, is not written again.)
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

/// Records what the action cache says of outputs that no event names, and forgets what it said before and does not say
/// any more. What a stream has said stays, whichever build's; where it is this build's (`is_named`), and says something
/// else, nothing is recorded, and that output is given back. Blocks on the record.
pub(super) fn take_in(
    record: &Record,
    root: RootId,
    version: u64,
    invocation: &Arc<str>,
    facts: &Facts,
    is_named: impl Fn(&ExecPath) -> bool,
) -> Result<(), ExecPath> {
    // What a newer invocation has said is its own.
    if record.root_row(root).is_some_and(|root| root.version > version) {
        return Ok(());
    }
    let outputs = facts.outputs();
    let mut is_new = vec![true; outputs.len()];
    let mut contradicts = None;
    record.see_outputs(
        root,
        outputs,
        |output| &output.path,
        |i, row| {
            let output = &outputs[i];
            let is_same = row.content_is(&OutputContent::Blob(output.digest.clone()));
            if !is_same && is_named(&output.path) {
                contradicts.get_or_insert_with(|| output.path.clone());
            }
            is_new[i] = !is_same && row.event() == ACTION_CACHE;
        },
    );
    if let Some(path) = contradicts {
        return Err(path);
    }
    let known = OutputRow {
        rule: NAMED_BY_NONE.into(),
        event: ACTION_CACHE.into(),
        invocation_id: invocation.clone(),
        version,
        ..OutputRow::known(OutputContent::Directory)
    };
    let new = outputs.iter().zip(is_new).filter(|(_, is_new)| *is_new);
    let mut new = new.map(|(output, _)| {
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
    let mut gone = record.outputs_named_by(root, ACTION_CACHE);
    gone.retain(|path| facts.get(path.as_str()).is_none() && !is_named(path));
    record.remove_outputs(root, &gone);
    Ok(())
}

/// Records what became of wants. A row that meanwhile has other content belongs to a newer build and is left alone.
///
/// Call it [`STAMP_AGE`](crate::output::STAMP_AGE) after the files were placed.
///
/// `version` is that of the invocation whose wants they were. Behind a newer one, only rows that know nothing yet are
/// written: the others tell what that one has found.
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
mod tests {
    use super::*;
    use crate::{materialize::Source, record::InvocationRow};

    fn blob(text: &str) -> OutputContent {
        OutputContent::Blob(Digest::of(DigestFunction::Sha256, text.as_bytes()))
    }

    fn named(content: OutputContent, class: Class) -> Named {
        Named {
            path: ExecPath::new("bazel-out/x").unwrap(),
            content,
            class,
            rule: "rule".into(),
            group: "default".into(),
            event: "event".into(),
            sequence: 1,
            set: None,
        }
    }

    struct Fixture {
        _dir: tempfile::TempDir,
        record: Record,
        root: RootId,
    }

    impl Fixture {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let (record, _) = Record::open(dir.path()).unwrap();
            let root = record.root("/ob/execroot/_main", 1, 2);
            Self {
                _dir: dir,
                record,
                root,
            }
        }

        /// An invocation of the root begins.
        fn begin(&self, invocation: &str) -> Naming {
            let version = self.record.next_version(self.root);
            self.record.put_invocation(&InvocationRow {
                invocation_id: invocation.to_owned(),
                root: Some(self.root),
                version,
                ..InvocationRow::default()
            });
            Naming {
                root: self.root,
                version,
                invocation: invocation.into(),
                target: Arc::default(),
            }
        }

        fn row(&self) -> OutputRow {
            let path = ExecPath::new("bazel-out/x").unwrap();
            self.record.output(self.root, &path).unwrap()
        }
    }

    #[test]
    fn of_many_bytes_in_an_event_the_digest_is_on_record() {
        let f = Fixture::new();
        for (bytes, kept) in [("x".repeat(KEPT), true), ("x".repeat(KEPT + 1), false)] {
            let content = OutputContent::Inline(bytes.clone().into());
            let name = || vec![named(content.clone(), Class::Required)];
            let build = f.begin("build");
            let wants = absorb(&f.record, &build, name());
            assert_eq!((wants.len(), &wants[0].content), (1, &content));
            let on_record = if kept { content.clone() } else { blob(&bytes) };
            assert_eq!(f.row().content, on_record);
            let stamp = Stamp {
                size: bytes.len() as u64,
                ..Stamp::default()
            };
            let end = Completion {
                path: ExecPath::new("bazel-out/x").unwrap(),
                content: content.clone(),
                class: Class::Required,
                outcome: Outcome::Downloaded {
                    source: Source::Inline,
                    store: None,
                    bytes: stamp.size,
                    stamp: Some(stamp),
                },
                took: std::time::Duration::ZERO,
            };
            write_ends(&f.record, f.root, build.version, &[end]);
            assert_eq!(f.row().state, OutputState::Materialized);
            let wants = absorb(&f.record, &f.begin("next"), name());
            assert!(wants[0].recorded.is_some(), "it is the same");
        }
    }

    #[test]
    fn a_superseded_build_leaves_the_newer_ones_rows_alone() {
        let f = Fixture::new();
        let old = f.begin("old");
        absorb(&f.record, &old, vec![named(blob("1"), Class::Required)]);
        let new = f.begin("new");
        absorb(&f.record, &new, vec![named(blob("2"), Class::Required)]);
        let wants = absorb(&f.record, &old, vec![named(blob("1"), Class::Required)]);
        assert_eq!(wants.len(), 1, "it is answered as superseded by the coordinator");
        assert_eq!((f.row().content, &*f.row().invocation_id), (blob("2"), "new"));
    }

    #[test]
    fn what_became_of_an_older_builds_wants_says_nothing_over_a_newer_ones() {
        let f = Fixture::new();
        let end = |outcome| Completion {
            path: ExecPath::new("bazel-out/x").unwrap(),
            content: blob("1"),
            class: Class::Required,
            outcome,
            took: std::time::Duration::ZERO,
        };
        let present = Outcome::Present {
            stamp: Some(Stamp::default()),
            hashed: true,
        };
        let old = f.begin("old");
        absorb(&f.record, &old, vec![named(blob("1"), Class::Required)]);
        let new = f.begin("new");
        write_ends(&f.record, f.root, old.version, &[end(present.clone())]);
        assert_eq!(f.row().state, OutputState::Materialized, "nothing was known");
        write_ends(
            &f.record,
            f.root,
            new.version,
            &[end(Outcome::Evicted("gone".to_owned()))],
        );
        write_ends(&f.record, f.root, old.version, &[end(present)]);
        assert_eq!(f.row().state, OutputState::Evicted);
    }

    #[test]
    fn a_stamp_with_coarse_times_is_as_old_as_the_look_at_its_file() {
        let f = Fixture::new();
        let naming = f.begin("one");
        absorb(&f.record, &naming, vec![named(blob("1"), Class::Required)]);
        // Of years ago: what counts is when it was looked at.
        let second = 1_000_000_000;
        for (ctime_ns, after_ns, is_trusted) in [
            (1_700_000_001 * second, second / 2, false),
            (1_700_000_001 * second, 3 * second, true),
            (1_700_000_001 * second + 1, 0, false),
        ] {
            let stamp = Stamp {
                mtime_ns: ctime_ns,
                ctime_ns,
                taken_ns: ctime_ns + after_ns,
                ..Stamp::default()
            };
            let downloaded = Outcome::Downloaded {
                source: crate::materialize::Source::Batch,
                store: None,
                stamp: Some(stamp),
                bytes: 1,
            };
            let present = Outcome::Present {
                stamp: Some(stamp),
                hashed: true,
            };
            // What we placed is not changed within a tick.
            let is_ours = is_trusted || ctime_ns % second > 0;
            for (outcome, is_trusted) in [(downloaded, is_ours), (present, is_trusted)] {
                let end = Completion {
                    path: ExecPath::new("bazel-out/x").unwrap(),
                    content: blob("1"),
                    class: Class::Required,
                    outcome,
                    took: std::time::Duration::ZERO,
                };
                write_ends(&f.record, f.root, naming.version, std::slice::from_ref(&end));
                let recorded = f.row().stamp.unwrap();
                assert_eq!(recorded.vouches_for(&stamp), is_trusted, "{end:?}");
            }
        }
    }

    #[test]
    fn a_stamp_is_handed_on_only_with_the_content_that_it_was_taken_of() {
        let f = Fixture::new();
        let naming = f.begin("one");
        let stamp = Stamp {
            size: 1,
            inode: 5,
            ..Stamp::default()
        };
        absorb(&f.record, &naming, vec![named(blob("1"), Class::Required)]);
        let completion = Completion {
            path: ExecPath::new("bazel-out/x").unwrap(),
            content: blob("1"),
            class: Class::Required,
            outcome: Outcome::Present {
                stamp: Some(stamp),
                hashed: true,
            },
            took: std::time::Duration::ZERO,
        };
        write_ends(
            &f.record,
            f.root,
            naming.version,
            std::slice::from_ref(&completion),
        );
        assert_eq!(f.row().state, OutputState::Materialized);
        let naming = f.begin("two");
        let wants = absorb(&f.record, &naming, vec![named(blob("1"), Class::Required)]);
        assert_eq!(wants[0].recorded.map(|s| s.inode), Some(5));
        let wants = absorb(&f.record, &naming, vec![named(blob("2"), Class::Required)]);
        assert_eq!(wants[0].recorded, None);
        assert_eq!(f.row().state, OutputState::Known);
        // What became of the old content is of no interest for the new.
        write_ends(&f.record, f.root, naming.version, &[completion]);
        assert_eq!(f.row().state, OutputState::Known);
    }

    #[test]
    fn what_the_action_cache_tells_takes_nothing_back_that_a_stream_has_said() {
        use crate::action_cache::write::{Action, Metadata, Written};
        let f = Fixture::new();
        let path = |name: &str| ExecPath::new(&format!("bazel-out/{name}")).unwrap();
        let facts = |files: &[(&str, &str)]| {
            let mut written = Written::new(16);
            for (name, text) in files {
                let digest = Digest::of(DigestFunction::Sha256, text.as_bytes());
                let metadata = Metadata {
                    hash: digest.hash().to_vec(),
                    size: i64::try_from(digest.size()).unwrap(),
                    expires_ms: -1,
                    link_to: None,
                };
                written.put(
                    &Action {
                        primary: path(name).as_str().to_owned(),
                        files: vec![(path(name).as_str().to_owned(), metadata)],
                        ..Action::default()
                    },
                    false,
                );
            }
            written.facts()
        };
        let state = |name: &str| {
            let row = f.record.output(f.root, &path(name))?;
            Some((row.content.clone(), is_unasked(&row)))
        };
        let one = f.begin("one");
        absorb(&f.record, &one, vec![named(blob("stream"), Class::Known)]);
        let take_in = |naming: &Naming, facts: &Facts, is_named: &dyn Fn(&ExecPath) -> bool| {
            take_in(
                &f.record,
                f.root,
                naming.version,
                &naming.invocation,
                facts,
                is_named,
            )
        };
        // That of another build stays; and what this one's stream says otherwise spoils all of it.
        let first = facts(&[("x", "cache"), ("y", "y1"), ("z", "z1")]);
        let said = take_in(&one, &first, &|named| *named == path("x"));
        assert_eq!((said, state("y")), (Err(path("x")), None));
        assert_eq!(take_in(&one, &first, &|_| false), Ok(()));
        assert_eq!(state("x"), Some((blob("stream"), false)));
        assert_eq!(state("y"), Some((blob("y1"), true)));
        // The next tells more of one, nothing of another.
        let two = f.begin("two");
        assert_eq!(take_in(&two, &facts(&[("y", "y2")]), &|_| false), Ok(()));
        assert_eq!((state("y"), state("z")), (Some((blob("y2"), true)), None));
        // And what the older build has read comes too late.
        assert_eq!(take_in(&one, &first, &|_| false), Ok(()));
        assert_eq!((state("y"), state("z")), (Some((blob("y2"), true)), None));
    }
}
