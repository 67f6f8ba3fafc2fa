//! Output trees as plain data, to be compared whole.

use std::{collections::BTreeMap, fmt, os::unix::fs::PermissionsExt as _, path::Path};

/// One entry of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Entry {
    File {
        hash: String,
        size: u64,
        mode: u32,
    },
    Link {
        target: String,
        /// Hash of the file that it leads to, if it leads to one.
        hash: Option<String>,
    },
    Directory {
        mode: u32,
    },
}

impl Entry {
    /// Hash of the bytes that reading it brings; links are followed.
    pub(crate) fn hash(&self) -> Option<&str> {
        match self {
            Self::File { hash, .. } => Some(hash),
            Self::Link { hash, .. } => hash.as_deref(),
            Self::Directory { .. } => None,
        }
    }

    /// Whether reading either brings the same. A link to the right bytes is as good as a file; two files must also
    /// allow their owner the same: Debian's Bazel 7 makes what it downloads 0544, for it changes modes by Java's means.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Directory { .. }, Self::Directory { .. }) => true,
            (Self::File { mode: one, .. }, Self::File { mode: two, .. }) if one & 0o700 != two & 0o700 => {
                false
            }
            (
                Self::Link {
                    target: one,
                    hash: None,
                },
                Self::Link {
                    target: two,
                    hash: None,
                },
            ) => one == two,
            _ => self.hash().is_some() && self.hash() == other.hash(),
        }
    }
}

/// Everything below a directory, by path relative to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tree(pub(crate) BTreeMap<String, Entry>);

impl Tree {
    /// Reads a tree. Links in it are not entered.
    pub(crate) fn of(root: &Path) -> Self {
        let mut entries = BTreeMap::new();
        // `bazel-bin` is a link itself.
        if let Ok(root) = root.canonicalize() {
            read(&root, "", &mut entries);
        }
        Self(entries)
    }

    /// The part whose paths satisfy something.
    pub(crate) fn only(&self, wanted: impl Fn(&str) -> bool) -> Self {
        Self(
            self.0
                .iter()
                .filter(|(path, _)| wanted(path))
                .map(|(path, entry)| (path.clone(), entry.clone()))
                .collect(),
        )
    }

    /// Without runfiles, their manifests and what Bazel writes beside outputs for itself.
    pub(crate) fn without_runfiles(&self) -> Self {
        self.only(|path| {
            !path
                .split('/')
                .any(|name| name.ends_with(".runfiles") || name.ends_with(".runfiles_manifest"))
        })
    }

    /// Paths of what can be read: files, and links that lead to files.
    pub(crate) fn files(&self) -> Vec<&str> {
        self.0
            .iter()
            .filter(|(_, entry)| entry.hash().is_some())
            .map(|(path, _)| path.as_str())
            .collect()
    }

    /// How another tree differs: `-` lacks, `+` has more, `!` has otherwise; see [`Entry::is_like`].
    pub(crate) fn differences(&self, other: &Self) -> Vec<String> {
        let mut list = Vec::new();
        for (path, entry) in &self.0 {
            match other.0.get(path) {
                None => list.push(format!("- {path}")),
                Some(found) if found.is_like(entry) => {}
                Some(found) => list.push(format!("! {path}: {entry:?}, found {found:?}")),
            }
        }
        list.extend(
            other
                .0
                .keys()
                .filter(|path| !self.0.contains_key(*path))
                .map(|path| format!("+ {path}")),
        );
        list
    }
}

fn read(dir: &Path, below: &str, entries: &mut BTreeMap<String, Entry>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        let key = if below.is_empty() {
            name.to_owned()
        } else {
            format!("{below}/{name}")
        };
        let meta = path.symlink_metadata().unwrap();
        let mode = meta.permissions().mode() & 0o7777;
        let entry = if meta.is_symlink() {
            Entry::Link {
                target: path.read_link().unwrap().display().to_string(),
                hash: path.is_file().then(|| hash(&path)),
            }
        } else if meta.is_dir() {
            read(&path, &key, entries);
            Entry::Directory { mode }
        } else {
            Entry::File {
                hash: hash(&path),
                size: meta.len(),
                mode,
            }
        };
        entries.insert(key, entry);
    }
}

fn hash(path: &Path) -> String {
    blake3::hash(&std::fs::read(path).unwrap()).to_hex().to_string()
}

impl fmt::Display for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (path, entry) in &self.0 {
            writeln!(f, "{path}: {entry:?}")?;
        }
        Ok(())
    }
}
