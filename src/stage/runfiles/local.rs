//! What the manifests that Bazel wrote beside programs on this machine name.
//!
//! What is on disk is hashed there, unless the record vouches for it; what is not has the digest that the record knows.
//! A manifest is an output like others, so that what it names outside of the build's own places is refused.

use std::{
    collections::{HashMap, HashSet},
    fs::{File, Metadata},
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;

use super::{
    super::{error::StageError, request::Request},
    RUNFILES, Runfile, refused,
};
use crate::{
    digest::{Digest, DigestFunction, Hasher},
    exec_path::ExecPath,
    invocation::{
        rows::ACTION_CACHE,
        runfiles::{self, Entry},
    },
    materialize::place::OutputRoot,
    output::{OutputContent, Stamp},
    record::{InvocationRow, OutputRow, OutputState, Record, RootId},
    remote::{Copy, looks_right},
};

/// What is read at once to be hashed.
const PIECE: usize = 1 << 16;

/// Looks for the runfiles of programs of a build that was made here.
pub(super) struct Finder<'a> {
    record: &'a Record,
    root: RootId,
    request: &'a Request,
    function: DigestFunction,
    place: OutputRoot,
    /// The exec root here.
    here: Arc<Path>,
    /// The spellings of the exec root.
    exec_roots: [String; 2],
    /// Where sources lie, and what their exec paths begin with.
    sources: Vec<(PathBuf, &'static str)>,
    /// Local files that have the bytes of some.
    pub(super) copies: HashMap<Digest, Copy>,
}

impl<'a> Finder<'a> {
    /// # Errors
    /// When the manifests on disk are not those of this build.
    pub(super) fn open(
        record: &'a Record,
        row: &InvocationRow,
        function: DigestFunction,
        request: &'a Request,
    ) -> Result<Self, StageError> {
        let elsewhere = || {
            refused("the build was not made on this machine, where Bazel's manifests of runfiles would be")
        };
        let root = row.root.ok_or_else(elsewhere)?;
        let path = record.root_row(root).ok_or_else(elsewhere)?.path;
        if let Some(newest) = record.newest_invocation(root)
            && newest.invocation_id != row.invocation_id
        {
            let newest = newest.invocation_id;
            return Err(refused(format!(
                "build {newest} is newer, and may have changed what the manifests of runfiles name; stage from that one, \
                 or build the programs again"
            )));
        }
        let place = OutputRoot::open(Path::new(&path), false).map_err(|e| refused(e.to_string()))?;
        Ok(Self {
            record,
            root,
            request,
            function,
            place,
            here: Arc::from(Path::new(&path)),
            exec_roots: [row.exec_root.trim_end_matches('/').to_owned(), path],
            sources: sources(row),
            copies: HashMap::new(),
        })
    }

    /// What a program needs; `None` if it is not a program.
    pub(super) fn of(&mut self, program: &ExecPath) -> Result<Option<Vec<Runfile>>, StageError> {
        let manifest = match self.place.runfiles_manifest(program.as_str()) {
            Ok(manifest) => manifest,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                return Ok(None);
            }
            Err(error) => {
                return Err(refused(format!(
                    "{program}: failed to read its manifest of runfiles: {error}"
                )));
            }
        };
        let mut found = Vec::new();
        for Entry { name, target } in runfiles::entries(&manifest) {
            self.request.still_asked()?;
            let named = |reason: &str| refused(format!("{program} has a runfile {reason}"));
            let text = |bytes: Vec<u8>| {
                let text = String::from_utf8(bytes);
                text.map_err(|e| {
                    let bytes = String::from_utf8_lossy(e.as_bytes()).into_owned();
                    named(&format!("whose path is not UTF-8: {bytes}"))
                })
            };
            let (name, target) = (text(name)?, text(target)?);
            let own = || ExecPath::new(&name).map_err(|e| named(&e.to_string()));
            match self.output_of(&target) {
                Some(path) => {
                    let path = ExecPath::new(path).map_err(|e| named(&e.to_string()))?;
                    self.output(&name, &path, &mut found)?;
                }
                None if target.starts_with('/') => {
                    let path = self.source_of(Path::new(&target)).ok_or_else(|| {
                        named(&format!(
                            "that is neither an output nor a source of the build: {target}"
                        ))
                    })?;
                    self.local(&name, &path, Path::new(&target), &mut found)?;
                }
                None => {
                    let content = if target.is_empty() {
                        OutputContent::Inline(Bytes::new())
                    } else {
                        OutputContent::Symlink(target)
                    };
                    found.push(Runfile {
                        exec_path: own()?,
                        name,
                        content: Ok(content),
                    });
                }
            }
            if found.len() > RUNFILES {
                return Err(named("too many"));
            }
        }
        Ok(Some(found))
    }

    /// The exec path of a target that is an output.
    fn output_of<'t>(&self, target: &'t str) -> Option<&'t str> {
        let roots = self.exec_roots.iter().filter(|root| !root.is_empty());
        let mut below = roots.filter_map(|root| target.strip_prefix(root.as_str())?.strip_prefix('/'));
        below.find(|path| path.starts_with("bazel-out/"))
    }

    /// The exec path of a target that is a source.
    fn source_of(&self, target: &Path) -> Option<ExecPath> {
        let is_plain = target.components().all(|part| part != Component::ParentDir);
        let mut below = self
            .sources
            .iter()
            .filter(|_| is_plain)
            .filter_map(|(place, prefix)| {
                let below = target.strip_prefix(place).ok()?.to_str()?;
                ExecPath::new(&format!("{prefix}{below}")).ok()
            });
        below.next()
    }

    /// An output: as it is on disk, and otherwise as it is recorded.
    fn output(&mut self, name: &str, path: &ExecPath, found: &mut Vec<Runfile>) -> Result<(), StageError> {
        let here = self.here.join(path.as_path());
        let before = found.len();
        // What lies there is newer than what is recorded.
        let is_directory = match here.metadata() {
            Ok(there) if !there.is_dir() => return self.local(name, path, &here, found),
            Ok(_) => {
                self.local(name, path, &here, found)?;
                true
            }
            Err(_) => false,
        };
        if !is_directory && let Some(row) = self.record.output(self.root, path) {
            found.push(Runfile {
                name: name.to_owned(),
                exec_path: path.clone(),
                content: Ok(row.content),
            });
            return Ok(());
        }
        // In minimal mode, Bazel makes the directories of trees and leaves the files away.
        let there: HashSet<ExecPath> = found[before..].iter().map(|one| one.exec_path.clone()).collect();
        let rows = self.tree(path).into_iter();
        let rows: Vec<_> = rows.filter(|(path, _)| !there.contains(path)).collect();
        if !rows.is_empty() {
            // It was empty on disk only.
            found.retain(|one| one.exec_path != *path);
        }
        let is_absent = !is_directory && rows.is_empty();
        found.extend(rows.into_iter().map(|(file, row)| {
            let below = file.as_str().strip_prefix(path.as_str()).unwrap_or_default();
            Runfile {
                name: format!("{name}{below}"),
                content: Ok(row.content),
                exec_path: file,
            }
        }));
        if is_absent {
            let reason = "it is not on disk, and no recorded build has named its digest";
            found.push(Runfile {
                name: name.to_owned(),
                exec_path: path.clone(),
                content: Err(reason.to_owned()),
            });
        }
        Ok(())
    }

    /// The recorded files of a tree, without those that it had in earlier builds only.
    fn tree(&self, path: &ExecPath) -> Vec<(ExecPath, OutputRow)> {
        let rows = self.record.scan_outputs(self.root, &format!("{path}/"));
        let mut rows: Vec<(ExecPath, OutputRow)> = rows.collect();
        // What the action cache does not have any more is recorded no more.
        let is_named = |row: &OutputRow| *row.event != *ACTION_CACHE;
        let named = rows.iter().filter(|(_, row)| is_named(row));
        let newest = named.map(|(_, row)| row.version).max();
        rows.retain(|(_, row)| !is_named(row) || Some(row.version) == newest);
        rows
    }

    /// What lies on disk: a file, or all files of a directory.
    fn local(
        &mut self,
        name: &str,
        exec_path: &ExecPath,
        path: &Path,
        found: &mut Vec<Runfile>,
    ) -> Result<(), StageError> {
        let mut open = vec![(name.to_owned(), exec_path.clone(), path.to_owned())];
        while let Some((name, exec_path, path)) = open.pop() {
            self.request.still_asked()?;
            let mut content = self.content(&exec_path, &path);
            if let Ok(OutputContent::Directory) = content {
                let inside = inside(&name, &exec_path, &path);
                match inside {
                    Ok(inside) if inside.is_empty() => {}
                    Ok(inside) => {
                        open.extend(inside);
                        // A link of a directory to itself ends with the longest path.
                        if open.len() + found.len() > RUNFILES {
                            return Err(refused(format!("{} has too many files in it", path.display())));
                        }
                        continue;
                    }
                    Err(error) => content = Err(error),
                }
            }
            found.push(Runfile {
                name,
                content: content.map_err(|e| format!("{}: {e}", path.display())),
                exec_path,
            });
        }
        Ok(())
    }

    fn content(&mut self, exec_path: &ExecPath, path: &Path) -> io::Result<OutputContent> {
        let there = path.metadata()?;
        if there.is_dir() {
            return Ok(OutputContent::Directory);
        }
        if let Some(row) = self.record.output(self.root, exec_path)
            && row.state == OutputState::Materialized
            && let (OutputContent::Blob(digest), Some(stamp)) = (&row.content, row.stamp)
        {
            let (root, path) = (self.here.clone(), exec_path.clone());
            if looks_right(&Copy { root, path, stamp }, digest.size()) {
                return Ok(row.content);
            }
        }
        self.hash(path, &there).map(OutputContent::Blob)
    }

    /// The digest of a file, which is remembered as a place that has its bytes.
    fn hash(&mut self, path: &Path, there: &Metadata) -> io::Result<Digest> {
        if !there.is_file() {
            return Err(io::Error::other("it is not a regular file"));
        }
        let real = path.canonicalize()?;
        let mut hasher = Hasher::new(self.function);
        let mut file = File::open(&real)?;
        let mut piece = vec![0; PIECE];
        loop {
            match file.read(&mut piece)? {
                0 => break,
                read => hasher.update(&piece[..read]),
            }
        }
        let digest = hasher.finish();
        let below = real.strip_prefix("/").ok().and_then(Path::to_str);
        if let Some(Ok(path)) = below.map(ExecPath::new) {
            let copy = Copy {
                root: Arc::from(Path::new("/")),
                path,
                stamp: stamp(&file.metadata()?),
            };
            self.copies.insert(digest.clone(), copy);
        }
        Ok(digest)
    }
}

/// Where the sources of a build lie: its workspace, and the external repositories of its output base.
fn sources(row: &InvocationRow) -> Vec<(PathBuf, &'static str)> {
    let base = Path::new(&row.exec_root).ancestors().nth(2);
    let external = base.map(|base| (base.join("external"), "external/"));
    let workspace = Some((PathBuf::from(&row.workspace), ""));
    let named = |(path, _): &(PathBuf, _)| path.is_absolute() && path.components().count() > 1;
    [external, workspace]
        .into_iter()
        .flatten()
        .filter(named)
        .collect()
}

/// What is in a directory.
fn inside(name: &str, exec_path: &ExecPath, path: &Path) -> io::Result<Vec<(String, ExecPath, PathBuf)>> {
    let mut inside = Vec::new();
    for entry in path.read_dir()? {
        let file = entry?.file_name();
        let file = file
            .to_str()
            .ok_or_else(|| io::Error::other("a name in it is not UTF-8"))?;
        let exec_path = ExecPath::new(&format!("{exec_path}/{file}")).map_err(io::Error::other)?;
        inside.push((format!("{name}/{file}"), exec_path, path.join(file)));
    }
    Ok(inside)
}

fn stamp(found: &Metadata) -> Stamp {
    let nanoseconds = |seconds: i64, rest: i64| seconds.saturating_mul(1_000_000_000).saturating_add(rest);
    Stamp {
        size: found.len(),
        mtime_ns: nanoseconds(found.mtime(), found.mtime_nsec()),
        ctime_ns: nanoseconds(found.ctime(), found.ctime_nsec()),
        inode: found.ino(),
        device: found.dev(),
        taken_ns: crate::units::now_ns(),
    }
}
