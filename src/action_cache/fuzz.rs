//! What the fuzz target runs of this room: see [`crate::fuzzing`].

use super::{
    facts::{self, Facts, Files, Output},
    write::{Action, Metadata, Written},
};
use crate::digest::DigestFunction;

/// The four files, each after its length in two bytes: what is decoded makes sense, and reads back.
pub(crate) fn action_cache(data: &[u8]) {
    let mut rest = data;
    let mut next = || {
        let Some((len, after)) = rest.split_first_chunk::<2>() else {
            return &[][..];
        };
        let len = usize::from(u16::from_be_bytes(*len)).min(after.len());
        let (file, after) = after.split_at(len);
        rest = after;
        file
    };
    let files = Files {
        actions: next(),
        journal: next(),
        index: next(),
        index_journal: next(),
    };
    let _ = facts::has_no_outputs(files.journal, files.actions.len(), &Vec::new());
    let _ = Facts::decode_grown(&files, files.actions.len(), &Vec::new(), DigestFunction::Sha256);
    let Ok((facts, _)) = Facts::decode(&files, DigestFunction::Sha256) else {
        return;
    };
    assert!(facts.outputs().is_sorted_by(|a, b| a.path < b.path));
    let mut written = Written::new(16);
    for output in facts.outputs() {
        assert!(output.path.starts_with("bazel-out"));
        assert_eq!(facts.get(output.path.as_str()), Some(output));
        assert!(!facts.is_ambiguous(&output.path));
        let (path, metadata) = (output.path.as_str().to_owned(), Metadata::of(output));
        let mut action = Action {
            primary: path.clone(),
            ..Action::default()
        };
        match &output.tree {
            Some(tree) => {
                assert!(facts.tree(tree.as_str()).any(|child| child == output));
                let below = path[tree.as_str().len() + 1..].to_owned();
                action.trees = vec![(tree.as_str().to_owned(), vec![(below, metadata)])];
            }
            None => action.files = vec![(path, metadata)],
        }
        written.put(&action, false);
    }
    // Each has an action of its own now.
    let outputs = |facts: &Facts| -> Vec<Output> {
        let plain = |output: &Output| Output {
            is_primary: false,
            ..output.clone()
        };
        facts.outputs().iter().map(plain).collect()
    };
    let again = Facts::decode(&written.files(), DigestFunction::Sha256);
    assert_eq!(again.map(|(again, _)| outputs(&again)), Ok(outputs(&facts)));
}
