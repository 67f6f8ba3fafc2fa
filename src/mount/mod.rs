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
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use fuser::{Config, MountOption, Session, SessionACL, SessionUnmounter};
use tokio::{sync::oneshot, task::AbortHandle};

use self::{catalog::Catalog, filesystem::Mounted, shared::Shared, store::Store};
pub(crate) use self::{
    catalog::{Build, Rows},
    error::MountError,
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

/// How to mount.
pub(crate) struct MountOptions {
    /// Where.
    pub(crate) directory: PathBuf,
    /// Where blobs are kept.
    pub(crate) store: PathBuf,
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
    ended: Option<oneshot::Receiver<std::io::Result<()>>>,
    unmounter: SessionUnmounter,
    prefetching: Option<AbortHandle>,
}

impl Mount {
    /// Mounts, and answers on the current tokio runtime.
    ///
    /// # Errors
    /// When nothing can be mounted there, or the store cannot be used.
    pub(crate) async fn start(options: MountOptions, rows: Arc<dyn Rows>) -> Result<Self, MountError> {
        let directory = options.directory.clone();
        let internal = |error: tokio::task::JoinError| MountError::Directory {
            at: options.directory.clone(),
            source: std::io::Error::other(error),
        };
        let prepared = tokio::task::spawn_blocking(move || life::prepare(&directory)).await;
        let at = prepared.map_err(internal)??;
        let store = Store::open(&options.store, options.store_bytes, options.materialize)?;
        let shared = Arc::new(Shared::new(
            Catalog::new(rows),
            store,
            Sources::new(options.source),
            options.timeout,
            at.clone(),
            options.prefetch,
        ));
        let filesystem = Mounted::new(shared.clone());
        let (place, allow_other) = (at.clone(), options.allow_other);
        // The kernel may ask before this returns.
        let session = tokio::task::spawn_blocking(move || session(filesystem, &place, allow_other)).await;
        let mut session = session.map_err(internal)??;
        let unmounter = session.unmount_callable();
        let (sender, ended) = oneshot::channel();
        let started = std::thread::Builder::new()
            .name("mount".to_owned())
            .spawn(move || {
                let _ = sender.send(session.run());
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
            unmounter,
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
    /// In words, when the kernel's questions could not be read any more.
    pub(crate) async fn unmounted(&mut self) -> Result<(), String> {
        let Some(ended) = &mut self.ended else {
            return Ok(());
        };
        let end = ended.await;
        self.ended = None;
        match end {
            Ok(Ok(())) | Err(_) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
        }
    }

    /// Unmounts, whoever still uses it.
    ///
    /// # Errors
    /// In words, when the mount stays.
    pub(crate) async fn end(self) -> Result<(), String> {
        let Self {
            at, mut unmounter, ..
        } = self;
        if let Some(task) = self.prefetching {
            task.abort();
        }
        // The session would unmount once more at its end, whatever is mounted there by then.
        let detached = tokio::task::spawn_blocking(move || match unmounter.unmount() {
            Ok(()) => Ok(()),
            Err(_) => life::detach(&at),
        });
        let detached = detached.await;
        self.shared.store.close().await;
        if let Some(ended) = self.ended {
            let _ = tokio::time::timeout(LEAVING, ended).await;
        }
        detached.unwrap_or_else(|error| Err(error.to_string()))
    }
}

fn session(filesystem: Mounted, at: &Path, allow_other: bool) -> Result<Session<Mounted>, MountError> {
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
    Session::new(filesystem, at, &config).map_err(|error| life::refusal(at, &error, allow_other))
}
