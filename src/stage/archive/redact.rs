//! What of a build's events leaves the machine: what staging, `status` and `ls` read of them, and nothing else.
//!
//! Events hold command lines, environments, what a build prints, and addresses with whatever signs them. A list of what
//! is secret in that is never complete, so this is one of what is needed. The messages are rewritten field by field on
//! the wire; numbers are those of `build_event_stream.proto` (Bazel 2 to 9), and what is decoded of them is
//! `bep::decode`'s business.

use prost::{
    Message as _,
    encoding::{decode_varint, encode_varint},
};

use crate::{
    bep::decode::{option, unreadable, unreadable_line},
    proto::build_event_stream::{Option as CommandOption, Progress},
    remote::Endpoint,
};

/// What is done with a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Treatment {
    /// It stays as it is.
    Keep,
    /// A `File`.
    File,
    /// An `Option` of a structured command line.
    Option,
    /// A piece of the build tool's output.
    Progress,
}

/// From `BuildEvent` down. What is not below one of these goes.
const FIELDS: &[(&[u64], Treatment)] = &[
    // id: configuration, named_set, structured_command_line; those of actions, targets and tests.
    (&[1, 15, 1], Treatment::Keep),
    (&[1, 13, 1], Treatment::Keep),
    (&[1, 18, 1], Treatment::Keep),
    (&[1, 6, 1], Treatment::Keep),
    (&[1, 6, 2], Treatment::Keep),
    (&[1, 16, 1], Treatment::Keep),
    (&[1, 16, 2], Treatment::Keep),
    (&[1, 5, 1], Treatment::Keep),
    (&[1, 5, 2], Treatment::Keep),
    (&[1, 5, 3, 1], Treatment::Keep),
    (&[1, 7, 1], Treatment::Keep),
    (&[1, 7, 2, 1], Treatment::Keep),
    (&[1, 8, 1], Treatment::Keep),
    (&[1, 8, 2], Treatment::Keep),
    (&[1, 8, 3], Treatment::Keep),
    (&[1, 8, 4], Treatment::Keep),
    (&[1, 8, 5, 1], Treatment::Keep),
    // last_message.
    (&[20], Treatment::Keep),
    (&[3], Treatment::Progress),
    // aborted: reason.
    (&[4, 1], Treatment::Keep),
    // started: id, time, version, command, workspace.
    (&[5, 1], Treatment::Keep),
    (&[5, 2], Treatment::Keep),
    (&[5, 3], Treatment::Keep),
    (&[5, 5], Treatment::Keep),
    (&[5, 7], Treatment::Keep),
    // action: success, primary output.
    (&[7, 1], Treatment::Keep),
    (&[7, 6], Treatment::File),
    // completed: success, groups (name, sets, whether it is incomplete, files), files, directories.
    (&[8, 1], Treatment::Keep),
    (&[8, 2, 1], Treatment::Keep),
    (&[8, 2, 3, 1], Treatment::Keep),
    (&[8, 2, 4], Treatment::Keep),
    (&[8, 2, 5], Treatment::File),
    (&[8, 4], Treatment::File),
    (&[8, 8], Treatment::File),
    // test_summary: runs and shards.
    (&[9, 10], Treatment::Keep),
    (&[9, 11], Treatment::Keep),
    // test_result.
    (&[10, 2], Treatment::File),
    // finished: exit code with its name.
    (&[14, 3, 1], Treatment::Keep),
    (&[14, 3, 2], Treatment::Keep),
    // named_set_of_files: files and sets.
    (&[15, 1], Treatment::File),
    (&[15, 2, 1], Treatment::Keep),
    // configuration: mnemonic.
    (&[17, 1], Treatment::Keep),
    // configured: kind.
    (&[18, 1], Treatment::Keep),
    // structured_command_line: its label, and options.
    (&[22, 1], Treatment::Keep),
    (&[22, 2, 3, 1], Treatment::Option),
    // workspace_info: exec root.
    (&[25, 1], Treatment::Keep),
];

/// Of a `File`: name, contents, path prefix, digest, length, where a link leads. Beside these there is its URI.
const OF_FILE: &[u64] = &[1, 3, 4, 5, 6, 7];
const URI: u64 = 2;

/// An event that is no protobuf message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// What leaves of an event; empty if it tells nothing that is needed.
pub(super) fn redact(event: &[u8]) -> Result<Vec<u8>, Malformed> {
    let kept = message(event, FIELDS, 0)?;
    let (mut rest, mut tells) = (&*kept, false);
    while !rest.is_empty() {
        // An id alone is about what has gone.
        tells |= next(&mut rest)?.number != 1;
    }
    Ok(if tells { kept } else { Vec::new() })
}

/// The bytes of a field, cut off the message.
struct Field<'a> {
    number: u64,
    /// Tag and all.
    whole: &'a [u8],
    /// Of a field with a length.
    content: Option<&'a [u8]>,
}

fn next<'a>(rest: &mut &'a [u8]) -> Result<Field<'a>, Malformed> {
    let start = *rest;
    let tag = decode_varint(rest).map_err(|_| Malformed)?;
    let mut content = None;
    let skip = match tag & 7 {
        0 => {
            decode_varint(rest).map_err(|_| Malformed)?;
            0
        }
        1 => 8,
        2 => {
            let length = decode_varint(rest).map_err(|_| Malformed)?;
            let length = usize::try_from(length).map_err(|_| Malformed)?;
            content = Some(rest.get(..length).ok_or(Malformed)?);
            length
        }
        5 => 4,
        _ => return Err(Malformed),
    };
    *rest = rest.get(skip..).ok_or(Malformed)?;
    Ok(Field {
        number: tag >> 3,
        whole: &start[..start.len() - rest.len()],
        content,
    })
}

fn put(number: u64, content: &[u8], out: &mut Vec<u8>) {
    encode_varint(number << 3 | 2, out);
    encode_varint(content.len() as u64, out);
    out.extend_from_slice(content);
}

/// A message with the fields of the table. It goes as deep as the table.
fn message(message_: &[u8], fields: &[(&[u64], Treatment)], depth: usize) -> Result<Vec<u8>, Malformed> {
    let (mut rest, mut out) = (message_, Vec::new());
    while !rest.is_empty() {
        let field = next(&mut rest)?;
        let below: Vec<(&[u64], Treatment)> = fields
            .iter()
            .filter(|(path, _)| path.get(depth) == Some(&field.number))
            .copied()
            .collect();
        let Some((path, treatment)) = below.first() else {
            continue;
        };
        let is_leaf = path.len() == depth + 1;
        if is_leaf && *treatment == Treatment::Keep {
            out.extend_from_slice(field.whole);
            continue;
        }
        // Messages have a length; what has none is not what the table means.
        let Some(content) = field.content else { continue };
        let inner = match treatment {
            _ if !is_leaf => Some(message(content, &below, depth + 1)?),
            Treatment::File => Some(file(content)?),
            Treatment::Option => kept_option(content)?,
            Treatment::Progress => progress(content)?,
            Treatment::Keep => None,
        };
        if let Some(inner) = inner {
            put(field.number, &inner, &mut out);
        }
    }
    Ok(out)
}

/// A `File` whose URI says where the blob is, and no more.
fn file(file: &[u8]) -> Result<Vec<u8>, Malformed> {
    let (mut rest, mut out) = (file, Vec::with_capacity(file.len()));
    while !rest.is_empty() {
        let field = next(&mut rest)?;
        if OF_FILE.contains(&field.number) {
            out.extend_from_slice(field.whole);
        } else if field.number == URI
            && let Some(bare) = field
                .content
                .and_then(|uri| std::str::from_utf8(uri).ok())
                .and_then(bare)
        {
            put(URI, bare.as_bytes(), &mut out);
        }
    }
    Ok(out)
}

/// A blob's URI without user, password, query and fragment. Other URIs are read by nobody.
fn bare(uri: &str) -> Option<String> {
    const SCHEME: &str = "bytestream://";
    let rest = uri.strip_prefix(SCHEME)?;
    let rest = rest.split(['?', '#']).next()?;
    // A password may have a slash; names of blobs have no @.
    let rest = rest.rsplit_once('@').map_or(rest, |(_, rest)| rest);
    Some(format!("{SCHEME}{rest}"))
}

/// An option that tells where the blobs are, if it is one.
fn kept_option(content: &[u8]) -> Result<Option<Vec<u8>>, Malformed> {
    let Some((name, value)) = option(CommandOption::decode(content).map_err(|_| Malformed)?) else {
        return Ok(None);
    };
    let value = match &*name {
        // Without user and password.
        "remote_cache" | "remote_executor" => Endpoint::parse(&name, &value).ok().map(|at| at.to_string()),
        "remote_instance_name" | "digest_function" => Some(value),
        _ => None,
    };
    Ok(value.map(|value| {
        CommandOption {
            option_name: name,
            option_value: value,
            ..CommandOption::default()
        }
        .encode_to_vec()
    }))
}

/// What the build tool says of files that it could not name.
fn progress(content: &[u8]) -> Result<Option<Vec<u8>>, Malformed> {
    let progress = Progress::decode(content).map_err(|_| Malformed)?;
    let lines: String = unreadable(&progress.stderr)
        .iter()
        .map(|path| unreadable_line(path))
        .collect();
    Ok((!lines.is_empty()).then(|| {
        Progress {
            stderr: lines.into_bytes().into(),
        }
        .encode_to_vec()
    }))
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
    fn what_is_no_message_is_told() {
        assert_eq!(redact(&[0x1a, 0x05, 1]), Err(Malformed));
        assert_eq!(redact(&[0x0b]), Err(Malformed));
    }
}
