//! What stands for `gather` in a program that was built without archives: there is nothing to gather.

use std::{collections::HashSet, path::Path, sync::Arc};

use super::{
    destination::{Destination, Reach},
    ended::Gathered,
    error::StageError,
    marker::Marker,
    request::{Manner, Wish},
    select::Artifact,
    together::Together,
};
use crate::{digest::Digest, exec_path::ExecPath, output::Class, remote::BlobStore, sources::Sources};

/// How the servers are reached that collections are at: not at all.
#[derive(Debug, Clone, Default)]
pub(crate) struct Archives(());

impl Archives {
    pub(super) fn gather(_: &Manner, _: bool) -> Result<Gather, StageError> {
        Ok(Gather)
    }

    pub(super) async fn choose(
        &self,
        _: Gather,
        from: &[String],
        _: &Wish,
        reach: &Reach,
        _: &Sources,
    ) -> Result<Gather, StageError> {
        let admitted = from.iter().try_for_each(|text| reach.admit(text, text));
        std::future::ready(admitted.and(Err(StageError::NoArchives { flag: "--from" }))).await
    }
}

/// Files to stage: none.
#[derive(Default)]
pub(super) struct Gather;

#[allow(clippy::unused_self, reason = "as in gather")]
impl Gather {
    pub(super) fn take_archives(&mut self, _: &mut Vec<Artifact>, _: &Arc<dyn BlobStore>) {}
    pub(super) fn reserve(&mut self, _: &[Artifact]) {}
    pub(super) fn from(&self) -> &[String] {
        &[]
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
    pub(super) fn find_present(&mut self, _: &Path, _: &[Marker], _: &Together) -> Result<(), StageError> {
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
