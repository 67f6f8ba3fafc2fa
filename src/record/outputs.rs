//! Outputs in the record.

use super::{
    handle::Record,
    keys,
    row::{OutputRow, RootId},
    store::TreeId,
    value::{Interner, decode_output, encode_output},
};
use crate::exec_path::ExecPath;

impl Record {
    /// What is known of some outputs of a root, in their order.
    #[must_use]
    pub fn outputs(&self, root: RootId, paths: &[ExecPath]) -> Vec<Option<OutputRow>> {
        let keys: Vec<Vec<u8>> = paths
            .iter()
            .map(|path| keys::output(root, path.as_str()))
            .collect();
        let mut rows = vec![None; paths.len()];
        let mut texts = Interner::default();
        let shared = self.shared();
        shared.look_up(TreeId::Outputs, &keys, |i, value| {
            rows[i] = shared.readable(decode_output(value, &mut texts));
        });
        rows
    }

    /// What is known of an output.
    #[must_use]
    pub fn output(&self, root: RootId, path: &ExecPath) -> Option<OutputRow> {
        self.outputs(root, std::slice::from_ref(path)).pop().flatten()
    }

    /// Every output of a root whose path begins with `prefix`, byte by byte, in the order of the paths. For a
    /// directory's, end it with a slash; empty for all.
    pub fn scan_outputs(
        &self,
        root: RootId,
        prefix: &str,
    ) -> impl Iterator<Item = (ExecPath, OutputRow)> + Send + use<> {
        let shared = self.shared().clone();
        let mut texts = Interner::default();
        self.scan(TreeId::Outputs, keys::output(root, prefix))
            .filter_map(move |(key, value)| {
                let row = shared.readable(decode_output(&value, &mut texts))?;
                Some((keys::output_path(&key)?, row))
            })
    }

    /// How many outputs of a root begin with `prefix`. Walks over them.
    #[must_use]
    pub fn count_outputs(&self, root: RootId, prefix: &str) -> usize {
        self.scan(TreeId::Outputs, keys::output(root, prefix)).count()
    }

    /// Records outputs of a root, in place of what was known of them. They are read back at once, and written in the
    /// background. Waits up to a second for a writer that is far behind, and gives the rows up after that.
    pub fn put_outputs(&self, root: RootId, rows: Vec<(ExecPath, OutputRow)>) {
        let changes = rows
            .iter()
            .map(|(path, row)| (keys::output(root, path.as_str()), Some(encode_output(row))));
        self.put_chunked(TreeId::Outputs, changes);
    }

    /// Forgets outputs of a root. The space on disk is used again, but never given back.
    pub fn remove_outputs(&self, root: RootId, paths: &[ExecPath]) {
        let changes = paths.iter().map(|path| (keys::output(root, path.as_str()), None));
        self.put_chunked(TreeId::Outputs, changes);
    }
}
