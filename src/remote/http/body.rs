//! Bodies as they come over the line: plain, or in one of the encodings that servers use.

use std::io::{self, Write as _};

use bytes::{Buf as _, Bytes};
use flate2::write::MultiGzDecoder;
use http::{HeaderMap, header};

use crate::remote::inflate::Inflater;

/// How much is given to gzip's decoder at once, in bytes: at most a thousand times as much comes out.
const BITE: usize = 4 << 10;

/// Undoes an encoding.
pub(super) enum Decoder {
    Plain,
    Zstd(Box<Inflater>),
    Gzip(Box<MultiGzDecoder<Vec<u8>>>),
}

impl Decoder {
    /// For the encoding that a head names.
    ///
    /// # Errors
    /// When it cannot be decoded.
    pub(super) fn of(headers: &HeaderMap) -> io::Result<Self> {
        let encoding = encoding(headers);
        match &*encoding {
            "" => Ok(Self::Plain),
            "zstd" => Ok(Self::Zstd(Box::new(Inflater::new()?))),
            "gzip" | "x-gzip" => Ok(Self::Gzip(Box::new(MultiGzDecoder::new(Vec::new())))),
            other => Err(io::Error::other(format!(
                "the server sent an encoding that was not requested: {other:?}"
            ))),
        }
    }

    pub(super) const fn is_plain(&self) -> bool {
        matches!(self, Self::Plain)
    }

    /// Takes some of `input` and gives a piece of what it holds: of zstd, at most one byte more than `left`. An empty
    /// piece means that all input was taken and holds no more.
    ///
    /// # Errors
    /// When the input is not in the encoding.
    pub(super) fn run(&mut self, input: &mut Bytes, left: u64) -> io::Result<Bytes> {
        match self {
            Self::Plain => Ok(std::mem::take(input)),
            Self::Zstd(inflater) => {
                let mut rest = &**input;
                let piece = inflater.run(&mut rest, left)?;
                let taken = input.len() - rest.len();
                input.advance(taken);
                Ok(piece)
            }
            Self::Gzip(decoder) => {
                while !input.is_empty() {
                    let bite = input.split_to(input.len().min(BITE));
                    decoder.write_all(&bite).map_err(not_gzip)?;
                    if !decoder.get_ref().is_empty() {
                        break;
                    }
                }
                Ok(std::mem::take(decoder.get_mut()).into())
            }
        }
    }

    /// At the end of the input: what was held back.
    ///
    /// # Errors
    /// When the input was cut.
    pub(super) fn finish(&mut self) -> io::Result<Bytes> {
        match self {
            Self::Plain | Self::Zstd(_) => Ok(Bytes::new()),
            Self::Gzip(decoder) => {
                decoder.try_finish().map_err(not_gzip)?;
                Ok(std::mem::take(decoder.get_mut()).into())
            }
        }
    }
}

fn not_gzip(error: io::Error) -> io::Error {
    io::Error::other(format!("not gzip data: {error}"))
}

/// The encoding that a head names, in lower case; empty where it names none.
pub(super) fn encoding(headers: &HeaderMap) -> String {
    let mut all = Vec::new();
    for value in headers.get_all(header::CONTENT_ENCODING) {
        let value = String::from_utf8_lossy(value.as_bytes()).to_ascii_lowercase();
        all.extend(value.split(',').map(|word| word.trim().to_owned()));
    }
    all.retain(|word| !word.is_empty() && word != "identity");
    all.join(",")
}

/// The length that a head names.
pub(super) fn length(headers: &HeaderMap) -> Option<u64> {
    headers
        .get(header::CONTENT_LENGTH)?
        .to_str()
        .ok()?
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(name: &'static str, value: &'static str) -> HeaderMap {
        let mut map = HeaderMap::new();
        map.insert(name, value.parse().unwrap());
        map
    }

    fn decoded(mut decoder: Decoder, bytes: &[u8], most: u64) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        for piece in bytes.chunks(1000) {
            let mut piece = Bytes::copy_from_slice(piece);
            loop {
                let out = decoder.run(&mut piece, most.saturating_sub(all.len() as u64))?;
                if out.is_empty() {
                    break;
                }
                all.extend_from_slice(&out);
            }
        }
        all.extend_from_slice(&decoder.finish()?);
        Ok(all)
    }

    #[test]
    fn what_is_packed_is_unpacked_in_one_member_or_several() {
        let plain: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        let gzip = |bytes: &[u8]| {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        };
        let (first, second) = plain.split_at(1234);
        let gzipped = [gzip(first), gzip(second)].concat();
        let zstd = zstd::bulk::compress(&plain, 3).unwrap();
        let of = |name| Decoder::of(&head("content-encoding", name)).unwrap();
        assert!(decoded(of("GZIP"), &gzipped, u64::MAX).unwrap() == plain);
        assert!(decoded(of("zstd"), &zstd, u64::MAX).unwrap() == plain);
        assert!(decoded(of("identity"), &plain, u64::MAX).unwrap() == plain);
        let cut = &gzipped[..gzipped.len() - 9];
        assert!(decoded(of("gzip"), cut, u64::MAX).is_err());
        assert!(decoded(of("gzip"), &plain, u64::MAX).is_err());
        assert!(Decoder::of(&head("content-encoding", "br")).is_err());
        assert!(Decoder::of(&head("content-encoding", "gzip, zstd")).is_err());
    }

    #[test]
    fn a_length_is_a_number_or_none() {
        assert_eq!(length(&head("content-length", "17")), Some(17));
        assert_eq!(length(&head("content-length", "many")), None);
    }
}
