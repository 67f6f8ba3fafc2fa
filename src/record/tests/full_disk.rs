//! A file system that is full. Needs a mount, and so root.

use std::{fs, path::PathBuf, process::Command};

use outhaul_testkit::eventually;

use super::*;
use crate::record::error::FlushError;

/// A small tmpfs, unmounted when dropped.
struct SmallDisk {
    dir: tempfile::TempDir,
}

impl SmallDisk {
    fn mount(size: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "outhaul-test"])
            .arg(dir.path())
            .output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self { dir }),
            other => {
                eprintln!("SKIPPED: cannot mount a tmpfs, so a full disk is not tested: {other:?}");
                None
            }
        }
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn ballast(&self) -> PathBuf {
        self.dir.path().join("ballast")
    }

    /// Leaves no space.
    fn fill(&self) {
        use std::io::Write as _;
        let mut file = fs::File::create(self.ballast()).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.dir.path()).status();
    }
}

#[test]
fn a_full_disk_degrades_the_record_and_space_mends_it() {
    let Some(disk) = SmallDisk::mount("12m") else {
        return;
    };
    let (record, _) = open(&disk.state());
    let root = record.root("/exec", 1, 2);
    record.put_outputs(root, numbered_rows(0..1000));
    run(record.flush()).unwrap();
    let identity = record.identity();
    disk.fill();
    let mut n = 1000;
    eventually("the disk's end is noticed", || {
        record.put_outputs(root, numbered_rows(n..n + 500));
        n += 500;
        run(record.flush()).is_err()
    });
    assert!(!record.health().is_ok());
    let (last_path, last_row) = numbered(n - 1);
    assert_eq!(
        record.output(root, &last_path),
        Some(last_row),
        "what waits is still read"
    );
    fs::remove_file(disk.ballast()).unwrap();
    eventually("space is noticed", || record.health().is_ok());
    let flushed = run(record.flush());
    let health = record.health();
    assert_eq!(record.identity(), identity, "the store is still the same");
    if flushed.is_ok() {
        assert_eq!(health.dropped_rows, 0);
        assert_eq!(record.count_outputs(root, ""), n as usize);
    }
}

#[test]
fn a_disk_full_from_the_start_lets_the_daemon_start() {
    let Some(disk) = SmallDisk::mount("4m") else {
        return;
    };
    fs::create_dir(disk.state()).unwrap();
    disk.fill();
    let (record, opening) = open(&disk.state());
    assert!(matches!(opening, Opening::Unavailable { .. }), "{opening:?}");
    let root = record.root("/exec", 1, 2);
    let version = record.next_version(root);
    let (path, row) = numbered(1);
    record.put_outputs(root, vec![(path.clone(), row.clone())]);
    assert_eq!(record.output(root, &path), Some(row.clone()));
    assert!(matches!(run(record.flush()), Err(FlushError::Degraded(_))));
    fs::remove_file(disk.ballast()).unwrap();
    eventually("space is noticed", || record.health().is_ok());
    run(record.flush()).unwrap();
    drop(record);
    let (record, opening) = open(&disk.state());
    assert_eq!((opening, record.root("/exec", 1, 2)), (Opening::Existing, root));
    assert_eq!(record.output(root, &path), Some(row));
    assert!(record.next_version(root) > version);
}
