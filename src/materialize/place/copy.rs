//! A blob that is already in the root, at another path.

use rustix::{
    fs::{self, FileType, Mode},
    io::{self, Errno},
};

use super::{
    epoch::Epoch,
    error::{PlaceError, PlaceErrorKind},
    item::Placed,
    large::{publish_verified, reserve},
    placer::Placer,
    publish::NewFile,
    sys, walk,
};
use crate::{
    digest::{Digest, Hasher},
    exec_path::ExecPath,
    open_files::{GUARDED, is_lacking},
    output::Stamp,
};

/// Pieces in which the kernel is asked to copy: so large that a call costs nothing, small enough to be interrupted.
const PIECE: usize = 64 << 20;

/// Pieces in which bytes are read.
const READ: usize = 1 << 20;

impl Placer {
    /// The bytes of a file of this root that was seen to have a blob, not verified. Right for what is so small that
    /// writing its bytes again is faster than [`copy_within`](Self::copy_within).
    ///
    /// # Errors
    /// With [`PlaceErrorKind::SourceChanged`] when there is no such file of that size any more; else when it cannot be
    /// read.
    pub(crate) fn read_file(&mut self, from: &ExecPath, digest: &Digest) -> Result<Vec<u8>, PlaceError> {
        let error = |errno| PlaceError::system_error("read", from.as_str(), errno);
        let changed = || PlaceError::new("copy from", from.as_str(), PlaceErrorKind::SourceChanged);
        let dir = self.dirs.get(&self.root, from.parent().unwrap_or(""))?;
        let dir = dir.ok_or_else(changed)?;
        let file = match sys::openat(&dir, from.file_name(), GUARDED, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT | Errno::LOOP) => return Err(changed()),
            Err(errno) => return Err(error(errno)),
        };
        let stat = fs::fstat(&file).map_err(error)?;
        let size = sys::stamp(&stat, 0).size;
        if sys::file_type(&stat) != FileType::RegularFile || size != digest.size() {
            return Err(changed());
        }
        let mut bytes = vec![0; usize::try_from(size).map_err(|_| changed())?];
        let mut read = 0;
        while let Some(rest) = bytes.get_mut(read..).filter(|rest| !rest.is_empty()) {
            match io::read(&file, rest) {
                Ok(0) => return Err(changed()),
                Ok(n) => read += n,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(error(errno)),
            }
        }
        Ok(bytes)
    }

    /// Places a blob by copying a file of this root that was seen to have it: as a clone where the file system can,
    /// else in the kernel, else by reading and writing. Never as a hard link: two outputs with one inode change
    /// together. Worth it from about 256 KiB; below that, writing the bytes is faster.
    ///
    /// The source must still have the stamp, before the copy and after it. The copy is hashed, unless it is a clone
    /// and the stamp vouches for the source. A clone takes no space, so only others are asked what is to stay free.
    ///
    /// # Errors
    /// With [`PlaceErrorKind::SourceChanged`] when the source is not what it was; with
    /// [`PlaceErrorKind::Mismatch`] when it never had the blob; with [`PlaceErrorKind::LowSpace`]; else as for
    /// [`place_many`](Self::place_many).
    pub(crate) fn copy_within(
        &mut self,
        (from, from_stamp): (&ExecPath, &Stamp),
        to: &ExecPath,
        digest: &Digest,
        is_optional: bool,
        epoch: &Epoch,
        version: u64,
    ) -> Result<Placed, PlaceError> {
        let error = |errno| PlaceError::system_error("copy to", to.as_str(), errno);
        let changed = || PlaceError::new("copy from", from.as_str(), PlaceErrorKind::SourceChanged);
        self.root.guard(to.as_str())?;
        let spot = walk::follow(&self.root, from.as_str())?.ok_or_else(changed)?;
        let source = match sys::openat(&spot.dir, &spot.name, GUARDED, Mode::empty()) {
            Ok(source) => source,
            Err(Errno::NOENT | Errno::LOOP) => return Err(changed()),
            Err(errno) => return Err(PlaceError::system_error("open", from.as_str(), errno)),
        };
        let look = || -> Result<Stamp, PlaceError> {
            let stat = fs::fstat(&source).map_err(error)?;
            let now = sys::stamp(&stat, sys::now_ns());
            let is_it = sys::file_type(&stat) == FileType::RegularFile
                && sys::is_same_file(from_stamp, &now)
                && now.size == digest.size();
            is_it.then_some(now).ok_or_else(changed)
        };
        let before = look()?;
        let mut file = NewFile::in_temp(&self.root, self.root.mode(to, self.options))?;
        let is_clone = fs::ioctl_ficlone(&file, &source).is_ok();
        if !is_clone {
            let promised = self.promise(to, is_optional, digest.size())?;
            // What is reserved is known to the file system.
            let _promised = (!reserve(&file, digest.size()).map_err(error)?).then_some(promised);
            copy_bytes(&source, &file, digest.size(), &mut self.buffer).map_err(error)?;
        }
        look()?;
        if !(is_clone && from_stamp.vouches_for(&before)) {
            let actual = hash(&file, digest, &mut self.buffer).map_err(error)?;
            if actual != *digest {
                return Err(PlaceError::mismatch(to.as_str(), digest, Some(actual)));
            }
        }
        let _working = epoch.working();
        file.close_for_writing();
        publish_verified(&self.job(epoch, version), to, digest, file)
    }
}

/// Copies `size` bytes, in the kernel if it can.
fn copy_bytes(
    source: &std::os::fd::OwnedFd,
    file: &NewFile,
    size: u64,
    buffer: &mut Vec<u8>,
) -> io::Result<()> {
    let mut copied = 0;
    while copied < size {
        let piece = usize::try_from(size - copied).unwrap_or(PIECE).min(PIECE);
        match fs::copy_file_range(source, None, file, None, piece) {
            // The source has become shorter; the stamp will say.
            Ok(0) => return Ok(()),
            Ok(n) => copied += n as u64,
            Err(Errno::INTR) => {}
            // Another file system, an old kernel, a sandbox: both positions are where the last piece ended.
            Err(errno) if errno == Errno::XDEV || is_lacking(errno) => {
                buffer.resize(READ, 0);
                return sys::read_pieces(source, buffer, |bytes| sys::write_all(file, bytes));
            }
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// The digest of what was written.
fn hash(file: &NewFile, digest: &Digest, buffer: &mut Vec<u8>) -> io::Result<Digest> {
    let mut hasher = Hasher::new(digest.function());
    buffer.resize(READ, 0);
    fs::seek(file, fs::SeekFrom::Start(0))?;
    sys::read_pieces(file, buffer, |piece| {
        hasher.update(piece);
        Ok(())
    })?;
    Ok(hasher.finish())
}
