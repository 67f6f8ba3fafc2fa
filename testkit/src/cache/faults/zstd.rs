//! zstd data that is not what it should be.

use std::io;

use super::blob::BlobFault;

const LEVEL: i32 = 1;
/// Bytes in a block of a bomb, the most that a block may have.
const BLOCK: u32 = 128 << 10;
/// A frame of nothing: magic, a single segment of 0 bytes, a last raw block of 0 bytes.
const EMPTY_FRAME: [u8; 9] = [0x28, 0xb5, 0x2f, 0xfd, 0x20, 0, 1, 0, 0];

/// The bytes as compressed by this fault; `None` if it is not a compression fault.
pub(in super::super) fn packed(bytes: &[u8], fault: BlobFault) -> Option<Vec<u8>> {
    let whole = || pack(bytes).ok();
    match fault {
        BlobFault::TruncateCompression => {
            let mut packed = whole()?;
            packed.truncate(packed.len() - packed.len().min(4));
            Some(packed)
        }
        BlobFault::Bomb(size) => Some(bomb(size)),
        BlobFault::ManyFrames => {
            let pieces = bytes.chunks((bytes.len() / 3).max(1));
            Some(pieces.filter_map(|piece| pack(piece).ok()).flatten().collect())
        }
        BlobFault::TrailingGarbage => {
            let mut packed = whole()?;
            packed.extend_from_slice(b"no zstd, but something else");
            Some(packed)
        }
        BlobFault::EmptyFrames(size) => {
            let count = usize::try_from(size).ok()? / EMPTY_FRAME.len();
            let mut packed = EMPTY_FRAME.repeat(count);
            packed.extend(whole()?);
            Some(packed)
        }
        _ => None,
    }
}

fn pack(bytes: &[u8]) -> io::Result<Vec<u8>> {
    zstd::bulk::compress(bytes, LEVEL)
}

/// A frame of that many zeros, written by hand: every block says "one byte, 128 Ki times" in four bytes.
fn bomb(size: u64) -> Vec<u8> {
    // Magic; no content size; a window of 128 KiB.
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x38];
    let blocks = size.div_ceil(u64::from(BLOCK)).max(1);
    for block in 1..=blocks {
        let head = u32::from(block == blocks) | 1 << 1 | BLOCK << 3;
        frame.extend_from_slice(&head.to_le_bytes()[..3]);
        frame.push(0);
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpacked(fault: BlobFault) -> io::Result<Vec<u8>> {
        zstd::decode_all(&*packed(b"some bytes and more", fault).unwrap())
    }

    #[test]
    fn what_is_allowed_unpacks_and_what_is_not_does_not() {
        for fault in [BlobFault::ManyFrames, BlobFault::EmptyFrames(1000)] {
            assert_eq!(unpacked(fault).unwrap(), b"some bytes and more", "{fault:?}");
        }
        for fault in [BlobFault::TruncateCompression, BlobFault::TrailingGarbage] {
            assert!(unpacked(fault).is_err(), "{fault:?}");
        }
        assert_eq!(packed(b"x", BlobFault::Corrupt), None);
    }

    #[test]
    fn a_bomb_is_small_and_unpacks_to_what_it_says() {
        let zeros = unpacked(BlobFault::Bomb(10 << 20)).unwrap();
        assert!(zeros.len() == 10 << 20 && zeros.iter().all(|b| *b == 0));
        assert!(bomb(1 << 30).len() < 40_000);
    }
}
