//! A read-only directory of recorded builds, over FUSE.
//!
//! Names, sizes and links are shown at once for all that is recorded; bytes are fetched, verified and kept in a store of
//! limited size when somebody opens a file, and before for what the newest builds were asked for. No build depends on it.
//!
//! | file | what it is about |
//! |---|---|
//! | `catalog` | which builds there are, under which names |
//! | `tree` | the outputs of one build, in little memory |
//! | `store`, `shelf` | blobs on this disk: fetched, verified; which ones make way |
//! | `prefetch` | what is fetched before it is read |
//! | `filesystem`, `interrupt` | what the kernel asks; readers that give up |
//! | `life` | where a mount may be, and how it ends |
//! | `report` | who waits, what failed and why |

mod catalog;
mod error;
mod filesystem;
mod interrupt;
mod life;
mod prefetch;
mod report;
mod shared;
mod shelf;
mod store;
#[cfg(test)]
mod tests;
mod tree;

use std::{
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use fuser::{Config, MountOption, Session, SessionACL};
use tokio::{sync::oneshot, task::AbortHandle};
use tokio_util::sync::CancellationToken;

use self::{catalog::Catalog, filesystem::Mounted, life::Ours, shared::Shared, store::Store};
pub(crate) use self::{
    catalog::{Build, PATIENCE, Rows, TREE_PATIENCE},
    error::{EndError, MountError, Unread},
    tree::{Content, TreeBuilder},
};
use crate::{
    materialize::MaterializeOptions,
    sources::{SourceRule, Sources},
};

/// Threads that answer the kernel.
const THREADS: usize = 4;

/// How long the threads may take to notice that nothing is mounted any more.
const LEAVING: Duration = Duration::from_secs(1);

/// How long it may take to unmount.
const DETACHING: Duration = Duration::from_secs(10);

/// How to mount.
pub(crate) struct MountOptions {
    /// Where.
    pub(crate) directory: PathBuf,
    /// Where blobs are kept.
    pub(crate) store: PathBuf,
    /// What else must not be hidden by the mount: the directory and the socket that builds are recorded in and asked for.
    pub(crate) needed: Vec<PathBuf>,
    /// How many bytes of them.
    pub(crate) store_bytes: u64,
    /// How long a reader waits for a file at most.
    pub(crate) timeout: Duration,
    /// Whether other users may read.
    pub(crate) allow_other: bool,
    /// Whether what the newest builds were asked for is fetched before it is read.
    pub(crate) prefetch: bool,
    /// Which caches bytes come from.
    pub(crate) source: SourceRule,
    /// How they come to disk.
    pub(crate) materialize: MaterializeOptions,
}

/// Recorded builds, mounted.
pub(crate) struct Mount {
    at: PathBuf,
    shared: Arc<Shared>,
    /// None once it has ended.
    ended: Option<oneshot::Receiver<()>>,
    /// Why its threads have ended, if they could not even begin.
    failed: oneshot::Receiver<std::io::Error>,
    ours: Ours,
    prefetching: Option<AbortHandle>,
}

impl Mount {
    /// Mounts, and answers on the current tokio runtime.
    ///
    /// # Errors
    /// When nothing can be mounted there, or the store cannot be used.
    pub(crate) async fn start(options: MountOptions, rows: Arc<dyn Rows>) -> Result<Self, MountError> {
        let internal = |error: tokio::task::JoinError| MountError::Directory {
            at: options.directory.clone(),
            source: std::io::Error::other(error),
        };
        let (directory, needed) = (options.directory.clone(), options.needed.clone());
        let (path, bound, materialize) = (options.store.clone(), options.store_bytes, options.materialize);
        // A directory on a server that does not answer, or a store of very many files, takes its time.
        let prepared = tokio::task::spawn_blocking(move || {
            life::hides_nothing(&directory, &path, &needed)?;
            let at = life::prepare(&directory)?;
            Ok::<_, MountError>((at, Store::open(&path, bound, materialize)?))
        });
        let (at, store) = prepared.await.map_err(internal)??;
        let shared = Arc::new(Shared::new(
            Catalog::new(rows),
            store,
            Sources::new(options.source),
            options.timeout,
            at.clone(),
            options.prefetch,
        ));
        let (sender, ended) = oneshot::channel();
        let filesystem = Mounted::new(shared.clone(), sender);
        let (place, allow_other) = (at.clone(), options.allow_other);
        // The kernel may ask before this returns.
        let session = tokio::task::spawn_blocking(move || session(filesystem, &place, allow_other)).await;
        let (session, ours) = session.map_err(internal)??;
        let (failing, failed) = oneshot::channel();
        let of_thread = shared.clone();
        let started = std::thread::Builder::new()
            .name("mount".to_owned())
            .spawn(move || {
                of_thread.is_running.store(true, Ordering::Release);
                if let Err(error) = session.run() {
                    let _ = failing.send(error);
                }
            });
        started.map_err(|source| MountError::Directory {
            at: at.clone(),
            source,
        })?;
        let prefetching = options.prefetch.then(|| {
            let task = tokio::spawn(prefetch::newest(shared.clone()));
            task.abort_handle()
        });
        Ok(Self {
            at,
            shared,
            ended: Some(ended),
            failed,
            ours,
            prefetching,
        })
    }

    /// Where it is mounted.
    pub(crate) fn at(&self) -> &Path {
        &self.at
    }

    /// Ends when somebody else has unmounted it.
    ///
    /// # Errors
    /// When the kernel's questions could not be read any more.
    pub(crate) async fn unmounted(&mut self) -> Result<(), EndError> {
        let Some(ended) = &mut self.ended else {
            return Ok(());
        };
        let was_told = ended.await.is_ok();
        self.ended = None;
        if self.ours.is_closed() {
            return Ok(());
        }
        let reason = if was_told {
            None
        } else {
            (&mut self.failed).await.ok()
        };
        Err(EndError::Connection(reason.map(|error| error.to_string())))
    }

    /// Unmounts, even if it is still in use. What others have mounted there since stays. With `at_once`, nothing but that is
    /// waited for.
    ///
    /// # Errors
    /// When the mount stays.
    pub(crate) async fn end(self, at_once: CancellationToken) -> Result<(), EndError> {
        let Self { ours, shared, .. } = self;
        if let Some(task) = self.prefetching {
            task.abort();
        }
        let detached = tokio::task::spawn_blocking(move || ours.detach());
        let detached = tokio::time::timeout(DETACHING, detached).await;
        let closed = async {
            shared.store.close().await;
            if let Some(ended) = self.ended {
                let _ = tokio::time::timeout(LEAVING, ended).await;
            }
        };
        let _ = at_once.run_until_cancelled(closed).await;
        let reason = match detached {
            Ok(Ok(detached)) => return detached,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it takes too long".to_owned(),
        };
        Err(EndError::Refused { at: self.at, reason })
    }
}

fn session(
    filesystem: Mounted,
    at: &Path,
    allow_other: bool,
) -> Result<(Session<Mounted>, Ours), MountError> {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("outhaul".to_owned()),
        MountOption::Subtype("outhaul".to_owned()),
        MountOption::DefaultPermissions,
        MountOption::RO,
        MountOption::NoSuid,
        MountOption::NoDev,
    ];
    config.acl = if allow_other {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    config.n_threads = Some(THREADS);
    config.clone_fd = true;
    let refused = |error: std::io::Error| life::refusal(at, &error, allow_other);
    let session = Session::new(filesystem, at, &config).map_err(refused)?;
    let connection = session.as_fd().try_clone_to_owned().map_err(refused)?;
    Ok((session, Ours::new(at, connection)))
}
