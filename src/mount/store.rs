//! Blobs in a directory of this machine, by digest: verified, bounded, fetched when somebody needs them.
//!
//! Files come into the directory as outputs come into a tree, by the [`Materializer`]: verified first, then renamed. What is
//! found there at the start is verified before it is used.

use std::{
    collections::HashMap,
    fs::{self, DirBuilder, File, Metadata},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rustix::{
    fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, flock, openat, renameat, statat, unlinkat},
    io::Errno,
};
use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{sleep, timeout},
};

use super::{
    error::{MountError, ReadError},
    shelf::{Kept, Shelf, cost},
};
use crate::{
    digest::{Digest, DigestFunction},
    exec_path::ExecPath,
    materialize::{
        MaterializeOptions, Materializer, Outcome, Root, Session, Want,
        place::{Epoch, OutputRoot, PlaceOptions},
    },
    metrics::Metrics,
    output::{Class, OutputContent, Stamp},
    remote::{Attribution, Copy, LocalFirst, Nowhere},
    sources::SourceCache,
};

/// How long an output tree may take to tell whether it has a file.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a reader waits for room in the store.
const ROOM: Duration = Duration::from_secs(1);

/// How often a file that somebody has changed is fetched again for one reader.
const ATTEMPTS: usize = 3;

/// How long a refusal for want of space is remembered where files are placed, and a little more.
const REFUSED: Duration = Duration::from_millis(300);

/// The file that tells that the store is in use.
const LOCK: &str = "lock";

/// How the names of files begin that are being removed.
const LEAVING: &str = "leaving-";

/// A blob, and where its bytes are.
#[derive(Clone)]
pub(super) struct Blob {
    pub(super) digest: Digest,
    /// The caches that the build used, or why there are none.
    pub(super) cache: Result<SourceCache, String>,
    /// The output tree in which the file may lie, and its place there.
    pub(super) tree: Arc<Path>,
    pub(super) path: ExecPath,
    /// Where the mount is.
    pub(super) mount: Arc<Path>,
    pub(super) attribution: Arc<Attribution>,
}

impl Blob {
    /// The file in the output tree, if it looks as if it had these bytes. It may be a link to a source, which no cache need
    /// have, but not to a file of the mount, which would wait for itself. Blocks.
    fn copy(&self) -> Option<Copy> {
        let path = self.tree.join(self.path.as_path());
        if path.is_symlink() && path.canonicalize().ok()?.starts_with(&self.mount) {
            return None;
        }
        let found = path.metadata().ok()?;
        let is_it = found.is_file() && found.len() == self.digest.size() && self.tree.is_absolute();
        is_it.then(|| Copy {
            root: self.tree.clone(),
            path: self.path.clone(),
            stamp: Stamp {
                size: found.len(),
                mtime_ns: mtime_ns(&found),
                inode: found.ino(),
                device: found.dev(),
                ..Stamp::default()
            },
        })
    }

    /// Whether the output tree seems to have it.
    pub(super) async fn is_in_tree(&self) -> bool {
        self.copy_in_time().await.is_some()
    }

    async fn copy_in_time(&self) -> Option<Copy> {
        let blob = self.clone();
        let looked = timeout(PATIENCE, spawn_blocking(move || blob.copy())).await;
        looked.ok()?.ok()?
    }
}

/// An open file of the store. It stays there as long as this is held.
pub(super) struct Opened {
    pub(super) file: File,
    _hold: Hold,
}

/// A blob that is needed now.
struct Hold {
    store: Arc<Store>,
    digest: Digest,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.store.state.lock().shelf.release(&self.digest);
    }
}

/// How a download ends, told to all who wait for it.
type Ending = watch::Receiver<Option<Result<(), ReadError>>>;

/// What is being fetched.
struct Coming {
    /// Distinguishes it from others of the same blob.
    number: u64,
    ending: Ending,
    /// Why it was begun.
    class: Class,
    /// Why the first of those was begun that are one request to the cache.
    first: Class,
}

/// A download that somebody waits for.
struct Begun {
    _hold: Hold,
    number: u64,
    ending: Ending,
    /// Why it was begun.
    class: Class,
}

struct State {
    shelf: Shelf,
    /// What is being fetched. Of one blob it is the last that was begun, for the most urgent reason.
    coming: HashMap<Digest, Coming>,
    /// How many downloads were begun.
    begun: u64,
    /// When files made way on a full disk last.
    made_way: Option<Instant>,
    /// How many files were put aside to be removed.
    left: u64,
}

impl State {
    /// Notes that a download is over; true if it was the last that was begun of its blob.
    fn is_over(&mut self, digest: &Digest, number: u64) -> bool {
        let coming = self.coming.get(digest);
        let is_last = coming.is_some_and(|coming| coming.number == number);
        if is_last {
            self.coming.remove(digest);
        }
        is_last
    }
}

/// Why a blob has not come.
struct Missed {
    error: ReadError,
    /// Whether the file that may be in the store was read, and does not have the right bytes.
    is_wrong: bool,
}

impl From<ReadError> for Missed {
    /// Says nothing about the bytes.
    fn from(error: ReadError) -> Self {
        Self {
            error,
            is_wrong: false,
        }
    }
}

/// The store.
pub(super) struct Store {
    directory: PathBuf,
    /// The directory itself: its path may lead elsewhere by now, even to the mount that waits for this store.
    handle: OwnedFd,
    state: Mutex<State>,
    root: Arc<Root>,
    /// None when the process is about to end.
    materializer: Mutex<Option<Materializer>>,
    place: PlaceOptions,
    _lock: File,
}

impl Store {
    /// Opens the store in a directory, which is made if it is missing, for this many bytes. Blocks.
    ///
    /// # Errors
    /// When the directory cannot be used, or another process uses it.
    pub(super) fn open(
        directory: &Path,
        bound: u64,
        options: MaterializeOptions,
    ) -> Result<Arc<Self>, MountError> {
        let failed = |reason: String| MountError::Store {
            at: directory.to_owned(),
            reason,
        };
        let io = |error: io::Error| failed(error.to_string());
        let mut builder = DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(io)?;
        let about = fs::metadata(directory).map_err(io)?;
        let is_ours = about.uid() == rustix::process::geteuid().as_raw();
        if !is_ours || about.mode() & 0o022 != 0 {
            return Err(failed(
                "it must belong to you, and others must not be able to write to it (chmod go-w), because its files are trusted"
                    .to_owned(),
            ));
        }
        let mut open = File::options();
        open.write(true).create(true).truncate(false).mode(0o600);
        let lock = open.open(directory.join(LOCK)).map_err(io)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            Errno::WOULDBLOCK => failed(
                "another `outhaul mount` uses it, and already shows all builds; for another mount, choose another directory with --store-dir"
                    .to_owned(),
            ),
            error => failed(error.to_string()),
        })?;
        let place = OutputRoot::open(directory, true).map_err(|e| failed(e.to_string()))?;
        // What a process has left that was killed counts for no one.
        let _ = place.sweep();
        for entry in fs::read_dir(directory).map_err(io)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(LEAVING) {
                let _ = fs::remove_file(entry.path());
            }
        }
        let handle = File::open(directory).map_err(io)?.into();
        let mut shelf = Shelf::new(bound);
        for digest in found(directory) {
            for evicted in shelf.found(digest) {
                let _ = fs::remove_file(directory.join(path_of(&evicted)));
            }
        }
        let place_options = options.place;
        let materializer = Materializer::start(options, Metrics::default()).map_err(io)?;
        Ok(Arc::new(Self {
            directory: directory.to_owned(),
            handle,
            state: Mutex::new(State {
                shelf,
                coming: HashMap::new(),
                begun: 0,
                made_way: None,
                left: 0,
            }),
            root: Arc::new(Root {
                id: 0,
                place: Arc::new(place),
                epoch: Epoch::new(),
            }),
            place: place_options,
            materializer: Mutex::new(Some(materializer)),
            _lock: lock,
        }))
    }

    /// Bytes that it has, of how many.
    pub(super) fn filled(&self) -> (u64, u64) {
        self.state.lock().shelf.filled()
    }

    /// Where it is.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether a blob is there, or on its way.
    pub(super) fn has(&self, digest: &Digest) -> bool {
        let state = self.state.lock();
        state.coming.contains_key(digest) || state.shelf.kept(digest) != Kept::Nothing
    }

    /// Fetches nothing more, and removes its temporary files. To be called at the end.
    pub(super) async fn close(&self) {
        let materializer = self.materializer.lock().take();
        if let Some(materializer) = materializer {
            // What is under way is given up with the process.
            let _ = timeout(PATIENCE, materializer.close()).await;
        }
    }

    /// The file of a blob that is there. Opens it, which is all that blocks.
    pub(super) fn ready(self: &Arc<Self>, digest: &Digest) -> Option<Opened> {
        let (hold, inode, changed) = {
            let mut state = self.state.lock();
            let Kept::Whole { inode, ctime_ns } = state.shelf.kept(digest) else {
                return None;
            };
            state.shelf.hold(digest)?;
            (self.holding(digest), inode, ctime_ns)
        };
        // A fifo in its place must not block.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = openat(&self.handle, path_of(digest), flags, Mode::empty()).map(File::from);
        let is_it = |now: &Metadata| {
            (
                now.is_file(),
                now.len(),
                now.ino(),
                ns(now.ctime(), now.ctime_nsec()),
            ) == (true, digest.size(), inode, changed)
        };
        match file {
            Ok(file) if file.metadata().is_ok_and(|now| is_it(&now)) => Some(Opened { file, _hold: hold }),
            // Somebody has changed or removed it: its bytes tell what is to be done.
            Ok(_) | Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => {
                self.state.lock().shelf.set(digest, Kept::Found);
                None
            }
            // Such as too many open files: nothing is known of it.
            Err(_) => None,
        }
    }

    /// The file of a blob, as soon as it is there.
    ///
    /// # Errors
    /// When it cannot be fetched, or there is no room for it.
    pub(super) async fn bring(self: &Arc<Self>, blob: &Blob, class: Class) -> Result<Opened, ReadError> {
        for _ in 0..ATTEMPTS {
            if let Some(opened) = self.ready(&blob.digest) {
                return Ok(opened);
            }
            let mut begun = self.begin_in_time(blob, class).await?;
            let ended = begun.ending.wait_for(Option::is_some).await;
            match ended.map(|end| (*end).clone()) {
                Ok(Some(Ok(()))) => {
                    if let Some(opened) = self.ready(&blob.digest) {
                        return Ok(opened);
                    }
                }
                // For what nobody waits for, nothing makes way.
                Ok(Some(Err(_))) if class > begun.class => {}
                Ok(Some(Err(error))) => return Err(error),
                Ok(None) | Err(_) => {
                    self.state.lock().is_over(&blob.digest, begun.number);
                    return Err(ReadError::Ending);
                }
            }
        }
        Err(ReadError::Lost("its file in the store keeps changing".to_owned()))
    }

    /// As [`Self::begin`]. For a reader, it waits a moment for room: the kernel tells a little later that a file was closed.
    async fn begin_in_time(self: &Arc<Self>, blob: &Blob, class: Class) -> Result<Begun, ReadError> {
        let until = Instant::now() + ROOM;
        loop {
            match self.begin(blob, class) {
                Err(ReadError::Full { size, bound })
                    if size <= bound && class == Class::Required && Instant::now() < until =>
                {
                    sleep(ROOM / 20).await;
                }
                begun => return begun,
            }
        }
    }

    /// Begins to fetch a blob, unless somebody has for a reason as urgent. It goes on if the caller gives up.
    fn begin(self: &Arc<Self>, blob: &Blob, class: Class) -> Result<Begun, ReadError> {
        let digest = &blob.digest;
        let mut state = self.state.lock();
        let Some(evicted) = state.shelf.hold(digest) else {
            let (_, bound) = state.shelf.filled();
            let size = digest.size();
            return Err(ReadError::Full { size, bound });
        };
        // Before the lock is free: it could be fetched again already.
        let leaving = self.put_aside(&mut state, &evicted);
        let hold = self.holding(digest);
        if let Some(coming) = state.coming.get(digest).filter(|coming| coming.class >= class) {
            return Ok(Begun {
                _hold: hold,
                number: coming.number,
                ending: coming.ending.clone(),
                class: coming.first,
            });
        }
        let first = state.coming.get(digest).map_or(class, |coming| coming.first);
        // The materializer takes what is wanted twice for as urgent as the more urgent of the two, and fetches it once.
        let (sender, ending) = watch::channel(None);
        state.begun += 1;
        let number = state.begun;
        let coming = Coming {
            number,
            ending: ending.clone(),
            class,
            first,
        };
        state.coming.insert(digest.clone(), coming);
        state.shelf.hold(digest);
        let (work, store, blob) = (self.holding(digest), self.clone(), blob.clone());
        tokio::spawn(async move {
            store.remove_aside(leaving).await;
            let fetched = store.fetch(&blob, class).await;
            store.ended(&blob.digest, number, &fetched);
            // Readers who have waited hold it; what they do next finds nothing of this here.
            drop((work, store));
            let _ = sender.send(Some(fetched.map(|_| ()).map_err(|missed| missed.error)));
        });
        Ok(Begun {
            _hold: hold,
            number,
            ending,
            class: first,
        })
    }

    /// Of a blob that the shelf holds.
    fn holding(self: &Arc<Self>, digest: &Digest) -> Hold {
        Hold {
            store: self.clone(),
            digest: digest.clone(),
        }
    }

    /// Notes how a download has ended. A file that was there before stays, unless its bytes are known to be wrong; and if
    /// another download of it was begun since, that one decides.
    fn ended(&self, digest: &Digest, number: u64, fetched: &Result<Kept, Missed>) {
        let mut state = self.state.lock();
        let is_last = state.is_over(digest, number);
        let before = state.shelf.kept(digest);
        match fetched {
            Ok(kept) => state.shelf.set(digest, *kept),
            Err(missed) if !missed.is_wrong && before != Kept::Nothing && self.look(digest).is_ok() => {}
            Err(_) if is_last => {
                if before != Kept::Nothing {
                    self.remove(digest);
                }
                state.shelf.set(digest, Kept::Nothing);
            }
            Err(_) => {}
        }
    }

    fn remove(&self, digest: &Digest) {
        let _ = unlinkat(&self.handle, path_of(digest), AtFlags::empty());
    }

    /// Takes files out of their places, under the lock: to remove many, or large ones, takes long, and all readers wait for
    /// it.
    fn put_aside(&self, state: &mut State, digests: &[Digest]) -> Vec<String> {
        let mut leaving = Vec::with_capacity(digests.len());
        for digest in digests {
            state.left += 1;
            let aside = format!("{LEAVING}{}", state.left);
            match renameat(&self.handle, path_of(digest), &self.handle, &aside) {
                Ok(()) => leaving.push(aside),
                Err(_) => self.remove(digest),
            }
        }
        leaving
    }

    /// Removes the files that were put aside.
    async fn remove_aside(self: &Arc<Self>, leaving: Vec<String>) {
        if leaving.is_empty() {
            return;
        }
        let store = self.clone();
        let removed = spawn_blocking(move || {
            for aside in leaving {
                let _ = unlinkat(&store.handle, aside, AtFlags::empty());
            }
        });
        let _ = removed.await;
    }

    /// Fetches a blob, or finds that it is here already. On a full disk, others make way for it.
    async fn fetch(self: &Arc<Self>, blob: &Blob, class: Class) -> Result<Kept, Missed> {
        let local = match &blob.cache {
            Ok(cache) => cache.local().clone(),
            // What is on disk needs no cache.
            Err(reason) => Arc::new(LocalFirst::new(HashMap::new(), Arc::new(Nowhere(reason.clone())))),
        };
        let mut offer = local.offer();
        let copy = blob.copy_in_time().await;
        // Nothing makes way for what cannot come.
        let may_come = blob.cache.is_ok() || copy.is_some();
        offer.add(copy.map(|copy| (blob.digest.clone(), copy)));
        let mut attempt = 0;
        loop {
            attempt += 1;
            let outcome = self.request(blob, &local, class).await?;
            if outcome.is_on_disk() {
                return Ok(self.look(&blob.digest)?);
            }
            // Nothing makes way for what nobody waits for.
            let may_make_way = class == Class::Required && may_come && attempt < ATTEMPTS;
            let is_full = matches!(outcome, Outcome::NoSpace(_) | Outcome::Failed(_));
            if may_make_way && is_full && self.make_way(blob).await {
                // As long as a refusal is remembered.
                sleep(REFUSED).await;
                continue;
            }
            let (error, is_wrong) = match outcome {
                Outcome::NoSpace(reason) => (ReadError::NoSpace(reason), false),
                Outcome::Failed(reason) if self.missing_space(blob) > 0 => {
                    (ReadError::NoSpace(reason), false)
                }
                Outcome::Evicted(reason) => {
                    let reason = format!("evicted from the cache: {reason}");
                    (ReadError::Lost(reason), true)
                }
                // Only what is not on disk is asked of the cache.
                outcome => (ReadError::Lost(outcome.reason().to_owned()), outcome.is_lost()),
            };
            return Err(Missed { error, is_wrong });
        }
    }

    /// Removes files that nobody needs now, if a blob lacks space and that frees enough. Whether there is room since, or
    /// others have made it a moment ago.
    async fn make_way(self: &Arc<Self>, blob: &Blob) -> bool {
        let leaving = {
            let mut state = self.state.lock();
            // As it is now that others have had their turn.
            let missing = self.missing_space(blob);
            let evicted = match missing {
                0 => Vec::new(),
                missing => state.shelf.make_way(missing),
            };
            if evicted.is_empty() {
                // What made way for another one may not be removed yet.
                return state.made_way.is_some_and(|at| at.elapsed() < 2 * REFUSED);
            }
            state.made_way = Some(Instant::now());
            // Before the lock is free: one could be fetched again already.
            self.put_aside(&mut state, &evicted)
        };
        self.remove_aside(leaving).await;
        self.state.lock().made_way = Some(Instant::now());
        true
    }

    fn missing_space(&self, blob: &Blob) -> u64 {
        self.root.place.missing_space(self.place, cost(&blob.digest))
    }

    async fn request(
        &self,
        blob: &Blob,
        store: &Arc<LocalFirst>,
        class: Class,
    ) -> Result<Outcome, ReadError> {
        let path = ExecPath::new(&path_of(&blob.digest)).map_err(|e| ReadError::Lost(e.to_string()))?;
        let want = Want::new(path, OutputContent::Blob(blob.digest.clone()), class, None);
        let session = |completions| Session {
            root: self.root.clone(),
            version: 0,
            store: store.clone(),
            attribution: blob.attribution.clone(),
            trace: None,
            served: None,
            completions,
        };
        let materializer = self.materializer.lock().clone().ok_or(ReadError::Ending)?;
        let mut request = materializer.request(session, vec![want]).await;
        let ended = request.next().await.and_then(|mut ends| ends.pop());
        ended.map(|end| end.outcome).ok_or(ReadError::Ending)
    }

    /// What the file that was just verified looks like.
    fn look(&self, digest: &Digest) -> Result<Kept, ReadError> {
        let path = path_of(digest);
        let found = statat(&self.handle, &path, AtFlags::SYMLINK_NOFOLLOW);
        let found = found.map_err(|e| ReadError::Lost(format!("{path} in the store: {e}")))?;
        if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
            return Err(ReadError::Lost(format!("{path} in the store is not a file")));
        }
        Ok(Kept::Whole {
            inode: found.st_ino,
            ctime_ns: ns(
                found.st_ctime,
                i64::try_from(found.st_ctime_nsec).unwrap_or_default(),
            ),
        })
    }
}

/// Where the file of a blob is. Two digests never have one path.
fn path_of(digest: &Digest) -> String {
    let hash = digest.hash_hex();
    format!("{}/{}/{hash}-{}", digest.function(), &hash[..2], digest.size())
}

fn mtime_ns(of: &Metadata) -> i64 {
    ns(of.mtime(), of.mtime_nsec())
}

/// Seconds and nanoseconds since the epoch as the latter alone.
const fn ns(seconds: i64, nanoseconds: i64) -> i64 {
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}

/// The blob that a file is called after, and when it was last used; `None` for anything else.
fn blob_of(file: &fs::DirEntry, function: DigestFunction) -> Option<(i64, Digest)> {
    let about = file.metadata().ok().filter(Metadata::is_file)?;
    let name = file.file_name();
    let (hash, size) = name.to_str()?.split_once('-')?;
    let digest = Digest::from_hex(Some(function), hash, size.parse().ok()?).ok()?;
    if digest.size() != about.len() {
        // A power cut has torn it.
        let _ = fs::remove_file(file.path());
        return None;
    }
    Some((mtime_ns(&about), digest))
}

/// The blobs that an earlier process has left, oldest first.
fn found(directory: &Path) -> Vec<Digest> {
    let mut found = Vec::new();
    let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten();
    for function in DigestFunction::ALL {
        for part in entries(&directory.join(function.name())) {
            for file in entries(&part.path()) {
                found.extend(blob_of(&file, function));
            }
        }
    }
    found.sort();
    found.into_iter().map(|(_, digest)| digest).collect()
}
