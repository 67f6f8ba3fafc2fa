//! Bytes as they were received, piece after piece, read as one without being put together.

use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};

/// A queue of pieces, none of them empty.
#[derive(Debug, Default)]
pub(super) struct Rope {
    pieces: VecDeque<Bytes>,
    length: usize,
}

impl Rope {
    /// Adds a piece at the end.
    pub(super) fn push(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.length += piece.len();
            self.pieces.push_back(piece);
        }
    }

    /// The first bytes as they lie in memory, at most this many.
    pub(super) fn front(&mut self, most: usize) -> Bytes {
        let length = self.chunk().len().min(most);
        self.copy_to_bytes(length)
    }
}

impl Buf for Rope {
    fn remaining(&self) -> usize {
        self.length
    }

    fn chunk(&self) -> &[u8] {
        self.pieces.front().map_or(&[], |piece| piece)
    }

    fn advance(&mut self, mut count: usize) {
        assert!(count <= self.length, "advanced past the end");
        self.length -= count;
        while count > 0 {
            // As many bytes as the length says are in the pieces.
            let Some(piece) = self.pieces.front_mut() else {
                return;
            };
            let step = piece.len().min(count);
            piece.advance(step);
            count -= step;
            if piece.is_empty() {
                self.pieces.pop_front();
            }
        }
    }

    /// A slice of the first piece where that holds all of them, else a copy.
    fn copy_to_bytes(&mut self, count: usize) -> Bytes {
        assert!(count <= self.length, "copied past the end");
        match self.pieces.front_mut() {
            Some(piece) if piece.len() > count => {
                self.length -= count;
                piece.split_to(count)
            }
            Some(piece) if piece.len() == count => {
                self.length -= count;
                self.pieces.pop_front().unwrap_or_default()
            }
            _ => {
                let mut copy = BytesMut::with_capacity(count);
                while copy.len() < count {
                    let chunk = self.chunk();
                    let step = chunk.len().min(count - copy.len());
                    copy.extend_from_slice(&chunk[..step]);
                    self.advance(step);
                }
                copy.freeze()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_read_as_one() {
        let whole: Vec<u8> = (0..100).collect();
        for size in [1, 3, 7, 100] {
            let mut rope = Rope::default();
            rope.push(Bytes::new());
            for piece in whole.chunks(size) {
                rope.push(Bytes::copy_from_slice(piece));
            }
            assert_eq!(rope.remaining(), 100);
            let mut read = rope.copy_to_bytes(10).to_vec();
            read.push(rope.get_u8());
            read.extend(rope.get_u32().to_be_bytes());
            while rope.has_remaining() {
                read.extend(rope.front(5));
            }
            assert_eq!(read, whole);
            assert!(rope.front(1).is_empty());
        }
    }

    #[test]
    fn what_is_in_one_piece_is_not_copied() {
        let piece = Bytes::from(vec![7; 100]);
        let mut rope = Rope::default();
        rope.push(piece.clone());
        rope.push(piece.clone());
        let range = piece.as_ptr_range();
        assert!(range.contains(&rope.copy_to_bytes(40).as_ptr()));
        assert!(range.contains(&rope.copy_to_bytes(60).as_ptr()));
        assert!(range.contains(&rope.front(1000).as_ptr()));
    }
}
