//! Events as proto3 JSON, one object a line, as in Bazel's `--build_event_json_file`.
//!
//! Only what [`decode`](super::decode) reads is mapped; everything else is skipped without being kept. The rules are
//! those of proto3 JSON: lowerCamel names or those of the proto files, 64-bit integers as strings or numbers, bytes as
//! base64, enums by name or number, `null` for a default.

use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::general_purpose::{GeneralPurpose, NO_PAD},
};
use bytes::Bytes;
use serde::{Deserialize, Deserializer, de};
use serde_json::Value;

use crate::{
    bep::{decode::from_proto, error::BepError, event::StreamEvent},
    digest::DigestFunction,
    proto::build_event_stream::{
        self as proto, aborted::AbortReason, build_event::Payload, build_event_id as ids, build_event_id::Id,
        command_line_section::SectionType, convenience_symlink::Action as LinkAction, file::File as Oneof,
    },
};

/// Reads one line of a build whose digest function is known: see [`Decoder`](super::Decoder).
///
/// # Errors
/// When it is no JSON object, a field that is read has another type, or the line is not UTF-8.
pub(crate) fn decode_json(
    line: &[u8],
    default_function: Option<DigestFunction>,
) -> Result<StreamEvent, BepError> {
    // Derived structs would also be read from an array of their fields.
    if line.trim_ascii_start().first().is_some_and(|&b| b != b'{') {
        return Err(BepError::Json(de::Error::custom("expected a JSON object")));
    }
    // What is skipped may be no JSON that can be kept: then it is read as it stands.
    let renamed = || {
        let mut json = serde_json::from_slice(line).ok()?;
        to_camel_case(&mut json);
        serde_json::from_value(json).ok()
    };
    let event: BuildEvent = match has_proto_names(line).then(renamed).flatten() {
        Some(event) => event,
        None => serde_json::from_slice(line)?,
    };
    Ok(from_proto(event.convert(), default_function))
}

/// Whether a line may have fields with the names of the proto files, as converters write them that keep those.
fn has_proto_names(line: &[u8]) -> bool {
    let mut words = line.split(|byte| *byte == b'"').skip(1);
    let mut word = words.next();
    while let Some(name) = word {
        word = words.next();
        let is_key = word.is_some_and(|after| after.trim_ascii_start().first() == Some(&b':'));
        let is_in_words = |byte: &u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_');
        if is_key && name.contains(&b'_') && name.iter().all(is_in_words) {
            return true;
        }
    }
    false
}

/// Gives all fields their lowerCamel names. No deeper than the JSON reader goes.
fn to_camel_case(json: &mut Value) {
    match json {
        Value::Object(fields) => {
            let renamed = std::mem::take(fields).into_iter().map(|(name, mut value)| {
                to_camel_case(&mut value);
                let mut words = name.split('_');
                let mut camel = words.next().unwrap_or_default().to_owned();
                for word in words {
                    let mut letters = word.chars();
                    camel.extend(letters.next().map(|first| first.to_ascii_uppercase()));
                    camel.push_str(letters.as_str());
                }
                (camel, value)
            });
            *fields = renamed.collect();
        }
        Value::Array(items) => items.iter_mut().for_each(to_camel_case),
        _ => {}
    }
}

/// Messages of which every field may be absent or `null`.
macro_rules! structs {
    ($(struct $name:ident { $($field:ident: $type:ty,)* })*) => {$(
        #[derive(Deserialize, Default)]
        #[serde(default, rename_all = "camelCase")]
        struct $name {
            $(#[serde(deserialize_with = "or_default")] $field: $type,)*
        }
    )*};
}

/// The same for messages whose fields are converted one by one.
macro_rules! messages {
    ($(struct $name:ident => $message:ty { $($field:ident: $type:ty,)* })*) => {
        structs! { $(struct $name { $($field: $type,)* })* }
        $(impl Convert<$message> for $name {
            // Some of these messages have fields that are not read; others have none left for the default.
            #[allow(clippy::needless_update)]
            fn convert(self) -> $message {
                type Message = $message;
                Message { $($field: self.$field.convert(),)* ..Message::default() }
            }
        })*
    };
}

structs! {
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
    struct EventId {
        target_completed: Option<TargetCompletedId>,
        action_completed: Option<ActionCompletedId>,
        test_summary: Option<TestSummaryId>,
        test_result: Option<TestResultId>,
        named_set: Option<SetId>,
        configuration: Option<ConfigurationId>,
        target_configured: Option<TargetConfiguredId>,
        structured_command_line: Option<CommandLineId>,
    }
    struct Progress { stderr: String, }
    struct Aborted { reason: Enum, description: String, }
    struct File {
        path_prefix: Vec<String>,
        name: String,
        uri: Option<String>,
        contents: Option<Base64>,
        symlink_target_path: Option<String>,
        digest: String,
        length: Int64,
    }
    struct TestResult { test_action_output: Vec<File>, status: Enum, }
    struct Section { section_label: String, chunk_list: Option<ChunkList>, option_list: Option<OptionList>, }
    struct ConvenienceSymlink { path: String, action: Enum, target: String, }
}

messages! {
    struct TargetCompletedId => ids::TargetCompletedId {
        label: String,
        aspect: String,
        configuration: Option<ConfigurationId>,
    }
    struct ActionCompletedId => ids::ActionCompletedId {
        primary_output: String,
        label: String,
        configuration: Option<ConfigurationId>,
    }
    struct TestSummaryId => ids::TestSummaryId { label: String, configuration: Option<ConfigurationId>, }
    struct TestResultId => ids::TestResultId {
        label: String,
        run: Int64,
        shard: Int64,
        attempt: Int64,
        configuration: Option<ConfigurationId>,
    }
    struct SetId => ids::NamedSetOfFilesId { id: String, }
    struct ConfigurationId => ids::ConfigurationId { id: String, }
    struct TargetConfiguredId => ids::TargetConfiguredId { label: String, aspect: String, }
    struct CommandLineId => ids::StructuredCommandLineId { command_line_label: String, }
    struct Started => proto::BuildStarted {
        uuid: String,
        start_time_millis: Int64,
        build_tool_version: String,
        command: String,
        workspace_directory: String,
        working_directory: String,
    }
    struct Action => proto::ActionExecuted { success: bool, primary_output: Option<File>, }
    struct Completed => proto::TargetComplete {
        success: bool,
        output_group: Vec<OutputGroup>,
        important_output: Vec<File>,
        directory_output: Vec<File>,
    }
    struct OutputGroup => proto::OutputGroup {
        name: String,
        file_sets: Vec<SetId>,
        incomplete: bool,
        inline_files: Vec<File>,
    }
    struct TestSummary => proto::TestSummary { shard_count: Int64, run_count: Int64, }
    struct Finished => proto::BuildFinished { exit_code: Option<ExitCode>, }
    struct ExitCode => proto::build_finished::ExitCode { name: String, code: Int64, }
    struct NamedSet => proto::NamedSetOfFiles { files: Vec<File>, file_sets: Vec<SetId>, }
    struct Configuration => proto::Configuration { mnemonic: String, }
    struct Configured => proto::TargetConfigured { target_kind: String, }
    struct CommandLine => proto::CommandLine { command_line_label: String, sections: Vec<Section>, }
    struct ChunkList => proto::ChunkList { chunk: Vec<String>, }
    struct OptionList => proto::OptionList { option: Vec<FlagOption>, }
    struct FlagOption => proto::Option { combined_form: String, option_name: String, option_value: String, }
    struct WorkspaceInfo => proto::WorkspaceConfig { local_exec_root: String, }
    struct ConvenienceSymlinks => proto::ConvenienceSymlinksIdentified {
        convenience_symlinks: Vec<ConvenienceSymlink>,
    }
    struct BuildToolLogs => proto::BuildToolLogs { log: Vec<File>, }
}

fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(json: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(json)?.unwrap_or_default())
}

/// An integer of up to 64 bits, as number or string.
#[derive(Default, Clone, Copy)]
struct Int64(i64);

impl<'de> Deserialize<'de> for Int64 {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Int64;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a 64-bit integer, as a number or a string")
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
                    Err(E::custom(format_args!("{value} is not an integer")))
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
    const LENIENT: GeneralPurpose =
        GeneralPurpose::new(&STANDARD, NO_PAD.with_decode_allow_trailing_bits(true));
    let text = text.trim_end_matches('=').replace('-', "+").replace('_', "/");
    LENIENT.decode(text).ok()
}

/// What a value becomes in a message.
trait Convert<T> {
    fn convert(self) -> T;
}

impl Convert<Self> for String {
    fn convert(self) -> Self {
        self
    }
}

impl Convert<Self> for bool {
    fn convert(self) -> Self {
        self
    }
}

impl Convert<i64> for Int64 {
    fn convert(self) -> i64 {
        self.0
    }
}

impl Convert<i32> for Int64 {
    /// What does not fit is not a number that Bazel sends.
    fn convert(self) -> i32 {
        i32::try_from(self.0).unwrap_or_default()
    }
}

impl<T: Convert<U>, U> Convert<Vec<U>> for Vec<T> {
    fn convert(self) -> Vec<U> {
        self.into_iter().map(T::convert).collect()
    }
}

impl<T: Convert<U>, U> Convert<Option<U>> for Option<T> {
    fn convert(self) -> Option<U> {
        self.map(T::convert)
    }
}

/// The field that is there, of those of a oneof.
macro_rules! one_of {
    ($message:ident: $($field:ident => $variant:path,)*) => {
        None$(.or_else(|| $message.$field.map(|it| $variant(it.convert()))))*
    };
}

impl Convert<proto::BuildEvent> for BuildEvent {
    fn convert(self) -> proto::BuildEvent {
        proto::BuildEvent {
            id: Some(self.id.convert()),
            children: self.children.convert(),
            last_message: self.last_message,
            payload: one_of! { self:
                progress => Payload::Progress,
                aborted => Payload::Aborted,
                started => Payload::Started,
                action => Payload::Action,
                completed => Payload::Completed,
                test_summary => Payload::TestSummary,
                test_result => Payload::TestResult,
                finished => Payload::Finished,
                named_set_of_files => Payload::NamedSetOfFiles,
                configuration => Payload::Configuration,
                configured => Payload::Configured,
                structured_command_line => Payload::StructuredCommandLine,
                workspace_info => Payload::WorkspaceInfo,
                convenience_symlinks_identified => Payload::ConvenienceSymlinksIdentified,
                build_tool_logs => Payload::BuildToolLogs,
            },
        }
    }
}

impl Convert<proto::BuildEventId> for EventId {
    fn convert(self) -> proto::BuildEventId {
        let id = one_of! { self:
            target_completed => Id::TargetCompleted,
            action_completed => Id::ActionCompleted,
            test_summary => Id::TestSummary,
            test_result => Id::TestResult,
            named_set => Id::NamedSet,
            configuration => Id::Configuration,
            target_configured => Id::TargetConfigured,
            structured_command_line => Id::StructuredCommandLine,
        };
        proto::BuildEventId { id }
    }
}

impl Convert<proto::Progress> for Progress {
    fn convert(self) -> proto::Progress {
        proto::Progress {
            stderr: self.stderr.into_bytes().into(),
        }
    }
}

impl Convert<proto::TestResult> for TestResult {
    fn convert(self) -> proto::TestResult {
        proto::TestResult {
            test_action_output: self.test_action_output.convert(),
            status: self.status.number(proto::TestStatus::from_str_name),
            ..proto::TestResult::default()
        }
    }
}

impl Convert<proto::Aborted> for Aborted {
    fn convert(self) -> proto::Aborted {
        proto::Aborted {
            reason: self.reason.number(AbortReason::from_str_name),
            description: self.description,
        }
    }
}

impl Convert<proto::File> for File {
    fn convert(self) -> proto::File {
        proto::File {
            path_prefix: self.path_prefix,
            name: self.name,
            file: None
                .or_else(|| self.uri.map(Oneof::Uri))
                .or_else(|| self.contents.map(|bytes| Oneof::Contents(bytes.0)))
                .or_else(|| self.symlink_target_path.map(Oneof::SymlinkTargetPath)),
            digest: self.digest,
            length: self.length.0,
        }
    }
}

impl Convert<proto::CommandLineSection> for Section {
    fn convert(self) -> proto::CommandLineSection {
        proto::CommandLineSection {
            section_label: self.section_label,
            section_type: one_of! { self:
                option_list => SectionType::OptionList,
                chunk_list => SectionType::ChunkList,
            },
        }
    }
}

impl Convert<proto::ConvenienceSymlink> for ConvenienceSymlink {
    fn convert(self) -> proto::ConvenienceSymlink {
        proto::ConvenienceSymlink {
            path: self.path,
            action: self.action.number(LinkAction::from_str_name),
            target: self.target,
        }
    }
}

#[cfg(test)]
mod tests;
