//! The note that staging leaves in the directory: what was put there, from which build, on whose request.
//!
//! One JSON file for each request and build, `.outhaul/staged-NAME.json`, written beside and renamed. A later stage
//! supersedes a marker that it has the same request of the same workspace as, or that does not hold any more because of
//! it: what only that marker lists is removed, and then the marker, so all markers of a directory may hold at once.
//! `.outhaul/staged.timestamp` shows by its time when somebody last staged here.

use std::{
    collections::{HashMap, HashSet},
    fs,
    io::{self, Read as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{anyhow, bail};
use rustix::fs::CWD;
use serde::{Deserialize, Serialize};

use super::{check, error::StageError, request::Wish, select::Artifact};
use crate::{
    digest::{Digest, DigestFunction},
    exec_path::ExecPath,
    materialize::place::Check,
    open_files::{GUARDED, open_regular},
    output::{OutputContent, Stamp},
};

/// Where markers lie, below the directory.
pub(super) use crate::materialize::place::MARKERS as DIRECTORY;
const TIMESTAMP: &str = "staged.timestamp";
const PREFIX: &str = "staged-";
const SUFFIX: &str = ".json";
/// Changes when a reader of the old version would misread the new one.
const VERSION: u32 = 1;

/// What one stage has put into a directory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Marker {
    version: u32,
    /// Invocation ID of the staged build; empty for files of a collection.
    pub(crate) invocation_id: String,
    /// Workspace of the staged build; empty for files of a collection.
    pub(crate) workspace: String,
    /// What it was staged from instead of a build, sorted: URLs without what may be secret in them, and digests.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) from: Vec<String>,
    /// When it was staged, in milliseconds since the epoch.
    pub(crate) staged_ms: i64,
    /// Whether optional outputs have come to their end as well.
    pub(crate) complete: bool,
    /// What was asked for.
    pub(crate) request: Wish,
    /// What is there.
    pub(crate) files: Vec<File>,
    /// Trees that were staged whole, below the directory: nothing else belongs into them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) trees: Vec<String>,
    /// Optional outputs that failed to download.
    pub(crate) missing: Vec<Missing>,
    /// Archives that were unpacked. Their files have the archive's name as `exec_path`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) archives: Vec<Archive>,
}

/// An archive that was unpacked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Archive {
    /// Its exec path in the build, or its file name in the collection.
    pub(crate) name: String,
    /// The directory, below that of the marker, that it was unpacked into; empty for the marker's own.
    pub(crate) place: String,
    /// `FUNCTION/HASH/SIZE` of the archive itself.
    pub(crate) digest: String,
    /// Where it is in the collection, and the entity tag that the list had for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) etag: Option<String>,
}

/// A staged output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct File {
    /// Below the directory.
    pub(crate) path: String,
    /// In the build, or the file name in the collection.
    pub(crate) exec_path: String,
    /// The target.
    pub(crate) label: String,
    /// The output group, or empty.
    pub(crate) output_group: String,
    /// `required` or `optional`.
    pub(crate) class: String,
    /// `FUNCTION/HASH/SIZE` of a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) digest: Option<String>,
    /// Target of a symlink.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) symlink_target: Option<String>,
    /// Whether it is an empty directory.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) directory: bool,
    /// Where it is in the collection, and the entity tag that the list had for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) etag: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    /// What `lstat` said when its bytes were last known to be right.
    pub(super) stamp: Option<Stamp>,
}

/// An optional output that failed to download.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Missing {
    /// Below the directory.
    pub(crate) path: String,
    /// Why the output is missing; empty if it is there.
    pub(crate) error: String,
}

impl File {
    /// An output that was staged, with what `lstat` said of it since.
    pub(crate) fn new(artifact: &Artifact, stamp: Option<Stamp>) -> Self {
        let (mut digest, mut symlink_target, mut directory) = (None, None, false);
        match &artifact.content {
            OutputContent::Blob(blob) => digest = Some(written(blob)),
            OutputContent::Inline(bytes) => {
                digest = Some(written(&Digest::of(DigestFunction::Sha256, bytes)))
            }
            OutputContent::Symlink(target) => symlink_target = Some(target.clone()),
            OutputContent::Directory => directory = true,
        }
        Self {
            path: artifact.place.to_string(),
            exec_path: artifact.exec_path.to_string(),
            label: artifact.label.to_string(),
            output_group: artifact.group.to_string(),
            class: artifact.class.name().to_owned(),
            digest,
            symlink_target,
            directory,
            etag: None,
            stamp: None,
        }
        .stamped(stamp)
    }

    /// The same with what `lstat` says now.
    pub(super) fn stamped(self, stamp: Option<Stamp>) -> Self {
        Self { stamp, ..self }
    }

    /// The same, where that goes into a marker now: see [`Stamp::recorded_at`].
    pub(super) fn recorded_at(self, now_ns: i64) -> Self {
        let stamp = self.stamp.map(|stamp| stamp.recorded_at(now_ns));
        self.stamped(stamp)
    }

    /// What should be there.
    ///
    /// # Errors
    /// In words: the entry makes no sense.
    pub(crate) fn content(&self) -> anyhow::Result<(ExecPath, OutputContent)> {
        let path = ExecPath::new(&self.path)?;
        let content = match (&self.digest, &self.symlink_target, self.directory) {
            (Some(digest), None, false) => {
                OutputContent::Blob(digest.parse().map_err(|e| anyhow!("{path}: {e}"))?)
            }
            (None, Some(target), false) => OutputContent::Symlink(target.clone()),
            (None, None, true) => OutputContent::Directory,
            _ => bail!("{path}: its entry has no type"),
        };
        Ok((path, content))
    }

    fn same_content(&self, other: &Self) -> bool {
        (&self.digest, &self.symlink_target, self.directory)
            == (&other.digest, &other.symlink_target, other.directory)
    }
}

pub(super) fn written(digest: &Digest) -> String {
    format!("{}/{}/{}", digest.function(), digest.hash_hex(), digest.size())
}

impl Marker {
    /// A marker without files.
    pub(crate) fn new(invocation_id: &str, workspace: &str, request: &Wish) -> Self {
        Self {
            version: VERSION,
            invocation_id: invocation_id.to_owned(),
            workspace: workspace.to_owned(),
            from: Vec::new(),
            staged_ms: crate::units::now_ms(),
            complete: false,
            request: request.clone(),
            files: Vec::new(),
            trees: Vec::new(),
            missing: Vec::new(),
            archives: Vec::new(),
        }
    }

    /// The same request of the same build or URL has the same file.
    fn file_name(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.invocation_id.as_bytes());
        for from in &self.from {
            hasher.update(from.as_bytes());
            hasher.update(b"\n");
        }
        // Lists of texts have no reason to fail.
        hasher.update(&serde_json::to_vec(&self.request).unwrap_or_default());
        format!(
            "{PREFIX}{}{SUFFIX}",
            hex::encode(&hasher.finalize().as_bytes()[..8])
        )
    }

    /// Writes it into a staged directory, and takes away markers that it supersedes, with the files that only they list.
    /// Of a place that is `open`, for its output is still on its way, the decision is left for later: the files are
    /// added to `stale`, which is to be given to the next call. What `others` name, who stage at the same time, stays. Answers what stays though it should not, in words. Blocks.
    ///
    /// # Errors
    /// When that fails; the marker that was there before, if any, is there still.
    pub(crate) fn write(
        &self,
        directory: &Path,
        open: &HashSet<String>,
        stale: &mut Vec<File>,
        others: HashSet<String>,
    ) -> Result<Vec<String>, StageError> {
        let own = own_directory(directory)?;
        let before = read_all(directory)?;
        let name = self.file_name();
        let path = own.join(&name);
        let bytes = serde_json::to_vec_pretty(self).map_err(|e| StageError::Internal(e.to_string()))?;
        let beside = own.join(format!(".{name}.{:016x}", rand::random::<u64>()));
        let replaced = fs::write(&beside, bytes).and_then(|()| fs::rename(&beside, &path));
        if let Err(error) = replaced {
            // It is only a file that nobody reads.
            let _ = fs::remove_file(&beside);
            return Err(StageError::io("write", path)(error));
        }
        let ours = Places::of(self, open);
        let mut kept = others;
        let mut superseded = Vec::new();
        for (path, marker) in before {
            let is_own = path.file_name().is_some_and(|other| other == &*name);
            match marker {
                Ok(marker) if is_own => stale.extend(marker.files),
                Ok(marker) if !ours.supersede(&marker) => {
                    kept.extend(marker.files.into_iter().map(|file| file.path));
                }
                Ok(marker) => {
                    stale.extend(marker.files);
                    superseded.push(path);
                }
                Err(_) if is_own => {}
                Err(_) => superseded.push(path),
            }
        }
        let (later, now) = std::mem::take(stale)
            .into_iter()
            .filter(|file| !ours.files.contains_key(&*file.path) && !kept.contains(&file.path))
            .partition(|file| open.contains(&file.path));
        *stale = later;
        let keep = |path: &str| kept.contains(path) || ours.files.contains_key(path) || open.contains(path);
        let notes = remove(directory, now, &keep)?;
        for path in superseded {
            // Last, so that after a crash the next stage knows what to remove. Somebody else who stages may have taken it
            // away already.
            let _ = fs::remove_file(path);
        }
        Ok(notes)
    }
}

/// Where one marker's files lie.
struct Places<'a> {
    marker: &'a Marker,
    files: HashMap<&'a str, &'a File>,
    /// Directories that they need.
    above: HashSet<&'a str>,
    /// Outputs that are on their way.
    open: &'a HashSet<String>,
}

impl<'a> Places<'a> {
    fn of(marker: &'a Marker, open: &'a HashSet<String>) -> Self {
        let paths = || marker.files.iter().map(|file| file.path.as_str());
        Self {
            marker,
            files: marker
                .files
                .iter()
                .map(|file| (file.path.as_str(), file))
                .collect(),
            above: paths().flat_map(above).collect(),
            open,
        }
    }

    /// Whether an older marker goes: this one is what the same request comes to now, has other content in one of its
    /// places, or has all of a tree that was another one then.
    fn supersede(&self, older: &Marker) -> bool {
        let same_workspace = older.workspace == self.marker.workspace && older.from == self.marker.from;
        (same_workspace && older.request.sorted() == self.marker.request.sorted())
            || older.files.iter().any(|file| {
                let other_content = match self.files.get(file.path.as_str()) {
                    Some(our) => !our.same_content(file),
                    None => {
                        let ours_above = |path| self.files.get(path).is_some_and(|our| !our.directory);
                        let left_tree = same_workspace
                            && older.invocation_id != self.marker.invocation_id
                            && !self.open.contains(&file.path)
                            && above(&file.path).any(|dir| self.marker.trees.iter().any(|tree| tree == dir));
                        above(&file.path).any(ours_above) || left_tree
                    }
                };
                other_content || (!file.directory && self.above.contains(file.path.as_str()))
            })
    }
}

/// The directories on the way to a path.
pub(super) fn above(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(end, _)| &path[..end])
}

/// Removes what earlier stages put where one of these files or empty directories must be: a tree's files, where there is
/// one file now, or a file where there is a directory. What has changed since stays. Blocks.
///
/// # Errors
/// When the markers or the directory cannot be read.
pub(super) fn make_way(
    directory: &Path,
    files: &HashSet<String>,
    directories: &HashSet<String>,
) -> Result<(), StageError> {
    let all = files.iter().chain(directories);
    let mut needed: HashSet<&str> = all.flat_map(|path| above(path)).collect();
    needed.extend(directories.iter().map(String::as_str));
    // Markers may be long, and every optional file is put in place for itself.
    let found = |path: &str| directory.join(path).symlink_metadata();
    let is_free = needed
        .iter()
        .all(|path| found(path).map_or(true, |there| there.is_dir()))
        && files
            .iter()
            .all(|path| found(path).map_or(true, |there| !there.is_dir()));
    if is_free {
        return Ok(());
    }
    let mut in_the_way = Vec::new();
    for (_, marker) in read_all(directory)? {
        in_the_way.extend(marker.into_iter().flat_map(|marker| marker.files).filter(|old| {
            (old.directory && files.contains(&old.path))
                || (!old.directory && needed.contains(&*old.path))
                || above(&old.path).any(|dir| files.contains(dir))
        }));
    }
    if in_the_way.is_empty() {
        return Ok(());
    }
    remove(directory, in_the_way, &|_| false).map(drop)
}

/// Removes files as they were staged, deepest first, and says what stays.
fn remove(
    directory: &Path,
    mut files: Vec<File>,
    keep: &dyn Fn(&str) -> bool,
) -> Result<Vec<String>, StageError> {
    let mut notes = Vec::new();
    if files.is_empty() {
        return Ok(notes);
    }
    files.sort_by(|a, b| b.path.cmp(&a.path));
    let mut placer = check::placer(directory)?;
    for file in files {
        let removed = file.content().and_then(|(path, content)| {
            placer
                .remove(&path, &content, file.stamp.as_ref(), keep)
                .map_err(|e| anyhow!("kept {path} from an earlier stage: {e}"))
        });
        match removed {
            Ok(Check::Differs) => notes.push(format!(
                "kept {} from an earlier stage: it has changed since",
                file.path
            )),
            Ok(_) => {}
            Err(reason) => notes.push(reason.to_string()),
        }
    }
    Ok(notes)
}

fn own_directory(directory: &Path) -> Result<PathBuf, StageError> {
    let own = directory.join(DIRECTORY);
    match fs::DirBuilder::new().mode(0o755).create(&own) {
        Ok(()) => {}
        // Not through a link to somewhere else.
        Err(e)
            if e.kind() == io::ErrorKind::AlreadyExists
                && own.symlink_metadata().is_ok_and(|m| m.is_dir()) => {}
        Err(e) => return Err(StageError::io("make", own)(e)),
    }
    Ok(own)
}

/// Notes that somebody has staged into a directory now. Blocks.
///
/// # Errors
/// When the file cannot be made or its time not be set.
pub(crate) fn touch(directory: &Path) -> Result<(), StageError> {
    let path = own_directory(directory)?.join(TIMESTAMP);
    fs::File::options()
        .create(true)
        .append(true)
        .custom_flags(GUARDED.bits().cast_signed())
        .open(&path)
        .and_then(|file| file.set_modified(std::time::SystemTime::now()))
        .map_err(StageError::io("touch", path))
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let opened = open_regular(CWD, path)?;
    let (mut file, _) = opened.ok_or_else(|| io::Error::other("is not a regular file"))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A marker's file, and the marker, or why it is not one.
pub(crate) type Found = (PathBuf, io::Result<Marker>);

/// Every marker of a directory, oldest first. Blocks.
///
/// # Errors
/// When the directory of markers is there and cannot be read.
pub(super) fn read_all(directory: &Path) -> Result<Vec<Found>, StageError> {
    let own = directory.join(DIRECTORY);
    if own.symlink_metadata().is_ok_and(|m| !m.is_dir()) {
        return Err(StageError::io("list", own)(io::ErrorKind::NotADirectory.into()));
    }
    let entries = match fs::read_dir(&own) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(StageError::io("list", own)(e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(StageError::io("list", &own))?.path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        if !(name.starts_with(PREFIX) && name.ends_with(SUFFIX)) {
            continue;
        }
        match read(&path) {
            // Taken away by another stage.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            read => found.push((path, read.and_then(|bytes| parse(&bytes)))),
        }
    }
    found.sort_by_key(|(path, marker)| (marker.as_ref().map_or(0, |m| m.staged_ms), path.clone()));
    Ok(found)
}

/// For [`crate::fuzzing`]: what is read of a marker reads back.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(data: &[u8]) {
    if let Ok(marker) = parse(data) {
        let again = serde_json::to_vec(&marker).map_err(Into::into);
        assert_eq!(again.and_then(|bytes| parse(&bytes)).ok(), Some(marker));
    }
}

fn parse(bytes: &[u8]) -> io::Result<Marker> {
    let marker: Marker = serde_json::from_slice(bytes)?;
    if marker.version != VERSION {
        return Err(io::Error::other(format!(
            "it has version {}, but this outhaul reads version {VERSION}",
            marker.version
        )));
    }
    Ok(marker)
}
