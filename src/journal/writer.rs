//! Appending to a stream's file.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, IoSlice, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
};

use parking_lot::Mutex;

use super::{
    error::JournalError,
    file::{FrameAt, StoredFrame, read_head, read_whole},
    format::{Batch, Head, MAX_RAW},
    store::{DAMAGED, JournalOptions, OpenMark, SETTLED, UNFINISHED},
};
use crate::open_files::patient;

/// zstd's fastest regular level: events are repetitive, so more effort buys little.
const LEVEL: i32 = 1;

/// Compressors that are idle. One has about a megabyte, which is too much for each of many streams, and for each frame
/// to begin with.
static IDLE: Mutex<Vec<zstd::bulk::Compressor<'static>>> = Mutex::new(Vec::new());
/// How many are kept.
const KEPT: usize = 4;

fn compressed(batch: &Batch) -> io::Result<Vec<u8>> {
    let Some(raw) = batch.whole() else {
        return compressed_in_pieces(batch, LEVEL);
    };
    let idle = IDLE.lock().pop();
    let mut compressor = match idle {
        Some(compressor) => compressor,
        None => zstd::bulk::Compressor::new(LEVEL)?,
    };
    let body = compressor.compress(raw)?;
    let mut idle = IDLE.lock();
    if idle.len() < KEPT {
        idle.push(compressor);
    }
    Ok(body)
}

/// Large events are compressed from where they are.
pub(super) fn compressed_in_pieces(batch: &Batch, level: i32) -> io::Result<Vec<u8>> {
    // Not moved while it grows; the system gives it page by page.
    let body = Vec::with_capacity(zstd::zstd_safe::compress_bound(batch.len()));
    let mut encoder = zstd::stream::write::Encoder::new(body, level)?;
    encoder.set_pledged_src_size(Some(batch.len() as u64))?;
    for piece in batch.pieces() {
        encoder.write_all(piece)?;
    }
    encoder.finish()
}

/// Writes two pieces with one call, as a rule.
fn write_both(mut file: &File, head: &[u8], body: &[u8]) -> io::Result<()> {
    let written = loop {
        match file.write_vectored(&[IoSlice::new(head), IoSlice::new(body)]) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    if written == 0 {
        return Err(io::ErrorKind::WriteZero.into());
    }
    file.write_all(head.get(written..).unwrap_or_default())?;
    file.write_all(&body[written.saturating_sub(head.len())..])
}

/// What a file held when it was opened.
#[derive(Debug, Default)]
pub(crate) struct Recovered {
    /// Its frames, in order.
    pub(crate) frames: Vec<FrameAt>,
    /// The highest sequence number.
    pub(crate) highest: Option<i64>,
    /// The number of the event that finished the stream.
    pub(crate) finished: Option<i64>,
    /// Whether it was marked settled.
    pub(crate) settled: bool,
}

/// Appends to one stream's file. All calls block.
pub(crate) struct Writer {
    /// Closed while nothing is left to do.
    file: Option<Arc<File>>,
    /// The one before that; frames of it that were not read back yet keep it open.
    closed: Weak<File>,
    /// The file's path without extension.
    stem: PathBuf,
    settled: bool,
    /// Where the next frame goes: everything before is whole.
    offset: u64,
    durable: bool,
    /// Bytes of the file, at most.
    most: u64,
    /// Keeps retention away from the file.
    _open: OpenMark,
}

/// An opened file: itself, whether it is marked settled, its end, its content.
type Opened = (File, bool, u64, Recovered);

impl Writer {
    /// Opens or creates `STEM.journal` or `STEM.settled`, and cuts what is torn.
    pub(super) fn open(
        stem: &Path,
        head: &Head,
        JournalOptions { durable, most }: JournalOptions,
        mark: OpenMark,
    ) -> Result<(Self, Recovered), JournalError> {
        let (file, settled, offset, recovered) = match existing(stem, head)? {
            Some(opened) => opened,
            None => create(stem, head, durable)?,
        };
        let writer = Self {
            file: Some(Arc::new(file)),
            closed: Weak::new(),
            stem: stem.to_owned(),
            settled,
            offset,
            durable,
            most,
            _open: mark,
        };
        Ok((writer, recovered))
    }

    /// The file's path, for messages.
    pub(crate) fn path(&self) -> PathBuf {
        self.stem
            .with_extension(if self.settled { SETTLED } else { UNFINISHED })
    }

    /// Nothing can be written from now on.
    #[cfg(test)]
    pub(crate) fn fill_the_disk(&mut self) {
        self.file = Some(Arc::new(options().open("/dev/full").unwrap()));
    }

    /// A frame of this file, for reading it back; none of one that is closed.
    pub(crate) fn place(&self, at: FrameAt) -> Option<StoredFrame> {
        Some(StoredFrame {
            file: self.file.clone()?,
            path: self.path(),
            at,
        })
    }

    fn opened(&mut self) -> Result<Arc<File>, JournalError> {
        if let Some(file) = &self.file {
            return Ok(Arc::clone(file));
        }
        let file = match self.closed.upgrade() {
            Some(file) => file,
            None => {
                let path = self.path();
                Arc::new(patient(|| options().open(&path)).map_err(JournalError::io("open", path))?)
            }
        };
        Ok(Arc::clone(self.file.insert(file)))
    }

    /// Appends a frame. When this returns, the operating system has it; with `durable`, the disk.
    ///
    /// # Errors
    /// When it cannot be written. The file then ends where it did before, as far as possible.
    pub(crate) fn append(&mut self, batch: &Batch) -> Result<FrameAt, JournalError> {
        let path = self.path();
        if batch.len() > MAX_RAW {
            return Err(JournalError::TooLarge {
                path,
                size: batch.len(),
            });
        }
        if self.settled {
            // Events after all: a stream that was thought broken came back.
            self.rename(false)?;
        }
        let body = compressed(batch).map_err(JournalError::io("compress for", &path))?;
        let head = batch.head(&body);
        let len = (head.len() + body.len()) as u64;
        if self.offset + len > self.most {
            return Err(JournalError::Full {
                path,
                limit: self.most,
            });
        }
        let file = self.opened()?;
        let mut written = write_both(&file, &head, &body);
        if written.is_ok() && self.durable {
            written = file.sync_data();
        }
        if let Err(e) = written {
            // A torn frame would be cut at the next start anyway, but nothing could be appended after it.
            let _ = file.set_len(self.offset);
            return Err(JournalError::io("append to", path)(e));
        }
        let at = FrameAt {
            offset: self.offset,
            len,
            raw: batch.len(),
        };
        self.offset += len;
        Ok(at)
    }

    /// Closes the file, until there is more to append.
    pub(crate) fn close(&mut self) {
        if let Some(file) = self.file.take() {
            self.closed = Arc::downgrade(&file);
        }
    }

    /// Marks the stream as settled: nothing is left to do for it.
    ///
    /// # Errors
    /// When the file cannot be renamed.
    pub(crate) fn settle(&mut self) -> Result<(), JournalError> {
        if !self.settled {
            self.rename(true)?;
        }
        // Streams that are settled are remembered for a while, and may be many.
        self.close();
        Ok(())
    }

    fn rename(&mut self, settled: bool) -> Result<(), JournalError> {
        let from = self.path();
        let to = self
            .stem
            .with_extension(if settled { SETTLED } else { UNFINISHED });
        fs::rename(&from, &to).map_err(JournalError::io("rename", from))?;
        self.settled = settled;
        if self.durable {
            sync_parent(&to)?;
        }
        Ok(())
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    // Appending mode: whatever happens to offsets here, a frame cannot land on another one.
    options
        .read(true)
        .append(true)
        .mode(0o600)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32);
    options
}

fn existing(stem: &Path, head: &Head) -> Result<Option<Opened>, JournalError> {
    for (extension, settled) in [(UNFINISHED, false), (SETTLED, true)] {
        let path = stem.with_extension(extension);
        let file = match options().open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(JournalError::io("open", path)(e)),
        };
        match read_head(&file, &path) {
            Ok((found, start)) if found.key == head.key => {
                let (end, mut recovered) = scan(&file, &path, start)?;
                recovered.settled = settled;
                return Ok(Some((file, settled, end, recovered)));
            }
            Ok(_) | Err(JournalError::NotAJournal { .. }) => {
                let aside = stem.with_extension(DAMAGED);
                tracing::warn!(journal = %path.display(), "moved an unreadable journal file aside");
                fs::rename(&path, aside).map_err(JournalError::io("move aside", path))?;
            }
            Err(e) => return Err(e),
        }
    }
    Ok(None)
}

/// Walks the frames and cuts the file after the last whole one.
fn scan(file: &File, path: &Path, start: u64) -> Result<(u64, Recovered), JournalError> {
    let mut recovered = Recovered::default();
    let mut end = start;
    while let Some(whole) = read_whole(file, path, end)? {
        end += whole.at.len;
        recovered.frames.push(whole.at);
        recovered.highest = recovered.highest.max(Some(whole.head.highest));
        if whole.head.finished {
            // The event that finishes a stream is its last.
            recovered.finished = Some(whole.head.highest);
        }
    }
    let len = file.metadata().map_err(JournalError::io("read", path))?.len();
    if len > end {
        tracing::warn!(journal = %path.display(), bytes = len - end, "truncated the torn end of a journal file");
        file.set_len(end).map_err(JournalError::io("cut", path))?;
    }
    Ok((end, recovered))
}

fn create(stem: &Path, head: &Head, durable: bool) -> Result<Opened, JournalError> {
    let path = stem.with_extension(UNFINISHED);
    let file = options()
        .create_new(true)
        .open(&path)
        .map_err(JournalError::io("create", &path))?;
    let bytes = head.encode();
    let written = (&file)
        .write_all(&bytes)
        .map_err(JournalError::io("write", &path));
    if let Err(e) = written {
        let _ = fs::remove_file(&path);
        return Err(e);
    }
    if durable {
        sync_parent(&path)?;
    }
    Ok((file, false, bytes.len() as u64, Recovered::default()))
}

/// Makes a new or renamed name survive a crash of the machine.
fn sync_parent(path: &Path) -> Result<(), JournalError> {
    let Some(parent) = path.parent() else {
        return Ok(());
    };
    File::open(parent)
        .and_then(|dir| dir.sync_all())
        .map_err(JournalError::io("sync", parent))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        builds::StreamKey,
        journal::{Journal, JournalOptions, RecordKind},
    };

    #[test]
    fn a_full_disk_is_an_error_that_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path(), JournalOptions::default()).unwrap();
        let (mut writer, _) = journal.stream(&StreamKey::default()).unwrap();
        writer.fill_the_disk();
        let mut batch = Batch::default();
        batch.add(1, RecordKind::Other, 1, b"call");
        let error = writer.append(&batch).unwrap_err();
        assert!(error.to_string().contains(".journal"), "{error}");
        assert!(
            matches!(&error, JournalError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull),
            "{error}"
        );
    }
}
