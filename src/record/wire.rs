//! Numbers and texts as bytes.

use prost::encoding::{decode_varint, encode_varint};

use crate::output::Stamp;

/// Reads what [`put_varint`] and the others wrote. Never panics: what is not there is `None`.
pub(in crate::record) struct Reader<'a>(pub(in crate::record) &'a [u8]);

impl<'a> Reader<'a> {
    pub(in crate::record) fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    pub(in crate::record) fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    pub(in crate::record) fn varint(&mut self) -> Option<u64> {
        decode_varint(&mut self.0).ok()
    }

    pub(in crate::record) fn index(&mut self) -> Option<usize> {
        usize::try_from(self.varint()?).ok()
    }

    pub(in crate::record) fn signed(&mut self) -> Option<i64> {
        let number = self.varint()?;
        Some((number >> 1).cast_signed() ^ -(number & 1).cast_signed())
    }

    /// A length, and that many bytes.
    pub(in crate::record) fn bytes(&mut self) -> Option<&'a [u8]> {
        let len = self.index()?;
        self.take(len)
    }

    pub(in crate::record) fn text(&mut self) -> Option<&'a str> {
        std::str::from_utf8(self.bytes()?).ok()
    }

    pub(in crate::record) fn stamp(&mut self, size: u64, device: u64) -> Option<Stamp> {
        let size = size.wrapping_add_signed(self.signed()?);
        let mtime_ns = self.signed()?;
        let ctime_ns = mtime_ns.wrapping_add(self.signed()?);
        Some(Stamp {
            size,
            mtime_ns,
            ctime_ns,
            taken_ns: ctime_ns.wrapping_add(self.signed()?),
            inode: self.varint()?,
            device,
        })
    }
}

pub(in crate::record) fn put_varint(out: &mut Vec<u8>, number: u64) {
    encode_varint(number, out);
}

pub(in crate::record) fn put_signed(out: &mut Vec<u8>, number: i64) {
    put_varint(out, ((number << 1) ^ (number >> 63)).cast_unsigned());
}

pub(in crate::record) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// A stamp without its device. Its times are close to each other, and its size is mostly the content's.
pub(in crate::record) fn put_stamp(out: &mut Vec<u8>, size: u64, stamp: &Stamp) {
    put_signed(out, stamp.size.wrapping_sub(size).cast_signed());
    put_signed(out, stamp.mtime_ns);
    put_signed(out, stamp.ctime_ns.wrapping_sub(stamp.mtime_ns));
    put_signed(out, stamp.taken_ns.wrapping_sub(stamp.ctime_ns));
    put_varint(out, stamp.inode);
}
