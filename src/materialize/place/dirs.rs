//! Directories that are kept open for checks.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    error::{PlaceError, PlaceErrorKind},
    root::OutputRoot,
    sys::Dir,
    walk,
};

/// How long an open directory stands for its path. A directory that was replaced meanwhile is looked at for so long and
/// no longer; placing opens its directories again every time.
const FRESH: Duration = Duration::from_millis(50);

/// How many directories are kept open.
const OPEN_DIRECTORIES: usize = 16;

/// The directories that checks have looked into last.
#[derive(Default)]
pub(super) struct DirCache {
    open: HashMap<Box<str>, (Arc<Dir>, Instant)>,
    /// When the root was last seen to be the one that was opened.
    root_seen: Option<Instant>,
}

impl DirCache {
    pub(super) fn get(&mut self, root: &OutputRoot, path: &str) -> Result<Option<Arc<Dir>>, PlaceError> {
        let now = Instant::now();
        let is_fresh = |opened: &Instant| now.duration_since(*opened) < FRESH;
        if let Some((dir, opened)) = self.open.get(path)
            && is_fresh(opened)
        {
            return Ok(Some(Arc::clone(dir)));
        }
        if !self.root_seen.as_ref().is_some_and(is_fresh) {
            if !root.is_same() {
                let kind = PlaceErrorKind::RootGone("it was deleted or replaced");
                return Err(PlaceError::new("check", path, kind));
            }
            self.root_seen = Some(now);
        }
        self.open.remove(path);
        let Some(dir) = walk::find_dir(root, path)? else {
            return Ok(None);
        };
        if self.open.len() >= OPEN_DIRECTORIES {
            self.open.retain(|_, (_, opened)| is_fresh(opened));
        }
        // All of them are fresh: with that many directories visited in such a short time, any of them may be dropped.
        if self.open.len() >= OPEN_DIRECTORIES {
            self.open.clear();
        }
        self.open.insert(path.into(), (Arc::clone(&dir), now));
        Ok(Some(dir))
    }
}
