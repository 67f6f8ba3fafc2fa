//! The trees' keys.

use super::row::{RootId, TargetRow};
use crate::exec_path::ExecPath;

/// A root's number: also the prefix of its outputs.
pub(super) fn root(id: RootId) -> Vec<u8> {
    id.0.to_be_bytes().to_vec()
}

/// An output, or with a part of a path the prefix of several.
pub(super) fn output(id: RootId, path: &str) -> Vec<u8> {
    let mut key = Vec::with_capacity(4 + path.len());
    key.extend_from_slice(&id.0.to_be_bytes());
    key.extend_from_slice(path.as_bytes());
    key
}

/// The exec path in an output's key.
pub(super) fn output_path(key: &[u8]) -> Option<ExecPath> {
    ExecPath::new(std::str::from_utf8(key.get(4..)?).ok()?).ok()
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
