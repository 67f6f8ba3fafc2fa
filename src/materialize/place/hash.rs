//! Whether a file has the bytes that it should have.

use rustix::{
    fs::{self, FileType, Mode, OFlags, Stat},
    io::Errno,
};

use super::{error::PlaceError, root::OutputRoot, spot::Spot, sys, walk};
use crate::{
    digest::{Digest, Hasher},
    exec_path::ExecPath,
    output::{OutputContent, Stamp},
};

/// Pieces in which files are read.
const READ: usize = 256 << 10;

/// Whether an output is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Check {
    /// The right content is there. For a symlink that was followed, the stamp is that of the file it leads to.
    Present {
        /// What to record, taken before the content was looked at.
        stamp: Stamp,
        /// How it is known.
        how: Vouched,
    },
    /// Nothing is there.
    Absent,
    /// Something else is there.
    Differs,
}

/// How it is known that the right content is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vouched {
    /// The recorded stamp is still that of the file.
    Stamp,
    /// The content was read.
    Content,
    /// It has the right size, or leads where it should; nothing was read.
    Size,
}

/// What a file's bytes are compared with.
pub(super) enum Wanted<'a> {
    Digest(&'a Digest),
    Bytes(&'a [u8]),
}

impl<'a> Wanted<'a> {
    /// `None` for a link or a directory.
    pub(super) fn of(content: &'a OutputContent) -> Option<Self> {
        match content {
            OutputContent::Blob(digest) => Some(Self::Digest(digest)),
            OutputContent::Inline(bytes) => Some(Self::Bytes(bytes)),
            OutputContent::Directory | OutputContent::Symlink(_) => None,
        }
    }

    /// What is known without reading; `None` when the bytes have to be read.
    pub(super) fn at_first_sight(&self, seen: &Stat, taken: i64, recorded: Option<&Stamp>) -> Option<Check> {
        let now = sys::stamp(seen, taken);
        if sys::file_type(seen) != FileType::RegularFile || now.size != self.size() {
            return Some(Check::Differs);
        }
        let how = Vouched::Stamp;
        recorded
            .is_some_and(|stamp| stamp.vouches_for(&now))
            .then_some(Check::Present { stamp: now, how })
    }

    pub(super) fn size(&self) -> u64 {
        match self {
            Self::Digest(digest) => digest.size(),
            Self::Bytes(bytes) => bytes.len() as u64,
        }
    }
}

/// Whether an output that was found at a spot is there still. If links led to it, or it is a directory, it is noted what
/// it leans on.
pub(super) fn leans(
    root: &OutputRoot,
    path: &ExecPath,
    content: &dyn Fn() -> OutputContent,
    spot: &Spot,
    stamp: &Stamp,
) -> bool {
    let is_still_there = || {
        walk::still_leads(root, path, spot)
            && sys::lstat(&spot.dir, &spot.name)
                .is_ok_and(|seen| seen.is_some_and(|seen| sys::is_same_file(&sys::stamp(&seen, 0), stamp)))
    };
    // A directory in its own place is not removed for being empty.
    let is_file = || !matches!(content(), OutputContent::Directory);
    (spot.dir.through.is_empty() && is_file()) || root.aliases.found(path, &content(), spot, is_still_there)
}

/// Reads the file at a spot, and returns its stamp if it has the wanted bytes and did not change meanwhile. Links
/// are not followed. The stamp counts as taken before the reading: what is changed later shows in the file's times.
pub(super) fn hash_file(
    spot: &Spot,
    wanted: &Wanted<'_>,
    buffer: &mut Vec<u8>,
) -> Result<Option<Stamp>, PlaceError> {
    hash_opened(spot, OFlags::NOFOLLOW, wanted, buffer)
}

/// As [`hash_file`], with further flags for opening.
pub(super) fn hash_opened(
    spot: &Spot,
    flags: OFlags,
    wanted: &Wanted<'_>,
    buffer: &mut Vec<u8>,
) -> Result<Option<Stamp>, PlaceError> {
    let error = |errno| PlaceError::system_error("read", spot.path(), errno);
    let taken = sys::now_ns();
    // A fifo that has taken the file's place must not block us.
    let flags = flags | OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = match sys::openat(&spot.dir, &spot.name, flags, Mode::empty()) {
        Ok(fd) => fd,
        // Gone or something else by now, or nothing that can be read: not the right content in any case.
        Err(Errno::NOENT | Errno::LOOP | Errno::ACCESS | Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(error(errno)),
    };
    let stat = fs::fstat(&fd).map_err(error)?;
    let before = sys::stamp(&stat, taken);
    if sys::file_type(&stat) != FileType::RegularFile || before.size != wanted.size() {
        return Ok(None);
    }
    buffer.resize(READ, 0);
    let is_it = match wanted {
        Wanted::Digest(digest) => {
            let mut hasher = Hasher::new(digest.function());
            sys::read_pieces(&fd, buffer, |piece| {
                hasher.update(piece);
                Ok(())
            })
            .map_err(error)?;
            hasher.finish() == **digest
        }
        Wanted::Bytes(bytes) => {
            let mut rest = Some(*bytes);
            sys::read_pieces(&fd, buffer, |piece| {
                rest = rest.and_then(|rest| rest.strip_prefix(piece));
                Ok(())
            })
            .map_err(error)?;
            rest.is_some_and(<[u8]>::is_empty)
        }
    };
    let after = sys::stamp(&fs::fstat(&fd).map_err(error)?, taken);
    Ok((is_it && sys::is_same_file(&before, &after)).then_some(before))
}
