//! What the manifests that Bazel wrote beside programs on this machine name.
//!
//! What is on disk is hashed there, unless the record vouches for it; what is not has the digest that the record knows.
//! A manifest is an output like others, and so are the links in `bazel-out`: what they name outside of the build's own
//! places is not read.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsString,
    fs::{File, Metadata},
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::Arc,
};

use bytes::Bytes;

use super::{
    super::{error::StageError, request::Request},
    RUNFILES, Runfile, refused,
    sources::{Source, Sources},
};
use crate::{
    digest::{Digest, DigestFunction, Hasher},
    exec_path::ExecPath,
    invocation::{
        rows,
        runfiles::{self, Entry},
    },
    materialize::{Root, place::Lying},
    output::{OutputContent, Stamp},
    record::{InvocationRow, OutputRow, OutputState, Record, RootId},
    remote::Copy,
    roots::Roots,
};

/// What is read at once to be hashed.
const PIECE: usize = 1 << 16;

/// Looks for the runfiles of programs of a build that was made here.
pub(super) struct Finder<'a> {
    record: &'a Record,
    id: RootId,
    request: &'a Request,
    function: DigestFunction,
    root: Arc<Root>,
    sources: Sources,
    /// Local files that have the bytes of some.
    pub(super) copies: HashMap<Digest, Copy>,
    /// Those of them that no cache need have.
    pub(super) local: HashSet<Digest>,
}

/// Something on disk that is to be looked at.
struct Spot {
    /// Its name among the runfiles.
    name: String,
    exec_path: ExecPath,
    /// Where it lies, if it is a source.
    source: Option<Source>,
}

impl<'a> Finder<'a> {
    /// # Errors
    /// When the manifests on disk are not those of this build.
    pub(super) fn open(
        record: &'a Record,
        roots: &Roots,
        row: &InvocationRow,
        function: DigestFunction,
        request: &'a Request,
    ) -> Result<Self, StageError> {
        let elsewhere = || {
            refused(
                "the build was not made on this machine, where Bazel's manifests of runfiles would be; export it with \
                 `outhaul export --runfiles` there",
            )
        };
        let id = row.root.ok_or_else(elsewhere)?;
        let path = record.root_row(id).ok_or_else(elsewhere)?.path;
        if let Some(newest) = record.newest_invocation(id)
            && newest.invocation_id != row.invocation_id
        {
            let newest = newest.invocation_id;
            return Err(refused(format!(
                "build {newest} is newer, and may have changed what the manifests of runfiles name; stage from that one, \
                 or build the programs again"
            )));
        }
        let (opened, root) = roots
            .reopen(Path::new(&path))
            .map_err(|e| refused(e.to_string()))?;
        if opened != id {
            return Err(refused(format!(
                "{path} has been deleted and recreated since; build again"
            )));
        }
        let sources = Sources::of(row, &path, &roots.rules());
        Ok(Self {
            record,
            id,
            request,
            function,
            root,
            sources,
            copies: HashMap::new(),
            local: HashSet::new(),
        })
    }

    /// What a program needs; `None` if it is not a program.
    pub(super) fn of(&mut self, program: &ExecPath) -> Result<Option<Vec<Runfile>>, StageError> {
        let manifest = self.root.place.runfiles_manifest(program.as_str());
        let failed = |e| refused(format!("{program}: failed to read its manifest of runfiles: {e}"));
        let Some(manifest) = manifest.map_err(failed)? else {
            return Ok(None);
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
            match self.sources.output_of(&target) {
                Some(path) => {
                    let path = ExecPath::new(path).map_err(|e| named(&e.to_string()))?;
                    self.output(&name, &path, &mut found)?;
                }
                None if target.starts_with('/') => {
                    let (exec_path, source) = self.sources.find(Path::new(&target)).ok_or_else(|| {
                        named(&format!(
                            "that is neither an output nor a source of the build: {target}"
                        ))
                    })?;
                    let source = Some(source);
                    let spot = Spot {
                        name,
                        exec_path,
                        source,
                    };
                    self.local(spot, &mut found)?;
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

    /// An output: as it is on disk, and otherwise as it is recorded.
    fn output(&mut self, name: &str, path: &ExecPath, found: &mut Vec<Runfile>) -> Result<(), StageError> {
        let before = found.len();
        // What lies there is newer than what is recorded.
        let is_directory = match self.root.place.read(path.as_str()) {
            Ok(Lying::Nothing) => false,
            Ok(Lying::Directory(_)) => true,
            _ => {
                let spot = Spot {
                    name: name.to_owned(),
                    exec_path: path.clone(),
                    source: None,
                };
                return self.local(spot, found);
            }
        };
        if is_directory {
            let spot = Spot {
                name: name.to_owned(),
                exec_path: path.clone(),
                source: None,
            };
            self.local(spot, found)?;
        } else if let Some(row) = self.record.output(self.id, path) {
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
        let rows = self.record.scan_outputs(self.id, &format!("{path}/"));
        let mut rows: Vec<(ExecPath, OutputRow)> = rows.collect();
        // What the action cache does not have any more is recorded no more.
        let is_named = |row: &OutputRow| !rows::is_of_bazel(&row.event);
        let named = rows.iter().filter(|(_, row)| is_named(row));
        let newest = named.map(|(_, row)| row.version).max();
        rows.retain(|(_, row)| !is_named(row) || Some(row.version) == newest);
        rows
    }

    /// What lies on disk: a file, or all files of a directory.
    fn local(&mut self, spot: Spot, found: &mut Vec<Runfile>) -> Result<(), StageError> {
        let mut open = vec![spot];
        while let Some(mut spot) = open.pop() {
            self.request.still_asked()?;
            let lying = match &spot.source {
                Some(source) => source.read(),
                None => self.root.place.read(spot.exec_path.as_str()),
            };
            let content = match lying {
                Ok(Lying::File(file, path)) => {
                    let path = self.root.place.path().join(path);
                    self.content(&spot, &file, &path)?
                }
                Ok(Lying::Directory(names)) if names.is_empty() => Ok(OutputContent::Directory),
                Ok(Lying::Directory(names)) => match inside(&spot, names) {
                    // A link of a directory to itself ends with the longest path.
                    Ok(inside) if open.len() + inside.len() + found.len() > RUNFILES => {
                        return Err(refused(format!("{} has too many files in it", spot.exec_path)));
                    }
                    Ok(inside) => {
                        open.extend(inside);
                        continue;
                    }
                    Err(error) => Err(error),
                },
                Ok(Lying::Outside(path)) => match self.sources.find(&path) {
                    Some((_, source)) => {
                        spot.source = Some(source);
                        open.push(spot);
                        continue;
                    }
                    None => Err(io::Error::other(format!(
                        "it is a symlink to {}, which is neither an output nor a source of the build",
                        path.display()
                    ))),
                },
                Ok(Lying::Nothing) => Err(rustix::io::Errno::NOENT.into()),
                Err(error) => Err(error),
            };
            let shown = match &spot.source {
                Some(source) => source.shown(),
                None => self.root.place.path().join(spot.exec_path.as_path()),
            };
            found.push(Runfile {
                name: spot.name,
                content: content.map_err(|e| format!("{}: {e}", shown.display())),
                exec_path: spot.exec_path,
            });
        }
        Ok(())
    }

    /// What a file is, which is remembered as a place that has its bytes.
    fn content(
        &mut self,
        spot: &Spot,
        file: &File,
        path: &Path,
    ) -> Result<io::Result<OutputContent>, StageError> {
        let there = match file.metadata() {
            Ok(there) => stamp(&there),
            Err(error) => return Ok(Err(error)),
        };
        let recorded = match &spot.source {
            None => self.record.output(self.id, &spot.exec_path),
            Some(_) => None,
        };
        let mut is_local = true;
        let digest = match recorded {
            Some(OutputRow {
                state: OutputState::Materialized,
                content: OutputContent::Blob(digest),
                stamp: Some(stamp),
                source,
                event,
                ..
            }) if is_same(&stamp, &there) => {
                // Others were there when they were looked for: Bazel has made them here, maybe.
                let is_known = |source: &str| source.starts_with("batch") || source.starts_with("stream");
                is_local = !is_known(&source) && !rows::is_of_bazel(&event);
                digest
            }
            _ => match hash(self.request, self.function, file, there.size)? {
                Ok(digest) => digest,
                Err(error) => return Ok(Err(error)),
            },
        };
        if is_local {
            self.local.insert(digest.clone());
        }
        let name = path
            .file_name()
            .and_then(|name| ExecPath::new(name.to_str()?).ok());
        if let (Some(root), Some(path)) = (path.parent(), name) {
            let (root, stamp) = (Arc::from(root), there);
            self.copies.insert(digest.clone(), Copy { root, path, stamp });
        }
        Ok(Ok(OutputContent::Blob(digest)))
    }
}

/// The digest of a file of a size.
///
/// # Errors
/// Outside when nobody waits for it any more, inside when it cannot be read or grows.
fn hash(
    request: &Request,
    function: DigestFunction,
    mut file: &File,
    size: u64,
) -> Result<io::Result<Digest>, StageError> {
    let mut hasher = Hasher::new(function);
    let mut piece = vec![0; PIECE];
    let mut left = size;
    loop {
        request.still_asked()?;
        let read = match file.read(&mut piece) {
            Ok(0) => return Ok(Ok(hasher.finish())),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Ok(Err(error)),
        };
        match left.checked_sub(read as u64) {
            Some(rest) => left = rest,
            None => return Ok(Err(io::Error::other("it is being written"))),
        }
        hasher.update(&piece[..read]);
    }
}

/// What is in a directory.
fn inside(directory: &Spot, names: Vec<OsString>) -> io::Result<Vec<Spot>> {
    let spot = |file: OsString| {
        let file = file
            .to_str()
            .ok_or_else(|| io::Error::other("a name in it is not UTF-8"))?;
        Ok(Spot {
            name: format!("{}/{file}", directory.name),
            exec_path: directory.exec_path.join(file).map_err(io::Error::other)?,
            source: directory.source.as_ref().map(|source| source.join(file)),
        })
    };
    names.into_iter().map(spot).collect()
}

/// Whether a file is as it was recorded.
fn is_same(recorded: &Stamp, now: &Stamp) -> bool {
    let known = |stamp: &Stamp| (stamp.device, stamp.inode, stamp.size, stamp.mtime_ns);
    known(recorded) == known(now)
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

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::{super::super::request::Wish, *};

    #[test]
    fn a_file_is_read_as_long_as_anyone_waits_and_not_beyond_its_size() {
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"0123456789", 0).unwrap();
        let caller = CancellationToken::new();
        let request = Request::for_caller(Wish::default(), caller.clone()).unwrap();
        let hash = |size| {
            std::io::Seek::rewind(&mut &file).unwrap();
            hash(&request, DigestFunction::Sha256, &file, size)
        };
        let whole = Digest::of(DigestFunction::Sha256, b"0123456789");
        assert_eq!(hash(10).unwrap().unwrap(), whole);
        assert!(hash(9).unwrap().is_err());
        caller.cancel();
        assert!(hash(10).is_err());
    }
}
