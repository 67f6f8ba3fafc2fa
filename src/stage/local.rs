//! Blobs that are on disk already: a store that reads the output tree's own copies before it asks the cache.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{self, Read as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use rustix::fs::OFlags;

use crate::{
    digest::Digest,
    output::Stamp,
    remote::{Attribution, BatchAnswer, BlobStore, Capabilities, Sink, piece},
    transport::{RemoteError, RemoteErrorKind},
};

/// A file that the record says has a blob's bytes.
#[derive(Debug, Clone)]
pub(super) struct Copy {
    pub(super) path: PathBuf,
    /// What it looked like when that was known.
    pub(super) stamp: Stamp,
}

/// Reads what the output tree has, and asks the cache for the rest.
///
/// What a file says is not believed here: anyone who asks hashes the bytes anyway, and asks again with `avoid` when
/// they are wrong, which goes to the cache.
pub(super) struct LocalFirst {
    copies: HashMap<Digest, Copy>,
    cache: Arc<dyn BlobStore>,
    /// Blobs that came from the disk.
    served: Mutex<HashSet<Digest>>,
}

impl LocalFirst {
    pub(super) fn new(copies: HashMap<Digest, Copy>, cache: Arc<dyn BlobStore>) -> Self {
        Self {
            copies,
            cache,
            served: Mutex::default(),
        }
    }

    /// Whether there is a copy on disk, as far as its looks tell.
    pub(super) fn has_copy(&self, digest: &Digest) -> bool {
        self.copies.contains_key(digest)
    }

    /// Whether a blob's bytes came from the disk.
    pub(super) fn served(&self, digest: &Digest) -> bool {
        self.lock().contains(digest)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashSet<Digest>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, digest: &Digest, local: bool) {
        let mut served = self.lock();
        if local {
            served.insert(digest.clone());
        } else {
            served.remove(digest);
        }
    }

    fn copy(&self, digest: &Digest, avoid: bool) -> Option<Copy> {
        if avoid {
            None
        } else {
            self.copies.get(digest).cloned()
        }
    }
}

/// Opens a copy that still looks as it is recorded.
fn open(copy: &Copy, size: u64) -> io::Result<Option<File>> {
    // A fifo in its place must not block us.
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::options()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(&copy.path)?;
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
pub(super) fn looks_right(copy: &Copy, size: u64) -> bool {
    matches!(open(copy, size), Ok(Some(_)))
}

fn read(copy: &Copy, size: u64) -> Option<Bytes> {
    let mut file = open(copy, size).ok()??;
    let mut bytes = Vec::with_capacity(usize::try_from(size).ok()?);
    // One byte more shows that it has grown.
    file.by_ref().take(size + 1).read_to_end(&mut bytes).ok()?;
    (bytes.len() as u64 == size).then(|| bytes.into())
}

impl BlobStore for LocalFirst {
    fn capabilities(&self) -> BoxFuture<'_, Result<Capabilities, RemoteError>> {
        self.cache.capabilities()
    }

    fn read_batch<'a>(
        &'a self,
        digests: &'a [Digest],
        attribution: &'a Attribution,
        avoid: bool,
    ) -> BoxFuture<'a, Vec<BatchAnswer>> {
        async move {
            let asked: Vec<(Digest, Option<Copy>)> = digests
                .iter()
                .map(|digest| (digest.clone(), self.copy(digest, avoid)))
                .collect();
            let looked = tokio::task::spawn_blocking(move || {
                let mut found = HashMap::new();
                for (digest, copy) in asked {
                    if let Some(bytes) = copy.and_then(|copy| read(&copy, digest.size())) {
                        found.insert(digest, bytes);
                    }
                }
                found
            });
            let mut found = looked.await.unwrap_or_default();
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
                    (None, None) => Err(RemoteError::new(
                        RemoteErrorKind::Protocol,
                        digest.to_string(),
                        "it was requested twice in one batch",
                    )),
                };
                (digest.clone(), answer)
            };
            digests.iter().map(answer).collect()
        }
        .boxed()
    }

    fn read_stream<'a>(
        &'a self,
        digest: &'a Digest,
        offset: u64,
        attribution: &'a Attribution,
        avoid: bool,
        sink: &'a mut dyn Sink,
    ) -> BoxFuture<'a, Result<(), RemoteError>> {
        async move {
            let mut at = offset;
            if let Some(copy) = self.copy(digest, avoid) {
                let size = digest.size();
                let opened = tokio::task::spawn_blocking(move || open(&copy, size)).await;
                if let Ok(Ok(Some(file))) = opened {
                    let file = Arc::new(file);
                    self.note(digest, true);
                    while at < size {
                        let Some(piece) = piece(&file, at, size).await else {
                            // The rest from the cache. If the file was changed meanwhile, the hash will tell.
                            break;
                        };
                        at += piece.len() as u64;
                        let context = format!("copying {digest}");
                        sink.write(piece)
                            .await
                            .map_err(|e| RemoteError::new(RemoteErrorKind::Sink, context, e))?;
                    }
                    if at == size {
                        return Ok(());
                    }
                }
            }
            self.note(digest, false);
            self.cache.read_stream(digest, at, attribution, avoid, sink).await
        }
        .boxed()
    }

    fn find_missing<'a>(
        &'a self,
        digests: &'a [Digest],
        attribution: &'a Attribution,
    ) -> BoxFuture<'a, Result<Vec<Digest>, RemoteError>> {
        self.cache.find_missing(digests, attribution)
    }

    fn describe(&self) -> String {
        self.cache.describe()
    }

    fn origin(&self, digest: &Digest) -> Option<Arc<str>> {
        if self.served(digest) {
            return None;
        }
        self.cache.origin(digest)
    }

    fn distrust(&self, digest: &Digest) -> bool {
        !self.served(digest) && self.cache.distrust(digest)
    }
}

/// The file of a recorded output, as the cache of facts has it.
pub(super) fn copy_of(exec_root: &Path, path: &str, stamp: Stamp) -> Copy {
    Copy {
        path: exec_root.join(path),
        stamp,
    }
}
