//! What staging has come to, output by output.

use std::sync::Arc;

use tokio::task::JoinHandle;

use super::select::Artifact;
use crate::{
    digest::Digest,
    exec_path::ExecPath,
    output::{Class, Stamp},
};

/// How an output came to where it was staged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Brought {
    /// From the cache.
    Downloaded,
    /// From the output tree.
    Copied,
    /// It was there already.
    Present,
}

/// An output's end.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ended {
    /// The selected artifact.
    pub(crate) artifact: Artifact,
    /// How it came there; `None` if it is not there.
    pub(crate) outcome: Option<Brought>,
    /// Why it is not there; empty while it is on its way.
    pub(crate) error: String,
    pub(super) stamp: Option<Stamp>,
}

/// How a file of a collection, or an archive of a build, ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Gathered {
    /// The target that names it; empty for a file of a collection.
    pub(crate) label: Arc<str>,
    /// Its aspect, or empty.
    pub(crate) aspect: Arc<str>,
    /// Its output group, or empty.
    pub(crate) group: Arc<str>,
    /// Exec path, or file name in the collection.
    pub(crate) name: ExecPath,
    /// Where it is below the directory, or the directory there that it was unpacked into; empty for the directory itself.
    pub(crate) place: String,
    /// Whether it must be there.
    pub(crate) class: Class,
    /// The digest of its bytes, once it is known.
    pub(crate) digest: Option<Digest>,
    /// How it came there; `None` if it is not there.
    pub(crate) outcome: Option<Brought>,
    /// Why it is not there; empty while it is on its way.
    pub(crate) error: String,
}

/// What staging has come to.
pub(crate) struct Staged {
    /// Whether everything required is there, and the marker too.
    pub(crate) staged: bool,
    /// Every output's end, in the order of their places; of optional ones only so far.
    pub(crate) outputs: Vec<Ended>,
    /// The same of files of a collection, and of archives that are unpacked.
    pub(crate) gathered: Vec<Gathered>,
    /// What went wrong besides, in words.
    pub(crate) notes: Vec<String>,
    /// Ends when the optional outputs have come to theirs, with every output's end.
    pub(crate) rest: Option<JoinHandle<Ends>>,
}

/// How everything ended.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Ends {
    /// Outputs of a build, in the order of their places.
    pub(crate) outputs: Vec<Ended>,
    /// Files of a collection, and archives that are unpacked.
    pub(crate) gathered: Vec<Gathered>,
}
