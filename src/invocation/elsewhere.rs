//! Outputs of other output roots on this machine, as sources for a build's blobs.
//!
//! A second worktree, another output base or a moved package has most of its outputs on disk already, below another path.
//! The record knows which. What is found is only offered to the store that a build's blobs are read from
//! ([`LocalFirst`](crate::remote::LocalFirst)): the bytes are verified like those of a cache, copied, and never linked.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    digest::Digest,
    materialize::Want,
    output::OutputContent,
    record::{OutputState, Record, RootId},
    remote::{Copy, Offer, looks_right},
};

/// Roots that are looked at: those that were built in last.
const ROOTS: usize = 16;
/// A root that has fewer than one in this many of the outputs it is asked for is not asked for the same paths any more.
const HITS: usize = 512;
/// Rows of the record that may be walked over for each output that no root has at its path: a row costs 0.1 µs, and a
/// small blob from the network at least as much as a hundred of them.
const ROWS: usize = 20;
/// Rows that may be walked over for any build.
const FIRST_ROWS: usize = 20_000;

/// Where a build's outputs may be.
pub(crate) struct Elsewhere {
    offer: Offer,
    /// The build's own root.
    own: PathBuf,
    roots: Vec<Other>,
    /// Rows that may be walked over.
    credit: usize,
    /// Whether files are looked at before they are offered: those who ask what there is before they write anything rely on it.
    looks: bool,
}

struct Other {
    id: RootId,
    path: Arc<Path>,
    /// Whether the same paths are looked for, as long as that finds enough.
    by_path: bool,
    asked: usize,
    had: usize,
    /// What another walk over it should be worth.
    rows: usize,
}

impl Elsewhere {
    /// The roots that are on record, for a build of one of them, or of none.
    pub(crate) fn new(record: &Record, own: Option<RootId>, offer: Offer) -> Self {
        let mut roots = record.roots();
        let here = roots.iter().find(|(id, _)| Some(*id) == own);
        let here = here.map(|(_, row)| PathBuf::from(&row.path)).unwrap_or_default();
        // Versions go by the clock. Its own root may have the bytes at another path.
        roots.sort_by_key(|(id, row)| (Some(*id) != own, std::cmp::Reverse(row.version)));
        roots.truncate(ROOTS);
        let other = |id, path: &str| Other {
            id,
            path: Path::new(path).into(),
            by_path: Some(id) != own,
            asked: 0,
            had: 0,
            rows: 0,
        };
        Self {
            offer,
            own: here,
            roots: roots.iter().map(|(id, row)| other(*id, &row.path)).collect(),
            credit: FIRST_ROWS,
            looks: false,
        }
    }

    /// Looks for the blobs of outputs that are not on disk, whatever the record says. Blocks on the record and the disk.
    pub(crate) fn look_for_absent(&mut self, record: &Record, wants: &[Want]) {
        self.looks = true;
        let is_absent = |want: &Want| want.recorded.is_none() || self.is_absent(want);
        let absent = wants.iter().filter(|want| is_absent(want));
        let absent: Vec<Want> = absent
            .map(|want| Want {
                recorded: None,
                ..want.clone()
            })
            .collect();
        self.look(record, &absent);
    }

    fn is_absent(&self, want: &Want) -> bool {
        self.own.join(want.path.as_path()).symlink_metadata().is_err()
    }

    /// What was found is offered for as long as there is the store.
    pub(crate) fn for_good(self) {
        self.offer.for_good();
    }

    /// Looks for the blobs of outputs of which the record does not say that they are in place. Blocks on the record.
    pub(super) fn look(&mut self, record: &Record, wants: &[Want]) {
        let looks = self.looks;
        let mut left = self.missing(wants);
        for root in &mut self.roots {
            if left.is_empty() {
                return;
            }
            if root.by_path {
                let found = root.at_their_paths(record, &mut left);
                self.offer.add(there(found, looks));
            }
        }
        left.retain(|(want, _)| want.recorded.is_none());
        self.credit = self.credit.saturating_add(ROWS * left.len());
        for root in &mut self.roots {
            if left.is_empty() {
                return;
            }
            if self.credit < root.rows.max(1) {
                continue;
            }
            let (found, rows) = root.anywhere(record, &mut left, self.credit);
            self.credit -= rows;
            self.offer.add(there(found, looks));
        }
    }

    /// The wants of blobs that are not in place. What the record says of a directory's first output is looked at on disk:
    /// all of them may have been deleted since.
    fn missing<'a>(&self, wants: &'a [Want]) -> Vec<(&'a Want, &'a Digest)> {
        let has_others = self.roots.iter().any(|root| root.by_path);
        let mut missing = Vec::new();
        let mut looked_at = None;
        let mut is_deleted = false;
        for want in wants {
            let OutputContent::Blob(digest) = &want.content else {
                continue;
            };
            if digest.is_empty() {
                continue;
            }
            if want.recorded.is_some() && has_others && looked_at != want.path.parent() {
                looked_at = want.path.parent();
                is_deleted = self.is_absent(want);
            }
            if want.recorded.is_none() || (is_deleted && looked_at == want.path.parent()) {
                missing.push((want, digest));
            }
        }
        missing
    }
}

/// Without the files that are not there any more, if that is looked at.
fn there(mut found: Vec<(Digest, Copy)>, looks: bool) -> Vec<(Digest, Copy)> {
    if looks {
        found.retain(|(digest, copy)| looks_right(copy, digest.size()));
    }
    found
}

impl Other {
    /// The files that have the same paths. What is found is not left any more.
    fn at_their_paths(&mut self, record: &Record, left: &mut Vec<(&Want, &Digest)>) -> Vec<(Digest, Copy)> {
        let mut found = Vec::new();
        let mut is_found = vec![false; left.len()];
        record.see_outputs(
            self.id,
            left,
            |(want, _)| &want.path,
            |i, row| {
                let (want, digest) = left[i];
                if row.state() == OutputState::Materialized
                    && row.content_is(&want.content)
                    && let Some(stamp) = row.stamp()
                {
                    is_found[i] = true;
                    let (root, path) = (self.path.clone(), want.path.clone());
                    found.push((digest.clone(), Copy { root, path, stamp }));
                }
            },
        );
        self.asked += left.len();
        self.had += found.len();
        self.by_path = self.had * HITS >= self.asked.saturating_sub(HITS);
        let mut is_found = is_found.into_iter();
        left.retain(|_| !is_found.next().unwrap_or_default());
        found
    }

    /// The files that have the same bytes, wherever they are, and how many rows were walked over.
    fn anywhere(
        &mut self,
        record: &Record,
        left: &mut Vec<(&Want, &Digest)>,
        most: usize,
    ) -> (Vec<(Digest, Copy)>, usize) {
        let digests: HashSet<&Digest> = left.iter().map(|(_, digest)| *digest).collect();
        let (files, rows) = record.files_with(self.id, &digests, most);
        let found: HashSet<&Digest> = files.iter().map(|(_, digest, _)| digest).collect();
        left.retain(|(_, digest)| !found.contains(digest));
        // One that has nothing of the build is worth less and less.
        self.rows = if found.is_empty() {
            rows.max(self.rows).saturating_mul(2)
        } else {
            rows
        };
        let copy = |(path, digest, stamp)| {
            let root = self.path.clone();
            (digest, Copy { root, path, stamp })
        };
        (files.into_iter().map(copy).collect(), rows)
    }
}
