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
pub enum Brought {
    /// From the cache.
    Downloaded,
    /// From the output tree.
    Copied,
    /// It was there already.
    Present,
}

/// An output's end.
#[derive(Debug, Clone, PartialEq)]
pub struct Ended {
    /// The selected artifact.
    pub artifact: Artifact,
    /// How it came there; `None` if it is not there.
    pub outcome: Option<Brought>,
    /// Why it is not there; empty while it is on its way.
    pub error: String,
    pub(super) stamp: Option<Stamp>,
}

/// How a file of a collection, or an archive of a build, ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Gathered {
    /// The target that names it; empty for a file of a collection.
    pub label: Arc<str>,
    /// Its aspect, or empty.
    pub aspect: Arc<str>,
    /// Its output group, or empty.
    pub group: Arc<str>,
    /// Exec path, or file name in the collection.
    pub name: ExecPath,
    /// Where it is below the directory, or the directory there that it was unpacked into; empty for the directory itself.
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

/// What staging has come to.
pub struct Staged {
    /// Whether everything required is there, and the marker too.
    pub staged: bool,
    /// Every output's end, in the order of their places; of optional ones only so far.
    pub outputs: Vec<Ended>,
    /// The same of files of a collection, and of archives that are unpacked.
    pub gathered: Vec<Gathered>,
    /// What went wrong besides, in words.
    pub notes: Vec<String>,
    /// Ends when the optional outputs have come to theirs, with every output's end.
    pub rest: Option<JoinHandle<Ends>>,
}

/// How everything ended.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ends {
    /// Outputs of a build, in the order of their places.
    pub outputs: Vec<Ended>,
    /// Files of a collection, and archives that are unpacked.
    pub gathered: Vec<Gathered>,
}
