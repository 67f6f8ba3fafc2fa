use std::{fs, path::PathBuf};

use super::*;
use crate::record::{
    block::{self, Builder},
    keys,
    store::{Store, TreeId},
    value::seal,
};

pub(super) const ROWS: u32 = 3000;

/// A state directory with a healthy record of [`ROWS`] rows under root 1, closed.
fn healthy(dir: &Path) {
    let (record, _) = open(dir);
    let root = record.root("/exec", 1, 2);
    record.put_outputs(root, numbered_rows(0..ROWS));
    run(record.flush()).unwrap();
}

pub(super) fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Opens a state directory in whatever shape it is. The record must work, and may have forgotten but not garbled.
pub(super) fn works_anyhow(dir: &Path) -> Opening {
    let (record, opening) = open(dir);
    if let Opening::Quarantined { moved_to, reason } = &opening {
        assert!(moved_to.exists() && !reason.is_empty(), "{opening:?}");
    }
    assert!(!matches!(opening, Opening::Unavailable { .. }), "{opening:?}");
    let root = record.root("/exec", 1, 2);
    let wanted = numbered_rows(0..ROWS);
    let paths: Vec<_> = wanted.iter().map(|(p, _)| p.clone()).collect();
    for (found, (path, row)) in record.outputs(root, &paths).into_iter().zip(&wanted) {
        assert!(found.is_none_or(|found| found == *row), "{path} is garbled");
    }
    // Damage found by these reads makes the writer start over, which may lose the first rows.
    let new = numbered(1_000_000);
    let kept = (0..20).any(|_| {
        record.put_outputs(root, vec![new.clone()]);
        run(record.flush()).is_ok() && record.output(root, &new.0).as_ref() == Some(&new.1)
    });
    assert!(kept, "{:?}", record.health());
    drop(record);
    let (record, _) = open(dir);
    assert_eq!(record.output(record.root("/exec", 1, 2), &new.0), Some(new.1));
    opening
}

pub(super) fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.is_file())
        .collect();
    files.sort();
    files
}

/// Damages copies of a healthy store in many ways, and opens each.
fn damaged_copies(damage: impl Fn(&mut Vec<u8>, usize, usize), rounds: usize) -> Vec<Opening> {
    let base = tempfile::tempdir().unwrap();
    healthy(base.path());
    (0..rounds)
        .map(|round| {
            let copy = tempfile::tempdir().unwrap();
            copy_dir(base.path(), copy.path());
            for file in files(&copy.path().join("record")) {
                let mut bytes = fs::read(&file).unwrap();
                damage(&mut bytes, round, rounds);
                fs::write(&file, bytes).unwrap();
            }
            works_anyhow(copy.path())
        })
        .collect()
}

pub(super) fn rounds(normal: usize) -> usize {
    std::env::var("OUTHAUL_DAMAGE_ROUNDS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(normal)
}

#[test]
fn flipped_bytes_anywhere_cost_at_most_the_record() {
    let openings = damaged_copies(
        |bytes, round, rounds| {
            if let Some(byte) = (bytes.len() * round / rounds).checked_add(round * 7 % 97)
                && let Some(byte) = bytes.get_mut(byte)
            {
                *byte ^= 0x41;
            }
        },
        rounds(24),
    );
    assert!(
        openings.iter().any(|o| matches!(o, Opening::Quarantined { .. })),
        "{openings:?}"
    );
}

#[test]
fn zeroed_pages_cost_at_most_the_record() {
    damaged_copies(
        |bytes, round, rounds| {
            let at = bytes.len() * round / rounds;
            let end = (at + 4096).min(bytes.len());
            bytes[at..end].fill(0);
        },
        rounds(12),
    );
}

#[test]
fn files_cut_short_cost_at_most_the_record() {
    let openings = damaged_copies(
        |bytes, round, rounds| bytes.truncate(bytes.len() * round / rounds),
        rounds(10),
    );
    assert!(
        openings.contains(&Opening::Fresh) || openings.len() < 10,
        "{openings:?}"
    );
}

#[test]
fn garbage_costs_at_most_the_record() {
    for what in [
        "a directory of noise",
        "a file",
        "noise for a database",
        "an empty directory",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("record");
        let noise: Vec<u8> = (0..100_000u32)
            .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect();
        match what {
            "a file" => fs::write(&place, &noise).unwrap(),
            "a directory of noise" => {
                fs::create_dir_all(place.join("db")).unwrap();
                fs::write(place.join("conf"), &noise).unwrap();
            }
            "noise for a database" => {
                fs::create_dir(&place).unwrap();
                fs::write(place.join("db"), &noise).unwrap();
            }
            _ => fs::create_dir(&place).unwrap(),
        }
        let opening = works_anyhow(dir.path());
        assert_ne!(opening, Opening::Existing, "{what}");
    }
}

fn quarantine_reason(dir: &Path) -> String {
    let Opening::Quarantined { reason, .. } = works_anyhow(dir) else {
        panic!("not quarantined")
    };
    reason
}

#[test]
fn another_programs_database_is_moved_away_unharmed() {
    for tree in ["", "theirs"] {
        let dir = tempfile::tempdir().unwrap();
        let db = opened(&dir.path().join("record"));
        if tree.is_empty() {
            db.insert("k", "v").unwrap();
        } else {
            db.open_tree(tree).unwrap();
        }
        db.flush().unwrap();
        drop(db);
        let reason = quarantine_reason(dir.path());
        assert!(reason.contains("another program"), "{reason}");
        let moved = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().path())
            .find(|p| p.to_string_lossy().contains("quarantined"))
            .unwrap();
        let db = opened(&moved);
        assert!(tree.is_empty() == db.get("k").unwrap().is_some());
    }
}

/// A record's database. A child that another test forked a moment ago may still hold sled's lock.
fn opened(path: &Path) -> sled::Db {
    let open = |_| {
        let opened = sled::open(path);
        opened
            .map_err(|_| std::thread::sleep(std::time::Duration::from_millis(20)))
            .ok()
    };
    (0..250).find_map(open).unwrap()
}

/// Changes a closed store behind the record's back.
fn tamper(dir: &Path, tree: &str, key: &[u8], value: Option<Vec<u8>>) {
    let db = opened(&dir.join("record"));
    let tree = db.open_tree(tree).unwrap();
    match value {
        Some(value) => tree.insert(key, value).map(drop).unwrap(),
        None => tree.remove(key).map(drop).unwrap(),
    }
    db.flush().unwrap();
}

#[test]
fn a_newer_schema_is_moved_away_and_named() {
    let dir = tempfile::tempdir().unwrap();
    healthy(dir.path());
    let meta = crate::proto::outhaul::v1::RecordMeta {
        schema: 99,
        identity: "x".into(),
        created_by: "9.9.9".into(),
        ..Default::default()
    };
    tamper(dir.path(), "meta", b"meta", Some(seal(&meta)));
    let reason = quarantine_reason(dir.path());
    assert!(
        reason.contains("schema 99") && reason.contains("9.9.9"),
        "{reason}"
    );
}

#[test]
fn a_store_that_does_not_describe_itself_is_moved_away() {
    for value in [None, Some(vec![]), Some(b"\x02whatever".to_vec())] {
        let dir = tempfile::tempdir().unwrap();
        healthy(dir.path());
        tamper(dir.path(), "meta", b"meta", value);
        quarantine_reason(dir.path());
    }
}

#[test]
fn an_unreadable_block_is_absent_and_counted_and_can_be_written_again() {
    let dir = tempfile::tempdir().unwrap();
    healthy(dir.path());
    let place = {
        let db = opened(&dir.path().join("record"));
        let blocks: Vec<_> = db
            .open_tree("outputs")
            .unwrap()
            .iter()
            .map(Result::unwrap)
            .collect();
        assert!(blocks.len() > 10);
        blocks[5].0.to_vec()
    };
    tamper(dir.path(), "outputs", &place, Some(b"\xc8whatever".to_vec()));
    let (record, opening) = open(dir.path());
    assert_eq!(opening, Opening::Existing);
    let root = record.root("/exec", 1, 2);
    let rows = numbered_rows(0..ROWS);
    let paths: Vec<_> = rows.iter().map(|(path, _)| path.clone()).collect();
    let found = record.outputs(root, &paths);
    let lost = found.iter().filter(|found| found.is_none()).count();
    assert!((10..200).contains(&lost), "{lost}");
    for (found, (path, row)) in found.into_iter().zip(&rows) {
        assert!(found.is_none_or(|found| found == *row), "{path} is garbled");
    }
    assert_eq!(record.scan_outputs(root, "").count(), ROWS as usize - lost);
    let health = record.health();
    assert!(health.is_ok() && health.unreadable_values >= 2, "{health:?}");
    record.put_outputs(root, rows.clone());
    run(record.flush()).unwrap();
    assert_eq!(record.scan_outputs(root, "").count(), ROWS as usize);
    assert_eq!(
        record.outputs(root, &paths).into_iter().flatten().count(),
        ROWS as usize
    );
}

#[test]
fn of_rows_that_a_killed_writer_left_in_two_blocks_those_of_the_right_one_count() {
    let dir = tempfile::tempdir().unwrap();
    let root = {
        let (record, _) = open(dir.path());
        record.root("/exec", 1, 2)
    };
    let row = |version| OutputRow {
        version,
        ..numbered(1).1
    };
    let block = |rows: &[(&str, &str, u64)]| {
        let mut builder = Builder::default();
        for (directory, name, version) in rows {
            builder.push(&(*directory).into(), name, &row(*version));
        }
        Some(block::seal(&builder.finish()))
    };
    // The first was to be split before `d/m`; the second part was written, and the first was not.
    let blocks = [
        (
            keys::root(root),
            block(&[("d/", "a", 1), ("d/", "m", 1), ("f/", "old", 1)]),
        ),
        (
            keys::block(root, b"d/", b"m"),
            block(&[("d/", "m", 2), ("e/", "new", 2), ("f/", "old", 2)]),
        ),
    ];
    let (store, _) = Store::open(&dir.path().join("record"), 0).unwrap();
    store
        .apply(TreeId::Outputs, blocks.iter().map(|(k, v)| (k, v)))
        .unwrap();
    store.flush().unwrap();
    drop(store);
    let (record, _) = open(dir.path());
    let mut expected = vec![("d/a", 1), ("d/m", 2), ("e/new", 2), ("f/old", 2)];
    for round in 0..2 {
        let found: Vec<_> = record
            .scan_outputs(root, "")
            .map(|(path, row)| (path.as_str().to_owned(), row.version))
            .collect();
        assert_eq!(
            found,
            expected
                .iter()
                .map(|(p, v)| ((*p).to_owned(), *v))
                .collect::<Vec<_>>()
        );
        for (text, version) in &expected {
            assert_eq!(record.output(root, &path(text)).unwrap().version, *version);
        }
        if round == 0 {
            record.put_outputs(root, vec![(path("d/b"), row(3))]);
            run(record.flush()).unwrap();
            expected.insert(1, ("d/b", 3));
        }
    }
}

#[test]
fn a_record_starts_anew_under_a_running_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let (record, _) = open(dir.path());
    let (first, second) = (record.root("/exec", 1, 2), record.root("/other", 1, 3));
    record.put_outputs(second, numbered_rows(0..10));
    run(record.flush()).unwrap();
    let identity = record.identity();
    let store = record.shared().store().unwrap();
    record.shared().state().damaged = Some((store, "a page is gone".into()));
    record.put_outputs(second, numbered_rows(10..20));
    run(record.flush()).unwrap();
    assert_eq!(record.health().quarantined, 1);
    assert!(record.health().is_ok());
    assert_ne!(record.identity(), identity);
    assert_eq!(
        record.count_outputs(second, ""),
        10,
        "the rows that were still queued"
    );
    drop(record);
    let (record, opening) = open(dir.path());
    assert_eq!(opening, Opening::Existing);
    assert_eq!(
        (record.root("/exec", 1, 2), record.root("/other", 1, 3)),
        (first, second)
    );
}

#[test]
fn a_store_is_one_of_its_trees_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    healthy(dir.path());
    let (store, _) = Store::open(&dir.path().join("record"), 0).unwrap();
    let count = |tree| {
        store
            .page(tree, &[], std::ops::Bound::Unbounded, usize::MAX)
            .unwrap()
            .len()
    };
    let [roots, blocks, others @ ..] = TreeId::ALL.map(count);
    assert_eq!((roots, others), (1, [0, 0, 0]));
    assert!((10..ROWS as usize / 10).contains(&blocks), "{blocks}");
}

/// As it is after a kill at the wrong moment; sled alone calls such a store corrupted.
#[test]
fn a_snapshot_that_a_killed_process_did_not_finish_costs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    healthy(dir.path());
    let left = dir.path().join("record").join("snap.FFFFFFFFFFFFFFFF.generating");
    for bytes in [&b""[..], b"half of a snapshot"] {
        std::fs::write(&left, bytes).unwrap();
        let (record, opening) = open(dir.path());
        assert_eq!(opening, Opening::Existing);
        assert!(!left.exists());
        let root = record.root("/exec", 1, 2);
        let (path, row) = numbered(0);
        assert_eq!(record.output(root, &path), Some(row));
        // Left alone while a process has it open: it may be being written.
        std::fs::write(&left, bytes).unwrap();
        assert!(Store::open(&dir.path().join("record"), 0).is_err());
        assert!(left.exists());
    }
}
