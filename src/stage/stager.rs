//! Brings what is asked for to the directory.
//!
//! In this order: which build, which outputs (from its journal), what of them is there already, what the output tree
//! has, and whether the cache has the rest. Only when nothing required is missing is anything written: what is
//! required first, then the marker, then what is optional, and the marker again.

use std::{
    collections::HashMap,
    collections::HashSet,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::spawn_blocking,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    blocking,
    destination::{Destination, Reach},
    ended::{Ends, Gathered, Staged},
    error::StageError,
    gather::{Archives, Gather},
    recorded::Recorded,
    request::{Caller, Manner, Request, Wish},
    runfiles,
    select::{Artifact, Selection},
    together::Directories,
    work::Work,
};
use crate::{
    builds::StreamKey,
    digest::{Digest, DigestFunction},
    exec_path::ExecPath,
    invocation::{Engine, build::Effect, elsewhere::Elsewhere},
    journal::{Entry, Journal, JournalError},
    materialize::{
        Awaited, Counted, Materializer, Root, Session, Want,
        place::{Epoch, OutputRoot},
    },
    output::{Class, OutputContent},
    record::{InvocationRow, InvocationState, OutputState, Record, Which},
    remote::{Attribution, BlobStore, Copy, LocalFirst, Nowhere, looks_right},
    roots::Roots,
    sources::{Sources, address_of},
};

/// Numbers of staged directories among output roots: above all that builds are given.
const FIRST_ROOT: u32 = 1 << 31;
/// The version of a staged directory, and one that comes after it and wants nothing.
const WANTED: u64 = 0;
const GIVEN_UP: u64 = WANTED + 1;
/// Builds that are read and staged at a time; others wait.
const PLACES: usize = 8;

/// Stages outputs of recorded builds. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Stager {
    record: Record,
    materializer: Materializer,
    roots: Arc<Roots>,
    sources: Arc<Sources>,
    /// Says which builds are still running; none where no builds are followed.
    engine: Option<Engine>,
    journal: PathBuf,
    /// Which directories and URLs may be named.
    reach: Reach,
    /// How collections are reached.
    archives: Archives,
    /// Builds that are read, or staged, at a time: all that their journals have is in memory.
    places: Arc<Semaphore>,
    next: Arc<AtomicU32>,
    /// How many stages are on their way.
    working: TaskTracker,
    directories: Directories,
}

/// What would be staged.
pub(crate) struct Plan {
    /// The build that is staged.
    pub(crate) build: InvocationRow,
    /// The selected outputs; none of a collection.
    pub(crate) selection: Selection,
    pub(super) wish: Wish,
    /// Files of a collection.
    pub(super) gather: Gather,
    /// Where the build said that its blobs are, if the record does not know.
    recorded: Recorded,
    pub(super) runfiles: runfiles::Added,
    /// The build's journal; none of a collection.
    pub(super) journal: Option<PathBuf>,
    _place: OwnedSemaphorePermit,
}

impl Plan {
    /// Why an output that would be staged is not available, as far as that is known.
    pub(crate) fn error(&self, artifact: &Artifact) -> Option<&str> {
        self.runfiles.error(&artifact.place)
    }

    /// Where the bytes of an output are on this machine, if no cache need have them.
    pub(crate) fn local(&self, artifact: &Artifact) -> Option<PathBuf> {
        self.runfiles.local(&artifact.content)
    }

    /// The files of a collection that would be staged.
    pub(crate) fn gathered(&self) -> Vec<Gathered> {
        self.gather.ends()
    }
}

impl Stager {
    /// Stages from the journals of a directory.
    pub(crate) fn new(
        record: Record,
        materializer: Materializer,
        roots: Arc<Roots>,
        sources: Arc<Sources>,
        engine: Option<Engine>,
        journal: PathBuf,
    ) -> Self {
        Self {
            record,
            materializer,
            roots,
            sources,
            engine,
            journal,
            reach: Reach::default(),
            archives: Archives::default(),
            places: Arc::new(Semaphore::new(PLACES)),
            next: Arc::new(AtomicU32::new(FIRST_ROOT)),
            working: TaskTracker::new(),
            directories: Directories::default(),
        }
    }

    /// The same, also from collections.
    pub(crate) fn with_archives(self, archives: Archives) -> Self {
        Self { archives, ..self }
    }

    /// The same for callers with a reach of their own, who wait for each other and keep nobody else waiting.
    pub(crate) fn within(self, reach: Reach) -> Self {
        Self {
            reach,
            places: Arc::new(Semaphore::new(PLACES)),
            ..self
        }
    }

    /// Whether anything is being staged, optional outputs after an answer included.
    pub(crate) fn is_busy(&self) -> bool {
        !self.working.is_empty()
    }

    /// Opens a directory that is to be staged into, or was, if it may be named; `None` if it is not there.
    ///
    /// # Errors
    /// When it may not be named, or not be opened.
    pub(crate) async fn destination(
        &self,
        directory: &Path,
        make: bool,
    ) -> Result<Option<Destination>, StageError> {
        let (reach, directory) = (self.reach.clone(), directory.to_owned());
        let state = self.journal.parent().map(Path::to_owned);
        blocking("opening the directory", move || {
            reach.open(&directory, state.as_deref(), make)
        })
        .await
    }

    /// Every path that a build names, whatever was wanted of it.
    ///
    /// # Errors
    /// When its journal is gone, or cannot be read.
    pub(crate) async fn named(&self, which: &Which) -> Result<HashSet<String>, StageError> {
        let (_, entry) = self.find(which).await?;
        let function = self.sources.digest_function();
        blocking("reading the journal", move || {
            let effects = read(&entry, function)?.replay(Vec::new(), &HashSet::new());
            let outputs = effects.into_iter().filter_map(|effect| match effect {
                Effect::Outputs(_, named) => Some(named),
                _ => None,
            });
            Ok(outputs.flatten().map(|output| output.path.to_string()).collect())
        })
        .await
    }

    /// Finds out what a wish comes to. Writes nothing, and ends when nobody waits for it any more.
    ///
    /// # Errors
    /// When there is no such build, it still runs, its journal cannot be read, or the wish does not fit it.
    pub(crate) async fn plan(&self, which: &Which, wish: &Wish, manner: &Manner) -> Result<Plan, StageError> {
        manner.check_for_build()?;
        let place = Arc::clone(&self.places).acquire_owned().await;
        let place = place.map_err(|e| StageError::Internal(e.to_string()))?;
        let gather = self.gather(manner).await?;
        let caller = Caller::default();
        let (wish, still) = (wish.clone(), caller.0.clone());
        let request = blocking("reading the patterns", move || Request::for_caller(wish, still)).await?;
        let (row, entry) = if manner.so_far {
            self.find_so_far(which).await?
        } else {
            self.find(which).await?
        };
        let function = self.sources.digest_function();
        let (record, roots) = (self.record.clone(), self.roots.clone());
        let is_bounded = self.reach.is_bounded();
        let plan = blocking("reading the journal", move || {
            let recorded = read(&entry, function)?;
            let mut selection = recorded.select(&row.invocation_id, &request)?;
            let mut runfiles = runfiles::Added::default();
            if request.wish.runfiles {
                if is_bounded {
                    return Err(StageError::Setting {
                        flag: "--runfiles".to_owned(),
                        reason: "takes files that are no outputs, which callers over TCP may not stage"
                            .to_owned(),
                    });
                }
                let build = runfiles::Build {
                    row: &row,
                    function: recorded.function.unwrap_or(DigestFunction::Sha256),
                    carried: &recorded.carried,
                };
                runfiles = runfiles::add(&mut selection, &record, &roots, &build, &request)?;
            }
            if !recorded.finished {
                selection.notes.push(
                    "the build's events are incomplete; outputs that it built later are unknown".to_owned(),
                );
            }
            Ok(Plan {
                build: row,
                selection,
                wish: request.wish,
                recorded,
                gather,
                runfiles,
                journal: Some(entry.path),
                _place: place,
            })
        });
        plan.await
    }

    /// Finds out which files of collections, and which blobs, a wish comes to. Lists the collections; writes nothing.
    ///
    /// # Errors
    /// When the caller may not name a URL, it cannot be listed, or the wish does not fit it.
    pub(crate) async fn plan_from(
        &self,
        from: &[String],
        wish: &Wish,
        manner: &Manner,
    ) -> Result<Plan, StageError> {
        let place = Arc::clone(&self.places).acquire_owned().await;
        let place = place.map_err(|e| StageError::Internal(e.to_string()))?;
        let gather = self.gather(manner).await?;
        Ok(Plan {
            build: InvocationRow::default(),
            selection: Selection::default(),
            gather: self
                .archives
                .choose(gather, from, wish, &self.reach, &self.sources)
                .await?,
            wish: wish.clone(),
            recorded: Recorded::default(),
            runfiles: runfiles::Added::default(),
            journal: None,
            _place: place,
        })
    }

    /// Files that are yet to be chosen.
    async fn gather(&self, manner: &Manner) -> Result<Gather, StageError> {
        let (manner, is_bounded) = (manner.clone(), self.reach.is_bounded());
        blocking("reading the settings", move || {
            Archives::gather(&manner, is_bounded)
        })
        .await
    }

    /// The build that is meant, and its journal.
    ///
    /// # Errors
    /// When there is none, or it still runs.
    pub(crate) async fn find(&self, which: &Which) -> Result<(InvocationRow, Entry), StageError> {
        let (row, entry) = self.find_so_far(which).await?;
        if let Some(engine) = &self.engine
            && let Some((now, _)) = engine.snapshot(&row.invocation_id).await
            && now.state == InvocationState::Running
        {
            return Err(StageError::Running(row.invocation_id));
        }
        Ok((row, entry))
    }

    /// The same, also of one that runs.
    async fn find_so_far(&self, which: &Which) -> Result<(InvocationRow, Entry), StageError> {
        let (stager, which) = (self.clone(), which.clone());
        let found = blocking("looking for the build", move || {
            let row = stager.row(&which)?;
            let journal = Journal::view(&stager.journal);
            let entry = journal
                .find_stream(&StreamKey {
                    build_id: row.build_id.clone(),
                    invocation_id: row.invocation_id.clone(),
                    ..StreamKey::default()
                })
                .map_err(|source| StageError::Journal {
                    invocation_id: row.invocation_id.clone(),
                    source,
                })?;
            Ok((row, entry))
        });
        found.await
    }

    fn row(&self, which: &Which) -> Result<InvocationRow, StageError> {
        self.record
            .find_invocation_with_outputs(which)
            .or_else(|| self.row_from_journal(&which.invocation_id))
            .ok_or_else(|| StageError::Unknown(which.not_recorded()))
    }

    /// The record may be lost; the journal has the most important things too.
    fn row_from_journal(&self, id: &str) -> Option<InvocationRow> {
        let id = Some(id).filter(|id| !id.is_empty())?;
        let entry = Journal::view(&self.journal).find(id).ok()?;
        read(&entry, self.sources.digest_function())
            .ok()
            .map(|recorded| recorded.row(&entry.key))
    }

    /// Stages what was planned, and counts how far it is. Answers when what is required is there; if the caller is `gone`
    /// before that, the rest is given up.
    ///
    /// # Errors
    /// When the directory cannot be used, or a marker cannot be written. That an output failed to download is not an error
    /// but an [`Ended`](super::Ended) that says so.
    pub(crate) async fn stage(
        &self,
        plan: Plan,
        directory: &Path,
        (counted, gone): (Arc<Counted>, &CancellationToken),
    ) -> Result<Staged, StageError> {
        let working = self.working.token();
        let destination = self.destination(directory, false).await?;
        let store = self.store(&plan).await;
        let attribution = Arc::new(Attribution {
            invocation_id: plan.build.invocation_id.clone(),
            build_id: plan.build.build_id.clone(),
            ..Attribution::default()
        });
        let real = destination.as_ref().map_or(directory, |there| &there.real);
        let together = self.directories.at(real);
        let mut work = Work::new(plan, directory, destination, store, working, together);
        work.find_present().await?;
        work.find_evicted(&attribution).await;
        if work.failed() {
            return Ok(work.staged(false, None));
        }
        let (made, place) = self.open(directory).await?;
        work.opened(made);
        work.make_way().await?;
        let root = Arc::new(Root {
            id: self.next.fetch_add(1, Ordering::Relaxed),
            place: Arc::new(place),
            epoch: Epoch::new(),
        });
        let session = |completions| Session {
            root: root.clone(),
            version: WANTED,
            store: work.store.clone(),
            attribution,
            trace: None,
            served: None,
            completions,
        };
        let mut request = (self.materializer.request(session, work.wants()).await).counted_by(counted);
        let ended = gone.run_until_cancelled(required(&mut work, &mut request)).await;
        let ended = ended.unwrap_or_else(|| Err(super::request::gone()));
        if !matches!(ended, Ok(true)) {
            // Optional outputs may still be on their way, and nothing may come after the answer.
            self.materializer.begin(&root, GIVEN_UP).await;
            while let Some(list) = request.next().await {
                work.take(list);
            }
            self.let_go(&root).await;
            return ended.map(|_| work.staged(false, None));
        }
        if request.optional == 0 && !work.is_gathering() {
            self.let_go(&root).await;
            work.conclude(&request, true).await?;
            return Ok(work.staged(true, None));
        }
        let stager = self.clone();
        let (Ends { outputs, gathered }, notes) = (work.ends(), work.notes.clone());
        let rest = tokio::spawn(async move {
            while let Some(list) = request.next().await {
                work.take(list);
            }
            if let Err(error) = work.gather(Class::Optional).await {
                tracing::error!("failed to stage optional archives: {error}");
            }
            stager.let_go(&root).await;
            if let Err(error) = work.conclude(&request, true).await {
                tracing::error!("failed to complete the marker of the staged tree: {error}");
            }
            work.ends()
        });
        Ok(Staged {
            staged: true,
            outputs,
            gathered,
            notes,
            rest: Some(rest),
        })
    }

    /// Opens the directory to be written into.
    async fn open(&self, directory: &Path) -> Result<(Destination, OutputRoot), StageError> {
        let failed = |reason: String| StageError::Setting {
            flag: format!("--to={}", directory.display()),
            reason,
        };
        let made = self.destination(directory, true).await?;
        let made = made.ok_or_else(|| failed("failed to create it".to_owned()))?;
        let opened = spawn_blocking(move || {
            let place = OutputRoot::open(&made.real, true).map_err(|e| e.to_string())?;
            // Another directory may have come into its place since it was judged.
            if !made.is(place.device(), place.inode()) {
                return Err("it was replaced by another directory".to_owned());
            }
            // What a stage that was killed has left; what a living one uses stays.
            if let Err(error) = place.sweep() {
                tracing::debug!(directory = %made.real.display(), "failed to sweep temporary files: {error}");
            }
            Ok((made, place))
        });
        opened
            .await
            .map_err(|e| StageError::Internal(e.to_string()))?
            .map_err(failed)
    }

    async fn let_go(&self, root: &Arc<Root>) {
        self.materializer.forget(root).await;
        let place = root.place.clone();
        // Removes a directory or two.
        let _ = spawn_blocking(move || place.let_go()).await;
    }

    /// Where bytes come from: the output tree where the record vouches for a file, and the build's cache.
    async fn store(&self, plan: &Plan) -> Arc<LocalFirst> {
        let row = &plan.build;
        if !plan.gather.from().is_empty() {
            let nowhere = Nowhere("there is no build".to_owned());
            return Arc::new(LocalFirst::new(HashMap::new(), Arc::new(nowhere)));
        }
        let cache = if row.root.is_none() {
            // It was brought here from elsewhere, or only its journal is left, which looks the same. What somebody else
            // may have written decides neither who gets credentials nor which program supplies them.
            let named = match row.remote_cache.as_str() {
                "" => plan.recorded.command_line().as_ref().and_then(address_of),
                endpoint => Some((endpoint.to_owned(), row.remote_instance_name.clone())),
            };
            let (endpoint, instance_name) = named.unwrap_or_default();
            self.sources.of_import(&endpoint, &instance_name)
        } else if row.remote_cache.is_empty()
            || row.outputs.downloaded + row.outputs.present + row.outputs.failed == 0
        {
            // Nothing was wanted, so nobody has needed it: the command line says how it is reached.
            self.sources.of_build(
                plan.recorded.command_line().as_ref(),
                &plan.recorded.directories(),
            )
        } else {
            self.sources
                .of_record(&row.remote_cache, &row.remote_instance_name)
        };
        let cache: Arc<dyn BlobStore> = match cache {
            Ok(cache) => cache.blobs(),
            Err(error) => Arc::new(Nowhere(error.to_string())),
        };
        let (record, root) = (self.record.clone(), row.root);
        let wanted: Vec<(ExecPath, Digest)> = plan
            .selection
            .artifacts
            .iter()
            .filter_map(|artifact| match &artifact.content {
                OutputContent::Blob(digest) => Some((artifact.exec_path.clone(), digest.clone())),
                _ => None,
            })
            .collect();
        let copies = spawn_blocking(move || {
            let mut copies = HashMap::new();
            let Some((id, root)) = root.and_then(|id| Some((id, record.root_row(id)?))) else {
                return copies;
            };
            let here: Arc<Path> = Path::new(&root.path).into();
            let paths: Vec<ExecPath> = wanted.iter().map(|(path, _)| path.clone()).collect();
            for ((path, digest), row) in wanted.into_iter().zip(record.outputs(id, &paths)) {
                let Some(row) = row.filter(|row| {
                    row.state == OutputState::Materialized
                        && row.content == OutputContent::Blob(digest.clone())
                }) else {
                    continue;
                };
                let Some(stamp) = row.stamp else { continue };
                let root = here.clone();
                let copy = Copy { root, path, stamp };
                if looks_right(&copy, digest.size()) {
                    copies.insert(digest, copy);
                }
            }
            copies
        });
        let copies = copies.await.unwrap_or_default();
        let store = Arc::new(LocalFirst::new(copies, cache).with_only(plan.runfiles.copies.clone()));
        self.look_elsewhere(plan, &store).await;
        store
    }

    /// Looks for what the build's own output root does not have among the outputs of others.
    async fn look_elsewhere(&self, plan: &Plan, store: &Arc<LocalFirst>) {
        if !self.engine.as_ref().is_some_and(Engine::has_local_sources) {
            return;
        }
        let missing = plan.selection.artifacts.iter().filter(
            |artifact| matches!(&artifact.content, OutputContent::Blob(digest) if !store.has_copy(digest)),
        );
        let wants: Vec<Want> = missing
            .map(|artifact| {
                Want::new(
                    artifact.exec_path.clone(),
                    artifact.content.clone(),
                    artifact.class,
                    None,
                )
            })
            .collect();
        let (record, own, offer) = (self.record.clone(), plan.build.root, store.offer());
        // What is not found comes from the cache.
        let _ = spawn_blocking(move || {
            let mut elsewhere = Elsewhere::new(&record, own, offer);
            elsewhere.look_for_absent(&record, &wants);
            elsewhere.for_good();
        })
        .await;
    }
}

/// Waits for what is required, and leaves the marker. False if something of it failed to download.
async fn required(work: &mut Work, request: &mut Awaited) -> Result<bool, StageError> {
    while request.required > 0 {
        let Some(list) = request.next().await else {
            return Err(StageError::Internal("the coordinator is gone".to_owned()));
        };
        work.take(list);
    }
    if !work.failed() {
        work.gather(Class::Required).await?;
    }
    if work.failed() {
        return Ok(false);
    }
    work.conclude(request, false).await?;
    Ok(true)
}

/// Reads all of a journal. Blocks.
fn read(entry: &Entry, function: DigestFunction) -> Result<Recorded, StageError> {
    let error = |source: JournalError| StageError::Journal {
        invocation_id: entry.key.invocation_id.clone(),
        source,
    };
    Recorded::read(entry.read().map_err(error)?, Some(function)).map_err(error)
}
