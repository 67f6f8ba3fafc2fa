//! Forwarded events that name files on disk in place of blobs, for consumers that read files.
//!
//! Only the `uri` of a `File` changes, and the lengths of the messages around it: every other byte, and every field that
//! nobody here knows, stays as it is. So this works on the wire format, guided by where in an event files can be.

use std::{fmt::Write as _, os::unix::ffi::OsStrExt as _, path::Path, path::PathBuf};

use bytes::Bytes;

use crate::{
    bep::{
        uri::BytestreamUri,
        wire::{self, Field, Fields, Malformed, bep::*, bes, protobuf::any},
    },
    digest::Digest,
    exec_path::ExecPath,
};

/// Where files are in a message.
enum Shape {
    /// It is a file whose prefix and name are its exec path.
    File,
    /// It is a file whose name is not a path: a test's `test.log`, an action's `stdout`.
    Nameless,
    /// Files may be in these fields.
    Of(&'static [(u32, Shape)]),
}

use Shape::{File, Nameless, Of};

/// From the request to its files.
const REQUEST: Shape = Of(&[(
    bes::publish_build_tool_event_stream_request::ORDERED_BUILD_EVENT,
    ORDERED,
)]);
const ORDERED: Shape = Of(&[(bes::ordered_build_event::EVENT, ENVELOPE)]);
const ENVELOPE: Shape = Of(&[(bes::build_event::BAZEL_EVENT, Of(&[(any::VALUE, EVENT)]))]);
#[rustfmt::skip]
const EVENT: Shape = Of(&[
    (build_event::ACTION, Of(&[
        (action_executed::STDOUT, Nameless),
        (action_executed::STDERR, Nameless),
        (action_executed::PRIMARY_OUTPUT, Nameless),
        (action_executed::ACTION_METADATA_LOGS, Nameless),
    ])),
    (build_event::COMPLETED, Of(&[
        (target_complete::OUTPUT_GROUP, Of(&[(output_group::INLINE_FILES, File)])),
        (target_complete::IMPORTANT_OUTPUT, File),
        (target_complete::DIRECTORY_OUTPUT, File),
    ])),
    (build_event::TEST_SUMMARY, Of(&[(test_summary::PASSED, Nameless), (test_summary::FAILED, Nameless)])),
    (build_event::TEST_RESULT, Of(&[(test_result::TEST_ACTION_OUTPUT, Nameless)])),
    (build_event::NAMED_SET_OF_FILES, Of(&[(named_set_of_files::FILES, File)])),
    (build_event::BUILD_TOOL_LOGS, Of(&[(build_tool_logs::LOG, Nameless)])),
]);

/// What may name a file on disk, as [`crate::builds::Builds::local_files`] asks for it.
pub(super) type Blob = (Option<ExecPath>, Digest);

/// The blobs that the request's files are, in the order of [`rewritten`]; none if the request makes no sense.
pub(super) fn blobs(request: &[u8]) -> Vec<Blob> {
    let mut found = Vec::new();
    match REQUEST.collect(request, &mut found) {
        Ok(()) => found,
        Err(Malformed) => Vec::new(),
    }
}

/// The request with files in place of blobs: `local` has an answer for each of [`blobs`]. `None` if nothing changes.
pub(super) fn rewritten(request: &[u8], local: &[Option<PathBuf>]) -> Option<Bytes> {
    if local.iter().all(Option::is_none) {
        return None;
    }
    let mut local = local.iter().map(Option::as_deref);
    REQUEST
        .replace(request, &mut local)
        .ok()
        .flatten()
        .map(Bytes::from)
}

impl Shape {
    fn collect(&self, message: &[u8], to: &mut Vec<Blob>) -> Result<(), Malformed> {
        let fields = match self {
            Of(fields) => fields,
            File | Nameless => {
                to.extend(self.blob(message)?);
                return Ok(());
            }
        };
        for field in Fields::of(message) {
            let field = field?;
            if let Some(inside) = field.inside()
                && let Some((_, shape)) = fields.iter().find(|(number, _)| *number == field.number)
            {
                shape.collect(inside, to)?;
            }
        }
        Ok(())
    }

    /// The message again; `None` if it stays as it is.
    fn replace(
        &self,
        message: &[u8],
        local: &mut dyn Iterator<Item = Option<&Path>>,
    ) -> Result<Option<Vec<u8>>, Malformed> {
        let fields = match self {
            Of(fields) => fields,
            File | Nameless => {
                if self.blob(message)?.is_none() {
                    return Ok(None);
                }
                return Ok(local.next().flatten().map(|path| with_uri(message, path)));
            }
        };
        // Bytes up to here are in `out`; it is only begun with the first change.
        let mut out: Option<Vec<u8>> = None;
        let mut start = 0;
        for field in Fields::of(message) {
            let field = field?;
            let shape = fields.iter().find(|(number, _)| *number == field.number);
            let changed = match (field.inside(), shape) {
                (Some(inside), Some((_, shape))) => shape.replace(inside, local)?,
                _ => None,
            };
            if let Some(inside) = changed {
                let out = out.get_or_insert_with(|| {
                    let mut out = Vec::with_capacity(message.len() + message.len() / 8);
                    out.extend_from_slice(&message[..start]);
                    out
                });
                wire::put(field.number, &inside, out);
            } else if let Some(out) = &mut out {
                out.extend_from_slice(field.raw);
            }
            start += field.raw.len();
        }
        Ok(out)
    }

    /// The blob that a file is.
    fn blob(&self, message: &[u8]) -> Result<Option<Blob>, Malformed> {
        let (mut uri, mut name, mut path) = (None, None, String::new());
        for field in Fields::of(message) {
            let field = field?;
            match (field.number, field.inside()) {
                (file::URI, Some(inside)) => uri = std::str::from_utf8(inside).ok(),
                // The three are a oneof: the last one counts.
                (file::CONTENTS | file::SYMLINK_TARGET_PATH, Some(_)) => uri = None,
                (file::NAME, Some(inside)) => name = std::str::from_utf8(inside).ok(),
                (file::PATH_PREFIX, Some(inside)) => {
                    path.push_str(&String::from_utf8_lossy(inside));
                    path.push('/');
                }
                _ => {}
            }
        }
        let Some(digest) = uri
            .and_then(|uri| BytestreamUri::parse_with(uri, None).ok())
            .map(|uri| uri.digest)
        else {
            return Ok(None);
        };
        let path = match (self, name) {
            (File, Some(name)) if !path.is_empty() => {
                path.push_str(name);
                ExecPath::new(&path).ok()
            }
            _ => None,
        };
        Ok(Some((path, digest)))
    }
}

/// The file with another uri: the last one, as that is what counts.
fn with_uri(message: &[u8], path: &Path) -> Vec<u8> {
    let uri = file_uri(path);
    let fields = || Fields::of(message).map_while(Result::ok);
    // One of another type is not a uri, and stays as malformed as it is.
    let is_uri = |field: &Field<'_>| field.number == file::URI && field.inside().is_some();
    let last = fields().filter(is_uri).count();
    let mut out = Vec::with_capacity(message.len() + uri.len());
    let mut nth = 0;
    for field in fields() {
        nth += usize::from(is_uri(&field));
        if is_uri(&field) && nth == last {
            wire::put(file::URI, uri.as_bytes(), &mut out);
        } else {
            out.extend_from_slice(field.raw);
        }
    }
    out
}

/// `file://` and the path, with escapes for what no path of a URI may hold (RFC 3986, 3.3).
pub(super) fn file_uri(path: &Path) -> String {
    let mut uri = "file://".to_owned();
    for byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~!$&'()*+,;=:@".contains(byte) {
            uri.push(char::from(*byte));
        } else {
            // Writing to a string cannot fail.
            let _ = write!(uri, "%{byte:02X}");
        }
    }
    uri
}

#[cfg(test)]
mod tests {
    use percent_encoding::percent_decode_str;
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;
    use crate::{
        bes::upstream::tests::requests,
        proto::build_event_stream::{
            self as bep, ActionExecuted, BuildEvent, BuildToolLogs, NamedSetOfFiles, OutputGroup,
            TargetComplete, TestResult, TestSummary, build_event::Payload, file::File as FileOf,
        },
    };

    fn uri(n: u8) -> String {
        format!("bytestream://cache/blobs/{}/{n}", hex::encode([n; 32]))
    }

    fn file(n: u8, content: FileOf) -> bep::File {
        bep::File {
            path_prefix: vec!["bazel-out".to_owned(), "k8".to_owned()],
            name: format!("a/{n}"),
            file: Some(content),
            digest: "d".to_owned(),
            length: i64::from(n),
        }
    }

    fn payload(kind: usize, files: Vec<bep::File>) -> Payload {
        let mut files = files.into_iter();
        match kind {
            0 => Payload::NamedSetOfFiles(NamedSetOfFiles {
                files: files.collect(),
                ..NamedSetOfFiles::default()
            }),
            1 => Payload::Completed(TargetComplete {
                important_output: files.next().into_iter().collect(),
                directory_output: files.next().into_iter().collect(),
                output_group: vec![
                    OutputGroup {
                        inline_files: files.next().into_iter().collect(),
                        ..OutputGroup::default()
                    },
                    OutputGroup {
                        name: "g".to_owned(),
                        inline_files: files.collect(),
                        ..OutputGroup::default()
                    },
                ],
                ..TargetComplete::default()
            }),
            2 => Payload::TestResult(TestResult {
                test_action_output: files.collect(),
                ..TestResult::default()
            }),
            3 => Payload::TestSummary(TestSummary {
                passed: files.next().into_iter().collect(),
                failed: files.collect(),
                ..TestSummary::default()
            }),
            4 => Payload::Action(ActionExecuted {
                stdout: files.next(),
                stderr: files.next(),
                primary_output: files.next(),
                ..ActionExecuted::default()
            }),
            _ => Payload::BuildToolLogs(BuildToolLogs { log: files.collect() }),
        }
    }

    /// A request with unknown fields on every level.
    fn request(kind: usize, files: Vec<bep::File>, unknown: &[u8]) -> Vec<u8> {
        let event = BuildEvent {
            payload: Some(payload(kind, files)),
            ..BuildEvent::default()
        };
        let nest = |number, inside: &[u8]| {
            let mut out = Vec::new();
            wire::put(900, unknown, &mut out);
            wire::put(number, inside, &mut out);
            wire::put(901, unknown, &mut out);
            out
        };
        let mut event = event.encode_to_vec();
        wire::put(902, unknown, &mut event);
        [2, 60, 3, 4].iter().fold(event, |m, n| nest(*n, &m))
    }

    fn every_uri(message: &[u8]) -> Vec<String> {
        let event = requests::event(message).unwrap();
        let files = |payload: Payload| match payload {
            Payload::NamedSetOfFiles(m) => m.files,
            Payload::Completed(m) => {
                // In the order of their field numbers, as they are on the wire.
                let groups = m.output_group.into_iter().flat_map(|g| g.inline_files);
                groups
                    .chain(m.important_output)
                    .chain(m.directory_output)
                    .collect()
            }
            Payload::TestResult(m) => m.test_action_output,
            Payload::TestSummary(m) => m.passed.into_iter().chain(m.failed).collect(),
            Payload::Action(m) => [m.stdout, m.stderr, m.primary_output]
                .into_iter()
                .flatten()
                .collect(),
            Payload::BuildToolLogs(m) => m.log,
            _ => Vec::new(),
        };
        files(event.payload.unwrap())
            .into_iter()
            .filter_map(|f| match f.file {
                Some(FileOf::Uri(uri)) => Some(uri),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn files_are_asked_for_by_path_where_it_is_one() {
        let set = request(0, vec![file(1, FileOf::Uri(uri(1)))], b"");
        let [(Some(path), digest)] = &blobs(&set)[..] else {
            panic!("not found")
        };
        assert_eq!((path.as_str(), digest.size()), ("bazel-out/k8/a/1", 1));
        let test = request(2, vec![file(1, FileOf::Uri(uri(1)))], b"");
        assert!(matches!(&blobs(&test)[..], [(None, _)]));
        let mut source = file(1, FileOf::Uri(uri(1)));
        source.path_prefix.clear();
        assert!(matches!(&blobs(&request(0, vec![source], b""))[..], [(None, _)]));
    }

    #[test]
    fn only_blobs_that_count_are_files() {
        let others = [
            FileOf::Uri("file:///a".to_owned()),
            FileOf::Contents(b"x".as_slice().into()),
            FileOf::SymlinkTargetPath("x".to_owned()),
        ];
        let set = request(0, others.map(|o| file(1, o)).to_vec(), b"");
        assert!(blobs(&set).is_empty());
        // Contents after the uri: it is the oneof's last that counts.
        let mut both = Vec::new();
        wire::put(file::URI, uri(1).as_bytes(), &mut both);
        wire::put(file::CONTENTS, b"x", &mut both);
        assert_eq!(File.blob(&both), Ok(None));
        wire::put(file::URI, uri(2).as_bytes(), &mut both);
        wire::put(900, b"unknown", &mut both);
        assert_eq!(File.blob(&both).unwrap().unwrap().1.size(), 2);
        let new = with_uri(&both, Path::new("/x"));
        let uris: Vec<_> = Fields::of(&new)
            .map(Result::unwrap)
            .filter(|f| f.number == file::URI)
            .map(|f| f.inside().unwrap().to_vec())
            .collect();
        assert_eq!(uris, [uri(1).into_bytes(), b"file:///x".to_vec()]);
        assert!(new.ends_with(b"unknown"));
        // A number where a uri belongs: no consumer reads that event, before or after.
        both.extend([8 * u8::try_from(file::URI).unwrap(), 7]);
        let new = with_uri(&both, Path::new("/x"));
        assert!(new.ends_with(&both[both.len() - 2..]));
        assert_eq!(File.blob(&new), Ok(None), "the uri that counts is replaced");
    }

    #[test]
    fn paths_of_any_bytes_read_back() {
        use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};
        let path = Path::new(OsStr::from_bytes(b"/a b/%41/\xff\xc3\xa9/#?/rules_cc+/x@y"));
        let uri = file_uri(path);
        let decoded: Vec<u8> = percent_decode_str(uri.strip_prefix("file://").unwrap()).collect();
        assert_eq!(decoded, path.as_os_str().as_bytes());
        assert!(uri.ends_with("/rules_cc+/x@y"));
    }

    proptest! {
        #[test]
        fn with_nothing_local_nothing_changes_and_else_only_uris(
            kind in 0_usize..6,
            here in prop::collection::vec(any::<bool>(), 0..6),
            unknown in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let files = |local: &dyn Fn(usize) -> bool| -> Vec<u8> {
                let files = (0..here.len()).map(|n| {
                    let to = if local(n) { format!("file:///execroot/dir%20/{n}") } else { uri(n as u8) };
                    file(n as u8, FileOf::Uri(to))
                });
                request(kind, files.collect(), &unknown)
            };
            let before = files(&|_| false);
            let found = blobs(&before);
            // Actions have three places at most.
            prop_assert_eq!(found.len(), if kind == 4 { here.len().min(3) } else { here.len() });
            prop_assert!(rewritten(&before, &vec![None; found.len()]).is_none());
            let by_digest = |digest: &Digest| digest.size() as usize;
            let local: Vec<_> = found
                .iter()
                .map(|(_, digest)| by_digest(digest))
                .map(|n| here[n].then(|| PathBuf::from(format!("/execroot/dir /{n}"))))
                .collect();
            let after = rewritten(&before, &local).map_or_else(|| before.clone(), |b| b.to_vec());
            prop_assert_eq!(&after, &files(&|n| here[n]));
            prop_assert_eq!(every_uri(&after).len(), found.len());
        }

        #[test]
        fn arbitrary_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let count = blobs(&bytes).len();
            let _ = rewritten(&bytes, &vec![Some(PathBuf::from("/x")); count]);
        }
    }
}
