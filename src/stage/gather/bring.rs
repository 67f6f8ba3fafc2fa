//! Brings files and what is in archives: beside everything else first, then by rename.

use std::{
    collections::{BTreeMap, HashSet},
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::Path,
    sync::Arc,
};

use futures::{StreamExt as _, stream};
use tokio::task::spawn_blocking;

use super::{
    Gather, Got, Source,
    present::{clash, contradiction},
};
use crate::{
    archive::{Existing, Limits, Listable, Listed, Mode, OnConflict, Staging, StagingOptions},
    collection::{CollectionError, Unpacking, Wanted, save_into, unpack_into},
    digest::Digest,
    exec_path::ExecPath,
    output::{Class, OutputContent, STAMP_AGE, Stamp},
    stage::{
        destination::Destination, ended::Brought, error::StageError, marker, select::Artifact,
        together::Together,
    },
    units::now_ns,
};

impl Gather {
    /// Brings what has not come to its end: all that is required, as a whole, or all that is optional, each for itself. What
    /// befalls a file is its end. An error is also the end of all that is optional and has none yet.
    ///
    /// # Errors
    /// When nothing can be written into the directory, or a thread panicked.
    pub(in crate::stage) async fn bring(
        &mut self,
        class: Class,
        destination: &Destination,
        together: &Arc<Together>,
    ) -> Result<(), StageError> {
        let is_due = |source: &&Source| source.end.is_none() && source.wanted.class == class;
        let todo = (0_u32..).zip(&self.sources).filter(|(_, source)| is_due(source));
        let limits = self.how.limits;
        let todo: Vec<Fetch> = todo
            .map(|(order, source)| Fetch::new(order, source, limits))
            .collect();
        let orders: Vec<u32> = todo.iter().map(|fetch| fetch.order).collect();
        if class == Class::Required {
            if !todo.is_empty() {
                self.bring_together(todo, destination, together).await?;
            }
            self.record_stamps(&orders).await;
            self.keep_optional();
            return Ok(());
        }
        let brought = self.bring_each(todo, destination, together).await;
        self.record_stamps(&orders).await;
        if let Err(error) = &brought {
            let reason = destination.named(&error.to_string());
            for source in self.sources.iter_mut().filter(|source| source.end.is_none()) {
                source.end = Some(Err(reason.clone()));
            }
        }
        brought
    }

    /// Brings several files, each for itself.
    async fn bring_each(
        &mut self,
        todo: Vec<Fetch>,
        destination: &Destination,
        together: &Arc<Together>,
    ) -> Result<(), StageError> {
        let listable = &self.listable.clone();
        let mut running = stream::iter(todo)
            .map(|fetch| async move {
                let staging = Arc::new(staging(destination, listable).await?);
                Ok::<_, StageError>((fetch.run(&staging).await, staging))
            })
            .buffer_unordered(self.how.jobs);
        while let Some(ended) = running.next().await {
            let (one, staging) = ended?;
            self.settle(vec![one], staging, destination, together).await?;
        }
        Ok(())
    }

    /// Brings several files as a whole.
    async fn bring_together(
        &mut self,
        todo: Vec<Fetch>,
        destination: &Destination,
        together: &Arc<Together>,
    ) -> Result<(), StageError> {
        let staging = Arc::new(staging(destination, &self.listable).await?);
        let mut brought = Vec::new();
        let mut running = stream::iter(todo)
            .map(|fetch| fetch.run_in(Arc::clone(&staging)))
            .buffer_unordered(self.how.jobs);
        while let Some(one) = running.next().await {
            let has_failed = one.1.is_err();
            brought.push(one);
            if has_failed {
                break;
            }
        }
        // Only one who has it alone can publish it.
        drop(running);
        self.settle(brought, staging, destination, together).await
    }

    /// Waits until stamps are old enough to be recorded, once for all of these: see [`Stamp::recorded_at`].
    async fn record_stamps(&mut self, orders: &[u32]) {
        let is_there = |order: &u32| matches!(self.end_of(*order), Some(Ok(_)));
        if !orders.iter().any(is_there) {
            return;
        }
        tokio::time::sleep(STAMP_AGE).await;
        let now = now_ns();
        for order in orders {
            if let Some(source) = self.sources.get_mut(*order as usize)
                && let Some(Ok(got)) = &mut source.end
            {
                let files = std::mem::take(&mut got.files).into_iter();
                got.files = files.map(|file| file.recorded_at(now)).collect();
            }
        }
    }

    /// Gives what was brought its place, if all of it is there and nothing else has it.
    async fn settle(
        &mut self,
        brought: Vec<Brief>,
        staging: Arc<Staging>,
        destination: &Destination,
        together: &Arc<Together>,
    ) -> Result<(), StageError> {
        let mut digests = BTreeMap::new();
        let mut failed = Vec::new();
        for (order, ended) in brought {
            match ended {
                Ok(digest) => {
                    digests.insert(order, digest);
                }
                Err(error) => failed.push((order, error)),
            }
        }
        let (listed, staging) = self.look(staging, &mut failed).await?;
        if !failed.is_empty() {
            // What is with it is not there either; it stays without an end.
            let _ = spawn_blocking(move || drop(staging)).await;
            for (order, error) in failed {
                self.end(order, Err(destination.named(&error)));
            }
            return Ok(());
        }
        let (listed, published) = self.publish(listed, staging, destination, together).await?;
        let stamps = match published {
            Ok(stamps) => stamps,
            Err(error) => {
                // It is reported once: nothing of all these is known to be there.
                if let Some(order) = digests.keys().next() {
                    self.end(*order, Err(destination.named(&error.to_string())));
                }
                return Ok(());
            }
        };
        for (order, digest) in digests {
            let (outcome, files) = (Brought::Downloaded, Vec::new());
            self.end(
                order,
                Ok(Got {
                    outcome,
                    digest,
                    files,
                }),
            );
        }
        self.listable.hold(listed.len() as u64);
        for (one, stamp) in listed.into_iter().zip(stamps) {
            let Some(source) = self.sources.get_mut(one.order as usize) else {
                continue;
            };
            let owner = (one.content.clone(), source.name.to_string());
            self.taken.insert(one.path.to_string(), owner);
            let file = source.file(one, stamp);
            if let Some(Ok(got)) = &mut source.end {
                got.files.push(file);
            }
        }
        Ok(())
    }

    /// What was unpacked. What of it cannot be beside what is there is added to `failed`.
    async fn look(
        &mut self,
        staging: Arc<Staging>,
        failed: &mut Vec<(u32, String)>,
    ) -> Result<(Vec<Listed>, Arc<Staging>), StageError> {
        let taken = std::mem::take(&mut self.taken);
        // There may be millions.
        let looked = spawn_blocking(move || {
            let listed = staging.listed();
            let clashes = listed.iter().filter_map(|one| {
                let owner = clash(&taken, one.path.as_str(), &one.content)?;
                Some((one.order, contradiction(one.path.as_str(), owner)))
            });
            let clashes: Vec<_> = clashes.collect();
            (listed, clashes, staging, taken)
        });
        let looked = looked.await.map_err(|e| StageError::Internal(e.to_string()))?;
        let (listed, clashes, staging, taken) = looked;
        self.taken = taken;
        failed.extend(clashes);
        Ok((listed, staging))
    }

    fn end_of(&self, order: u32) -> Option<&Result<Got, String>> {
        self.sources.get(order as usize)?.end.as_ref()
    }

    fn end(&mut self, order: u32, end: Result<Got, String>) {
        if let Some(source) = self.sources.get_mut(order as usize) {
            source.end = Some(end);
        }
    }

    /// Renames everything into the directory, and looks at it. An error is why it cannot be put there.
    async fn publish(
        &mut self,
        listed: Vec<Listed>,
        staging: Arc<Staging>,
        destination: &Destination,
        together: &Arc<Together>,
    ) -> Result<(Vec<Listed>, Result<Vec<Option<Stamp>>, StageError>), StageError> {
        let (together, directory) = (Arc::clone(together), destination.path());
        let fd = Arc::clone(&destination.fd);
        let published = spawn_blocking(move || {
            let names: HashSet<String> = listed.iter().map(|one| one.path.to_string()).collect();
            let names = Arc::new(names);
            together.join(&names);
            let stamps = put(&listed, staging, &directory, &fd);
            (names, listed, stamps)
        });
        let published = published.await.map_err(|e| StageError::Internal(e.to_string()))?;
        let (names, listed, stamps) = published;
        self.names.push(names);
        Ok((listed, stamps))
    }
}

/// Makes way for what was unpacked, renames it into the directory, and looks at it. Blocks.
fn put(
    listed: &[Listed],
    staging: Arc<Staging>,
    directory: &Path,
    fd: &OwnedFd,
) -> Result<Vec<Option<Stamp>>, StageError> {
    let is_directory = |one: &&Listed| one.content == OutputContent::Directory;
    let (directories, files): (Vec<&Listed>, Vec<&Listed>) = listed.iter().partition(is_directory);
    let paths =
        |list: Vec<&Listed>| -> HashSet<String> { list.iter().map(|one| one.path.to_string()).collect() };
    marker::make_way(directory, &paths(files), &paths(directories))?;
    let unpacking = || StageError::Internal("it is still being unpacked".to_owned());
    let staging = Arc::into_inner(staging).ok_or_else(unpacking)?;
    staging.publish_into(fd).map_err(CollectionError::from)?;
    Ok(listed.iter().map(|one| stamp(directory, one)).collect())
}

/// What `lstat` says of a file that was just put there; `None` if another one is there now, or it is not a file. Blocks.
fn stamp(directory: &Path, one: &Listed) -> Option<Stamp> {
    let OutputContent::Blob(digest) = &one.content else {
        return None;
    };
    // No later than the look: see `Stamp::recorded_at`.
    let taken_ns = now_ns();
    let now = directory.join(one.path.as_path()).symlink_metadata().ok()?;
    let nanoseconds = |seconds: i64, rest: i64| seconds.saturating_mul(1_000_000_000).saturating_add(rest);
    (now.is_file() && now.ino() == one.inode && now.len() == digest.size()).then(|| Stamp {
        size: now.len(),
        mtime_ns: nanoseconds(now.mtime(), now.mtime_nsec()),
        ctime_ns: nanoseconds(now.ctime(), now.ctime_nsec()),
        inode: now.ino(),
        device: now.dev(),
        taken_ns,
    })
}

/// A directory of ours in the destination.
async fn staging(destination: &Destination, listable: &Listable) -> Result<Staging, StageError> {
    let (path, fd) = (destination.real.clone(), Arc::clone(&destination.fd));
    let listable = listable.clone();
    let opened = spawn_blocking(move || {
        let options = StagingOptions {
            existing: Existing::Merge,
            on_conflict: OnConflict::Fail,
            unsafe_links: false,
            lists: true,
        };
        let staging = Staging::open(&path, options).map_err(CollectionError::from)?;
        staging.share(listable);
        // Another directory may have come into its place since it was judged.
        if !staging.is_beside(&fd) {
            return Err(StageError::Setting {
                flag: format!("--to={}", path.display()),
                reason: "it was replaced by another directory".to_owned(),
            });
        }
        Ok(staging)
    });
    opened.await.map_err(|e| StageError::Internal(e.to_string()))?
}

/// How a download ended: its place among the sources, and the digest or why it failed.
type Brief = (u32, Result<Digest, String>);

/// What is needed to bring a file.
struct Fetch {
    order: u32,
    wanted: Wanted,
    name: ExecPath,
    place: String,
    mode: Option<Mode>,
    limits: Limits,
}

impl Fetch {
    fn new(order: u32, source: &Source, limits: Limits) -> Self {
        Self {
            order,
            wanted: source.wanted.clone(),
            name: source.name.clone(),
            place: source.place.clone(),
            mode: source.mode.clone(),
            limits,
        }
    }

    async fn run_in(self, staging: Arc<Staging>) -> Brief {
        self.run(&staging).await
    }

    async fn run(self, staging: &Arc<Staging>) -> Brief {
        let done = match self.mode {
            Some(mode) => {
                let unpacking = Unpacking {
                    mode,
                    below: self.place,
                    limits: self.limits,
                };
                unpack_into(&self.wanted, self.order, unpacking, staging).await
            }
            None => save_into(&self.wanted, self.order, &self.name, staging).await,
        };
        (self.order, done.map_err(|e| e.to_string()))
    }
}

impl Source {
    /// One of its files, for the marker.
    fn file(&self, one: Listed, stamp: Option<Stamp>) -> marker::File {
        let artifact = Artifact {
            label: Arc::clone(&self.label),
            aspect: Arc::clone(&self.aspect),
            group: Arc::clone(&self.group),
            exec_path: self.name.clone(),
            content: one.content,
            class: self.wanted.class,
            place: one.path,
        };
        let etag = self.tag().filter(|_| self.mode.is_none());
        let mut file = marker::File::new(&artifact, stamp);
        file.etag = etag;
        file
    }
}
