//! What of a build's events leaves the machine: what staging, `status` and `ls` read of them, and nothing else.
//!
//! Events hold command lines, environments, what a build prints, and addresses with whatever signs them. A list of what
//! is secret in that is never complete, so this is a list of what is needed. Messages are copied field by field: what is
//! not on the list, or not of the type that the protocol has, is left out.

use prost::Message as _;

use crate::{
    bep::{
        decode::{option, unreadable, unreadable_line},
        wire::{
            Fields, Malformed, Value,
            bep::{build_event_id::*, build_finished::exit_code, *},
            inside, put,
        },
    },
    digest::DigestFunction,
    proto::build_event_stream::Option as CommandOption,
    transport::{Endpoint, split_user_info},
};

/// What stays of a field.
enum Kept {
    /// All of it: an integer, a boolean or an enum.
    Number,
    /// All of it: a string or bytes.
    Text,
    /// The address of a blob.
    Uri,
    /// An option of a command line, if it says where the blobs are.
    Option,
    /// What the build tool says of files that it could not read.
    Progress,
    /// These fields of a message.
    Message(&'static [(u32, Kept)]),
}

use Kept::{Message, Number, Text};

/// Every field that is read after an import.
#[rustfmt::skip]
const EVENT: &[(u32, Kept)] = &[
    (build_event::ID, Message(&[
        (build_event_id::TARGET_COMPLETED, Message(&[
            (target_completed_id::LABEL, Text),
            (target_completed_id::ASPECT, Text),
            (target_completed_id::CONFIGURATION, CONFIGURATION_ID),
        ])),
        (build_event_id::TEST_SUMMARY, Message(&[
            (test_summary_id::LABEL, Text),
            (test_summary_id::CONFIGURATION, CONFIGURATION_ID),
        ])),
        (build_event_id::TEST_RESULT, Message(&[
            (test_result_id::LABEL, Text),
            (test_result_id::RUN, Number),
            (test_result_id::SHARD, Number),
            (test_result_id::ATTEMPT, Number),
            (test_result_id::CONFIGURATION, CONFIGURATION_ID),
        ])),
        (build_event_id::NAMED_SET, SET_ID),
        (build_event_id::CONFIGURATION, CONFIGURATION_ID),
        (build_event_id::TARGET_CONFIGURED, Message(&[
            (target_configured_id::LABEL, Text),
            (target_configured_id::ASPECT, Text),
        ])),
        (build_event_id::STRUCTURED_COMMAND_LINE, Message(&[(structured_command_line_id::COMMAND_LINE_LABEL, Text)])),
    ])),
    (build_event::PROGRESS, Kept::Progress),
    // That a target was aborted is all that is read.
    (build_event::ABORTED, Message(&[])),
    (build_event::STARTED, Message(&[
        (build_started::START_TIME_MILLIS, Number),
        (build_started::BUILD_TOOL_VERSION, Text),
        (build_started::COMMAND, Text),
        (build_started::WORKSPACE_DIRECTORY, Text),
    ])),
    (build_event::COMPLETED, Message(&[
        (target_complete::SUCCESS, Number),
        (target_complete::OUTPUT_GROUP, Message(&[
            (output_group::NAME, Text),
            (output_group::FILE_SETS, SET_ID),
            (output_group::INCOMPLETE, Number),
            (output_group::INLINE_FILES, FILE),
        ])),
        (target_complete::IMPORTANT_OUTPUT, FILE),
        (target_complete::DIRECTORY_OUTPUT, FILE),
    ])),
    (build_event::TEST_SUMMARY, Message(&[(test_summary::RUN_COUNT, Number), (test_summary::SHARD_COUNT, Number)])),
    (build_event::TEST_RESULT, Message(&[
        (test_result::TEST_ACTION_OUTPUT, FILE),
        (test_result::STATUS, Number),
    ])),
    (build_event::FINISHED, Message(&[(build_finished::EXIT_CODE, Message(&[(exit_code::CODE, Number)]))])),
    (build_event::NAMED_SET_OF_FILES, Message(&[
        (named_set_of_files::FILES, FILE),
        (named_set_of_files::FILE_SETS, SET_ID),
    ])),
    (build_event::CONFIGURATION, Message(&[(configuration::MNEMONIC, Text)])),
    (build_event::CONFIGURED, Message(&[(target_configured::TARGET_KIND, Text)])),
    (build_event::STRUCTURED_COMMAND_LINE, Message(&[
        (command_line::COMMAND_LINE_LABEL, Text),
        (command_line::SECTIONS, Message(&[
            (command_line_section::OPTION_LIST, Message(&[(option_list::OPTION, Kept::Option)])),
        ])),
    ])),
    (build_event::WORKSPACE_INFO, Message(&[(workspace_config::LOCAL_EXEC_ROOT, Text)])),
];
const CONFIGURATION_ID: Kept = Message(&[(configuration_id::ID, Text)]);
const SET_ID: Kept = Message(&[(named_set_of_files_id::ID, Text)]);
const FILE: Kept = Message(&[
    (file::NAME, Text),
    (file::URI, Kept::Uri),
    (file::CONTENTS, Text),
    (file::PATH_PREFIX, Text),
    (file::DIGEST, Text),
    (file::LENGTH, Number),
    (file::SYMLINK_TARGET_PATH, Text),
]);

/// What leaves of an event; empty if it says nothing that is needed.
pub(super) fn redact(event: &[u8]) -> Result<Vec<u8>, Malformed> {
    let kept = message(event, EVENT)?;
    // An id alone is about what has gone.
    let is_needed = Fields::of(&kept).any(|field| field.is_ok_and(|field| field.number != build_event::ID));
    Ok(if is_needed { kept } else { Vec::new() })
}

/// A message with the fields of the list. It goes as deep as the list.
fn message(encoded: &[u8], fields: &[(u32, Kept)]) -> Result<Vec<u8>, Malformed> {
    let mut out = Vec::new();
    for field in Fields::of(encoded) {
        let field = field?;
        let Some((_, kept)) = fields.iter().find(|(number, _)| *number == field.number) else {
            continue;
        };
        let left = match (kept, field.value) {
            (Number, Value::Number(_)) | (Text, Value::Bytes(_)) => {
                out.extend_from_slice(field.raw);
                continue;
            }
            (Message(fields), Value::Bytes(inside)) => Some(message(inside, fields)?),
            (Kept::Uri, Value::Bytes(uri)) => std::str::from_utf8(uri)
                .ok()
                .and_then(bare)
                .map(String::into_bytes),
            (Kept::Option, Value::Bytes(option)) => kept_option(option)?,
            (Kept::Progress, Value::Bytes(progress)) => kept_progress(progress)?,
            _ => None,
        };
        if let Some(left) = left {
            put(field.number, &left, &mut out);
        }
    }
    Ok(out)
}

/// A blob's URI without user, password, query and fragment. No other URI is read.
fn bare(uri: &str) -> Option<String> {
    const SCHEME: &str = "bytestream://";
    let rest = uri.strip_prefix(SCHEME)?;
    let rest = rest.split(['?', '#']).next()?;
    // A password may have a slash; names of blobs have no @.
    let rest = rest.rsplit_once('@').map_or(rest, |(_, rest)| rest);
    Some(format!("{SCHEME}{rest}"))
}

/// An option that says where the blobs are, if it is one.
fn kept_option(content: &[u8]) -> Result<Option<Vec<u8>>, Malformed> {
    let Some((name, value)) = option(CommandOption::decode(content)?) else {
        return Ok(None);
    };
    let value = match &*name {
        // Without user and password.
        "remote_cache" | "remote_executor" => {
            let (address, _) = split_user_info(&value);
            Endpoint::parse_cache(&name, &address)
                .ok()
                .map(|at| at.to_string())
        }
        "remote_instance_name" => Some(value),
        "digest_function" => Some(value).filter(|name| name.parse::<DigestFunction>().is_ok()),
        _ => None,
    };
    Ok(value.map(|value| {
        let mut kept = Vec::new();
        put(option::OPTION_NAME, name.as_bytes(), &mut kept);
        put(option::OPTION_VALUE, value.as_bytes(), &mut kept);
        kept
    }))
}

/// What the build tool says of files that it could not read, if it says so.
fn kept_progress(content: &[u8]) -> Result<Option<Vec<u8>>, Malformed> {
    let output = inside(content, progress::STDERR)?.unwrap_or_default();
    let lines: String = unreadable(output)
        .iter()
        .map(|path| unreadable_line(path))
        .collect();
    let mut kept = Vec::new();
    put(progress::STDERR, lines.as_bytes(), &mut kept);
    Ok((!lines.is_empty()).then_some(kept))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_says_where_a_blob_is_and_no_more() {
        for (given, expected) in [
            (
                "bytestream://host/i/blobs/ab/1",
                Some("bytestream://host/i/blobs/ab/1"),
            ),
            (
                "bytestream://me:pass@host:1/blobs/ab/1",
                Some("bytestream://host:1/blobs/ab/1"),
            ),
            (
                "bytestream://me:pa/s@s@host/blobs/ab/1",
                Some("bytestream://host/blobs/ab/1"),
            ),
            (
                "bytestream://host/blobs/ab/1?X-Amz-Signature=x&token=y",
                Some("bytestream://host/blobs/ab/1"),
            ),
            (
                "bytestream://host/blobs/ab/1#sig=x",
                Some("bytestream://host/blobs/ab/1"),
            ),
            ("https://me:pass@host/x?sig=y", None),
            ("file:///home/me/x", None),
            ("s3://key:secret@bucket/x", None),
            ("", None),
        ] {
            assert_eq!(bare(given).as_deref(), expected, "{given}");
        }
    }

    #[test]
    fn what_is_no_message_is_reported() {
        assert_eq!(redact(&[0x1a, 0x05, 1]), Err(Malformed));
        assert_eq!(redact(&[0x0b]), Err(Malformed));
    }
}
