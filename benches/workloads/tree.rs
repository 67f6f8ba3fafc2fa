//! What a workload's build makes: directories of files with contents of their own.

use std::{collections::HashSet, ops::RangeInclusive, path::Path, thread};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use outhaul::digest::{Digest, DigestFunction};
use outhaul_testkit::Chance;

use crate::plain;

/// The artifact root.
pub(crate) const BIN: &str = "bazel-out/k8-fastbuild/bin";

/// A tree by numbers.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    /// Directories; each is one target's and one named set.
    pub(crate) folders: usize,
    /// Files of each.
    pub(crate) files: usize,
    /// Sizes, evenly spread.
    pub(crate) sizes: RangeInclusive<usize>,
    /// How many different contents there are; by default each file has its own.
    pub(crate) distinct: Option<usize>,
    /// Whether sets refer to others, and to which.
    pub(crate) nested: bool,
    /// Whether there are bytes at all, or digests only.
    pub(crate) known_only: bool,
}

/// The files of a workload.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    pub(crate) folders: Vec<Folder>,
}

/// One directory of files.
#[derive(Debug, Clone)]
pub(crate) struct Folder {
    /// Below the artifact root.
    pub(crate) path: String,
    pub(crate) files: Vec<Leaf>,
    /// The folders whose sets this one's refers to; they come earlier.
    pub(crate) children: Vec<usize>,
}

/// One file.
#[derive(Debug, Clone)]
pub(crate) struct Leaf {
    pub(crate) name: String,
    pub(crate) digest: Digest,
    /// Nothing, if it is only known.
    pub(crate) bytes: Bytes,
}

impl Shape {
    /// Makes the files, on all cores: gigabytes take a while.
    pub(crate) fn make(&self) -> Result<Tree> {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let numbers: Vec<usize> = (0..self.folders).collect();
        let folders = thread::scope(|scope| {
            let parts: Vec<_> = numbers
                .chunks(self.folders.div_ceil(threads).max(1))
                .map(|part| scope.spawn(|| part.iter().map(|&n| self.folder(n)).collect::<Result<Vec<_>>>()))
                .collect();
            let mut folders = Vec::with_capacity(self.folders);
            for part in parts {
                let made = part.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
                folders.extend(made?);
            }
            anyhow::Ok(folders)
        })?;
        Ok(Tree { folders })
    }

    fn folder(&self, number: usize) -> Result<Folder> {
        let files = (0..self.files)
            .map(|file| {
                let index = number * self.files + file;
                let seed = self.distinct.map_or(index, |distinct| index % distinct.max(1)) as u64;
                Ok(Leaf {
                    name: format!("f{file}.out"),
                    ..self.content(seed)?
                })
            })
            .collect::<Result<_>>()?;
        // Its package's first, and one that is shared by eight: some 300 files are below each set.
        let mut children = Vec::new();
        if self.nested && number > 0 {
            let (package, shared) = (number - number % 16, number / 8);
            children.extend([package, shared].into_iter().filter(|&n| n < number));
            children.dedup();
        }
        Ok(Folder {
            path: format!("gen/t{number}"),
            files,
            children,
        })
    }

    fn content(&self, seed: u64) -> Result<Leaf> {
        let span = (self.sizes.end() - self.sizes.start() + 1) as u64;
        let size = self.sizes.start() + usize::try_from(Chance::new(seed ^ 0x5bd1_e995).number() % span)?;
        let (digest, bytes) = if self.known_only {
            let hash: Vec<u8> = (0..4)
                .flat_map(|n| Chance::new(4 * seed + n).number().to_le_bytes())
                .collect();
            (
                Digest::new(DigestFunction::Sha256, &hash, size as u64)?,
                Bytes::new(),
            )
        } else {
            let bytes = Bytes::from(letters(seed, size));
            (Digest::of(DigestFunction::Sha256, &bytes), bytes)
        };
        Ok(Leaf {
            name: String::new(),
            digest,
            bytes,
        })
    }
}

impl Tree {
    /// The same tree with another content in every n-th file; which, and what, differs from build to build.
    pub(crate) fn changed(&self, every: usize, build: u64) -> Self {
        let mut tree = self.clone();
        for (index, file) in tree.folders.iter_mut().flat_map(|f| &mut f.files).enumerate() {
            if index % every == build as usize % every {
                let bytes = Bytes::from(letters(index as u64 ^ ((build + 1) << 40), file.bytes.len()));
                file.digest = Digest::of(DigestFunction::Sha256, &bytes);
                file.bytes = bytes;
            }
        }
        tree
    }

    pub(crate) fn leaves(&self) -> impl Iterator<Item = (&Folder, &Leaf)> {
        self.folders
            .iter()
            .flat_map(|folder| folder.files.iter().map(move |file| (folder, file)))
    }

    /// The blobs that a cache needs, with repetitions.
    pub(crate) fn blobs(&self) -> impl Iterator<Item = (Digest, Bytes)> {
        self.leaves()
            .map(|(_, file)| (file.digest.clone(), file.bytes.clone()))
    }

    pub(crate) fn count(&self) -> usize {
        self.folders.iter().map(|f| f.files.len()).sum()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.leaves().map(|(_, file)| file.digest.size()).sum()
    }

    /// Number of different contents.
    pub(crate) fn distinct(&self) -> usize {
        self.leaves()
            .map(|(_, file)| &file.digest)
            .collect::<HashSet<_>>()
            .len()
    }

    /// As the plain program takes it. The bytes are shared.
    pub(crate) fn plain(&self) -> Vec<plain::Folder> {
        self.folders
            .iter()
            .map(|folder| plain::Folder {
                path: format!("{BIN}/{}", folder.path).into(),
                files: folder
                    .files
                    .iter()
                    .map(|file| (file.name.clone(), file.bytes.clone()))
                    .collect(),
            })
            .collect()
    }

    /// Fails unless every file is below `root` with its size, and if asked for, its content.
    pub(crate) fn check(&self, root: &Path, contents: bool) -> Result<()> {
        for (folder, file) in self.leaves() {
            let path = root.join(BIN).join(&folder.path).join(&file.name);
            let found = std::fs::symlink_metadata(&path).with_context(|| path.display().to_string())?;
            ensure!(
                found.is_file() && found.len() == file.digest.size(),
                "{} has {} bytes instead of {}",
                path.display(),
                found.len(),
                file.digest.size()
            );
            ensure!(
                !contents || std::fs::read(&path)? == file.bytes,
                "{} has another content",
                path.display()
            );
        }
        Ok(())
    }

    /// Removes what differs in another tree of the same paths, as Bazel does before it runs an action again.
    pub(crate) fn remove_changed(&self, other: &Self, root: &Path) -> Result<()> {
        for ((folder, file), (_, theirs)) in self.leaves().zip(other.leaves()) {
            if file.digest != theirs.digest {
                std::fs::remove_file(root.join(BIN).join(&folder.path).join(&file.name))?;
            }
        }
        Ok(())
    }
}

/// Bytes that compress to about half, as text does, different for every seed.
pub(crate) fn letters(seed: u64, size: usize) -> Vec<u8> {
    let mut chance = Chance::new(Chance::new(seed).number());
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        let word = (chance.number() & 0x0f0f_0f0f_0f0f_0f0f) | 0x6060_6060_6060_6060;
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}
