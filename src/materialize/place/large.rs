//! Big files, taken as a stream.

use std::{fmt, sync::Arc};

use rustix::{
    fs::{self, FallocateFlags},
    io::Errno,
};

use super::{
    epoch::Epoch,
    error::PlaceError,
    item::{How, Placed},
    options::PlaceOptions,
    placer::Placer,
    promised::Promised,
    publish::{Job, NewFile, Site},
    root::OutputRoot,
    sys,
    writable::Writable,
};
use crate::{
    digest::{Digest, Hasher},
    exec_path::ExecPath,
    open_files::is_lacking,
};

/// Bytes per write to the file: network frames are far smaller.
const WRITE: usize = 1 << 20;

/// A big file on its way to its place.
///
/// Its bytes are hashed as they come and kept in a file without a name; the output tree is not touched before
/// [`finish`](Self::finish). Dropping it leaves nothing. It needs no [`Placer`] and may move between threads.
pub(crate) struct LargeFile {
    root: Arc<OutputRoot>,
    options: PlaceOptions,
    path: ExecPath,
    digest: Digest,
    file: NewFile,
    hasher: Hasher,
    /// Bytes that are hashed but not written.
    pending: Vec<u8>,
    /// Whether its space is taken already.
    is_reserved: bool,
    /// The space promised to it, on file systems that cannot allocate it in advance.
    promised: Option<Promised>,
}

impl Placer {
    /// Begins a big file. Its space is reserved, so that a full disk is noticed before the download.
    ///
    /// # Errors
    /// When there is no space for it, the root is gone, or the system fails.
    pub(crate) fn begin_large(&mut self, path: &ExecPath, digest: &Digest) -> Result<LargeFile, PlaceError> {
        self.root.guard(path.as_str())?;
        let file = NewFile::in_temp(&self.root, self.root.mode(path, self.options))?;
        let is_reserved = reserve(&file, digest.size())
            .map_err(|errno| PlaceError::system_error("reserve space for", path.as_str(), errno))?;
        Ok(LargeFile {
            root: Arc::clone(&self.root),
            options: self.options,
            path: path.clone(),
            digest: digest.clone(),
            file,
            hasher: Hasher::new(digest.function()),
            pending: Vec::new(),
            is_reserved,
            promised: None,
        })
    }
}

impl LargeFile {
    /// Keeps the promise of its space for as long as it is needed.
    pub(in crate::materialize) fn with_promise(mut self, promised: Promised) -> Self {
        self.promised = (!self.is_reserved).then_some(promised);
        self
    }

    /// How many bytes it has taken: where a broken stream goes on.
    pub(crate) const fn offset(&self) -> u64 {
        self.hasher.size()
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// When they are more than the digest says, or cannot be written. The file is of no use after that.
    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> Result<(), PlaceError> {
        if self.hasher.size() + bytes.len() as u64 > self.digest.size() {
            return Err(PlaceError::mismatch(self.path.as_str(), &self.digest, None));
        }
        self.hasher.update(bytes);
        if !self.pending.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(WRITE - self.pending.len()));
            self.pending.extend_from_slice(now);
            bytes = later;
            if self.pending.len() == WRITE {
                self.flush()?;
            }
        }
        // What is left is big enough to be written without a copy, or fits into the empty buffer.
        let direct = bytes.len() - bytes.len() % WRITE;
        let (now, later) = bytes.split_at(direct);
        self.write_out(now)?;
        if !later.is_empty() {
            let room = usize::try_from(self.digest.size()).unwrap_or(WRITE).min(WRITE);
            self.pending
                .reserve_exact(room.saturating_sub(self.pending.len()));
            self.pending.extend_from_slice(later);
        }
        Ok(())
    }

    /// Verifies it and gives it its name.
    ///
    /// # Errors
    /// When bytes are missing or wrong, a newer invocation has begun, the root is gone, a link leads out of it,
    /// something that may not be removed is in the way, or the system fails.
    pub(crate) fn finish(mut self, epoch: &Epoch, version: u64) -> Result<Placed, PlaceError> {
        self.flush()?;
        let actual = self.hasher.finish();
        if actual != self.digest {
            return Err(PlaceError::mismatch(
                self.path.as_str(),
                &self.digest,
                Some(actual),
            ));
        }
        let _working = epoch.working();
        self.file.close_for_writing();
        let job = Job {
            root: &self.root,
            options: self.options,
            epoch,
            version,
        };
        publish_verified(&job, &self.path, &self.digest, self.file)
    }

    fn flush(&mut self) -> Result<(), PlaceError> {
        let pending = std::mem::take(&mut self.pending);
        self.write_out(&pending)?;
        self.pending = pending;
        self.pending.clear();
        Ok(())
    }

    fn write_out(&mut self, bytes: &[u8]) -> Result<(), PlaceError> {
        sys::write_all(&self.file, bytes)
            .map_err(|errno| PlaceError::system_error("write", self.path.as_str(), errno))?;
        if let Some(promised) = &mut self.promised {
            promised.spend(bytes.len() as u64);
        }
        Ok(())
    }
}

impl fmt::Debug for LargeFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LargeFile")
            .field("path", &self.path)
            .field("digest", &self.digest)
            .field("offset", &self.offset())
            .finish_non_exhaustive()
    }
}

/// Gives a file with verified bytes its name, unless a file with the same bytes has it by now.
pub(super) fn publish_verified(
    job: &Job<'_>,
    path: &ExecPath,
    digest: &Digest,
    file: NewFile,
) -> Result<Placed, PlaceError> {
    job.root.learn_modes();
    let file = file
        .with_mode(job.mode(path))
        .map_err(|e| PlaceError::system_error("set mode of", path.as_str(), e))?;
    let dir = job.parent(path)?;
    let _open = Writable::open(&job.root.writable, &dir)
        .map_err(|e| PlaceError::system_error("open read-only directory for", path.as_str(), e))?;
    let site = Site::find(job, path, &dir)?;
    if let Some(stamp) = site.is_already(job, digest, &mut Vec::new())? {
        let how = How::Kept;
        return Ok(Placed { stamp, how });
    }
    site.publish(job, digest, file)
}

/// Reserves space where the file system can. tmpfs can only by filling pages with zeros, which takes as long as
/// writing the file; there it is only looked whether there is enough. True if it is reserved.
pub(super) fn reserve(file: &NewFile, size: u64) -> rustix::io::Result<bool> {
    if size == 0 {
        return Ok(true);
    }
    if let Some(free) = sys::free_on_tmpfs(file)? {
        return if size <= free {
            Ok(false)
        } else {
            Err(Errno::NOSPC)
        };
    }
    loop {
        match fs::fallocate(file, FallocateFlags::empty(), 0, size) {
            Err(Errno::INTR) => {}
            Err(errno) if is_lacking(errno) => return Ok(false),
            other => return other.map(|()| true),
        }
    }
}
