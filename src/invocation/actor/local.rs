//! Where the files that a stream names are on disk.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use super::{Actor, site::Site};
use crate::{digest::Digest, exec_path::ExecPath, output::OutputContent, record::OutputState};

impl Actor {
    /// Looks for files: at their path where one is given, else wherever this build has the same bytes.
    pub(super) fn local_files(&mut self, files: &[(Option<ExecPath>, Digest)]) -> Vec<Option<PathBuf>> {
        if !matches!(self.site, Site::Open(_) | Site::Closed(Some(_))) {
            return vec![None; files.len()];
        }
        if self.ledger.places.is_none() && files.iter().any(|(path, _)| path.is_none()) {
            self.ledger.places = Some(self.places_by_digest());
        }
        let found = |(path, digest): &(Option<ExecPath>, Digest)| match path {
            Some(path) => self.has(path, digest).then(|| path.clone()),
            None => self.ledger.places.as_ref()?.get(digest).cloned(),
        };
        let root = Path::new(&self.row.exec_root);
        files
            .iter()
            .map(|file| Some(root.join(found(file)?.as_path())))
            .collect()
    }

    /// Whether a path holds this content.
    fn has(&self, path: &ExecPath, digest: &Digest) -> bool {
        let is_it = |content: &OutputContent| matches!(content, OutputContent::Blob(blob) if blob == digest);
        match self.ledger.wanted.get(path) {
            Some(wanted) => wanted.on_disk && is_it(&wanted.content),
            // What this build does not want may be there from an earlier one.
            None => self.row.root.is_some_and(|root| {
                let row = self.shared.record.output(root, path);
                row.is_some_and(|row| row.state == OutputState::Materialized && is_it(&row.content))
            }),
        }
    }

    fn places_by_digest(&self) -> HashMap<Digest, ExecPath> {
        let on_disk = self.ledger.wanted.iter().filter(|(_, wanted)| wanted.on_disk);
        on_disk
            .filter_map(|(path, wanted)| match &wanted.content {
                OutputContent::Blob(digest) => Some((digest.clone(), path.clone())),
                _ => None,
            })
            .collect()
    }
}
