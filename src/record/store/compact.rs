//! Rewriting a store when little of it is alive: sled never gives space back.

use std::{
    fs::{self, File},
    io,
    path::Path,
    thread,
    time::Instant,
};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::{META_TREE, Store, TreeId, sort};
use crate::record::{error::StoreError, shield::shield};

/// Stores up to this size stay as they are.
const SMALL: u64 = 64 << 20;

/// How many times what is alive in it a store may take. sled alone stays below some five times.
const WORTH: u64 = 4;

/// Values copied at once.
const VALUES_PER_BATCH: usize = 64;

impl Store {
    /// Whether it takes far more space than what is in it.
    pub(in crate::record) fn is_bloated(&self) -> bool {
        self.is_larger_than(SMALL)
    }

    fn is_larger_than(&self, small: u64) -> bool {
        let alive = || {
            let enough = self.size_on_disk()? / WORTH;
            if enough * WORTH <= small {
                return Ok(false);
            }
            let mut alive = 0;
            for tree in &self.open_db()?.trees {
                for entry in tree {
                    let (key, value) = entry.map_err(sort)?;
                    alive += (key.len() + value.len()) as u64;
                    if alive >= enough {
                        return Ok(false);
                    }
                }
            }
            Ok(true)
        };
        // What cannot be read is found by anyone who needs it.
        shield(alive).unwrap_or(false)
    }

    /// Writes everything in it to a new store, until a deadline.
    pub(in crate::record) fn copy_to(&self, dir: &Path, deadline: Instant) -> Result<(), StoreError> {
        shield(|| {
            let from = self.open_db()?;
            // Never into what another attempt has left.
            let db = super::config(dir).create_new(true).open().map_err(sort)?;
            let copy = || {
                for id in TreeId::ALL {
                    let to = db.open_tree(id.name()).map_err(sort)?;
                    copy_tree(&from.trees[id as usize], &to, deadline)?;
                }
                // Last: without it this is not a store.
                let meta = from.db.open_tree(META_TREE).map_err(sort)?;
                copy_tree(&meta, &db.open_tree(META_TREE).map_err(sort)?, deadline)?;
                db.flush().map(drop).map_err(sort)
            };
            let copied = copy();
            if copied.is_err() {
                // Closing a broken sled may hang. Without a thread it is dropped here.
                let _ = thread::Builder::new().spawn(move || drop(db));
            }
            copied
        })
    }
}

fn copy_tree(from: &sled::Tree, to: &sled::Tree, deadline: Instant) -> Result<(), StoreError> {
    let mut batch = sled::Batch::default();
    let mut values = 0;
    for entry in from {
        let (key, value) = entry.map_err(sort)?;
        batch.insert(key, value);
        values += 1;
        if values % VALUES_PER_BATCH == 0 {
            if Instant::now() > deadline {
                return Err(StoreError::Unavailable("copying it takes too long".into()));
            }
            to.apply_batch(std::mem::take(&mut batch)).map_err(sort)?;
        }
    }
    to.apply_batch(batch).map_err(sort)
}

/// Puts the closed store in `fresh` in the place of the closed one in `dir`, which is in `fresh` then. At no moment is
/// there none in `dir`.
pub(in crate::record) fn exchange(fresh: &Path, dir: &Path) -> io::Result<()> {
    sync_all(fresh)?;
    renameat_with(CWD, fresh, CWD, dir, RenameFlags::EXCHANGE)?;
    match dir.parent() {
        Some(above) => File::open(above)?.sync_all(),
        None => Ok(()),
    }
}

/// Syncs a directory with all that is in it: sled keeps large pages in files of their own, in a directory below.
fn sync_all(dir: &Path) -> io::Result<()> {
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                open.push(entry.path());
            } else {
                File::open(entry.path())?.sync_all()?;
            }
        }
        File::open(dir)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_store_is_bloated_when_little_of_it_is_alive() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(&dir.path().join("s"), 0).unwrap();
        let value = |n: u32| (n.to_be_bytes().to_vec(), Some(vec![n as u8; 5000]));
        for round in 0..3 {
            let rows: Vec<_> = (0..500).map(|n| value(n + round)).collect();
            store
                .apply(TreeId::Invocations, rows.iter().map(|(k, v)| (k, v)))
                .unwrap();
            store.flush().unwrap();
        }
        assert!(!store.is_larger_than(0), "most of it is alive");
        assert!(!store.is_bloated(), "it is small");
        let late = store.copy_to(&dir.path().join("late"), Instant::now());
        assert!(
            matches!(late, Err(StoreError::Unavailable(_))),
            "no time is left for it"
        );
        let gone: Vec<_> = (10..600u32).map(|n| (n.to_be_bytes().to_vec(), None)).collect();
        store
            .apply(TreeId::Invocations, gone.iter().map(|(k, v)| (k, v)))
            .unwrap();
        store.flush().unwrap();
        assert!(store.is_larger_than(0));
        let copy = dir.path().join("copy");
        store
            .copy_to(&copy, Instant::now() + Duration::from_secs(60))
            .unwrap();
        let again = store.copy_to(&copy, Instant::now() + Duration::from_secs(60));
        assert!(again.is_err(), "there is something already");
        let identity = store.identity().to_owned();
        let before = store.size_on_disk().unwrap();
        drop(store);
        exchange(&copy, &dir.path().join("s")).unwrap();
        let (store, _) = Store::open(&dir.path().join("s"), 0).unwrap();
        assert_eq!(store.identity(), identity);
        assert!(store.size_on_disk().unwrap() < before / 2);
        let all = store
            .page(TreeId::Invocations, &[], std::ops::Bound::Unbounded, 1000)
            .unwrap();
        assert_eq!(all.len(), 10);
        assert!(all.iter().all(|(_, value)| value.len() == 5000));
    }
}
