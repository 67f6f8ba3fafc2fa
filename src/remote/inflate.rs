//! Streaming zstd that gives out no more than was promised.

use std::io;

use bytes::Bytes;
use zstd::stream::raw::{Decoder, InBuffer, Operation as _, OutBuffer};

/// The largest piece given out.
const PIECE: usize = 256 * 1024;

/// Decompresses a stream of one or more zstd frames.
pub(crate) struct Inflater {
    decoder: Decoder<'static>,
    scratch: Box<[u8]>,
    /// Whether the last piece filled its room, so that there may be more without more input.
    more: bool,
}

impl Inflater {
    /// At the beginning of a frame.
    ///
    /// # Errors
    /// When there is no memory for the decoder.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            decoder: Decoder::new()?,
            scratch: vec![0; PIECE].into(),
            more: false,
        })
    }

    /// Takes some of `input` and gives a piece of what it holds, at most one byte more than `left`: enough to see
    /// that there is too much. An empty piece means that all input was taken and holds no more.
    ///
    /// # Errors
    /// When the input is not zstd data.
    pub(crate) fn run(&mut self, input: &mut &[u8], left: u64) -> io::Result<Bytes> {
        // zstd takes repeated calls without input or room for a fault of ours.
        if input.is_empty() && !self.more {
            return Ok(Bytes::new());
        }
        let room = usize::try_from(left.saturating_add(1)).map_or(PIECE, |left| left.min(PIECE));
        let mut from = InBuffer::around(input);
        let mut to = OutBuffer::around(&mut self.scratch[..room]);
        loop {
            let before = (from.pos(), to.pos());
            self.decoder
                .run(&mut from, &mut to)
                .map_err(|e| io::Error::other(format!("not zstd data: {e}")))?;
            let after = (from.pos(), to.pos());
            // Short of a full piece, all that could be unpacked has been.
            if after.0 == input.len() || after.1 == room || after == before {
                break;
            }
        }
        let (taken, given) = (from.pos(), to.pos());
        *input = &input[taken..];
        self.more = given == room;
        Ok(Bytes::copy_from_slice(&self.scratch[..given]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(mut input: &[u8], promised: u64) -> io::Result<Vec<u8>> {
        let mut inflater = Inflater::new().unwrap();
        let mut out = Vec::new();
        loop {
            let left = promised.saturating_sub(out.len() as u64);
            let piece = inflater.run(&mut input, left)?;
            if piece.is_empty() || out.len() as u64 > promised {
                return Ok(out);
            }
            out.extend_from_slice(&piece);
        }
    }

    #[test]
    fn several_frames_are_one_stream() {
        let plain: Vec<u8> = (0..700_000_u64).map(|i| ((i * i) >> 7) as u8).collect();
        let mut packed = zstd::encode_all(&plain[..300_000], 3).unwrap();
        packed.extend(zstd::encode_all(&plain[300_000..], 3).unwrap());
        assert_eq!(all(&packed, plain.len() as u64).unwrap(), plain);
    }

    #[test]
    fn input_may_come_in_pieces_of_any_size() {
        let plain = b"some bytes and some bytes and some bytes".repeat(50);
        let packed = zstd::encode_all(plain.as_slice(), 3).unwrap();
        let mut inflater = Inflater::new().unwrap();
        let mut out = Vec::new();
        for byte in packed.chunks(1) {
            let mut input = byte;
            loop {
                let piece = inflater
                    .run(&mut input, (plain.len() - out.len()) as u64)
                    .unwrap();
                if piece.is_empty() {
                    break;
                }
                out.extend_from_slice(&piece);
            }
        }
        assert_eq!(out, plain);
    }

    #[test]
    fn a_bomb_is_not_unpacked() {
        let packed = zstd::encode_all(vec![0; 50_000_000].as_slice(), 3).unwrap();
        let mut input = packed.as_slice();
        let piece = Inflater::new().unwrap().run(&mut input, 10).unwrap();
        assert_eq!(piece.len(), 11);
    }

    #[test]
    fn what_is_no_zstd_is_an_error() {
        assert!(all(b"plain text that is long enough", 30).is_err());
    }
}
