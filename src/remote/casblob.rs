//! bazel-remote's file format for compressed blobs, "casblob", as its object stores hold it below `cas.v2/`.
//!
//! All numbers are little endian: a zstd skippable frame's magic (4 bytes) and the length of the rest of the header (4,
//! that is 21 + 8n), the blob's plain size (8), how the chunks are packed (1: 0 plain, 1 zstd), the plain size of a chunk
//! (4), n (8), and n offsets (8 each) of the chunks in the object, the last one being the object's size. Then the chunks,
//! each a zstd frame of its own (bazel-remote's `cache/disk/casblob`). Of plain ones there is one chunk, and bazel-remote
//! does not fill in their offsets.
//!
//! Buckets hold files of others under such keys, so nothing of a header is believed before it fits together.

use std::io;

use bytes::Bytes;

use super::inflate::Inflater;

/// The magic of the skippable frame that the header is.
const MAGIC: u32 = 0x184D_2A50;
/// The header's bytes before the offsets.
pub(crate) const FIXED: usize = 29;
/// The most offsets that are read: a tebibyte in the usual chunks, 8 MiB of memory.
const MAX_OFFSETS: u64 = (1 << 20) + 1;

/// Why an object is not a casblob.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CasblobError {
    #[error("is not a casblob: begins with {0:#010x}")]
    Magic(u32),
    #[error("is a casblob with a wrong header: {0}")]
    Header(&'static str),
    #[error("is a casblob of {found} bytes, not {expected}")]
    Size { found: u64, expected: u64 },
    #[error("is a casblob whose chunks are packed in the unknown way {0}")]
    Packing(u8),
    #[error("ends within the header of a casblob")]
    Short,
    #[error("contains a chunk that cannot be unpacked: {0}")]
    Chunk(String),
}

/// How the chunks are packed, and where they are.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Chunks {
    Plain,
    Zstd { plain_size: u64, offsets: Vec<u64> },
}

/// A header that fits together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    length: u64,
    size: u64,
    chunks: Chunks,
}

/// What the first bytes of an object are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Parsed {
    /// The header has this many bytes, and not all of them are here.
    Needs(usize),
    Header(Header),
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

/// A number that its writer keeps as a signed one; `None` if it is negative.
fn i64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(8)?)?;
    u64::try_from(i64::from_le_bytes(bytes.try_into().ok()?)).ok()
}

impl Header {
    /// Reads the header of an object of this size, if that is known, from its first bytes.
    ///
    /// # Errors
    /// When these cannot be the first bytes of a casblob of that size.
    pub(crate) fn parse(bytes: &[u8], object: Option<u64>) -> Result<Parsed, CasblobError> {
        let wrong = CasblobError::Header;
        if let Some(magic) = u32_at(bytes, 0).filter(|magic| *magic != MAGIC) {
            return Err(CasblobError::Magic(magic));
        }
        if object.is_some_and(|object| object <= FIXED as u64) {
            return Err(CasblobError::Short);
        }
        let (Some(rest), Some(&packing), Some(plain_size), true) = (
            u32_at(bytes, 4),
            bytes.get(16),
            u32_at(bytes, 17),
            bytes.len() >= FIXED,
        ) else {
            return Ok(Parsed::Needs(FIXED));
        };
        let size = i64_at(bytes, 8)
            .filter(|size| *size > 0)
            .ok_or(wrong("the blob's size is not positive"))?;
        let count = i64_at(bytes, 21)
            .filter(|count| (2..=MAX_OFFSETS).contains(count))
            .ok_or(wrong("the number of chunks is out of bounds"))?;
        if u64::from(rest) != 21 + 8 * count {
            return Err(wrong("its length does not fit the number of chunks"));
        }
        let length = FIXED as u64 + 8 * count;
        if object.is_some_and(|object| length >= object) {
            return Err(CasblobError::Short);
        }
        let chunks = match packing {
            0 => {
                if object.is_some_and(|object| length.checked_add(size) != Some(object)) {
                    return Err(wrong("the blob's size does not fit the object's"));
                }
                Chunks::Plain
            }
            1 => {
                let plain_size = u64::from(plain_size);
                if plain_size == 0 || size.div_ceil(plain_size) != count - 1 {
                    return Err(wrong("the number of chunks does not fit the blob's size"));
                }
                // At most MAX_OFFSETS, see above.
                let whole = usize::try_from(length).map_err(|_| CasblobError::Short)?;
                let Some(table) = bytes.get(FIXED..whole) else {
                    return Ok(Parsed::Needs(whole));
                };
                let offsets = Self::offsets(table, length, object)?;
                Chunks::Zstd { plain_size, offsets }
            }
            other => return Err(CasblobError::Packing(other)),
        };
        let header = Self { length, size, chunks };
        match usize::try_from(length) {
            Ok(whole) if bytes.len() < whole => Ok(Parsed::Needs(whole)),
            _ => Ok(Parsed::Header(header)),
        }
    }

    fn offsets(table: &[u8], length: u64, object: Option<u64>) -> Result<Vec<u64>, CasblobError> {
        let wrong = CasblobError::Header;
        let offsets = (0..table.len() / 8)
            .map(|i| i64_at(table, i * 8))
            .collect::<Option<Vec<u64>>>()
            .ok_or(wrong("an offset is negative"))?;
        if offsets.first() != Some(&length) {
            return Err(wrong("the first chunk does not follow the header"));
        }
        if offsets.windows(2).any(|two| two[0] >= two[1]) {
            return Err(wrong("the offsets do not rise"));
        }
        if object.is_some_and(|object| offsets.last() != Some(&object)) {
            return Err(wrong("the last offset is not the object's size"));
        }
        Ok(offsets)
    }

    /// The blob's plain size, in bytes.
    pub(crate) const fn size(&self) -> u64 {
        self.size
    }

    /// Where to read the object for the blob's bytes from `offset` on, and how many plain bytes to leave out then.
    pub(crate) fn place_of(&self, offset: u64) -> (u64, u64) {
        match &self.chunks {
            Chunks::Plain => (self.length + offset.min(self.size), 0),
            Chunks::Zstd { plain_size, offsets } => {
                let chunk = offset / plain_size;
                let begins = usize::try_from(chunk).ok().and_then(|chunk| offsets.get(chunk));
                match (begins, offsets.last()) {
                    (Some(begins), _) => (*begins, offset % plain_size),
                    // Past the end: nothing more comes.
                    (None, end) => (end.copied().unwrap_or_default(), 0),
                }
            }
        }
    }
}

/// The plain size of the blob whose object begins so, for a hint: the rest of the header is not looked at.
///
/// # Errors
/// When these are not the first bytes of a casblob.
pub(crate) fn plain_size(beginning: &[u8]) -> Result<u64, CasblobError> {
    match u32_at(beginning, 0) {
        None => Err(CasblobError::Short),
        Some(MAGIC) => i64_at(beginning, 8)
            .filter(|size| *size > 0)
            .ok_or(CasblobError::Header("the blob's size is not positive")),
        Some(magic) => Err(CasblobError::Magic(magic)),
    }
}

/// Unpacks a casblob that comes in pieces.
pub(crate) struct Decoder {
    /// The blob's size.
    size: u64,
    object: Option<u64>,
    state: State,
}

enum State {
    /// The header's bytes so far.
    Head(Vec<u8>),
    Plain,
    Zstd(Box<Inflater>),
}

impl Decoder {
    /// For a whole object of this size, if that is known, that should hold a blob of `size` bytes.
    pub(crate) const fn new(size: u64, object: Option<u64>) -> Self {
        Self {
            size,
            object,
            state: State::Head(Vec::new()),
        }
    }

    /// For what comes from [`Header::place_of`] on.
    ///
    /// # Errors
    /// When there is no memory for the decoder.
    pub(crate) fn from_chunk(header: &Header) -> Result<Self, CasblobError> {
        Ok(Self {
            size: header.size,
            object: None,
            state: State::after(header)?,
        })
    }

    /// Takes some of `input` and gives a piece of what it holds, at most one byte more than `left`. An empty piece means
    /// that all input was taken and holds no more.
    ///
    /// # Errors
    /// When it is not a casblob, or one of another blob.
    pub(crate) fn run(&mut self, input: &mut &[u8], left: u64) -> Result<Bytes, CasblobError> {
        while let State::Head(head) = &mut self.state {
            match Header::parse(head, self.object)? {
                Parsed::Needs(whole) => {
                    let (taken, rest) = input.split_at(input.len().min(whole.saturating_sub(head.len())));
                    if taken.is_empty() {
                        return Ok(Bytes::new());
                    }
                    head.extend_from_slice(taken);
                    *input = rest;
                }
                Parsed::Header(header) if header.size != self.size => {
                    return Err(CasblobError::Size {
                        found: header.size,
                        expected: self.size,
                    });
                }
                Parsed::Header(header) => self.state = State::after(&header)?,
            }
        }
        match &mut self.state {
            State::Zstd(inflater) => inflater.run(input, left).map_err(chunk),
            State::Plain | State::Head(_) => {
                let most = usize::try_from(left.saturating_add(1)).unwrap_or(usize::MAX);
                let (taken, rest) = input.split_at(input.len().min(most));
                *input = rest;
                Ok(Bytes::copy_from_slice(taken))
            }
        }
    }
}

fn chunk(error: io::Error) -> CasblobError {
    CasblobError::Chunk(error.to_string())
}

impl State {
    fn after(header: &Header) -> Result<Self, CasblobError> {
        match header.chunks {
            Chunks::Plain => Ok(Self::Plain),
            Chunks::Zstd { .. } => Inflater::new()
                .map(|inflater| Self::Zstd(Box::new(inflater)))
                .map_err(chunk),
        }
    }
}

/// A casblob as bazel-remote writes it, with chunks of a size.
#[cfg(any(test, fuzzing))]
#[allow(clippy::unwrap_used, reason = "for tests")]
pub(crate) fn encode(plain: &[u8], chunk: u32) -> Vec<u8> {
    let packed: Vec<Vec<u8>> = plain
        .chunks(chunk as usize)
        .map(|chunk| zstd::encode_all(chunk, 3).unwrap())
        .collect();
    let count = packed.len() as u64 + 1;
    let mut object = Vec::new();
    object.extend(MAGIC.to_le_bytes());
    object.extend(u32::try_from(21 + 8 * count).unwrap().to_le_bytes());
    object.extend((plain.len() as u64).to_le_bytes());
    object.push(1);
    object.extend(chunk.to_le_bytes());
    object.extend(count.to_le_bytes());
    let mut at = FIXED as u64 + 8 * count;
    for chunk in &packed {
        object.extend(at.to_le_bytes());
        at += chunk.len() as u64;
    }
    object.extend(at.to_le_bytes());
    object.extend(packed.concat());
    object
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(length: usize) -> Vec<u8> {
        (0..length as u64).map(|i| ((i * i) >> 9) as u8).collect()
    }

    fn header(object: &[u8]) -> Header {
        match Header::parse(object, Some(object.len() as u64)).unwrap() {
            Parsed::Header(header) => header,
            Parsed::Needs(_) => panic!("it is whole"),
        }
    }

    fn decode(mut decoder: Decoder, object: &[u8], pieces: usize) -> Result<Vec<u8>, CasblobError> {
        let mut out = Vec::new();
        for piece in object.chunks(pieces) {
            let mut input = piece;
            loop {
                let left = decoder.size.saturating_sub(out.len() as u64);
                let bytes = decoder.run(&mut input, left)?;
                if bytes.is_empty() || out.len() as u64 > decoder.size {
                    break;
                }
                out.extend_from_slice(&bytes);
            }
        }
        Ok(out)
    }

    /// What bazel-remote writes for a plain blob: one chunk, whose end it leaves zero.
    fn plain(blob: &[u8]) -> Vec<u8> {
        let mut object = encode(b"x", 1 << 20)[..FIXED + 16].to_vec();
        object[8..16].copy_from_slice(&(blob.len() as u64).to_le_bytes());
        object[16] = 0;
        object[FIXED..FIXED + 8].copy_from_slice(&29_u64.to_le_bytes());
        object[FIXED + 8..].fill(0);
        object.extend_from_slice(blob);
        object
    }

    #[test]
    fn both_kinds_are_read_in_pieces_of_any_size() {
        let blob = noise(300_000);
        for object in [encode(&blob, 1 << 16), encode(&blob, 1 << 20), plain(&blob)] {
            for pieces in [1, 1000, object.len()] {
                for known in [None, Some(object.len() as u64)] {
                    let decoder = Decoder::new(blob.len() as u64, known);
                    assert!(decode(decoder, &object, pieces).unwrap() == blob);
                }
            }
            assert_eq!(header(&object).size(), 300_000);
        }
        // As a zstd stream it is the blob, too.
        assert!(zstd::decode_all(&encode(&blob, 1 << 16)[..]).unwrap() == blob);
    }

    #[test]
    fn every_offset_has_its_chunk() {
        let blob = noise(200_000);
        for object in [encode(&blob, 1 << 16), plain(&blob)] {
            let header = header(&object);
            for offset in [0, 1, 65_535, 65_536, 131_072, 199_999, 200_000] {
                let (at, skip) = header.place_of(offset);
                let decoder = Decoder::from_chunk(&header).unwrap();
                let rest = decode(decoder, &object[usize::try_from(at).unwrap()..], 7000).unwrap();
                let skip = usize::try_from(skip).unwrap();
                assert!(
                    rest[skip..] == blob[usize::try_from(offset).unwrap()..],
                    "{offset}"
                );
            }
        }
    }

    #[test]
    fn foreign_files_are_refused_before_anything_is_allocated() {
        let good = encode(&noise(200_000), 1 << 16);
        let with = |at: usize, bytes: &[u8]| {
            let mut object = good.clone();
            object[at..at + bytes.len()].copy_from_slice(bytes);
            object
        };
        let second = FIXED + 8;
        for (object, part) in [
            (
                b"10000;chunk-signature=0123456789abcdef".to_vec(),
                "not a casblob",
            ),
            (good[..20].to_vec(), "ends within"),
            (good[..40].to_vec(), "ends within"),
            (with(8, &[0xff; 8]), "not positive"),
            (with(8, &[0; 8]), "not positive"),
            (with(16, &[7]), "unknown way 7"),
            (with(17, &[0; 4]), "number of chunks"),
            (with(21, &(1_u64 << 60).to_le_bytes()), "out of bounds"),
            (with(21, &1_u64.to_le_bytes()), "out of bounds"),
            (with(21, &[0xff; 8]), "out of bounds"),
            (with(4, &[0xff; 4]), "length does not fit"),
            (with(FIXED, &1_u64.to_le_bytes()), "follow the header"),
            (with(second, &[0; 8]), "do not rise"),
            (with(second, &[0xff; 8]), "negative"),
            ([good.clone(), vec![0]].concat(), "object's size"),
            (good[..good.len() - 1].to_vec(), "object's size"),
            ([plain(b"abc"), vec![0]].concat(), "does not fit the object"),
        ] {
            let object_size = Some(object.len() as u64);
            let error = Header::parse(&object, object_size).unwrap_err().to_string();
            assert!(error.contains(part), "{error}, not {part}");
        }
        let error = decode(Decoder::new(7, None), &good, 100).unwrap_err();
        let (found, expected) = (200_000, 7);
        assert_eq!(error, CasblobError::Size { found, expected });
    }
}
