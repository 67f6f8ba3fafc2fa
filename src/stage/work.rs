//! One stage on its way: what is there, what is missing, what has ended how, and the marker at the end.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use tokio::task::JoinHandle;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::{
    blocking,
    check::{self, Wanted},
    destination::Destination,
    ended::{Brought, Ended, Ends, Gathered, Staged},
    error::StageError,
    gather::Gather,
    marker::{self, Marker, Missing},
    select::Artifact,
    stager::Plan,
    together::Together,
};
use crate::{
    digest::Digest,
    exec_path::ExecPath,
    materialize::{Awaited, Completion, Outcome, Want, place::Check},
    output::{Class, OutputContent, Stamp},
    remote::{Attribution, BlobStore, LocalFirst},
    transport::RemoteErrorKind,
};

/// One stage on its way.
pub(super) struct Work {
    pub(super) plan: Plan,
    /// Where it is read and written: by the path that was asked for as long as it is not there, and then by its
    /// descriptor.
    directory: PathBuf,
    destination: Option<Destination>,
    pub(super) store: Arc<LocalFirst>,
    /// Results of outputs, by path in the directory.
    ends: HashMap<ExecPath, End>,
    pub(super) notes: Vec<String>,
    /// What earlier stages put where an optional output is still on its way.
    stale: Vec<marker::File>,
    /// Counts it as under way.
    _working: TaskTrackerToken,
    /// Files of a collection, and archives that are unpacked.
    gather: Gather,
    /// The stages into this directory, and what this one names.
    together: Arc<Together>,
    names: Arc<HashSet<String>>,
}

/// How one output ended.
#[derive(Debug, Clone)]
struct End {
    outcome: Option<Brought>,
    error: String,
    stamp: Option<Stamp>,
}

impl End {
    fn there(outcome: Brought, stamp: Option<Stamp>) -> Self {
        Self {
            outcome: Some(outcome),
            error: String::new(),
            stamp,
        }
    }

    fn failed(error: String) -> Self {
        Self {
            outcome: None,
            error,
            stamp: None,
        }
    }
}

impl Work {
    pub(super) fn new(
        mut plan: Plan,
        asked: &Path,
        destination: Option<Destination>,
        store: Arc<LocalFirst>,
        working: TaskTrackerToken,
        together: Arc<Together>,
    ) -> Self {
        let mut gather = std::mem::take(&mut plan.gather);
        if plan.wish.extract {
            let store: Arc<dyn BlobStore> = store.clone();
            gather.take_archives(&mut plan.selection.artifacts, &store);
        }
        let artifacts = &plan.selection.artifacts;
        gather.reserve(artifacts);
        let names = artifacts.iter().map(|artifact| artifact.place.to_string());
        let absent = std::mem::take(&mut plan.runfiles.absent).into_iter();
        Self {
            names: Arc::new(names.collect()),
            gather,
            together,
            ends: absent
                .map(|(place, reason)| (place, End::failed(reason)))
                .collect(),
            notes: plan.selection.notes.clone(),
            stale: Vec::new(),
            directory: destination
                .as_ref()
                .map_or_else(|| asked.to_owned(), Destination::path),
            destination,
            plan,
            store,
            _working: working,
        }
    }

    /// It is there now.
    pub(super) fn opened(&mut self, destination: Destination) {
        self.directory = destination.path();
        self.destination = Some(destination);
    }

    /// An error in the words of the caller.
    fn name_in(&self, error: StageError) -> StageError {
        match &self.destination {
            Some(destination) => destination.name_in(error),
            None => error,
        }
    }

    /// What is in the directory already, without asking anybody.
    pub(super) async fn find_present(&mut self) -> Result<(), StageError> {
        let directory = self.directory.clone();
        let wanted: Vec<(ExecPath, OutputContent)> = self
            .left()
            .map(|artifact| (artifact.place.clone(), artifact.content.clone()))
            .collect();
        let (together, names) = (self.together.clone(), self.names.clone());
        let mut gather = std::mem::take(&mut self.gather);
        let looked = blocking("examining the directory", move || {
            together.join(&names);
            if !directory.is_dir() {
                return Ok((Vec::new(), gather));
            }
            let markers = marker::read_all(&directory)?.into_iter();
            let markers: Vec<Marker> = markers.filter_map(|(_, marker)| marker.ok()).collect();
            gather.find_present(&directory, &markers, &together)?;
            // A stamp is worth something only together with the content that it was taken of.
            let mut stamps: HashMap<ExecPath, (OutputContent, Stamp)> = HashMap::new();
            for file in markers.iter().flat_map(|marker| &marker.files) {
                if let (Ok((path, content)), Some(stamp)) = (file.content(), file.stamp) {
                    stamps.insert(path, (content, stamp));
                }
            }
            let wanted: Vec<Wanted> = wanted
                .into_iter()
                .map(|(path, content)| {
                    let stamp = stamps.get(&path).filter(|(then, _)| *then == content);
                    let stamp = stamp.map(|(_, stamp)| *stamp);
                    (path, content, stamp)
                })
                .collect();
            let looked = check::look(&directory, &wanted)?;
            let looked: Vec<_> = wanted.into_iter().map(|(path, ..)| path).zip(looked).collect();
            Ok((looked, gather))
        });
        let (looked, gather) = looked.await.map_err(|e| self.name_in(e))?;
        self.gather = gather;
        for (path, check) in looked {
            if let Ok(Check::Present { stamp, .. }) = check {
                self.ends.insert(path, End::there(Brought::Present, Some(stamp)));
            }
        }
        Ok(())
    }

    /// What nobody has any more. A cache that does not answer says nothing of that.
    pub(super) async fn find_evicted(&mut self, attribution: &Attribution) {
        let mut asked = HashSet::new();
        for artifact in self.left() {
            if let OutputContent::Blob(digest) = &artifact.content
                && !digest.is_empty()
                && !self.store.has_copy(digest)
            {
                asked.insert(digest.clone());
            }
        }
        let archives = self.gather.missing();
        let not_here = archives.iter().map(|(_, digest)| digest);
        asked.extend(not_here.filter(|digest| !self.store.has_copy(digest)).cloned());
        if asked.is_empty() {
            return;
        }
        let asked: Vec<Digest> = asked.into_iter().collect();
        let (missing, reason) = match self.store.find_missing(&asked, attribution).await {
            Ok(missing) => (missing, None),
            // There is no cache that could be asked, now or later.
            Err(error) if error.kind == RemoteErrorKind::Config => (asked, Some(error.to_string())),
            Err(error) => {
                tracing::debug!("FindMissingBlobs failed: {error}");
                return;
            }
        };
        let missing: HashSet<Digest> = missing.into_iter().collect();
        let store = Arc::clone(&self.store);
        let why = |digest: &Digest| {
            let evicted = || format!("evicted: {} does not have {digest}", store.describe());
            reason.clone().unwrap_or_else(evicted)
        };
        let evicted: Vec<(ExecPath, String)> = self
            .left()
            .filter_map(|artifact| match &artifact.content {
                OutputContent::Blob(digest) if missing.contains(digest) => {
                    Some((artifact.place.clone(), why(digest)))
                }
                _ => None,
            })
            .collect();
        for (name, digest) in archives.iter().filter(|(_, digest)| missing.contains(digest)) {
            self.gather.fail(name, &why(digest));
        }
        for (path, error) in evicted {
            self.ends.insert(path, End::failed(error));
        }
    }

    /// What has not come to its end.
    fn left(&self) -> impl Iterator<Item = &Artifact> {
        self.plan
            .selection
            .artifacts
            .iter()
            .filter(|artifact| !self.ends.contains_key(&artifact.place))
    }

    /// What the coordinator is asked for.
    pub(super) fn wants(&self) -> Vec<Want> {
        let wants = self
            .left()
            .map(|a| Want::new(a.place.clone(), a.content.clone(), a.class, None));
        wants.collect()
    }

    pub(super) fn take(&mut self, list: Vec<Completion>) {
        for completion in list {
            let brought = match &completion.content {
                OutputContent::Blob(digest) if self.store.served(digest) => Brought::Copied,
                _ => Brought::Downloaded,
            };
            let end = match completion.outcome {
                Outcome::Downloaded { stamp, .. } => End::there(brought, stamp),
                Outcome::Present { stamp, .. } => End::there(Brought::Present, stamp),
                // Its own directory is nobody else's.
                Outcome::Served { .. } => End::there(Brought::Present, None),
                Outcome::Evicted(reason) => End::failed(format!("evicted: {reason}")),
                Outcome::Unavailable(reason) | Outcome::NoSpace(reason) | Outcome::Failed(reason) => {
                    End::failed(reason)
                }
                Outcome::Superseded => End::failed("cancelled".to_owned()),
            };
            self.ends.insert(completion.path, end);
        }
    }

    /// Whether something required failed to download.
    pub(super) fn failed(&self) -> bool {
        self.gather.has_failed()
            || self.plan.selection.artifacts.iter().any(|artifact| {
                artifact.class == Class::Required
                    && self
                        .ends
                        .get(&artifact.place)
                        .is_some_and(|end| end.outcome.is_none())
            })
    }

    pub(super) fn outputs(&self) -> Vec<Ended> {
        let ended = |artifact: &Artifact| {
            let end = self.ends.get(&artifact.place);
            Ended {
                artifact: artifact.clone(),
                outcome: end.and_then(|end| end.outcome),
                error: end.map(|end| end.error.clone()).unwrap_or_default(),
                stamp: end.and_then(|end| end.stamp),
            }
        };
        self.plan.selection.artifacts.iter().map(ended).collect()
    }

    /// How files of a collection and archives have ended so far.
    pub(super) fn gathered(&self) -> Vec<Gathered> {
        let mut all = self.gather.ends();
        for one in &mut all {
            let served = |digest: &Digest| self.store.served(digest);
            if one.outcome == Some(Brought::Downloaded) && one.digest.as_ref().is_some_and(served) {
                one.outcome = Some(Brought::Copied);
            }
        }
        all
    }

    /// Whether files of a collection or archives are still to come.
    pub(super) fn is_gathering(&self) -> bool {
        self.gather.is_open()
    }

    /// Brings files of a collection and archives of a class.
    pub(super) async fn gather(&mut self, class: Class) -> Result<(), StageError> {
        match &self.destination {
            Some(destination) => self.gather.bring(class, destination, &self.together).await,
            None => Ok(()),
        }
    }

    /// How everything has ended so far.
    pub(super) fn ends(&self) -> Ends {
        Ends {
            outputs: self.outputs(),
            gathered: self.gathered(),
        }
    }

    pub(super) fn staged(self, staged: bool, rest: Option<JoinHandle<Ends>>) -> Staged {
        let Ends { outputs, gathered } = self.ends();
        Staged {
            staged,
            outputs,
            gathered,
            notes: self.notes,
            rest,
        }
    }

    /// Removes what an earlier stage put where an output cannot lie beside it.
    pub(super) async fn make_way(&self) -> Result<(), StageError> {
        let directory = self.directory.clone();
        let is_directory = |artifact: &&Artifact| artifact.content == OutputContent::Directory;
        let (directories, files): (Vec<_>, Vec<_>) = self.left().partition(is_directory);
        let paths = |list: Vec<&Artifact>| -> HashSet<String> {
            list.iter().map(|one| one.place.to_string()).collect()
        };
        let (files, directories) = (paths(files), paths(directories));
        let made = blocking("making way", move || {
            marker::make_way(&directory, &files, &directories)
        });
        made.await.map_err(|e| self.name_in(e))
    }

    /// Leaves the marker, removes what an earlier one put there and this one does not name, and notes that the build and the directory are in use.
    pub(super) async fn conclude(&mut self, request: &Awaited, complete: bool) -> Result<(), StageError> {
        request.stamps().await;
        let now_ns = crate::units::now_ns();
        let build = &self.plan.build;
        let mut marker = Marker::new(&build.invocation_id, &build.workspace, &self.plan.wish);
        marker.complete = complete;
        marker.trees = self.plan.selection.trees.clone();
        let mut open = HashSet::new();
        for ended in self.outputs() {
            if ended.outcome.is_some() {
                // What was there before has been looked at just now, so its stamp is as old as it says.
                let stamp = match ended.stamp {
                    Some(stamp) if ended.outcome != Some(Brought::Present) => Some(stamp.recorded_at(now_ns)),
                    stamp => stamp,
                };
                marker.files.push(marker::File::new(&ended.artifact, stamp));
            } else if !ended.error.is_empty() {
                marker.missing.push(Missing {
                    path: ended.artifact.place.to_string(),
                    error: ended.error,
                });
            } else {
                open.insert(ended.artifact.place.to_string());
            }
        }
        self.gather.note(&mut marker, &mut open);
        let (directory, journal) = (self.directory.clone(), self.plan.journal.clone());
        let mut stale = std::mem::take(&mut self.stale);
        let (together, names) = (self.together.clone(), self.names.clone());
        let written = blocking("writing the marker", move || {
            let notes = together.without_others(&names, |others| {
                marker.write(&directory, &open, &mut stale, others)
            })?;
            marker::touch(&directory)?;
            if let Some(journal) = journal {
                use_journal(&journal);
            }
            Ok((notes, stale))
        });
        let (notes, stale) = written.await.map_err(|e| self.name_in(e))?;
        self.notes.extend(notes);
        self.stale = stale;
        Ok(())
    }
}

/// What was staged from lately is not forgotten: retention goes by the time of the file.
fn use_journal(path: &Path) {
    let touched = File::options()
        .append(true)
        .open(path)
        .and_then(|file| file.set_modified(SystemTime::now()));
    if let Err(error) = touched {
        // It may have become settled, or is another user's.
        tracing::debug!(journal = %path.display(), %error, "failed to set the journal's modification time");
    }
}
