//! Stages into one directory at the same time: what one of them names, no other removes.
//!
//! A stage may have found a file of an earlier one in its place, and not have left its own marker yet, when another that
//! does not name the file supersedes the earlier marker.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
};

use parking_lot::Mutex;

/// Directories that are staged into just now.
#[derive(Debug, Clone, Default)]
pub(super) struct Directories(Arc<Mutex<Vec<Weak<Together>>>>);

/// The stages into one directory.
#[derive(Debug)]
pub(super) struct Together {
    directory: PathBuf,
    /// What each of them names, while it lives.
    named: Mutex<Vec<Weak<HashSet<String>>>>,
}

impl Directories {
    /// Those into a directory.
    pub(super) fn at(&self, directory: &Path) -> Arc<Together> {
        let mut all = self.0.lock();
        all.retain(|other| other.strong_count() > 0);
        let known = all.iter().filter_map(Weak::upgrade);
        if let Some(known) = known.into_iter().find(|other| other.directory == directory) {
            return known;
        }
        let new = Arc::new(Together {
            directory: directory.to_owned(),
            named: Mutex::default(),
        });
        all.push(Arc::downgrade(&new));
        new
    }
}

impl Together {
    /// From now on nobody removes what this stage names, until it drops it. Blocks while another one removes.
    pub(super) fn join(&self, names: &Arc<HashSet<String>>) {
        let mut named = self.named.lock();
        named.retain(|other| other.strong_count() > 0);
        named.push(Arc::downgrade(names));
    }

    /// Lets the stage of these names remove files while no other one begins: none that another one names. Blocks.
    pub(super) fn without_others<T>(
        &self,
        own: &Arc<HashSet<String>>,
        remove: impl FnOnce(HashSet<String>) -> T,
    ) -> T {
        let named = self.named.lock();
        let alive = named.iter().filter_map(Weak::upgrade);
        let others = alive.filter(|names| !Arc::ptr_eq(names, own));
        let names = others.flat_map(|names| names.iter().cloned().collect::<Vec<_>>());
        remove(names.collect())
    }
}
