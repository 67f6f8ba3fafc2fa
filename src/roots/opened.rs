//! The open output roots: the handle that all builds of one share, and the beginning of a build in it.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use parking_lot::{Mutex, RwLock};
use rustix::io::Errno;
use tokio::task::spawn_blocking;

use super::rules::{Destination, RootRules, allowance};
use crate::{
    materialize::{
        Materializer, Root,
        place::{Epoch, Left, OutputRoot, PlaceError, is_allowed_open, is_allowed_root},
    },
    open_files::{self, Spare},
    record::{Holder, InvocationRow, Record, RootId},
};

/// What to do about a root that is not allowed.
const ADVICE: &str = "see --allow-exec-root and --path-map";

/// Judges a directory that has just been opened.
type Check<'a> = &'a dyn Fn(&OutputRoot) -> Result<(), RootError>;

/// Why an output root cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// The directory is not there, or cannot be opened.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// A rule forbids it, and what to do about that.
    #[error("{0}; {1}")]
    NotAllowed(PlaceError, &'static str),
    /// Bazel has its output base there, but we see none: it may run in another mount namespace, or in a container.
    #[error("{}: outhaul sees no output base there; see --path-map", .0.display())]
    Unseen(PathBuf),
    /// Its path cannot be recorded.
    #[error("{}: not UTF-8", .0.display())]
    NotUtf8(PathBuf),
    /// The code that opens it has a bug.
    #[error("opening the output root panicked")]
    Panicked,
}

impl RootError {
    /// Whether there is no such directory.
    pub(crate) fn is_not_there(&self) -> bool {
        matches!(self, Self::Place(error) if error.errno == Some(Errno::NOENT.raw_os_error()))
    }
}

/// Where Bazel has its exec root, below the output base.
const EXEC_ROOT: &str = "execroot/_main";
/// How many unused roots are kept open.
const IDLE: usize = 32;

/// An open root.
struct Opened {
    id: RootId,
    root: Arc<Root>,
    /// Counts the uses of all roots.
    used: u64,
}

impl Opened {
    /// Whether nothing else has it. It is only handed out under the lock of all roots.
    fn is_idle(&self) -> bool {
        Arc::strong_count(&self.root) == 1
    }
}

/// Those that are open. Nothing is opened under its lock: a caller that finds no descriptors takes it.
#[derive(Default)]
struct Open(Mutex<HashMap<PathBuf, Opened>>);

impl Spare for Open {
    fn spare(&self) {
        // A file system that hangs may keep the lock.
        let Some(mut open) = self.0.try_lock() else {
            return;
        };
        let closed = take_idle(&mut open, 0);
        drop(open);
        if !closed.is_empty() {
            let roots = closed.len();
            tracing::warn!(roots, "out of file descriptors: closed unused output roots");
        }
    }
}

/// The output roots in use.
pub struct Roots {
    rules: RwLock<Arc<RootRules>>,
    record: Record,
    open: Arc<Open>,
    /// Held by the caller that opens one: one at a time.
    opening: Mutex<()>,
    uses: AtomicU64,
    /// Roots whose place another directory has taken.
    retired: Mutex<Vec<Arc<Root>>>,
    next: AtomicU32,
}

impl RootRules {
    /// Whether outputs may be brought to a running Bazel's output base, given as the build sees it. Blocks on the file
    /// system.
    ///
    /// # Errors
    /// When a rule forbids it, or the directory cannot be seen from here.
    pub(crate) fn allows(&self, output_base: &Path) -> Result<(), RootError> {
        let path = self.translate(&output_base.join(EXEC_ROOT).to_string_lossy());
        is_allowed_root(&path, allowance(self, &path)).map_err(|e| RootError::NotAllowed(e, ADVICE))?;
        // The exec root itself may have to be made yet, but the server has files in the base. A rule for the exec root
        // alone says nothing of where that is.
        let base = path
            .ends_with(EXEC_ROOT)
            .then(|| path.ancestors().nth(2))
            .flatten();
        let is_empty =
            |base: &Path| std::fs::read_dir(base).map_or(true, |mut entries| entries.next().is_none());
        match base.filter(|base| is_empty(base)) {
            Some(base) => Err(RootError::Unseen(base.to_owned())),
            None => Ok(()),
        }
    }
}

impl Roots {
    /// None yet.
    pub fn new(rules: RootRules, record: Record) -> Self {
        let open: Arc<Open> = Arc::default();
        let spare: Arc<dyn Spare> = open.clone();
        open_files::spares(Arc::downgrade(&spare));
        Self {
            rules: RwLock::new(Arc::new(rules)),
            record,
            open,
            opening: Mutex::default(),
            uses: AtomicU64::new(0),
            retired: Mutex::default(),
            next: AtomicU32::new(1),
        }
    }

    /// The rules.
    pub fn rules(&self) -> Arc<RootRules> {
        self.rules.read().clone()
    }

    /// Other rules, for builds from now on.
    pub(crate) fn set_rules(&self, rules: RootRules) {
        *self.rules.write() = Arc::new(rules);
    }

    /// Lets go of the temporary directories of all roots, before the process ends.
    pub(crate) fn let_go(&self) {
        for opened in self.open.0.lock().values() {
            opened.root.place.let_go();
        }
    }

    /// Whether the root of a build is there, or will be made by [`open`](Self::open). Blocks on the file system.
    pub fn is_there(&self, exec_root: &str) -> bool {
        let rules = self.rules();
        match &rules.destination {
            Destination::Directory { .. } => true,
            Destination::ExecRoot => rules.translate(exec_root).exists(),
        }
    }

    /// Opens the root of a build, or gives the handle that others use already. Blocks on the file system.
    ///
    /// # Errors
    /// When the directory is not there, or must not be written into.
    pub fn open(&self, exec_root: &str) -> Result<(RootId, Arc<Root>), RootError> {
        let rules = self.rules();
        match &rules.destination {
            Destination::Directory { path, .. } => self.open_path(path, None),
            Destination::ExecRoot => {
                let path = rules.translate(exec_root);
                self.open_allowed(&path, &rules, ADVICE)
            }
        }
    }

    /// Begins a build in its root, unless it has begun there already. In this order: it gets its version, which goes to
    /// the record with its row; nothing older is published any more by this process, and then by others; and what is
    /// now its `bazel-out` is the one that files go into. A build with a version comes again from the journal, and one
    /// with `left` has only let go of its root.
    ///
    /// False if another process is still in the middle of placing an older build's file; see [`Epoch::claim`].
    ///
    /// # Errors
    /// When the root cannot be read.
    pub async fn begin(
        &self,
        materializer: &Materializer,
        (id, root): (RootId, &Arc<Root>),
        row: &mut InvocationRow,
        left: Option<Left>,
    ) -> Result<bool, PlaceError> {
        for old in self.take_retired() {
            materializer.forget(&old).await;
        }
        let is_new = row.version == 0;
        if is_new {
            let root = root.clone();
            let claimed = spawn_blocking(move || root.epoch.claimed()).await;
            row.version = self.record.next_version_above(id, claimed.unwrap_or_default());
        }
        let version = row.version;
        self.record.put_invocation(row);
        materializer.begin(root, version).await;
        let (claimed, invocation_id) = (root.clone(), row.invocation_id.clone());
        let claim = spawn_blocking(move || claimed.epoch.claim(version, &invocation_id)).await;
        let is_alone = claim.unwrap_or_else(|error| {
            if error.is_panic() {
                tracing::error!("claiming an output root panicked; this is a bug in outhaul");
            }
            true
        });
        // Only now, when nothing older is placed any more: the build has just begun, and its bazel-out may still have
        // to be made. One that comes again from the journal has had its own; if that is gone, it was cleaned.
        if version >= root.epoch.current() {
            let place = root.place.clone();
            let begun = spawn_blocking(move || match left {
                Some(left) => place.come_back(left),
                None => place.begin_build(is_new),
            });
            begun.await.unwrap_or(Ok(()))?;
        }
        Ok(is_alone)
    }

    /// Roots that were replaced since the last call: anyone who holds on to them may let go.
    fn take_retired(&self) -> Vec<Arc<Root>> {
        std::mem::take(&mut self.retired.lock())
    }

    /// Whether outputs may be brought to a running Bazel's output base, given as the build sees it. Blocks on the file
    /// system.
    ///
    /// # Errors
    /// When a rule forbids it, or the directory cannot be seen from here.
    pub(crate) fn allows(&self, output_base: &Path) -> Result<(), RootError> {
        self.rules().allows(output_base)
    }

    /// Gives up roots that are gone, and their descriptors with them. What is under way in one ends by itself. Blocks on
    /// the file system.
    pub(crate) fn give_up_gone(&self) {
        let mut gone: Vec<Arc<Root>> = {
            let open = self.open.0.lock();
            open.values().map(|opened| opened.root.clone()).collect()
        };
        // Without the lock: a file system may hang.
        gone.retain(|root| !root.place.is_same());
        let mut open = self.open.0.lock();
        open.retain(|_, opened| !gone.iter().any(|gone| Arc::ptr_eq(gone, &opened.root)));
        drop(open);
        let mut retired = self.retired.lock();
        retired.extend(gone);
    }

    /// Opens a root that the record knows. Blocks on the file system.
    ///
    /// # Errors
    /// When the directory is not there, or is not allowed any more.
    pub(crate) fn reopen(&self, path: &Path) -> Result<(RootId, Arc<Root>), RootError> {
        self.open_allowed(path, &self.rules(), "see --allow-exec-root")
    }

    fn open_allowed(
        &self,
        path: &Path,
        rules: &RootRules,
        advice: &'static str,
    ) -> Result<(RootId, Arc<Root>), RootError> {
        let allowance = allowance(rules, path);
        let refused = |error| RootError::NotAllowed(error, advice);
        is_allowed_root(path, allowance).map_err(refused)?;
        // Another directory may have been put there since its path was looked at.
        let check = |place: &OutputRoot| is_allowed_open(place, allowance).map_err(refused);
        let (id, root) = self.open_path(path, Some(&check))?;
        root.place.spell(rules.spellings(path));
        Ok((id, root))
    }

    /// Opens a directory: an exec root, which is checked, or the user's own choice.
    fn open_path(&self, path: &Path, check: Option<Check<'_>>) -> Result<(RootId, Arc<Root>), RootError> {
        let _opening = self.opening.lock();
        let mut open = self.open.0.lock();
        let used = self.uses.fetch_add(1, Ordering::Relaxed);
        if let Some(opened) = open.get_mut(path)
            && opened.root.place.is_same()
        {
            opened.used = used;
            return Ok((opened.id, opened.root.clone()));
        }
        let closed = take_idle(&mut open, IDLE);
        drop(open);
        drop(closed);
        let is_own = check.is_none();
        let place = OutputRoot::open(path, is_own)?;
        if let Some(check) = check {
            check(&place)?;
        }
        // A daemon that was killed may have left something here before its record knew of the root, or the record is
        // lost.
        match place.sweep() {
            Ok(0) => {}
            Ok(entries) => tracing::info!(root = %path.display(), entries, "swept temporary files"),
            Err(error) => tracing::debug!(root = %path.display(), "failed to sweep temporary files: {error}"),
        }
        let name = path.to_str().ok_or_else(|| RootError::NotUtf8(path.to_owned()))?;
        let id = self.record.root(name, place.device(), place.inode());
        let who = Holder {
            since: None,
            ..Holder::of_this_process()
        };
        // A user's directory is not an output base, and nothing is left there.
        let claim = (!is_own).then(|| place.claim(&who.to_string())).flatten();
        let epoch = Epoch::shared(claim);
        // What an earlier run of the daemon gave out counts: an older build that comes again from the journal must
        // not pass for the newest.
        epoch.begin(self.record.root_row(id).map_or(0, |row| row.version));
        let root = Arc::new(Root {
            id: self.next.fetch_add(1, Ordering::Relaxed),
            place: Arc::new(place),
            epoch,
        });
        let opened = Opened {
            id,
            root: root.clone(),
            used,
        };
        if let Some(old) = self.open.0.lock().insert(path.to_owned(), opened) {
            self.retired.lock().push(old.root);
        }
        Ok((id, root))
    }
}

/// Takes out unused roots, except for this many that were used last. Each has three descriptors or more, and
/// what is to be known of it is recorded. They are closed when they are dropped, which is better done without the lock.
fn take_idle(open: &mut HashMap<PathBuf, Opened>, kept: usize) -> Vec<Opened> {
    let mut idle: Vec<u64> = open
        .values()
        .filter(|opened| opened.is_idle())
        .map(|opened| opened.used)
        .collect();
    let Some(surplus) = idle.len().checked_sub(kept).filter(|n| *n > 0) else {
        return Vec::new();
    };
    idle.sort_unstable();
    let oldest = idle[surplus - 1];
    open.extract_if(|_, opened| opened.used <= oldest && opened.is_idle())
        .map(|(_, opened)| opened)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_that_nobody_uses_are_closed_and_opened_again_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let (record, _) = Record::open(&dir.path().join("state")).unwrap();
        let roots = Roots::new(RootRules::default(), record.clone());
        let path = |n: usize| dir.path().join("execroot").join(n.to_string());
        let open = |n: usize| roots.open(path(n).to_str().unwrap()).unwrap();
        std::fs::create_dir_all(path(0)).unwrap();
        let (id, used) = open(0);
        for n in 1..=3 * IDLE {
            std::fs::create_dir(path(n)).unwrap();
            open(n);
            // The second is used again and again.
            open(1);
        }
        let first = |n: usize| roots.open.0.lock().contains_key(&path(n));
        assert!(first(0) && first(1) && !first(2) && first(3 * IDLE));
        assert!(roots.open.0.lock().len() <= IDLE + 2);
        assert!(Arc::ptr_eq(&open(0).1, &used), "it is in use");
        take_idle(&mut roots.open.0.lock(), 0);
        assert!(first(0) && !first(1));
        drop(used);
        take_idle(&mut roots.open.0.lock(), 0);
        assert!(roots.open.0.lock().is_empty());
        assert_eq!(open(0).0, id);
        record.close();
    }

    #[test]
    fn what_a_dead_process_left_is_swept_from_a_root_that_no_record_knows() {
        let dir = tempfile::tempdir().unwrap();
        let exec_root = dir.path().join("execroot/ws");
        std::fs::create_dir_all(&exec_root).unwrap();
        let left = dir.path().join(".outhaul-tmp/12345-dead");
        std::fs::create_dir_all(left.join("0")).unwrap();
        let (record, _) = Record::open(&dir.path().join("state")).unwrap();
        let roots = Roots::new(RootRules::default(), record.clone());
        roots.open(exec_root.to_str().unwrap()).unwrap();
        assert!(!left.exists());
        record.close();
    }

    #[test]
    fn roots_that_are_gone_are_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let (record, _) = Record::open(&dir.path().join("state")).unwrap();
        let roots = Roots::new(RootRules::default(), record.clone());
        let paths = ["a", "b", "c"].map(|name| dir.path().join("execroot").join(name));
        let opened = paths.each_ref().map(|path| {
            std::fs::create_dir_all(path).unwrap();
            roots.open(path.to_str().unwrap()).unwrap().1
        });
        std::fs::remove_dir(&paths[0]).unwrap();
        std::fs::remove_dir(&paths[1]).unwrap();
        std::fs::create_dir(&paths[1]).unwrap();
        roots.give_up_gone();
        let mut retired: Vec<u32> = roots.take_retired().iter().map(|root| root.id).collect();
        retired.sort_unstable();
        assert_eq!(retired, [opened[0].id, opened[1].id]);
        let (_, again) = roots.open(paths[2].to_str().unwrap()).unwrap();
        assert!(Arc::ptr_eq(&again, &opened[2]));
        record.close();
    }
}
