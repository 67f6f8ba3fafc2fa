//! Killing the process, by running this test binary as a child that writes until it is killed.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    time::Duration,
};

use super::*;

const CHILD_DIR: &str = "OUTHAUL_TEST_RECORD_CHILD";

/// The child: flushes every hundred rows and says how many are safe. No test unless it is run as one.
#[test]
#[expect(clippy::print_stdout, reason = "the parent reads it")]
fn child_that_is_killed() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else {
        return;
    };
    let (record, opening) = open(Path::new(&dir));
    let root = record.root("/exec", 1, 2);
    let begin = u32::try_from(record.count_outputs(root, "")).unwrap();
    assert!(begin == 0 || opening == Opening::Existing, "{opening:?}");
    for n in (begin..1_000_000).step_by(100) {
        record.put_outputs(root, numbered_rows(n..n + 100));
        run(record.flush()).unwrap();
        // The harness may hold the line's beginning already.
        println!("\nsafe {}", n + 100);
    }
}

#[test]
fn a_killed_process_loses_nothing_that_was_flushed() {
    let dir = tempfile::tempdir().unwrap();
    let mut safe = 0;
    for round in 0..6u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "record::tests::crash::child_that_is_killed",
                "--nocapture",
            ])
            .env(CHILD_DIR, dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut seen = 0;
        while seen <= round {
            let line = lines.next().expect("the child ended by itself").unwrap();
            if let Some(n) = line.strip_prefix("safe ") {
                safe = n.parse().unwrap();
                seen += 1;
            }
        }
        std::thread::sleep(Duration::from_millis(round * 3));
        child.kill().unwrap();
        child.wait().unwrap();
        for line in lines.map_while(Result::ok) {
            safe = line
                .strip_prefix("safe ")
                .and_then(|n| n.parse().ok())
                .unwrap_or(safe);
        }

        let (record, opening) = open(dir.path());
        assert_eq!(opening, Opening::Existing, "round {round}");
        let root = record.root("/exec", 1, 2);
        let wanted = numbered_rows(0..safe);
        let paths: Vec<_> = wanted.iter().map(|(p, _)| p.clone()).collect();
        for (found, (path, row)) in record.outputs(root, &paths).into_iter().zip(wanted) {
            assert_eq!(found, Some(row), "round {round}: {path}");
        }
        // The child goes on from whole hundreds.
        let surplus: Vec<_> = record
            .scan_outputs(root, "")
            .map(|(p, _)| p)
            .filter(|p| !paths.contains(p))
            .collect();
        record.remove_outputs(root, &surplus);
    }
}
