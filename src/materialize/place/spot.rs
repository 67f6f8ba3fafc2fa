//! A name in an open directory.

use std::{ffi::OsString, path::PathBuf, sync::Arc};

use super::sys::Dir;

/// A name in an open directory.
#[derive(Debug, Clone)]
pub(super) struct Spot {
    pub(super) dir: Arc<Dir>,
    pub(super) name: OsString,
}

impl Spot {
    /// Below the root, links in the directory resolved; for messages.
    pub(super) fn path(&self) -> PathBuf {
        self.dir.path.join(&self.name)
    }
}
