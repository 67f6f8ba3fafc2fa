//! What an archive may still ask for.

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
        if self.entries > self.archive.limits.entries {
            return Err(self.archive.over(Limit::Entries));
        }
        Ok(())
    }

    /// Whether a file of this size can be within the limit at all.
    pub(super) fn fits(&self, size: u64) -> Result<(), ArchiveError> {
        if self.bytes.saturating_add(size) > self.archive.limits.bytes {
            return Err(self.archive.over(Limit::Bytes));
        }
        Ok(())
    }

    /// So many more bytes of files, once `read` bytes of the archive were read.
    pub(super) fn bytes(&mut self, more: u64, read: u64) -> Result<(), ArchiveError> {
        self.bytes = self.bytes.saturating_add(more);
        let limits = self.archive.limits;
        if self.bytes > limits.bytes {
            return Err(self.archive.over(Limit::Bytes));
        }
        if self.bytes > Limits::FREE && self.bytes > read.saturating_mul(limits.ratio) {
            return Err(self.archive.over(Limit::Ratio));
        }
        Ok(())
    }
}
