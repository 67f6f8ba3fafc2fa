//! Which builds there are, under which names, and the trees of those that somebody has looked at.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::RwLock;
use tokio::{
    sync::{Mutex, OnceCell},
    time::timeout,
};

use super::tree::{Tree, TreeBuilder};
use crate::digest::{Digest, DigestFunction};

/// How long the list of builds counts as new.
const FRESH: Duration = Duration::from_secs(1);

/// How long the record may take to answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// How many files, links and directories of builds are kept in memory; beyond it, builds that nobody has looked at for long
/// are read again when somebody does.
const MOST_NODES: usize = 4_000_000;

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
    pub(crate) door: usize,
}

/// Where builds and their outputs are recorded. It is asked on threads that may block.
pub(crate) trait Rows: Send + Sync + 'static {
    /// The builds that may have outputs, of each state directory that answers, by its place. With `quietly`, only what daemons
    /// tell.
    ///
    /// # Errors
    /// In words, when the record cannot be read.
    fn builds(&self, quietly: bool) -> Result<HashMap<usize, Vec<Build>>, String>;

    /// Adds all outputs of a build to a tree: all that is recorded of its output root if it is the newest of it, what it
    /// has named itself otherwise.
    ///
    /// # Errors
    /// In words, when they cannot be read.
    fn outputs(&self, build: &Build, is_newest: bool, tree: TreeBuilder) -> Result<TreeBuilder, String>;
}

/// A build in the mount.
pub(super) struct Slot {
    /// The upper half of its inode numbers; never used again.
    pub(super) number: u32,
    pub(super) build: Build,
    tree: OnceCell<Arc<Tree>>,
    /// When somebody looked at it last, as a count of looks.
    used: AtomicU64,
}

impl Slot {
    /// Its tree, if it is in memory.
    pub(super) fn tree(&self) -> Option<&Arc<Tree>> {
        self.tree.get()
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
    /// The newest build of each exec root.
    newest: HashMap<(usize, String), String>,
    numbers: u32,
}

/// The builds.
pub(super) struct Catalog {
    rows: Arc<dyn Rows>,
    known: RwLock<Known>,
    /// When the list was read last.
    refreshed: Mutex<Option<Instant>>,
    looks: AtomicU64,
    most_nodes: usize,
}

impl Catalog {
    /// With nothing in it.
    pub(super) fn new(rows: Arc<dyn Rows>) -> Self {
        Self {
            rows,
            known: RwLock::default(),
            refreshed: Mutex::new(None),
            looks: AtomicU64::new(0),
            most_nodes: MOST_NODES,
        }
    }

    /// Reads the list of builds, unless it was read a moment ago. With `quietly`, only from a daemon.
    ///
    /// # Errors
    /// In words; what was known before is known still.
    pub(super) async fn refresh(&self, quietly: bool) -> Result<(), String> {
        let mut refreshed = self.refreshed.lock().await;
        if refreshed.is_some_and(|at| at.elapsed() < FRESH) {
            return Ok(());
        }
        let rows = self.rows.clone();
        let asked = blocking(PATIENCE, move || rows.builds(quietly));
        let builds = asked.await?;
        if !builds.is_empty() {
            self.known.write().take(builds);
        }
        if !quietly {
            *refreshed = Some(Instant::now());
        }
        Ok(())
    }

    /// The build with this id.
    pub(super) fn build(&self, id: &str) -> Option<Arc<Slot>> {
        self.known.read().by_id.get(id).cloned()
    }

    /// The build with this number; none if it was read again under another one.
    pub(super) fn slot(&self, number: u32) -> Option<Arc<Slot>> {
        self.known.read().by_number.get(&number).cloned()
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
    /// In words, when it cannot be read.
    pub(super) async fn tree(&self, slot: &Arc<Slot>) -> Result<Arc<Tree>, String> {
        let look = self.looks.fetch_add(1, Ordering::Relaxed);
        slot.used.store(look, Ordering::Relaxed);
        let read = async {
            let build = &slot.build;
            let is_newest = {
                let known = self.known.read();
                let newest = known.newest.get(&(build.door, build.exec_root.clone()));
                newest.is_some_and(|id| *id == build.id)
            };
            let (rows, build) = (self.rows.clone(), build.clone());
            let filled = blocking(PATIENCE * 6, move || {
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
            Ok::<_, String>(Arc::new(tree))
        };
        let tree = slot.tree.get_or_try_init(|| read).await?.clone();
        self.known.write().make_room(slot.number, self.most_nodes);
        Ok(tree)
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
    ask: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    match timeout(patience, tokio::task::spawn_blocking(ask)).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the record did not answer in time".to_owned()),
    }
}

impl Known {
    /// Takes in the lists of builds as they are now. Those of a state directory that has not answered stay.
    fn take(&mut self, lists: HashMap<usize, Vec<Build>>) {
        let mut before = std::mem::take(&mut self.by_id);
        self.newest.clear();
        let silent = before.values().map(|slot| &slot.build);
        let silent: Vec<Build> = silent
            .filter(|build| !lists.contains_key(&build.door))
            .cloned()
            .collect();
        for build in lists.into_values().flatten().chain(silent) {
            let root = (build.door, build.exec_root.clone());
            let newest = self.newest.entry(root).or_default();
            let began =
                |id: &str, by_id: &BTreeMap<String, Arc<Slot>>| by_id.get(id).map(|s| s.build.started_ms);
            if began(newest, &self.by_id).is_none_or(|began| began <= build.started_ms) {
                newest.clone_from(&build.id);
            }
            let known = before.remove(&build.id);
            // While a build runs, more of it becomes known.
            let slot = match known.filter(|known| known.build.is_over == build.is_over) {
                Some(slot) => slot,
                None => self.slot(build),
            };
            self.by_id.insert(slot.build.id.clone(), slot);
        }
        self.by_number = self
            .by_id
            .values()
            .map(|slot| (slot.number, slot.clone()))
            .collect();
        self.find_latest();
    }

    fn slot(&mut self, build: Build) -> Arc<Slot> {
        self.numbers += 1;
        Arc::new(Slot {
            number: self.numbers,
            build,
            tree: OnceCell::new(),
            used: AtomicU64::new(0),
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

    /// Gives up trees that nobody has looked at for long, where there are too many nodes, but not that of `keep`. Their
    /// builds get other inode numbers, so that none is taken for another.
    fn make_room(&mut self, keep: u32, most: usize) {
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
        for (_, of_it, slot) in trees {
            if nodes <= most || slot.number == keep {
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

/// The name of a workspace's directory: its own, unless another one has it.
fn name_of(path: &str, others: &[Workspace]) -> String {
    let name = path.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    let is_taken = |name: &str| others.iter().any(|other| other.name == name);
    if !matches!(name, "" | "." | ".." | BY_INVOCATION | OURS) && !is_taken(name) {
        return name.to_owned();
    }
    let hash = Digest::of(DigestFunction::Sha256, path.as_bytes()).hash_hex();
    format!("{name}-{}", &hash[..8])
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

    /// Shows each build's id as a file, and whether it was the newest.
    struct Fake(RwLock<Vec<Build>>);

    impl Rows for Fake {
        fn builds(&self, _quietly: bool) -> Result<HashMap<usize, Vec<Build>>, String> {
            let mut lists: HashMap<usize, Vec<Build>> = HashMap::from([(0, Vec::new())]);
            for build in self.0.read().iter() {
                lists.entry(build.door).or_default().push(build.clone());
            }
            Ok(lists)
        }

        fn outputs(
            &self,
            build: &Build,
            is_newest: bool,
            mut tree: TreeBuilder,
        ) -> Result<TreeBuilder, String> {
            let path = ExecPath::new(&format!("bazel-out/{}-{is_newest}", build.id)).unwrap();
            tree.add(&path, Content::Directory, false);
            Ok(tree)
        }
    }

    fn catalog(builds: Vec<Build>) -> (Arc<Fake>, Catalog) {
        let rows = Arc::new(Fake(RwLock::new(builds)));
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

    #[tokio::test]
    async fn builds_of_a_directory_that_does_not_answer_stay() {
        let apart = Build {
            door: 1,
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
        let (_, mut catalog) = catalog((0..4).map(|n| build(&n.to_string(), "/w", n)).collect());
        catalog.most_nodes = 6;
        refreshed(&catalog).await;
        let mut numbers = Vec::new();
        for id in ["0", "1", "0", "2"] {
            let slot = catalog.build(id).unwrap();
            catalog.tree(&slot).await.unwrap();
            numbers.push(slot.number);
        }
        assert_eq!(catalog.counts(), (4, 2, 6));
        assert!(catalog.slot(numbers[1]).is_none(), "it was used longest ago");
        assert!(catalog.slot(numbers[0]).is_some_and(|slot| slot.tree().is_some()));
        let again = catalog.build("1").unwrap();
        assert!(again.tree().is_none() && again.number > numbers[3]);
    }
}
