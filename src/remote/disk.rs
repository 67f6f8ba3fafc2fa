//! A directory that Bazel keeps its `--disk_cache` in, as a store of blobs.
//!
//! A blob lies at `cas/HH/HASH`, `HH` being the first two digits of its hash, below a directory of the function's name for
//! functions newer than SHA-1, MD5 and SHA-256 (Bazel's `DiskCacheClient`; measured with 4.2.3 and 7.7.1). Others may
//! collect the directory while it is read: a file may go between any two calls, and one that is open stays readable.
//! Nothing is written there, nor linked from there: hard links would share Bazel's inode and its mode.

use std::{
    fs::File,
    io::{self, Read as _},
    os::{fd::OwnedFd, unix::fs::FileExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use rustix::{
    fs::{self, Mode, OFlags, ResolveFlags},
    io::Errno,
};

use super::{Attribution, BatchAnswer, BlobStore, Capabilities, Sink};
use crate::{
    digest::{Digest, DigestFunction},
    transport::{RemoteError, RemoteErrorKind},
};

/// Pieces in which large files are read, in bytes.
const PIECE: u64 = 1 << 20;
/// How much is read at once for small blobs, in bytes.
const BATCH: u64 = 4 << 20;

/// A disk cache. Its bytes are no more believed than any server's.
pub struct DiskCache {
    path: PathBuf,
    root: Arc<OwnedFd>,
}

impl DiskCache {
    /// Opens the directory.
    ///
    /// # Errors
    /// When it is not there, cannot be opened, or belongs to neither this user nor root.
    pub fn open(path: &Path) -> Result<Self, RemoteError> {
        let error = |message: String| {
            let context = format!("disk cache {}", path.display());
            RemoteError::config(context, message)
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = fs::open(path, flags, Mode::empty()).map_err(|e| error(e.to_string()))?;
        let owner = fs::fstat(&root).map_err(|e| error(e.to_string()))?.st_uid;
        if owner != 0 && owner != rustix::process::geteuid().as_raw() {
            return Err(error(format!("it belongs to another user ({owner})")));
        }
        Ok(Self {
            path: path.to_owned(),
            root: Arc::new(root),
        })
    }

    fn context(&self, digest: &Digest) -> String {
        format!("reading {digest} from {}", self.describe())
    }

    fn not_found(&self, digest: &Digest) -> RemoteError {
        let kind = RemoteErrorKind::NotFound;
        RemoteError::new(kind, self.context(digest), "not in the disk cache")
    }

    fn failed(&self, digest: &Digest, error: &io::Error) -> RemoteError {
        RemoteError::new(RemoteErrorKind::Protocol, self.context(digest), error.to_string())
    }
}

/// Where a blob lies below the directory.
fn place(digest: &Digest) -> String {
    let hash = digest.hash_hex();
    let below = match digest.function() {
        DigestFunction::Sha256 | DigestFunction::Sha1 | DigestFunction::Md5 => String::new(),
        function => format!("{}/", function.name()),
    };
    format!("{below}cas/{}/{hash}", hash.get(..2).unwrap_or_default())
}

/// Opens a blob's file, if it is there and as long as the digest says.
fn open(root: &OwnedFd, digest: &Digest) -> io::Result<Option<File>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let path = place(digest);
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let opened = match fs::openat2(root, &path, flags, Mode::empty(), resolve) {
        Err(Errno::NOSYS | Errno::PERM) => fs::openat(root, &path, flags, Mode::empty()),
        opened => opened,
    };
    let file = match opened {
        Ok(fd) => File::from(fd),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    let found = file.metadata()?;
    // A file that was cut by a crash is as good as none.
    Ok((found.is_file() && found.len() == digest.size()).then_some(file))
}

/// The next bytes of a file of this size, as many as are handed on at once; `None` when it cannot be read. Not on the
/// caller's thread.
pub(crate) async fn piece(file: &Arc<File>, at: u64, size: u64) -> Option<Bytes> {
    let file = Arc::clone(file);
    let want = usize::try_from(size.saturating_sub(at).min(PIECE)).ok()?;
    let read = tokio::task::spawn_blocking(move || {
        let mut buffer = vec![0; want];
        let read = file.read_exact_at(&mut buffer, at);
        read.ok().map(|()| Bytes::from(buffer))
    });
    read.await.ok().flatten()
}

impl BlobStore for DiskCache {
    fn capabilities(&self) -> BoxFuture<'_, Result<Capabilities, RemoteError>> {
        let capabilities = Capabilities {
            digest_functions: Vec::new(),
            max_batch_bytes: BATCH,
            zstd_streams: false,
            zstd_batches: false,
        };
        futures::future::ready(Ok(capabilities)).boxed()
    }

    fn read_batch<'a>(
        &'a self,
        digests: &'a [Digest],
        _: &'a Attribution,
        _: bool,
    ) -> BoxFuture<'a, Vec<BatchAnswer>> {
        async move {
            let (root, asked) = (Arc::clone(&self.root), digests.to_vec());
            let read = tokio::task::spawn_blocking(move || {
                let read = |digest: &Digest| -> io::Result<Option<Bytes>> {
                    let Some(mut file) = open(&root, digest)? else {
                        return Ok(None);
                    };
                    let mut bytes = Vec::new();
                    file.by_ref().take(digest.size()).read_to_end(&mut bytes)?;
                    Ok((bytes.len() as u64 == digest.size()).then(|| bytes.into()))
                };
                asked.iter().map(read).collect::<Vec<_>>()
            });
            let mut read = read.await.unwrap_or_default().into_iter();
            let answer = |digest: &Digest| match read.next() {
                Some(Ok(Some(bytes))) => (digest.clone(), Ok(bytes)),
                Some(Err(error)) => (digest.clone(), Err(self.failed(digest, &error))),
                Some(Ok(None)) | None => (digest.clone(), Err(self.not_found(digest))),
            };
            digests.iter().map(answer).collect()
        }
        .boxed()
    }

    fn read_stream<'a>(
        &'a self,
        digest: &'a Digest,
        offset: u64,
        _: &'a Attribution,
        _: bool,
        sink: &'a mut dyn Sink,
    ) -> BoxFuture<'a, Result<(), RemoteError>> {
        async move {
            let (root, asked) = (Arc::clone(&self.root), digest.clone());
            let opened = tokio::task::spawn_blocking(move || open(&root, &asked)).await;
            let file = match opened {
                Ok(Ok(Some(file))) => Arc::new(file),
                Ok(Err(error)) => return Err(self.failed(digest, &error)),
                Ok(Ok(None)) | Err(_) => return Err(self.not_found(digest)),
            };
            let mut at = offset;
            while at < digest.size() {
                let cut = io::Error::from(io::ErrorKind::UnexpectedEof);
                let piece = piece(&file, at, digest.size())
                    .await
                    .ok_or_else(|| self.failed(digest, &cut))?;
                at += piece.len() as u64;
                sink.write(piece)
                    .await
                    .map_err(|e| RemoteError::new(RemoteErrorKind::Sink, self.context(digest), e))?;
            }
            Ok(())
        }
        .boxed()
    }

    fn find_missing<'a>(
        &'a self,
        digests: &'a [Digest],
        _: &'a Attribution,
    ) -> BoxFuture<'a, Result<Vec<Digest>, RemoteError>> {
        async move {
            let (root, mut asked) = (Arc::clone(&self.root), digests.to_vec());
            let looked = tokio::task::spawn_blocking(move || {
                asked.retain(|digest| !matches!(open(&root, digest), Ok(Some(_))));
                asked
            });
            Ok(looked.await.unwrap_or_else(|_| digests.to_vec()))
        }
        .boxed()
    }

    fn describe(&self) -> String {
        format!("disk cache {}", self.path.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keeps what it is given.
    struct Kept(Vec<u8>);

    impl Sink for Kept {
        fn write(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), String>> {
            self.0.extend_from_slice(&bytes);
            futures::future::ready(Ok(())).boxed()
        }
    }

    fn put(dir: &Path, digest: &Digest, bytes: &[u8]) -> PathBuf {
        let path = dir.join(place(digest));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    }

    #[tokio::test]
    async fn blobs_are_read_whole_from_where_bazel_keeps_them() {
        let dir = tempfile::tempdir().unwrap();
        let cache = DiskCache::open(dir.path()).unwrap();
        let nobody = Attribution::default();
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| n as u8).collect();
        for function in [DigestFunction::Sha256, DigestFunction::Blake3] {
            let digest = Digest::of(function, &bytes);
            put(dir.path(), &digest, &bytes);
            let mut kept = Kept(Vec::new());
            cache
                .read_stream(&digest, 1000, &nobody, false, &mut kept)
                .await
                .unwrap();
            assert_eq!(kept.0, bytes[1000..]);
            let answers = cache
                .read_batch(std::slice::from_ref(&digest), &nobody, false)
                .await;
            assert_eq!(answers[0].1.as_ref().unwrap()[..], bytes);
        }
        let blake3 = Digest::of(DigestFunction::Blake3, &bytes);
        assert!(
            dir.path()
                .join("blake3/cas")
                .join(&blake3.hash_hex()[..2])
                .exists()
        );
    }

    #[tokio::test]
    async fn what_is_cut_or_no_file_or_a_link_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let cache = DiskCache::open(dir.path()).unwrap();
        let digest = |text: &str| Digest::of(DigestFunction::Sha256, text.as_bytes());
        let (cut, directory, link, absent) = (digest("cut"), digest("dir"), digest("link"), digest("absent"));
        put(dir.path(), &cut, b"cu");
        std::fs::create_dir_all(dir.path().join(place(&directory))).unwrap();
        let target = put(dir.path(), &link, b"link");
        std::fs::rename(&target, dir.path().join("elsewhere")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), &target).unwrap();
        let all = [cut, directory, link, absent];
        for (digest, answer) in cache.read_batch(&all, &Attribution::default(), false).await {
            assert!(answer.unwrap_err().is_not_found(), "{digest}");
        }
        let missing = cache.find_missing(&all, &Attribution::default()).await.unwrap();
        assert_eq!(missing, all);
        assert!(DiskCache::open(&dir.path().join("none")).is_err());
    }
}
