//! Output roots: which directories may be written into, and the handle that all invocations of one share.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use crate::{
    materialize::{
        Root,
        place::{Allowance, Epoch, OutputRoot, is_allowed_open, is_allowed_root},
    },
    open_files::{self, Spare},
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
            return Err(format!("both paths in {text:?} must be absolute"));
        }
        Ok(Self { from, to })
    }
}

impl PathMap {
    /// Whether this is where the user says that an exec root is, as we see it: it, or what they lie in, is mapped by
    /// itself.
    fn names(&self, path: &Path) -> bool {
        let mut from = self.from.iter().rev().map(|name| name == "execroot");
        match (from.next(), from.next()) {
            (Some(true), _) => path.parent() == Some(&self.to),
            (_, Some(true)) => path == self.to,
            _ => false,
        }
    }
}

/// What the rules say of a path.
fn allowance<'a>(rules: &'a RootRules, path: &Path) -> Allowance<'a> {
    Allowance {
        listed: &rules.allowed,
        is_mapped: rules.path_maps.iter().any(|map| map.names(path)),
        uid: rustix::process::geteuid().as_raw(),
    }
}

/// What to do about a root that is not allowed.
const ADVICE: &str = "see --allow-exec-root and --path-map";

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
        /// The refused path.
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
    /// Directories that exec roots must lie in; empty for any that looks like one and that the daemon's user owns.
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

    /// What an exec root of ours is called where builds see it elsewhere.
    fn spellings(&self, exec_root: &Path) -> Vec<PathBuf> {
        let back = |map: &PathMap| {
            let below = exec_root.strip_prefix(&map.to).ok()?;
            // Without a trailing slash.
            let there: PathBuf = map.from.join(below).components().collect();
            // A map before it may take that path elsewhere.
            (self
                .translate(there.to_str()?)
                .components()
                .eq(exec_root.components()))
            .then_some(there)
        };
        self.path_maps.iter().filter_map(back).collect()
    }
}

/// Roots that are kept open although nobody uses them just now.
const IDLE: usize = 32;

/// An open root.
struct Opened {
    id: RootId,
    root: Arc<Root>,
    /// Counts the uses of all roots.
    used: u64,
}

impl Opened {
    /// Whether nobody else has it. Who gets it does so under the lock of all roots.
    fn is_idle(&self) -> bool {
        Arc::strong_count(&self.root) == 1
    }
}

/// Those that are open. Nothing is opened under its lock: a caller that finds no descriptors takes it.
#[derive(Default)]
struct Open(Mutex<HashMap<PathBuf, Opened>>);

impl Open {
    fn lock(&self) -> MutexGuard<'_, HashMap<PathBuf, Opened>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Spare for Open {
    fn spare(&self) {
        // A file system that hangs may keep the lock.
        let Some(mut open) = open_files::try_lock(&self.0) else {
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

impl Roots {
    /// None yet.
    #[must_use]
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
        for opened in self.open.lock().values() {
            opened.root.place.let_go();
        }
    }

    /// Roots that were replaced since the last call: anyone who holds on to them may let go.
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
                self.open_allowed(&path, &rules, ADVICE)
            }
        }
    }

    /// Whether the root of a build may be at this path, as the build sees it. Blocks on the file system.
    ///
    /// # Errors
    /// In words, which rule forbids it.
    pub fn allows(&self, exec_root: &Path) -> Result<(), String> {
        let rules = self.rules();
        let path = rules.translate(&exec_root.to_string_lossy());
        is_allowed_root(&path, allowance(&rules, &path)).map_err(|e| format!("{e}; {ADVICE}"))
    }

    /// Gives up roots that are gone, and their descriptors with them. What is under way in one ends by itself. Blocks on
    /// the file system.
    pub fn give_up_gone(&self) {
        let mut gone: Vec<Arc<Root>> = {
            let open = self.open.lock();
            open.values().map(|opened| opened.root.clone()).collect()
        };
        // Without the lock: a file system may hang.
        gone.retain(|root| !root.place.is_same());
        let mut open = self.open.lock();
        open.retain(|_, opened| !gone.iter().any(|gone| Arc::ptr_eq(gone, &opened.root)));
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
        let allowance = allowance(rules, path);
        is_allowed_root(path, allowance).map_err(|e| format!("{e}; {advice}"))?;
        // Another directory may have been put there since its path was looked at.
        let check =
            |place: &OutputRoot| is_allowed_open(place, allowance).map_err(|e| format!("{e}; {advice}"));
        let (id, root) = self.open_path(path, Some(&check))?;
        root.place.spell(rules.spellings(path));
        Ok((id, root))
    }

    /// Opens a directory: an exec root, which is checked, or the user's own choice.
    fn open_path(&self, path: &Path, check: Option<Check<'_>>) -> Result<(RootId, Arc<Root>), String> {
        let _opening = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        let mut open = self.open.lock();
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
        let place = OutputRoot::open(path, is_own).map_err(|e| e.to_string())?;
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
        let name = path
            .to_str()
            .ok_or_else(|| format!("{}: not UTF-8", path.display()))?;
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
        let opened = Opened {
            id,
            root: root.clone(),
            used,
        };
        if let Some(old) = self.open.lock().insert(path.to_owned(), opened) {
            self.retired
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(old.root);
        }
        Ok((id, root))
    }
}

/// Takes out roots that nobody uses, except for this many that were used last. Each has three descriptors or more, and
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
        let first = |n: usize| roots.open.lock().contains_key(&path(n));
        assert!(first(0) && first(1) && !first(2) && first(3 * IDLE));
        assert!(roots.open.lock().len() <= IDLE + 2);
        assert!(Arc::ptr_eq(&open(0).1, &used), "it is in use");
        take_idle(&mut roots.open.lock(), 0);
        assert!(first(0) && !first(1));
        drop(used);
        take_idle(&mut roots.open.lock(), 0);
        assert!(roots.open.lock().is_empty());
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

    #[test]
    fn exec_roots_are_translated_at_components() {
        let rules = RootRules {
            path_maps: vec!["/build=/mnt/vm/build".parse().unwrap()],
            ..RootRules::default()
        };
        assert_eq!(rules.translate("/build/x"), Path::new("/mnt/vm/build/x"));
        assert_eq!(rules.translate("/build"), Path::new("/mnt/vm/build"));
        assert_eq!(rules.translate("/builder/x"), Path::new("/builder/x"));
        let rules_of = |maps: &[&str]| RootRules {
            path_maps: maps.iter().map(|map| map.parse().unwrap()).collect(),
            ..RootRules::default()
        };
        let spellings = |maps: &[&str], path: &str| rules_of(maps).spellings(Path::new(path));
        assert_eq!(spellings(&["/from=/to"], "/to/ob"), [Path::new("/from/ob")]);
        assert_eq!(spellings(&["/from/ws=/to"], "/to"), [Path::new("/from/ws")]);
        assert_eq!(spellings(&["/from=/to"], "/too/ob"), [""; 0].map(PathBuf::from));
        // The first that fits counts.
        assert_eq!(
            spellings(&["/a/b=/elsewhere", "/a=/to"], "/to/b"),
            [""; 0].map(PathBuf::from)
        );
        // Who maps an exec root, or what it lies in, says what it is.
        let names = |map: &str, path: &str| map.parse::<PathMap>().unwrap().names(Path::new(path));
        for (map, path, expected) in [
            ("/ob/execroot/ws=/mnt/ws", "/mnt/ws", true),
            ("/ob/execroot/ws=/mnt/ws", "/mnt/ws/sub", false),
            ("/ob/execroot=/mnt/roots", "/mnt/roots/ws", true),
            ("/ob/execroot=/mnt/roots", "/mnt/roots", false),
            ("/ob/execroot=/mnt/roots", "/mnt/roots/ws/sub", false),
            ("/=/mnt/vm", "/mnt/vm/home/user/.ssh", false),
            ("/ob=/mnt", "/mnt", false),
        ] {
            assert_eq!(names(map, path), expected, "{map} {path}");
        }
        for bad in ["/a", "a=/b", "/a=b", "="] {
            assert!(bad.parse::<PathMap>().unwrap_err().contains(bad), "{bad}");
        }
    }
}
