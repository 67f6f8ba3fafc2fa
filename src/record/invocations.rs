//! Invocations and their targets in the record.

use super::{
    handle::Record,
    keys,
    row::{InvocationRow, RootId, TargetRow},
    store::{Change, TreeId},
    value::{decode_invocation, decode_target, encode_invocation, encode_target},
    which::Which,
};

impl Record {
    /// Records an invocation, in place of what was known of it. Its root learns of its newest invocation and its
    /// workspace by this.
    pub fn put_invocation(&self, row: &InvocationRow) {
        let id = &row.invocation_id;
        let _guard = self.shared().invocations.lock();
        let mut index: Vec<Change> = Vec::new();
        match self.invocation(id) {
            Some(before) if before.started_ms != row.started_ms => {
                index.push((keys::by_start(before.started_ms, id), None));
            }
            _ => {}
        }
        index.push((keys::by_start(row.started_ms, id), Some(Vec::new())));
        self.put(
            TreeId::Invocations,
            vec![(id.clone().into_bytes(), Some(encode_invocation(row)))],
        );
        self.put(TreeId::ByStart, index);
        if let Some(root) = row.root {
            let newest = self.newest_invocation(root);
            let is_newest = newest.is_none_or(|newest| newest.version <= row.version);
            self.change_root(root, |root| {
                if is_newest {
                    root.newest_invocation.clone_from(id);
                }
                if is_newest && !row.workspace.is_empty() {
                    root.workspace.clone_from(&row.workspace);
                }
                // New versions must be above those of a lost record.
                root.version = root.version.max(row.version);
            });
        }
    }

    /// An invocation by its id.
    pub fn invocation(&self, id: &str) -> Option<InvocationRow> {
        self.shared()
            .get(TreeId::Invocations, id.as_bytes().to_vec(), decode_invocation)
    }

    /// The invocations begun last, newest first.
    pub fn invocations(&self, limit: usize) -> Vec<InvocationRow> {
        self.scan_invocations().take(limit).collect()
    }

    /// The same one by one.
    pub(crate) fn scan_invocations(&self) -> impl Iterator<Item = InvocationRow> {
        self.scan(TreeId::ByStart, Vec::new())
            .filter_map(|(key, _)| self.invocation(keys::invocation_of_by_start(&key)?))
    }

    /// The invocation that is meant. Blocks on the file system.
    pub(crate) fn find_invocation(&self, which: &Which) -> Option<InvocationRow> {
        match which.invocation_id.as_str() {
            "" => which.newest(self.scan_invocations()),
            id => self.invocation(id),
        }
    }

    /// As [`Self::find_invocation`], of builds that have outputs somewhere: one that failed before it had an output root is
    /// meant only where there is no other. Blocks on the file system.
    pub(crate) fn find_invocation_with_outputs(&self, which: &Which) -> Option<InvocationRow> {
        let has_outputs = |row: &InvocationRow| row.imported || row.root.is_some();
        let is_any = which.invocation_id.is_empty();
        let newest = is_any.then(|| which.newest(self.scan_invocations().filter(has_outputs)));
        newest.flatten().or_else(|| self.find_invocation(which))
    }

    /// The root's invocation with the highest version.
    pub(crate) fn newest_invocation(&self, root: RootId) -> Option<InvocationRow> {
        let id = self.root_row(root)?.newest_invocation;
        if id.is_empty() { None } else { self.invocation(&id) }
    }

    /// Forgets invocations and their targets. Their outputs stay known: they say what is on disk.
    pub(crate) fn remove_invocations(&self, ids: &[String]) {
        let _guard = self.shared().invocations.lock();
        for id in ids {
            let targets = self
                .scan(TreeId::Targets, keys::targets(id))
                .map(|(key, _)| (key, None));
            self.put_chunked(TreeId::Targets, targets);
            if let Some(row) = self.invocation(id) {
                self.put(TreeId::ByStart, vec![(keys::by_start(row.started_ms, id), None)]);
            }
            self.put(TreeId::Invocations, vec![(id.clone().into_bytes(), None)]);
        }
    }

    /// Records targets of an invocation, in place of what was known of them.
    pub fn put_targets(&self, invocation: &str, rows: &[TargetRow]) {
        let changes = rows
            .iter()
            .filter(|row| keys::can_hold(row))
            .map(|row| (keys::target(invocation, row), Some(encode_target(row))));
        self.put_chunked(TreeId::Targets, changes);
    }

    /// The targets of an invocation, in the order of their labels.
    pub fn targets(&self, invocation: &str) -> Vec<TargetRow> {
        self.scan_targets(invocation).collect()
    }

    /// The same one by one.
    pub(crate) fn scan_targets(&self, invocation: &str) -> impl Iterator<Item = TargetRow> + Send + use<> {
        let (shared, invocation) = (self.shared().clone(), invocation.to_owned());
        self.scan(TreeId::Targets, keys::targets(&invocation))
            .filter_map(move |(key, value)| {
                let mut row = shared.readable(decode_target(&value))?;
                keys::name_target(&key, &invocation, &mut row)?;
                Some(row)
            })
    }
}
