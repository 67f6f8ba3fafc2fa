//! From what a stream names, and from what became of it, to rows of the record.

use std::{sync::Arc, time::SystemTime};

use super::build::Named;
use crate::{
    bep::event::TargetId,
    materialize::{Completion, Outcome, Want},
    output::{Class, Stamp},
    record::{OutputRow, OutputState, Record, RootId, SeenOutput},
};

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
    /// Other content.
    Other,
    /// The same, and its row stays as it is. The stamp, if it is wanted and was materialised.
    Same(Option<Stamp>),
    /// The same content, but other words about who wants it.
    Reworded(Box<OutputRow>),
}

/// Records outputs and gives back what is wanted of them, with the stamps that the record has. Rows that would stay
/// as they are, are not written again. Blocks on the record.
pub(super) fn absorb(record: &Record, naming: &Naming, named: Vec<Named>) -> Vec<Want> {
    // A newer invocation of the root has begun: what it has recorded is its own, and stays. (The versions in rows do
    // not tell, since a row that would stay as it is, is not written again.)
    let superseded = record
        .root_row(naming.root)
        .is_some_and(|root| root.version > naming.version);
    let mut before: Vec<Before> = Vec::new();
    before.resize_with(named.len(), || Before::Nothing);
    record.see_outputs(
        naming.root,
        &named,
        |named| &named.path,
        |i, row| before[i] = compare(&named[i], &row, superseded),
    );
    let label: Arc<str> = naming.target.label.as_str().into();
    let aspect: Arc<str> = naming.target.aspect.as_str().into();
    let none: Arc<str> = Arc::default();
    let mut changed = Vec::new();
    let mut wants = Vec::new();
    for (named, before) in named.into_iter().zip(before) {
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
            content: named.content,
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

fn compare(named: &Named, row: &SeenOutput<'_>, superseded: bool) -> Before {
    if !row.content_is(&named.content) {
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

/// Records what became of wants. A row that meanwhile has other content belongs to somebody newer and is left alone.
/// Blocks on the record.
///
/// Call it a clock tick or more after the files were placed: see [`Stamp::recorded_at`].
///
/// `version` is that of the invocation whose wants they were. Behind a newer one, only rows that know nothing yet are
/// written: the others tell what that one has found.
pub(crate) fn conclude(record: &Record, root: RootId, version: u64, ends: &[Completion]) {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let (now_ms, now_ns) = (
        i64::try_from(now.as_millis()).unwrap_or(i64::MAX),
        i64::try_from(now.as_nanos()).unwrap_or(i64::MAX),
    );
    let superseded = record.root_row(root).is_some_and(|root| root.version > version);
    let mut end = End {
        superseded,
        now_ms,
        now_ns,
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
        let stays = match &completion.outcome {
            Outcome::Present { hashed: false, .. } => old.state() == OutputState::Materialized,
            Outcome::Superseded => true,
            _ => false,
        };
        let stays = stays || (self.superseded && old.state() != OutputState::Known);
        if stays || !old.content_is(&completion.content) {
            return None;
        }
        let mut row = old.to_row()?;
        let took_us = u64::try_from(completion.took.as_micros()).unwrap_or(u64::MAX);
        match &completion.outcome {
            Outcome::Downloaded { source, stamp, .. } => {
                row.state = OutputState::Materialized;
                row.stamp = stamp.map(|stamp| stamp.recorded_at(self.now_ns));
                row.source = self.source(source.name());
                row.materialized_at_ms = self.now_ms;
                row.took_us = took_us;
                row.error.clear();
            }
            Outcome::Present { stamp, .. } => {
                if row.state != OutputState::Materialized || row.source.is_empty() {
                    row.source = self.source("present");
                    row.materialized_at_ms = self.now_ms;
                    row.took_us = took_us;
                }
                row.state = OutputState::Materialized;
                // As old as the look was: whoever made the file may have changed it right after.
                row.stamp = *stamp;
                row.error.clear();
            }
            Outcome::Evicted(reason) => {
                row.state = OutputState::Evicted;
                row.error.clone_from(reason);
                row.stamp = None;
            }
            Outcome::Failed(reason) => {
                row.state = OutputState::Failed;
                row.error.clone_from(reason);
                row.stamp = None;
            }
            Outcome::Superseded => return None,
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
    use crate::{
        digest::{Digest, DigestFunction},
        exec_path::ExecPath,
        output::OutputContent,
        record::InvocationRow,
    };

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
        conclude(&f.record, f.root, old.version, &[end(present.clone())]);
        assert_eq!(f.row().state, OutputState::Materialized, "nothing was known");
        conclude(
            &f.record,
            f.root,
            new.version,
            &[end(Outcome::Evicted("gone".to_owned()))],
        );
        conclude(&f.record, f.root, old.version, &[end(present)]);
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
                stamp: Some(stamp),
                bytes: 1,
            };
            let present = Outcome::Present {
                stamp: Some(stamp),
                hashed: true,
            };
            // What was placed by us is changed by nobody within a tick.
            let is_ours = is_trusted || ctime_ns % second > 0;
            for (outcome, is_trusted) in [(downloaded, is_ours), (present, is_trusted)] {
                let end = Completion {
                    path: ExecPath::new("bazel-out/x").unwrap(),
                    content: blob("1"),
                    class: Class::Required,
                    outcome,
                    took: std::time::Duration::ZERO,
                };
                conclude(&f.record, f.root, naming.version, std::slice::from_ref(&end));
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
        conclude(
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
        conclude(&f.record, f.root, naming.version, &[completion]);
        assert_eq!(f.row().state, OutputState::Known);
    }
}
