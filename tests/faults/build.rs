//! A build in numbers: targets with files of all sizes that matter, some of them with the same content.

use outhaul::{
    bep::event::{Completed, Content, Event, File, NamedSet, OutputGroup, Started, TargetId},
    digest::{Digest, DigestFunction},
};
use outhaul_testkit::{Chance, cache::Store};

const PREFIX: &str = "bazel-out/k8-fastbuild/bin";

/// What an output shall be.
#[derive(Debug, Clone)]
pub(crate) enum Shall {
    /// A file of these bytes.
    File(Vec<u8>),
    /// A file whose blob nobody has ever uploaded.
    Missing(Digest),
    Symlink(String),
    EmptyDirectory,
}

#[derive(Debug, Clone)]
pub(crate) struct Output {
    /// Below the exec root.
    pub(crate) path: String,
    pub(crate) shall: Shall,
    target: usize,
}

#[derive(Debug, Clone)]
pub(crate) struct Build {
    pub(crate) outputs: Vec<Output>,
    pub(crate) targets: usize,
}

/// Sizes on both sides of every border that the way of a blob has.
fn size(chance: &mut Chance, small_limit: u64, batch_limit: u64) -> usize {
    let near = |chance: &mut Chance, border: u64| (border + chance.below(3)).saturating_sub(1);
    let size = match chance.below(20) {
        0 => 0,
        1 | 2 => 1,
        3 => near(chance, 100),
        4..=9 => 2 + chance.below(5000),
        10..=13 => 5000 + chance.below(60_000),
        14 => near(chance, small_limit),
        15 => near(chance, batch_limit.min(1 << 20)),
        16 => near(chance, 256 << 10),
        17 => near(chance, 1 << 20),
        18 => small_limit + chance.below(300_000),
        _ => 1_500_000 + chance.below(1_000_000),
    };
    usize::try_from(size).expect("small")
}

/// Bytes that compress, not to nothing.
fn bytes(chance: &mut Chance, size: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        let word = chance.number() & 0x0f0f_0f0f_0f0f_0f0f;
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

impl Build {
    pub(crate) fn new(chance: &mut Chance, small_limit: u64, batch_limit: u64) -> Self {
        let targets = 1 + chance.below(4) as usize;
        let count = 1 + chance.below(40);
        let mut outputs: Vec<Output> = Vec::new();
        for n in 0..count {
            let target = chance.below(targets as u64) as usize;
            let shall = match chance.below(20) {
                0 => Shall::Symlink(format!("nowhere/{n}")),
                1 => Shall::EmptyDirectory,
                2 => Shall::Missing(Digest::of(DigestFunction::Sha256, &chance.number().to_le_bytes())),
                // The same bytes elsewhere, in this build's other targets too.
                3..=6 if !outputs.is_empty() => {
                    let other = chance.below(outputs.len() as u64) as usize;
                    outputs[other].shall.clone()
                }
                _ => {
                    let size = size(chance, small_limit, batch_limit);
                    Shall::File(bytes(chance, size))
                }
            };
            let name = match (&shall, chance.below(3)) {
                (Shall::EmptyDirectory, _) => format!("t{target}/empty{n}.d"),
                // Of a tree.
                (_, 0) => format!("t{target}/tree.d/sub{}/f{n}.out", n % 2),
                _ => format!("t{target}/f{n}.out"),
            };
            outputs.push(Output {
                path: format!("{PREFIX}/{name}"),
                shall,
                target,
            });
        }
        Self { outputs, targets }
    }

    /// The next build of the same targets: half of the files have other bytes.
    pub(crate) fn changed(&self) -> Self {
        let mut changed = self.clone();
        for output in changed.outputs.iter_mut().step_by(2) {
            if let Shall::File(bytes) = &mut output.shall {
                bytes.push(b'!');
            }
        }
        changed
    }

    /// Puts into a store what the cache will have.
    pub(crate) fn fill(&self, store: &Store) {
        for output in &self.outputs {
            if let Shall::File(bytes) = &output.shall {
                store.put(bytes.clone());
            }
        }
    }

    /// The digest that an output is named by, if it has one.
    pub(crate) fn digest(&self, index: usize) -> Option<Digest> {
        match &self.outputs[index].shall {
            Shall::File(bytes) => Some(Digest::of(DigestFunction::Sha256, bytes)),
            Shall::Missing(digest) => Some(digest.clone()),
            _ => None,
        }
    }

    pub(crate) fn events(&self, workspace: &str, exec_root: &str) -> Vec<Event> {
        let mut events = vec![
            Event::Started(Started {
                command: "build".to_owned(),
                workspace: workspace.to_owned(),
                ..Started::default()
            }),
            Event::ExecRoot(exec_root.to_owned()),
        ];
        for target in 0..self.targets {
            let of_it = || (0..self.outputs.len()).filter(|&n| self.outputs[n].target == target);
            let files = of_it().filter_map(|n| self.file(n)).collect();
            let is_directory = |n: &usize| matches!(self.outputs[*n].shall, Shall::EmptyDirectory);
            let id = target.to_string();
            events.push(Event::NamedSet(NamedSet {
                id: id.clone(),
                files,
                ..NamedSet::default()
            }));
            events.push(Event::Completed(Completed {
                target: TargetId {
                    label: format!("//:t{target}"),
                    ..TargetId::default()
                },
                success: true,
                groups: vec![OutputGroup {
                    name: "default".to_owned(),
                    sets: vec![id],
                    ..OutputGroup::default()
                }],
                directories: of_it()
                    .filter(is_directory)
                    .map(|n| self.named(n, Content::Unknown))
                    .collect(),
            }));
        }
        events.push(Event::Finished {
            exit_code: 0,
            name: "SUCCESS".to_owned(),
            ended_ms: 0,
        });
        events
    }

    fn file(&self, index: usize) -> Option<File> {
        let content = match &self.outputs[index].shall {
            Shall::File(_) | Shall::Missing(_) => Content::Blob(self.digest(index)?),
            Shall::Symlink(target) => Content::Symlink(target.clone()),
            Shall::EmptyDirectory => return None,
        };
        Some(self.named(index, content))
    }

    fn named(&self, index: usize, content: Content) -> File {
        File {
            path: (&*self.outputs[index].path).into(),
            prefix_len: PREFIX.len(),
            content,
            uri: None,
        }
    }
}

impl std::fmt::Display for Shall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(bytes) => {
                let digest = Digest::of(DigestFunction::Sha256, bytes);
                write!(f, "a file of {} bytes, {}", bytes.len(), &digest.hash_hex()[..8])
            }
            Self::Missing(_) => f.write_str("a file that was never uploaded"),
            Self::Symlink(target) => write!(f, "a symlink to {target}"),
            Self::EmptyDirectory => f.write_str("an empty directory"),
        }
    }
}
