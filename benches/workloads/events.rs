//! A workload's event stream, as Bazel 7 would send it; encoded beforehand, so that making it is not measured.

use std::sync::Arc;

use outhaul::{
    demo::{Setting, Shape},
    digest::{Digest, DigestFunction},
    proto::build_event_stream::{
        BuildEvent, BuildEventId, File, NamedSetOfFiles, OutputGroup, TargetComplete, TargetConfigured,
        build_event::Payload,
        build_event_id::{ConfigurationId, Id, NamedSetOfFilesId, TargetCompletedId, TargetConfiguredId},
        file,
    },
};
use prost::Message as _;

use crate::tree::{BIN, Folder, Leaf, Tree};

/// Id of the configuration that the demo's streams name.
const CONFIGURATION: &str = "5f3c9b0b8dbb8f1c6d8f2e6a3b1d0c4e7a9f5d2b";

/// A build's events without those that differ from run to run.
#[derive(Debug, Clone)]
pub(crate) struct Stream {
    setting: Setting,
    /// Between the opening and the closing.
    middle: Arc<Vec<Vec<u8>>>,
}

impl Stream {
    pub(crate) fn new(tree: &Tree, setting: Setting) -> Self {
        let mut authority = setting
            .remote_cache
            .split_once("://")
            .map_or("localhost", |(_, authority)| authority)
            .to_owned();
        if !setting.instance_name.is_empty() {
            authority = format!("{authority}/{}", setting.instance_name);
        }
        // By Bazel's events, what a cache without gRPC has is where the outputs would be.
        let place = match setting.remote_cache.starts_with("grpc") {
            true => Place::Cache(format!("bytestream://{authority}/blobs")),
            false => Place::Local(format!("file://{}/{BIN}", setting.exec_root)),
        };
        let middle = tree
            .folders
            .iter()
            .enumerate()
            .flat_map(|(number, folder)| target(number, folder, &place))
            .collect();
        Self {
            middle: Arc::new(middle),
            setting,
        }
    }

    /// All events of the build's run of this number, and its invocation id.
    pub(crate) fn run(&self, number: u64) -> (String, impl Iterator<Item = Vec<u8>> + Send + use<>) {
        // A build of nothing: what comes before the first target and after the last.
        let nothing = Shape {
            targets: 0,
            ..Shape::default()
        };
        let nothing = nothing.fill(|bytes| Digest::of(DigestFunction::Sha256, &bytes));
        let id = nothing.invocation_id(number);
        let mut opening: Vec<_> = nothing.events(&self.setting, &id).collect();
        let closing = opening.split_off(opening.len().saturating_sub(2));
        let middle = self.middle.clone();
        let events = opening
            .into_iter()
            .chain((0..middle.len()).filter_map(move |n| middle.get(n).cloned()))
            .chain(closing);
        (id, events)
    }
}

/// What the URIs of files begin with.
enum Place {
    Cache(String),
    Local(String),
}

fn target(number: usize, folder: &Folder, place: &Place) -> [Vec<u8>; 3] {
    let label = format!("//{0}:{0}", folder.path);
    let completed_id = Id::TargetCompleted(TargetCompletedId {
        label: label.clone(),
        aspect: String::new(),
        configuration: Some(ConfigurationId {
            id: CONFIGURATION.to_owned(),
        }),
    });
    let configured_id = Id::TargetConfigured(TargetConfiguredId {
        label,
        aspect: String::new(),
    });
    let configured = Payload::Configured(TargetConfigured {
        target_kind: "genrule rule".to_owned(),
    });
    let set = NamedSetOfFiles {
        files: folder
            .files
            .iter()
            .map(|file| named(folder, file, place))
            .collect(),
        file_sets: folder.children.iter().copied().map(set_id).collect(),
    };
    let default = OutputGroup {
        name: "default".to_owned(),
        file_sets: vec![set_id(number)],
        ..OutputGroup::default()
    };
    let complete = TargetComplete {
        success: true,
        output_group: vec![default],
        ..TargetComplete::default()
    };
    [
        event(configured_id, vec![completed_id.clone()], configured),
        event(
            Id::NamedSet(set_id(number)),
            vec![],
            Payload::NamedSetOfFiles(set),
        ),
        event(completed_id, vec![], Payload::Completed(complete)),
    ]
}

fn named(folder: &Folder, file: &Leaf, place: &Place) -> File {
    let uri = match place {
        Place::Cache(prefix) => format!("{prefix}/{}", file.digest),
        Place::Local(prefix) => format!("{prefix}/{}/{}", folder.path, file.name),
    };
    File {
        path_prefix: BIN.split('/').map(str::to_owned).collect(),
        name: format!("{}/{}", folder.path, file.name),
        digest: file.digest.hash_hex(),
        length: i64::try_from(file.digest.size()).unwrap_or(i64::MAX),
        file: Some(file::File::Uri(uri)),
    }
}

fn set_id(number: usize) -> NamedSetOfFilesId {
    NamedSetOfFilesId {
        id: number.to_string(),
    }
}

fn event(id: Id, children: Vec<Id>, payload: Payload) -> Vec<u8> {
    let id_of = |id| BuildEventId { id: Some(id) };
    BuildEvent {
        id: Some(id_of(id)),
        children: children.into_iter().map(id_of).collect(),
        last_message: false,
        payload: Some(payload),
    }
    .encode_to_vec()
}
