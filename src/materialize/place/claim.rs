//! Which build of an exec root is the newest, when more than one daemon writes there.
//!
//! An [`Epoch`](super::Epoch) knows the builds of its own process. Another process, with a state directory of its own,
//! may follow the next build of the same root: `outhaul run` beside `outhaul serve`, or two users' daemons. So the
//! newest build's version is also in a small file in the output base, where everybody looks before publishing. Nobody
//! ever waits for somebody else's downloads: anyone who begins a build writes its version, waits for the few system
//! calls that others are in the middle of, and is alone from then on with what is older ending as superseded. Somebody
//! may be stuck in such a call, on a disk that stalls or because the process was stopped. That is not waited for:
//! anyone who begins learns of it, and checks its own outputs once more when the others are done.
//!
//! The file is `.outhaul-newest.<workspace>`: a magic number, the version, a hash of the invocation's id and a
//! checksum, 8 bytes each, followed by a text that says who wrote it. It outlives its writers, for a journal that is
//! taken up again may have older builds in it. Two daemons that follow the same build (one passes it on to the other)
//! both go on. A file that is not there, not ours, or makes no sense says nothing: then everybody may publish, as
//! verified and whole as ever.

use std::{
    ffi::OsStr,
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use parking_lot::{Mutex, RwLock};
use rustix::{
    fs::{FlockOperation, OFlags, flock},
    io::Errno,
};

use crate::{
    digest::{Digest, DigestFunction},
    open_files::patient,
};

pub(super) const NAME: &str = ".outhaul-newest.";
const MAGIC: [u8; 8] = *b"outhaul1";
const LEN: usize = 32;
/// The longest words that are read.
const MAX_WORDS: usize = 256;

/// How long a new build waits for those who are publishing. They need microseconds, unless they were stopped.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long somebody who publishes waits for the lock. Others have it for as long as it takes to see that they are alone.
const TURN: Duration = Duration::from_millis(10);

/// What the file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    version: u64,
    /// Of the invocation; 0 if there is none.
    build: u64,
}

impl Entry {
    fn encode(self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&self.version.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.build.to_le_bytes());
        let sum = first_bytes(&bytes[..24]);
        bytes[24..].copy_from_slice(&sum);
        bytes
    }

    fn decode(bytes: &[u8; LEN]) -> Option<Self> {
        let (body, sum) = bytes.split_last_chunk::<8>()?;
        let (version, build) = body.strip_prefix(&MAGIC)?.split_first_chunk::<8>()?;
        (first_bytes(body) == *sum).then_some(Self {
            version: u64::from_le_bytes(*version),
            build: u64::from_le_bytes(build.try_into().ok()?),
        })
    }

    fn is_same_build(self, other: Self) -> bool {
        self.build != 0 && self.build == other.build
    }
}

fn first_bytes(bytes: &[u8]) -> [u8; 8] {
    let mut first = [0; 8];
    let digest = Digest::of(DigestFunction::Blake3, bytes);
    if let Some(hash) = digest.hash().first_chunk() {
        first = *hash;
    }
    first
}

/// A number for an invocation's id.
fn build_of(invocation_id: &str) -> u64 {
    match invocation_id {
        "" => 0,
        id => u64::from_le_bytes(first_bytes(id.as_bytes())),
    }
}

/// The file as it is open now.
#[derive(Debug)]
struct Open {
    file: File,
    path: PathBuf,
    /// What this process has claimed.
    own: Entry,
    /// The same as in the file, as long as no other process has claimed anything.
    own_bytes: [u8; LEN],
    /// How many threads are publishing: the first of them locks the file, the last one lets it go.
    working: Mutex<usize>,
}

/// This process's part in one exec root.
#[derive(Debug)]
pub struct Claim {
    path: PathBuf,
    /// This process, in words.
    who: String,
    open: RwLock<Option<Arc<Open>>>,
    /// The version of another process's build that has been logged.
    announced: AtomicU64,
}

/// While it lives, no matter who begins a newer build elsewhere waits, for some time.
#[derive(Debug)]
pub(crate) struct Working {
    open: Arc<Open>,
    since: Instant,
}

/// What came of a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lock {
    Held,
    /// Somebody else has it.
    Busy,
    /// The file system has no locks.
    Unsupported,
}

impl Claim {
    /// For the exec root of this name in an output base. Nothing is read or written yet.
    pub(super) fn new(output_base: &Path, name: &OsStr, who: &str) -> Self {
        let mut file = std::ffi::OsString::from(NAME);
        file.push(name);
        Self {
            path: output_base.join(file),
            who: who.to_owned(),
            open: RwLock::default(),
            announced: AtomicU64::new(0),
        }
    }

    /// The newest version that any process has claimed; 0 if none has.
    pub(super) fn newest(&self) -> u64 {
        let file = patient(|| options().open(&self.path));
        file.ok()
            .filter(|file| is_ours(file).unwrap_or(false))
            .and_then(|file| read(&file))
            .map_or(0, |entry| entry.version)
    }

    /// Says that this build has begun, unless a newer one has. When this returns true, nothing older than the newest is
    /// being published by anybody, or will be. When it returns false, somebody is still in the middle of that: see
    /// [`is_alone`](Self::is_alone).
    pub(super) fn begin(&self, version: u64, invocation_id: &str) -> bool {
        let own = Entry {
            version,
            build: build_of(invocation_id),
        };
        match self.write(own) {
            Ok((file, alone)) => {
                let open = Arc::new(Open {
                    file,
                    path: self.path.clone(),
                    own,
                    own_bytes: own.encode(),
                    working: Mutex::default(),
                });
                *self.open.write() = Some(open);
                alone
            }
            Err(error) => {
                // The build goes on: every file is still verified, and put in place whole.
                tracing::info!(
                    file = %self.path.display(), %error,
                    "cannot detect other daemons that write into this output root"
                );
                *self.open.write() = None;
                true
            }
        }
    }

    /// Takes part without a build of its own, to remove files: what others begin from here on is seen, and they wait for
    /// what is under way. Returns the newest version that any process has claimed. Does nothing more where this process has
    /// claimed the root itself.
    pub(super) fn join(&self) -> io::Result<u64> {
        let mut open = self.open.write();
        if open.is_none() {
            let file = patient(|| options().create(true).truncate(false).open(&self.path))?;
            if !is_ours(&file)? {
                return Err(io::Error::other("it belongs to another user, or is not a file"));
            }
            let own = read(&file).unwrap_or(Entry { version: 0, build: 0 });
            *open = Some(Arc::new(Open {
                file,
                path: self.path.clone(),
                own,
                own_bytes: own.encode(),
                working: Mutex::default(),
            }));
        }
        drop(open);
        Ok(self.newest())
    }

    /// Whether every process that may not have seen the newest version has finished publishing.
    pub(super) fn is_alone(&self) -> bool {
        let open = self.open.read().clone();
        // Our own threads have the same lock.
        let working = open.as_ref().map(|open| open.working.lock());
        if working.is_some_and(|working| *working > 0) {
            return false;
        }
        patient(|| options().open(&self.path)).map_or(true, |file| is_free(&file, Duration::ZERO))
    }

    fn write(&self, own: Entry) -> io::Result<(File, bool)> {
        let file = patient(|| options().create(true).truncate(false).open(&self.path))?;
        if !is_ours(&file)? {
            return Err(io::Error::other("it belongs to another user, or is not a file"));
        }
        // Others may write at the same time. One after the other, where the file system has locks; else each looks
        // again, so that the highest version stays.
        let turn = self
            .path
            .parent()
            .and_then(|base| patient(|| File::open(base)).ok());
        let _turn = turn.filter(|base| lock(base, EXCLUSIVE, PATIENCE) == Lock::Held);
        let mut alone = true;
        for _ in 0..10 {
            match read(&file) {
                // Others follow the same build, or this process did: they may not have been alone either.
                Some(there) if there.is_same_build(own) => {
                    alone = is_free(&file, Duration::ZERO);
                    break;
                }
                Some(there) if there.version > own.version => break,
                Some(there) if there == own => break,
                _ => {}
            }
            file.write_all_at(&own.encode(), 0)?;
            let words = self.who.as_bytes();
            file.write_all_at(words, LEN as u64)?;
            file.set_len((LEN + words.len()) as u64)?;
            alone = is_free(&file, PATIENCE);
        }
        Ok((file, alone))
    }

    /// Whether no newer build has begun.
    pub(super) fn is_newest(&self, version: u64) -> bool {
        let open = self.open.read();
        let Some(open) = &*open else { return true };
        let mut bytes = [0; LEN];
        let is_unchanged = open.file.read_exact_at(&mut bytes, 0).is_ok() && bytes == open.own_bytes;
        if is_unchanged && version >= open.own.version {
            return true;
        }
        let Some(there) = read(&open.file) else {
            return true;
        };
        let is_own = version == open.own.version && there.is_same_build(open.own);
        if there.version <= version || is_own {
            return true;
        }
        if self.announced.swap(there.version, Ordering::Relaxed) != there.version {
            let mut words = [0; MAX_WORDS];
            // They may be just being written.
            let length = open.file.read_at(&mut words, LEN as u64).unwrap_or_default();
            let words = String::from_utf8_lossy(&words[..length]);
            tracing::info!(
                file = %self.path.display(),
                "another outhaul process, {words}, handles a newer build of this output root: leaving the \
                 outputs of older builds to it"
            );
        }
        false
    }

    /// Says that something is going to be published.
    pub(super) fn working(&self) -> Option<Working> {
        let open = self.open.read().clone()?;
        let mut working = open.working.lock();
        if *working == 0 {
            // Refused only while somebody who begins a build has it: then its version is there to be seen.
            lock(&open.file, FlockOperation::NonBlockingLockShared, TURN);
        }
        *working += 1;
        drop(working);
        let since = Instant::now();
        Some(Working { open, since })
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        let open = &self.open;
        // A process that has begun a newer build meanwhile knows that it is not alone.
        if self.since.elapsed() > PATIENCE
            && let Some(there) = read(&open.file)
            && there.version > open.own.version
            && !there.is_same_build(open.own)
        {
            tracing::error!(
                file = %open.path.display(),
                "placing files took {} s, and in the meantime another outhaul process started a newer build of \
                 the same output root: a file of the older build may have been written late. That process \
                 corrects it if it is still running; otherwise, build again",
                self.since.elapsed().as_secs()
            );
        }
        let mut working = open.working.lock();
        *working -= 1;
        if *working == 0 {
            let _ = flock(&open.file, FlockOperation::Unlock);
        }
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    options
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(flags.bits() as i32);
    options
}

/// Whether it is a file of this user's: what another user says ends no build of ours.
fn is_ours(file: &File) -> io::Result<bool> {
    let metadata = file.metadata()?;
    Ok(metadata.is_file() && metadata.uid() == rustix::process::geteuid().as_raw())
}

fn read(file: &File) -> Option<Entry> {
    let mut bytes = [0; LEN];
    // It may be just being written.
    for _ in 0..3 {
        if file.read_exact_at(&mut bytes, 0).is_ok()
            && let Some(entry) = Entry::decode(&bytes)
        {
            return Some(entry);
        }
    }
    None
}

const EXCLUSIVE: FlockOperation = FlockOperation::NonBlockingLockExclusive;

/// Whether nobody is in the middle of publishing who may not have seen what the file says now; if need be after some
/// time.
fn is_free(file: &File, patience: Duration) -> bool {
    match lock(file, EXCLUSIVE, patience) {
        Lock::Held => {
            let _ = flock(file, FlockOperation::Unlock);
            true
        }
        Lock::Busy => false,
        // There is nothing to wait for.
        Lock::Unsupported => true,
    }
}

/// Locks a file, unless another process holds it for longer than that. Closing the file releases the lock.
fn lock(file: &File, operation: FlockOperation, patience: Duration) -> Lock {
    let began = Instant::now();
    let mut pause = Duration::from_micros(50);
    loop {
        match flock(file, operation) {
            Err(Errno::WOULDBLOCK) => {}
            Err(Errno::INTR) => continue,
            Ok(()) => return Lock::Held,
            Err(_) => return Lock::Unsupported,
        }
        if began.elapsed() >= patience {
            return Lock::Busy;
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests;
