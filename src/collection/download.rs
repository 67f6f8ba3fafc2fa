//! Archives as files.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    CollectionError, Directory, Progress, SavedFile, Wanted,
    pipe::{Outlet, through},
};
use crate::{digest::Digest, remote::Chain};

/// How a download ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Downloaded {
    /// The digest of all bytes.
    pub(crate) digest: Digest,
    /// Whether the file was there already, with the right bytes.
    pub(crate) was_present: bool,
}

/// Downloads an archive to a directory, under its own name. A file that is there with the right checksum is kept.
///
/// # Errors
/// When it cannot be read or written, or is not what its checksum says, twice.
pub(crate) async fn download(
    wanted: &Wanted,
    directory: &Directory,
    progress: &Arc<Progress>,
) -> Result<Downloaded, CollectionError> {
    let name = wanted.item.name.clone();
    let path = directory.path().join(&name);
    if let Some(sum) = wanted.checksum.clone() {
        let (directory, name) = (directory.clone(), name.clone());
        let found = blocking(&path, move || directory.digest_of(&name, sum.function()));
        // What cannot be read is downloaded.
        if let Ok(Some(digest)) = found.await
            && wanted.checksum.as_ref().is_some_and(|sum| sum.fits(&digest))
        {
            return Ok(Downloaded {
                digest,
                was_present: true,
            });
        }
    }
    let (file, digest) = spool(wanted, directory, progress).await?;
    blocking(&path, move || file.publish(&name)).await?;
    Ok(Downloaded {
        digest,
        was_present: false,
    })
}

/// Downloads an archive to a file without a name, and verifies it. Bytes that are wrong are asked for once more, and of
/// several caches, then of the next one.
///
/// # Errors
/// As [`download`].
pub(super) async fn spool(
    wanted: &Wanted,
    directory: &Directory,
    progress: &Arc<Progress>,
) -> Result<(SavedFile, Digest), CollectionError> {
    let mut tries = 0;
    loop {
        tries += 1;
        match once(wanted, directory, progress).await {
            Err(error) if is_worth_another_try(wanted, &error, tries) => {
                tracing::debug!(%error, "downloading it again");
            }
            ended => return ended,
        }
    }
}

/// Whether an archive is read again after so many tries: once more, and as long as another cache may have it.
pub(super) fn is_worth_another_try(wanted: &Wanted, error: &CollectionError, tries: usize) -> bool {
    error.is_worth_another_try() && {
        let others_may_have_it = wanted.collection.distrust();
        others_may_have_it && tries < 2 * Chain::MOST || tries == 1
    }
}

async fn once(
    wanted: &Wanted,
    directory: &Directory,
    progress: &Arc<Progress>,
) -> Result<(SavedFile, Digest), CollectionError> {
    let path = directory.path().join(&wanted.item.name);
    let directory = directory.clone();
    through(wanted, progress, move |bytes| write(bytes, &directory, path)).await
}

fn write(bytes: &mut Outlet, directory: &Directory, path: PathBuf) -> Result<SavedFile, CollectionError> {
    let copied = directory
        .file()
        .and_then(|mut file| io::copy(bytes, &mut file).map(|_| file));
    copied.map_err(|source| CollectionError::Write { path, source })
}

/// Runs on a thread that may wait.
pub(super) async fn blocking<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, CollectionError> {
    let worked = tokio::task::spawn_blocking(work).await;
    let worked = worked.map_err(io::Error::other).and_then(|worked| worked);
    worked.map_err(|source| CollectionError::Write {
        path: path.to_owned(),
        source,
    })
}
