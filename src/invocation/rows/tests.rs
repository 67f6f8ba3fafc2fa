use proptest::prelude::*;

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
            fetched: None,
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
        fetched: None,
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
                fetched: None,
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
        fetched: None,
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
fn what_the_action_cache_says_takes_nothing_back_that_a_stream_has_said() {
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
    assert_eq!(take_in(&one, &first, &|_| false), Ok(Taken::All));
    assert_eq!(state("x"), Some((blob("stream"), false)));
    assert_eq!(state("y"), Some((blob("y1"), true)));
    // The next says more of one, nothing of another.
    let two = f.begin("two");
    assert_eq!(take_in(&two, &facts(&[("y", "y2")]), &|_| false), Ok(Taken::All));
    assert_eq!((state("y"), state("z")), (Some((blob("y2"), true)), None));
    // And what the older build has read comes too late.
    assert_eq!(take_in(&one, &first, &|_| false), Ok(Taken::Nothing));
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
    assert_eq!(taken, Ok(Taken::All));
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

/// What an action says of one of its places in the next build.
#[derive(Debug, Clone, Copy)]
enum Place {
    Nothing,
    /// A file, or a link that leads out of the output tree.
    File(u8),
    Outside,
    /// A tree with this many files.
    Tree(u8, u8),
}

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        1 => Just(Place::Nothing),
        3 => (0..3_u8).prop_map(Place::File),
        1 => Just(Place::Outside),
        3 => (0..3_u8, 0..3_u8).prop_map(|(bytes, files)| Place::Tree(bytes, files)),
    ]
}

#[derive(Debug, Clone, Copy)]
enum Step {
    /// An action is executed: its number, what it has at two places, until when that is promised.
    Put(u8, [Place; 2], i64),
    Remove(u8),
    /// Bazel writes its files anew.
    Rewrite,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (0..4_u8, [place(), place()], prop_oneof![Just(-1), Just(99), Just(100)])
            .prop_map(|(n, places, expires_ms)| Step::Put(n, places, expires_ms)),
        1 => (0..4_u8).prop_map(Step::Remove),
        1 => Just(Step::Rewrite),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whether a build's action cache is read whole, or only what it has more than in an earlier build that was recorded: the
    /// record has the same rows.
    #[test]
    fn what_an_action_cache_has_more_leads_to_the_rows_of_all_of_it(
        builds in proptest::collection::vec((proptest::collection::vec(step(), 0..5), any::<bool>()), 1..6),
    ) {
        use crate::action_cache::{Reading, State, read, write::{Action, Metadata, Written}};
        let [whole, grown] = [Fixture::new(), Fixture::new()];
        let base = tempfile::tempdir().unwrap();
        let file = |name: &str| base.path().join("action_cache").join(name);
        std::fs::create_dir(file("")).unwrap();
        let mut written = Written::new(16);
        let mut index = None;
        let mut known: Option<State> = None;
        let metadata = |text: &str, expires_ms, link_to: Option<&str>| {
            let digest = Digest::of(DigestFunction::Sha256, text.as_bytes());
            Metadata {
                hash: digest.hash().to_vec(),
                size: i64::try_from(digest.size()).unwrap(),
                expires_ms,
                link_to: link_to.map(ToOwned::to_owned),
            }
        };
        for (number, (steps, is_recorded)) in builds.iter().enumerate() {
            for step in steps {
                match *step {
                    Step::Put(n, places, expires_ms) => {
                        let mut action = Action { primary: format!("bazel-out/{n}"), ..Action::default() };
                        for (place, path) in places.into_iter().zip([format!("bazel-out/{n}"), format!("bazel-out/{n}-other")]) {
                            match place {
                                Place::Nothing => {}
                                Place::File(bytes) => action.files.push((path, metadata(&bytes.to_string(), expires_ms, None))),
                                Place::Outside => action.files.push((path, metadata("out", expires_ms, Some("external/out")))),
                                Place::Tree(bytes, files) => {
                                    let files = (0..files).map(|f| (format!("f{f}"), metadata(&bytes.to_string(), expires_ms, None)));
                                    action.trees.push((path, files.collect()));
                                }
                            }
                        }
                        written.put(&action, true);
                    }
                    Step::Remove(n) => written.remove(&format!("bazel-out/{n}")),
                    Step::Rewrite => index = None,
                }
            }
            let from = *index.get_or_insert_with(|| {
                // The map has all that the journal had.
                let records = written.journal.split_off(16);
                written.actions.extend(records);
                for name in ["action_cache_v16.blaze", "filename_index_v16.blaze"] {
                    let _ = std::fs::remove_file(file(name));
                }
                std::fs::write(file("action_cache_v16.blaze"), &written.actions).unwrap();
                std::fs::write(file("filename_index_v16.blaze"), &written.index).unwrap();
                for name in ["action_journal_v16.blaze", "filename_index_v16.journal"] {
                    let _ = std::fs::remove_file(file(name));
                }
                written.index.len()
            });
            let append = |name: &str, bytes: &[u8]| {
                let mut file = std::fs::File::options().append(true).create(true).open(file(name)).unwrap();
                let before = usize::try_from(file.metadata().unwrap().len()).unwrap();
                std::io::Write::write_all(&mut file, &bytes[before..]).unwrap();
            };
            append("action_journal_v16.blaze", &written.journal);
            append("filename_index_v16.journal", &[&written.index[..16], &written.index[from..]].concat());
            let id = number.to_string();
            let Ok(Reading::Read(facts, _)) = read(base.path(), DigestFunction::Sha256, None) else {
                panic!("nothing was read");
            };
            // Who has not recorded a build has not read it.
            if *is_recorded {
                take_in(&whole.record, &whole.begin(&id), &facts, 100, |_| false).unwrap();
                if let Reading::Read(facts, state) = read(base.path(), DigestFunction::Sha256, known.as_ref()).unwrap() {
                    prop_assert_eq!(take_in(&grown.record, &grown.begin(&id), &facts, 100, |_| false), Ok(Taken::All));
                    known = Some(state);
                }
                let rows = |f: &Fixture| -> Vec<(ExecPath, OutputContent)> {
                    f.record.scan_outputs(f.root, "").map(|(path, row)| (path, row.content)).collect()
                };
                prop_assert_eq!(rows(&grown), rows(&whole));
            }
        }
    }
}

#[test]
fn intermediate_outputs_are_known_from_bazel_7_on() {
    for (version, by_events_alone) in [
        ("4.2.3", true),
        ("6.5.0", true),
        ("7.0.0", false),
        ("10.1.0-pre", false),
        ("development", false),
        ("", false),
    ] {
        assert_eq!(is_known_by_events_alone(version), by_events_alone, "{version}");
    }
}
