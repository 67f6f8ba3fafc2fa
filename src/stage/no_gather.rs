//! What stands for `gather` in a program that was built without archives: there is nothing to gather.

use std::{collections::HashSet, path::Path, sync::Arc};

use super::{
    destination::Destination, error::StageError, marker::Marker, request::Wish, select::Artifact,
    together::Together,
};
use crate::{digest::Digest, exec_path::ExecPath, output::Class, remote::BlobStore};

/// How the servers are reached that collections are at: not at all.
#[derive(Debug, Clone, Default)]
pub struct Archives(());

/// How a file of a collection ended: there are none.
#[derive(Debug, Clone, PartialEq)]
pub struct Gathered {
    /// The target that names it.
    pub label: Arc<str>,
    /// Its aspect, or empty.
    pub aspect: Arc<str>,
    /// Its output group, or empty.
    pub group: Arc<str>,
    /// Exec path, or file name in the collection.
    pub name: ExecPath,
    /// Where it is below the directory.
    pub place: String,
    /// Whether it must be there.
    pub class: Class,
    /// The digest of its bytes, once it is known.
    pub digest: Option<Digest>,
    /// How it came there; `None` if it is not there.
    pub outcome: Option<Brought>,
    /// Why it is not there; empty while it is on its way.
    pub error: String,
}

impl Archives {
    pub(super) async fn choose(&self, _: &str, _: &Wish) -> Result<Gather, StageError> {
        std::future::ready(Err(StageError::NoArchives { flag: "--from" })).await
    }
}

/// Files to stage: none.
#[derive(Default)]
pub(super) struct Gather;

pub(super) fn can_extract() -> Result<(), StageError> {
    Err(StageError::NoArchives { flag: "--extract" })
}

pub(super) fn unpacked_at(_: &Artifact) -> Result<Option<ExecPath>, StageError> {
    Ok(None)
}

#[allow(clippy::unused_self, reason = "as in gather")]
impl Gather {
    pub(super) fn take_archives(&mut self, _: &mut Vec<Artifact>, _: &Arc<dyn BlobStore>) {}
    pub(super) fn reserve(&mut self, _: &[Artifact]) {}
    pub(super) fn from(&self) -> &str {
        ""
    }
    pub(super) fn is_open(&self) -> bool {
        false
    }
    pub(super) fn has_failed(&self) -> bool {
        false
    }
    pub(super) fn missing(&self) -> Vec<(ExecPath, Digest)> {
        Vec::new()
    }
    pub(super) fn fail(&mut self, _: &ExecPath, _: &str) {}
    pub(super) fn ends(&self) -> Vec<Gathered> {
        Vec::new()
    }
    pub(super) fn note(&self, _: &mut Marker, _: &mut HashSet<String>) {}
    pub(super) fn find_present(&mut self, _: &Path, _: &Together) -> Result<(), StageError> {
        Ok(())
    }
    pub(super) async fn bring(
        &mut self,
        _: Class,
        _: &Destination,
        _: &Arc<Together>,
    ) -> Result<(), StageError> {
        std::future::ready(Ok(())).await
    }
}
