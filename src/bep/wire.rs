//! Protobuf's wire format, field by field: for messages that are too frequent to be decoded whole, and for those whose
//! unknown fields have to stay as they are.
//!
//! The numbers of fields come from `proto/`: `build.rs` makes a module for each message of Bazel's protocol ([`bep`]), of
//! the event service's ([`bes`]) and of protobuf's own types ([`protobuf`]).

use prost::{
    DecodeError,
    encoding::{DecodeContext, WireType, decode_key, decode_varint, encode_key, encode_varint, skip_field},
};

#[allow(missing_docs, unreachable_pub, dead_code, reason = "generated")]
mod numbers {
    include!(concat!(env!("OUT_DIR"), "/field_numbers.rs"));
}

pub(crate) use numbers::{bep, bes, protobuf};

/// The bytes are not a protobuf message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a protobuf message")]
pub(crate) struct Malformed;

impl From<DecodeError> for Malformed {
    fn from(_: DecodeError) -> Self {
        Self
    }
}

/// What a field holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Value<'a> {
    /// A varint: an integer, a boolean or an enum.
    Number(u64),
    /// A string, bytes or a message.
    Bytes(&'a [u8]),
    /// A number of fixed length, or a group.
    Other,
}

/// A field of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Field<'a> {
    pub(crate) number: u32,
    pub(crate) value: Value<'a>,
    /// All of it, with its key.
    pub(crate) raw: &'a [u8],
}

impl<'a> Field<'a> {
    /// What is inside, if it is a string, bytes or a message.
    pub(crate) const fn inside(&self) -> Option<&'a [u8]> {
        match self.value {
            Value::Bytes(inside) => Some(inside),
            Value::Number(_) | Value::Other => None,
        }
    }
}

/// The fields of an encoded message in their order. Ends after the first one that is malformed.
pub(crate) struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(crate) const fn of(message: &'a [u8]) -> Self {
        Self { rest: message }
    }

    #[inline]
    fn field(&mut self) -> Result<Field<'a>, Malformed> {
        let start = self.rest;
        let mut rest = start;
        let (number, wire_type) = decode_key(&mut rest)?;
        let value = match wire_type {
            WireType::Varint => Value::Number(decode_varint(&mut rest)?),
            WireType::LengthDelimited => {
                let length = usize::try_from(decode_varint(&mut rest)?).map_err(|_| Malformed)?;
                let (inside, after) = rest.split_at_checked(length).ok_or(Malformed)?;
                rest = after;
                Value::Bytes(inside)
            }
            // Groups in groups are skipped down to the depth that generated code reads.
            _ => {
                skip_field(wire_type, number, &mut rest, DecodeContext::default())?;
                Value::Other
            }
        };
        self.rest = rest;
        Ok(Field {
            number,
            value,
            raw: &start[..start.len() - rest.len()],
        })
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<Field<'a>, Malformed>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.rest = &[];
        }
        Some(field)
    }
}

/// What is inside the field of this number, a string, bytes or a message; of the last one, if there are several.
pub(crate) fn inside(message: &[u8], number: u32) -> Result<Option<&[u8]>, Malformed> {
    let mut found = None;
    for field in Fields::of(message) {
        let field = field?;
        if field.number == number {
            found = Some(field.inside().ok_or(Malformed)?);
        }
    }
    Ok(found)
}

/// The `build_event_stream.BuildEvent` in a `PublishBuildToolEventStreamRequest`.
pub(crate) fn event_in(request: &[u8]) -> Option<&[u8]> {
    [
        bes::publish_build_tool_event_stream_request::ORDERED_BUILD_EVENT,
        bes::ordered_build_event::EVENT,
        bes::build_event::BAZEL_EVENT,
        protobuf::any::VALUE,
    ]
    .into_iter()
    .try_fold(request, |message, number| inside(message, number).ok().flatten())
}

/// Appends a field with something inside.
pub(crate) fn put(number: u32, inside: &[u8], to: &mut Vec<u8>) {
    encode_key(number, WireType::LengthDelimited, to);
    encode_varint(inside.len() as u64, to);
    to.extend_from_slice(inside);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fields_of_all_types_are_distinguished() {
        // 1: varint 150, 2: "hi", 3: fixed32, 4: fixed64.
        let message = b"\x08\x96\x01\x12\x02hi\x1d\x01\x02\x03\x04\x21\x01\x02\x03\x04\x05\x06\x07\x08";
        let fields: Vec<_> = Fields::of(message).map(Result::unwrap).collect();
        let numbers: Vec<_> = fields.iter().map(|f| f.number).collect();
        assert_eq!(numbers, [1, 2, 3, 4]);
        assert_eq!(fields[1].inside(), Some(&b"hi"[..]));
        assert_eq!(fields.iter().map(|f| f.raw).collect::<Vec<_>>().concat(), message);
        let mut again = Vec::new();
        put(2, b"hi", &mut again);
        assert_eq!(again, fields[1].raw);
        // Field 5 is a group with a field 1 in it.
        let group = b"\x2b\x08\x01\x2c";
        let fields: Vec<_> = Fields::of(group).map(Result::unwrap).collect();
        assert_eq!((fields.len(), fields[0].raw), (1, &group[..]));
        for cut in [
            b"\x12\x03hi".as_slice(),
            b"\x08",
            b"\x0b\x14",
            b"\x0c",
            b"\x1d\x01",
        ] {
            assert_eq!(Fields::of(cut).last(), Some(Err(Malformed)), "{cut:?}");
        }
    }

    #[test]
    fn groups_in_groups_end_nothing_but_the_message() {
        let deep = [vec![0x0b; 1 << 20], vec![0x0c; 1 << 20]].concat();
        assert_eq!(Fields::of(&deep).last(), Some(Err(Malformed)));
    }

    #[test]
    fn numbers_are_those_of_the_protocol() {
        assert_eq!(bes::build_event::BAZEL_EVENT, 60);
        assert_eq!(bep::build_event::NAMED_SET_OF_FILES, 15);
        assert_eq!(bep::build_event_id::target_completed_id::LABEL, 1);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let read: Vec<u8> = Fields::of(&bytes).map_while(Result::ok).flat_map(|f| f.raw.to_vec()).collect();
            prop_assert!(bytes.starts_with(&read));
        }
    }
}
