//! Finding and making directories beneath the root.
//!
//! The common case is one `openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)`. Where that meets a symlink, or there is
//! no `openat2`, the way is walked one component at a time, every component opened without following it from the
//! descriptor of the one before.
//!
//! In an exec root, a link on the way is read, and where it leads is walked in the same manner from the root, for Bazel
//! makes absolute links for symlinked directories. But a walk ends below `bazel-out`, no matter who made the links:
//! nothing else in the root is ever entered, neither sources nor `external`, and `bazel-out` itself is not a link. In a
//! directory of the user's own no link is followed: one that an earlier build has left in a directory's place is
//! replaced, and one that leads out is refused.

use std::{
    ffi::{OsStr, OsString},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::{self, AtFlags, FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};

use super::{
    epoch::Permit,
    error::{PlaceError, PlaceErrorKind},
    leaning,
    root::OutputRoot,
    spot::Spot,
    sys::{self, Dir},
    writable::Writable,
};
use crate::{
    exec_path::{BUILD_TREE, ExecPath},
    open_files::is_lacking,
};

/// How many symlinks are followed for one path, as in Bazel's own download of a dangling link's target.
const MAX_HOPS: usize = 32;
/// How many directories deep a walk goes: it holds the descriptors of all of them, for the way back.
const MAX_DEPTH: usize = 256;

/// The directory at a path below the root (empty for the root itself); `None` when it is not there.
pub(super) fn find_dir(root: &OutputRoot, path: &str) -> Result<Option<Arc<Dir>>, PlaceError> {
    match open_beneath(root, path) {
        Ok(Some(dir)) => return Ok(Some(Arc::new(dir))),
        // A missing component is not made up for by links before it.
        Err(Errno::NOENT) => return Ok(None),
        // A link, a file, a rename just now, no `openat2`: walking says which.
        Ok(None) | Err(_) => {}
    }
    let mut walk = Walk::new(root, path, None)?;
    if !walk.descend(0)? {
        return Ok(None);
    }
    walk.end().map(Some)
}

/// The directory at a path below the root, made with its parents where it is missing. A file in the way is removed;
/// the permit says that this is for the newest invocation, whose stream has a directory there.
pub(super) fn make_dir(root: &OutputRoot, path: &str, permit: &Permit<'_>) -> Result<Arc<Dir>, PlaceError> {
    match open_beneath(root, path) {
        Ok(Some(dir)) => return Ok(Arc::new(dir)),
        // No link on the way so far, and mostly only the last component is missing. Those in the root itself are made
        // in the one way that looks after `bazel-out`.
        Err(Errno::NOENT) => {
            if let Some(dir) = make_below(root, path, permit) {
                return Ok(dir);
            }
        }
        // A link, a file in the way, no `openat2`.
        Ok(None) | Err(_) => {}
    }
    let mut walk = Walk::new(root, path, Some(permit))?;
    walk.descend(0)?;
    walk.end()
}

/// Makes a directory of which one above it, but not in the root itself, is there or can be walked to. `None` when that
/// does not work at once: then the walk finds out why.
fn make_below(root: &OutputRoot, path: &str, permit: &Permit<'_>) -> Option<Arc<Dir>> {
    let mut missing = Vec::new();
    let mut above = path;
    let mut dir = loop {
        let (parent, name) = above.rsplit_once('/')?;
        missing.push(name);
        above = parent;
        match open_beneath(root, above) {
            Ok(Some(dir)) => break Arc::new(dir),
            Err(Errno::NOENT) if above.contains('/') => {}
            _ => {
                let mut walk = Walk::new(root, above, Some(permit)).ok()?;
                walk.descend(0).ok()?;
                break walk.end().ok()?;
            }
        }
    };
    // A link may lead to the root itself.
    if dir.path.as_os_str().is_empty() {
        return None;
    }
    for name in missing.into_iter().rev() {
        dir = make_in(root, &dir, name, permit)?;
    }
    Some(dir)
}

/// Makes and opens a directory in one that is not the root itself. `None` when that does not work at once: then the walk
/// finds out why.
pub(super) fn make_in(root: &OutputRoot, above: &Arc<Dir>, name: &str, _: &Permit<'_>) -> Option<Arc<Dir>> {
    let open = Writable::open(&root.writable, above).ok()?;
    // In a tree, all directories are as its root is.
    let mode = open.before().unwrap_or_else(|| root.modes.directory());
    let is_ours = match fs::mkdirat(above, name, Mode::from_raw_mode(mode)) {
        Ok(()) => true,
        Err(Errno::EXIST) => false,
        Err(_) => return None,
    };
    let flags = sys::DIRECTORY | OFlags::NOFOLLOW;
    let fd = sys::openat(above, name, flags, Mode::empty()).ok()?;
    let stat = fs::fstat(&fd).ok()?;
    // As `settle_dir_mode`, with the descriptor that is open anyway.
    if is_ours && stat.st_mode & 0o777 != mode {
        fs::chmodat(&fd, ".", Mode::from_raw_mode(mode), AtFlags::empty()).ok()?;
    }
    let inode = sys::inode(&stat);
    let path = above.path.join(name);
    let through = above.through.clone();
    Some(Arc::new(Dir {
        fd,
        inode,
        path,
        through,
    }))
}

/// Where the file at a path really is, or would be: the links that the path ends in are followed. `None` when a
/// directory on the way is missing. The links are among those that the spot's directory was reached through.
pub(super) fn follow(root: &OutputRoot, path: &str) -> Result<Option<Spot>, PlaceError> {
    follow_making(root, path, None)
}

/// The same; with a permit, directories on the way are made.
pub(super) fn follow_making(
    root: &OutputRoot,
    path: &str,
    permit: Option<&Permit<'_>>,
) -> Result<Option<Spot>, PlaceError> {
    let mut walk = Walk::new(root, path, permit)?;
    loop {
        if !walk.descend(1)? {
            return Ok(None);
        }
        let dir = walk.end()?;
        let Some(name) = walk.pending.pop().filter(|name| name != "..") else {
            let kind = PlaceErrorKind::Conflict("the symlink in its place leads to a directory");
            return Err(PlaceError::new("follow", path, kind));
        };
        let seen = sys::lstat(&dir, &name).map_err(|e| PlaceError::system_error("stat", path, e))?;
        if !seen.is_some_and(|stat| sys::file_type(&stat) == FileType::Symlink) {
            return Ok(Some(Spot { dir, name }));
        }
        match sys::read_link(&dir, &name) {
            Ok(target) if !root.is_exec_root => return Err(walk.escapes(&name, &target)),
            Ok(target) => walk.turn(&name, &target)?,
            // It is not a link any more: look again.
            Err(Errno::INVAL | Errno::NOENT) => walk.pending.push(name),
            Err(errno) => return Err(PlaceError::system_error("read link", path, errno)),
        }
    }
}

/// What a path in an exec root leads to, for a reader.
pub(super) enum End {
    /// Nothing: a directory on the way is missing.
    Nothing,
    /// A name below `bazel-out` that is not a link, if it is there at all.
    Spot(Spot),
    /// By a link that is an output itself, to this absolute path outside of `bazel-out`, as far as the link's text says.
    Outside(PathBuf),
}

/// Follows the links that a path in an exec root ends in, to their end or out of `bazel-out`. A link on the way may not
/// lead out.
pub(super) fn read_to_end(root: &OutputRoot, path: &str) -> Result<End, PlaceError> {
    let mut walk = Walk::new(root, path, None)?;
    loop {
        if !walk.descend(1)? {
            return Ok(End::Nothing);
        }
        let dir = walk.end()?;
        let Some(name) = walk.pending.pop().filter(|name| name != "..") else {
            let kind = PlaceErrorKind::Conflict("the symlink in its place leads to a parent of it");
            return Err(PlaceError::new("follow", path, kind));
        };
        match sys::read_link(&dir, &name) {
            Ok(target) => match outside(root, &dir, &target) {
                Some(outside) => return Ok(End::Outside(outside)),
                None => walk.turn(&name, &target)?,
            },
            Err(Errno::INVAL | Errno::NOENT) => return Ok(End::Spot(Spot { dir, name })),
            Err(errno) => return Err(PlaceError::system_error("read link", path, errno)),
        }
    }
}

/// Where a link in a directory leads, if that is not below `bazel-out`.
fn outside(root: &OutputRoot, dir: &Dir, target: &Path) -> Option<PathBuf> {
    let whole = match root.below(target) {
        Some(below) => root.path().join(below),
        None => root.path().join(&dir.path).join(target),
    };
    let mut plain = PathBuf::new();
    for component in whole.components() {
        match component {
            Component::ParentDir => {
                plain.pop();
            }
            other => plain.push(other),
        }
    }
    let below = plain.strip_prefix(root.path());
    let is_output = below.is_ok_and(|below| below.starts_with(BUILD_TREE) && below != Path::new(BUILD_TREE));
    (!is_output).then_some(plain)
}

/// Whether a path leads to a spot still, by the same links; those that it ends in count as followed or not, as they
/// were for the spot.
pub(super) fn still_leads(root: &OutputRoot, path: &ExecPath, spot: &Spot) -> bool {
    let is_it = |now: &Spot| now.name == spot.name && now.dir.is_as(&spot.dir);
    let unfollowed = || {
        let dir = find_dir(root, path.parent().unwrap_or("")).ok()??;
        let name = path.file_name().into();
        Some(Spot { dir, name })
    };
    unfollowed().as_ref().is_some_and(is_it)
        || matches!(follow(root, path.as_str()), Ok(Some(now)) if is_it(&now))
}

/// One call for the whole path; `None` when that cannot be done on this kernel.
fn open_beneath(root: &OutputRoot, path: &str) -> rustix::io::Result<Option<Dir>> {
    let fd = if !root.may_end_in(Path::new(path)) {
        return Ok(None);
    } else if path.is_empty() {
        sys::openat(root, ".", sys::DIRECTORY, Mode::empty())?
    } else if !root.has_openat2() {
        return Ok(None);
    } else {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        match sys::openat2(root, path, sys::DIRECTORY, resolve) {
            Err(errno) if is_lacking(errno) => {
                root.forget_openat2();
                return Ok(None);
            }
            other => other?,
        }
    };
    Ok(Some(Dir {
        inode: sys::inode(&fs::fstat(&fd)?),
        fd,
        path: PathBuf::from(path),
        through: Box::default(),
    }))
}

/// A way from the root, as far as it has been walked.
struct Walk<'a> {
    root: &'a OutputRoot,
    /// The path that was asked for, for messages.
    asked: &'a str,
    /// With it, what is missing is made.
    permit: Option<&'a Permit<'a>>,
    /// The directories from the root down to where we are: `..` in a link's target goes back one, and never above
    /// the first.
    stack: Vec<Arc<Dir>>,
    /// The components to come, the next one last.
    pending: Vec<OsString>,
    /// The links that were followed, below the root.
    through: Vec<PathBuf>,
}

impl<'a> Walk<'a> {
    fn new(root: &'a OutputRoot, asked: &'a str, permit: Option<&'a Permit<'a>>) -> Result<Self, PlaceError> {
        let error = |errno| PlaceError::system_error("open output root for", asked, errno);
        let fd = sys::openat(root, ".", sys::DIRECTORY, Mode::empty()).map_err(error)?;
        let top = Dir {
            inode: sys::inode(&fs::fstat(&fd).map_err(error)?),
            fd,
            path: PathBuf::new(),
            through: Box::default(),
        };
        let mut walk = Self {
            root,
            asked,
            permit,
            stack: vec![Arc::new(top)],
            pending: Vec::new(),
            through: Vec::new(),
        };
        walk.push(Path::new(asked));
        Ok(walk)
    }

    /// The directory that has been reached.
    fn top(&self) -> Arc<Dir> {
        Arc::clone(&self.stack[self.stack.len() - 1])
    }

    /// The same as the end of the walk, if one may end there.
    fn end(&self) -> Result<Arc<Dir>, PlaceError> {
        let top = self.top();
        if !self.root.may_end_in(&top.path) {
            return Err(self.escapes(OsStr::new(""), self.root.path()));
        }
        if top.through.len() == self.through.len() {
            return Ok(top);
        }
        // A link has led back to where the walk had been before.
        let error = |errno| PlaceError::system_error("open directory for", self.asked, errno);
        Ok(Arc::new(Dir {
            fd: sys::openat(&top, ".", sys::DIRECTORY, Mode::empty()).map_err(error)?,
            inode: top.inode,
            path: top.path.clone(),
            through: self.through.as_slice().into(),
        }))
    }

    /// Whether the directory that has been reached is the root of a build.
    fn is_in_exec_root(&self) -> bool {
        self.stack.len() == 1 && self.root.is_exec_root
    }

    fn push(&mut self, path: &Path) {
        let components = path.components().filter_map(|component| match component {
            Component::Normal(_) | Component::ParentDir => Some(component.as_os_str().to_owned()),
            _ => None,
        });
        let first = self.pending.len();
        self.pending.extend(components);
        self.pending[first..].reverse();
    }

    /// Goes on where a link in the present directory leads.
    fn turn(&mut self, link: &OsStr, target: &Path) -> Result<(), PlaceError> {
        self.through.push(self.top().path.join(link));
        let below = if target.is_absolute() {
            self.root.below(target)
        } else {
            Some(target)
        };
        let Some(below) = below.filter(|_| self.through.len() <= MAX_HOPS) else {
            return Err(self.escapes(link, target));
        };
        if target.is_absolute() {
            self.stack.truncate(1);
        }
        self.push(below);
        Ok(())
    }

    fn escapes(&self, link: &OsStr, target: &Path) -> PlaceError {
        // What was followed last has led here, if anything was.
        let last = self.through.last().filter(|_| self.stack.len() == 1);
        let link = last.map_or_else(|| self.top().path.join(link), Clone::clone);
        let kind = PlaceErrorKind::Escapes {
            link: link.display().to_string(),
            target: target.display().to_string(),
        };
        PlaceError::new("walk to", self.asked, kind)
    }

    /// Walks until `keep` components are left. False when a directory is missing and may not be made.
    fn descend(&mut self, keep: usize) -> Result<bool, PlaceError> {
        while self.pending.len() > keep {
            let Some(name) = self.pending.pop() else { break };
            if name == ".." {
                if self.stack.len() == 1 {
                    return Err(self.escapes(OsStr::new(".."), Path::new("..")));
                }
                self.stack.pop();
                continue;
            }
            if !self.enter(name)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Enters one component, whatever it is. False when it is missing and may not be made.
    fn enter(&mut self, name: OsString) -> Result<bool, PlaceError> {
        let here = self.top();
        let error = |operation, errno| PlaceError::system_error(operation, self.asked, errno);
        if self.is_in_exec_root() && name != BUILD_TREE {
            return Err(self.escapes(&name, &self.root.path().join(&name)));
        }
        // A component may change between the steps while others work here, but not forever.
        for _ in 0..100 {
            let fd = match open_component(here.as_fd(), &name) {
                Ok(fd) => fd,
                Err(Errno::NOENT) if self.permit.is_some() => {
                    self.make(&here, &name)?;
                    continue;
                }
                Err(Errno::NOENT) => return Ok(false),
                Err(errno) => return Err(error("open directory for", errno)),
            };
            let stat = fs::fstat(&fd).map_err(|e| error("stat directory for", e))?;
            match sys::file_type(&stat) {
                FileType::Directory if self.stack.len() > MAX_DEPTH => {
                    let kind = PlaceErrorKind::Conflict("its path is more than 256 directories deep");
                    return Err(PlaceError::new("walk to", self.asked, kind));
                }
                FileType::Directory => {
                    self.stack.push(Arc::new(Dir {
                        inode: sys::inode(&stat),
                        fd,
                        path: here.path.join(&name),
                        through: self.through.as_slice().into(),
                    }));
                    return Ok(true);
                }
                FileType::Symlink => {
                    let target =
                        sys::read_link(&fd, OsStr::new("")).map_err(|e| error("read link for", e))?;
                    if self.is_in_exec_root() || !self.root.is_exec_root && self.leads_out(&target) {
                        return Err(self.escapes(&name, &target));
                    }
                    if self.root.is_exec_root {
                        return self.turn(&name, &target).map(|()| true);
                    }
                    if self.permit.is_none() {
                        return Ok(false);
                    }
                    self.clear(&here, &name)?;
                }
                _ if self.permit.is_some() => self.clear(&here, &name)?,
                _ => return Err(error("open directory for", Errno::NOTDIR)),
            }
        }
        Err(error("open directory for", Errno::BUSY))
    }

    /// Whether a link's target in the present directory is not below the root, as far as its text says.
    fn leads_out(&self, target: &Path) -> bool {
        if target.is_absolute() && self.root.below(target).is_none() {
            return true;
        }
        let below = self.root.below(target);
        let start = if below.is_some() { 0 } else { self.stack.len() - 1 };
        let mut depth = Some(start);
        for component in below.unwrap_or(target).components() {
            depth = match component {
                Component::ParentDir => depth.and_then(|depth| depth.checked_sub(1)),
                Component::Normal(_) => depth.map(|depth| depth + 1),
                _ => depth,
            };
        }
        depth.is_none()
    }

    /// Removes what is in a directory's place.
    fn clear(&self, here: &Arc<Dir>, name: &OsStr) -> Result<(), PlaceError> {
        let error = |operation, errno| PlaceError::system_error(operation, self.asked, errno);
        let path = here.path.join(name);
        // What a link points to is not ours to remove.
        if !self.through.is_empty() {
            return Err(leaning::refused(&path));
        }
        let _changing = self.root.aliases.refuse(&path)?;
        let _open = Writable::open(&self.root.writable, here)
            .map_err(|e| error("open read-only directory for", e))?;
        match fs::unlinkat(here, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT | Errno::ISDIR) => Ok(()),
            Err(errno) => Err(error("replace a file by a directory for", errno)),
        }
    }

    fn make(&self, here: &Arc<Dir>, name: &OsStr) -> Result<(), PlaceError> {
        let is_in_root = self.stack.len() == 1;
        if is_in_root && !self.root.may_make(name) {
            // Another writer may have made it since it was looked for.
            if self.root.guard_build_tree(self.asked).is_ok() {
                return Ok(());
            }
            let kind = PlaceErrorKind::RootGone("its bazel-out was deleted");
            return Err(PlaceError::new("make directory for", self.asked, kind));
        }
        make_one(self.root, here, name)
            .map_err(|errno| PlaceError::system_error("make directory for", self.asked, errno))?;
        if is_in_root {
            self.root.adopt_build_tree()?;
        }
        Ok(())
    }
}

/// Opens one component without following it. A symlink is opened as itself.
fn open_component(dir: BorrowedFd<'_>, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    sys::openat(dir, name, flags, Mode::empty())
}

/// Makes one directory, with its mode whatever the umask. That it is there already is not an error.
fn make_one(root: &OutputRoot, dir: &Arc<Dir>, name: &OsStr) -> rustix::io::Result<()> {
    let open = Writable::open(&root.writable, dir)?;
    let mode = open.before().unwrap_or_else(|| root.modes.directory());
    match fs::mkdirat(dir, name, Mode::from_raw_mode(mode)) {
        Ok(()) => settle_dir_mode(dir.as_fd(), name, mode),
        Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Gives a directory that was just made its mode, if umask or a default ACL took some of it away.
pub(super) fn settle_dir_mode(dir: BorrowedFd<'_>, name: &OsStr, mode: u32) -> rustix::io::Result<()> {
    let Ok(fd) = sys::openat(dir, name, sys::DIRECTORY | OFlags::NOFOLLOW, Mode::empty()) else {
        return Ok(());
    };
    if fs::fstat(&fd)?.st_mode & 0o777 != mode {
        fs::chmodat(&fd, ".", Mode::from_raw_mode(mode), AtFlags::empty())?;
    }
    Ok(())
}
