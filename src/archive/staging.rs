//! The directory that archives are unpacked into.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    ffi::{OsStr, OsString},
    fs::{canonicalize, create_dir_all},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

use parking_lot::Mutex;
use rustix::{
    fs::{self, AtFlags, CWD, Mode, OFlags, RenameFlags},
    io::Errno,
};

use super::{ArchiveError, Existing, Listable, Listed, StagingOptions, budget::Listing, error::place};
use crate::{
    exec_path::ExecPath,
    materialize::place::{TempDir, temp_in},
    open_files::{is_lacking, patient},
    output::OutputContent,
};

/// Flags for a directory that is only a place.
pub(super) const DIRECTORY: OFlags = OFlags::PATH
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// The name of what will be the target, in the temp directory.
pub(super) const TREE: &str = "tree";

/// A directory of our own on the target's file system, gone when dropped. Shared by the threads that unpack.
#[derive(Debug)]
pub(crate) struct Staging {
    pub(super) options: StagingOptions,
    pub(super) target: Target,
    /// What is unpacked.
    pub(super) tree: OwnedFd,
    /// It has the tree, and files that have no place in it yet.
    pub(super) temp: TempDir,
    pub(super) index: Mutex<Index>,
    /// Device and inode number of the directory that the temp directory is in.
    beside: (u64, u64),
}

/// Where it is to be.
#[derive(Debug)]
pub(super) struct Target {
    /// Links resolved.
    pub(super) path: PathBuf,
    /// The directory that it is in, and its name there.
    pub(super) parent: OwnedFd,
    pub(super) name: OsString,
}

/// What a path in the tree is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    File,
    Symlink,
}

/// What has a path in the tree.
#[derive(Debug, Clone, Copy)]
pub(super) struct Taken {
    pub(super) kind: Kind,
    /// Of the archive that it is from.
    pub(super) order: u32,
}

/// Paths that are taken. By their hashes: there may be millions.
#[derive(Debug, Default)]
pub(super) struct Index {
    taken: HashMap<[u8; 16], Taken>,
    /// Files and links that another archive has as well, with the same content.
    shared: HashSet<([u8; 16], u32)>,
    names: BTreeMap<u32, String>,
    /// Archives of which only a part was unpacked so far.
    unfinished: BTreeSet<u32>,
    /// What is known of the paths, if that is asked for: content, archive and inode number.
    listed: BTreeMap<String, (OutputContent, u32, u64)>,
    /// Other archives that have a listed path as well, with the same content.
    also: BTreeSet<(String, u32)>,
    /// Counts what is listed.
    listing: Listing,
}

fn key(path: &str) -> [u8; 16] {
    let mut key = [0; 16];
    key.copy_from_slice(&blake3::hash(path.as_bytes()).as_bytes()[..16]);
    key
}

impl Index {
    pub(super) fn get(&self, path: &str) -> Option<Taken> {
        self.taken.get(&key(path)).copied()
    }

    pub(super) fn take(&mut self, path: &str, taken: Taken) {
        self.taken.insert(key(path), taken);
    }

    /// An archive has the same file or link.
    pub(super) fn share(&mut self, path: &str, order: u32) {
        self.shared.insert((key(path), order));
    }

    /// An archive has the same as what is listed for a path.
    pub(super) fn list_also(&mut self, path: &str, order: u32) -> Result<(), ArchiveError> {
        let is_other = self.listed.get(path).is_some_and(|(_, first, _)| *first != order);
        if is_other && self.also.insert((path.to_owned(), order)) {
            let name = self.names.get(&order).map_or("", String::as_str);
            self.listing.entry(name)?;
        }
        Ok(())
    }

    /// What a path is in this archive.
    pub(super) fn kind_in(&self, path: &str, order: u32) -> Option<Kind> {
        let is_own = |taken: &Taken| taken.order == order || self.shared.contains(&(key(path), order));
        self.get(path).filter(is_own).map(|taken| taken.kind)
    }

    /// Notes what a path is.
    pub(super) fn list(
        &mut self,
        path: &str,
        content: OutputContent,
        order: u32,
        inode: u64,
    ) -> Result<(), ArchiveError> {
        if self
            .listed
            .insert(path.to_owned(), (content, order, inode))
            .is_some()
        {
            // What was there is replaced.
            for order in self.others(path).collect::<Vec<_>>() {
                self.also.remove(&(path.to_owned(), order));
            }
        }
        let name = self.names.get(&order).map_or("", String::as_str);
        self.listing.entry(name)
    }

    /// The archives that have a listed path as well.
    fn others(&self, path: &str) -> impl Iterator<Item = u32> {
        let range = (path.to_owned(), 0)..=(path.to_owned(), u32::MAX);
        self.also.range(range).map(|(_, order)| *order)
    }

    /// What a path is, if it is listed.
    pub(super) fn content(&self, path: &str) -> Option<OutputContent> {
        self.listed.get(path).map(|(content, ..)| content.clone())
    }

    /// What an archive is called.
    pub(super) fn name(&self, order: u32) -> String {
        self.names.get(&order).cloned().unwrap_or_default()
    }

    /// An archive begins.
    pub(super) fn begin(&mut self, order: u32, name: &str) {
        self.names.insert(order, name.to_owned());
        self.unfinished.insert(order);
    }

    /// All of an archive was unpacked.
    pub(super) fn finish(&mut self, order: u32) {
        self.unfinished.remove(&order);
    }

    /// An archive of which a part was unpacked, and then no more.
    pub(super) fn unfinished(&self) -> Option<String> {
        self.unfinished.first().map(|order| self.name(*order))
    }

    /// How many files and links there are.
    pub(super) fn files(&self) -> u64 {
        let is_file = |taken: &&Taken| taken.kind != Kind::Directory;
        self.taken.values().filter(is_file).count() as u64
    }
}

impl Staging {
    /// Makes the directory, and the target's parents where they are missing.
    ///
    /// # Errors
    /// When the target cannot be a directory, or nothing can be written beside it.
    pub(crate) fn open(target: &Path, options: StagingOptions) -> Result<Self, ArchiveError> {
        let (target, exists) = Target::find(target, options.existing)?;
        let merges = exists && options.existing == Existing::Merge;
        // On the file system of what is renamed into.
        let beside = if merges {
            &target.path
        } else {
            target.parent_path()
        };
        let fd = open_directory(beside).map_err(place("open", beside))?;
        let stat = fs::fstat(&fd).map_err(place("open", beside))?;
        let temp = temp_in(&fd, beside)?;
        let error = || place("create a directory in", beside);
        let mode = Mode::from_raw_mode(0o777);
        fs::mkdirat(&temp, TREE, mode).map_err(error())?;
        let tree = patient(|| fs::openat(&temp, TREE, DIRECTORY, Mode::empty())).map_err(error())?;
        Ok(Self {
            options,
            target,
            tree,
            temp,
            index: Mutex::default(),
            beside: (stat.st_dev, stat.st_ino),
        })
    }

    /// From now on, what is listed counts together with what others list that share this.
    pub(crate) fn share(&self, listable: Listable) {
        self.index.lock().listing = Listing::new(listable);
    }

    /// What was unpacked so far, in the order of the paths, and once for each archive that has a path; nothing without
    /// [`StagingOptions::lists`].
    pub(crate) fn listed(&self) -> Vec<Listed> {
        let index = self.index.lock();
        let is_leaf = |path: &str| {
            let below = format!("{path}/");
            let next = index.listed.range(below.clone()..).next();
            next.is_none_or(|(next, _)| !next.starts_with(&below))
        };
        let mut listed = Vec::new();
        for (name, (content, first, inode)) in &index.listed {
            if *content == OutputContent::Directory && !is_leaf(name) {
                continue;
            }
            // It was one before.
            let Ok(path) = ExecPath::new(name) else {
                continue;
            };
            let orders = std::iter::once(*first).chain(index.others(name));
            listed.extend(orders.map(|order| Listed {
                path: path.clone(),
                content: content.clone(),
                order,
                inode: *inode,
            }));
        }
        listed
    }

    /// Takes a whole file right into the target: what `publish` puts under a name in the directory that it is given.
    ///
    /// # Errors
    /// When another archive has that name, or the file cannot be put there.
    pub(crate) fn adopt(
        &self,
        archive: (&str, u32),
        name: &ExecPath,
        content: OutputContent,
        publish: impl FnOnce(OwnedFd, &str) -> io::Result<u64>,
    ) -> Result<(), ArchiveError> {
        let (shown, order) = archive;
        let error = |source| ArchiveError::Place {
            operation: "create",
            path: name.as_path().to_owned(),
            source,
        };
        let mut index = self.index.lock();
        if let Some(there) = index.get(name.as_str()) {
            return Err(ArchiveError::Conflict {
                path: name.to_string(),
                first: index.name(there.order),
                second: shown.to_owned(),
                reason: "they have different content",
                on_conflict: None,
            });
        }
        let directory = self.directory("").map_err(|e| error(e.into()))?;
        let inode = publish(directory, name.as_str()).map_err(error)?;
        let kind = Kind::File;
        index.names.insert(order, shown.to_owned());
        index.take(name.as_str(), Taken { kind, order });
        index.list(name.as_str(), content, order, inode)
    }

    /// Whether it was made in the directory with this descriptor, whatever has its path now.
    pub(crate) fn is_beside(&self, directory: &OwnedFd) -> bool {
        let identity = |stat: fs::Stat| (stat.st_dev, stat.st_ino);
        let other = fs::fstat(directory).map(identity);
        other.is_ok_and(|other| other == self.beside)
    }

    /// Opens the directory for files that are gone with it.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn room(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(patient(|| fs::openat(&self.temp, ".", flags, Mode::empty()))?)
    }

    /// Opens a directory of the tree. No link is followed.
    pub(super) fn directory(&self, path: &str) -> rustix::io::Result<OwnedFd> {
        descend(&self.tree, path)
    }
}

/// Opens a directory below another, step by step: no link is followed, and one descriptor is held.
pub(super) fn descend(from: &OwnedFd, path: &str) -> rustix::io::Result<OwnedFd> {
    let mut here: Option<OwnedFd> = None;
    for name in path.split('/').filter(|name| !name.is_empty()) {
        let at = here.as_ref().unwrap_or(from).as_fd();
        here = Some(patient(|| fs::openat(at, name, DIRECTORY, Mode::empty()))?);
    }
    match here {
        Some(here) => Ok(here),
        None => patient(|| fs::openat(from, ".", DIRECTORY, Mode::empty())),
    }
}

/// Renames what is in a temp directory to a name that nothing has.
pub(super) fn rename_new(
    temp: &TempDir,
    from: &OsStr,
    dir: &OwnedFd,
    name: &OsStr,
) -> rustix::io::Result<()> {
    match fs::renameat_with(temp, from, dir, name, RenameFlags::NOREPLACE) {
        // NFS and others have no such rename; this one leaves room for a race with others, who are not expected here.
        Err(errno) if is_lacking(errno) => match fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Err(Errno::EXIST),
            Err(Errno::NOENT) => fs::renameat(temp, from, dir, name),
            Err(errno) => Err(errno),
        },
        other => other,
    }
}

/// The directory that a path in the tree is in, and its last component.
pub(super) fn split(path: &ExecPath) -> (&str, &str) {
    (path.parent().unwrap_or_default(), path.file_name())
}

pub(super) fn open_directory(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    patient(|| fs::openat(CWD, path, flags, Mode::empty()))
}

impl Target {
    /// Finds out where a target is, and whether it exists.
    fn find(path: &Path, existing: Existing) -> Result<(Self, bool), ArchiveError> {
        let failed = |operation, source| ArchiveError::Place {
            operation,
            path: path.to_owned(),
            source,
        };
        let in_the_way = |reason| ArchiveError::InTheWay {
            path: path.to_owned(),
            reason,
        };
        let mut names = path.as_os_str().as_bytes().rsplit(|byte| *byte == b'/');
        let last = names.find(|name| !name.is_empty());
        if existing == Existing::Replace && matches!(last, Some(b"." | b"..")) {
            return Err(in_the_way("it has no name of its own"));
        }
        let (whole, exists) = match std::fs::metadata(path) {
            Ok(meta) if meta.is_dir() => (canonicalize(path).map_err(|e| failed("find", e))?, true),
            Ok(_) => return Err(in_the_way("it is not a directory")),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if path.is_symlink() {
                    return Err(in_the_way("it is a symlink that leads nowhere"));
                }
                let name = path
                    .file_name()
                    .ok_or_else(|| in_the_way("it has no name of its own"))?;
                let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
                let parent = parent.unwrap_or(Path::new("."));
                create_dir_all(parent).map_err(|e| failed("create the parent directory of", e))?;
                let parent = canonicalize(parent).map_err(|e| failed("find", e))?;
                (parent.join(name), false)
            }
            Err(e) => return Err(failed("find", e)),
        };
        let (Some(parent), Some(name)) = (whole.parent(), whole.file_name()) else {
            return Err(in_the_way("it is the root directory"));
        };
        let parent = open_directory(parent).map_err(place("open", parent))?;
        let name = name.to_owned();
        let path = whole;
        Ok((Self { path, parent, name }, exists))
    }

    pub(super) fn parent_path(&self) -> &Path {
        self.path.parent().unwrap_or(&self.path)
    }
}
