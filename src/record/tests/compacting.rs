//! Killing a process while it rewrites its store, by running this test binary as a child that does nothing else.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::*;
use crate::record::{
    error::StoreError,
    opening::{StoreLocation, make_compact},
};

const CHILD_DIR: &str = "OUTHAUL_TEST_COMPACTING_CHILD";
const ROWS: u32 = 2000;

/// The child: opens the store and rewrites it, again and again. Does nothing unless it is run as the child.
#[test]
fn child_that_is_killed() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else {
        return;
    };
    let place = StoreLocation::new(Path::new(&dir));
    loop {
        let (store, opening) = place.open();
        // Its lock may still be with a process that was forked meanwhile.
        if matches!(opening, Opening::Unavailable { .. }) {
            continue;
        }
        assert_eq!(opening, Opening::Existing);
        let (dir, compact) = place.dirs();
        let made = make_compact(store.unwrap(), &dir, &compact, &Mutex::new(true));
        assert!(!matches!(made, Err(StoreError::Damaged(_))), "{:?}", made.err());
    }
}

/// `OUTHAUL_CRASH_CASES` says how often.
#[test]
fn a_process_killed_while_it_writes_its_store_anew_loses_nothing_of_it() {
    let kills = std::env::var("OUTHAUL_CRASH_CASES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(8u64);
    let dir = tempfile::tempdir().unwrap();
    let wanted = numbered_rows(0..ROWS);
    let paths: Vec<_> = wanted.iter().map(|(p, _)| p.clone()).collect();
    let identity = {
        let (record, _) = open(dir.path());
        let root = record.root("/exec", 1, 2);
        record.put_outputs(root, wanted.clone());
        run(record.flush()).unwrap();
        record.identity()
    };
    let (mut left, mut cycle) = (0, Duration::from_millis(100));
    for kill in 0..kills {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "record::tests::compacting::child_that_is_killed"])
            .env(CHILD_DIR, dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // From its first work on, all over the time that one round takes.
        let began = Instant::now();
        let compact = dir.path().join("record.compact");
        while !compact.exists() && began.elapsed() < Duration::from_secs(30) {
            assert!(
                child.try_wait().unwrap().is_none(),
                "kill {kill}: the child ended"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        cycle = (cycle * 3 + began.elapsed()) / 4;
        std::thread::sleep(cycle.mul_f64((kill * 37 % 100) as f64 / 100.0));
        child.kill().unwrap();
        child.wait().unwrap();
        left += u64::from(compact.exists());
        let (record, opening) = loop {
            match open(dir.path()) {
                (record, Opening::Unavailable { reason }) if began.elapsed() < Duration::from_secs(60) => {
                    eprintln!("kill {kill}: {reason}");
                    drop(record);
                }
                opened => break opened,
            }
        };
        assert_eq!(opening, Opening::Existing, "kill {kill}");
        assert_eq!(record.identity(), identity, "kill {kill}");
        assert!(!compact.exists(), "kill {kill}");
        let root = record.root("/exec", 1, 2);
        for (found, (path, row)) in record.outputs(root, &paths).into_iter().zip(&wanted) {
            assert_eq!(found.as_ref(), Some(row), "kill {kill}: {path}");
        }
    }
    eprintln!("{kills} kills, {left} of them with a store half written");
}
