//! Wire messages to [`Event`]s: what is tolerated and defaulted is decided here, once for every source.
//!
//! An event that can be read at all becomes an [`Event`]; a file whose digest makes no sense becomes a file of
//! unknown content, not an error, so that one odd output does not cost a target its others.

mod double_encoding;
mod sets;

use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;
use tracing::debug;

use self::double_encoding::{fix_double_encoding, fix_files};
use crate::{
    bep::{
        error::BepError,
        event::{
            Action, CommandLine, Completed, Content, ConvenienceSymlink, Event, File, NamedSet, OutputGroup,
            Started, StreamEvent, TargetId, TestResult,
        },
        json,
        uri::BytestreamUri,
    },
    digest::{Digest, DigestFunction},
    proto::build_event_stream::{
        self as proto, TestStatus,
        aborted::AbortReason,
        build_event::Payload,
        build_event_id::{ConfigurationId, Id, TestResultId},
        command_line_section::SectionType,
        convenience_symlink::Action as LinkAction,
        file::File as Oneof,
    },
};

/// Reads one `build_event_stream.BuildEvent` message of a build whose digest function may be known, as by its
/// `--digest_function`. It is what distinguishes BLAKE3 from SHA-256 when a file has no `bytestream://` URI; a function that a URI
/// names goes first.
///
/// # Errors
/// When the bytes are no such message. Unknown fields and payloads are fine; a string that is not UTF-8 is not.
pub(crate) fn decode_with(
    bytes: &Bytes,
    default_function: Option<DigestFunction>,
) -> Result<StreamEvent, BepError> {
    let reader = Reader {
        default_function,
        message: bytes.len(),
    };
    // Nearly all of a large stream is sets of files.
    if let Some(framed) = sets::decode(bytes, reader) {
        return Ok(framed);
    }
    Ok(reader.framed(proto::BuildEvent::decode(bytes.clone())?))
}

/// Reads the events of one stream and learns the build's digest function from its command line on the way.
///
/// Bazel sends its command lines before the first file.
#[derive(Debug, Clone, Default)]
pub struct Decoder {
    function: Option<DigestFunction>,
}

impl Decoder {
    /// A decoder for a stream whose digest function may be known already.
    pub const fn new(function: Option<DigestFunction>) -> Self {
        Self { function }
    }

    /// The build's digest function, as far as it is known.
    pub const fn function(&self) -> Option<DigestFunction> {
        self.function
    }

    /// Reads one `BuildEvent` message.
    ///
    /// # Errors
    /// When the bytes are no such message. Unknown fields and payloads are fine; a string that is not UTF-8 is not.
    pub fn decode(&mut self, bytes: &Bytes) -> Result<StreamEvent, BepError> {
        Ok(self.learn(decode_with(bytes, self.function)?))
    }

    /// Reads one line of a JSON file.
    ///
    /// # Errors
    /// As [`json::decode_json`].
    pub(crate) fn decode_json(&mut self, line: &[u8]) -> Result<StreamEvent, BepError> {
        Ok(self.learn(json::decode_json(line, self.function)?))
    }

    fn learn(&mut self, framed: StreamEvent) -> StreamEvent {
        if let Event::CommandLine(line) = &framed.event
            && let Some(Ok(function)) = line.last("digest_function").map(str::parse)
        {
            self.function = Some(function);
        }
        framed
    }
}

/// Turns a message into the event it reports.
pub fn from_proto(message: proto::BuildEvent, default_function: Option<DigestFunction>) -> StreamEvent {
    Reader {
        default_function,
        message: 0,
    }
    .framed(message)
}

/// What Bazel calls the combined coverage report among its logs (`BazelCoverageReportModule`).
const COMBINED_REPORT: &str = "coverage_report.lcov";

/// Reads the messages of one build.
#[derive(Clone, Copy)]
struct Reader {
    default_function: Option<DigestFunction>,
    /// Bytes of the message, if contents of files lie in it.
    message: usize,
}

/// Contents of this many bytes stay where they are, if they are half of their message or more. Others are copied: they
/// would keep the message, and what came with it.
const LARGE: usize = 4 << 20;

/// How much of a path that came without a prefix is the root that outputs lie below, `bazel-out/CONFIGURATION/bin`. A tool
/// that writes events of its own may name outputs by whole paths, and no source file is called like that.
fn own_prefix(path: &str) -> usize {
    if !path.starts_with("bazel-out/") {
        return 0;
    }
    let mut slashes = path.match_indices('/').map(|(at, _)| at);
    let first = slashes.next().unwrap_or(0);
    slashes.nth(1).unwrap_or(first)
}

impl Reader {
    fn framed(self, message: proto::BuildEvent) -> StreamEvent {
        let id = message.id.and_then(|id| id.id);
        let event = message.payload.and_then(|payload| self.event(id, payload));
        let mut event = event.unwrap_or(Event::Other);
        if let Event::Configured {
            label, completions, ..
        } = &mut event
        {
            let announced = message.children.into_iter().filter_map(|child| match child.id {
                Some(Id::TargetCompleted(id)) => Some(target_id(id)),
                _ => None,
            });
            completions.extend(announced.filter(|target| target.label == *label && target.aspect.is_empty()));
        }
        StreamEvent {
            event,
            last: message.last_message,
        }
    }

    /// `None` for what says nothing about outputs, and for a payload without the id it needs.
    fn event(self, id: Option<Id>, payload: Payload) -> Option<Event> {
        Some(match (payload, id) {
            (Payload::Started(started), _) => Event::Started(Started {
                invocation_id: started.uuid,
                command: started.command,
                build_tool_version: started.build_tool_version,
                workspace: fix_double_encoding(started.workspace_directory),
                working_directory: fix_double_encoding(started.working_directory),
                started_ms: started.start_time_millis,
            }),
            (Payload::WorkspaceInfo(info), _) => Event::ExecRoot(info.local_exec_root),
            (Payload::StructuredCommandLine(line), id) => Event::CommandLine(command_line(id, line)),
            (Payload::Configuration(configuration), Some(Id::Configuration(id))) => Event::Configuration {
                id: id.id,
                mnemonic: configuration.mnemonic,
            },
            // The same event for an aspect has no kind and would hide the target's.
            (Payload::Configured(configured), Some(Id::TargetConfigured(id))) if id.aspect.is_empty() => {
                Event::Configured {
                    label: fix_double_encoding(id.label),
                    kind: configured.target_kind,
                    completions: Vec::new(),
                }
            }
            (Payload::NamedSetOfFiles(set), Some(Id::NamedSet(id))) => {
                Event::NamedSet(self.named_set(id.id, set))
            }
            (Payload::Completed(completed), Some(Id::TargetCompleted(id))) => {
                Event::Completed(self.completed(target_id(id), completed))
            }
            (Payload::TestResult(result), Some(Id::TestResult(id))) => {
                Event::TestResult(self.test_result(id, result))
            }
            (Payload::Progress(progress), _) => match unreadable(&progress.stderr) {
                files if files.is_empty() => Event::Other,
                files => Event::Unreadable(files),
            },
            (Payload::TestSummary(summary), Some(Id::TestSummary(id))) => Event::TestSummary {
                label: fix_double_encoding(id.label),
                configuration: configuration_id(id.configuration),
                shard_count: u32::try_from(summary.shard_count).unwrap_or(0),
                run_count: u32::try_from(summary.run_count).unwrap_or(0),
            },
            (Payload::Action(action), Some(Id::ActionCompleted(id))) => Event::Action(Action {
                content: action.primary_output.map(|file| self.file(file).content),
                primary_output: fix_double_encoding(id.primary_output),
                label: fix_double_encoding(id.label),
                success: action.success,
            }),
            (Payload::Aborted(aborted), id) => self::aborted(id, aborted),
            (Payload::ConvenienceSymlinksIdentified(links), _) => {
                Event::ConvenienceSymlinks(links.convenience_symlinks.into_iter().filter_map(link).collect())
            }
            (Payload::BuildToolLogs(logs), _) => {
                let report = logs.log.into_iter().find(|log| log.name == COMBINED_REPORT)?;
                Event::CombinedReport(self.file(report))
            }
            (Payload::Finished(finished), _) => {
                let code = finished.exit_code.unwrap_or_default();
                Event::Finished {
                    exit_code: code.code,
                    name: code.name,
                    ended_ms: finished.finish_time_millis,
                }
            }
            _ => return None,
        })
    }

    fn named_set(self, id: String, set: proto::NamedSetOfFiles) -> NamedSet {
        NamedSet {
            id,
            authority: set.files.iter().find_map(|file| match &file.file {
                Some(Oneof::Uri(uri)) => authority(uri),
                _ => None,
            }),
            files: self.files(set.files),
            children: set.file_sets.into_iter().map(|set| set.id).collect(),
        }
    }

    fn test_result(self, id: TestResultId, result: proto::TestResult) -> TestResult {
        TestResult {
            label: fix_double_encoding(id.label),
            configuration: configuration_id(id.configuration),
            run: u32::try_from(id.run).unwrap_or(0),
            shard: u32::try_from(id.shard).unwrap_or(0),
            attempt: u32::try_from(id.attempt).unwrap_or(0),
            passed: result.status() == TestStatus::Passed,
            files: self.files(fix_files(result.test_action_output)),
        }
    }

    fn completed(self, target: TargetId, completed: proto::TargetComplete) -> Completed {
        let mut groups: Vec<OutputGroup> = completed
            .output_group
            .into_iter()
            .map(|group| OutputGroup {
                name: group.name,
                sets: group.file_sets.into_iter().map(|set| set.id).collect(),
                files: self.files(fix_files(group.inline_files)),
                incomplete: group.incomplete,
            })
            .collect();
        // `--legacy_important_outputs` repeats the files of every group, whatever its name. Beside groups they
        // would be listed under a group that was not requested.
        if groups.is_empty() && !completed.important_output.is_empty() {
            groups.push(OutputGroup {
                name: "default".to_owned(),
                sets: Vec::new(),
                files: self.files(fix_files(completed.important_output)),
                incomplete: !completed.success,
            });
        }
        Completed {
            target,
            success: completed.success,
            groups,
            directories: self.files(fix_files(completed.directory_output)),
        }
    }

    fn files(self, files: Vec<proto::File>) -> Vec<File> {
        files.into_iter().map(|file| self.file(file)).collect()
    }

    fn file(self, file: proto::File) -> File {
        let mut path = file.path_prefix.join("/");
        let prefix_len = path.len();
        if prefix_len == 0 {
            path = file.name;
        } else {
            path.reserve_exact(file.name.len() + 1);
            path.push('/');
            path.push_str(&file.name);
        }
        let is = match &file.file {
            Some(Oneof::SymlinkTargetPath(target)) => Is::Symlink(target),
            Some(Oneof::Contents(bytes)) => Is::Inline(bytes.clone()),
            Some(Oneof::Uri(uri)) => Is::At(uri),
            None => Is::Nowhere,
        };
        self.file_of(&path, prefix_len, is, &file.digest, file.length)
    }

    /// A file of what its message says.
    fn file_of(self, path: &str, prefix_len: usize, is: Is<'_>, digest: &str, length: i64) -> File {
        let prefix_len = if prefix_len == 0 {
            own_prefix(path)
        } else {
            prefix_len
        };
        let (content, uri) = match is {
            Is::Symlink(target) => (Content::Symlink(target.to_owned()), ""),
            Is::Inline(bytes) if self.message == 0 || bytes.len() >= LARGE.max(self.message / 2) => {
                (Content::Inline(bytes), "")
            }
            Is::Inline(bytes) => (Content::Inline(Bytes::copy_from_slice(&bytes)), ""),
            Is::At(uri) => (self.blob(path, digest, length, uri), uri),
            Is::Nowhere => (self.blob(path, digest, length, ""), ""),
        };
        let uri = (content == Content::Unknown && !uri.is_empty()).then(|| uri.into());
        File {
            path: Arc::from(path),
            prefix_len,
            content,
            uri,
        }
    }

    /// The blob that the digest field and the URI agree upon, or that the one which is there names.
    fn blob(self, path: &str, hash: &str, length: i64, uri: &str) -> Content {
        // Both say the same, letter by letter, as nearly always.
        if let Ok(size) = u64::try_from(length)
            && names(uri, hash, size)
            && let Some(digest) = digest_of_field(hash, size, self.default_function)
        {
            return Content::Blob(digest);
        }
        let named = if BytestreamUri::is_one(uri) {
            BytestreamUri::parse_with(uri, self.default_function)
                .inspect_err(|error| debug!(path, %error, "uri names no blob"))
                .ok()
        } else {
            None
        };
        if hash.is_empty() {
            return named.map_or(Content::Unknown, |uri| Content::Blob(uri.digest));
        }
        let digest = u64::try_from(length)
            .ok()
            .and_then(|size| digest_of_field(hash, size, self.default_function));
        let digest = match (digest, named.map(|uri| uri.digest)) {
            (Some(field), None) => Some(field),
            // The same blob; the URI knows the function better. Protobuf cannot distinguish a length of 0 from none.
            (Some(field), Some(uri))
                if field.hash() == uri.hash() && (field.size() == uri.size() || length == 0) =>
            {
                Some(uri)
            }
            _ => None,
        };
        digest.map_or_else(
            || {
                // Bazel 7 gives directories the digest "00".
                debug!(path, hash, length, uri, "the file has an invalid digest");
                Content::Unknown
            },
            Content::Blob,
        )
    }
}

/// What a file's message says of where its content is.
enum Is<'a> {
    Symlink(&'a str),
    Inline(Bytes),
    At(&'a str),
    Nowhere,
}

/// The host and port that a `bytestream://` URI names.
fn authority(uri: &str) -> Option<Box<str>> {
    let authority = uri.strip_prefix("bytestream://")?.split('/').next()?;
    (!authority.is_empty()).then(|| authority.into())
}

/// Whether a URI is `bytestream://…/blobs/HASH/SIZE`, of this very hash and size and of no function in particular.
fn names(uri: &str, hash: &str, size: u64) -> bool {
    let without_size = || {
        // By hand: this is asked of every file of a stream.
        let mut rest = uri.as_bytes();
        let mut left = size;
        loop {
            let (last, before) = rest.split_last()?;
            if u64::from(last.wrapping_sub(b'0')) != left % 10 {
                return None;
            }
            (rest, left) = (before, left / 10);
            if left == 0 {
                return uri.get(..rest.len());
            }
        }
    };
    !hash.is_empty()
        && BytestreamUri::is_one(uri)
        && without_size()
            .and_then(|rest| {
                rest.strip_suffix('/')?
                    .strip_suffix(hash)?
                    .strip_suffix("/blobs/")
            })
            // The slash before "blobs" may be the one after the authority, but not one of the scheme's.
            .is_some_and(|rest| rest.len() >= "bytestream://".len())
}

fn digest_of_field(hash: &str, size: u64, default_function: Option<DigestFunction>) -> Option<Digest> {
    let function = default_function.filter(|f| f.hash_len() * 2 == hash.len());
    Digest::from_hex(function, hash, size).ok()
}

fn configuration_id(id: Option<ConfigurationId>) -> String {
    id.map(|id| id.id).unwrap_or_default()
}

fn aborted(id: Option<Id>, aborted: proto::Aborted) -> Event {
    Event::Aborted {
        target: match id {
            Some(Id::TargetCompleted(id)) => Some(target_id(id)),
            _ => None,
        },
        reason: AbortReason::try_from(aborted.reason).map_or_else(
            |_| aborted.reason.to_string(),
            |reason| reason.as_str_name().to_owned(),
        ),
        description: aborted.description,
    }
}

fn target_id(id: proto::build_event_id::TargetCompletedId) -> TargetId {
    TargetId {
        label: fix_double_encoding(id.label),
        aspect: fix_double_encoding(id.aspect),
        configuration: configuration_id(id.configuration),
    }
}

fn link(link: proto::ConvenienceSymlink) -> Option<ConvenienceSymlink> {
    let target = match link.action() {
        LinkAction::Create => Some(link.target),
        LinkAction::Delete => None,
        LinkAction::Unknown => return None,
    };
    Some(ConvenienceSymlink {
        path: link.path,
        target,
    })
}

/// Options as they are; the chunks of other sections become options named by their section: `executable`,
/// `command`, `residual`.
fn command_line(id: Option<Id>, line: proto::CommandLine) -> CommandLine {
    let mut options = Vec::new();
    for section in line.sections {
        match section.section_type {
            Some(SectionType::OptionList(list)) => options.extend(list.option.into_iter().filter_map(option)),
            Some(SectionType::ChunkList(list)) => {
                let label = section.section_label;
                options.extend(list.chunk.into_iter().map(|chunk| (label.clone(), chunk)));
            }
            None => {}
        }
    }
    let label = match id {
        // Without `--experimental_tool_command_line` the one labelled "tool" has an empty payload.
        Some(Id::StructuredCommandLine(id)) if line.command_line_label.is_empty() => id.command_line_label,
        _ => line.command_line_label,
    };
    CommandLine { label, options }
}

/// An option's name and value. Startup options of the original command line have only their combined form, and
/// those from a bazelrc nothing at all.
pub(crate) fn option(option: proto::Option) -> Option<(String, String)> {
    if !option.option_name.is_empty() {
        return Some((option.option_name, option.option_value));
    }
    let combined = option.combined_form.strip_prefix("--")?;
    let (name, value) = combined.split_once('=').unwrap_or((combined, ""));
    Some((name.to_owned(), value.to_owned()))
}

const WORDS: &str = "Uploading BEP referenced local file ";
const MISSING: &str = " (No such file or directory)";

/// What Bazel says of a file that it could not read for the stream.
pub(crate) fn unreadable_line(path: &str) -> String {
    format!("{WORDS}{path}: {path}{MISSING}\n")
}

/// The files of which a piece of Bazel's output says that.
pub(crate) fn unreadable(output: &[u8]) -> Vec<String> {
    /// No line that names a path twice is longer. What commands print may be, and is not copied.
    const LONGEST: usize = 16 << 10;
    let mut files: Vec<String> = output
        .split(|byte| *byte == b'\n')
        .filter(|line| line.len() <= LONGEST)
        .filter_map(|line| {
            let line = String::from_utf8_lossy(line);
            let rest = line.split_once(WORDS)?.1;
            let (twice, _) = rest.split_once(MISSING)?;
            // The path stands there twice, with a colon and a space between.
            let path = twice.get(..twice.len().checked_sub(2)? / 2)?;
            (twice == format!("{path}: {path}")).then(|| path.to_owned())
        })
        .collect();
    files.sort();
    files.dedup();
    files
}

#[cfg(test)]
mod tests;
