//! What an archive may still ask for, and all that are listed together.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use super::{Archive, ArchiveError, Limit, Limits};

/// Counts what an archive asks for.
#[derive(Debug)]
pub(super) struct Budget<'a> {
    archive: Archive<'a>,
    entries: u64,
    bytes: u64,
}

impl<'a> Budget<'a> {
    pub(super) const fn new(archive: Archive<'a>) -> Self {
        Self {
            archive,
            entries: 0,
            bytes: 0,
        }
    }

    /// One more member, or a directory that a name implies.
    pub(super) fn entry(&mut self) -> Result<(), ArchiveError> {
        self.entries += 1;
        if self.entries > self.archive.limits[Limit::Entries] {
            return Err(self.archive.over(Limit::Entries));
        }
        Ok(())
    }

    /// Whether a file of this size can be within the limit at all.
    pub(super) fn fits(&self, size: u64) -> Result<(), ArchiveError> {
        if self.bytes.saturating_add(size) > self.archive.limits[Limit::Bytes] {
            return Err(self.archive.over(Limit::Bytes));
        }
        Ok(())
    }

    /// Takes this many more bytes of files, once `read` bytes of the archive were read.
    pub(super) fn bytes(&mut self, more: u64, read: u64) -> Result<(), ArchiveError> {
        self.bytes = self.bytes.saturating_add(more);
        let limits = self.archive.limits;
        if self.bytes > limits[Limit::Bytes] {
            return Err(self.archive.over(Limit::Bytes));
        }
        if self.bytes > Limits::FREE && self.bytes > read.saturating_mul(limits[Limit::Ratio]) {
            return Err(self.archive.over(Limit::Ratio));
        }
        Ok(())
    }
}

/// How many paths may still be listed by all that share it. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Listable {
    left: Arc<AtomicU64>,
    most: u64,
}

impl Default for Listable {
    /// As many as one archive may have by default: half a gigabyte of names, if they are long.
    fn default() -> Self {
        Self::new(Limits::default()[Limit::Entries])
    }
}

impl Listable {
    /// This many.
    pub(crate) fn new(most: u64) -> Self {
        Self {
            left: Arc::new(AtomicU64::new(most)),
            most,
        }
    }

    /// As many of these as are left are listed for good.
    pub(crate) fn hold(&self, count: u64) {
        let taken = |left: u64| Some(left.saturating_sub(count));
        let _ = self.left.fetch_update(Relaxed, Relaxed, taken);
    }
}

/// What one [`Staging`](super::Staging) lists, given back when dropped.
#[derive(Debug, Default)]
pub(super) struct Listing {
    shared: Option<Listable>,
    count: u64,
}

impl Listing {
    pub(super) const fn new(shared: Listable) -> Self {
        let shared = Some(shared);
        Self { shared, count: 0 }
    }

    /// One more path of an archive.
    pub(super) fn entry(&mut self, archive: &str) -> Result<(), ArchiveError> {
        let Some(shared) = &self.shared else {
            return Ok(());
        };
        let one_less = |left: u64| left.checked_sub(1);
        if shared.left.fetch_update(Relaxed, Relaxed, one_less).is_err() {
            return Err(ArchiveError::Listed {
                archive: archive.to_owned(),
                most: shared.most,
            });
        }
        self.count += 1;
        Ok(())
    }
}

impl Drop for Listing {
    fn drop(&mut self) {
        if let Some(shared) = &self.shared {
            shared.left.fetch_add(self.count, Relaxed);
        }
    }
}
