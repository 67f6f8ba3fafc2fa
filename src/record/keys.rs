//! The trees' keys.

use super::row::{RootId, TargetRow};

/// A root's number: also the prefix of its outputs, and the key of their first block.
pub(super) fn root(id: RootId) -> Vec<u8> {
    id.0.to_be_bytes().to_vec()
}

/// The key of a block whose first row is this one. A block has all rows from its key up to the next block's. The NUL
/// is lower than anything in a path: a directory's files come together, and before its subdirectories.
pub(super) fn block(id: RootId, directory: &[u8], name: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(5 + directory.len() + name.len());
    key.extend_from_slice(&id.0.to_be_bytes());
    key.extend_from_slice(directory);
    key.push(0);
    key.extend_from_slice(name);
    key
}

/// Directory and name in a block's key; both are empty for the first one.
pub(super) fn place(key: &[u8]) -> (&[u8], &[u8]) {
    let place = key.get(4..).unwrap_or_default();
    match place.iter().position(|byte| *byte == 0) {
        Some(end) => (&place[..end], &place[end + 1..]),
        None => (place, &[]),
    }
}

/// An invocation's place among all, newest first.
pub(super) fn by_start(started_ms: i64, invocation: &str) -> Vec<u8> {
    let started = u64::try_from(started_ms).unwrap_or(0);
    let mut key = (!started).to_be_bytes().to_vec();
    key.extend_from_slice(invocation.as_bytes());
    key
}

/// The invocation id in a [`by_start`] key.
pub(super) fn invocation_of_by_start(key: &[u8]) -> Option<&str> {
    std::str::from_utf8(key.get(8..)?).ok()
}

/// The prefix of an invocation's targets. Its length comes first: no id's prefix is the beginning of another's.
pub(super) fn targets(invocation: &str) -> Vec<u8> {
    let mut key = (invocation.len() as u64).to_be_bytes().to_vec();
    key.extend_from_slice(invocation.as_bytes());
    key
}

/// Whether all of a target's names can be in its key.
pub(super) fn can_hold(row: &TargetRow) -> bool {
    ![&row.label, &row.aspect, &row.configuration]
        .iter()
        .any(|name| name.contains('\0'))
}

/// Gives a target the names in its key, which is below that of its invocation.
pub(super) fn name_target(key: &[u8], invocation: &str, row: &mut TargetRow) -> Option<()> {
    let names = std::str::from_utf8(key.get(8 + invocation.len()..)?).ok()?;
    let mut names = names.split('\0').map(str::to_owned);
    row.label = names.next()?;
    row.aspect = names.next()?;
    row.configuration = names.next()?;
    Some(())
}

/// A target of an invocation.
pub(super) fn target(invocation: &str, row: &TargetRow) -> Vec<u8> {
    let mut key = targets(invocation);
    for part in [&row.label, &row.aspect, &row.configuration] {
        key.extend_from_slice(part.as_bytes());
        // Lower than anything in a label, so that targets are in the order of their labels.
        key.push(0);
    }
    key
}
