//! Archives, unpacked while they come.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use futures::{StreamExt as _, stream};

use super::{
    CollectionError, Directory, Progress, Wanted,
    download::{blocking, is_worth_another_try, spool},
    is_file_name,
    pipe::{Outlet, through},
};
use crate::{
    archive::{
        Archive, ArchiveError, Existing, Format, Limits, Mode, OnConflict, Published, Staging,
        StagingOptions, Unpacked, unpack, unpack_zip,
    },
    digest::Digest,
    exec_path::ExecPath,
    output::{Class, OutputContent},
};

/// How archives are unpacked.
#[derive(Debug, Clone)]
pub(crate) struct Extraction {
    /// The directory for all of them. A file goes right into it if its archive was named itself or is flattened, otherwise
    /// into a directory in it with the archive's name.
    pub(crate) directory: PathBuf,
    /// Where members go.
    pub(crate) mode: Mode,
    /// What becomes of members of two archives with the same path.
    pub(crate) on_conflict: OnConflict,
    /// Whether symlinks may lead anywhere.
    pub(crate) unsafe_links: bool,
    /// How much one archive may ask for.
    pub(crate) limits: Limits,
    /// How many archives are downloaded at the same time.
    pub(crate) jobs: usize,
}

/// An archive that was unpacked.
#[derive(Debug, Clone)]
pub(crate) struct Extracted {
    /// The digest of the archive's bytes.
    pub(crate) digest: Digest,
    /// What was in it.
    pub(crate) unpacked: Unpacked,
}

/// How all ended.
#[derive(Debug)]
pub(crate) struct Extractions {
    /// Each archive's end, in the order in which they were given; `None` for those that were given up for another's sake.
    pub(crate) archives: Vec<Option<Result<Extracted, CollectionError>>>,
    /// What was published, by its directory; empty if anything that is required failed before.
    pub(crate) published: Vec<(PathBuf, Result<Published, CollectionError>)>,
    /// Whether something that is required failed.
    is_lost: bool,
}

impl Extractions {
    /// Whether everything that is required is where it should be.
    pub(crate) fn is_complete(&self) -> bool {
        !self.is_lost
    }
}

impl Extraction {
    /// Where an archive's members go. What [`check_places`] refuses has no place.
    pub(crate) fn target(&self, wanted: &Wanted) -> PathBuf {
        if self.is_shared(wanted) {
            self.directory.clone()
        } else {
            self.directory.join(stem(&wanted.item.name))
        }
    }

    fn is_shared(&self, wanted: &Wanted) -> bool {
        wanted.is_named || self.mode == Mode::Flatten
    }

    async fn staging(&self, target: PathBuf, existing: Existing) -> Result<Staging, CollectionError> {
        let options = StagingOptions {
            existing,
            on_conflict: self.on_conflict,
            unsafe_links: self.unsafe_links,
            lists: false,
        };
        let opened = tokio::task::spawn_blocking(move || {
            // What it leads to is not ours to replace.
            if existing == Existing::Replace && target.is_symlink() {
                return Err(ArchiveError::InTheWay {
                    path: target,
                    reason: "it is a symlink",
                });
            }
            Staging::open(&target, options)
        })
        .await;
        Ok(opened.map_err(CollectionError::stopped)??)
    }
}

/// An archive's name without the ending that says what it is.
fn stem(name: &str) -> &str {
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    let (rest, is_tar) = match stem.len().checked_sub(4).and_then(|at| stem.split_at_checked(at)) {
        Some((rest, ending)) => (rest, ending.eq_ignore_ascii_case(".tar")),
        None => (stem, false),
    };
    if is_tar && !rest.is_empty() { rest } else { stem }
}

/// The directory that an archive is unpacked into, below the output directory. Whatever has that name is replaced, so it
/// must be a name, and not one of a directory that others hide there.
///
/// # Errors
/// When it is not one.
pub(crate) fn own_directory(name: &str) -> Result<&str, CollectionError> {
    let stem = stem(name);
    if stem.starts_with('.') || !is_file_name(stem) {
        return Err(CollectionError::NoDirectory {
            name: name.to_owned(),
        });
    }
    Ok(stem)
}

/// Refuses archives that cannot be unpacked or that have one place, before anything is downloaded.
///
/// # Errors
/// Naming them.
pub(crate) fn check_places(
    wanted: &[Wanted],
    extraction: Option<&Extraction>,
) -> Result<(), CollectionError> {
    let mut places: BTreeMap<String, &Wanted> = BTreeMap::new();
    for one in wanted {
        let place = match extraction {
            None => one.item.name.clone(),
            Some(_) if one.format.is_none() => {
                let name = one.item.name.clone();
                return Err(CollectionError::NoArchive { name });
            }
            Some(extraction) if extraction.is_shared(one) => continue,
            Some(_) => own_directory(&one.item.name)?.to_owned(),
        };
        if let Some(first) = places.insert(place.clone(), one) {
            return Err(CollectionError::SamePlace {
                first: first.address(),
                second: one.address(),
                place,
            });
        }
    }
    Ok(())
}

/// Downloads and unpacks archives, and publishes all of them when every one that is required is whole and verified. An
/// optional one that cannot be downloaded is left out.
///
/// # Errors
/// When nothing can be written beside the target. What befalls an archive is in the result.
pub(crate) async fn extract(
    wanted: &[Wanted],
    extraction: &Extraction,
    progress: &Arc<Progress>,
) -> Result<Extractions, CollectionError> {
    let shared = if wanted.iter().any(|one| extraction.is_shared(one)) {
        let staging = extraction.staging(extraction.directory.clone(), Existing::Merge);
        Some(Arc::new(staging.await?))
    } else {
        None
    };
    let mut archives: Vec<_> = wanted.iter().map(|_| None).collect();
    let mut own = Vec::new();
    let mut is_lost = false;
    {
        let shared = shared.as_ref();
        let mut running = stream::iter((0_u32..).zip(wanted))
            .map(|(order, one)| async move {
                let shared = shared.filter(|_| extraction.is_shared(one));
                (order, one, run(one, order, extraction, shared, progress).await)
            })
            .buffer_unordered(extraction.jobs);
        while let Some((order, one, ended)) = running.next().await {
            let (ended, staging) = match ended {
                Ok((extracted, staging)) => (Ok(extracted), staging),
                Err(error) => (Err(error), None),
            };
            own.extend(staging.map(|staging| (extraction.target(one), one.class, staging)));
            // What was unpacked in part cannot be distinguished from the rest.
            let spoils = |error: &CollectionError| {
                one.class == Class::Required
                    || (extraction.is_shared(one) && matches!(error, CollectionError::Archive(_)))
            };
            is_lost |= ended.as_ref().err().is_some_and(spoils);
            if let Some(slot) = archives.get_mut(order as usize) {
                *slot = Some(ended);
            }
            if is_lost {
                break;
            }
        }
    }
    let mut published = Vec::new();
    if !is_lost {
        let classes = wanted.iter().filter(|one| extraction.is_shared(one));
        let class = classes.map(|one| one.class).max().unwrap_or_default();
        let shared = shared
            .and_then(Arc::into_inner)
            .map(|staging| (extraction.directory.clone(), class, staging));
        for (target, class, staging) in shared.into_iter().chain(own) {
            let done = tokio::task::spawn_blocking(move || staging.publish()).await;
            let done = done.map_err(CollectionError::stopped).and_then(|done| Ok(done?));
            is_lost |= done.is_err() && class == Class::Required;
            published.push((target, done));
        }
    }
    Ok(Extractions {
        archives,
        published,
        is_lost,
    })
}

/// One archive: into the staging directory that is shared, or into one of its own that it gives back.
async fn run(
    wanted: &Wanted,
    order: u32,
    extraction: &Extraction,
    shared: Option<&Arc<Staging>>,
    progress: &Arc<Progress>,
) -> Result<(Extracted, Option<Staging>), CollectionError> {
    if shared.is_none() {
        own_directory(&wanted.item.name)?;
    }
    let unpacking = Unpacking {
        mode: extraction.mode.clone(),
        below: String::new(),
        limits: extraction.limits,
    };
    let work = Work::new(wanted, order, unpacking)?;
    if let Some(staging) = shared {
        // An optional one must be whole before it is put among others.
        let is_streamed = wanted.class == Class::Required;
        let extracted = into(
            wanted,
            work,
            staging,
            &extraction.directory,
            is_streamed,
            progress,
        )
        .await?;
        return Ok((extracted, None));
    }
    let mut tries = 0;
    loop {
        tries += 1;
        let target = extraction.target(wanted);
        let staging = Arc::new(extraction.staging(target, Existing::Replace).await?);
        match into(
            wanted,
            work.clone(),
            &staging,
            &extraction.directory,
            true,
            progress,
        )
        .await
        {
            Ok(extracted) => return Ok((extracted, Arc::into_inner(staging))),
            Err(error) if is_worth_another_try(wanted, &error, tries) => {
                tracing::debug!(%error, "downloading it again");
            }
            Err(error) => return Err(error),
        }
    }
}

async fn into(
    wanted: &Wanted,
    work: Work,
    staging: &Arc<Staging>,
    directory: &Path,
    is_streamed: bool,
    progress: &Arc<Progress>,
) -> Result<Extracted, CollectionError> {
    let staging = Arc::clone(staging);
    if is_streamed && work.format != Format::Zip {
        let unpacking = through(wanted, progress, move |bytes| work.unpack(bytes, &staging));
        let (unpacked, digest) = unpacking.await?;
        return Ok(Extracted { digest, unpacked });
    }
    // Where the archive is unpacked, there is room for it.
    let (room, path) = (Arc::clone(&staging), directory.to_owned());
    let room = blocking(directory, move || Ok(Directory::opened(path, room.room()?))).await?;
    let (mut file, digest) = spool(wanted, &room, progress).await?;
    let unpacking = tokio::task::spawn_blocking(move || {
        let file = file.rewound().map_err(CollectionError::stopped)?;
        work.unpack_file(file, &staging)
    });
    let unpacked = unpacking.await.map_err(CollectionError::stopped)??;
    Ok(Extracted { digest, unpacked })
}

/// Where the members of one archive go, in a [`Staging`] of the caller's.
#[derive(Debug, Clone)]
pub(crate) struct Unpacking {
    /// Where members go.
    pub(crate) mode: Mode,
    /// The directory that all of them go below; empty for the staging directory itself.
    pub(crate) below: String,
    /// How much it may ask for.
    pub(crate) limits: Limits,
}

/// Downloads an archive, verifies it, and then unpacks it into a directory of the caller's. `order` is its place among
/// those of this directory. Gives the digest of the archive's bytes.
///
/// # Errors
/// When it cannot be read, is not what its checksum says, twice, or cannot be unpacked.
pub(crate) async fn unpack_into(
    wanted: &Wanted,
    order: u32,
    unpacking: Unpacking,
    staging: &Arc<Staging>,
) -> Result<Digest, CollectionError> {
    let work = Work::new(wanted, order, unpacking)?;
    let room = Path::new(&wanted.item.name);
    into(wanted, work, staging, room, false, &Arc::default())
        .await
        .map(|extracted| extracted.digest)
}

/// Downloads a file as it is, and verifies it, into a directory of the caller's, under its own name.
///
/// # Errors
/// As [`unpack_into`].
pub(crate) async fn save_into(
    wanted: &Wanted,
    order: u32,
    name: &ExecPath,
    staging: &Arc<Staging>,
) -> Result<Digest, CollectionError> {
    let path = Path::new(&wanted.item.name);
    let room = Arc::clone(staging);
    let room = blocking(path, move || Ok(Directory::opened(PathBuf::new(), room.room()?))).await?;
    let (file, digest) = spool(wanted, &room, &Arc::default()).await?;
    let (staging, shown, name) = (Arc::clone(staging), wanted.address(), name.clone());
    let content = OutputContent::Blob(digest.clone());
    let adopted = tokio::task::spawn_blocking(move || {
        staging.adopt((&shown, order), &name, content, |directory, name| {
            file.publish_in(&directory, name)
        })
    });
    adopted.await.map_err(CollectionError::stopped)??;
    Ok(digest)
}

/// What a thread needs to unpack.
#[derive(Clone)]
struct Work {
    name: String,
    order: u32,
    format: Format,
    unpacking: Unpacking,
}

impl Work {
    fn new(wanted: &Wanted, order: u32, unpacking: Unpacking) -> Result<Self, CollectionError> {
        Ok(Self {
            name: wanted.address(),
            order,
            format: wanted.format.ok_or_else(|| CollectionError::NoArchive {
                name: wanted.item.name.clone(),
            })?,
            unpacking,
        })
    }

    fn archive(&self) -> Archive<'_> {
        Archive {
            name: &self.name,
            order: self.order,
            format: self.format,
            mode: &self.unpacking.mode,
            below: &self.unpacking.below,
            limits: &self.unpacking.limits,
        }
    }

    fn unpack(&self, bytes: &mut Outlet, staging: &Staging) -> Result<Unpacked, CollectionError> {
        Ok(unpack(bytes, &self.archive(), staging)?)
    }

    fn unpack_file(&self, file: &mut std::fs::File, staging: &Staging) -> Result<Unpacked, CollectionError> {
        Ok(match self.format {
            Format::Zip => unpack_zip(file, &self.archive(), staging)?,
            _ => unpack(file, &self.archive(), staging)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_called_as_its_archive_without_the_ending() {
        for (name, expected) in [
            ("blas_lib_gfx942:xnack+.tar.zst", "blas_lib_gfx942:xnack+"),
            ("rocm-7.1.0.TAR.xz", "rocm-7.1.0"),
            ("a.tgz", "a"),
            ("a.tar", "a"),
            ("outputs.zip", "outputs"),
            ("ä.zip", "ä"),
            (".tar.gz", ".tar"),
        ] {
            assert_eq!(stem(name), expected, "{name}");
        }
    }

    #[test]
    fn no_archive_replaces_what_is_not_a_directory_of_its_name() {
        for name in [
            "...tar",
            "...tar.gz",
            "..zip",
            "...zip",
            ".zip",
            ".tar.gz",
            ".git.zip",
            ".outhaul.tar",
            ".OUTHAUL-tmp.tgz",
            "a/b.tar",
            "a\0.tar",
        ] {
            let refused = own_directory(name);
            assert!(
                matches!(refused, Err(CollectionError::NoDirectory { .. })),
                "{name}"
            );
        }
        for (name, expected) in [("a..tar", "a."), ("a.git.zip", "a.git"), ("a..b.zip", "a..b")] {
            assert_eq!(own_directory(name).ok(), Some(expected));
        }
    }
}
