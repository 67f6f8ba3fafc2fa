//! A small build with a bit of everything that streams are made of.

use super::events::{
    BIN, Setting, closing, completed, configured, content, file_at, named_set, opening, set_id, uuid,
};
use crate::{
    digest::Digest,
    proto::build_event_stream::{File, OutputGroup, TargetComplete, file},
};

/// What a generated output is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GeneratedContent {
    /// A file, whose blob is in the cache.
    File(Digest),
    /// An unresolved symlink with this target.
    Symlink(String),
    /// An empty tree artifact.
    EmptyDirectory,
}

/// One output that the build's top-level targets ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GeneratedOutput {
    /// Exec path.
    pub path: String,
    /// What is there.
    pub content: GeneratedContent,
    /// Label of the target that it belongs to, or was asked for on.
    pub target: String,
}

/// A build of six targets and an aspect, run with `--remote_download_minimal`; one target fails.
///
/// | label | outputs |
/// |---|---|
/// | `//lib:lib` | an archive and headers, in nested sets; an aspect adds a report |
/// | `//app:app` | a large binary, a small file, and `//lib:lib`'s sets again |
/// | `//assets:tree` | a tree artifact with a subdirectory |
/// | `//assets:none` | an empty tree artifact |
/// | `//app:current` | an unresolved symlink |
/// | `//broken:broken` | fails; the group `logs` is complete, `default` is not |
#[derive(Debug, Clone)]
pub struct GeneratedBuild {
    setting: Setting,
    seed: u64,
    /// Grows with every build of the same outputs.
    number: u64,
    outputs: Vec<GeneratedOutput>,
    /// Events between opening and closing, the same in every build.
    middle: Vec<Vec<u8>>,
}

/// Collects events, files, and the outputs that they stand for.
struct Collector<'a> {
    setting: &'a Setting,
    put: &'a mut dyn FnMut(Vec<u8>) -> Digest,
    seed: u64,
    outputs: Vec<GeneratedOutput>,
    events: Vec<Vec<u8>>,
}

impl Collector<'_> {
    fn set(&mut self, number: usize, files: &[File], children: &[usize]) {
        self.events.push(named_set(number, files.to_vec(), children));
    }

    fn completed(&mut self, label: &str, aspect: &str, complete: TargetComplete) {
        self.events.push(completed(label, aspect, complete));
    }

    /// Two targets share the sets of `//lib:lib`; children come before their parents, each set once.
    fn library_and_app(&mut self) {
        let lib = "//lib:lib";
        let headers: Vec<_> = (0..4)
            .map(|n| self.file(lib, &format!("lib/include/part{n}.h"), 900 + 100 * n))
            .collect();
        let archive = [self.file(lib, "lib/liblib.a", 200_000)];
        self.set(0, &headers, &[]);
        self.set(1, &archive, &[0]);
        self.completed(lib, "", succeeded("default", &[1], &[&headers, &archive], None));

        let report = [self.file(lib, "lib/lint.report", 321)];
        self.set(2, &report, &[]);
        let complete = succeeded("lint_report", &[2], &[&report], None);
        self.completed(lib, "//tools:lint.bzl%lint", complete);

        let app = "//app:app";
        let own = [
            self.file(app, "app/app", 5_000_000),
            self.file(app, "app/version.txt", 0),
        ];
        self.set(3, &own, &[1]);
        let complete = succeeded("default", &[3], &[&headers, &archive, &own], None);
        self.completed(app, "", complete);
    }

    fn symlink(&mut self) {
        let current = "//app:current";
        let target = "app".to_owned();
        self.output(current, "app/current", GeneratedContent::Symlink(target.clone()));
        let link = [file_at(
            "app/current",
            Some(file::File::SymlinkTargetPath(target)),
        )];
        self.set(4, &link, &[]);
        self.completed(current, "", succeeded("default", &[4], &[&link], None));
    }

    fn trees(&mut self) {
        let tree = "//assets:tree";
        let leaves = ["images/a.png", "images/b.png", "index.html", "style.css"]
            .map(|leaf| self.file(tree, &format!("assets/tree.d/{leaf}"), 10_000));
        self.set(5, &leaves, &[]);
        self.completed(
            tree,
            "",
            succeeded("default", &[5], &[&leaves], Some("assets/tree.d")),
        );

        let none = "//assets:none";
        self.output(none, "assets/none.d", GeneratedContent::EmptyDirectory);
        self.completed(none, "", succeeded("default", &[], &[], Some("assets/none.d")));
    }

    fn broken(&mut self) {
        let broken = "//broken:broken";
        let log = self.file(broken, "broken/build.log", 1234);
        self.set(6, &[log], &[]);
        let complete = TargetComplete {
            output_group: vec![group("logs", &[6], false), group("default", &[], true)],
            ..TargetComplete::default()
        };
        self.completed(broken, "", complete);
    }

    fn output(&mut self, target: &str, name: &str, content: GeneratedContent) {
        self.outputs.push(GeneratedOutput {
            path: format!("{}/{name}", BIN.join("/")),
            content,
            target: target.to_owned(),
        });
    }

    /// A file of this many bytes, put into the cache.
    fn file(&mut self, target: &str, name: &str, size: usize) -> File {
        let seed = name.bytes().fold(self.seed, |seed, b| {
            seed.wrapping_mul(0x100_0000_01b3) ^ u64::from(b)
        });
        let digest = (self.put)(content(seed, size));
        self.output(target, name, GeneratedContent::File(digest.clone()));
        self.setting.file(name, &digest)
    }
}

fn group(name: &str, sets: &[usize], incomplete: bool) -> OutputGroup {
    OutputGroup {
        name: name.to_owned(),
        file_sets: sets.iter().copied().map(set_id).collect(),
        incomplete,
        ..OutputGroup::default()
    }
}

/// `files` are those of the groups' sets once more: Bazel 7 still fills the deprecated field by default.
fn succeeded(name: &str, sets: &[usize], files: &[&[File]], tree: Option<&str>) -> TargetComplete {
    TargetComplete {
        success: true,
        output_group: vec![group(name, sets, false)],
        important_output: files.concat(),
        directory_output: tree.map(|tree| file_at(tree, None)).into_iter().collect(),
        ..TargetComplete::default()
    }
}

impl GeneratedBuild {
    /// Makes the build, and hands each output's bytes to what puts them into a cache. The same seed gives the same outputs.
    pub fn new(mut put: impl FnMut(Vec<u8>) -> Digest, setting: Setting, seed: u64) -> Self {
        let events = [
            ("//lib:lib", "cc_library rule"),
            ("//app:app", "cc_binary rule"),
            ("//app:current", "link rule"),
            ("//assets:tree", "tree rule"),
            ("//assets:none", "tree rule"),
            ("//broken:broken", "genrule rule"),
        ]
        .map(|(label, kind)| configured(label, kind));
        let mut made = Collector {
            setting: &setting,
            put: &mut put,
            seed,
            outputs: Vec::new(),
            events: events.into(),
        };
        made.library_and_app();
        made.symlink();
        made.trees();
        made.broken();
        let Collector { outputs, events, .. } = made;
        Self {
            setting,
            seed,
            number: 1,
            outputs,
            middle: events,
        }
    }

    /// The same build run again: everything is a cache hit, the stream says all of it again under another invocation
    /// id.
    pub fn incremental(&self) -> Self {
        Self {
            number: self.number + 1,
            ..self.clone()
        }
    }

    /// The invocation id.
    pub fn invocation_id(&self) -> String {
        uuid(self.seed, self.number * 2)
    }

    /// The build request's id.
    pub fn build_id(&self) -> String {
        uuid(self.seed, self.number * 2 + 1)
    }

    /// What a downloader of top-level outputs must end up with, each path once.
    pub fn outputs(&self) -> &[GeneratedOutput] {
        &self.outputs
    }

    /// The encoded events in order.
    pub fn events(&self) -> impl Iterator<Item = Vec<u8>> + Send + use<> {
        let mut events = opening(&self.setting, &self.invocation_id());
        events.extend_from_slice(&self.middle);
        events.extend(closing(1));
        events.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use prost::Message as _;

    use super::*;
    use crate::{
        digest::DigestFunction,
        proto::build_event_stream::{BuildEvent, build_event::Payload, build_event_id::Id},
    };

    fn build() -> (HashSet<Digest>, GeneratedBuild) {
        let mut store = HashSet::new();
        let setting = Setting {
            workspace: "/w".to_owned(),
            exec_root: "/o/execroot/_main".to_owned(),
            remote_cache: "grpc://127.0.0.1:1".to_owned(),
            instance_name: "main".to_owned(),
        };
        let build = GeneratedBuild::new(
            |bytes| {
                let digest = Digest::of(DigestFunction::Sha256, &bytes);
                store.insert(digest.clone());
                digest
            },
            setting,
            7,
        );
        (store, build)
    }

    #[test]
    fn every_file_named_is_in_the_store_and_among_the_outputs() {
        let (store, build) = build();
        let mut sets = HashSet::new();
        let mut named = HashSet::new();
        let decoded: Vec<_> = build
            .events()
            .map(|bytes| BuildEvent::decode(&*bytes).unwrap())
            .collect();
        assert!(decoded.iter().rev().skip(1).all(|event| !event.last_message));
        assert!(decoded.last().unwrap().last_message);
        for event in decoded {
            if let (Some(Id::NamedSet(id)), Some(Payload::NamedSetOfFiles(set))) =
                (event.id.unwrap().id, event.payload)
            {
                assert!(
                    set.file_sets.iter().all(|child| sets.contains(&child.id)),
                    "child after parent"
                );
                assert!(sets.insert(id.id), "set sent twice");
                for file in set.files {
                    named.insert(format!("{}/{}", file.path_prefix.join("/"), file.name));
                    if let Some(file::File::Uri(uri)) = file.file {
                        let digest = format!("{}/{}", file.digest, file.length);
                        assert_eq!(uri, format!("bytestream://127.0.0.1:1/main/blobs/{digest}"));
                        assert!(store.contains(&digest.parse::<Digest>().unwrap()));
                    }
                }
            }
        }
        let outputs: HashSet<_> = build.outputs().iter().map(|o| o.path.clone()).collect();
        assert_eq!(outputs.len(), build.outputs().len());
        let missing: Vec<_> = outputs.difference(&named).collect();
        assert_eq!(missing, ["bazel-out/k8-fastbuild/bin/assets/none.d"]);
        assert!(named.is_subset(&outputs));
    }

    #[test]
    fn building_again_changes_the_ids_only() {
        let (_store, first) = build();
        let second = first.incremental();
        assert_ne!(first.invocation_id(), second.invocation_id());
        assert_ne!(first.build_id(), second.build_id());
        assert_eq!(first.outputs(), second.outputs());
        let (a, b): (Vec<_>, Vec<_>) = (first.events().collect(), second.events().collect());
        assert_ne!(a[0], b[0]);
        assert_eq!(a[1..], b[1..]);
        assert_eq!(first.invocation_id().len(), 36);
    }
}
