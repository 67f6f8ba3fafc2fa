//! Archives, unpacked while they come.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use futures::{StreamExt as _, stream};

use super::{
    CollectionError, Directory, Progress, Wanted,
    download::{blocking, spool},
    pipe::{Outlet, through},
};
use crate::{
    archive::{
        Archive, Existing, Format, Limits, Mode, OnConflict, Published, Staging, StagingOptions, Unpacked,
        unpack, unpack_zip,
    },
    digest::Digest,
    output::Class,
};

/// How archives are unpacked.
#[derive(Debug, Clone)]
pub struct Extraction {
    /// The directory for all of them. A file goes right into it if its archive was named itself or is flattened, otherwise
    /// into a directory in it with the archive's name.
    pub directory: PathBuf,
    /// Where members go.
    pub mode: Mode,
    /// What becomes of members of two archives with the same path.
    pub on_conflict: OnConflict,
    /// Whether symlinks may lead anywhere.
    pub unsafe_links: bool,
    /// How much one archive may ask for.
    pub limits: Limits,
    /// How many archives are downloaded at the same time.
    pub jobs: usize,
}

/// An archive that was unpacked.
#[derive(Debug, Clone)]
pub struct Extracted {
    /// The digest of the archive's bytes.
    pub digest: Digest,
    /// What was in it.
    pub unpacked: Unpacked,
}

/// How all ended.
#[derive(Debug)]
pub struct Extractions {
    /// Each archive's end, in the order in which they were given; `None` for those that were given up for another's sake.
    pub archives: Vec<Option<Result<Extracted, CollectionError>>>,
    /// What was published, by its directory; empty if anything that is required failed.
    pub published: Vec<(PathBuf, Result<Published, CollectionError>)>,
    /// Whether something failed without which nothing is published.
    is_lost: bool,
}

impl Extractions {
    /// Whether everything that is required is where it should be.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        !self.is_lost && self.published.iter().all(|(_, published)| published.is_ok())
    }
}

impl Extraction {
    /// Where an archive's members go.
    #[must_use]
    pub fn target(&self, wanted: &Wanted) -> PathBuf {
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
        };
        let opened = tokio::task::spawn_blocking(move || Staging::open(&target, options)).await;
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

/// Refuses archives that cannot be unpacked or that have one place, before anything is downloaded.
///
/// # Errors
/// Naming them.
pub fn check_places(wanted: &[Wanted], extraction: Option<&Extraction>) -> Result<(), CollectionError> {
    let mut places: BTreeMap<String, &Wanted> = BTreeMap::new();
    for one in wanted {
        let place = match extraction {
            None => one.item.name.clone(),
            Some(_) if one.format.is_none() => {
                let name = one.item.name.clone();
                return Err(CollectionError::NoArchive { name });
            }
            Some(extraction) if extraction.is_shared(one) => continue,
            Some(_) => stem(&one.item.name).to_owned(),
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
pub async fn extract(
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
            own.extend(staging.map(|staging| (extraction.target(one), staging)));
            // What was unpacked in part cannot be told from the rest.
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
        let shared = shared
            .and_then(Arc::into_inner)
            .map(|staging| (extraction.directory.clone(), staging));
        for (target, staging) in shared.into_iter().chain(own) {
            let done = tokio::task::spawn_blocking(move || staging.publish()).await;
            let done = done.map_err(CollectionError::stopped).and_then(|done| Ok(done?));
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
    let work = Work {
        name: wanted.address(),
        order,
        format: wanted.format.ok_or_else(|| CollectionError::NoArchive {
            name: wanted.item.name.clone(),
        })?,
        mode: extraction.mode.clone(),
        limits: extraction.limits,
    };
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
            Err(error) if tries == 1 && error.is_worth_another_try() => {
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
    // Where the staging directory is, there is room for it.
    let beside = directory.parent().unwrap_or(directory).to_owned();
    let beside = blocking(&beside.clone(), move || Directory::create(&beside)).await?;
    let (mut file, digest) = spool(wanted, &beside, progress).await?;
    let unpacking = tokio::task::spawn_blocking(move || {
        let file = file.rewound().map_err(CollectionError::stopped)?;
        work.unpack_file(file, &staging)
    });
    let unpacked = unpacking.await.map_err(CollectionError::stopped)??;
    Ok(Extracted { digest, unpacked })
}

/// What a thread needs to unpack.
#[derive(Clone)]
struct Work {
    name: String,
    order: u32,
    format: Format,
    mode: Mode,
    limits: Limits,
}

impl Work {
    fn archive(&self) -> Archive<'_> {
        Archive {
            name: &self.name,
            order: self.order,
            format: self.format,
            mode: &self.mode,
            limits: &self.limits,
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
}
