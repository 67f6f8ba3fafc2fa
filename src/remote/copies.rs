//! Blobs that are on disk already: a store that reads files of this machine before it asks the cache.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{self, Read as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::Path,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use rustix::fs::OFlags;
use tokio::{task::spawn_blocking, time::timeout};

use super::{
    Attribution, BatchAnswer, BlobStore, Capabilities, Sink,
    disk::{DISK_CACHE, piece},
};
use crate::{digest::Digest, exec_path::ExecPath, output::Stamp, transport::RemoteError};

/// The name, as of a store, of what comes from such files.
pub(crate) const LOCAL_FILES: &str = "local files";

/// Whether a store of this name is on this machine's disk, so that no byte of it comes over a network.
pub(crate) fn is_local(store: &str) -> bool {
    store == LOCAL_FILES || store.starts_with(DISK_CACHE)
}

/// How long a file may take to be opened, or to give its next bytes: it may be on a file system whose server is gone.
const PATIENCE: Duration = Duration::from_secs(5);
/// The same of a file that nothing stands in for.
const LONG_PATIENCE: Duration = Duration::from_secs(60);

/// How many files are taken back before others may look at what is offered.
const AT_ONCE: usize = 1000;

/// A file that should have a blob's bytes.
#[derive(Debug, Clone)]
pub(crate) struct Copy {
    /// The directory that it lies below.
    pub(crate) root: Arc<Path>,
    /// Where it lies there.
    pub(crate) path: ExecPath,
    /// What it looked like when it had those bytes.
    pub(crate) stamp: Stamp,
}

/// Reads the files that were offered to it, and asks the cache for the rest.
///
/// What a file says is not believed here: anyone who asks hashes the bytes anyway, and asks again with `avoid` when
/// they are wrong, which goes to the cache.
pub(crate) struct LocalFirst {
    cache: Arc<dyn BlobStore>,
    offers: Mutex<Offers>,
}

#[derive(Default)]
struct Offers {
    /// The number of the last one.
    last: u64,
    copies: HashMap<Digest, Offered>,
}

struct Offered {
    /// The numbers of the offers that it is in.
    offers: Vec<u64>,
    copy: Copy,
    /// Whether the blob's bytes came from it.
    served: bool,
    /// The cache need not have the blob: it is waited for longer, and not given up with others.
    only: bool,
}

/// Files that are offered as long as this is held.
pub(crate) struct Offer {
    store: Arc<LocalFirst>,
    number: u64,
    digests: Vec<Digest>,
}

impl Offer {
    /// Offers more. Of two files with the same bytes, the first counts, as long as one of their offers is held.
    pub(crate) fn add(&mut self, copies: impl IntoIterator<Item = (Digest, Copy)>) {
        let mut offers = self.store.offers.lock();
        for (digest, copy) in copies {
            let offered = offers.copies.entry(digest.clone()).or_insert_with(|| Offered {
                offers: Vec::new(),
                copy,
                served: false,
                only: false,
            });
            if !offered.offers.contains(&self.number) {
                offered.offers.push(self.number);
                self.digests.push(digest);
            }
        }
    }
}

impl Offer {
    /// Offers the files for as long as there is the store.
    pub(crate) fn for_good(mut self) {
        self.digests = Vec::new();
    }
}

impl Drop for Offer {
    fn drop(&mut self) {
        for digests in self.digests.chunks(AT_ONCE) {
            let mut offers = self.store.offers.lock();
            for digest in digests {
                let Some(offered) = offers.copies.get_mut(digest) else {
                    continue;
                };
                offered.offers.retain(|number| *number != self.number);
                if offered.offers.is_empty() {
                    offers.copies.remove(digest);
                }
            }
        }
        let mut offers = self.store.offers.lock();
        if offers.copies.is_empty() {
            offers.copies = HashMap::new();
        }
    }
}

impl LocalFirst {
    /// With files that are offered for good.
    pub(crate) fn new(copies: HashMap<Digest, Copy>, cache: Arc<dyn BlobStore>) -> Self {
        let store = Self {
            cache,
            offers: Mutex::default(),
        };
        store.put(copies, false);
        store
    }

    /// With files whose bytes the cache need not have.
    pub(crate) fn with_only(self, copies: HashMap<Digest, Copy>) -> Self {
        self.put(copies, true);
        self
    }

    fn put(&self, copies: HashMap<Digest, Copy>, only: bool) {
        let offered = |(digest, copy)| {
            let offered = Offered {
                offers: vec![0],
                copy,
                served: false,
                only,
            };
            (digest, offered)
        };
        self.offers.lock().copies.extend(copies.into_iter().map(offered));
    }

    /// An offer without files as yet.
    pub(crate) fn offer(self: &Arc<Self>) -> Offer {
        let mut offers = self.offers.lock();
        offers.last += 1;
        Offer {
            store: self.clone(),
            number: offers.last,
            digests: Vec::new(),
        }
    }

    /// Whether a file with these bytes is offered.
    pub(crate) fn has_copy(&self, digest: &Digest) -> bool {
        self.offers.lock().copies.contains_key(digest)
    }

    /// Whether a blob's bytes came from a file.
    pub(crate) fn served(&self, digest: &Digest) -> bool {
        self.offers
            .lock()
            .copies
            .get(digest)
            .is_some_and(|offered| offered.served)
    }

    fn note(&self, digest: &Digest, local: bool) {
        if let Some(offered) = self.offers.lock().copies.get_mut(digest) {
            offered.served = local;
        }
    }

    /// Forgets the files below some directories: one of them does not answer.
    fn give_up(&self, roots: &HashSet<Arc<Path>>) {
        for root in roots {
            let path = root.display();
            tracing::warn!(%path, "reading files there takes too long; downloading what they have instead");
        }
        self.offers
            .lock()
            .copies
            .retain(|_, offered| offered.only || !roots.contains(&offered.copy.root));
    }

    /// The file with a blob's bytes, and for how long it is waited for.
    fn copy(&self, digest: &Digest, avoid: bool) -> Option<(Copy, Duration)> {
        if avoid {
            return None;
        }
        let offers = self.offers.lock();
        let offered = offers.copies.get(digest)?;
        let patience = if offered.only { LONG_PATIENCE } else { PATIENCE };
        Some((offered.copy.clone(), patience))
    }
}

/// Opens a copy that still looks as it is recorded.
fn open(copy: &Copy, size: u64) -> io::Result<Option<File>> {
    // A fifo in its place must not block us.
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::options()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(copy.root.join(copy.path.as_path()))?;
    let now = file.metadata()?;
    let same = now.is_file()
        && now.len() == size
        && (now.dev(), now.ino()) == (copy.stamp.device, copy.stamp.inode)
        && nanoseconds(now.mtime(), now.mtime_nsec()) == copy.stamp.mtime_ns;
    Ok(same.then_some(file))
}

fn nanoseconds(seconds: i64, rest: i64) -> i64 {
    seconds.saturating_mul(1_000_000_000).saturating_add(rest)
}

/// Whether a copy still looks as it is recorded. Blocks.
pub(crate) fn looks_right(copy: &Copy, size: u64) -> bool {
    matches!(open(copy, size), Ok(Some(_)))
}

fn read(copy: &Copy, size: u64) -> Option<Bytes> {
    let mut file = open(copy, size).ok()??;
    let mut bytes = Vec::with_capacity(usize::try_from(size).ok()?);
    // One byte more shows that it has grown.
    file.by_ref().take(size + 1).read_to_end(&mut bytes).ok()?;
    (bytes.len() as u64 == size).then(|| bytes.into())
}

#[async_trait]
impl BlobStore for LocalFirst {
    async fn capabilities(&self) -> Result<Capabilities, RemoteError> {
        self.cache.capabilities().await
    }

    async fn read_batch(
        &self,
        digests: &[Digest],
        attribution: &Attribution,
        avoid: bool,
    ) -> Vec<BatchAnswer> {
        let asked: Vec<(Digest, (Copy, Duration))> = digests
            .iter()
            .filter_map(|digest| Some((digest.clone(), self.copy(digest, avoid)?)))
            .collect();
        if asked.is_empty() {
            for digest in digests {
                self.note(digest, false);
            }
            return self.cache.read_batch(digests, attribution, avoid).await;
        }
        let mut found = HashMap::new();
        let (only, others): (Vec<_>, Vec<_>) = asked
            .into_iter()
            .partition(|(_, (_, patience))| *patience == LONG_PATIENCE);
        for (asked, patience) in [(others, PATIENCE), (only, LONG_PATIENCE)] {
            let roots: HashSet<Arc<Path>> = asked.iter().map(|(_, (copy, _))| copy.root.clone()).collect();
            let looked = spawn_blocking(move || {
                let mut found = HashMap::new();
                for (digest, (copy, _)) in asked {
                    if let Some(bytes) = read(&copy, digest.size()) {
                        found.insert(digest, bytes);
                    }
                }
                found
            });
            match timeout(patience, looked).await {
                Ok(read) => found.extend(read.unwrap_or_default()),
                Err(_) => self.give_up(&roots),
            }
        }
        let rest: Vec<Digest> = digests
            .iter()
            .filter(|digest| !found.contains_key(*digest))
            .cloned()
            .collect();
        let mut fetched: HashMap<Digest, Result<Bytes, RemoteError>> = HashMap::new();
        if !rest.is_empty() {
            fetched.extend(self.cache.read_batch(&rest, attribution, avoid).await);
        }
        let answer = |digest: &Digest| {
            let answer = match (found.remove(digest), fetched.remove(digest)) {
                (Some(bytes), _) => {
                    self.note(digest, true);
                    Ok(bytes)
                }
                (None, Some(answer)) => {
                    self.note(digest, false);
                    answer
                }
                (None, None) => Err(RemoteError::protocol(
                    digest.to_string(),
                    "it was requested twice in one batch",
                )),
            };
            (digest.clone(), answer)
        };
        digests.iter().map(answer).collect()
    }

    async fn read_stream(
        &self,
        digest: &Digest,
        offset: u64,
        attribution: &Attribution,
        avoid: bool,
        sink: &mut dyn Sink,
    ) -> Result<(), RemoteError> {
        let mut at = offset;
        if let Some((copy, patience)) = self.copy(digest, avoid) {
            let size = digest.size();
            let root = HashSet::from([copy.root.clone()]);
            let opened = timeout(patience, spawn_blocking(move || open(&copy, size))).await;
            if opened.is_err() {
                self.give_up(&root);
            }
            if let Ok(Ok(Ok(Some(file)))) = opened {
                let file = Arc::new(file);
                self.note(digest, true);
                while at < size {
                    let piece = timeout(patience, piece(&file, at, size)).await;
                    if piece.is_err() {
                        self.give_up(&root);
                    }
                    let Ok(Some(piece)) = piece else {
                        // The rest from the cache. If the file was changed meanwhile, the hash will say.
                        break;
                    };
                    at += piece.len() as u64;
                    let context = format!("copying {digest}");
                    sink.write(piece)
                        .await
                        .map_err(|e| RemoteError::sink(context, e))?;
                }
                if at == size {
                    return Ok(());
                }
            }
        }
        self.note(digest, false);
        self.cache.read_stream(digest, at, attribution, avoid, sink).await
    }

    async fn find_missing(
        &self,
        digests: &[Digest],
        attribution: &Attribution,
    ) -> Result<Vec<Digest>, RemoteError> {
        self.cache.find_missing(digests, attribution).await
    }

    fn describe(&self) -> String {
        self.cache.describe()
    }

    fn origin(&self, digest: &Digest) -> Option<Arc<str>> {
        if self.served(digest) {
            return Some(LOCAL_FILES.into());
        }
        self.cache.origin(digest)
    }

    fn distrust(&self, digest: &Digest) -> bool {
        let mut offers = self.offers.lock();
        if offers.copies.get(digest).is_some_and(|offered| offered.served) {
            // It was only a guess: the cache has not been asked.
            offers.copies.remove(digest);
            return true;
        }
        drop(offers);
        self.cache.distrust(digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{digest::DigestFunction, remote::Nowhere};

    #[test]
    fn a_file_is_offered_as_long_as_one_of_its_offers_is_held() {
        let nowhere = Arc::new(Nowhere("no cache".to_owned()));
        let store = Arc::new(LocalFirst::new(HashMap::new(), nowhere));
        let digest = |n: usize| Digest::of(DigestFunction::Sha256, &n.to_le_bytes());
        let copy = |root: &str| Copy {
            root: Path::new(root).into(),
            path: ExecPath::new("bazel-out/x").unwrap(),
            stamp: Stamp::default(),
        };
        let all = 2 * AT_ONCE + 1;
        let (mut first, mut second) = (store.offer(), store.offer());
        first.add((0..all).map(|n| (digest(n), copy("/first"))));
        first.add([(digest(0), copy("/first"))]);
        second.add([(digest(0), copy("/second")), (digest(all), copy("/second"))]);
        drop(first);
        assert!(store.has_copy(&digest(0)) && store.has_copy(&digest(all)));
        assert!((1..all).all(|n| !store.has_copy(&digest(n))));
        // What turned out wrong, and was offered again by another one, stays with that.
        store.note(&digest(0), true);
        assert!(store.distrust(&digest(0)));
        let mut third = store.offer();
        third.add([(digest(0), copy("/third"))]);
        drop(second);
        assert!(store.has_copy(&digest(0)) && !store.has_copy(&digest(all)));
        drop(third);
        assert!(!store.has_copy(&digest(0)));
    }

    #[test]
    fn what_only_files_have_is_not_given_up_with_others() {
        let digest = |n: u8| Digest::of(DigestFunction::Sha256, &[n]);
        let copy = || Copy {
            root: Path::new("/slow").into(),
            path: ExecPath::new("x").unwrap(),
            stamp: Stamp::default(),
        };
        let nowhere = Arc::new(Nowhere("no cache".to_owned()));
        let store = LocalFirst::new(HashMap::from([(digest(0), copy()), (digest(1), copy())]), nowhere);
        let store = store.with_only(HashMap::from([(digest(1), copy())]));
        assert_eq!(store.copy(&digest(0), false).unwrap().1, PATIENCE);
        assert_eq!(store.copy(&digest(1), false).unwrap().1, LONG_PATIENCE);
        store.give_up(&HashSet::from([Path::new("/slow").into()]));
        assert!(!store.has_copy(&digest(0)) && store.has_copy(&digest(1)));
    }
}
