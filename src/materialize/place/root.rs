//! An output root on disk, and whether it is still the one that was there when work began.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fmt,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::{Mutex, RwLock};
use rustix::{
    fs::{self, FileType, Mode, OFlags},
    io::Errno,
};

use super::{
    claim::Claim,
    error::{PlaceError, PlaceErrorKind},
    leaning::Aliases,
    modes::Modes,
    options::PlaceOptions,
    space::Space,
    sys::{self, Inode},
    temp::{self, TempDir, Unnamed},
    writable::WritableDirs,
};
use crate::{
    exec_path::{BUILD_TREE, ExecPath, is_reserved},
    output::Stamp,
};

/// The directory that staging keeps its markers in.
pub(crate) const MARKERS: &str = ".outhaul";

/// An exec root (or output directory) on disk, known by path, device and inode.
///
/// The descriptors of the root and of its `bazel-out` are held, so that their inode numbers cannot be given to
/// other directories while this lives: what has another number is another directory.
pub struct OutputRoot {
    fd: OwnedFd,
    /// As the build tool spells it.
    path: PathBuf,
    /// Without symlinks: the other spelling that absolute links may use.
    canonical: PathBuf,
    /// As builds in other mount namespaces spell it.
    spellings: RwLock<Vec<PathBuf>>,
    inode: Inode,
    pub(super) build_tree: RwLock<BuildTree>,
    /// Whether the build that has begun is running, and nothing but it and its user changes `bazel-out`.
    is_building: AtomicBool,
    /// Whether it is a build's; else it is a directory of the user's own.
    pub(super) is_exec_root: bool,
    /// Outputs that lie where links lead, and directories that are outputs.
    pub(super) aliases: Aliases,
    temp: Mutex<Option<Arc<TempDir>>>,
    /// Temp directories on other mounts below the root, by mount.
    beside: Mutex<Vec<(u64, Arc<TempDir>)>>,
    /// What its file system has.
    pub(super) space: Space,
    /// Directories in which no program with runfiles was found.
    pub(super) without_manifests: Mutex<WithoutManifests>,
    /// Read-only directories that are open for writing just now.
    pub(super) writable: Arc<WritableDirs>,
    /// The modes of its outputs.
    pub(super) modes: Modes,
    /// Whether files come out with the mode that they are created with, umask and default ACLs notwithstanding.
    pub(super) modes_hold: AtomicBool,
    no_openat2: AtomicBool,
}

/// Directories without manifests, with what they looked like and the names of the directories in them.
pub(super) type WithoutManifests = HashMap<String, (Stamp, Vec<String>)>;

/// What is known of `bazel-out`.
pub(super) enum BuildTree {
    /// A plain output directory: no build tool cleans it.
    Unguarded,
    /// It was there; files go into this one and no other.
    Held { inode: Inode, fd: OwnedFd },
    /// It was not there yet, and the build that has begun is going to make it, or we are. Or a link was in its place,
    /// which nothing is placed through: an output service had it, and Bazel puts a directory there before it executes
    /// anything.
    Fresh,
    /// It did not exist, and was not expected to.
    Gone,
}

impl OutputRoot {
    /// Opens the directory at an absolute path. With `create` it is a plain output directory: it is made if it is
    /// missing, and a `bazel-out` in it is a directory like any other. Without, it is an exec root, and its
    /// `bazel-out`, as it is now, is the only one that files will go into until [`begin_build`](Self::begin_build).
    ///
    /// # Errors
    /// When the path is not absolute, not there, not a directory, or cannot be made or opened.
    pub fn open(path: &Path, create: bool) -> Result<Self, PlaceError> {
        let error = |errno| PlaceError::system_error("open output root", path, errno);
        if !path.is_absolute() {
            let kind = PlaceErrorKind::NotAllowed("it is not an absolute path".to_owned());
            return Err(PlaceError::new("open output root", path, kind));
        }
        if create {
            std::fs::create_dir_all(path).map_err(|e| error(errno_of(&e)))?;
        }
        let fd = sys::open(path, sys::DIRECTORY, Mode::empty()).map_err(error)?;
        let inode = sys::inode(&fs::fstat(&fd).map_err(error)?);
        let canonical = path.canonicalize().map_err(|e| error(errno_of(&e)))?;
        let root = Self {
            fd,
            // Without a trailing slash or empty components, so that links can be matched against it.
            path: path.components().collect(),
            canonical,
            spellings: RwLock::default(),
            inode,
            build_tree: RwLock::new(if create {
                BuildTree::Unguarded
            } else {
                BuildTree::Gone
            }),
            is_building: AtomicBool::new(false),
            is_exec_root: !create,
            aliases: Aliases::default(),
            temp: Mutex::default(),
            beside: Mutex::default(),
            space: Space::default(),
            without_manifests: Mutex::default(),
            writable: Arc::default(),
            modes: Modes::default(),
            modes_hold: AtomicBool::new(false),
            no_openat2: AtomicBool::new(false),
        };
        if !create {
            root.begin_build(false)?;
        }
        Ok(root)
    }

    /// The path as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the open directory lies now, as the system says. Without `/proc`, where it was when it was opened.
    ///
    /// # Errors
    /// When it is not there any more.
    pub(super) fn place(&self) -> Result<PathBuf, PlaceError> {
        let gone = |errno| PlaceError::system_error("check output root", &self.path, errno);
        let link = format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        let place = std::fs::read_link(link).unwrap_or_else(|_| self.canonical.clone());
        // A deleted directory's name ends in " (deleted)", and one that is mounted over is not where it says.
        let there = fs::lstat(&place).map_err(gone)?;
        if sys::inode(&there) == self.inode {
            Ok(place)
        } else {
            Err(gone(Errno::STALE))
        }
    }

    /// The open directory's owner.
    pub(super) fn owner(&self) -> Result<u32, PlaceError> {
        fs::fstat(&self.fd)
            .map(|stat| stat.st_uid)
            .map_err(|errno| PlaceError::system_error("check output root", &self.path, errno))
    }

    /// Device number.
    pub const fn device(&self) -> u64 {
        self.inode.device
    }

    /// Inode number.
    pub const fn inode(&self) -> u64 {
        self.inode.number
    }

    /// Whether the path still leads to this directory.
    pub(crate) fn is_same(&self) -> bool {
        fs::stat(&self.path).is_ok_and(|stat| sys::inode(&stat) == self.inode)
    }

    /// A build has begun in this exec root: the `bazel-out` that is there now is the one that files go into. When
    /// there is none and `fresh` is true, it may be made, by the build or by us; otherwise everything below it is
    /// refused with [`PlaceErrorKind::RootGone`]. A fresh build is running until [`end_build`](Self::end_build): Bazel
    /// lets no `clean` and no other build in, so another `bazel-out` that appears in the meantime is the build's as well.
    /// Does nothing for plain output directories.
    ///
    /// # Errors
    /// When the root cannot be read.
    pub(crate) fn begin_build(&self, fresh: bool) -> Result<(), PlaceError> {
        self.aliases.clear();
        self.modes.forget();
        let mut build_tree = self.build_tree.write();
        if matches!(*build_tree, BuildTree::Unguarded) {
            return Ok(());
        }
        *build_tree = match self.hold_build_tree()? {
            Some(held) => held,
            None if fresh => BuildTree::Fresh,
            None => BuildTree::Gone,
        };
        self.is_building.store(fresh, Ordering::Relaxed);
        Ok(())
    }

    /// The build that has begun is over, or cannot be distinguished from one that is: the `bazel-out` that is there now, or else
    /// the first one that appears, is the last one that its files go into.
    ///
    /// # Errors
    /// When the root cannot be read.
    pub(crate) fn end_build(&self) -> Result<(), PlaceError> {
        let adopted = self.adopt_build_tree();
        self.is_building.store(false, Ordering::Relaxed);
        adopted.map(|_| ())
    }

    /// Looks at the modes of what the build tool has made, as long as they are not known.
    pub(super) fn learn_modes(&self) {
        if self.is_exec_root && self.modes.learn(&self.fd) {
            self.modes_hold.store(false, Ordering::Relaxed);
        }
    }

    /// The mode of a file at a path.
    pub(super) fn mode(&self, path: &ExecPath, options: PlaceOptions) -> u32 {
        if self.is_exec_root {
            self.modes.file(path, options)
        } else {
            options.mode()
        }
    }

    /// How much space is missing for a file of this size, with what is to stay free.
    #[cfg(feature = "mount")]
    pub(crate) fn missing_space(&self, options: PlaceOptions, bytes: u64) -> u64 {
        super::mark::Free::of(&self.fd).missing(options.space, bytes)
    }

    /// Whether a way may end in a directory at this path, links resolved.
    pub(super) fn may_end_in(&self, path: &Path) -> bool {
        !self.is_exec_root || path.starts_with(BUILD_TREE)
    }

    /// Refuses places that no output may have: in an exec root all but what is below `bazel-out`, in a directory of the
    /// user's own what we keep there ourselves. No link leads there either, see [`super::walk`].
    pub(super) fn admit(&self, path: &str) -> Result<(), PlaceError> {
        let (first, is_below) = path
            .split_once('/')
            .map_or((path, false), |(first, _)| (first, true));
        let refusal = if self.is_exec_root {
            (first != BUILD_TREE || !is_below).then_some("in an exec root, outputs must be in bazel-out")
        } else {
            is_reserved(first).then_some("this name is reserved for outhaul")
        };
        refusal.map_or(Ok(()), |why| {
            Err(PlaceError::new("place", path, PlaceErrorKind::Conflict(why)))
        })
    }

    /// Refuses when nothing may be put at the path, or the root, or for an exec root its `bazel-out`, is not the one that
    /// work began on.
    pub(super) fn guard(&self, path: &str) -> Result<(), PlaceError> {
        let gone = |what| Err(PlaceError::new("place", path, PlaceErrorKind::RootGone(what)));
        if !self.is_same() {
            return gone("it was deleted or replaced");
        }
        self.admit(path)?;
        self.guard_build_tree(path)
    }

    /// Refuses when an exec root's `bazel-out` is not the one that work began on.
    pub(super) fn guard_build_tree(&self, path: &str) -> Result<(), PlaceError> {
        let gone = |what| Err(PlaceError::new("place", path, PlaceErrorKind::RootGone(what)));
        if !self.is_exec_root {
            return Ok(());
        }
        // First the lock: what another writer makes between the look and the lock would seem to have been deleted.
        let build_tree = self.build_tree.read();
        let now = self
            .bazel_out()
            .map_err(|e| PlaceError::system_error("stat", BUILD_TREE, e))?;
        match (&*build_tree, now) {
            (BuildTree::Unguarded, _) | (BuildTree::Fresh, None) => return Ok(()),
            (BuildTree::Held { inode, .. }, Some(now)) if *inode == now => return Ok(()),
            (BuildTree::Fresh, Some(_)) => {}
            (BuildTree::Held { .. }, Some(_)) if self.is_building() => {}
            (_, None) => return gone("its bazel-out was deleted"),
            (_, Some(_)) => return gone("its bazel-out was replaced"),
        }
        drop(build_tree);
        if self.adopt_build_tree()? {
            Ok(())
        } else {
            gone("its bazel-out was replaced")
        }
    }

    /// A fresh build's `bazel-out` has appeared, or a running build's was replaced: from now on it is this one. False if a
    /// link is in the place of a directory, which stays the build's.
    pub(super) fn adopt_build_tree(&self) -> Result<bool, PlaceError> {
        let mut build_tree = self.build_tree.write();
        let may = match *build_tree {
            BuildTree::Fresh => true,
            BuildTree::Held { .. } => self.is_building(),
            BuildTree::Unguarded | BuildTree::Gone => false,
        };
        if may && let Some(held) = self.hold_build_tree()? {
            if let BuildTree::Held { inode: before, .. } = &*build_tree {
                match &held {
                    BuildTree::Held { inode, .. } if inode == before => {}
                    BuildTree::Held { .. } => tracing::warn!(
                        root = %self.path.display(),
                        "bazel-out was replaced while the build is running; files downloaded before that are not in \
                         the new one"
                    ),
                    _ => return Ok(false),
                }
            }
            *build_tree = held;
        }
        Ok(true)
    }

    fn is_building(&self) -> bool {
        self.is_building.load(Ordering::Relaxed)
    }

    /// Whether a directory of this name may be made in the root itself.
    pub(super) fn may_make(&self, name: &OsStr) -> bool {
        name != BUILD_TREE || matches!(*self.build_tree.read(), BuildTree::Unguarded | BuildTree::Fresh)
    }

    /// Says how builds in other mount namespaces spell the root: absolute links of theirs begin with that.
    pub(crate) fn spell(&self, spellings: Vec<PathBuf>) {
        *self.spellings.write() = spellings;
    }

    /// The components below the root that an absolute path stands for, by any spelling of the root.
    pub(super) fn below<'a>(&self, target: &'a Path) -> Option<&'a Path> {
        let by = |root: &Path| target.strip_prefix(root).ok();
        by(&self.path).or_else(|| by(&self.canonical)).or_else(|| {
            let spellings = self.spellings.read();
            spellings.iter().find_map(|root| by(root))
        })
    }

    /// This process's temp directory, made when it is first needed, and again after somebody deleted it.
    pub(super) fn temp(&self) -> Result<Arc<TempDir>, PlaceError> {
        let mut temp = self.temp.lock();
        if let Some(temp) = temp.as_ref().filter(|t| t.is_there()) {
            return Ok(Arc::clone(temp));
        }
        let made = Arc::new(TempDir::create(self)?);
        *temp = Some(Arc::clone(&made));
        Ok(made)
    }

    /// This process's temp directory on the mount that a directory below the root is on.
    pub(super) fn temp_beside(&self, dir: BorrowedFd<'_>) -> rustix::io::Result<Arc<TempDir>> {
        let mount = temp::mount(dir)?;
        let mut all = self.beside.lock();
        all.retain(|(_, temp)| temp.is_there());
        if let Some((_, temp)) = all.iter().find(|(of, _)| *of == mount) {
            return Ok(Arc::clone(temp));
        }
        let made = Arc::new(TempDir::create_beside(self, dir)?);
        all.push((mount, Arc::clone(&made)));
        Ok(made)
    }

    /// Lets go of this process's temp directories, which are removed with the last file in each. They are made again
    /// when something is placed after that.
    pub(crate) fn let_go(&self) {
        self.temp.lock().take();
        self.beside.lock().clear();
    }

    /// How unnamed files get their names here; tried out once, in the temp directory.
    pub(super) fn unnamed(&self) -> Result<Unnamed, PlaceError> {
        if let Some(temp) = &*self.temp.lock() {
            return Ok(temp.unnamed());
        }
        self.temp().map(|temp| temp.unnamed())
    }

    /// As on a file system without unnamed files.
    #[cfg(test)]
    pub(super) fn pretend_no_unnamed(&self) {
        let mut temp = TempDir::create(self).unwrap();
        temp.pretend_no_unnamed();
        *self.temp.lock() = Some(Arc::new(temp));
    }

    /// Removes what dead processes left in the temp directories of this root, and returns how many processes
    /// had left something. What a live one uses, this one included, stays.
    ///
    /// # Errors
    /// When a temp directory cannot be read, or something in it cannot be removed.
    pub(crate) fn sweep(&self) -> Result<usize, PlaceError> {
        super::temp::sweep(self)
    }

    /// Why a file for this root need not be fetched just now: one like it was refused a moment ago, for want of space.
    pub fn refuses(&self, path: &ExecPath, is_optional: bool) -> Option<PlaceError> {
        self.space.refuses(is_optional, path.as_str())
    }

    /// The path without symlinks.
    pub(super) fn canonical(&self) -> &Path {
        &self.canonical
    }

    /// The output base, when this is `<output base>/execroot/<workspace>`.
    pub fn output_base(&self) -> Option<&Path> {
        let parent = self.canonical.parent()?;
        parent.ends_with("execroot").then(|| parent.parent()).flatten()
    }

    /// What tells other processes of this root's builds; `None` where there is no output base to do so. `who` is this
    /// process in words.
    pub(crate) fn claim(&self, who: &str) -> Option<Claim> {
        Some(Claim::new(self.output_base()?, self.canonical.file_name()?, who))
    }

    /// Whether `openat2` is to be tried.
    pub(super) fn has_openat2(&self) -> bool {
        !self.no_openat2.load(Ordering::Relaxed)
    }

    /// Remembers that this kernel, or its sandbox, has no `openat2`.
    pub(super) fn forget_openat2(&self) {
        self.no_openat2.store(true, Ordering::Relaxed);
    }

    fn bazel_out(&self) -> rustix::io::Result<Option<Inode>> {
        Ok(sys::lstat(&self.fd, OsStr::new(BUILD_TREE))?.map(|s| sys::inode(&s)))
    }

    /// Opens the `bazel-out` that is there now. A link is not held.
    pub(super) fn hold_build_tree(&self) -> Result<Option<BuildTree>, PlaceError> {
        let error = |errno| PlaceError::system_error("open", BUILD_TREE, errno);
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match sys::openat(&self.fd, BUILD_TREE, flags, Mode::empty()) {
            Ok(fd) => {
                let stat = fs::fstat(&fd).map_err(error)?;
                let inode = sys::inode(&stat);
                Ok(Some(match sys::file_type(&stat) {
                    FileType::Symlink => BuildTree::Fresh,
                    _ => BuildTree::Held { inode, fd },
                }))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(error(errno)),
        }
    }
}

impl AsFd for OutputRoot {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl fmt::Debug for OutputRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OutputRoot")
            .field("path", &self.path)
            .field("inode", &self.inode)
            .finish_non_exhaustive()
    }
}

/// The error number in an error of the standard library's.
pub(super) fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests;
