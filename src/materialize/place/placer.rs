//! Placing batches of small files.

use std::sync::Arc;

use rustix::io::Errno;

use super::{
    dirs::DirCache,
    epoch::Epoch,
    error::PlaceError,
    item::{How, Item, Placed},
    options::PlaceOptions,
    promised::Promised,
    publish::{Job, NewFile, Site},
    root::OutputRoot,
    spot::Spot,
    staging,
    sys::{self, Dir},
    walk,
    writable::Writable,
};
use crate::{digest::Digest, exec_path::ExecPath};

/// How many files are worth a staging directory: the directory's rename costs about as much as their links.
const STAGED: usize = 6;

/// Places files in one root. Belongs to one thread; the threads of a root share its [`OutputRoot`] and [`Epoch`].
pub struct Placer {
    pub(super) root: Arc<OutputRoot>,
    pub(super) options: PlaceOptions,
    /// For checks only.
    pub(super) dirs: DirCache,
    /// For reading files.
    pub(super) buffer: Vec<u8>,
    /// How many files are worth a staging directory.
    pub(super) staged: usize,
}

/// A directory that files go into.
enum Destination {
    /// It is there.
    Live(Arc<Dir>),
    /// It is not, but what it lies in is.
    New(Spot),
}

impl Placer {
    /// A placer for a root.
    pub fn new(root: Arc<OutputRoot>, options: PlaceOptions) -> Self {
        Self {
            root,
            options,
            dirs: DirCache::default(),
            buffer: Vec::new(),
            staged: STAGED,
        }
    }

    /// The root that it places files in.
    pub const fn root(&self) -> &Arc<OutputRoot> {
        &self.root
    }

    /// For reserving space. Writes that reserve nothing take space all the same.
    pub(in crate::materialize) fn promised(&self) -> Promised {
        Promised::new(Arc::clone(&self.root))
    }

    /// Asks for space for one file.
    pub(in crate::materialize) fn promise(
        &self,
        path: &ExecPath,
        is_optional: bool,
        bytes: u64,
    ) -> Result<Promised, PlaceError> {
        let mut promised = self.promised();
        promised.ask(self.options.space, is_optional, bytes, path.as_str())?;
        Ok(promised)
    }

    /// Verifies and places files. Every item gets its own answer, in the items' order. Items of one directory belong
    /// together: they are looked up once, and fill a directory that did not exist before all at once.
    ///
    /// # Errors
    /// Per item: when its bytes do not match its digest, a newer invocation has begun, the root is gone, a link leads
    /// out of it, something that may not be removed is in the way, or the system fails.
    pub fn place_many(
        &mut self,
        items: &[Item<'_>],
        epoch: &Epoch,
        version: u64,
    ) -> Vec<Result<Placed, PlaceError>> {
        let _working = epoch.working();
        self.root.learn_modes();
        let mut results = Vec::with_capacity(items.len());
        for group in items.chunk_by(|a, b| a.path.parent() == b.path.parent()) {
            self.place_group(group, epoch, version, &mut results);
        }
        results
    }

    pub(super) fn job<'a>(&'a self, epoch: &'a Epoch, version: u64) -> Job<'a> {
        Job {
            root: &self.root,
            options: self.options,
            epoch,
            version,
        }
    }

    /// Places the items of one directory.
    fn place_group(
        &mut self,
        items: &[Item<'_>],
        epoch: &Epoch,
        version: u64,
        results: &mut Vec<Result<Placed, PlaceError>>,
    ) {
        // `None` is still to be placed.
        let mut answers: Vec<Option<Result<Placed, PlaceError>>> =
            items.iter().map(|item| verify(item).err().map(Err)).collect();
        let mut buffer = std::mem::take(&mut self.buffer);
        let job = self.job(epoch, version);
        // Somebody may remove the directory while we work in it: then once more, which says if it was a `clean`.
        for is_last in [false, true] {
            if answers.iter().all(Option::is_some) {
                break;
            }
            place_open(&job, items, &mut answers, &mut buffer, self.staged, is_last);
        }
        self.buffer = buffer;
        results.extend(items.iter().zip(answers).map(|(item, answer)| {
            answer.unwrap_or_else(|| {
                Err(PlaceError::system_error(
                    "place",
                    item.path.as_str(),
                    Errno::NOENT,
                ))
            })
        }));
    }
}

/// Places the items of one directory that have no answer yet. When the directory vanishes, those that it took with it
/// stay without one, unless this is the last time.
fn place_open(
    job: &Job<'_>,
    items: &[Item<'_>],
    answers: &mut [Option<Result<Placed, PlaceError>>],
    buffer: &mut Vec<u8>,
    staged: usize,
    is_last: bool,
) {
    let Some(first) = items.first() else { return };
    let dir = match destination(job, first.path, items.len() >= staged) {
        Ok(Destination::Live(dir)) => Ok(dir),
        Ok(Destination::New(spot)) => {
            staging::fill(job, &spot, items, answers);
            if answers.iter().all(Option::is_some) {
                return;
            }
            job.parent(first.path)
        }
        Err(error) => Err(error),
    };
    let open = answers
        .iter_mut()
        .zip(items)
        .filter(|(answer, _)| answer.is_none());
    match dir {
        Ok(dir) => {
            // Held for all of them, so that a read-only directory is opened once.
            let _open = Writable::open(&job.root.writable, &dir);
            for (answer, item) in open {
                let placed = place_one(job, item, &dir, buffer);
                let has_vanished = placed.as_ref().is_err_and(|e| e.is_errno(Errno::NOENT));
                if !has_vanished || is_last {
                    *answer = Some(placed);
                }
            }
        }
        Err(error) => {
            for (answer, item) in open {
                let path = item.path.as_path().to_owned();
                *answer = Some(Err(PlaceError {
                    path,
                    ..error.clone()
                }));
            }
        }
    }
}

/// Looks for the directory of a path, and makes what it lies in; the directory itself too, unless it is new and so many
/// files go into it that it is worth being filled out of sight.
fn destination(job: &Job<'_>, path: &ExecPath, stage: bool) -> Result<Destination, PlaceError> {
    let dir = path.parent().unwrap_or("");
    job.root.guard(path.as_str())?;
    let permit = job.permit(path)?;
    if let Ok(Some(dir)) = walk::find_dir(job.root, dir) {
        return Ok(Destination::Live(dir));
    }
    // The root's own directories are made in the one way that looks after `bazel-out`.
    let Some((above, name)) = dir.rsplit_once('/') else {
        return walk::make_dir(job.root, dir, &permit).map(Destination::Live);
    };
    let above = walk::make_dir(job.root, above, &permit)?;
    let error = |errno| PlaceError::system_error("stat", dir, errno);
    if !stage && let Some(dir) = walk::make_in(job.root, &above, name, &permit) {
        return Ok(Destination::Live(dir));
    }
    if above.through.is_empty() && sys::lstat(&above, name.as_ref()).map_err(error)?.is_none() {
        let name = name.into();
        return Ok(Destination::New(Spot { dir: above, name }));
    }
    walk::make_dir(job.root, dir, &permit).map(Destination::Live)
}

fn verify(item: &Item<'_>) -> Result<(), PlaceError> {
    let actual = Digest::of(item.digest.function(), item.bytes);
    if actual == *item.digest {
        Ok(())
    } else {
        Err(PlaceError::mismatch(
            item.path.as_str(),
            item.digest,
            Some(actual),
        ))
    }
}

/// Places one verified file in a directory that others may be using.
fn place_one(
    job: &Job<'_>,
    item: &Item<'_>,
    dir: &Arc<Dir>,
    buffer: &mut Vec<u8>,
) -> Result<Placed, PlaceError> {
    if item.is_new
        && dir.through.is_empty()
        && let Some(placed) = try_new(job, item, dir)?
    {
        return Ok(placed);
    }
    let site = Site::find(job, item.path, dir)?;
    if let Some(stamp) = site.is_already(job, item.digest, buffer)? {
        let how = How::Kept;
        return Ok(Placed { stamp, how });
    }
    let file = if site.seen.is_some() {
        NewFile::named(job.root, job.mode(item.path))?
    } else {
        NewFile::unnamed(job.root, &site.spot.dir, job.mode(item.path))?
    };
    sys::write_all(&file, item.bytes)
        .map_err(|errno| PlaceError::system_error("write", item.path.as_str(), errno))?;
    site.publish(job, item.digest, file)
}

/// Places one verified file where nothing is. `None` when something is there, or for any reason that the long way knows
/// better what to make of.
fn try_new(job: &Job<'_>, item: &Item<'_>, dir: &Arc<Dir>) -> Result<Option<Placed>, PlaceError> {
    let Ok(file) = NewFile::unnamed(job.root, dir, job.mode(item.path)) else {
        return Ok(None);
    };
    sys::write_all(&file, item.bytes)
        .map_err(|errno| PlaceError::system_error("write", item.path.as_str(), errno))?;
    let _permit = job.permit(item.path)?;
    Ok(file.publish_new(job.root, dir, item.path.file_name()))
}
