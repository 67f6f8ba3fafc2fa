//! Files of a collection, staged as they are or unpacked, and archives among a build's outputs, unpacked.
//!
//! What is required is downloaded, verified and unpacked as a whole beside everything else, and only then renamed into the
//! directory; each optional file the same way for itself, afterwards. Every file that comes out of an archive is listed in
//! the marker with its digest, so it is checked and removed as any output is.
//!
//! `how` reads the settings, `choose` finds out which files there are, `present` what earlier stages have left of them, `bring` gets the rest.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use super::{
    ended::{Brought, Gathered},
    error::StageError,
    marker::{self, Marker, Missing},
    request::Manner,
    select::Artifact,
    unpacked::is_archive,
};
use crate::{
    archive::{Listable, Mode},
    collection::{Access, BlobArchive, Collection, Item, Wanted},
    digest::Digest,
    exec_path::ExecPath,
    output::{Class, OutputContent},
    remote::BlobStore,
};

mod bring;
mod choose;
mod how;
mod present;

use how::How;

const EXTRACT: Mode = Mode::Extract { strip_components: 0 };

/// How the servers are reached that collections are at.
#[derive(Debug, Clone, Default)]
pub(crate) struct Archives(Option<Access>);

impl Archives {
    /// With these credentials and this patience.
    pub(crate) const fn new(access: Access) -> Self {
        Self(Some(access))
    }
}

impl Archives {
    /// Nothing yet, to be brought in this manner, by a caller who may not ask for more than the defaults if `is_bounded`.
    ///
    /// # Errors
    /// Naming the setting that is wrong.
    pub(in crate::stage) fn gather(manner: &Manner, is_bounded: bool) -> Result<Gather, StageError> {
        Ok(Gather {
            how: How::new(manner, is_bounded)?,
            ..Gather::default()
        })
    }
}

/// A file that is there, or what came out of an archive.
#[derive(Debug, Clone)]
struct Got {
    outcome: Brought,
    digest: Digest,
    files: Vec<marker::File>,
}

/// A file to stage.
struct Source {
    wanted: Wanted,
    label: Arc<str>,
    aspect: Arc<str>,
    group: Arc<str>,
    name: ExecPath,
    place: String,
    /// Its digest, if that is known before it is read.
    digest: Option<Digest>,
    /// How it is unpacked; `None` if it is staged as it is.
    mode: Option<Mode>,
    /// What earlier stages have put there of it.
    earlier: Vec<String>,
    end: Option<Result<Got, String>>,
}

/// Paths, with what is there and by which output or file.
type Taken = BTreeMap<String, (OutputContent, String)>;

/// Files to stage, and what has become of them.
#[derive(Default)]
pub(in crate::stage) struct Gather {
    sources: Vec<Source>,
    /// What markers remember of the URLs and digests; empty for a build.
    from: Vec<String>,
    how: How,
    /// What is in the directory by this stage, and by which output or file.
    taken: Taken,
    /// Names that no other stage may remove, while this one lives.
    names: Vec<Arc<HashSet<String>>>,
    /// How many paths may be there by this stage: all of them are in memory.
    listable: Listable,
}

impl Gather {
    /// Takes the archives out of a build's outputs: those are unpacked at their places.
    pub(in crate::stage) fn take_archives(
        &mut self,
        artifacts: &mut Vec<Artifact>,
        store: &Arc<dyn BlobStore>,
    ) {
        let is_archive = |artifact: &Artifact| is_archive(&artifact.content, &artifact.exec_path);
        let (archives, plain): (Vec<_>, Vec<_>) = artifacts.drain(..).partition(is_archive);
        *artifacts = plain;
        for artifact in archives {
            let OutputContent::Blob(digest) = &artifact.content else {
                continue;
            };
            let file_name = artifact.exec_path.file_name().to_owned();
            let item = Item {
                size: Some(digest.size()),
                ..Item::named(file_name.clone())
            };
            let blob = BlobArchive::new(Arc::clone(store), digest.clone(), Some(file_name));
            let blob: Arc<dyn Collection> = Arc::new(blob);
            self.sources.push(Source {
                wanted: Wanted::only(blob, item, artifact.class),
                label: artifact.label,
                aspect: artifact.aspect,
                group: artifact.group,
                name: artifact.exec_path,
                place: artifact.place.to_string(),
                digest: Some(digest.clone()),
                mode: Some(EXTRACT),
                earlier: Vec::new(),
                end: None,
            });
        }
    }

    /// What other outputs of this stage have a place of their own.
    pub(in crate::stage) fn reserve(&mut self, artifacts: &[Artifact]) {
        if self.sources.is_empty() {
            return;
        }
        for artifact in artifacts {
            let owner = (artifact.content.clone(), artifact.exec_path.to_string());
            self.taken.insert(artifact.place.to_string(), owner);
        }
    }

    /// What markers remember of the URLs and digests; empty for a build.
    pub(in crate::stage) fn from(&self) -> &[String] {
        &self.from
    }

    /// Whether something has not come to its end.
    pub(in crate::stage) fn is_open(&self) -> bool {
        self.sources.iter().any(|source| source.end.is_none())
    }

    /// Whether something that is required has failed.
    pub(in crate::stage) fn has_failed(&self) -> bool {
        let failed = |source: &Source| matches!(source.end, Some(Err(_)));
        self.sources
            .iter()
            .any(|source| source.wanted.class == Class::Required && failed(source))
    }

    /// The digests of what is not there yet, where they are known for sure.
    pub(in crate::stage) fn missing(&self) -> Vec<(ExecPath, Digest)> {
        let open = self.sources.iter().filter(|source| source.end.is_none());
        open.filter_map(|source| Some((source.name.clone(), source.digest.clone()?)))
            .collect()
    }

    /// Says that one is not available.
    pub(in crate::stage) fn fail(&mut self, name: &ExecPath, error: &str) {
        for source in self.sources.iter_mut().filter(|source| source.name == *name) {
            source.end = Some(Err(error.to_owned()));
        }
    }

    /// How all have ended so far.
    pub(in crate::stage) fn ends(&self) -> Vec<Gathered> {
        let ended = |source: &Source| {
            let got = match &source.end {
                Some(Ok(got)) => Some(got),
                _ => None,
            };
            Gathered {
                label: Arc::clone(&source.label),
                aspect: Arc::clone(&source.aspect),
                group: Arc::clone(&source.group),
                name: source.name.clone(),
                place: source.place.clone(),
                class: source.wanted.class,
                digest: got
                    .map(|got| got.digest.clone())
                    .or_else(|| source.digest.clone()),
                outcome: got.map(|got| got.outcome),
                error: match &source.end {
                    Some(Err(error)) => error.clone(),
                    _ => String::new(),
                },
            }
        };
        self.sources.iter().map(ended).collect()
    }

    /// Puts all that has ended into a marker; what is still on its way into `open`.
    pub(in crate::stage) fn note(&self, marker: &mut Marker, open: &mut HashSet<String>) {
        marker.from.clone_from(&self.from);
        for source in &self.sources {
            match &source.end {
                Some(Ok(got)) => {
                    marker.files.extend(got.files.iter().cloned());
                    if source.mode.is_none() {
                        continue;
                    }
                    marker.archives.push(marker::Archive {
                        name: source.name.to_string(),
                        place: source.place.clone(),
                        digest: marker::written(&got.digest),
                        etag: source.tag(),
                    });
                    if !source.place.is_empty() && !got.files.is_empty() {
                        marker.trees.push(source.place.clone());
                    }
                }
                Some(Err(error)) => marker.missing.push(Missing {
                    path: source.name.to_string(),
                    error: error.clone(),
                }),
                None => open.extend(source.earlier.iter().cloned()),
            }
        }
    }
}
