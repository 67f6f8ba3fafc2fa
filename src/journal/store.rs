//! The journal's directory: which streams it has, finished or not.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use parking_lot::Mutex;

use super::{
    cursor::Cursor,
    error::JournalError,
    file::{Records, read_head},
    format::Head,
    writer::{Recovered, Writer},
};
use crate::builds::StreamKey;

pub(super) const UNFINISHED: &str = "journal";
pub(super) const SETTLED: &str = "settled";
pub(super) const DAMAGED: &str = "damaged";

/// How the journal writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JournalOptions {
    /// Whether events are on the disk, not only with the operating system, before they are acknowledged.
    pub durable: bool,
    /// Bytes of one file, at most.
    pub most: u64,
}

impl Default for JournalOptions {
    fn default() -> Self {
        Self {
            durable: false,
            most: 4 << 30,
        }
    }
}

/// A directory of journal files. Cheap to clone. All calls block.
#[derive(Debug, Clone)]
pub struct Journal {
    dir: PathBuf,
    options: JournalOptions,
    /// Held while the process may write; `None` when opened for reading.
    lock: Option<Arc<File>>,
    pub(super) open: OpenFiles,
}

/// One stream's journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The file.
    pub path: PathBuf,
    /// The stream.
    pub key: StreamKey,
    /// When its first event came, in milliseconds since the epoch.
    pub created_ms: u64,
    /// When it was last written.
    pub modified: SystemTime,
    /// Bytes on disk.
    pub bytes: u64,
    /// Whether nothing is left to do for it.
    pub settled: bool,
}

impl Entry {
    /// Iterates the events.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn read(&self) -> Result<Records, JournalError> {
        match Records::open(&self.path) {
            // It was settled, or resumed, since it was listed.
            Err(JournalError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                Records::open(
                    &self
                        .path
                        .with_extension(if self.settled { UNFINISHED } else { SETTLED }),
                )
            }
            other => other,
        }
    }
}

impl Journal {
    /// Opens a directory for writing and reading, making it if need be. One process at a time.
    ///
    /// # Errors
    /// When it cannot be made or written, or another process has it.
    pub fn open(dir: &Path, options: JournalOptions) -> Result<Self, JournalError> {
        make_private(dir)?;
        fs::set_permissions(dir, Permissions::from_mode(0o700))
            .map_err(JournalError::io("set the mode of", dir))?;
        let path = dir.join("lock");
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(JournalError::io("open", &path))?;
        match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(JournalError::InUse { path: dir.to_owned() }),
            // Some network file systems have no locks; two daemons on one directory are then the user's to avoid.
            Err(e) => tracing::warn!(dir = %dir.display(), error = %e, "failed to lock the journal"),
        }
        // Earlier versions kept lifecycle calls there, with their headers, which are secrets as a rule.
        let _ = fs::remove_dir_all(dir.join("lifecycle"));
        Ok(Self {
            dir: dir.to_owned(),
            options,
            lock: Some(Arc::new(lock)),
            open: OpenFiles::default(),
        })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Looks into a directory that another process may be writing.
    pub fn view(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            options: JournalOptions::default(),
            lock: None,
            open: OpenFiles::default(),
        }
    }

    /// How much of a stream upstream has.
    pub(crate) fn cursor(&self, key: &StreamKey) -> Cursor {
        Cursor::of(&self.dir.join(file_stem(key)))
    }

    /// Whether there is a file of a stream.
    pub(crate) fn has(&self, key: &StreamKey) -> bool {
        let stem = self.dir.join(file_stem(key));
        [UNFINISHED, SETTLED]
            .iter()
            .any(|extension| stem.with_extension(extension).exists())
    }

    /// Opens or creates a stream's file, and says what it holds.
    pub(crate) fn stream(&self, key: &StreamKey) -> Result<(Writer, Recovered), JournalError> {
        if self.lock.is_none() {
            return Err(JournalError::ReadOnly {
                path: self.dir.clone(),
            });
        }
        make_private(&self.dir)?;
        let head = Head {
            key: key.clone(),
            created_ms: now_ms(),
        };
        let name = file_stem(key);
        let mark = self.open.mark(&name);
        Writer::open(&self.dir.join(name), &head, self.options, mark)
    }

    /// A stream's file, without its extension.
    ///
    /// # Errors
    /// When the journal was opened for reading only.
    pub(super) fn stem(&self, key: &StreamKey) -> Result<PathBuf, JournalError> {
        match self.lock {
            Some(_) => Ok(self.dir.join(file_stem(key))),
            None => Err(JournalError::ReadOnly {
                path: self.dir.clone(),
            }),
        }
    }

    /// Every readable journal, oldest first.
    ///
    /// # Errors
    /// When the directory cannot be read. Single files that cannot are left out.
    pub fn list(&self) -> Result<Vec<Entry>, JournalError> {
        let mut entries = Vec::new();
        for item in fs::read_dir(&self.dir).map_err(JournalError::io("list", &self.dir))? {
            let path = item.map_err(JournalError::io("list", &self.dir))?.path();
            let settled = match path.extension().and_then(OsStr::to_str) {
                Some(UNFINISHED) => false,
                Some(SETTLED) => true,
                _ => continue,
            };
            match entry(&path, settled) {
                Ok(entry) => entries.push(entry),
                Err(e) => tracing::debug!(error = %e, "skipped a journal file"),
            }
        }
        entries.sort_by(|a, b| (a.created_ms, &a.path).cmp(&(b.created_ms, &b.path)));
        Ok(entries)
    }

    /// The journals of streams that were not settled, oldest first: what a restart goes on from.
    ///
    /// # Errors
    /// As [`Self::list`].
    pub fn unfinished(&self) -> Result<Vec<Entry>, JournalError> {
        let mut entries = self.list()?;
        entries.retain(|e| !e.settled);
        Ok(entries)
    }

    /// The newest journal of an invocation.
    ///
    /// # Errors
    /// When there is no such entry, or the directory cannot be read.
    pub fn find(&self, invocation_id: &str) -> Result<Entry, JournalError> {
        let found = self
            .list()?
            .into_iter()
            .rfind(|e| e.key.invocation_id == invocation_id);
        found.ok_or_else(|| JournalError::Unknown {
            invocation_id: invocation_id.to_owned(),
        })
    }

    /// The journal of the newest stream with these ids: an invocation's id alone may have been used again.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn find_stream(&self, key: &StreamKey) -> Result<Entry, JournalError> {
        let found = self
            .list()?
            .into_iter()
            .filter(|e| e.key.has_ids_of(key))
            .max_by_key(|e| e.key.attempt);
        found.ok_or_else(|| JournalError::Unknown {
            invocation_id: key.invocation_id.clone(),
        })
    }

    /// Iterates the events of an invocation.
    ///
    /// # Errors
    /// As [`Self::find`], or when its file cannot be opened.
    pub fn read(&self, invocation_id: &str) -> Result<Records, JournalError> {
        self.find(invocation_id)?.read()
    }
}

fn make_private(dir: &Path) -> Result<(), JournalError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(JournalError::io("create", dir))
}

fn entry(path: &Path, settled: bool) -> Result<Entry, JournalError> {
    let file = File::open(path).map_err(JournalError::io("open", path))?;
    let metadata = file.metadata().map_err(JournalError::io("read", path))?;
    let (head, _) = read_head(&file, path)?;
    Ok(Entry {
        path: path.to_owned(),
        key: head.key,
        created_ms: head.created_ms,
        modified: metadata.modified().map_err(JournalError::io("read", path))?,
        bytes: metadata.len(),
        settled,
    })
}

/// A file name for ids that come from the network: what is harmless of the invocation id, so that a user finds it,
/// and a hash of both ids, so that no two streams share a file.
fn file_stem(key: &StreamKey) -> String {
    let mut stem: String = key
        .invocation_id
        .chars()
        .take(64)
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '-' {
                c
            } else {
                '_'
            }
        })
        .collect();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(key.build_id.len() as u64).to_le_bytes());
    hasher.update(key.build_id.as_bytes());
    hasher.update(key.invocation_id.as_bytes());
    if key.attempt > 0 {
        hasher.update(&key.attempt.to_le_bytes());
    }
    stem.push('-');
    stem.push_str(&hex::encode(&hasher.finalize().as_bytes()[..8]));
    stem
}

/// Milliseconds since the epoch.
pub(crate) fn now_ms() -> u64 {
    u64::try_from(crate::units::now_ms()).unwrap_or(0)
}

/// Which files have a writer, for retention.
#[derive(Debug, Clone, Default)]
pub(super) struct OpenFiles(Arc<Mutex<HashMap<String, usize>>>);

impl OpenFiles {
    fn mark(&self, stem: &str) -> OpenMark {
        let mut open = self.0.lock();
        *open.entry(stem.to_owned()).or_default() += 1;
        OpenMark {
            files: self.clone(),
            stem: stem.to_owned(),
        }
    }

    pub(super) fn contains(&self, path: &Path) -> bool {
        let open = self.0.lock();
        path.file_stem()
            .and_then(OsStr::to_str)
            .is_some_and(|stem| open.contains_key(stem))
    }
}

/// While it lives, a file has a writer.
#[derive(Debug)]
pub(super) struct OpenMark {
    files: OpenFiles,
    stem: String,
}

impl Drop for OpenMark {
    fn drop(&mut self) {
        let mut open = self.files.0.lock();
        if let Some(count) = open.get_mut(&self.stem) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.stem);
            }
        }
    }
}
