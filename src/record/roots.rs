//! The output roots, all in memory: there are few, and their numbers and versions must not depend on the store.

use std::collections::BTreeMap;

use super::row::{RootId, RootRow};

/// Every root that is known.
#[derive(Debug, Default)]
pub(super) struct Roots {
    rows: BTreeMap<RootId, RootRow>,
    next: u32,
}

impl Roots {
    /// With the first free number at least `next`.
    pub(super) fn from(next: u32) -> Self {
        Self {
            rows: BTreeMap::new(),
            next: next.max(1),
        }
    }

    /// Adds what the store has. What is here already is newer.
    pub(super) fn merge(&mut self, stored: impl IntoIterator<Item = (RootId, RootRow)>) {
        for (id, row) in stored {
            self.next = self.next.max(id.0.saturating_add(1));
            self.rows.entry(id).or_insert(row);
        }
    }

    /// The root with that path, device and inode, and whether it was created by this call.
    pub(super) fn get_or_create(&mut self, path: &str, device: u64, inode: u64) -> (RootId, bool) {
        let found = self
            .rows
            .iter()
            .filter(|(_, row)| row.path == path && row.device == device && row.inode == inode)
            .max_by_key(|(_, row)| row.version);
        if let Some((id, _)) = found {
            return (*id, false);
        }
        let id = RootId(self.next.max(1));
        self.next = id.0.wrapping_add(1);
        self.rows.insert(
            id,
            RootRow {
                path: path.to_owned(),
                device,
                inode,
                ..RootRow::default()
            },
        );
        (id, true)
    }

    pub(super) fn get(&self, id: RootId) -> Option<&RootRow> {
        self.rows.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: RootId) -> Option<&mut RootRow> {
        self.rows.get_mut(&id)
    }

    pub(super) fn remove(&mut self, id: RootId) -> bool {
        self.rows.remove(&id).is_some()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (RootId, &RootRow)> {
        self.rows.iter().map(|(id, row)| (*id, row))
    }

    /// A version above every one given out for the root. Seeded by the clock, so that versions of a record that was
    /// lost are left behind too.
    pub(super) fn next_version(&mut self, id: RootId, now_ms: i64) -> u64 {
        let clock = u64::try_from(now_ms).unwrap_or(0);
        match self.rows.get_mut(&id) {
            Some(row) => {
                row.version = clock.max(row.version.saturating_add(1));
                row.version
            }
            None => clock,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_inode_under_the_same_path_is_another_root() {
        let mut roots = Roots::from(1);
        let (first, made) = roots.get_or_create("/e", 1, 2);
        assert!(made);
        assert_eq!(roots.get_or_create("/e", 1, 2), (first, false));
        let (second, made) = roots.get_or_create("/e", 1, 3);
        assert!(made && second != first);
        assert_eq!(roots.get_or_create("/e", 1, 3), (second, false));
    }

    #[test]
    fn versions_grow_although_the_clock_stands_or_turns_back() {
        let mut roots = Roots::from(1);
        let (id, _) = roots.get_or_create("/e", 1, 2);
        let versions = [1000, 1000, 999, 2000].map(|now| roots.next_version(id, now));
        assert_eq!(versions, [1000, 1001, 1002, 2000]);
    }

    #[test]
    fn stored_roots_neither_replace_newer_rows_nor_share_their_numbers() {
        let mut roots = Roots::from(1);
        let (id, _) = roots.get_or_create("/new", 1, 2);
        let stored = |path: &str| RootRow {
            path: path.into(),
            ..RootRow::default()
        };
        roots.merge([(id, stored("/old")), (RootId(9), stored("/nine"))]);
        assert_eq!(roots.get(id).unwrap().path, "/new");
        assert_eq!(roots.get_or_create("/next", 0, 0).0, RootId(10));
    }
}
