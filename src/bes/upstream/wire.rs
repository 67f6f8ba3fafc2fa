//! Protobuf's wire format, field by field, where what is not known has to stay as it is.

use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};

/// Not protobuf, or with groups, which nobody uses any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// A field of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Field<'a> {
    pub(super) number: u32,
    /// What is inside, if it is a string, bytes or a message.
    pub(super) inside: Option<&'a [u8]>,
    /// All of it, with its key.
    pub(super) raw: &'a [u8],
}

/// The fields of an encoded message in their order. Ends behind the first one that is malformed.
pub(super) struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(super) const fn of(message: &'a [u8]) -> Self {
        Self { rest: message }
    }

    fn field(&mut self) -> Result<Field<'a>, Malformed> {
        let start = self.rest;
        let mut rest = start;
        let (number, wire_type) = decode_key(&mut rest).map_err(|_| Malformed)?;
        let mut inside = None;
        let len = match wire_type {
            WireType::Varint => {
                decode_varint(&mut rest).map_err(|_| Malformed)?;
                0
            }
            WireType::SixtyFourBit => 8,
            WireType::ThirtyTwoBit => 4,
            WireType::LengthDelimited => {
                let len = decode_varint(&mut rest).map_err(|_| Malformed)?;
                let len = usize::try_from(len).map_err(|_| Malformed)?;
                inside = Some(rest.get(..len).ok_or(Malformed)?);
                len
            }
            WireType::StartGroup | WireType::EndGroup => return Err(Malformed),
        };
        self.rest = rest.get(len..).ok_or(Malformed)?;
        Ok(Field {
            number,
            inside,
            raw: &start[..start.len() - self.rest.len()],
        })
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<Field<'a>, Malformed>;

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

/// The submessage of this number; the last one, if there are several.
pub(super) fn submessage(message: &[u8], number: u32) -> Option<&[u8]> {
    Fields::of(message)
        .map_while(Result::ok)
        .filter(|field| field.number == number)
        .filter_map(|field| field.inside)
        .last()
}

/// Appends a field with something inside.
pub(super) fn put(number: u32, inside: &[u8], to: &mut Vec<u8>) {
    encode_key(number, WireType::LengthDelimited, to);
    encode_varint(inside.len() as u64, to);
    to.extend_from_slice(inside);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fields_of_all_types_are_told_apart() {
        // 1: varint 150, 2: "hi", 3: fixed32, 4: fixed64.
        let message = b"\x08\x96\x01\x12\x02hi\x1d\x01\x02\x03\x04\x21\x01\x02\x03\x04\x05\x06\x07\x08";
        let fields: Vec<_> = Fields::of(message).map(Result::unwrap).collect();
        let numbers: Vec<_> = fields.iter().map(|f| f.number).collect();
        assert_eq!(numbers, [1, 2, 3, 4]);
        assert_eq!(fields[1].inside, Some(&b"hi"[..]));
        assert_eq!(fields.iter().map(|f| f.raw).collect::<Vec<_>>().concat(), message);
        let mut again = Vec::new();
        put(2, b"hi", &mut again);
        assert_eq!(again, fields[1].raw);
        for cut in [b"\x12\x03hi".as_slice(), b"\x08", b"\x0b\x0c", b"\x1d\x01"] {
            assert_eq!(Fields::of(cut).last(), Some(Err(Malformed)), "{cut:?}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let read: Vec<u8> = Fields::of(&bytes).map_while(Result::ok).flat_map(|f| f.raw.to_vec()).collect();
            prop_assert!(bytes.starts_with(&read));
        }
    }
}
