//! Whole archives: into a target, or not at all.

mod hostile;
mod make;
mod merge;
mod random;
mod tools;
mod zips;

use std::{collections::BTreeMap, fs, io::Read, os::unix::fs::PermissionsExt as _, path::Path};

pub(super) use self::make::{Entry, Tar, compress};
use super::*;

/// How archives are unpacked.
#[derive(Clone)]
struct How {
    format: Format,
    mode: Mode,
    limits: Limits,
    options: StagingOptions,
}

impl Default for How {
    fn default() -> Self {
        Self {
            format: Format::Tar,
            mode: Mode::Extract { strip_components: 0 },
            limits: Limits::default(),
            options: StagingOptions {
                existing: Existing::Merge,
                on_conflict: OnConflict::Fail,
                unsafe_links: false,
                lists: false,
            },
        }
    }
}

impl How {
    fn of(format: Format) -> Self {
        Self {
            format,
            ..Self::default()
        }
    }

    fn flatten() -> Self {
        Self {
            mode: Mode::Flatten,
            ..Self::default()
        }
    }

    fn archive<'a>(&'a self, name: &'a str, order: u32) -> Archive<'a> {
        Archive {
            name,
            order,
            format: self.format,
            mode: &self.mode,
            below: "",
            limits: &self.limits,
        }
    }

    /// Unpacks several, one after the other; they are called `0.tar`, `1.tar`, …
    fn stage(&self, target: &Path, archives: &[&[u8]]) -> Result<(Staging, Unpacked), ArchiveError> {
        let staging = Staging::open(target, self.options)?;
        let mut last = Unpacked::default();
        for (order, bytes) in archives.iter().enumerate() {
            let name = format!("{order}.tar");
            let archive = self.archive(&name, order as u32);
            last = if self.format == Format::Zip {
                let (file, _) = crate::fuzzing::file_of(bytes);
                unpack_zip(&file, &archive, &staging)?
            } else {
                unpack(*bytes, &archive, &staging)?
            };
        }
        Ok((staging, last))
    }

    fn all(&self, target: &Path, archives: &[&[u8]]) -> Result<Published, ArchiveError> {
        self.stage(target, archives)?.0.publish()
    }

    /// The error of one archive, of which nothing is to be in a target that does not exist.
    fn error(&self, bytes: &[u8]) -> String {
        let dir = tempfile::tempdir().unwrap();
        let error = match self.all(&dir.path().join("t"), &[bytes]) {
            Ok(_) => panic!("unpacked: {:?}", tree(dir.path())),
            Err(error) => error,
        };
        assert_eq!(tree(dir.path()), BTreeMap::new(), "{error}");
        error.to_string()
    }
}

/// What is in a directory: each path with its kind, mode and content.
fn tree(root: &Path) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let mode = meta.permissions().mode() & 0o7777;
            let what = if meta.is_symlink() {
                format!("-> {}", fs::read_link(&path).unwrap().display())
            } else if meta.is_dir() {
                directories.push(path.clone());
                format!("{mode:o} directory")
            } else {
                let mut bytes = Vec::new();
                fs::File::open(&path).unwrap().read_to_end(&mut bytes).unwrap();
                match String::from_utf8(bytes) {
                    Ok(text) if text.len() < 100 => format!("{mode:o} {text}"),
                    Ok(text) => format!("{mode:o} {} {}", text.len(), blake3::hash(text.as_bytes())),
                    Err(e) => format!("{mode:o} {} {}", e.as_bytes().len(), blake3::hash(e.as_bytes())),
                }
            };
            let path = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            all.insert(path, what);
        }
    }
    all
}

/// A tree by its lines.
fn lines(expected: &[(&str, &str)]) -> BTreeMap<String, String> {
    let owned = |(path, what): &(&str, &str)| ((*path).to_owned(), (*what).to_owned());
    expected.iter().map(owned).collect()
}
