//! Builds that follow each other in one exec root: files that change and change back, new directories, trees, links,
//! large files.

use std::collections::{BTreeMap, BTreeSet};

use outhaul::{
    demo::{GeneratedBuild, GeneratedContent, Setting},
    digest::{Digest, DigestFunction},
    proto::build_event_stream::{
        BuildEvent, BuildEventId, File, NamedSetOfFiles, OutputGroup, TargetComplete, TargetConfigured,
        build_event::Payload,
        build_event_id::{ConfigurationId, Id, NamedSetOfFilesId, TargetCompletedId, TargetConfiguredId},
        file,
    },
};
use outhaul_testkit::{Chance, cache::Store};
use prost::Message as _;

/// Files of a target in a directory that stays.
const LIVE: usize = 20;
/// Files of a target in a directory that is new with every build.
const NEW: usize = 12;
const TARGETS: usize = 6;
/// Numbers of sets that the generated part does not use.
const FIRST_SET: usize = 100;

/// What a path may hold: the hashes of all versions so far, and targets of links.
#[derive(Debug, Default)]
pub(crate) struct History {
    pub(crate) files: BTreeMap<String, BTreeSet<String>>,
    pub(crate) links: BTreeMap<String, String>,
}

/// One build.
#[derive(Debug, Clone)]
pub(crate) struct Build {
    pub(crate) invocation_id: String,
    pub(crate) build_id: String,
    pub(crate) events: Vec<Vec<u8>>,
    /// What must be there in the end.
    pub(crate) files: BTreeMap<String, Digest>,
    pub(crate) links: BTreeMap<String, String>,
    pub(crate) directories: BTreeSet<String>,
    /// The number of the event that calls for a path.
    pub(crate) called_for: BTreeMap<String, i64>,
}

/// Makes builds.
pub(crate) struct Builds {
    setting: Setting,
    store: Store,
    /// The version of each file of a live directory.
    versions: Vec<u64>,
    number: u64,
    world: u64,
    pub(crate) history: History,
}

impl Builds {
    pub(crate) fn new(store: &Store, setting: Setting, world: u64) -> Self {
        Self {
            setting,
            store: store.clone(),
            versions: vec![0; TARGETS * LIVE],
            number: 0,
            world,
            history: History::default(),
        }
    }

    /// The next build: some files are other than before.
    pub(crate) fn next(&mut self, dice: &mut Chance) -> Build {
        self.number += 1;
        for version in &mut self.versions {
            if dice.happens(0.4) {
                // Sometimes an earlier one again.
                *version = dice.below(self.number + 1);
            }
        }
        let generated = GeneratedBuild::new(
            |bytes| self.store.put(bytes),
            self.setting.clone(),
            1 + dice.below(3),
        );
        let mut build = Build {
            invocation_id: id(self.world, self.number * 2),
            build_id: id(self.world, self.number * 2 + 1),
            events: generated.events().collect(),
            files: BTreeMap::new(),
            links: BTreeMap::new(),
            directories: BTreeSet::new(),
            called_for: BTreeMap::new(),
        };
        for output in generated.outputs() {
            let path = output.path.clone();
            match &output.content {
                GeneratedContent::File(digest) => drop(build.files.insert(path, digest.clone())),
                GeneratedContent::Symlink(target) => drop(build.links.insert(path, target.clone())),
                GeneratedContent::EmptyDirectory => drop(build.directories.insert(path)),
            }
        }
        // Between the generated targets and the end.
        let end = build.events.split_off(build.events.len() - 2);
        for target in 0..TARGETS {
            let label = format!("//gen/t{target}:t{target}");
            build.events.push(configured(&label));
            let mut sets = Vec::new();
            for (kind, files) in [self.live(target), self.new_ones(target), self.large(target)]
                .into_iter()
                .enumerate()
            {
                let number = FIRST_SET + target * 3 + kind;
                let named: Vec<File> = files
                    .iter()
                    .map(|(name, digest)| self.file(name, digest))
                    .collect();
                build.events.push(named_set(number, named));
                sets.push(NamedSetOfFilesId {
                    id: number.to_string(),
                });
                for (name, digest) in files {
                    build
                        .files
                        .insert(format!("bazel-out/k8-fastbuild/bin/{name}"), digest);
                }
            }
            build.events.push(completed(&label, sets));
        }
        build.events.extend(end);
        rename(&mut build.events, &build.invocation_id);
        build.called_for = called_for(&build.events);
        for (path, digest) in &build.files {
            let hashes = self.history.files.entry(path.clone()).or_default();
            hashes.insert(digest.hash_hex());
        }
        self.history.links.extend(build.links.clone());
        build
    }

    /// The same build run again.
    pub(crate) fn again(&mut self, build: &Build) -> Build {
        self.number += 1;
        let mut again = build.clone();
        again.invocation_id = id(self.world, self.number * 2);
        again.build_id = id(self.world, self.number * 2 + 1);
        rename(&mut again.events, &again.invocation_id);
        again
    }

    fn live(&self, target: usize) -> Vec<(String, Digest)> {
        (0..LIVE)
            .map(|n| {
                let version = self.versions[target * LIVE + n];
                let seed = (target * 1000 + n) as u64 * 7919 + version;
                let size = 100 + Chance::new(seed).below(9000) as usize;
                let name = format!("gen/t{target}/live/d{}/f{n}.o", n % 2);
                (name, self.put(seed, size))
            })
            .collect()
    }

    fn new_ones(&self, target: usize) -> Vec<(String, Digest)> {
        (0..NEW)
            .map(|n| {
                let seed = self.number << 32 | (target * 1000 + n) as u64;
                let name = format!("gen/t{target}/new{}/f{n}.o", self.number);
                (name, self.put(seed, 200 + n * 300))
            })
            .collect()
    }

    /// A file that is streamed, or nearly.
    fn large(&self, target: usize) -> Vec<(String, Digest)> {
        let version = self.versions[target * LIVE];
        let size = match target {
            0 => 3 << 20,
            1 => (1 << 20) + 1,
            2 => 700_000,
            _ => 60_000,
        };
        let seed = 0xab_0000 + target as u64 * 64 + version;
        vec![(format!("gen/t{target}/live/large.bin"), self.put(seed, size))]
    }

    fn put(&self, seed: u64, size: usize) -> Digest {
        self.store.put(Chance::new(seed).bytes(size))
    }

    fn file(&self, name: &str, digest: &Digest) -> File {
        let authority = self
            .setting
            .remote_cache
            .split_once("://")
            .map_or("localhost", |(_, a)| a);
        File {
            path_prefix: ["bazel-out", "k8-fastbuild", "bin"].map(str::to_owned).to_vec(),
            name: name.to_owned(),
            digest: digest.hash_hex(),
            length: digest.size() as i64,
            file: Some(file::File::Uri(format!(
                "bytestream://{authority}/blobs/{digest}"
            ))),
        }
    }
}

impl Build {
    /// Whether a file holds what this build wants.
    pub(crate) fn wants(&self, path: &str, bytes: &[u8]) -> bool {
        self.files
            .get(path)
            .is_some_and(|digest| Digest::of(DigestFunction::Sha256, bytes) == *digest)
    }
}

fn id(world: u64, number: u64) -> String {
    let mut dice = Chance::new(world.wrapping_mul(1_000_003).wrapping_add(number));
    let (a, b) = (dice.number(), dice.number());
    format!(
        "{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}",
        a >> 32,
        a & 0xffff,
        (a >> 16) & 0xfff,
        b & 0xfff,
        b >> 16
    )
}

fn encode(id: Id, payload: Payload) -> Vec<u8> {
    let event = BuildEvent {
        id: Some(BuildEventId { id: Some(id) }),
        payload: Some(payload),
        ..BuildEvent::default()
    };
    event.encode_to_vec()
}

fn configured(label: &str) -> Vec<u8> {
    let id = TargetConfiguredId {
        label: label.to_owned(),
        aspect: String::new(),
    };
    let target_kind = "genrule rule".to_owned();
    encode(
        Id::TargetConfigured(id),
        Payload::Configured(TargetConfigured { target_kind }),
    )
}

fn named_set(number: usize, files: Vec<File>) -> Vec<u8> {
    let set = NamedSetOfFiles {
        files,
        file_sets: Vec::new(),
    };
    let id = NamedSetOfFilesId {
        id: number.to_string(),
    };
    encode(Id::NamedSet(id), Payload::NamedSetOfFiles(set))
}

fn completed(label: &str, file_sets: Vec<NamedSetOfFilesId>) -> Vec<u8> {
    let id = TargetCompletedId {
        label: label.to_owned(),
        aspect: String::new(),
        configuration: Some(ConfigurationId {
            id: "5f3c9b0b8dbb8f1c6d8f2e6a3b1d0c4e7a9f5d2b".to_owned(),
        }),
    };
    let complete = TargetComplete {
        success: true,
        output_group: vec![OutputGroup {
            name: "default".to_owned(),
            file_sets,
            ..OutputGroup::default()
        }],
        ..TargetComplete::default()
    };
    encode(Id::TargetCompleted(id), Payload::Completed(complete))
}

/// Puts the invocation's id where Bazel does.
fn rename(events: &mut [Vec<u8>], invocation_id: &str) {
    for bytes in events {
        let mut event = BuildEvent::decode(&**bytes).unwrap();
        if let Some(Payload::Started(started)) = &mut event.payload {
            invocation_id.clone_into(&mut started.uuid);
            *bytes = event.encode_to_vec();
        }
    }
}

/// Which event calls for which file: the first target that was completed and refers to it.
fn called_for(events: &[Vec<u8>]) -> BTreeMap<String, i64> {
    let mut sets: BTreeMap<String, NamedSetOfFiles> = BTreeMap::new();
    let mut found = BTreeMap::new();
    for (number, bytes) in (1..).zip(events) {
        let event = BuildEvent::decode(&**bytes).unwrap();
        match (event.id.and_then(|id| id.id), event.payload) {
            (Some(Id::NamedSet(id)), Some(Payload::NamedSetOfFiles(set))) => drop(sets.insert(id.id, set)),
            (_, Some(Payload::Completed(complete))) => {
                let mut open: Vec<String> = complete
                    .output_group
                    .iter()
                    .filter(|group| !group.incomplete)
                    .flat_map(|group| group.file_sets.iter().map(|set| set.id.clone()))
                    .collect();
                while let Some(set) = open.pop().and_then(|id| sets.get(&id)) {
                    open.extend(set.file_sets.iter().map(|child| child.id.clone()));
                    for file in &set.files {
                        let path = format!("{}/{}", file.path_prefix.join("/"), file.name);
                        found.entry(path).or_insert(number);
                    }
                }
            }
            _ => {}
        }
    }
    found
}
