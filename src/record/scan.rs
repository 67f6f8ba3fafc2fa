//! Walking over outputs in the order of their paths.
//!
//! Blocks are in the order of directories, and a directory's files come before its subdirectories; in the order of
//! paths `a/b`, `a/c/x`, `a/d`, they are strewn among them. So a walk opens directory by directory, and keeps those
//! open that have files after the directory that comes next. These are a chain, each below the one before.

use std::sync::Arc;

use super::{
    block::{Block, Builder, Remap, Row, merge, split},
    look_up::Reading,
    row::RootId,
    shared::Shared,
    store::whole,
};

/// Walks over a root's outputs whose paths begin with a prefix. Sees what was handed over before it began; what changes
/// meanwhile it may or may not see.
pub(super) struct OutputScan {
    shared: Arc<Shared>,
    root: RootId,
    prefix: String,
    /// Where the next directory is looked for; `None` when there is no other.
    from: Option<String>,
    /// The next directory, if it was looked for.
    next: Option<Arc<str>>,
    open: Vec<Open>,
}

/// A directory of which files are still to come.
struct Open {
    directory: Arc<str>,
    block: Arc<Block>,
    at: usize,
    end: usize,
}

impl OutputScan {
    pub(super) fn new(shared: Arc<Shared>, root: RootId, prefix: &str) -> Self {
        let mut scan = Self {
            shared,
            root,
            prefix: prefix.to_owned(),
            from: Some(prefix.to_owned()),
            next: None,
            open: Vec::new(),
        };
        let (directory, name) = split(prefix);
        if !name.is_empty() {
            // Its own files first; subdirectories that begin with the prefix follow as others do.
            scan.enter(&directory.into());
        }
        scan
    }

    /// All outputs of a root after a path, whether or not there is one at it.
    pub(super) fn after(shared: Arc<Shared>, root: RootId, path: &str) -> Self {
        let mut scan = Self {
            shared,
            root,
            prefix: String::new(),
            from: Some(path.to_owned()),
            next: None,
            open: Vec::new(),
        };
        let slashes = path.match_indices('/').map(|(at, _)| at + 1);
        for end in std::iter::once(0).chain(slashes).filter(|end| *end < path.len()) {
            let (directory, rest) = path.split_at(end);
            let block = scan.shared.directory(root, directory);
            let at = block.find(directory, rest, 0).map_or_else(|at| at, |at| at + 1);
            scan.open.push(Open {
                directory: directory.into(),
                end: block.len(),
                block,
                at,
            });
        }
        scan
    }

    /// Goes to the next row, and gives it to `take`.
    pub(super) fn next_with<T>(&mut self, take: impl FnOnce(Row<'_>) -> T) -> Option<T> {
        loop {
            if self.next.is_none()
                && let Some(from) = self.from.take()
            {
                self.next = self
                    .shared
                    .next_directory(self.root, &from)
                    .filter(|directory| directory.starts_with(&self.prefix));
                // Higher than any file of it, and not higher than its first subdirectory.
                self.from = self.next.as_ref().map(|directory| format!("{directory}\u{1}"));
            }
            let next_first = match (self.open.last(), &self.next) {
                (None, None) => return None,
                (None, Some(_)) => true,
                (Some(_), None) => false,
                (Some(open), Some(next)) => open.is_behind(next),
            };
            if next_first {
                if let Some(directory) = self.next.take() {
                    self.enter(&directory);
                }
                continue;
            }
            let open = self.open.last_mut()?;
            if open.at >= open.end {
                self.open.pop();
                continue;
            }
            open.at += 1;
            if let Some(row) = open.block.row(open.at - 1) {
                return Some(take(row));
            }
        }
    }

    fn enter(&mut self, directory: &Arc<str>) {
        let block = self.shared.directory(self.root, directory);
        let within = self.prefix.strip_prefix(&**directory).unwrap_or("");
        let (Ok(at) | Err(at)) = block.find(directory, within, 0);
        let mut end = block.len();
        if !within.is_empty() {
            let beyond = |row: Row<'_>| !row.name().starts_with(within.as_bytes());
            end = (at..end)
                .find(|i| block.row(*i).is_some_and(beyond))
                .unwrap_or(end);
        }
        self.open.push(Open {
            directory: directory.clone(),
            block,
            at,
            end,
        });
    }
}

impl Open {
    /// Whether the next file's path is after a directory that has not been opened.
    fn is_behind(&self, directory: &str) -> bool {
        if self.at >= self.end {
            return false;
        }
        let Some(row) = self.block.row(self.at) else {
            return false;
        };
        let path = self.directory.as_bytes().iter().chain(row.name());
        path.cmp(directory.as_bytes()).is_ge()
    }
}

impl Shared {
    /// The first directory with rows, waiting or stored, that is not before `from`.
    pub(super) fn next_directory(&self, root: RootId, from: &str) -> Option<Arc<str>> {
        let (waiting, has_store) = {
            let state = self.state();
            let (filling, writing) = state.queue.outputs();
            let mut first = filling.next_directory(root, from).cloned();
            let mut has_store = !filling.is_forgotten(root);
            if let Some(writing) = writing.filter(|_| has_store) {
                has_store = !writing.outputs.is_forgotten(root);
                let other = writing.outputs.next_directory(root, from).cloned();
                first = first.into_iter().chain(other).min();
            }
            (first, has_store)
        };
        if !has_store {
            return waiting;
        }
        let mut reading = Reading::new(self, root);
        let (mut directory, mut name) = (from.as_bytes().to_vec(), Vec::new());
        let stored = loop {
            let Some((span, block)) = reading.at(&directory, &name) else {
                break None;
            };
            let (Ok(at) | Err(at)) = block.find(from, "", 0);
            let row = block.rows_from(at).next();
            if let Some(row) = row.filter(|row| span.reaches(row.directory().as_bytes(), row.name())) {
                break Some(row.directory().clone());
            }
            let Some((next_directory, next_name)) = span.next() else {
                break None;
            };
            let next = (next_directory.to_vec(), next_name.to_vec());
            (directory, name) = next;
        };
        waiting.into_iter().chain(stored).min()
    }

    /// All rows of a directory.
    fn directory(&self, root: RootId, directory: &str) -> Arc<Block> {
        // The queue before the store: a row leaves the queue only when the store has it.
        let glimpse = self.glimpse(root, directory);
        let mut builder = Builder::default();
        if glimpse.has_store(root) {
            let mut reading = Reading::new(self, root);
            let mut name = Vec::new();
            while let Some((span, block)) = reading.at(directory.as_bytes(), &name) {
                let mut remap = Remap::default();
                // From where the block before it ended: what it has of that is out of date.
                let from = std::str::from_utf8(&name).unwrap_or("");
                let (Ok(at) | Err(at)) = block.find(directory, from, 0);
                let own = block.rows_from(at).take_while(|row| {
                    **row.directory() == *directory && span.reaches(directory.as_bytes(), row.name())
                });
                for row in own {
                    builder.copy(&row, &mut remap);
                }
                match span.next() {
                    Some((next, next_name)) if next == directory.as_bytes() => {
                        name = next_name.to_vec();
                    }
                    _ => break,
                }
            }
        }
        let mut waiting: Vec<Arc<Block>> = glimpse.blocks(root, directory).cloned().collect();
        waiting.reverse();
        let waiting = whole(&waiting);
        let all = builder.finish();
        if waiting.len() == 0 {
            return Arc::new(all);
        }
        let all = merge(&all, &waiting);
        let (mut kept, mut remap) = (Builder::default(), Remap::default());
        for row in all.rows_from(0).filter(|row| !row.is_removal()) {
            kept.copy(&row, &mut remap);
        }
        Arc::new(kept.finish())
    }
}
