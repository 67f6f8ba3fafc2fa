//! What recorded outputs take on disk, and removing those that the cache still has.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, HashMap, HashSet},
    fs::{File, Metadata},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::{sync::mpsc, task::spawn_blocking};
use tonic::Status;

use super::{Service, find::Found, show};
use crate::{
    digest::Digest,
    exec_path::ExecPath,
    invocation::{rows, runfiles::Needed},
    materialize::{
        Root,
        place::{Check, Mark, OutputRoot, PlaceOptions, Placer},
    },
    output::{Class, OutputContent},
    proto::outhaul::v1::{self as pb, evict_response::Left},
    record::{InvocationRow, OutputRow, OutputState, RootId, Which},
    remote::Attribution,
    sources::SourceCache,
    units::allocated,
};

/// Entries of one answer.
const ENTRIES: usize = 10_000;
/// Candidates that are kept at once, some 200 bytes each; with more, the record is read again.
const CANDIDATES: usize = 100_000;
/// Files that are asked for and removed together.
const BATCH: usize = 4000;
/// In the row of a removed file.
const REMOVED: &str = "removed to free disk space; `outhaul get` downloads it again";

const LINKED: &str = "files with several names, so that nothing would be freed";
const NEWEST: &str = "wanted by the newest build of their workspace (`--include-newest` removes them, too)";
const NOT_OURS: &str = "not downloaded by outhaul";
const LOST: &str = "not in the cache any more";
const CHANGED: &str = "changed since they were downloaded";
const BEGUN: &str = "in an output root where a build has begun";

/// What was left in place, by reason.
#[derive(Default)]
struct LeftInPlace(BTreeMap<String, (u64, u64)>);

impl LeftInPlace {
    fn add(&mut self, reason: &str, outputs: u64, bytes: u64) {
        let entry = self.0.entry(reason.to_owned()).or_default();
        entry.0 += outputs;
        entry.1 += bytes;
    }

    fn into_message(self) -> Vec<Left> {
        let left = self.0.into_iter().map(|(reason, (outputs, bytes))| Left {
            reason,
            outputs,
            bytes,
        });
        left.collect()
    }
}

/// When a file was used last, as the file system tells, in milliseconds since the epoch.
fn used_ms(metadata: &Metadata) -> i64 {
    let ms = |seconds: i64, nanoseconds: i64| {
        seconds
            .saturating_mul(1000)
            .saturating_add(nanoseconds / 1_000_000)
    };
    let read = ms(metadata.atime(), metadata.atime_nsec());
    let written = ms(metadata.mtime(), metadata.mtime_nsec());
    read.max(written)
}

/// The recorded files of a root that are on disk, of their recorded size. Blocks.
fn files(
    service: &Service,
    id: RootId,
    exec_root: &Path,
) -> impl Iterator<Item = (ExecPath, OutputRow, Digest, Metadata)> {
    let exec_root = exec_root.to_owned();
    service
        .record
        .scan_outputs(id, "")
        .filter_map(move |(path, row)| {
            let OutputContent::Blob(digest) = &row.content else {
                return None;
            };
            let digest = digest.clone();
            if row.state != OutputState::Materialized {
                return None;
            }
            let metadata = exec_root.join(path.as_path()).symlink_metadata().ok()?;
            let is_it = metadata.is_file() && metadata.len() == digest.size();
            is_it.then_some((path, row, digest, metadata))
        })
}

/// Whether a recorded workspace is the one that a caller names. A build tool may name it by a link.
fn is_workspace(recorded: &str, named: &str) -> bool {
    let (recorded, named) = (Path::new(recorded), Path::new(named));
    recorded == named || recorded.canonicalize().is_ok_and(|real| real == named)
}

/// Why nothing is found of a workspace.
fn no_workspace(workspace: &str) -> Status {
    Status::not_found(format!("no outputs of a workspace {workspace} are recorded"))
}

/// The device number of a directory's file system.
fn device_of(directory: &Path) -> Option<u64> {
    directory.metadata().ok().map(|metadata| metadata.dev())
}

/// A file system with output roots that has little space left.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Short {
    /// Its device number.
    pub(crate) device: u64,
    /// An exec root on it.
    pub(crate) exec_root: PathBuf,
    /// The bytes that are to be freed.
    pub(crate) lacks: u64,
}

impl Service {
    /// The file systems of output roots on which less space is free than twice the mark.
    pub(crate) async fn short_of_space(&self, mark: Mark) -> Vec<Short> {
        let looked = self.read(move |service, _| {
            let mut short = BTreeMap::new();
            for (_, exec_root, _) in service.roots_of("").unwrap_or_default() {
                let Ok(directory) = File::open(&exec_root) else {
                    continue;
                };
                if let (Some(lacks), Ok(metadata)) = (mark.lacks(&directory), directory.metadata()) {
                    let device = metadata.dev();
                    short.entry(device).or_insert(Short {
                        device,
                        exec_root,
                        lacks,
                    });
                }
            }
            short.into_values().collect()
        });
        looked.await.unwrap_or_default()
    }

    /// The recorded output roots of a workspace, of any if that is empty, with the newest build of each. Blocks.
    ///
    /// # Errors
    /// When the workspace has none.
    fn roots_of(&self, workspace: &str) -> Result<Vec<(RootId, PathBuf, InvocationRow)>, Status> {
        let roots = self.record.roots().into_iter().filter_map(|(id, row)| {
            let newest = self.record.newest_invocation(id).unwrap_or_default();
            let is_meant = workspace.is_empty() || is_workspace(&newest.workspace, workspace);
            is_meant.then(|| (id, PathBuf::from(row.path), newest))
        });
        let roots: Vec<_> = roots.collect();
        if roots.is_empty() && !workspace.is_empty() {
            return Err(no_workspace(workspace));
        }
        Ok(roots)
    }

    /// How much of the disk recorded outputs take.
    ///
    /// # Errors
    /// When the workspace has no output roots, or the code that counts has a bug.
    pub async fn disk_usage(&self, request: pb::DiskUsageRequest) -> Result<pb::DiskUsageResponse, Status> {
        self.catch_up().await;
        let counted = self.read(move |service, gone| {
            let mut all = pb::DiskUsageResponse::default();
            let mut entries: HashMap<Arc<str>, pb::disk_usage_response::Entry> = HashMap::new();
            for (id, exec_root, newest) in service.roots_of(&request.workspace)? {
                let workspace: Arc<str> = newest.workspace.as_str().into();
                for (_, row, _, metadata) in files(service, id, &exec_root) {
                    if gone.is_cancelled() {
                        return Ok(all);
                    }
                    let name = match request.by() {
                        pb::DiskUsageBy::Unspecified | pb::DiskUsageBy::Workspace => workspace.clone(),
                        pb::DiskUsageBy::Target => row.label,
                        pb::DiskUsageBy::Invocation => row.invocation_id,
                    };
                    let entry = entries.entry(name).or_default();
                    entry.outputs += 1;
                    entry.bytes += allocated(&metadata);
                    entry.used_ms = entry.used_ms.max(used_ms(&metadata));
                    all.outputs += 1;
                    all.bytes += allocated(&metadata);
                }
            }
            let named = entries
                .into_iter()
                .map(|(name, entry)| pb::disk_usage_response::Entry {
                    name: name.to_string(),
                    ..entry
                });
            all.entries = named.collect();
            all.entries
                .sort_by(|a, b| (Reverse(a.bytes), &a.name).cmp(&(Reverse(b.bytes), &b.name)));
            all.entries.truncate(ENTRIES);
            Ok(all)
        });
        counted.await.unwrap_or_else(|| {
            Err(Status::internal(
                "counting files panicked; this is a bug in outhaul",
            ))
        })
    }

    /// Removes downloaded files that the cache still has, least recently used first, until enough space is freed. Answers
    /// through the channel, which holds it back; when the other end is gone, it ends with the file that it is at. One at a
    /// time.
    pub fn evict(&self, request: pb::EvictRequest) -> mpsc::Receiver<Result<pb::EvictResponse, Status>> {
        self.evict_from(request, None)
    }

    /// The same, only on the file system with this device number if it is given.
    pub(crate) fn evict_from(
        &self,
        request: pb::EvictRequest,
        device: Option<u64>,
    ) -> mpsc::Receiver<Result<pb::EvictResponse, Status>> {
        let (answer, answers) = mpsc::channel(4);
        let service = self.clone();
        tokio::spawn(async move {
            let _call = service.calls.token();
            let evictions = service.evictions.clone();
            let _turn = evictions.lock().await;
            service.catch_up().await;
            let evicted = match Eviction::prepare(service, request, device).await {
                Ok(eviction) => eviction.run(&answer).await,
                Err(error) => Err(error),
            };
            let last = evicted.map(|left| pb::EvictResponse {
                left: left.into_message(),
                ..pb::EvictResponse::default()
            });
            // Nobody may listen any more.
            let _ = answer.send(last).await;
        });
        answers
    }

    /// What the newest build of a root needs: what its journal says that it names, what is linked to from there, and the
    /// runfiles of its programs. None if the journal is gone, or a manifest of runfiles cannot be read.
    async fn needed_by(&self, newest: &InvocationRow, root: &Root) -> Option<HashSet<String>> {
        if newest.invocation_id.is_empty() {
            return None;
        }
        let which = Which::of(&newest.invocation_id);
        let named = self.stager.as_ref()?.named(&which).await.ok()?;
        let (place, as_built) = (root.place.clone(), newest.exec_root.clone());
        let needs = spawn_blocking(move || with_needs(&place, &as_built, named));
        needs.await.ok().flatten()
    }

    /// Whether a build is running in this process, or its outputs are on their way.
    async fn is_running(&self, newest: &InvocationRow) -> bool {
        match &self.engine {
            Some(engine) => engine
                .snapshot(&newest.invocation_id)
                .await
                .is_some_and(|(row, _)| !row.state.is_over()),
            None => false,
        }
    }
}

/// Paths with those that they need: where links among them lead, and what the manifests of programs name. `as_built`
/// is the exec root as the build has it. None if a manifest cannot be read. Blocks.
fn with_needs(place: &OutputRoot, as_built: &str, named: HashSet<String>) -> Option<HashSet<String>> {
    let exec_root = place.path();
    let real_root = exec_root.canonicalize().unwrap_or_else(|_| exec_root.to_owned());
    let spellings = [exec_root, &real_root].map(|path| path.to_string_lossy().into_owned());
    let exec_roots = [as_built, &spellings[0], &spellings[1]];
    let mut targets = Vec::new();
    let mut runfiles = Needed::default();
    for path in &named {
        let file = exec_root.join(path);
        if file.is_symlink()
            && let Ok(real) = file.canonicalize()
            && let Ok(below) = real.strip_prefix(&real_root)
        {
            targets.extend(below.to_str().map(str::to_owned));
        }
        match place.runfiles_manifest(path) {
            Ok(Some(manifest)) => runfiles.take_in(&manifest, &exec_roots),
            // It is not a program.
            Ok(None) => {}
            Err(_) => return None,
        }
    }
    let mut needed = named;
    needed.extend(targets);
    needed.extend(runfiles.outputs.iter().map(ToString::to_string));
    Some(needed)
}

/// An output root that files may be removed from.
struct Open {
    id: RootId,
    exec_root: PathBuf,
    root: Arc<Root>,
    /// Nothing is removed any more once a newer one has begun.
    version: u64,
    cache: SourceCache,
    newest: InvocationRow,
    /// What the newest build needs; None if that is not known.
    needed: Option<HashSet<String>>,
}

impl Open {
    /// Whether the newest build needs a file, as far as is known.
    fn is_needed(&self, path: &ExecPath, row: &OutputRow) -> bool {
        let Some(needed) = &self.needed else {
            return row.class > Class::Known;
        };
        // What only the action cache names, such as runfiles, is wanted after the events.
        let is_its_own = rows::is_of_bazel(&row.event) || *row.invocation_id == *self.newest.invocation_id;
        // A tree is named as a whole.
        let mut above = path.as_path().ancestors().filter_map(Path::to_str);
        (row.class > Class::Known && is_its_own) || above.any(|above| needed.contains(above))
    }
}

/// A file that may be removed. Ordered by its last use.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    used_ms: i64,
    root: usize,
    path: ExecPath,
    bytes: u64,
    digest: Digest,
}

/// The work on one request.
struct Eviction {
    service: Service,
    request: pb::EvictRequest,
    roots: Arc<Vec<Open>>,
    left: LeftInPlace,
}

impl Eviction {
    async fn prepare(
        service: Service,
        request: pb::EvictRequest,
        device: Option<u64>,
    ) -> Result<Self, Status> {
        let workspace = request.workspace.clone();
        let known = service.read(move |service, _| {
            let mut roots = service.roots_of(&workspace)?;
            if let Some(device) = device {
                roots.retain(|(_, exec_root, _)| device_of(exec_root) == Some(device));
            }
            Ok::<_, Status>(roots)
        });
        let known = known.await.transpose()?;
        let mut left = LeftInPlace::default();
        let mut roots = Vec::new();
        for (id, exec_root, _) in known.unwrap_or_default() {
            let placed = service.place(id, exec_root.clone()).await;
            let shown = exec_root.display();
            let (root, served, cache) = match placed {
                Ok((root, served, cache, _)) => (root, served, cache),
                // An output base that was deleted, mostly.
                Err(error) if exec_root.exists() => {
                    left.add(&format!("in {shown}: {error}"), 0, 0);
                    continue;
                }
                Err(_) => continue,
            };
            // A build is recorded before it raises the version: one that begins from here on is noticed by that.
            let version = root.epoch.current();
            let newest = service.record.newest_invocation(id).unwrap_or_default();
            if served.is_some() {
                left.add(&format!("in {shown}: an output service keeps them"), 0, 0);
                continue;
            }
            let claimed = root.clone();
            let joined = spawn_blocking(move || claimed.epoch.join()).await;
            let reason = match joined.unwrap_or_else(|error| Err(std::io::Error::other(error))) {
                Ok(claimed) if claimed > version => {
                    Some("another outhaul process has handled a newer build there".to_owned())
                }
                Ok(_) if service.is_running(&newest).await => Some("a build is running".to_owned()),
                Ok(_) => None,
                Err(error) => Some(format!(
                    "cannot tell whether another outhaul process begins a build: {error}"
                )),
            };
            if let Some(reason) = reason {
                left.add(&format!("in {shown}: {reason}"), 0, 0);
                continue;
            }
            let needed = service.needed_by(&newest, &root).await;
            roots.push(Open {
                id,
                exec_root,
                root,
                version,
                cache,
                newest,
                needed,
            });
        }
        Ok(Self {
            service,
            request,
            roots: Arc::new(roots),
            left,
        })
    }

    /// Removes files, and tells which. Gives back what was left in place.
    async fn run(
        mut self,
        answer: &mpsc::Sender<Result<pb::EvictResponse, Status>>,
    ) -> Result<LeftInPlace, Status> {
        let mut wanted = self.request.bytes;
        let mut after = None;
        while wanted > 0 {
            let (candidates, is_all) = self.candidates(after.take()).await?;
            let mut candidates = candidates.into_iter().peekable();
            while wanted > 0 && candidates.peek().is_some() {
                let mut batch = Vec::new();
                let mut bytes = 0;
                while bytes < wanted && batch.len() < BATCH {
                    let Some(candidate) = candidates.next() else { break };
                    bytes += candidate.bytes;
                    batch.push(candidate);
                }
                after = batch
                    .last()
                    .map(|last| (last.used_ms, last.root, last.path.clone()));
                let removed = self.remove(batch, answer).await?;
                wanted = wanted.saturating_sub(removed.bytes);
                if !removed.outputs.is_empty() && answer.send(Ok(removed)).await.is_err() {
                    return Ok(self.left);
                }
            }
            if is_all {
                break;
            }
        }
        Ok(self.left)
    }

    /// The files that were used least recently, after one; and whether these are all that there are.
    async fn candidates(
        &mut self,
        after: Option<(i64, usize, ExecPath)>,
    ) -> Result<(Vec<Candidate>, bool), Status> {
        let (roots, include_newest) = (self.roots.clone(), self.request.include_newest);
        // What is left in place is counted when everything is read for the first time.
        let mut left = after.is_none().then(|| std::mem::take(&mut self.left));
        let read = self.service.read(move |service, _| {
            let mut oldest = BinaryHeap::new();
            let mut is_all = true;
            for (number, open) in roots.iter().enumerate() {
                for (path, row, digest, metadata) in files(service, open.id, &open.exec_root) {
                    let bytes = allocated(&metadata);
                    let reason = match &*row.source {
                        "" | "present" => Some(NOT_OURS),
                        _ if metadata.nlink() > 1 => Some(LINKED),
                        _ if !include_newest && open.is_needed(&path, &row) => Some(NEWEST),
                        _ => None,
                    };
                    if let Some(reason) = reason {
                        left.iter_mut().for_each(|left| left.add(reason, 1, bytes));
                        continue;
                    }
                    let key = (used_ms(&metadata), number, path);
                    if bytes == 0 || after.as_ref().is_some_and(|after| key <= *after) {
                        continue;
                    }
                    let (used_ms, root, path) = key;
                    oldest.push(Candidate {
                        used_ms,
                        root,
                        path,
                        bytes,
                        digest,
                    });
                    if oldest.len() > CANDIDATES {
                        oldest.pop();
                        is_all = false;
                    }
                }
            }
            (oldest.into_sorted_vec(), is_all, left)
        });
        let read = read.await;
        let (candidates, is_all, left) =
            read.ok_or_else(|| Status::internal("reading the record panicked; this is a bug in outhaul"))?;
        if let Some(left) = left {
            self.left = left;
        }
        Ok((candidates, is_all))
    }

    /// Removes those of a batch that the cache has.
    async fn remove(
        &mut self,
        batch: Vec<Candidate>,
        answer: &mpsc::Sender<Result<pb::EvictResponse, Status>>,
    ) -> Result<pb::EvictResponse, Status> {
        let mut by_root: BTreeMap<usize, Vec<Candidate>> = BTreeMap::new();
        for candidate in batch {
            by_root.entry(candidate.root).or_default().push(candidate);
        }
        let mut removed = pb::EvictResponse::default();
        for (number, mut candidates) in by_root {
            let digests: Vec<Digest> = candidates.iter().map(|c| c.digest.clone()).collect();
            let open = &self.roots[number];
            let attribution = Attribution {
                invocation_id: open.newest.invocation_id.clone(),
                build_id: open.newest.build_id.clone(),
                ..Attribution::default()
            };
            let missing = match open.cache.blobs().find_missing(&digests, &attribution).await {
                Ok(missing) => missing.into_iter().collect::<HashSet<_>>(),
                Err(error) => {
                    let reason = format!("the cache cannot say whether it has them: {error}");
                    let bytes = candidates.iter().map(|c| c.bytes).sum();
                    self.left.add(&reason, candidates.len() as u64, bytes);
                    continue;
                }
            };
            candidates.retain(|candidate| {
                let is_there = !missing.contains(&candidate.digest);
                if !is_there {
                    self.left.add(LOST, 1, candidate.bytes);
                }
                is_there
            });
            let (service, roots, dry_run) = (self.service.clone(), self.roots.clone(), self.request.dry_run);
            let answer = answer.clone();
            let done = spawn_blocking(move || {
                let mut left = LeftInPlace::default();
                // A caller who is gone wants nothing more.
                let is_over = || answer.is_closed();
                let open = &roots[number];
                let outputs = remove(&service, open, &candidates, dry_run, (&mut left, &is_over));
                (outputs, left)
            });
            let (outputs, left) = done
                .await
                .map_err(|_| Status::internal("removing files panicked; this is a bug in outhaul"))?;
            for (reason, (outputs, bytes)) in left.0 {
                self.left.add(&reason, outputs, bytes);
            }
            for (output, bytes) in outputs {
                removed.outputs.push(output);
                removed.bytes += bytes;
            }
        }
        Ok(removed)
    }
}

/// Removes files of one root, unless they have changed. Gives back what was recorded of them, and their space. Blocks.
fn remove(
    service: &Service,
    open: &Open,
    candidates: &[Candidate],
    dry_run: bool,
    (left, is_over): (&mut LeftInPlace, &dyn Fn() -> bool),
) -> Vec<(pb::Output, u64)> {
    let paths: Vec<ExecPath> = candidates
        .iter()
        .map(|candidate| candidate.path.clone())
        .collect();
    let recorded = service.record.outputs(open.id, &paths);
    let mut placer = Placer::new(open.root.place.clone(), PlaceOptions::default());
    let _working = open.root.epoch.working();
    let mut removed = Vec::new();
    for (candidate, row) in candidates.iter().zip(recorded) {
        if is_over() {
            break;
        }
        let is_same = |row: &OutputRow| {
            row.state == OutputState::Materialized
                && row.content == OutputContent::Blob(candidate.digest.clone())
        };
        let Some(row) = row.filter(is_same) else {
            left.add(CHANGED, 1, candidate.bytes);
            continue;
        };
        let (path, stamp) = (&candidate.path, row.stamp.as_ref());
        let version = (&open.root.epoch, open.version);
        match placer.evict(path, &row.content, stamp, version, dry_run) {
            Ok(Check::Present { .. }) => removed.push((candidate, row)),
            Ok(Check::Absent | Check::Differs) => left.add(CHANGED, 1, candidate.bytes),
            Err(error) if error.is_superseded() => left.add(BEGUN, 1, candidate.bytes),
            Err(error) => left.add(&error.kind.to_string(), 1, candidate.bytes),
        }
    }
    if !dry_run {
        // A row that somebody else has changed since is theirs.
        service.record.update_outputs(
            open.id,
            &removed,
            |(candidate, _)| &candidate.path,
            |i, seen| {
                let mut row = seen.to_row().filter(|row| *row == removed[i].1)?;
                row.state = OutputState::Known;
                row.stamp = None;
                row.source = Arc::default();
                row.materialized_at_ms = 0;
                REMOVED.clone_into(&mut row.error);
                Some(row)
            },
        );
    }
    let shown = removed.into_iter().map(|(candidate, row)| {
        let found = Found {
            root: open.id,
            exec_root: open.exec_root.clone(),
            path: candidate.path.clone(),
            row,
        };
        (show::output(&found, true), candidate.bytes)
    });
    shown.collect()
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn a_workspace_is_found_by_its_real_path_however_the_build_has_named_it() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap().join("real");
        let link = dir.path().join("link");
        fs::create_dir(&real).unwrap();
        symlink(&real, &link).unwrap();
        for (recorded, named, is_it) in [
            (&real, &real, true),
            (&link, &real, true),
            (&dir.path().to_owned(), &real, false),
            (&dir.path().join("gone"), &dir.path().join("gone"), true),
        ] {
            let is_same = is_workspace(recorded.to_str().unwrap(), named.to_str().unwrap());
            assert_eq!(is_same, is_it, "{recorded:?} {named:?}");
        }
        assert!(is_workspace("/w/", "/w") && !is_workspace("", "/w"));
    }

    #[test]
    fn a_build_needs_what_its_links_and_the_runfiles_of_its_programs_lead_to() {
        let dir = tempfile::tempdir().unwrap();
        let exec_root = dir.path().join("execroot/_main");
        let bin = exec_root.join("bazel-out/bin");
        fs::create_dir_all(&bin).unwrap();
        let place = OutputRoot::open(&exec_root, false).unwrap();
        let needs = || {
            let named = ["link", "app", "plain"].map(|name| format!("bazel-out/bin/{name}"));
            let needed = with_needs(&place, "/build/execroot/_main", HashSet::from(named))?;
            let mut needed: Vec<String> = needed
                .iter()
                .map(|path| path.replace("bazel-out/bin/", ""))
                .collect();
            needed.sort();
            Some(needed)
        };
        for name in ["target", "app", "plain"] {
            fs::write(bin.join(name), name).unwrap();
        }
        symlink(bin.join("target"), bin.join("link")).unwrap();
        let here = exec_root.display();
        let manifest =
            format!("a {here}/bazel-out/bin/a\n b\\sc /build/execroot/_main/bazel-out/bin/b\nd /src/d\n");
        fs::write(bin.join("app.runfiles_manifest"), manifest).unwrap();
        assert_eq!(needs().unwrap(), ["a", "app", "b", "link", "plain", "target"]);
        fs::create_dir(bin.join("plain.runfiles_manifest")).unwrap();
        assert_eq!(needs(), None, "it may name anything");
    }
}
