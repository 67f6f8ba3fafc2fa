//! Sets of files straight from the wire.
//!
//! A set's message is walked once and borrowed from, where generated code would allocate seven times for each of its
//! files. Only what build tools really send is read here. Whatever is unusual, and whatever is wrong, is left to the
//! generated code: other fields, a field that comes twice, text that is not UTF-8, a message that breaks off.

use bytes::Bytes;

use super::{Is, Reader, authority};
use crate::bep::{
    event::{Event, File, NamedSet, StreamEvent},
    wire::{
        Fields, Value,
        bep::{build_event, build_event_id, build_event_id::named_set_of_files_id, file, named_set_of_files},
    },
};

/// Segments of a path's prefix. Build tools send three.
const PREFIX: usize = 8;

/// Reads a `BuildEvent` that brings a named set; `None` leaves the message to others.
pub(super) fn decode(message: &Bytes, reader: Reader) -> Option<StreamEvent> {
    let (mut id, mut set, mut last) = (None, None, false);
    for field in Fields::of(message) {
        let field = field.ok()?;
        match (field.number, field.value) {
            // The id comes first, and distinguishes other events before more is read of them.
            (build_event::ID, Value::Bytes(bytes)) if id.is_none() => id = Some(set_id(bytes)?),
            (build_event::NAMED_SET_OF_FILES, Value::Bytes(bytes)) if set.is_none() => set = Some(bytes),
            (build_event::LAST_MESSAGE, Value::Number(number)) => last = number != 0,
            _ => return None,
        }
    }
    let mut set = Files {
        reader,
        all: message,
        path: String::new(),
        set: NamedSet {
            id: id?.to_owned(),
            ..NamedSet::default()
        },
    }
    .read(set?)?;
    set.files.shrink_to_fit();
    Some(StreamEvent {
        event: Event::NamedSet(set),
        last,
    })
}

/// The id of a set, out of a `BuildEventId`.
fn set_id(bytes: &[u8]) -> Option<&str> {
    only(bytes, build_event_id::NAMED_SET).and_then(set_name)
}

/// The text of a `NamedSetOfFilesId`.
fn set_name(bytes: &[u8]) -> Option<&str> {
    only(bytes, named_set_of_files_id::ID).and_then(text)
}

/// What is inside the only field of a message.
fn only(message: &[u8], number: u32) -> Option<&[u8]> {
    let mut fields = Fields::of(message);
    let field = fields.next()?.ok()?;
    if field.number != number || fields.next().is_some() {
        return None;
    }
    field.inside()
}

/// A set on its way.
struct Files<'a> {
    reader: Reader,
    /// What it is read from.
    all: &'a Bytes,
    /// Room for a path.
    path: String,
    set: NamedSet,
}

impl Files<'_> {
    /// Reads a `NamedSetOfFiles`.
    fn read(mut self, message: &[u8]) -> Option<NamedSet> {
        for field in Fields::of(message) {
            let field = field.ok()?;
            match (field.number, field.value) {
                (named_set_of_files::FILES, Value::Bytes(bytes)) => {
                    let file = self.file(bytes)?;
                    self.set.files.push(file);
                }
                (named_set_of_files::FILE_SETS, Value::Bytes(bytes)) => {
                    self.set.children.push(set_name(bytes)?.to_owned());
                }
                _ => return None,
            }
        }
        Some(self.set)
    }

    /// Reads a `File`.
    fn file(&mut self, message: &[u8]) -> Option<File> {
        let (mut name, mut digest, mut length) = (None, None, None);
        let (mut prefix, mut segments) = ([""; PREFIX], 0);
        let mut is = Is::Nowhere;
        for field in Fields::of(message) {
            let field = field.ok()?;
            match (field.number, field.value) {
                (file::NAME, Value::Bytes(bytes)) if name.is_none() => name = Some(text(bytes)?),
                (file::PATH_PREFIX, Value::Bytes(bytes)) => {
                    *prefix.get_mut(segments)? = text(bytes)?;
                    segments += 1;
                }
                (file::DIGEST, Value::Bytes(bytes)) if digest.is_none() => digest = Some(text(bytes)?),
                (file::LENGTH, Value::Number(number)) if length.is_none() => {
                    length = Some(number.cast_signed());
                }
                (number, Value::Bytes(bytes)) if matches!(is, Is::Nowhere) => {
                    is = match number {
                        file::URI => Is::At(text(bytes)?),
                        file::CONTENTS => Is::Inline(self.all.slice_ref(bytes)),
                        file::SYMLINK_TARGET_PATH => Is::Symlink(text(bytes)?),
                        _ => return None,
                    }
                }
                _ => return None,
            }
        }
        if self.set.authority.is_none()
            && let Is::At(uri) = is
        {
            self.set.authority = authority(uri);
        }
        self.path.clear();
        for (number, segment) in prefix.iter().take(segments).enumerate() {
            if number > 0 {
                self.path.push('/');
            }
            self.path.push_str(segment);
        }
        let prefix_len = self.path.len();
        if prefix_len > 0 {
            self.path.push('/');
        }
        self.path.push_str(name.unwrap_or_default());
        let digest = digest.unwrap_or_default();
        let length = length.unwrap_or_default();
        Some(self.reader.file_of(&self.path, prefix_len, is, digest, length))
    }
}

fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message as _;

    use super::{
        super::{from_proto, proto},
        *,
    };
    use crate::{
        digest::DigestFunction,
        proto::build_event_stream::{
            build_event::Payload,
            build_event_id::{Id, NamedSetOfFilesId},
            file::File as Oneof,
        },
    };

    const SHA256: &str = "2c8b08da5ce60398e1f19af0e5dccc744df274b826abe585eaba68c525434806";

    fn event(set: proto::NamedSetOfFiles) -> proto::BuildEvent {
        let id = Id::NamedSet(NamedSetOfFilesId { id: "7".to_owned() });
        proto::BuildEvent {
            id: Some(proto::BuildEventId { id: Some(id) }),
            payload: Some(Payload::NamedSetOfFiles(set)),
            ..proto::BuildEvent::default()
        }
    }

    fn read(bytes: &[u8], default_function: Option<DigestFunction>) -> Option<StreamEvent> {
        let message = bytes.len();
        let reader = Reader {
            default_function,
            message,
        };
        decode(&Bytes::copy_from_slice(bytes), reader)
    }

    #[test]
    fn what_build_tools_send_needs_no_generated_code() {
        let file = proto::File {
            path_prefix: ["bazel-out", "k8", "bin"].map(str::to_owned).to_vec(),
            name: "a/b.txt".to_owned(),
            file: Some(Oneof::Uri(format!("bytestream://h:1/i/blobs/{SHA256}/42"))),
            digest: SHA256.to_owned(),
            length: 42,
        };
        let message = event(proto::NamedSetOfFiles {
            files: vec![file],
            file_sets: vec![NamedSetOfFilesId { id: "3".to_owned() }],
        });
        let framed = read(&message.encode_to_vec(), None).unwrap();
        assert_eq!(framed, from_proto(message, None));
        let Event::NamedSet(set) = framed.event else {
            panic!("{framed:?}");
        };
        assert_eq!(
            (set.id.as_str(), set.children.as_slice()),
            ("7", &["3".to_owned()][..])
        );
        assert_eq!(
            (&*set.files[0].path, set.files[0].name()),
            ("bazel-out/k8/bin/a/b.txt", "a/b.txt")
        );
        assert_eq!(set.authority.as_deref(), Some("h:1"));
    }

    #[test]
    fn what_is_unusual_is_left_to_the_generated_code() {
        let whole = event(proto::NamedSetOfFiles::default());
        assert!(read(&whole.encode_to_vec(), None).is_some());
        let child = proto::BuildEvent {
            children: vec![proto::BuildEventId::default()],
            ..whole.clone()
        };
        let without_id = proto::BuildEvent {
            id: None,
            ..whole.clone()
        };
        let without_payload = proto::BuildEvent {
            payload: None,
            ..whole.clone()
        };
        for message in [child, without_id, without_payload] {
            assert_eq!(read(&message.encode_to_vec(), None), None, "{message:?}");
        }
        let twice = [whole.encode_to_vec(), whole.encode_to_vec()].concat();
        assert_eq!(read(&twice, None), None);
        let unknown = [whole.encode_to_vec(), vec![0xa0, 0x3f, 1]].concat();
        assert_eq!(read(&unknown, None), None);
    }

    fn digests() -> impl Strategy<Value = String> {
        prop_oneof![
            Just(SHA256.to_owned()),
            Just(SHA256.to_uppercase()),
            Just(String::new()),
            "[0-9a-fx]{0,6}",
            "[0-9a-f]{40}",
        ]
    }

    fn files() -> impl Strategy<Value = proto::File> {
        let uris = (
            "(bytestream://|file://)?[a-z]{0,3}(/[a-z]{1,3}|/blobs|/compressed-blobs/zstd|/blake3){0,3}/",
            digests(),
            "/(0|00|7|42|-1|42x)?",
        )
            .prop_map(|(start, digest, end)| Oneof::Uri(format!("{start}{digest}{end}")));
        let content = prop_oneof![
            4 => uris.prop_map(Some),
            1 => "[a-z./]{0,5}".prop_map(|target| Some(Oneof::SymlinkTargetPath(target))),
            1 => any::<Vec<u8>>().prop_map(|bytes| Some(Oneof::Contents(bytes.into()))),
            1 => Just(None),
        ];
        let prefix = proptest::collection::vec("[a-zé]{0,3}", 0..10);
        let length = prop_oneof![Just(0), Just(7), Just(42), Just(-1), any::<i64>()];
        ("[a-z/é]{0,8}", content, prefix, digests(), length).prop_map(
            |(name, file, path_prefix, digest, length)| proto::File {
                name,
                file,
                path_prefix,
                digest,
                length,
            },
        )
    }

    fn functions() -> impl Strategy<Value = Option<DigestFunction>> {
        prop_oneof![
            Just(None),
            Just(Some(DigestFunction::Blake3)),
            Just(Some(DigestFunction::Sha1)),
        ]
    }

    proptest! {
        #[test]
        fn both_ways_to_read_a_set_agree(
            files in proptest::collection::vec(files(), 0..6),
            children in proptest::collection::vec("[0-9]{0,3}", 0..4),
            last_message in any::<bool>(),
            function in functions(),
        ) {
            let message = proto::BuildEvent {
                last_message,
                ..event(proto::NamedSetOfFiles {
                    files,
                    file_sets: children.into_iter().map(|id| NamedSetOfFilesId { id }).collect(),
                })
            };
            if let Some(framed) = read(&message.encode_to_vec(), function) {
                prop_assert_eq!(framed, from_proto(message, function));
            }
        }

        /// Whatever bytes are read here, the generated code reads as the same.
        #[test]
        fn damage_is_not_read_otherwise(
            files in proptest::collection::vec(files(), 1..4),
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
            cut in any::<bool>(),
        ) {
            let mut bytes = event(proto::NamedSetOfFiles { files, file_sets: Vec::new() }).encode_to_vec();
            let at = at.index(bytes.len());
            if cut {
                bytes.truncate(at);
            } else {
                bytes[at] = byte;
            }
            if let Some(framed) = read(&bytes, None) {
                prop_assert_eq!(framed, from_proto(proto::BuildEvent::decode(&*bytes).unwrap(), None));
            }
        }
    }
}
