//! Reading journal files, from any place in them.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;

use super::{
    error::JournalError,
    format::{self, FRAME_HEAD_LEN, FrameHead, Head, Record},
};

/// Where a frame is in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FrameAt {
    pub(super) offset: u64,
    pub(super) len: u64,
    /// Bytes of its records.
    pub(super) raw: usize,
}

impl FrameAt {
    /// Bytes that reading it takes in memory.
    pub(crate) fn weight(self) -> usize {
        usize::try_from(self.len)
            .unwrap_or(usize::MAX)
            .saturating_add(self.raw)
    }
}

/// A file's head and where the frames begin.
pub(super) fn read_head(file: &File, path: &Path) -> Result<(Head, u64), JournalError> {
    let bad = |reason| JournalError::NotAJournal {
        path: path.to_owned(),
        reason,
    };
    let short = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof => bad("short header"),
        _ => JournalError::io("read", path)(error),
    };
    let mut start = [0; 8];
    file.read_exact_at(&mut start, 0).map_err(short)?;
    let len = Head::payload_len(start).map_err(bad)?;
    let mut payload = vec![0; len];
    file.read_exact_at(&mut payload, 8).map_err(short)?;
    Ok((Head::decode(&payload).map_err(bad)?, 8 + len as u64))
}

/// A frame whose checksum is right.
pub(super) struct Whole {
    pub(super) at: FrameAt,
    pub(super) head: FrameHead,
    body: Vec<u8>,
}

/// Reads the frame at `offset`; `None` where the file ends or is torn.
pub(super) fn read_whole(file: &File, path: &Path, offset: u64) -> Result<Option<Whole>, JournalError> {
    let fill = |buffer: &mut [u8], at| match file.read_exact_at(buffer, at) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(JournalError::io("read", path)(e)),
    };
    let mut head = [0; FRAME_HEAD_LEN];
    if !fill(&mut head, offset)? {
        return Ok(None);
    }
    let Some(decoded) = FrameHead::decode(&head) else {
        return Ok(None);
    };
    let body_at = offset + FRAME_HEAD_LEN as u64;
    // Before the buffer is made: a torn head can claim anything.
    let end = body_at + decoded.body_len as u64;
    if end > file.metadata().map_err(JournalError::io("read", path))?.len() {
        return Ok(None);
    }
    let mut body = vec![0; decoded.body_len];
    if !fill(&mut body, body_at)? || !decoded.verify(&head, &body) {
        return Ok(None);
    }
    Ok(Some(Whole {
        at: FrameAt {
            offset,
            len: end - offset,
            raw: decoded.raw_len,
        },
        head: decoded,
        body,
    }))
}

impl Whole {
    fn records(&self, path: &Path) -> Result<Vec<Record>, JournalError> {
        let damaged = |reason| JournalError::Damaged {
            path: path.to_owned(),
            offset: self.at.offset,
            reason,
        };
        let raw = zstd::bulk::decompress(&self.body, self.head.raw_len)
            .map_err(|_| damaged("failed to decompress it"))?;
        format::records(Bytes::from(raw)).map_err(damaged)
    }
}

/// The records of a frame that was written or found before. Blocks.
pub(crate) fn read_frame(file: &File, path: &Path, at: FrameAt) -> Result<Vec<Record>, JournalError> {
    match read_whole(file, path, at.offset)? {
        Some(whole) => whole.records(path),
        None => Err(JournalError::Damaged {
            path: path.to_owned(),
            offset: at.offset,
            reason: "wrong checksum",
        }),
    }
}

/// A frame, and the file that it is in.
#[derive(Debug, Clone)]
pub(crate) struct StoredFrame {
    pub(crate) file: Arc<File>,
    /// Path of the file, for messages.
    pub(crate) path: PathBuf,
    pub(crate) at: FrameAt,
}

impl StoredFrame {
    /// The frame's records. Blocks.
    pub(crate) fn read(&self) -> Result<Vec<Record>, JournalError> {
        read_frame(&self.file, &self.path, self.at)
    }
}

/// Iterates a file's records in the order received, up to its end or a torn tail. Blocks.
///
/// A file that is being written may be read: frames appear whole.
pub struct Records {
    file: File,
    path: PathBuf,
    next: u64,
    frame: std::vec::IntoIter<Record>,
}

impl Records {
    pub(super) fn open(path: &Path) -> Result<Self, JournalError> {
        let file = File::open(path).map_err(JournalError::io("open", path))?;
        let (_, next) = read_head(&file, path)?;
        Ok(Self {
            file,
            path: path.to_owned(),
            next,
            frame: Vec::new().into_iter(),
        })
    }
}

impl Iterator for Records {
    type Item = Result<Record, JournalError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(record) = self.frame.next() {
                return Some(Ok(record));
            }
            let whole = match read_whole(&self.file, &self.path, self.next) {
                Ok(whole) => whole?,
                Err(e) => return Some(Err(e)),
            };
            self.next += whole.at.len;
            match whole.records(&self.path) {
                Ok(records) => self.frame = records.into_iter(),
                Err(e) => return Some(Err(e)),
            }
        }
    }
}
