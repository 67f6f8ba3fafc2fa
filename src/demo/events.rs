//! Events as Bazel 7 encodes them, one constructor each.

use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message as _;
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

use crate::{
    digest::Digest,
    proto::build_event_stream::{
        BuildEvent, BuildEventId, BuildFinished, BuildStarted, ChunkList, CommandLine, CommandLineSection,
        Configuration, File, NamedSetOfFiles, Option as Flag, OptionList, TargetComplete, TargetConfigured,
        WorkspaceConfig,
        build_event::Payload,
        build_event_id::{
            BuildStartedId, ConfigurationId, Empty, Id, NamedSetOfFilesId, StructuredCommandLineId,
            TargetCompletedId, TargetConfiguredId,
        },
        build_finished::ExitCode,
        command_line_section::SectionType,
        file,
    },
};

/// Id of the one configuration. Bazel's are hashes as well.
const CONFIGURATION: &str = "5f3c9b0b8dbb8f1c6d8f2e6a3b1d0c4e7a9f5d2b";

/// Its directory below `bazel-out`.
const MNEMONIC: &str = "k8-fastbuild";

/// The artifact root's segments.
pub(super) const BIN: [&str; 3] = ["bazel-out", MNEMONIC, "bin"];

/// Where a generated build seems to have run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// The workspace's absolute path.
    pub workspace: String,
    /// The exec root's absolute path; outputs belong below its `bazel-out`.
    pub exec_root: String,
    /// Address of the remote cache, as `--remote_cache` takes it.
    pub remote_cache: String,
    /// Its instance name; empty for none.
    pub instance_name: String,
}

impl Setting {
    /// The name that Bazel puts into `bytestream://` URIs. For unix sockets it is a placeholder, as with Bazel.
    fn authority(&self) -> &str {
        self.remote_cache
            .split_once("://")
            .map_or("localhost", |(_, authority)| authority)
    }

    /// A file of the build, as events name it.
    pub(super) fn file(&self, name: &str, digest: &Digest) -> File {
        let instance = match self.instance_name.as_str() {
            "" => String::new(),
            name => format!("{name}/"),
        };
        let uri = format!("bytestream://{}/{instance}blobs/{digest}", self.authority());
        File {
            digest: digest.hash_hex(),
            length: i64::try_from(digest.size()).unwrap_or(i64::MAX),
            ..file_at(name, Some(file::File::Uri(uri)))
        }
    }
}

/// A file without digest: a symlink, or a tree artifact's root.
pub(super) fn file_at(name: &str, content: Option<file::File>) -> File {
    File {
        path_prefix: BIN.map(str::to_owned).to_vec(),
        name: name.to_owned(),
        file: content,
        ..File::default()
    }
}

/// An id.
pub(super) fn id(id: Id) -> BuildEventId {
    BuildEventId { id: Some(id) }
}

/// Id of the configuration, inside other ids.
fn configuration_id() -> ConfigurationId {
    ConfigurationId {
        id: CONFIGURATION.to_owned(),
    }
}

/// Id of a completed target, or with an aspect, of that.
pub(super) fn completed_id(label: &str, aspect: &str) -> BuildEventId {
    id(Id::TargetCompleted(TargetCompletedId {
        label: label.to_owned(),
        aspect: aspect.to_owned(),
        configuration: Some(configuration_id()),
    }))
}

/// Reference to a named set.
pub(super) fn set_id(number: usize) -> NamedSetOfFilesId {
    NamedSetOfFilesId {
        id: number.to_string(),
    }
}

/// An encoded event.
pub(super) fn event(event_id: BuildEventId, children: Vec<BuildEventId>, payload: Payload) -> Vec<u8> {
    let event = BuildEvent {
        id: Some(event_id),
        children,
        last_message: false,
        payload: Some(payload),
    };
    event.encode_to_vec()
}

/// A named set.
pub(super) fn named_set(number: usize, files: Vec<File>, children: &[usize]) -> Vec<u8> {
    let set = NamedSetOfFiles {
        files,
        file_sets: children.iter().copied().map(set_id).collect(),
    };
    event(
        id(Id::NamedSet(set_id(number))),
        Vec::new(),
        Payload::NamedSetOfFiles(set),
    )
}

/// A target was configured.
pub(super) fn configured(label: &str, kind: &str) -> Vec<u8> {
    let configured = Id::TargetConfigured(TargetConfiguredId {
        label: label.to_owned(),
        aspect: String::new(),
    });
    event(
        id(configured),
        vec![completed_id(label, "")],
        Payload::Configured(TargetConfigured {
            target_kind: kind.to_owned(),
        }),
    )
}

/// A target, or an aspect on it, was completed.
pub(super) fn completed(label: &str, aspect: &str, complete: TargetComplete) -> Vec<u8> {
    event(
        completed_id(label, aspect),
        Vec::new(),
        Payload::Completed(complete),
    )
}

/// What precedes the first target.
pub(super) fn opening(setting: &Setting, invocation_id: &str) -> Vec<Vec<u8>> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let command_line_id = |label: &str| {
        id(Id::StructuredCommandLine(StructuredCommandLineId {
            command_line_label: label.to_owned(),
        }))
    };
    let started = BuildStarted {
        uuid: invocation_id.to_owned(),
        start_time_millis: i64::try_from(now.as_millis()).unwrap_or(i64::MAX),
        build_tool_version: "7.7.1".to_owned(),
        command: "build".to_owned(),
        working_directory: setting.workspace.clone(),
        workspace_directory: setting.workspace.clone(),
        server_pid: std::process::id().into(),
    };
    let configuration = Configuration {
        mnemonic: MNEMONIC.to_owned(),
        platform_name: "k8".to_owned(),
        cpu: "k8".to_owned(),
    };
    let workspace = WorkspaceConfig {
        local_exec_root: setting.exec_root.clone(),
    };
    vec![
        event(
            id(Id::Started(BuildStartedId {})),
            vec![
                command_line_id("canonical"),
                id(Id::Workspace(Empty {})),
                id(Id::BuildFinished(Empty {})),
            ],
            Payload::Started(started),
        ),
        event(
            command_line_id("canonical"),
            Vec::new(),
            Payload::StructuredCommandLine(command_line(setting)),
        ),
        event(
            id(Id::Workspace(Empty {})),
            Vec::new(),
            Payload::WorkspaceInfo(workspace),
        ),
        event(
            id(Id::Configuration(configuration_id())),
            Vec::new(),
            Payload::Configuration(configuration),
        ),
    ]
}

fn command_line(setting: &Setting) -> CommandLine {
    let chunks = |label: &str, chunk: &str| CommandLineSection {
        section_label: label.to_owned(),
        section_type: Some(SectionType::ChunkList(ChunkList {
            chunk: vec![chunk.to_owned()],
        })),
    };
    let options = |label: &str, options: &[(&str, &str)]| CommandLineSection {
        section_label: label.to_owned(),
        section_type: Some(SectionType::OptionList(OptionList {
            option: options
                .iter()
                .map(|&(name, value)| Flag {
                    combined_form: format!("--{name}={value}"),
                    option_name: name.to_owned(),
                    option_value: value.to_owned(),
                })
                .collect(),
        })),
    };
    let mut command_options = vec![
        ("remote_cache", setting.remote_cache.as_str()),
        ("remote_download_outputs", "minimal"),
    ];
    if !setting.instance_name.is_empty() {
        command_options.push(("remote_instance_name", &setting.instance_name));
    }
    CommandLine {
        command_line_label: "canonical".to_owned(),
        sections: vec![
            chunks("executable", "bazel"),
            options("startup options", &[]),
            chunks("command", "build"),
            options("command options", &command_options),
            chunks("residual", "//..."),
        ],
    }
}

/// What follows the last target; the last of it is the stream's last message.
pub(super) fn closing(exit_code: i32) -> Vec<Vec<u8>> {
    let name = if exit_code == 0 {
        "SUCCESS"
    } else {
        "BUILD_FAILURE"
    };
    let finished = BuildFinished {
        finish_time_millis: 0,
        exit_code: Some(ExitCode {
            name: name.to_owned(),
            code: exit_code,
        }),
    };
    let tool_logs = BuildEvent {
        id: Some(id(Id::BuildToolLogs(Empty {}))),
        last_message: true,
        payload: Some(Payload::BuildToolLogs(Default::default())),
        ..BuildEvent::default()
    };
    vec![
        event(
            id(Id::BuildFinished(Empty {})),
            vec![id(Id::BuildToolLogs(Empty {}))],
            Payload::Finished(finished),
        ),
        tool_logs.encode_to_vec(),
    ]
}

/// Deterministic bytes that compress to about half, different for every seed.
pub(super) fn content(seed: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    SmallRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    for byte in &mut bytes {
        // Letters only: half a byte of entropy each, as in text.
        *byte = *byte & 0x0f | 0x60;
    }
    bytes
}

/// An id in UUID form, the same for the same numbers.
pub(super) fn uuid(seed: u64, number: u64) -> String {
    let bytes = content(seed.wrapping_mul(31).wrapping_add(number), 32);
    let digits: String = bytes
        .iter()
        .map(|b| char::from_digit(u32::from(b & 0x0f), 16).unwrap_or('0'))
        .collect();
    format!(
        "{}-{}-4{}-8{}-{}",
        &digits[..8],
        &digits[8..12],
        &digits[13..16],
        &digits[17..20],
        &digits[20..32]
    )
}
