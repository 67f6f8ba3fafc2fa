//! Which builds there are, under which names, and the trees of those that somebody has looked at.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::{Mutex as SyncMutex, RwLock};
use tokio::{
    sync::{Mutex, OnceCell, Semaphore},
    time::timeout,
};

use super::{
    error::Unread,
    tree::{Tree, TreeBuilder},
};
use crate::digest::{Digest, DigestFunction};

/// How long the list of builds counts as new.
const FRESH: Duration = Duration::from_secs(1);

/// How long the record may take to tell which builds there are.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// How long it may take to tell all outputs of a build.
pub(crate) const TREE_PATIENCE: Duration = Duration::from_secs(120);

/// How long after a failure nobody asks again: each of many that look would wait as long as the first.
const FAILED: Duration = Duration::from_secs(5);

/// How many files, links and directories of builds are kept in memory; beyond it, builds that nobody has looked at for long
/// are read again when somebody does, and beyond twice as many all of which nothing is open.
const MOST_NODES: usize = 4_000_000;

/// How long a build counts as looked at.
const RECENT: Duration = Duration::from_secs(60);

/// Builds that are read at a time. Each takes a thread and, without a daemon, waits for the record.
const READ_AT_ONCE: usize = 8;

/// The longest name of a file.
const LONGEST_NAME: usize = 255;

/// The directory of all builds, by their ids.
pub(super) const BY_INVOCATION: &str = "by-invocation";
/// The directory with what is told of the mount itself.
pub(super) const OURS: &str = ".outhaul";
/// The file in it.
pub(super) const STATUS: &str = "status";
/// The link to a workspace's newest build.
pub(super) const LATEST: &str = "latest";

/// A recorded build.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Build {
    /// Its invocation id.
    pub(crate) id: String,
    /// Of its workspace, absolute; or empty.
    pub(crate) workspace: String,
    /// Of its exec root, absolute; or empty.
    pub(crate) exec_root: String,
    /// Whether it has no output root here, such as one that was imported.
    pub(crate) is_from_elsewhere: bool,
    /// The caches that it used, as they are recorded.
    pub(crate) remote_cache: String,
    /// The instance name there.
    pub(crate) remote_instance_name: String,
    /// When it began, in milliseconds since the epoch.
    pub(crate) started_ms: i64,
    /// When all that it wanted was settled; 0 if it was not.
    pub(crate) settled_ms: i64,
    /// Whether nothing more will happen to it.
    pub(crate) is_over: bool,
    /// Which of several state directories has it.
    pub(crate) state_dir: usize,
}

impl Build {
    /// Whether one of these has begun in the same output root after it.
    pub(crate) fn is_outdated(&self, builds: &[Self]) -> bool {
        let is_newer = |other: &Self| {
            let is_there = (other.state_dir, &other.exec_root) == (self.state_dir, &self.exec_root);
            is_there && !other.is_from_elsewhere && other.started_ms > self.started_ms
        };
        builds.iter().any(is_newer)
    }
}

/// Where builds and their outputs are recorded. It is asked on threads that may block.
pub(crate) trait Rows: Send + Sync + 'static {
    /// The builds that may have outputs, of each state directory that answers, by its place. With `quietly`, only what daemons
    /// tell.
    ///
    /// # Errors
    /// When the record cannot be read.
    fn builds(&self, quietly: bool) -> Result<HashMap<usize, Vec<Build>>, Unread>;

    /// Adds all outputs of a build to a tree: all that is recorded of its output root if it is the newest of it, what it
    /// has named itself otherwise.
    ///
    /// # Errors
    /// When they cannot be read.
    fn outputs(&self, build: &Build, is_newest: bool, tree: TreeBuilder) -> Result<TreeBuilder, Unread>;
}

/// A build in the mount.
pub(super) struct Slot {
    /// The upper half of its inode numbers; never used again.
    pub(super) number: u32,
    pub(super) build: Build,
    tree: OnceCell<Arc<Tree>>,
    /// Why its tree could not be read, and when.
    failed: SyncMutex<Option<(Instant, Unread)>>,
    /// When somebody looked at it last, in nanoseconds of the catalog's life.
    used: AtomicU64,
    /// Clones of it are with what is open.
    pin: Arc<()>,
}

impl Slot {
    /// Its tree, if it is in memory.
    pub(super) fn tree(&self) -> Option<&Arc<Tree>> {
        self.tree.get()
    }

    /// Keeps its tree in memory, and its inode numbers, as long as this is held.
    pub(super) fn pin(&self) -> Arc<()> {
        self.pin.clone()
    }

    /// Whether somebody has something of it open.
    fn is_open(&self) -> bool {
        Arc::strong_count(&self.pin) > 1
    }
}

/// A workspace in the mount.
#[derive(Debug, Clone)]
struct Workspace {
    path: String,
    name: String,
    /// The newest build that is over; empty if none is recorded any more.
    latest: String,
}

#[derive(Default)]
struct Known {
    by_id: BTreeMap<String, Arc<Slot>>,
    by_number: HashMap<u32, Arc<Slot>>,
    /// Their places do not change.
    workspaces: Vec<Workspace>,
    /// The newest build of each exec root of this machine: when it began, and its id.
    newest: HashMap<(usize, String), (i64, String)>,
    numbers: u32,
}

/// The builds.
pub(super) struct Catalog {
    rows: Arc<dyn Rows>,
    known: RwLock<Known>,
    /// When the list was read last, and why it could not be, in words.
    refreshed: Mutex<Option<(Instant, Result<(), Unread>)>>,
    /// Places for those who read a build's outputs.
    reading: Semaphore,
    since: Instant,
    most_nodes: usize,
    recent: Duration,
}

impl Catalog {
    /// With nothing in it.
    pub(super) fn new(rows: Arc<dyn Rows>) -> Self {
        Self {
            rows,
            known: RwLock::default(),
            refreshed: Mutex::new(None),
            reading: Semaphore::new(READ_AT_ONCE),
            since: Instant::now(),
            most_nodes: MOST_NODES,
            recent: RECENT,
        }
    }

    /// Reads the list of builds, unless it was read, or could not be read, a moment ago. With `quietly`, only from a daemon.
    ///
    /// # Errors
    /// When it cannot be read; what was known before is known still.
    pub(super) async fn refresh(&self, quietly: bool) -> Result<(), Unread> {
        let mut refreshed = self.refreshed.lock().await;
        if let Some((at, end)) = &*refreshed {
            let lasts = if end.is_ok() { FRESH } else { FAILED };
            if at.elapsed() < lasts {
                return end.clone();
            }
        }
        let rows = self.rows.clone();
        let asked = blocking(PATIENCE, move || rows.builds(quietly));
        let end = asked.await.map(|builds| {
            let mut known = self.known.write();
            if !builds.is_empty() {
                known.take(builds);
            }
            known.make_room(0, self.most_nodes, self.before());
        });
        if !quietly || end.is_err() {
            *refreshed = Some((Instant::now(), end.clone()));
        }
        end
    }

    /// The build with this id.
    pub(super) fn build(&self, id: &str) -> Option<Arc<Slot>> {
        self.known.read().by_id.get(id).cloned()
    }

    /// The build with this number; none if it was read again under another one.
    pub(super) fn slot(&self, number: u32) -> Option<Arc<Slot>> {
        let slot = self.known.read().by_number.get(&number).cloned()?;
        slot.used.store(self.now(), Ordering::Relaxed);
        Some(slot)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// All builds, by id.
    pub(super) fn builds(&self) -> Vec<Arc<Slot>> {
        self.known.read().by_id.values().cloned().collect()
    }

    /// All workspaces with builds: their places and names.
    pub(super) fn workspaces(&self) -> Vec<(usize, String)> {
        let known = self.known.read();
        let all = known.workspaces.iter().enumerate();
        let shown = all.filter(|(_, workspace)| !workspace.latest.is_empty());
        shown
            .map(|(at, workspace)| (at, workspace.name.clone()))
            .collect()
    }

    /// The newest build of the workspace at this place.
    pub(super) fn latest(&self, workspace: usize) -> Option<String> {
        let known = self.known.read();
        let latest = &known.workspaces.get(workspace)?.latest;
        (!latest.is_empty()).then(|| latest.clone())
    }

    /// A build's tree, which is read from the record if it is not in memory.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) async fn tree(&self, slot: &Arc<Slot>) -> Result<Arc<Tree>, Unread> {
        slot.used.store(self.now(), Ordering::Relaxed);
        let read = async {
            let failed = slot.failed.lock().clone();
            if let Some((_, reason)) = failed.filter(|(at, _)| at.elapsed() < FAILED) {
                return Err(reason);
            }
            let read = self.read(slot).await;
            *slot.failed.lock() = read.as_ref().err().map(|reason| (Instant::now(), reason.clone()));
            read
        };
        let tree = slot.tree.get_or_try_init(|| read).await?.clone();
        // Reading may have taken long.
        slot.used.store(self.now(), Ordering::Relaxed);
        let before = self.before();
        self.known.write().make_room(slot.number, self.most_nodes, before);
        Ok(tree)
    }

    /// Since when what was looked at counts as such.
    fn before(&self) -> u64 {
        let recent = self.recent.as_nanos().try_into().unwrap_or(u64::MAX);
        self.now().saturating_sub(recent)
    }

    /// Reads a build's tree from the record.
    async fn read(&self, slot: &Slot) -> Result<Arc<Tree>, Unread> {
        let _place = self
            .reading
            .acquire()
            .await
            .map_err(|error| Unread(error.to_string()))?;
        let build = slot.build.clone();
        let is_newest = {
            let known = self.known.read();
            let newest = known.newest.get(&(build.state_dir, build.exec_root.clone()));
            newest.is_some_and(|(_, id)| *id == build.id)
        };
        let rows = self.rows.clone();
        let filled = blocking(TREE_PATIENCE, move || {
            let empty = TreeBuilder::new(&build.exec_root);
            Ok(rows.outputs(&build, is_newest, empty)?.finish())
        });
        let (tree, left_out) = filled.await?;
        if left_out > 0 {
            tracing::warn!(
                id = slot.build.id,
                left_out,
                "the build has more outputs than a mount can show"
            );
        }
        Ok(Arc::new(tree))
    }

    /// How many builds there are, how many trees are in memory, and how many nodes these have.
    pub(super) fn counts(&self) -> (usize, usize, usize) {
        let known = self.known.read();
        let trees: Vec<usize> = known
            .by_id
            .values()
            .filter_map(|slot| Some(slot.tree()?.len()))
            .collect();
        (known.by_id.len(), trees.len(), trees.iter().sum())
    }
}

/// What the record answers, unless it takes too long.
async fn blocking<T: Send + 'static>(
    patience: Duration,
    ask: impl FnOnce() -> Result<T, Unread> + Send + 'static,
) -> Result<T, Unread> {
    match timeout(patience, tokio::task::spawn_blocking(ask)).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => Err(Unread(error.to_string())),
        Err(_) => Err(Unread("the record did not answer in time".to_owned())),
    }
}

impl Known {
    /// Takes in the lists of builds as they are now. Those of a state directory that has not answered stay.
    fn take(&mut self, lists: HashMap<usize, Vec<Build>>) {
        let mut before = std::mem::take(&mut self.by_id);
        let numbered = std::mem::take(&mut self.by_number);
        self.newest.clear();
        let silent = before.values().map(|slot| &slot.build);
        let silent: Vec<Build> = silent
            .filter(|build| !lists.contains_key(&build.state_dir))
            .cloned()
            .collect();
        let mut lists: Vec<(usize, Vec<Build>)> = lists.into_iter().collect();
        lists.sort_unstable_by_key(|(state_dir, _)| *state_dir);
        let told = lists.into_iter().flat_map(|(_, builds)| builds);
        for build in told.chain(silent) {
            // One of another machine changes nothing here, whatever its exec root is called.
            if !build.is_from_elsewhere {
                let began = (build.started_ms, build.id.clone());
                let root = (build.state_dir, build.exec_root.clone());
                let newest = self.newest.entry(root).or_insert_with(|| began.clone());
                if newest.0 <= began.0 {
                    *newest = began;
                }
            }
            // It comes from the build, as it likes; and two state directories may have one build.
            if !is_name(&build.id) || self.by_id.contains_key(&build.id) {
                continue;
            }
            let known = before.remove(&build.id);
            // While a build runs, more of it becomes known.
            let slot = match known.filter(|known| known.build.is_over == build.is_over) {
                Some(slot) => slot,
                None => self.slot(build),
            };
            self.by_id.insert(slot.build.id.clone(), slot);
        }
        // What somebody has open keeps its numbers, also if its build has ended or is not recorded any more.
        let open = numbered.into_iter().filter(|(_, slot)| slot.is_open());
        self.by_number = open.collect();
        let current = self.by_id.values().map(|slot| (slot.number, slot.clone()));
        self.by_number.extend(current);
        self.find_latest();
    }

    fn slot(&mut self, build: Build) -> Arc<Slot> {
        self.numbers += 1;
        Arc::new(Slot {
            number: self.numbers,
            build,
            tree: OnceCell::new(),
            failed: SyncMutex::default(),
            used: AtomicU64::new(0),
            pin: Arc::default(),
        })
    }

    /// Finds the newest build of each workspace: the last one that is over, and rather one of this machine.
    fn find_latest(&mut self) {
        let mut latest: BTreeMap<&str, &Build> = BTreeMap::new();
        let rank = |build: &Build| (!build.is_from_elsewhere, build.started_ms);
        let builds = self.by_id.values().map(|slot| &slot.build);
        for build in builds.filter(|build| build.is_over && !build.workspace.is_empty()) {
            let newest = latest.entry(&build.workspace).or_insert(build);
            if rank(build) > rank(newest) {
                *newest = build;
            }
        }
        for workspace in &mut self.workspaces {
            let newest = latest.remove(&*workspace.path);
            workspace.latest = newest.map(|build| build.id.clone()).unwrap_or_default();
        }
        for (path, build) in latest {
            let name = name_of(path, &self.workspaces);
            self.workspaces.push(Workspace {
                path: path.to_owned(),
                name,
                latest: build.id.clone(),
            });
        }
    }

    /// Gives up trees of which nobody has anything open or has looked at since `before`, where there are too many nodes, but
    /// not that of `keep`; and where there are twice too many, also those that somebody has looked at. Their builds get other
    /// inode numbers, so that none is taken for another.
    fn make_room(&mut self, keep: u32, most: usize, before: u64) {
        let loaded = |known: &Self| -> Vec<(u64, usize, Arc<Slot>)> {
            let slots = known.by_id.values();
            let loaded = slots.filter_map(|slot| {
                Some((
                    slot.used.load(Ordering::Relaxed),
                    slot.tree()?.len(),
                    slot.clone(),
                ))
            });
            loaded.collect()
        };
        let mut trees = loaded(self);
        trees.sort_by_key(|(used, ..)| *used);
        let mut nodes: usize = trees.iter().map(|(_, nodes, _)| nodes).sum();
        // Somebody who has looked at a build just now has not got to the end of it, however large it is.
        trees.pop();
        for (used, of_it, slot) in trees {
            let is_recent = used >= before && nodes <= most.saturating_mul(2);
            if nodes <= most || slot.number == keep || is_recent || slot.is_open() {
                continue;
            }
            nodes -= of_it;
            self.by_number.remove(&slot.number);
            let fresh = self.slot(slot.build.clone());
            self.by_number.insert(fresh.number, fresh.clone());
            self.by_id.insert(fresh.build.id.clone(), fresh);
        }
    }
}

/// Whether an invocation id can be the name of a directory, and part of a link that leads nowhere else.
fn is_name(id: &str) -> bool {
    let is_plain = !id.contains(['/', '\0']) && id.len() <= LONGEST_NAME;
    is_plain && !matches!(id, "" | "." | "..")
}

/// The name of a workspace's directory: its own, unless another one has it.
fn name_of(path: &str, others: &[Workspace]) -> String {
    let name = path.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    let is_taken = |name: &str| others.iter().any(|other| other.name == name);
    if is_name(name) && !matches!(name, BY_INVOCATION | OURS) && !is_taken(name) {
        return name.to_owned();
    }
    let hash = Digest::of(DigestFunction::Sha256, path.as_bytes()).hash_hex();
    // With the hash it is as long as a name may be.
    let mut end = name.len().min(LONGEST_NAME - 9);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}-{}", &name[..end], &hash[..8])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{exec_path::ExecPath, mount::tree::Content};

    fn build(id: &str, workspace: &str, started_ms: i64) -> Build {
        Build {
            id: id.to_owned(),
            workspace: workspace.to_owned(),
            exec_root: format!("/ob{workspace}"),
            started_ms,
            is_over: true,
            ..Build::default()
        }
    }

    /// Shows each build's id as a file, and whether it was the newest. Counts the questions; fails those about `broken`.
    #[derive(Default)]
    struct Fake(RwLock<Vec<Build>>, AtomicU64);

    impl Rows for Fake {
        fn builds(&self, _quietly: bool) -> Result<HashMap<usize, Vec<Build>>, Unread> {
            self.1.fetch_add(1, Ordering::Relaxed);
            if self.0.read().iter().any(|build| build.id == "broken list") {
                return Err(Unread("the record is broken".to_owned()));
            }
            let mut lists: HashMap<usize, Vec<Build>> = HashMap::from([(0, Vec::new())]);
            for build in self.0.read().iter() {
                lists.entry(build.state_dir).or_default().push(build.clone());
            }
            Ok(lists)
        }

        fn outputs(
            &self,
            build: &Build,
            is_newest: bool,
            mut tree: TreeBuilder,
        ) -> Result<TreeBuilder, Unread> {
            self.1.fetch_add(1, Ordering::Relaxed);
            if build.id == "broken" {
                return Err(Unread("the record is broken".to_owned()));
            }
            let path = ExecPath::new(&format!("bazel-out/{}-{is_newest}", build.id)).unwrap();
            tree.add(&path, Content::Directory, false);
            Ok(tree)
        }
    }

    fn catalog(builds: Vec<Build>) -> (Arc<Fake>, Catalog) {
        let rows = Arc::new(Fake(RwLock::new(builds), AtomicU64::new(0)));
        (rows.clone(), Catalog::new(rows))
    }

    async fn refreshed(catalog: &Catalog) -> Vec<(String, Option<String>)> {
        *catalog.refreshed.lock().await = None;
        catalog.refresh(false).await.unwrap();
        let workspaces = catalog.workspaces().into_iter();
        workspaces.map(|(at, name)| (name, catalog.latest(at))).collect()
    }

    #[tokio::test]
    async fn the_newest_build_that_is_over_is_the_latest_of_its_workspace() {
        let (rows, catalog) = catalog(vec![
            build("old", "/w/app", 10),
            build("new", "/w/app", 20),
            Build {
                is_over: false,
                ..build("running", "/w/app", 30)
            },
            Build {
                is_from_elsewhere: true,
                ..build("imported", "/w/app", 40)
            },
            build("other", "/v/app", 5),
        ]);
        let some = |id: &str| Some(id.to_owned());
        // The first by its path has the name.
        let other = format!(
            "app-{}",
            &Digest::of(DigestFunction::Sha256, b"/w/app").hash_hex()[..8]
        );
        let now = refreshed(&catalog).await;
        assert_eq!(
            now,
            [("app".to_owned(), some("other")), (other.clone(), some("new"))]
        );
        for build in rows.0.write().iter_mut() {
            build.is_over = true;
        }
        rows.0.write().retain(|build| build.id != "other");
        assert_eq!(refreshed(&catalog).await, [(other, some("running"))]);
        assert!(catalog.build("other").is_none() && catalog.build("old").is_some());
    }

    #[test]
    fn a_build_is_outdated_by_newer_ones_of_its_output_root() {
        let imported = Build {
            is_from_elsewhere: true,
            ..build("imported", "/w", 30)
        };
        let here = build("here", "/w", 20);
        for (other, is_outdated) in [
            (here.clone(), false),
            (imported, false),
            (build("old", "/w", 10), false),
            (build("elsewhere", "/v", 30), false),
            (build("new", "/w", 30), true),
        ] {
            assert_eq!(here.is_outdated(&[other]), is_outdated);
        }
    }

    #[tokio::test]
    async fn imported_builds_are_newest_of_no_output_root_here() {
        let imported = Build {
            is_from_elsewhere: true,
            ..build("imported", "/w", 20)
        };
        let (_, catalog) = catalog(vec![build("here", "/w", 10), imported]);
        refreshed(&catalog).await;
        let tree = catalog.tree(&catalog.build("here").unwrap()).await.unwrap();
        assert_eq!(tree.name(tree.len() as u32 - 1), "here-true");
    }

    #[tokio::test]
    async fn ids_that_are_no_names_are_not_shown() {
        let long = "x".repeat(LONGEST_NAME + 1);
        let bad = ["", ".", "..", "a/b", "../../../tmp/evil", &long];
        let mut builds: Vec<Build> = bad.iter().map(|id| build(id, "/w", 20)).collect();
        builds.push(build("good", "/w", 10));
        let (_, catalog) = catalog(builds);
        assert_eq!(
            refreshed(&catalog).await,
            [("w".to_owned(), Some("good".to_owned()))]
        );
        assert_eq!(catalog.builds().len(), 1);
        // They count for what is the newest of an output root.
        let tree = catalog.tree(&catalog.build("good").unwrap()).await.unwrap();
        assert_eq!(tree.name(tree.len() as u32 - 1), "good-false");
        assert_eq!(name_of(&format!("/{}", "ü".repeat(200)), &[]).len(), LONGEST_NAME);
    }

    #[tokio::test]
    async fn a_failure_is_told_to_all_who_ask_in_the_next_moment() {
        let (rows, catalog) = catalog(vec![build("broken", "/w", 10)]);
        refreshed(&catalog).await;
        let slot = catalog.build("broken").unwrap();
        let asked = || rows.1.load(Ordering::Relaxed);
        let before = asked();
        for _ in 0..3 {
            assert!(catalog.tree(&slot).await.is_err());
        }
        assert_eq!(asked(), before + 1);
        rows.0.write().push(build("broken list", "/w", 20));
        *catalog.refreshed.lock().await = None;
        for _ in 0..3 {
            assert!(catalog.refresh(false).await.is_err());
        }
        assert_eq!(asked(), before + 2);
        assert!(catalog.build("broken").is_some(), "what is known stays");
    }

    #[tokio::test]
    async fn builds_of_a_directory_that_does_not_answer_stay() {
        let apart = Build {
            state_dir: 1,
            ..build("apart", "/v", 10)
        };
        let (rows, catalog) = catalog(vec![apart, build("gone", "/w", 10)]);
        refreshed(&catalog).await;
        rows.0.write().clear();
        assert_eq!(
            refreshed(&catalog).await,
            [("v".to_owned(), Some("apart".to_owned()))]
        );
    }

    #[tokio::test]
    async fn only_the_newest_of_a_root_has_what_is_recorded_of_it() {
        let (rows, catalog) = catalog(vec![build("old", "/w", 10), build("new", "/w", 20)]);
        refreshed(&catalog).await;
        let names = async |id: &str| {
            let slot = catalog.build(id).unwrap();
            let tree = catalog.tree(&slot).await.unwrap();
            tree.name(tree.len() as u32 - 1).to_owned()
        };
        assert_eq!(names("old").await, "old-false");
        assert_eq!(names("new").await, "new-true");
        // What was read stays as it is.
        rows.0.write().push(build("newer", "/w", 30));
        refreshed(&catalog).await;
        assert_eq!(names("new").await, "new-true");
        assert_eq!(names("newer").await, "newer-true");
    }

    #[tokio::test]
    async fn trees_beyond_the_bound_are_given_up_and_get_other_numbers() {
        let (_, mut catalog) = catalog((0..6).map(|n| build(&n.to_string(), "/w", n)).collect());
        catalog.most_nodes = 6;
        catalog.recent = Duration::ZERO;
        refreshed(&catalog).await;
        let mut numbers = Vec::new();
        for id in ["0", "1", "2"] {
            let slot = catalog.build(id).unwrap();
            catalog.tree(&slot).await.unwrap();
            numbers.push(slot.number);
            // As for each question about something in the first.
            assert!(catalog.slot(numbers[0]).is_some());
        }
        assert_eq!(catalog.counts(), (6, 2, 6));
        assert!(catalog.slot(numbers[1]).is_none(), "it was used longest ago");
        assert!(catalog.slot(numbers[0]).is_some_and(|slot| slot.tree().is_some()));
        let again = catalog.build("1").unwrap();
        assert!(again.tree().is_none() && again.number > numbers[2]);

        // What is open stays, and what was looked at a moment ago.
        let pin = catalog.slot(numbers[0]).unwrap().pin();
        for id in ["3", "4"] {
            catalog.tree(&catalog.build(id).unwrap()).await.unwrap();
        }
        assert!(catalog.slot(numbers[0]).is_some() && catalog.slot(numbers[2]).is_none());
        drop(pin);
        catalog.recent = RECENT;
        catalog.tree(&catalog.build("5").unwrap()).await.unwrap();
        assert_eq!(catalog.counts(), (6, 3, 9));
        // Of these, twice as many as the bound allows stay at most.
        for id in ["0", "1", "2"] {
            catalog.tree(&catalog.build(id).unwrap()).await.unwrap();
        }
        assert_eq!(catalog.counts(), (6, 4, 12));
        catalog.recent = Duration::ZERO;
        *catalog.refreshed.lock().await = None;
        catalog.refresh(false).await.unwrap();
        assert_eq!(catalog.counts(), (6, 2, 6), "without anybody who looks");
    }

    #[tokio::test]
    async fn what_is_open_keeps_its_numbers_when_its_build_ends_or_is_forgotten() {
        let running = Build {
            is_over: false,
            ..build("running", "/w", 10)
        };
        let (rows, catalog) = catalog(vec![running, build("over", "/w", 5)]);
        refreshed(&catalog).await;
        let [running, over] = ["running", "over"].map(|id| catalog.build(id).unwrap());
        let pins = [running.pin(), over.pin()];
        rows.0.write().retain_mut(|build| {
            build.is_over = true;
            build.id == "running"
        });
        refreshed(&catalog).await;
        let now = catalog.build("running").unwrap();
        assert_ne!(now.number, running.number);
        assert!(catalog.slot(running.number).is_some() && catalog.slot(over.number).is_some());
        drop(pins);
        refreshed(&catalog).await;
        assert!(catalog.slot(running.number).is_none() && catalog.slot(over.number).is_none());
        assert_eq!(catalog.build("running").unwrap().number, now.number);
    }

    #[tokio::test]
    async fn a_build_of_two_state_directories_is_one() {
        let again = Build {
            state_dir: 1,
            ..build("one", "/w", 10)
        };
        let (_, catalog) = catalog(vec![again, build("one", "/w", 10)]);
        refreshed(&catalog).await;
        let first = catalog.build("one").unwrap();
        assert_eq!(first.build.state_dir, 0);
        for _ in 0..5 {
            refreshed(&catalog).await;
            assert_eq!(catalog.build("one").unwrap().number, first.number);
        }
    }
}
