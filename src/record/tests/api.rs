use proptest::prelude::*;

use super::*;
use crate::record::error::{FlushError, Health};

#[test]
fn rows_are_read_back_at_once_and_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (record, opening) = open(dir.path());
    assert_eq!(opening, Opening::Fresh);
    let root = record.root("/exec", 1, 2);
    let rows = numbered_rows(0..5000);
    record.put_outputs(root, rows.clone());
    let paths: Vec<_> = rows.iter().map(|(p, _)| p.clone()).collect();
    let expected: Vec<_> = rows.iter().map(|(_, row)| Some(row.clone())).collect();
    assert_eq!(record.outputs(root, &paths), expected);
    run(record.flush()).unwrap();
    assert_eq!(record.health().pending_rows, 0);
    assert_eq!(record.outputs(root, &paths), expected);
    let identity = record.identity();
    drop(record);

    let (record, opening) = open(dir.path());
    assert_eq!((opening, record.identity()), (Opening::Existing, identity));
    assert_eq!(record.root("/exec", 1, 2), root);
    assert_eq!(record.outputs(root, &paths), expected);
    // Asking for the root is on record as well.
    run(record.flush()).unwrap();
    assert_eq!(record.health(), Health::default());
}

#[test]
fn an_update_replaces_nothing_that_was_written_while_it_looked() {
    let dir = tempfile::tempdir().unwrap();
    let (record, _) = open(dir.path());
    let root = record.root("/exec", 1, 2);
    let rows = numbered_rows(0..1000);
    record.put_outputs(root, rows.clone());
    run(record.flush()).unwrap();
    let (taken, newer) = (rows[500].0.clone(), numbered(7).1);
    assert_ne!(rows[500].1.content, newer.content);
    let evict = |seen: SeenOutput<'_>| {
        let mut row = seen.to_row()?;
        row.state = OutputState::Evicted;
        Some(row)
    };
    let mut asked = 0;
    let changed = record.update_outputs(
        root,
        &rows,
        |(path, _)| path,
        |i, seen| {
            if i != 500 {
                return evict(seen);
            }
            asked += 1;
            if asked == 1 {
                record.put_outputs(root, vec![(taken.clone(), newer.clone())]);
            }
            if seen.content_is(&rows[500].1.content) {
                evict(seen)
            } else {
                None
            }
        },
    );
    assert_eq!((changed.len(), changed.contains(&500), asked), (999, false, 2));
    assert_eq!(record.output(root, &taken), Some(newer.clone()));
    let states = |record: &Record| {
        let all = record.scan_outputs(root, "");
        all.filter(|(_, row)| row.state == OutputState::Evicted).count()
    };
    assert_eq!(states(&record), 999);

    // Nor one that is forgotten meanwhile, nor one that is written all the time.
    let one = std::slice::from_ref(&taken);
    let mut versions = 0;
    let changed = record.update_outputs(
        root,
        one,
        |path| path,
        |_, seen| {
            versions += 1;
            let mut newest = newer.clone();
            newest.version = 100 + versions;
            record.put_outputs(root, vec![(taken.clone(), newest)]);
            evict(seen)
        },
    );
    assert!(changed.is_empty());
    let row = record.output(root, &taken).unwrap();
    assert_eq!((row.version, row.state), (100 + versions, newer.state));
    let changed = record.update_outputs(
        root,
        one,
        |path| path,
        |_, seen| {
            record.remove_outputs(root, one);
            evict(seen)
        },
    );
    assert!(changed.is_empty());
    assert_eq!(record.output(root, &taken), None);
}

#[test]
fn closing_writes_what_is_queued_and_frees_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let (record, _) = open(dir.path());
    let other_handle = record.clone();
    let root = record.root("/exec", 1, 2);
    record.put_outputs(root, numbered_rows(0..100));
    record.close();
    record.close();
    record.put_outputs(root, numbered_rows(100..101));
    assert_eq!(record.health().dropped_rows, 1);
    assert_eq!(run(record.flush()), Err(FlushError::Closed));
    let (again, _) = open(dir.path());
    assert_eq!(again.count_outputs(root, ""), 100);
    assert_eq!(other_handle.output(root, &numbered(0).0), None);
}

#[test]
fn a_held_directory_is_refused_until_its_holder_goes() {
    let dir = tempfile::tempdir().unwrap();
    let (record, _) = open(dir.path());
    let error = Record::open(dir.path()).unwrap_err();
    assert!(matches!(&error, RecordError::Held { holder, .. } if holder.pid == Some(std::process::id())));
    drop(record);
    open(dir.path());
}

#[test]
fn a_state_directory_that_cannot_be_is_an_error_that_names_its_flag() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = Record::open(&file.join("below")).unwrap_err().to_string();
    assert!(
        error.contains("--state-dir") && error.contains("file/below"),
        "{error}"
    );
}

#[test]
fn a_scan_sees_written_and_waiting_rows_once_each_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let (record, _) = open(dir.path());
    let (root, other) = (record.root("/exec", 1, 2), record.root("/other", 1, 3));
    record.put_outputs(root, numbered_rows(0..2000).into_iter().step_by(2).collect());
    record.put_outputs(other, numbered_rows(0..10));
    run(record.flush()).unwrap();
    // From here on in the queue, or on its way.
    record.put_outputs(
        root,
        numbered_rows(0..2000).into_iter().skip(1).step_by(2).collect(),
    );
    record.remove_outputs(root, &[numbered(4).0, numbered(5).0]);
    let mut expected = numbered_rows(0..2000);
    expected.drain(4..6);
    expected.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(record.scan_outputs(root, "").collect::<Vec<_>>(), expected);
    run(record.flush()).unwrap();
    assert_eq!(record.scan_outputs(root, "").collect::<Vec<_>>(), expected);

    let package = "bazel-out/k8-fastbuild/bin/some/package1/";
    assert_eq!(
        record.count_outputs(root, package),
        100,
        "and not package10 to package19"
    );
    assert_eq!(record.count_outputs(root, &package[..package.len() - 1]), 1100);
    assert_eq!(record.count_outputs(other, ""), 10);
    record.forget_root(root);
    assert_eq!((record.count_outputs(root, ""), record.root_row(root)), (0, None));
    assert_eq!(record.count_outputs(other, ""), 10);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// Against a plain map, with flushes strewn in.
    #[test]
    fn the_record_is_a_map(steps in prop::collection::vec((0..30u32, 0..5u8, any::<u64>()), 1..60)) {
        let dir = tempfile::tempdir().unwrap();
        let (record, _) = open(dir.path());
        let root = record.root("/exec", 1, 2);
        let mut model = std::collections::BTreeMap::new();
        for (n, what, version) in steps {
            let (path, mut row) = numbered(n);
            match what {
                0 => run(record.flush()).unwrap(),
                1 => {
                    record.remove_outputs(root, std::slice::from_ref(&path));
                    model.remove(&path);
                }
                _ => {
                    row.version = version;
                    record.put_outputs(root, vec![(path.clone(), row.clone())]);
                    model.insert(path.clone(), row);
                }
            }
            prop_assert_eq!(record.output(root, &path), model.get(&path).cloned());
        }
        let expected: Vec<_> = model.into_iter().collect();
        prop_assert_eq!(record.scan_outputs(root, "").collect::<Vec<_>>(), expected.clone());
        let above = expected.iter().filter_map(|(path, _)| path.as_str().split_once('/'));
        for (top, _) in above.clone() {
            let below = above.clone().filter(|(other, _)| *other == top);
            let names = below.filter_map(|(_, rest)| Some(rest.split_once('/')?.0.to_owned()));
            prop_assert_eq!(record.directories_in(root, top), names.collect());
        }
        drop(record);
        let (record, _) = open(dir.path());
        prop_assert_eq!(record.scan_outputs(root, "").collect::<Vec<_>>(), expected);
    }
}

/// A path below a few directories whose names are near each other in the order of bytes.
fn crowded() -> impl Strategy<Value = ExecPath> {
    prop::collection::vec(
        prop_oneof![
            Just("a"),
            Just("a-b"),
            Just("a.b"),
            Just("b"),
            Just("ab"),
            Just("\u{1}c")
        ],
        1..4,
    )
    .prop_map(|names| path(&names.join("/")))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Files and directories of the same name too: two builds of one root may well know both.
    #[test]
    fn a_scan_is_in_the_order_of_paths_whatever_the_prefix(
        parts in prop::collection::vec((prop::collection::vec(crowded(), 0..20), any::<bool>(), any::<bool>()), 1..5),
        prefix in crowded(), cut in any::<prop::sample::Index>())
    {
        let dir = tempfile::tempdir().unwrap();
        let (record, _) = open(dir.path());
        let root = record.root("/exec", 1, 2);
        let mut model = std::collections::BTreeMap::new();
        for (version, (paths, removed, flushed)) in parts.into_iter().enumerate() {
            if removed {
                record.remove_outputs(root, &paths);
                model.retain(|path, _| !paths.contains(path));
            } else {
                let rows: Vec<_> = paths.into_iter().map(|path| {
                    (path, OutputRow { version: version as u64, ..numbered(1).1 })
                }).collect();
                record.put_outputs(root, rows.clone());
                model.extend(rows);
            }
            if flushed {
                run(record.flush()).unwrap();
            }
        }
        for prefix in ["", prefix.as_str(), &prefix.as_str()[..cut.index(prefix.as_str().len())]] {
            let expected: Vec<_> = model.iter()
                .filter(|(path, _)| path.as_str().starts_with(prefix))
                .map(|(path, row)| (path.clone(), row.clone()))
                .collect();
            prop_assert_eq!(record.count_outputs(root, prefix), expected.len());
            prop_assert_eq!(record.scan_outputs(root, prefix).collect::<Vec<_>>(), expected);
            let mut after = Vec::new();
            let see = |row: SeenOutput<'_>| {
                after.push(row.path().unwrap());
                std::ops::ControlFlow::Continue(())
            };
            prop_assert!(record.see_outputs_after(root, prefix, see));
            let expected: Vec<_> = model.keys().filter(|path| path.as_str() > prefix).cloned().collect();
            prop_assert_eq!(after, expected);
        }
    }
}

#[test]
fn a_directory_that_grows_file_by_file_stays_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let (record, _) = open(dir.path());
    let root = record.root("/exec", 1, 2);
    // In no particular order, so that blocks are split everywhere.
    let order = || (0..3000u32).map(|n| n * 1117 % 3000);
    let row = |n: u32| (path(&format!("d/file{n:04}")), numbered(n).1);
    for n in order() {
        record.put_outputs(root, vec![row(n)]);
        if n % 100 == 0 {
            run(record.flush()).unwrap();
        }
    }
    let expected: Vec<_> = (0..3000).map(row).collect();
    assert_eq!(record.scan_outputs(root, "d/").collect::<Vec<_>>(), expected);
    run(record.flush()).unwrap();
    assert_eq!(record.scan_outputs(root, "").collect::<Vec<_>>(), expected);
    // And again, so that they are taken out everywhere.
    for n in order().filter(|n| n % 3 > 0) {
        record.remove_outputs(root, &[row(n).0]);
        if n % 100 == 1 {
            run(record.flush()).unwrap();
        }
    }
    run(record.flush()).unwrap();
    let expected: Vec<_> = (0..3000).step_by(3).map(row).collect();
    assert_eq!(record.scan_outputs(root, "").collect::<Vec<_>>(), expected);
}

#[test]
fn what_is_recorded_of_a_root_after_it_was_forgotten_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (record, _) = open(dir.path());
    let root = record.root("/exec", 1, 2);
    let (old, waiting, new) = (numbered(1), numbered(2), numbered(3));
    for flushed in [false, true] {
        record.put_outputs(root, vec![old.clone()]);
        run(record.flush()).unwrap();
        record.put_outputs(root, vec![waiting.clone()]);
        record.shared().forget_outputs(root);
        record.put_outputs(root, vec![new.clone()]);
        if flushed {
            run(record.flush()).unwrap();
        }
        assert_eq!(
            record.scan_outputs(root, "").collect::<Vec<_>>(),
            std::slice::from_ref(&new)
        );
        assert_eq!(record.output(root, &old.0), None);
        assert_eq!(record.output(root, &waiting.0), None);
    }
}

#[test]
fn large_inline_contents_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (record, _) = open(dir.path());
    let root = record.root("/exec", 1, 2);
    let row = OutputRow::known(OutputContent::Inline(vec![7; 3 << 20].into()));
    record.put_outputs(root, vec![(path("a"), row.clone()), (path("b"), row.clone())]);
    run(record.flush()).unwrap();
    drop(record);
    let (record, _) = open(dir.path());
    assert_eq!(record.output(root, &path("b")), Some(row));
}

#[test]
fn invocations_come_newest_first_and_once_each() {
    let dir = tempfile::tempdir().unwrap();
    let (record, _) = open(dir.path());
    for (id, started) in [("b", 20), ("c", 30), ("a", 10), ("late", 0)] {
        record.put_invocation(&invocation(id, started, None, 0));
    }
    run(record.flush()).unwrap();
    // Its start was not known at first.
    record.put_invocation(&invocation("late", 25, None, 0));
    let ids = |limit| {
        record
            .invocations(limit)
            .into_iter()
            .map(|i| i.invocation_id)
            .collect::<Vec<_>>()
    };
    assert_eq!(ids(10), ["c", "late", "b", "a"]);
    assert_eq!(ids(2), ["c", "late"]);
    record.put_targets(
        "b",
        &[TargetRow {
            label: "//x".into(),
            ..TargetRow::default()
        }],
    );
    record.remove_invocations(&["b".into(), "never seen".into()]);
    run(record.flush()).unwrap();
    assert_eq!(ids(10), ["c", "late", "a"]);
    assert_eq!((record.invocation("b"), record.targets("b").len()), (None, 0));
}

#[test]
fn a_roots_newest_invocation_goes_by_version_not_by_arrival() {
    let dir = tempfile::tempdir().unwrap();
    let (record, _) = open(dir.path());
    let root = record.root("/exec", 1, 2);
    assert_eq!(record.newest_invocation(root), None);
    let (old, new) = (record.next_version(root), record.next_version(root));
    let above = record.next_version_above(root, new + 1_000_000);
    assert!(above > new + 1_000_000 && record.next_version(root) > above);
    record.put_invocation(&invocation("new", 10, Some(root), new));
    record.put_invocation(&invocation("old", 20, Some(root), old));
    assert_eq!(record.newest_invocation(root).unwrap().invocation_id, "new");
    let row = record.root_row(root).unwrap();
    assert_eq!(
        (row.path.as_str(), row.workspace.as_str()),
        ("/exec", "/home/u/ws")
    );
    assert_eq!(record.roots().len(), 1);
}

#[test]
fn of_builds_with_outputs_one_without_a_root_is_meant_only_if_there_is_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let (record, _) = open(dir.path());
    let root = record.root("/exec", 1, 2);
    let build = |id, started_ms, root| InvocationRow {
        command: "build".to_owned(),
        ..invocation(id, started_ms, root, 1)
    };
    let meant = |id: &str| {
        let which = Which::of(id);
        let id_of = |row: InvocationRow| row.invocation_id;
        let [any, with_outputs] = [
            record.find_invocation(&which),
            record.find_invocation_with_outputs(&which),
        ];
        (any.map(id_of).unwrap(), with_outputs.map(id_of).unwrap())
    };
    record.put_invocation(&build("failed", 30, None));
    assert_eq!(meant(""), ("failed".to_owned(), "failed".to_owned()));
    record.put_invocation(&build("good", 20, Some(root)));
    record.put_invocation(&build("older", 10, Some(root)));
    assert_eq!(meant(""), ("failed".to_owned(), "good".to_owned()));
    assert_eq!(meant("failed"), ("failed".to_owned(), "failed".to_owned()));
}

#[test]
fn targets_belong_to_their_invocation_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (record, _) = open(dir.path());
    let target = |label: &str, aspect: &str| TargetRow {
        label: label.into(),
        aspect: aspect.into(),
        ..TargetRow::default()
    };
    let rows = [
        target("//a", ""),
        target("//a", "x"),
        target("//a:b", ""),
        target("//b", ""),
    ];
    record.put_targets("inv", &rows);
    record.put_targets("inv2", &rows[..1]);
    record.put_targets("", &rows[1..2]);
    assert_eq!(record.targets("inv"), rows);
    let settled = TargetRow {
        state: TargetState::Settled,
        ..rows[0].clone()
    };
    record.put_targets("inv", std::slice::from_ref(&settled));
    assert_eq!(record.targets("inv")[..2], [settled, rows[1].clone()]);
    assert_eq!(record.targets("inv2"), rows[..1]);
    assert_eq!(record.targets(""), rows[1..2]);
}

#[test]
fn versions_grow_over_restarts_and_over_a_lost_record() {
    let dir = tempfile::tempdir().unwrap();
    let mut last = 0;
    for round in 0..4 {
        let (record, _) = open(dir.path());
        let root = record.root("/exec", 1, 2);
        for _ in 0..3 {
            let version = record.next_version(root);
            assert!(version > last, "round {round}");
            last = version;
        }
        drop(record);
        if round == 1 {
            std::fs::remove_dir_all(dir.path()).unwrap();
            // A lost record is made up for by the clock, in milliseconds: builds don't begin faster than that.
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

#[test]
fn many_writers_and_readers_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (record, _) = open(dir.path());
    let root = record.root("/exec", 1, 2);
    std::thread::scope(|scope| {
        for part in 0..4u32 {
            let record = record.clone();
            scope.spawn(move || {
                for n in (part * 1000..part * 1000 + 1000).step_by(10) {
                    let rows = numbered_rows(n..n + 10);
                    record.put_outputs(root, rows.clone());
                    for (path, row) in rows {
                        assert_eq!(record.output(root, &path), Some(row));
                    }
                }
                run(async {
                    record.room().await;
                    record.flush().await.unwrap();
                });
            });
        }
    });
    assert_eq!(record.count_outputs(root, ""), 4000);
    assert_eq!(record.health(), Health::default());
}
