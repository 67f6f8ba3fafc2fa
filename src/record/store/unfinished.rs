//! Files that a killed sled leaves, and that stop it from opening the store.
//!
//! It writes a snapshot as `snap.<number>.generating` and renames it. When it looks for the newest snapshot, it takes
//! such a file for one (sled 0.34 leaves out another ending), finds it torn, and calls the whole store corrupted. The
//! store is well: the snapshot before it is there, and so is the log.

use std::{fs, fs::File, path::Path};

use rustix::fs::{FlockOperation, flock};

const DATA: &str = "db";
const PREFIX: &str = "snap.";
const ENDING: &str = ".generating";

/// Removes unfinished snapshots of a store that no process has open. Sled reports those that cannot be removed.
pub(super) fn remove(dir: &Path) {
    // Who has a store open holds its data file's lock.
    let Ok(data) = File::open(dir.join(DATA)) else {
        return;
    };
    if flock(&data, FlockOperation::NonBlockingLockExclusive).is_err() {
        return;
    }
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let is_unfinished = name
            .to_str()
            .is_some_and(|name| name.starts_with(PREFIX) && name.ends_with(ENDING));
        if is_unfinished && let Err(error) = fs::remove_file(entry.path()) {
            tracing::debug!(path = %entry.path().display(), %error, "failed to remove an unfinished snapshot");
        }
    }
    // Closing it gives the lock back, unless a child that was forked just now has it still: then it is not waited for.
    let _ = flock(&data, FlockOperation::Unlock);
}
