//! Is it already there?

use std::{
    collections::HashMap,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    fs::{self, AtFlags, FileType, Mode, OFlags, Stat},
    io::Errno,
};

use super::{
    error::{PlaceError, PlaceErrorKind},
    placer::Placer,
    root::OutputRoot,
    sys::{self, Dir},
    walk::{self, Spot},
};
use crate::{
    digest::{Digest, Hasher},
    exec_path::ExecPath,
    output::{OutputContent, Stamp},
};

/// Pieces in which files are read.
const READ: usize = 256 << 10;

/// How long an open directory stands for its path. A directory that was replaced meanwhile is looked at for so long
/// and no longer; placing opens its directories anew every time.
const FRESH: Duration = Duration::from_millis(50);

/// How many directories are kept open.
const OPEN_DIRECTORIES: usize = 16;

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
    fn of(content: &'a OutputContent) -> Option<Self> {
        match content {
            OutputContent::Blob(digest) => Some(Self::Digest(digest)),
            OutputContent::Inline(bytes) => Some(Self::Bytes(bytes)),
            OutputContent::Directory | OutputContent::Symlink(_) => None,
        }
    }

    /// What is known without reading; `None` when the bytes have to tell.
    fn at_first_sight(&self, seen: &Stat, taken: i64, recorded: Option<&Stamp>) -> Option<Check> {
        let now = sys::stamp(seen, taken);
        if sys::file_type(seen) != FileType::RegularFile || now.size != self.size() {
            return Some(Check::Differs);
        }
        let how = Vouched::Stamp;
        recorded
            .is_some_and(|stamp| stamp.vouches_for(&now))
            .then_some(Check::Present { stamp: now, how })
    }

    fn size(&self) -> u64 {
        match self {
            Self::Digest(digest) => digest.size(),
            Self::Bytes(bytes) => bytes.len() as u64,
        }
    }
}

/// A directory, as it was found or not.
type Found = Result<Option<Arc<Dir>>, PlaceError>;

impl Placer {
    /// Whether the content is at the path. `recorded` is the stamp that was recorded when *this* content was seen
    /// there last; while it vouches for the file, nothing is read.
    ///
    /// # Errors
    /// When the root is not the one that was opened, a symlink on the way leads out of it, or the system fails.
    pub fn check(
        &mut self,
        path: &ExecPath,
        content: &OutputContent,
        recorded: Option<&Stamp>,
    ) -> Result<Check, PlaceError> {
        let dir = self.dirs.get(&self.root, path.parent().unwrap_or(""));
        self.check_in(&dir, sys::now_ns(), path, content, recorded)
    }

    /// Checks many at once, and answers in their order. Neighbours of one directory are looked up in it together; when
    /// it is not there, neither are they.
    ///
    /// # Errors
    /// Each for itself, as for [`check`](Self::check).
    pub fn check_many<'a>(
        &mut self,
        items: impl ExactSizeIterator<Item = (&'a ExecPath, &'a OutputContent, Option<&'a Stamp>)>,
    ) -> Vec<Result<Check, PlaceError>> {
        let mut results = Vec::with_capacity(items.len());
        let mut last: Option<(&str, Found, i64)> = None;
        for (path, content, recorded) in items {
            let parent = path.parent().unwrap_or("");
            // Whoever looked away for long, to read a file, looks the directory up again.
            let (dir, taken) = match last.take().filter(|(of, ..)| *of == parent) {
                Some((_, dir, taken)) => (dir, taken),
                // A stamp may count as taken earlier than it was, but not later.
                None => (self.dirs.get(&self.root, parent), sys::now_ns()),
            };
            let result = self.check_in(&dir, taken, path, content, recorded);
            let has_read = matches!(
                &result,
                Ok(Check::Present {
                    how: Vouched::Content,
                    ..
                } | Check::Differs)
            );
            if !has_read {
                last = Some((parent, dir, taken));
            }
            results.push(result);
        }
        results
    }

    /// Checks a name in its directory, looked up no earlier than `taken`.
    fn check_in(
        &mut self,
        dir: &Found,
        taken: i64,
        path: &ExecPath,
        content: &OutputContent,
        recorded: Option<&Stamp>,
    ) -> Result<Check, PlaceError> {
        let error = |errno| PlaceError::system_error("check", path.as_str(), errno);
        self.root.admit(path.as_str())?;
        let dir = match dir {
            Ok(Some(dir)) => dir,
            Ok(None) => return Ok(Check::Absent),
            // A file lies where a directory on the way should be.
            Err(e) if matches!(e.kind, PlaceErrorKind::Conflict(_)) => return Ok(Check::Differs),
            Err(e) => {
                let path = path.as_path().to_owned();
                return Err(PlaceError { path, ..e.clone() });
            }
        };
        let Some(seen) = sys::lstat(dir, path.file_name().as_ref()).map_err(error)? else {
            return Ok(Check::Absent);
        };
        // What nearly every file of a build that changes nothing comes to.
        if let Some(wanted) = Wanted::of(content)
            && dir.through.is_empty()
            && sys::file_type(&seen) == FileType::RegularFile
            && let Some(settled) = wanted.at_first_sight(&seen, taken, recorded)
        {
            return Ok(settled);
        }
        self.check_seen(dir, seen, taken, path, content, recorded)
    }

    /// Looks closer at what a first look could not settle.
    fn check_seen(
        &mut self,
        dir: &Arc<Dir>,
        mut seen: Stat,
        taken: i64,
        path: &ExecPath,
        content: &OutputContent,
        recorded: Option<&Stamp>,
    ) -> Result<Check, PlaceError> {
        let error = |errno| PlaceError::system_error("check", path.as_str(), errno);
        let mut spot = Spot {
            dir: Arc::clone(dir),
            name: path.file_name().into(),
        };
        let link = match content {
            OutputContent::Symlink(target) => Some(Path::new(target)),
            _ => None,
        };
        if sys::file_type(&seen) == FileType::Symlink && link.is_none() {
            if !self.root.is_exec_root() {
                return Ok(Check::Differs);
            }
            match walk::follow(&self.root, path.as_str()) {
                Ok(Some(found)) => spot = found,
                Ok(None) => return Ok(Check::Absent),
                Err(e)
                    if matches!(
                        e.kind,
                        PlaceErrorKind::Escapes { .. } | PlaceErrorKind::Conflict(_)
                    ) =>
                {
                    return self.check_outside(&spot, content, recorded);
                }
                Err(e) => return Err(e),
            }
            match sys::lstat(&spot.dir, &spot.name).map_err(error)? {
                Some(found) => seen = found,
                None => return Ok(Check::Absent),
            }
        }
        let check = match Wanted::of(content) {
            None if link.is_some() => {
                let is_it = sys::file_type(&seen) == FileType::Symlink
                    && sys::read_link(&spot.dir, &spot.name).is_ok_and(|t| Some(&*t) == link);
                present_if(is_it, &seen, taken)
            }
            None => {
                let is_it = sys::file_type(&seen) == FileType::Directory;
                present_if(is_it, &seen, taken)
            }
            Some(wanted) => match wanted.at_first_sight(&seen, taken, recorded) {
                Some(settled) => settled,
                None => {
                    let how = Vouched::Content;
                    hash_file(&spot, &wanted, &mut self.buffer)?
                        .map_or(Check::Differs, |stamp| Check::Present { stamp, how })
                }
            },
        };
        Ok(match check {
            Check::Present { stamp, .. } if !leans(&self.root, path, &|| content.clone(), &spot, &stamp) => {
                Check::Differs
            }
            check => check,
        })
    }

    /// Looks through a symlink that leads out of the root. Nothing is ever written through one, but Bazel makes some
    /// itself: the executable of an `sh_test` is a link into the workspace, whose content no cache has to have.
    fn check_outside(
        &mut self,
        spot: &Spot,
        content: &OutputContent,
        recorded: Option<&Stamp>,
    ) -> Result<Check, PlaceError> {
        let Some(wanted) = Wanted::of(content) else {
            return Ok(Check::Differs);
        };
        let taken = sys::now_ns();
        let Ok(seen) = fs::statat(&spot.dir, &spot.name, AtFlags::empty()) else {
            // Dangling, or closed to us: in any case not the content.
            return Ok(Check::Differs);
        };
        // By a way around, such as the workspace's own links, to an output that may be another's.
        let real = self.root.path().join(spot.path()).canonicalize();
        if real.is_ok_and(|real| {
            self.root
                .below(&real)
                .is_some_and(|real| self.root.may_end_in(real))
        }) {
            return Ok(Check::Differs);
        }
        if let Some(settled) = wanted.at_first_sight(&seen, taken, recorded) {
            return Ok(settled);
        }
        let how = Vouched::Content;
        Ok(hash_opened(spot, OFlags::empty(), &wanted, &mut self.buffer)?
            .map_or(Check::Differs, |stamp| Check::Present { stamp, how }))
    }

    /// Forgets the directories that are kept open for checks.
    pub fn close_directories(&mut self) {
        self.dirs = DirCache::default();
    }
}

/// Whether an output that was found at a spot is there still. If links led to it, it is noted what it leans on.
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
    spot.dir.through.is_empty() || root.aliases.found(path, &content(), spot, is_still_there)
}

fn present_if(is_it: bool, seen: &Stat, taken: i64) -> Check {
    if is_it {
        let (stamp, how) = (sys::stamp(seen, taken), Vouched::Content);
        Check::Present { stamp, how }
    } else {
        Check::Differs
    }
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
fn hash_opened(
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
        // All of them fresh: so many directories are visited in so short a time that any is as good to drop.
        if self.open.len() >= OPEN_DIRECTORIES {
            self.open.clear();
        }
        self.open.insert(path.into(), (Arc::clone(&dir), now));
        Ok(Some(dir))
    }
}
