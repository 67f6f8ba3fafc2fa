//! Space that was promised to files before they are written.

use std::sync::Arc;

use super::{
    error::PlaceError,
    mark::{Free, Mark},
    root::OutputRoot,
    space::too_little,
};

/// Space that a batch of files was promised. Dropped once they are written, or will not be.
#[derive(Debug)]
pub(in crate::materialize) struct Promised {
    root: Arc<OutputRoot>,
    bytes: u64,
    /// What the file system said when the first file asked.
    seen: Option<Free>,
}

impl Promised {
    /// Nothing yet.
    pub(super) const fn new(root: Arc<OutputRoot>) -> Self {
        Self {
            root,
            bytes: 0,
            seen: None,
        }
    }

    /// Asks for space for one more file.
    pub(in crate::materialize) fn ask(
        &mut self,
        mark: Mark,
        is_optional: bool,
        bytes: u64,
        path: &str,
    ) -> Result<(), PlaceError> {
        if mark == Mark::NOTHING {
            return Ok(());
        }
        let free = *self.seen.get_or_insert_with(|| Free::of(&*self.root));
        match self.root.space.state.lock().judge(free, mark, is_optional, bytes) {
            Some(shortage) => Err(too_little(path, shortage)),
            None => {
                self.bytes += bytes;
                Ok(())
            }
        }
    }

    /// This many bytes are written: the file system knows of them now.
    pub(super) fn spend(&mut self, bytes: u64) {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        let mut state = self.root.space.state.lock();
        state.pending = state.pending.saturating_sub(bytes);
    }
}

impl Drop for Promised {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.spend(self.bytes);
        }
    }
}
