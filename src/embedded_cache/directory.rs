//! Blobs and action results as files: `KIND/FUNCTION/HH/HASH` below one directory.
//!
//! The files are all the state there is, so a cache started on the same directory has the same content.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use crate::{
    digest::{Digest, DigestFunction},
    removal::remove_all,
};

/// What a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A blob, named by its own digest.
    Blob,
    /// An encoded action result, named by its action's digest.
    Action,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Blob => "cas",
            Self::Action => "ac",
        }
    }
}

/// The directory of a cache.
#[derive(Debug)]
pub(super) struct Directory {
    root: PathBuf,
    next_temporary: AtomicU64,
}

impl Directory {
    /// Makes what is missing of the directory and drops what an earlier process left unfinished.
    pub(super) fn open(root: PathBuf) -> io::Result<Self> {
        let unfinished = root.join("tmp");
        remove_all(&unfinished)?;
        fs::create_dir_all(unfinished)?;
        Ok(Self {
            root,
            next_temporary: AtomicU64::new(0),
        })
    }

    fn path(&self, kind: Kind, digest: &Digest) -> PathBuf {
        let hash = digest.hash_hex();
        self.root
            .join(kind.name())
            .join(digest.function().name())
            .join(&hash[..2])
            .join(hash)
    }

    /// A new, empty file to be filled and handed to [`Self::publish`].
    pub(super) fn temporary(&self) -> io::Result<(PathBuf, File)> {
        let number = self.next_temporary.fetch_add(1, Ordering::Relaxed);
        let path = self.root.join("tmp").join(number.to_string());
        let file = File::options().write(true).create_new(true).open(&path)?;
        Ok((path, file))
    }

    /// Gives a filled temporary file its name.
    pub(super) fn publish(&self, temporary: &Path, kind: Kind, digest: &Digest) -> io::Result<()> {
        let path = self.path(kind, digest);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::rename(temporary, path)
    }

    pub(super) fn put(&self, kind: Kind, digest: &Digest, bytes: &[u8]) -> io::Result<()> {
        let (temporary, mut file) = self.temporary()?;
        let done = file
            .write_all(bytes)
            .and_then(|()| self.publish(&temporary, kind, digest));
        if done.is_err() {
            // Best effort: what stays is dropped by the next start.
            let _ = fs::remove_file(temporary);
        }
        done
    }

    /// The open file, unless it is missing or, for a blob, has another size than the digest says.
    pub(super) fn open_file(&self, kind: Kind, digest: &Digest) -> Option<File> {
        let file = File::open(self.path(kind, digest)).ok()?;
        let size = file.metadata().ok()?.len();
        (kind == Kind::Action || size == digest.size()).then_some(file)
    }

    pub(super) fn contains(&self, digest: &Digest) -> bool {
        fs::metadata(self.path(Kind::Blob, digest)).is_ok_and(|m| m.is_file() && m.len() == digest.size())
    }

    pub(super) fn remove(&self, kind: Kind, digest: &Digest) -> bool {
        fs::remove_file(self.path(kind, digest)).is_ok()
    }

    pub(super) fn clear(&self, kind: Kind) {
        for entry in self.files(kind) {
            let _ = fs::remove_file(entry.0);
        }
    }

    /// The digests of all blobs.
    pub(super) fn digests(&self) -> Vec<Digest> {
        self.files(Kind::Blob)
            .filter_map(|(path, function)| {
                let hash = path.file_name()?.to_str()?;
                let size = fs::metadata(&path).ok()?.len();
                Digest::from_hex(Some(function), hash, size).ok()
            })
            .collect()
    }

    fn files(&self, kind: Kind) -> impl Iterator<Item = (PathBuf, DigestFunction)> {
        let root = self.root.join(kind.name());
        DigestFunction::ALL.into_iter().flat_map(move |function| {
            list(&root.join(function.name()))
                .flat_map(|fan_out| list(&fan_out))
                .map(move |path| (path, function))
        })
    }
}

/// The entries of a directory; none if it cannot be read.
fn list(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
}
