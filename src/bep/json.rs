//! Events as proto3 JSON, one object a line, as in Bazel's `--build_event_json_file`.
//!
//! Only what [`decode`](super::decode) reads is mapped; everything else is skipped without being kept. The rules are
//! those of proto3 JSON: lowerCamel names, 64-bit integers as strings or numbers, bytes as base64, enums by name
//! or number, `null` for a default.

use bytes::Bytes;
use serde::{Deserialize, Deserializer, de};

use crate::{
    bep::{decode::from_proto, error::BepError, event::Framed},
    digest::DigestFunction,
    proto::build_event_stream::{
        self as proto, aborted::AbortReason, build_event::Payload, build_event_id as ids, build_event_id::Id,
        command_line_section::SectionType, convenience_symlink::Action as LinkAction, file::File as Oneof,
    },
};

/// Reads one line.
///
/// # Errors
/// When it is no JSON object, or a field that is read has another type.
pub fn decode_json(line: &str) -> Result<Framed, BepError> {
    decode_json_with(line.as_bytes(), None)
}

/// Reads one line of a build whose digest function is known: see [`Decoder`](super::Decoder).
///
/// # Errors
/// As [`decode_json`], and when the line is not UTF-8.
pub fn decode_json_with(line: &[u8], default_function: Option<DigestFunction>) -> Result<Framed, BepError> {
    // Derived structs would also be read from an array of their fields.
    if line.trim_ascii_start().first().is_some_and(|&b| b != b'{') {
        return Err(BepError::Json(de::Error::custom("it is no object")));
    }
    let event: BuildEvent = serde_json::from_slice(line)?;
    Ok(from_proto(event.into(), default_function))
}

/// Messages of which every field may be absent or `null`.
macro_rules! messages {
    ($(struct $name:ident { $($field:ident: $type:ty,)* })*) => {$(
        #[derive(Deserialize, Default)]
        #[serde(default, rename_all = "camelCase")]
        struct $name {
            $(#[serde(deserialize_with = "or_default")] $field: $type,)*
        }
    )*};
}

messages! {
    struct BuildEvent {
        id: EventId,
        children: Vec<EventId>,
        last_message: bool,
        progress: Option<Progress>,
        aborted: Option<Aborted>,
        started: Option<Started>,
        action: Option<Action>,
        completed: Option<Completed>,
        test_summary: Option<TestSummary>,
        test_result: Option<TestResult>,
        finished: Option<Finished>,
        named_set_of_files: Option<NamedSet>,
        configuration: Option<Configuration>,
        configured: Option<Configured>,
        structured_command_line: Option<CommandLine>,
        workspace_info: Option<WorkspaceInfo>,
        convenience_symlinks_identified: Option<ConvenienceSymlinks>,
        build_tool_logs: Option<BuildToolLogs>,
    }
    struct BuildToolLogs { log: Vec<File>, }
    // The ids that are read have their fields together in one struct: no two share a name for different things.
    struct EventId {
        target_completed: Option<IdFields>,
        action_completed: Option<IdFields>,
        test_summary: Option<IdFields>,
        test_result: Option<IdFields>,
        named_set: Option<IdFields>,
        configuration: Option<IdFields>,
        target_configured: Option<IdFields>,
        structured_command_line: Option<IdFields>,
    }
    struct IdFields {
        id: String,
        label: String,
        aspect: String,
        configuration: Option<SetId>,
        primary_output: String,
        run: Int64,
        shard: Int64,
        attempt: Int64,
        command_line_label: String,
    }
    struct SetId { id: String, }
    struct Progress { stderr: String, }
    struct TestSummary { shard_count: Int64, run_count: Int64, }
    struct Aborted { reason: Enum, description: String, }
    struct Started {
        uuid: String,
        start_time_millis: Int64,
        build_tool_version: String,
        command: String,
        workspace_directory: String,
        working_directory: String,
    }
    struct Action { success: bool, primary_output: Option<File>, }
    struct Completed {
        success: bool,
        output_group: Vec<OutputGroup>,
        important_output: Vec<File>,
        directory_output: Vec<File>,
    }
    struct OutputGroup { name: String, file_sets: Vec<SetId>, incomplete: bool, inline_files: Vec<File>, }
    struct TestResult { test_action_output: Vec<File>, }
    struct Finished { exit_code: Option<ExitCode>, }
    struct ExitCode { name: String, code: Int64, }
    struct NamedSet { files: Vec<File>, file_sets: Vec<SetId>, }
    struct File {
        path_prefix: Vec<String>,
        name: String,
        uri: Option<String>,
        contents: Option<Base64>,
        symlink_target_path: Option<String>,
        digest: String,
        length: Int64,
    }
    struct Configuration { mnemonic: String, }
    struct Configured { target_kind: String, }
    struct CommandLine { command_line_label: String, sections: Vec<Section>, }
    struct Section { section_label: String, chunk_list: Option<ChunkList>, option_list: Option<OptionList>, }
    struct ChunkList { chunk: Vec<String>, }
    struct OptionList { option: Vec<FlagOption>, }
    struct FlagOption { combined_form: String, option_name: String, option_value: String, }
    struct WorkspaceInfo { local_exec_root: String, }
    struct ConvenienceSymlinks { convenience_symlinks: Vec<ConvenienceSymlink>, }
    struct ConvenienceSymlink { path: String, action: Enum, target: String, }
}

fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(json: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(json)?.unwrap_or_default())
}

/// An integer of up to 64 bits, as number or string.
#[derive(Default, Clone, Copy)]
struct Int64(i64);

impl Int64 {
    /// For fields of 32 bits; what does not fit is no number that Bazel sends.
    fn narrow(self) -> i32 {
        i32::try_from(self.0).unwrap_or_default()
    }
}

impl<'de> Deserialize<'de> for Int64 {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Int64;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an integer of 64 bits, as number or string")
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Int64, E> {
                Ok(Int64(value))
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Int64, E> {
                i64::try_from(value).map(Int64).map_err(E::custom)
            }

            fn visit_f64<E: de::Error>(self, value: f64) -> Result<Int64, E> {
                // Exactly representable, so the conversion keeps the value: 2^53.
                if value.fract() == 0.0 && value.abs() <= 9_007_199_254_740_992.0 {
                    Ok(Int64(value as i64))
                } else {
                    Err(E::custom(format_args!("{value} is no integer")))
                }
            }

            fn visit_str<E: de::Error>(self, value: &str) -> Result<Int64, E> {
                value.parse().map(Int64).map_err(E::custom)
            }
        }
        json.deserialize_any(Visitor)
    }
}

/// An enum by name or number.
#[derive(Deserialize)]
#[serde(untagged)]
enum Enum {
    Name(String),
    Number(i32),
}

impl Default for Enum {
    fn default() -> Self {
        Self::Number(0)
    }
}

impl Enum {
    /// The number; 0, the unknown one, for a name that is not known here.
    fn number<T: Into<i32>>(self, named: impl Fn(&str) -> Option<T>) -> i32 {
        match self {
            Self::Number(number) => number,
            Self::Name(name) => named(&name).map_or(0, Into::into),
        }
    }
}

/// Bytes in base64: either alphabet, with or without padding.
struct Base64(Bytes);

impl<'de> Deserialize<'de> for Base64 {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        let text = String::deserialize(json)?;
        base64(&text)
            .map(|bytes| Self(bytes.into()))
            .ok_or_else(|| de::Error::custom("bytes are not base64"))
    }
}

fn base64(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end_matches('=').as_bytes();
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3 + 2);
    for quad in text.chunks(4) {
        let mut bits = 0_u32;
        for &symbol in quad {
            let six = match symbol {
                b'A'..=b'Z' => symbol - b'A',
                b'a'..=b'z' => symbol - b'a' + 26,
                b'0'..=b'9' => symbol - b'0' + 52,
                b'+' | b'-' => 62,
                b'/' | b'_' => 63,
                _ => return None,
            };
            bits = bits << 6 | u32::from(six);
        }
        let whole = match quad.len() {
            4 => 3,
            3 => 2,
            2 => 1,
            _ => return None,
        };
        // The first symbol's bits move to the top of the lower three bytes.
        bits <<= 6 * (4 - quad.len());
        bytes.extend_from_slice(&bits.to_be_bytes()[1..=whole]);
    }
    Some(bytes)
}

fn all<T, U: From<T>>(list: Vec<T>) -> Vec<U> {
    list.into_iter().map(U::from).collect()
}

impl From<BuildEvent> for proto::BuildEvent {
    fn from(event: BuildEvent) -> Self {
        let payload = None
            .or_else(|| {
                let progress = event.progress?;
                let stderr = progress.stderr.into_bytes().into();
                Some(Payload::Progress(proto::Progress { stderr }))
            })
            .or_else(|| event.aborted.map(|m| Payload::Aborted(m.into())))
            .or_else(|| event.started.map(|m| Payload::Started(m.into())))
            .or_else(|| event.action.map(|m| Payload::Action(m.into())))
            .or_else(|| event.completed.map(|m| Payload::Completed(m.into())))
            .or_else(|| {
                event.test_summary.map(|summary| {
                    Payload::TestSummary(proto::TestSummary {
                        shard_count: i32::try_from(summary.shard_count.0).unwrap_or(0),
                        run_count: i32::try_from(summary.run_count.0).unwrap_or(0),
                        ..proto::TestSummary::default()
                    })
                })
            })
            .or_else(|| event.test_result.map(|m| Payload::TestResult(m.into())))
            .or_else(|| event.finished.map(|m| Payload::Finished(m.into())))
            .or_else(|| {
                event
                    .named_set_of_files
                    .map(|m| Payload::NamedSetOfFiles(m.into()))
            })
            .or_else(|| event.configuration.map(|m| Payload::Configuration(m.into())))
            .or_else(|| event.configured.map(|m| Payload::Configured(m.into())))
            .or_else(|| {
                event
                    .structured_command_line
                    .map(|m| Payload::StructuredCommandLine(m.into()))
            })
            .or_else(|| event.workspace_info.map(|m| Payload::WorkspaceInfo(m.into())))
            .or_else(|| {
                event
                    .convenience_symlinks_identified
                    .map(|m| Payload::ConvenienceSymlinksIdentified(m.into()))
            })
            .or_else(|| {
                event.build_tool_logs.map(|logs| {
                    Payload::BuildToolLogs(proto::BuildToolLogs {
                        log: logs.log.into_iter().map(Into::into).collect(),
                    })
                })
            });
        Self {
            id: Some(proto::BuildEventId { id: event.id.into() }),
            children: event
                .children
                .into_iter()
                .map(|child| proto::BuildEventId { id: child.into() })
                .collect(),
            last_message: event.last_message,
            payload,
        }
    }
}

impl From<EventId> for Option<Id> {
    fn from(id: EventId) -> Self {
        let configured = |id: Option<SetId>| id.map(|id| ids::ConfigurationId { id: id.id });
        None.or_else(|| {
            id.target_completed.map(|id| {
                Id::TargetCompleted(ids::TargetCompletedId {
                    label: id.label,
                    aspect: id.aspect,
                    configuration: configured(id.configuration),
                })
            })
        })
        .or_else(|| {
            id.action_completed.map(|id| {
                Id::ActionCompleted(ids::ActionCompletedId {
                    primary_output: id.primary_output,
                    label: id.label,
                    configuration: configured(id.configuration),
                })
            })
        })
        .or_else(|| {
            id.test_summary.map(|id| {
                Id::TestSummary(ids::TestSummaryId {
                    label: id.label,
                    configuration: configured(id.configuration),
                })
            })
        })
        .or_else(|| {
            id.test_result.map(|id| {
                Id::TestResult(ids::TestResultId {
                    label: id.label,
                    run: id.run.narrow(),
                    shard: id.shard.narrow(),
                    attempt: id.attempt.narrow(),
                    configuration: configured(id.configuration),
                })
            })
        })
        .or_else(|| {
            id.named_set
                .map(|id| Id::NamedSet(ids::NamedSetOfFilesId { id: id.id }))
        })
        .or_else(|| {
            id.configuration
                .map(|id| Id::Configuration(ids::ConfigurationId { id: id.id }))
        })
        .or_else(|| {
            id.target_configured.map(|id| {
                Id::TargetConfigured(ids::TargetConfiguredId {
                    label: id.label,
                    aspect: id.aspect,
                })
            })
        })
        .or_else(|| {
            id.structured_command_line.map(|id| {
                Id::StructuredCommandLine(ids::StructuredCommandLineId {
                    command_line_label: id.command_line_label,
                })
            })
        })
    }
}

/// Conversions of messages whose fields are taken over or converted one by one.
macro_rules! convert {
    ($($from:ident => $to:ident: |$it:ident| { $($field:ident: $value:expr,)* })*) => {$(
        impl From<$from> for proto::$to {
            // Some of these messages have fields that are not read; others have none left for the default.
            #[allow(clippy::needless_update)]
            fn from($it: $from) -> Self {
                Self { $($field: $value,)* ..Self::default() }
            }
        }
    )*};
}

convert! {
    Aborted => Aborted: |m| {
        reason: m.reason.number(AbortReason::from_str_name),
        description: m.description,
    }
    Started => BuildStarted: |m| {
        uuid: m.uuid,
        start_time_millis: m.start_time_millis.0,
        build_tool_version: m.build_tool_version,
        command: m.command,
        workspace_directory: m.workspace_directory,
        working_directory: m.working_directory,
    }
    Action => ActionExecuted: |m| {
        success: m.success,
        primary_output: m.primary_output.map(Into::into),
    }
    Completed => TargetComplete: |m| {
        success: m.success,
        output_group: all(m.output_group),
        important_output: all(m.important_output),
        directory_output: all(m.directory_output),
    }
    OutputGroup => OutputGroup: |m| {
        name: m.name,
        file_sets: set_ids(m.file_sets),
        incomplete: m.incomplete,
        inline_files: all(m.inline_files),
    }
    TestResult => TestResult: |m| { test_action_output: all(m.test_action_output), }
    Finished => BuildFinished: |m| {
        exit_code: m.exit_code.map(|code| proto::build_finished::ExitCode {
            name: code.name,
            code: code.code.narrow(),
        }),
    }
    NamedSet => NamedSetOfFiles: |m| {
        files: all(m.files),
        file_sets: set_ids(m.file_sets),
    }
    File => File: |m| {
        path_prefix: m.path_prefix,
        name: m.name,
        file: None
            .or_else(|| m.uri.map(Oneof::Uri))
            .or_else(|| m.contents.map(|bytes| Oneof::Contents(bytes.0)))
            .or_else(|| m.symlink_target_path.map(Oneof::SymlinkTargetPath)),
        digest: m.digest,
        length: m.length.0,
    }
    Configuration => Configuration: |m| { mnemonic: m.mnemonic, }
    Configured => TargetConfigured: |m| { target_kind: m.target_kind, }
    CommandLine => CommandLine: |m| {
        command_line_label: m.command_line_label,
        sections: all(m.sections),
    }
    Section => CommandLineSection: |m| {
        section_label: m.section_label,
        section_type: None
            .or_else(|| m.option_list.map(|list| SectionType::OptionList(list.into())))
            .or_else(|| m.chunk_list.map(|list| SectionType::ChunkList(list.into()))),
    }
    ChunkList => ChunkList: |m| { chunk: m.chunk, }
    OptionList => OptionList: |m| { option: all(m.option), }
    FlagOption => Option: |m| {
        combined_form: m.combined_form,
        option_name: m.option_name,
        option_value: m.option_value,
    }
    WorkspaceInfo => WorkspaceConfig: |m| { local_exec_root: m.local_exec_root, }
    ConvenienceSymlinks => ConvenienceSymlinksIdentified: |m| {
        convenience_symlinks: all(m.convenience_symlinks),
    }
    ConvenienceSymlink => ConvenienceSymlink: |m| {
        path: m.path,
        action: m.action.number(LinkAction::from_str_name),
        target: m.target,
    }
}

fn set_ids(sets: Vec<SetId>) -> Vec<ids::NamedSetOfFilesId> {
    sets.into_iter()
        .map(|set| ids::NamedSetOfFilesId { id: set.id })
        .collect()
}

#[cfg(test)]
mod tests;
