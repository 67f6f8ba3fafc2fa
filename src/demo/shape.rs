//! Large builds by numbers: many targets with many files, streamed lazily.

use std::{ops::Range, sync::Arc};

use super::events::{
    BIN, Setting, closing, completed, configured, content, named_set, opening, set_id, uuid,
};
use crate::{
    digest::Digest,
    proto::build_event_stream::{OutputGroup, TargetComplete},
};

/// A build's measures. Every file's content is its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Number of targets.
    pub targets: usize,
    /// Files of each.
    pub files_per_target: usize,
    /// Size of each file in bytes.
    pub file_size: usize,
    /// Directories that a target's files are spread over; at least 1.
    pub dirs_per_target: usize,
    /// Most files in one named set, Bazel's `--build_event_max_named_set_of_file_entries`; at least 1.
    pub files_per_set: usize,
    /// Makes the contents; another seed, other bytes.
    pub seed: u64,
}

impl Default for Shape {
    /// 10 targets of 100 files of 4 KiB, each in one directory.
    fn default() -> Self {
        Self {
            targets: 10,
            files_per_target: 100,
            file_size: 4096,
            dirs_per_target: 1,
            files_per_set: 5000,
            seed: 1,
        }
    }
}

/// A shape whose files are in a cache.
#[derive(Debug, Clone)]
pub struct FilledShape {
    shape: Shape,
    /// Digests of all files, target by target.
    digests: Arc<[Digest]>,
}

impl Shape {
    /// Number of files.
    pub const fn files(&self) -> usize {
        self.targets * self.files_per_target
    }

    /// Bytes of all files together.
    pub const fn bytes(&self) -> u64 {
        self.files() as u64 * self.file_size as u64
    }

    /// Generates the files, and hands each one's bytes to what puts them into a cache.
    pub fn fill(self, mut put: impl FnMut(Vec<u8>) -> Digest) -> FilledShape {
        let digests = (0..self.files() as u64)
            .map(|file| {
                let seed = self
                    .seed
                    .wrapping_mul(0x2545_f491_4f6c_dd1d)
                    .wrapping_add(file << 20);
                put(content(seed, self.file_size))
            })
            .collect();
        FilledShape { shape: self, digests }
    }

    fn label(target: usize) -> String {
        format!("//gen/t{target}:t{target}")
    }

    /// Path of a file below the artifact root.
    fn name(&self, target: usize, file: usize) -> String {
        let directory = file % self.dirs_per_target.max(1);
        format!("gen/t{target}/d{directory}/f{file}.out")
    }

    /// The ranges of a target's files that make its sets.
    fn chunks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (files, step) = (self.files_per_target, self.files_per_set.max(1));
        (0..files)
            .step_by(step)
            .map(move |start| start..files.min(start + step))
    }
}

impl FilledShape {
    /// The measures.
    pub const fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Exec path and digest of every file.
    pub fn outputs(&self) -> impl Iterator<Item = (String, &Digest)> {
        let bin = BIN.join("/");
        self.digests.iter().enumerate().map(move |(index, digest)| {
            let per_target = self.shape.files_per_target;
            let name = self.shape.name(index / per_target, index % per_target);
            (format!("{bin}/{name}"), digest)
        })
    }

    /// An invocation id for a run of the build, the same for the same number.
    pub fn invocation_id(&self, run: u64) -> String {
        uuid(self.shape.seed, run)
    }

    /// The encoded events in order, made as they are asked for.
    pub fn events(
        &self,
        setting: &Setting,
        invocation_id: &str,
    ) -> impl Iterator<Item = Vec<u8>> + Send + use<> {
        let this = self.clone();
        let middle_setting = setting.clone();
        let middle = (0..self.shape.targets).flat_map(move |target| this.target(target, &middle_setting));
        opening(setting, invocation_id)
            .into_iter()
            .chain(middle)
            .chain(closing(0))
    }

    /// One target's events.
    fn target(&self, target: usize, setting: &Setting) -> Vec<Vec<u8>> {
        let label = Shape::label(target);
        let mut events = vec![configured(&label, "genrule rule")];
        let per_target = self.shape.files_per_target;
        let first_set = target * self.shape.chunks().count();
        let mut sets = Vec::new();
        for (number, chunk) in (first_set..).zip(self.shape.chunks()) {
            let files = chunk
                .map(|file| {
                    let digest = &self.digests[target * per_target + file];
                    setting.file(&self.shape.name(target, file), digest)
                })
                .collect();
            events.push(named_set(number, files, &[]));
            sets.push(set_id(number));
        }
        let default = OutputGroup {
            name: "default".to_owned(),
            file_sets: sets,
            ..OutputGroup::default()
        };
        let complete = TargetComplete {
            success: true,
            output_group: vec![default],
            ..TargetComplete::default()
        };
        events.push(completed(&label, "", complete));
        events
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashSet};

    use prost::Message as _;

    use super::*;
    use crate::{
        digest::DigestFunction,
        proto::build_event_stream::{BuildEvent, build_event::Payload},
    };

    #[test]
    fn the_stream_names_every_file_once_with_its_own_content() {
        let mut store = HashSet::new();
        let shape = Shape {
            targets: 3,
            files_per_target: 7,
            file_size: 50,
            dirs_per_target: 2,
            files_per_set: 3,
            seed: 9,
        };
        let filled = shape.fill(|bytes| {
            let digest = Digest::of(DigestFunction::Sha256, &bytes);
            store.insert(digest.clone());
            digest
        });
        assert_eq!(store.len(), shape.files());
        let setting = Setting {
            workspace: "/w".to_owned(),
            exec_root: "/e".to_owned(),
            remote_cache: "unix:/s".to_owned(),
            instance_name: String::new(),
        };
        let (mut named, mut ids) = (BTreeSet::new(), HashSet::new());
        for bytes in filled.events(&setting, "i") {
            let event = BuildEvent::decode(&*bytes).unwrap();
            if let Some(Payload::NamedSetOfFiles(set)) = event.payload {
                assert!(ids.insert(event.id), "set sent twice");
                assert!(set.files.len() <= 3);
                for file in set.files {
                    let digest: Digest = format!("{}/{}", file.digest, file.length).parse().unwrap();
                    assert!(named.insert((format!("{}/{}", file.path_prefix.join("/"), file.name), digest)));
                }
            }
        }
        let expected: BTreeSet<_> = filled
            .outputs()
            .map(|(path, digest)| (path, digest.clone()))
            .collect();
        assert_eq!(named, expected);
    }
}
