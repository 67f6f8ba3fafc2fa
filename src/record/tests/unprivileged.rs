//! As a user who is not root: only then can a file be unreadable.

use std::{fs, os::unix::fs::PermissionsExt as _};

use super::*;
use crate::unprivileged;

#[test]
fn a_store_that_must_not_be_read_or_written_is_left_alone_and_the_record_works_from_memory() {
    let name = "a_store_that_must_not_be_read_or_written_is_left_alone_and_the_record_works_from_memory";
    unprivileged::run(
        &format!("record::tests::unprivileged::{name}"),
        take_permissions_away,
    );
}

fn take_permissions_away(dir: &Path) {
    for (what, mode) in [
        ("record", 0),
        ("record/db", 0),
        ("record/conf", 0),
        ("record/db", 0o400),
    ] {
        let state = tempfile::tempdir_in(dir).unwrap();
        let (record, _) = open(state.path());
        let root = record.root("/exec", 1, 2);
        record.put_outputs(root, numbered_rows(0..50));
        run(record.flush()).unwrap();
        drop(record);
        let path = state.path().join(what);
        let before = fs::metadata(&path).unwrap().permissions();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let (record, opening) = open(state.path());
        assert!(
            matches!(&opening, Opening::Unavailable { reason } if reason.contains("denied")),
            "{what}: {opening:?}"
        );
        let root = record.root("/exec", 1, 2);
        let (path_of_new, row) = numbered(1000);
        record.put_outputs(root, vec![(path_of_new.clone(), row.clone())]);
        assert_eq!(record.output(root, &path_of_new), Some(row), "{what}");
        assert!(!record.health().is_ok(), "{what}");
        drop(record);
        fs::set_permissions(&path, before).unwrap();
        let (record, opening) = open(state.path());
        assert_eq!(opening, Opening::Existing, "{what}");
        let root = record.root("/exec", 1, 2);
        assert!(record.output(root, &numbered(7).0).is_some(), "{what}");
    }
}
