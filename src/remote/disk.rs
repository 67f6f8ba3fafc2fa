//! A directory that Bazel keeps its `--disk_cache` in, as a store.
//!
//! A blob lies at `cas/HH/HASH` and an action's result at `ac/HH/HASH`, `HH` being the first two digits of the hash, below a
//! directory of the function's name for functions newer than SHA-1, MD5 and SHA-256 (Bazel's `DiskCacheClient`; measured
//! with 4.2.3 and 7.7.1). What lies beside them, Bazel's `tmp` and `gc`, is never looked at. Others may collect the
//! directory while it is read: a file may go between any two calls, and one that is open stays readable. Nothing is written
//! there, nor linked from there: hard links would share Bazel's inode and its mode. What is read is only made as new as if
//! Bazel had read it, so that its collector, which begins with the oldest, leaves it alone.

use std::{
    fs::File,
    io::{self, Read as _},
    os::{fd::OwnedFd, unix::fs::FileExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use bazel_remote_apis::build::bazel::remote::execution::v2::ActionResult;
use bytes::Bytes;
use prost::Message as _;
use rustix::{
    fs::{self, AtFlags, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT},
    io::Errno,
};

use super::{
    ActionStore, Attribution, BatchAnswer, BlobStore, Capabilities, Sink, client::MAX_MESSAGE,
    store::all_failed,
};
use crate::{
    digest::{Digest, DigestFunction},
    open_files::{GUARDED, is_lacking, patient},
    transport::{RemoteError, RemoteErrorKind},
};

/// Pieces in which large files are read, in bytes.
const PIECE: u64 = 1 << 20;
/// How much is read at once for small blobs, in bytes.
const BATCH: u64 = 4 << 20;

/// How the names of disk caches begin, as they are shown.
pub(super) const DISK_CACHE: &str = "disk cache ";

/// A disk cache. Its bytes are no more believed than any server's. It need not be there yet: until then it has nothing.
#[derive(Debug, Clone)]
pub(crate) struct DiskCache(Arc<CacheDirectory>);

#[derive(Debug)]
struct CacheDirectory {
    path: PathBuf,
    touches: bool,
    /// Where it cannot be used, it has nothing.
    is_optional: bool,
}

/// The directory, opened for one request.
struct Root {
    fd: OwnedFd,
    touches: bool,
    is_optional: bool,
}

/// What is looked for.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Blob,
    Result,
}

impl DiskCache {
    /// The disk cache in a directory. With `touch`, what is read counts as used just now.
    pub(crate) fn new(path: &Path, touch: bool) -> Self {
        Self(Arc::new(CacheDirectory {
            path: path.to_owned(),
            touches: touch,
            is_optional: false,
        }))
    }

    /// The same, but where the directory is another user's, closed to us or none at all, it has nothing.
    pub(crate) fn optional(&self) -> Self {
        Self(Arc::new(CacheDirectory {
            path: self.0.path.clone(),
            touches: self.0.touches,
            is_optional: true,
        }))
    }

    fn context(&self, what: impl std::fmt::Display) -> String {
        format!("reading {what} from {}", self.describe())
    }

    fn not_found(&self, digest: &Digest) -> RemoteError {
        let kind = RemoteErrorKind::NotFound;
        RemoteError::new(kind, self.context(digest), "not in the disk cache")
    }

    fn failed(&self, what: impl std::fmt::Display, error: &io::Error) -> RemoteError {
        RemoteError::protocol(self.context(what), error.to_string())
    }

    /// Does something with the directory on a thread that may block; `None` when it is not there.
    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Root) -> T + Send + 'static,
    ) -> Result<Option<T>, RemoteError> {
        let directory = Arc::clone(&self.0);
        let done = tokio::task::spawn_blocking(move || Ok(directory.open()?.map(|root| work(&root))));
        let error = |kind, message: String| RemoteError::new(kind, self.describe(), message);
        match done.await {
            Ok(done) => done.map_err(|(kind, message)| error(kind, message)),
            Err(failed) => Err(error(RemoteErrorKind::Unavailable, failed.to_string())),
        }
    }
}

impl CacheDirectory {
    /// Opens the directory: each time, since it may appear, go, or be made again.
    fn open(&self) -> Result<Option<Root>, (RemoteErrorKind, String)> {
        let failed = |errno: Errno| {
            let kind = match errno {
                Errno::ACCESS | Errno::PERM => RemoteErrorKind::Denied,
                Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG => RemoteErrorKind::Config,
                _ => RemoteErrorKind::Unavailable,
            };
            (kind, errno.to_string())
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = match patient(|| fs::open(&self.path, flags, Mode::empty())) {
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) if self.is_optional && is_unusable(errno) => {
                tracing::debug!(path = %self.path.display(), %errno, "a disk cache counts as empty");
                return Ok(None);
            }
            opened => opened.map_err(failed)?,
        };
        let owner = fs::fstat(&fd).map_err(failed)?.st_uid;
        if owner != 0 && owner != rustix::process::geteuid().as_raw() {
            let message = format!("it belongs to another user ({owner})");
            if self.is_optional {
                tracing::debug!(path = %self.path.display(), message, "a disk cache counts as empty");
                return Ok(None);
            }
            return Err((RemoteErrorKind::Config, message));
        }
        Ok(Some(Root {
            fd,
            touches: self.touches,
            is_optional: self.is_optional,
        }))
    }
}

/// Where something lies below the directory.
fn path_of(kind: Kind, function: DigestFunction, hash: &[u8]) -> String {
    let hash = hex::encode(hash);
    let below = match function {
        DigestFunction::Sha256 | DigestFunction::Sha1 | DigestFunction::Md5 => String::new(),
        function => format!("{}/", function.name()),
    };
    let kind = match kind {
        Kind::Blob => "cas",
        Kind::Result => "ac",
    };
    format!("{below}{kind}/{}/{hash}", hash.get(..2).unwrap_or_default())
}

/// Where a blob lies below the directory.
pub(crate) fn place_of_blob(digest: &Digest) -> String {
    path_of(Kind::Blob, digest.function(), digest.hash())
}

/// Whether an error says that there is no such file.
const fn is_absent(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV | Errno::STALE
    )
}

/// Whether an error says that a directory is closed to us, or that it is not a directory.
const fn is_unusable(errno: Errno) -> bool {
    matches!(errno, Errno::ACCESS | Errno::PERM | Errno::NOTDIR | Errno::LOOP)
}

impl Root {
    /// Whether an error says that there is no such file for us.
    const fn is_absent(&self, errno: Errno) -> bool {
        is_absent(errno) || self.is_optional && is_unusable(errno)
    }

    /// Opens a regular file, and its size; nothing else counts as being there.
    fn open(&self, path: &str) -> io::Result<Option<(File, u64)>> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let opened = patient(
            || match fs::openat2(&self.fd, path, GUARDED, Mode::empty(), resolve) {
                Err(errno) if is_lacking(errno) => fs::openat(&self.fd, path, GUARDED, Mode::empty()),
                opened => opened,
            },
        );
        let file = match opened {
            Ok(fd) => File::from(fd),
            // A socket cannot be opened at all.
            Err(errno) if self.is_absent(errno) || errno == Errno::NXIO => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let found = file.metadata()?;
        Ok(found.is_file().then_some((file, found.len())))
    }

    /// Opens a blob, if it is there and as long as the digest says: one that was cut by a crash is as good as none.
    fn open_blob(&self, digest: &Digest) -> io::Result<Option<File>> {
        let opened = self.open(&place_of_blob(digest))?;
        let file = opened.and_then(|(file, size)| (size == digest.size()).then_some(file));
        if let Some(file) = &file {
            self.touch(file);
        }
        Ok(file)
    }

    /// Makes a file as new as if Bazel had read it. It may be another's, or on a file system that is only read: no matter.
    fn touch(&self, file: &File) {
        if self.touches {
            let time = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
            let times = Timestamps {
                last_access: time(UTIME_OMIT),
                last_modification: time(UTIME_NOW),
            };
            let _ = fs::futimens(file, &times);
        }
    }

    fn read_blob(&self, digest: &Digest) -> io::Result<Option<Bytes>> {
        if digest.is_empty() {
            return Ok(Some(Bytes::new()));
        }
        let Some(file) = self.open_blob(digest)? else {
            return Ok(None);
        };
        let mut bytes = Vec::with_capacity(usize::try_from(digest.size()).unwrap_or_default());
        file.take(digest.size()).read_to_end(&mut bytes)?;
        Ok((bytes.len() as u64 == digest.size()).then(|| bytes.into()))
    }

    fn read_result(&self, action: &Digest) -> io::Result<Option<ActionResult>> {
        let opened = self.open(&path_of(Kind::Result, action.function(), action.hash()))?;
        let Some((file, size)) = opened else {
            return Ok(None);
        };
        if size > MAX_MESSAGE as u64 {
            return Err(invalid(format!(
                "it has {size} bytes; at most {MAX_MESSAGE} are allowed"
            )));
        }
        let mut bytes = Vec::new();
        (&file).take(MAX_MESSAGE as u64).read_to_end(&mut bytes)?;
        let result = decode(&bytes)?;
        self.touch(&file);
        Ok(Some(result))
    }
}

/// An action's result as caches keep it. One without anything in it is what a crash leaves, and no result.
pub(crate) fn decode(bytes: &[u8]) -> io::Result<ActionResult> {
    if bytes.is_empty() {
        return Err(invalid("it is empty".to_owned()));
    }
    ActionResult::decode(bytes).map_err(|e| invalid(format!("it cannot be decoded: {e}")))
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

/// The next bytes of a file of this size, as many as are handed on at once; `None` when it cannot be read. Not on the
/// caller's thread.
pub(super) async fn piece(file: &Arc<File>, at: u64, size: u64) -> Option<Bytes> {
    let file = Arc::clone(file);
    let want = usize::try_from(size.saturating_sub(at).min(PIECE)).ok()?;
    let read = tokio::task::spawn_blocking(move || {
        let mut buffer = vec![0; want];
        let read = file.read_exact_at(&mut buffer, at);
        read.ok().map(|()| Bytes::from(buffer))
    });
    read.await.ok().flatten()
}

/// Gives a file of this size to a sink from byte `at` on. `false` when it cannot be read to its end.
///
/// # Errors
/// When the sink does not take the bytes; `context` says what they are.
pub(crate) async fn pour(
    file: File,
    mut at: u64,
    size: u64,
    context: &str,
    sink: &mut dyn Sink,
) -> Result<bool, RemoteError> {
    let file = Arc::new(file);
    while at < size {
        let Some(piece) = piece(&file, at, size).await else {
            return Ok(false);
        };
        at += piece.len() as u64;
        let written = sink.write(piece).await;
        written.map_err(|e| RemoteError::sink(context, e))?;
    }
    Ok(true)
}

#[async_trait]
impl BlobStore for DiskCache {
    async fn capabilities(&self) -> Result<Capabilities, RemoteError> {
        Ok(Capabilities::plain(BATCH))
    }

    async fn read_batch(&self, digests: &[Digest], _: &Attribution, _: bool) -> Vec<BatchAnswer> {
        let asked = digests.to_vec();
        let read = self.with(move |root| {
            let read = asked.iter().map(|digest| root.read_blob(digest));
            read.collect::<Vec<_>>()
        });
        let mut read = match read.await {
            Ok(read) => read.unwrap_or_default().into_iter(),
            Err(error) => return all_failed(digests, &error),
        };
        let answer = |digest: &Digest| match read.next() {
            Some(Ok(Some(bytes))) => (digest.clone(), Ok(bytes)),
            Some(Err(error)) => (digest.clone(), Err(self.failed(digest, &error))),
            Some(Ok(None)) | None => (digest.clone(), Err(self.not_found(digest))),
        };
        digests.iter().map(answer).collect()
    }

    async fn read_stream(
        &self,
        digest: &Digest,
        offset: u64,
        _: &Attribution,
        _: bool,
        sink: &mut dyn Sink,
    ) -> Result<(), RemoteError> {
        let asked = digest.clone();
        let opened = self.with(move |root| root.open_blob(&asked)).await?;
        let file = match opened {
            Some(Ok(Some(file))) => file,
            Some(Err(error)) => return Err(self.failed(digest, &error)),
            Some(Ok(None)) | None => return Err(self.not_found(digest)),
        };
        let size = digest.size();
        if pour(file, offset, size, &self.context(digest), sink).await? {
            return Ok(());
        }
        Err(self.failed(digest, &io::ErrorKind::UnexpectedEof.into()))
    }

    /// What is there is touched, as when it is read.
    async fn find_missing(&self, digests: &[Digest], _: &Attribution) -> Result<Vec<Digest>, RemoteError> {
        let mut asked = digests.to_vec();
        let looked = self.with(move |root| {
            asked.retain(|digest| !digest.is_empty() && !matches!(root.open_blob(digest), Ok(Some(_))));
            asked
        });
        let not_empty = || digests.iter().filter(|digest| !digest.is_empty());
        Ok(looked.await?.unwrap_or_else(|| not_empty().cloned().collect()))
    }

    fn describe(&self) -> String {
        format!("{DISK_CACHE}{}", self.0.path.display())
    }
}

#[async_trait]
impl ActionStore for DiskCache {
    async fn action_result(
        &self,
        action: &Digest,
        _: &Attribution,
    ) -> Result<Option<Arc<ActionResult>>, RemoteError> {
        let asked = action.clone();
        let read = self.with(move |root| root.read_result(&asked)).await?;
        let what = format_args!("result for action {action}");
        let result = read.transpose().map_err(|error| self.failed(what, &error))?;
        Ok(result.flatten().map(Arc::new))
    }

    async fn blob_size(&self, function: DigestFunction, hash: &[u8]) -> Result<Option<u64>, RemoteError> {
        let path = path_of(Kind::Blob, function, hash);
        let looked = self.with(
            move |root| match fs::statat(&root.fd, &path, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(found) if fs::FileType::from_raw_mode(found.st_mode).is_file() => {
                    Ok(u64::try_from(found.st_size).ok())
                }
                Ok(_) => Ok(None),
                Err(errno) if root.is_absent(errno) => Ok(None),
                Err(errno) => Err(io::Error::from(errno)),
            },
        );
        let found = looked.await?.transpose();
        let what = format_args!("blob {}", hex::encode(hash));
        Ok(found.map_err(|error| self.failed(what, &error))?.flatten())
    }

    /// A directory that is not there yet is made by the first build.
    async fn probe(&self) -> Result<(), RemoteError> {
        self.with(|_| ()).await.map(drop)
    }
}

#[cfg(test)]
mod tests;
