//! Output roots: which directories may be written into, and the handle that all invocations of one share.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU32, Ordering},
    },
};

use crate::{
    materialize::{
        Root,
        place::{Epoch, OutputRoot, is_allowed_open, is_allowed_root},
    },
    record::{Holder, Record, RootId},
};

/// `FROM=TO`: the build saw `FROM` where we see `TO`, because it ran in another mount namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathMap {
    from: PathBuf,
    to: PathBuf,
}

impl FromStr for PathMap {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (from, to) = text
            .split_once('=')
            .ok_or_else(|| format!("{text:?} is not of the form FROM=TO"))?;
        let (from, to) = (PathBuf::from(from), PathBuf::from(to));
        if !from.is_absolute() || !to.is_absolute() {
            return Err(format!("{text:?} needs two absolute paths"));
        }
        Ok(Self { from, to })
    }
}

/// Judges a directory that has just been opened.
type Check<'a> = &'a dyn Fn(&OutputRoot) -> Result<(), String>;

/// Where outputs go.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Destination {
    /// To the exec root that the stream names.
    #[default]
    ExecRoot,
    /// To a directory of the user's.
    Directory {
        /// Which.
        path: PathBuf,
        /// Right into it by file name, instead of by exec path.
        flatten: bool,
    },
}

/// What is allowed as an output root, and how paths are translated.
#[derive(Debug, Clone, Default)]
pub struct RootRules {
    /// Where outputs go.
    pub destination: Destination,
    /// Translations, the first that fits counts.
    pub path_maps: Vec<PathMap>,
    /// Directories that exec roots must lie in; empty for any that the daemon's user owns.
    pub allowed: Vec<PathBuf>,
    /// Whether the build tool's action cache is left unread.
    pub no_action_cache: bool,
}

impl RootRules {
    /// Where the build's exec root is for us.
    #[must_use]
    pub fn translate(&self, exec_root: &str) -> PathBuf {
        let path = Path::new(exec_root);
        for map in &self.path_maps {
            if let Ok(below) = path.strip_prefix(&map.from) {
                return if below.as_os_str().is_empty() {
                    map.to.clone()
                } else {
                    map.to.join(below)
                };
            }
        }
        path.to_owned()
    }
}

/// The output roots in use.
pub struct Roots {
    rules: RwLock<Arc<RootRules>>,
    record: Record,
    open: Mutex<HashMap<PathBuf, (RootId, Arc<Root>)>>,
    /// Roots whose place another directory has taken.
    retired: Mutex<Vec<Arc<Root>>>,
    next: AtomicU32,
}

impl Roots {
    /// None yet.
    #[must_use]
    pub fn new(rules: RootRules, record: Record) -> Self {
        Self {
            rules: RwLock::new(Arc::new(rules)),
            record,
            open: Mutex::default(),
            retired: Mutex::default(),
            next: AtomicU32::new(1),
        }
    }

    /// The rules.
    #[must_use]
    pub fn rules(&self) -> Arc<RootRules> {
        self.rules.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Other rules, for builds from now on.
    pub fn set_rules(&self, rules: RootRules) {
        *self.rules.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(rules);
    }

    /// Lets go of the temporary directories of all roots, before the process ends.
    pub fn let_go(&self) {
        for (_, root) in self.open.lock().unwrap_or_else(PoisonError::into_inner).values() {
            root.place.let_go();
        }
    }

    /// Roots that were replaced since the last call: whoever holds on to them may let go.
    pub fn take_retired(&self) -> Vec<Arc<Root>> {
        std::mem::take(&mut self.retired.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether the root of a build is there, or will be made by [`open`](Self::open). Blocks on the file system.
    #[must_use]
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
    /// In words: the directory is not there, or must not be written into.
    pub fn open(&self, exec_root: &str) -> Result<(RootId, Arc<Root>), String> {
        let rules = self.rules();
        match &rules.destination {
            Destination::Directory { path, .. } => self.open_path(path, None),
            Destination::ExecRoot => {
                let path = rules.translate(exec_root);
                self.open_allowed(&path, &rules, "see --allow-exec-root and --path-map")
            }
        }
    }

    /// Gives up roots that are gone, and their descriptors with them. What is under way in one ends by itself. Blocks on
    /// the file system.
    pub fn give_up_gone(&self) {
        let mut gone: Vec<Arc<Root>> = {
            let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            open.values().map(|(_, root)| root.clone()).collect()
        };
        // Without the lock: a file system may hang.
        gone.retain(|root| !root.place.is_same());
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|_, (_, root)| !gone.iter().any(|gone| Arc::ptr_eq(gone, root)));
        drop(open);
        let mut retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        retired.extend(gone);
    }

    /// Opens a root that the record knows. Blocks on the file system.
    ///
    /// # Errors
    /// In words: the directory is not there.
    pub fn reopen(&self, path: &Path) -> Result<(RootId, Arc<Root>), String> {
        self.open_allowed(path, &self.rules(), "see --allow-exec-root")
    }

    fn open_allowed(
        &self,
        path: &Path,
        rules: &RootRules,
        advice: &str,
    ) -> Result<(RootId, Arc<Root>), String> {
        let user = rustix::process::geteuid().as_raw();
        is_allowed_root(path, &rules.allowed, user).map_err(|e| format!("{e}; {advice}"))?;
        // Another directory may have been put there since its path was looked at.
        let check = |place: &OutputRoot| {
            is_allowed_open(place, &rules.allowed, user).map_err(|e| format!("{e}; {advice}"))
        };
        self.open_path(path, Some(&check))
    }

    /// Opens a directory: an exec root, which is checked, or the user's own choice.
    fn open_path(&self, path: &Path, check: Option<Check<'_>>) -> Result<(RootId, Arc<Root>), String> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((id, root)) = open.get(path)
            && root.place.is_same()
        {
            return Ok((*id, root.clone()));
        }
        let is_own = check.is_none();
        let place = OutputRoot::open(path, is_own).map_err(|e| e.to_string())?;
        if let Some(check) = check {
            check(&place)?;
        }
        // A daemon that was killed may have left something here before its record knew of the root, or the record is
        // lost.
        match place.sweep() {
            Ok(0) => {}
            Ok(entries) => tracing::info!(root = %path.display(), entries, "swept temporary files"),
            Err(error) => tracing::debug!(root = %path.display(), "not swept: {error}"),
        }
        let name = path
            .to_str()
            .ok_or_else(|| format!("{}: is not UTF-8", path.display()))?;
        let id = self.record.root(name, place.device(), place.inode());
        let who = Holder {
            since: None,
            ..Holder::of_this_process()
        };
        // A directory of the user's own is nobody's output base, and nothing is left there.
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
        if let Some((_, old)) = open.insert(path.to_owned(), (id, root.clone())) {
            self.retired
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(old);
        }
        Ok((id, root))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let paths = ["a", "b", "c"].map(|name| dir.path().join(name));
        let opened = paths.each_ref().map(|path| {
            std::fs::create_dir(path).unwrap();
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

    #[test]
    fn exec_roots_are_translated_at_components() {
        let rules = RootRules {
            path_maps: vec!["/build=/mnt/vm/build".parse().unwrap()],
            ..RootRules::default()
        };
        assert_eq!(rules.translate("/build/x"), Path::new("/mnt/vm/build/x"));
        assert_eq!(rules.translate("/build"), Path::new("/mnt/vm/build"));
        assert_eq!(rules.translate("/builder/x"), Path::new("/builder/x"));
        for bad in ["/a", "a=/b", "/a=b", "="] {
            assert!(bad.parse::<PathMap>().unwrap_err().contains(bad), "{bad}");
        }
    }
}
