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
    let facts_until = |files: &[(&str, &str)], expires_ms| {
        let mut written = Written::new(16);
        for (name, text) in files {
            let digest = Digest::of(DigestFunction::Sha256, text.as_bytes());
            let metadata = Metadata {
                hash: digest.hash().to_vec(),
                size: i64::try_from(digest.size()).unwrap(),
                expires_ms,
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
    let facts = |files: &[(&str, &str)]| facts_until(files, -1);
    let state = |name: &str| {
        let row = f.record.output(f.root, &path(name))?;
        Some((row.content.clone(), is_unasked(&row)))
    };
    let one = f.begin("one");
    absorb(&f.record, &one, vec![named(blob("stream"), Class::Known)]);
    let take_in = |naming: &Naming, facts: &Facts, is_named: &dyn Fn(&ExecPath) -> bool| {
        take_in(&f.record, naming, facts, 100, is_named)
    };
    // That of another build stays; and what this one's stream says otherwise spoils all of it.
    let first = facts(&[("x", "cache"), ("y", "y1"), ("z", "z1")]);
    let said = take_in(&one, &first, &|named| *named == path("x"));
    assert_eq!((said, state("y")), (Err(path("x")), None));
    assert_eq!(take_in(&one, &first, &|_| false), Ok(true));
    assert_eq!(state("x"), Some((blob("stream"), false)));
    assert_eq!(state("y"), Some((blob("y1"), true)));
    // The next tells more of one, nothing of another.
    let two = f.begin("two");
    assert_eq!(take_in(&two, &facts(&[("y", "y2")]), &|_| false), Ok(true));
    assert_eq!((state("y"), state("z")), (Some((blob("y2"), true)), None));
    // And what the older build has read comes too late.
    assert_eq!(take_in(&one, &first, &|_| false), Ok(false));
    assert_eq!((state("y"), state("z")), (Some((blob("y2"), true)), None));
}

#[test]
fn what_bazel_has_found_since_takes_the_place_of_what_an_older_builds_stream_has_said() {
    use crate::action_cache::write::{Action, Metadata, Written};
    let f = Fixture::new();
    let path = |name: &str| ExecPath::new(&format!("bazel-out/{name}")).unwrap();
    let naming = f.begin("one");
    let names = ["x", "kept", "tree/a", "tree/gone", "tree/named", "other/a"];
    let all = names.map(|name| Named {
        path: path(name),
        ..named(blob("1"), Class::Required)
    });
    absorb(&f.record, &naming, all.into());
    let metadata = |text: &str, expires_ms| {
        let digest = Digest::of(DigestFunction::Sha256, text.as_bytes());
        Metadata {
            hash: digest.hash().to_vec(),
            size: i64::try_from(digest.size()).unwrap(),
            expires_ms,
            link_to: None,
        }
    };
    let mut written = Written::new(16);
    let text = |name: &str| path(name).as_str().to_owned();
    let tree = |name: &str, files: &[&str], expires_ms| {
        let files = files
            .iter()
            .map(|file| ((*file).to_owned(), metadata("2", expires_ms)));
        (text(name), files.collect())
    };
    written.put(
        &Action {
            primary: text("x"),
            files: vec![
                (text("x"), metadata("2", 100)),
                // Found before the build that named it, for all that is known.
                (text("kept"), metadata("0", 99)),
            ],
            trees: vec![tree("tree", &["a", "b"], 100), tree("other", &["b"], 99)],
            ..Action::default()
        },
        false,
    );
    let two = f.begin("two");
    let taken = take_in(&f.record, &two, &written.facts(), 100, |named| {
        *named == path("tree/named")
    });
    assert_eq!(taken, Ok(true));
    let state = |name: &str| {
        let row = f.record.output(f.root, &path(name))?;
        Some((row.content, row.invocation_id.to_string(), row.class))
    };
    let now = |text: &str, build: &str, class| Some((blob(text), build.to_owned(), class));
    assert_eq!(state("x"), now("2", "two", Class::Required));
    assert_eq!(state("kept"), now("1", "one", Class::Required));
    assert_eq!(state("tree/a"), now("2", "two", Class::Required));
    assert_eq!(state("tree/b"), now("2", "two", Class::Known));
    assert_eq!(state("tree/gone"), None);
    assert_eq!(state("tree/named"), now("1", "one", Class::Required));
    assert_eq!(state("other/a"), now("1", "one", Class::Required));
    assert_eq!(state("other/b"), now("2", "two", Class::Known));
}
