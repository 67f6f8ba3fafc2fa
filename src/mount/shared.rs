//! What all that serve the mount have in common.

use std::{
    fmt::Write as _,
    path::PathBuf,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use tokio::sync::Semaphore;

use super::{
    catalog::{Catalog, Slot},
    report::Report,
    store::{Blob, Store},
    tree::{Node, Tree, What},
};
use crate::{
    exec_path::ExecPath,
    remote::Attribution,
    sources::Sources,
    units::{show_count, show_size},
};

/// How many directories' files may be fetched ahead at a time.
const AHEAD: usize = 4;

pub(super) struct Shared {
    pub(super) catalog: Catalog,
    pub(super) store: Arc<Store>,
    pub(super) sources: Sources,
    pub(super) report: Report,
    /// How long a reader waits at most.
    pub(super) timeout: Duration,
    pub(super) at: PathBuf,
    /// Whether the kernel's questions are answered, from when they are.
    pub(super) is_running: AtomicBool,
    /// Places for directories whose files are fetched ahead of readers; none where nothing is.
    pub(super) ahead: Arc<Semaphore>,
}

impl Shared {
    pub(super) fn new(
        catalog: Catalog,
        store: Arc<Store>,
        sources: Sources,
        timeout: Duration,
        at: PathBuf,
        prefetch: bool,
    ) -> Self {
        Self {
            catalog,
            store,
            sources,
            report: Report::default(),
            timeout,
            at,
            is_running: AtomicBool::new(false),
            ahead: Arc::new(Semaphore::new(if prefetch { AHEAD } else { 0 })),
        }
    }

    /// A build's file, and where its bytes are.
    pub(super) fn blob(&self, slot: &Slot, tree: &Tree, node: Node) -> Option<Blob> {
        let What::File(digest) = tree.what(node)? else {
            return None;
        };
        let build = &slot.build;
        let cache = if build.is_from_elsewhere {
            self.sources
                .of_import(&build.remote_cache, &build.remote_instance_name)
        } else {
            self.sources
                .of_record(&build.remote_cache, &build.remote_instance_name)
        };
        let mut root = PathBuf::from(&build.exec_root);
        if root.starts_with(&self.at) {
            // Made up by somebody: a file would wait for itself.
            root = PathBuf::new();
        }
        Some(Blob {
            digest: digest.clone(),
            cache: cache.map_err(|e| e.to_string()),
            tree: root.into(),
            path: ExecPath::new(&tree.path(node)).ok()?,
            mount: self.at.as_path().into(),
            attribution: Arc::new(Attribution {
                invocation_id: build.id.clone(),
                ..Attribution::default()
            }),
        })
    }

    /// What the status file says.
    pub(super) fn status(&self) -> String {
        let (builds, loaded, nodes) = self.catalog.counts();
        let (used, bound) = self.store.filled();
        let mut text = String::new();
        let _ = writeln!(text, "mounted on: {}", self.at.display());
        let _ = writeln!(
            text,
            "store: {}, {} of {}",
            self.store.directory().display(),
            show_size(used),
            show_size(bound)
        );
        let _ = writeln!(
            text,
            "builds: {builds}, {loaded} of them in memory with {} files, links and directories",
            show_count(nodes as u64)
        );
        text + &self.report.text()
    }
}
