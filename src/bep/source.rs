//! Events from a file: binary or JSON, complete or still being written, regular or a FIFO.
//!
//! `--build_event_binary_file` is a sequence of (varint length, `BuildEvent`), `--build_event_json_file` has one
//! JSON object a line; which one it is, the first two bytes say. Nothing seeks. A damaged event costs that event
//! where its end is known; where it is not, reading ends with an error that names the byte.
//!
//! Two files of one run hold the same events, but not always in the same order: Bazel's threads hand them to each
//! transport on their own. A set still comes before what refers to it.

use std::{
    io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::{Buf as _, Bytes, BytesMut};
use rustix::fs::OFlags;
use tokio::{
    fs::{self, File, OpenOptions},
    io::AsyncReadExt as _,
    net::unix::pipe,
    time,
};

use crate::bep::{decode::Decoder, error::BepError, event::StreamEvent};

/// The largest event that is believed in, in bytes. Bazel's largest are named sets of 5,000 files; without that
/// limit (`--build_event_max_named_set_of_file_entries=-1`) they grow with the build.
pub const DEFAULT_LIMIT: u64 = 256 << 20;

/// How long to wait before a followed file is looked at again.
const POLL: Duration = Duration::from_millis(50);

/// How much is read at once, in bytes.
const CHUNK: usize = 256 << 10;

/// What some editors and shells begin a text with.
const BOM: &[u8] = b"\xef\xbb\xbf";

/// How events are written in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Length-delimited protobuf messages.
    Binary,
    /// One JSON object a line.
    Json,
}

/// The bytes of one event, without its length prefix or line end, and where they came from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RawEvent {
    /// Where its frame begins in the file: the length prefix or the line.
    pub offset: u64,
    /// The encoded event.
    pub bytes: Bytes,
}

/// A file of events.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    input: Input,
    /// Wait for more at the file's end, until the last message.
    follow: bool,
    limit: u64,
    decoder: Decoder,
    format: Option<Format>,
    /// What was read and not yet taken as an event.
    buffer: BytesMut,
    /// Where `buffer` begins in the file.
    offset: u64,
    /// How much of `buffer` is known to hold no line end.
    scanned: usize,
    raw: RawEvent,
    /// Nothing comes any more: end of file, last message, or an error after which nothing can be found.
    done: bool,
}

#[derive(Debug)]
enum Input {
    /// With device and inode, by which a replaced file is noticed.
    File(File, (u64, u64)),
    /// Waits for its writer through the reactor, so that a build tool's full pipe is drained at once.
    Pipe(pipe::Receiver),
}

/// Where the next event lies in the buffer.
enum Cut {
    /// The first bytes are a length or white space; then that many bytes of event.
    Event { header: usize, body: usize },
    /// It is not there as a whole.
    More,
}

impl EventFile {
    /// Opens a file. With `follow`, its end is waited at until the event that says it is the last; without, the
    /// file's end is the end. A FIFO is opened without waiting for its writer; reading waits.
    ///
    /// # Errors
    /// When the file cannot be opened; also when it is not there yet.
    pub async fn open(path: impl AsRef<Path>, follow: bool) -> Result<Self, BepError> {
        let path = path.as_ref().to_owned();
        let input = Input::open(&path).await.map_err(|source| BepError::Open {
            path: path.clone(),
            source,
        })?;
        Ok(Self {
            path,
            input,
            follow,
            limit: DEFAULT_LIMIT,
            decoder: Decoder::default(),
            format: None,
            buffer: BytesMut::new(),
            offset: 0,
            scanned: 0,
            raw: RawEvent::default(),
            done: false,
        })
    }

    /// Sets the largest event that is taken, in bytes.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn with_limit(mut self, limit: u64) -> Self {
        self.limit = limit;
        self
    }

    /// The file's format, once its first bytes have been read.
    pub const fn format(&self) -> Option<Format> {
        self.format
    }

    /// Where the next event begins, in bytes.
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// The event that [`next`](Self::next) dealt with last, also when it could not be decoded.
    pub const fn raw(&self) -> &RawEvent {
        &self.raw
    }

    /// The next event; `None` at the end, and ever after. Cancelling it loses nothing.
    ///
    /// # Errors
    /// An error that [is skippable](BepError::is_skippable) is about one event: ask for the next. After any other
    /// there is nothing more. A file that ends within an event gives [`BepError::Truncated`], after all whole ones.
    pub async fn next(&mut self) -> Result<Option<StreamEvent>, BepError> {
        while !self.done {
            match self.cut() {
                Ok(Cut::Event { header, body }) => {
                    let framed = self.take(header, body);
                    // A damaged event may still be the last of a stream that was never ended: the file's end decides.
                    self.done = self.follow && framed.as_ref().is_ok_and(|framed| framed.last);
                    return framed.map(Some);
                }
                Ok(Cut::More) => match self.fill().await {
                    Ok(true) => {}
                    Ok(false) => {
                        self.done = true;
                        return self.tail();
                    }
                    Err(error) => {
                        self.done = true;
                        return Err(error);
                    }
                },
                Err(error) => {
                    self.done = true;
                    return Err(error);
                }
            }
        }
        Ok(None)
    }

    /// Finds the next event in the buffer.
    fn cut(&mut self) -> Result<Cut, BepError> {
        if self.format.is_none() && !self.detect()? {
            return Ok(Cut::More);
        }
        if self.format == Some(Format::Json) {
            self.cut_line()
        } else {
            self.cut_message()
        }
    }

    /// Recognizes the format by the first bytes; `false` if there are too few of them yet.
    fn detect(&mut self) -> Result<bool, BepError> {
        if self.buffer.starts_with(BOM) {
            self.buffer.advance(BOM.len());
            self.offset += BOM.len() as u64;
        }
        self.format = Some(match self.buffer[..] {
            [0x1f, 0x8b, ..] => {
                return Err(self.malformed("the file is compressed with gzip; decompress it first"));
            }
            [0x28, 0xb5, 0x2f, 0xfd, ..] => {
                return Err(self.malformed("the file is compressed with zstd; decompress it first"));
            }
            [b'[', b'{' | b' ', ..] | [b'[', b'\n', b'{' | b' ', ..] => {
                let reason =
                    "the file is a JSON array, not an event on each line; convert it with `jq -c '.[]'`";
                return Err(self.malformed(reason));
            }
            // A brace is also the length 123. Then the tag of the event's id follows, which is a line feed, and the id's own
            // length; in JSON that somebody has formatted, what is indented.
            [b'{', b'\n', b' ' | b'\t' | b'"', ..] | [b'{', b'\r', ..] => {
                let reason = "the file is JSON without an event on each line; convert it with `jq -c .`";
                return Err(self.malformed(reason));
            }
            [b'{', second, ..] if second != b'\n' => Format::Json,
            [_, _, _, _, ..] => Format::Binary,
            _ => return Ok(false),
        });
        Ok(true)
    }

    fn cut_line(&mut self) -> Result<Cut, BepError> {
        let blank = self.buffer.iter().take_while(|b| b.is_ascii_whitespace()).count();
        self.buffer.advance(blank);
        self.offset += blank as u64;
        self.scanned = self.scanned.saturating_sub(blank);
        match self.buffer[self.scanned..].iter().position(|&b| b == b'\n') {
            Some(end) => {
                let body = self.scanned + end;
                self.check_size(body as u64)?;
                Ok(Cut::Event { header: 0, body })
            }
            None => {
                self.scanned = self.buffer.len();
                self.check_size(self.scanned as u64)?;
                Ok(Cut::More)
            }
        }
    }

    fn cut_message(&self) -> Result<Cut, BepError> {
        let mut size = 0_u64;
        for (position, &byte) in self.buffer.iter().enumerate() {
            // Lengths have 32 bits and at most five bytes of seven.
            if position == 5 {
                return Err(self.malformed("its length does not fit into 32 bits"));
            }
            size |= u64::from(byte & 0x7f) << (7 * position);
            if byte & 0x80 == 0 {
                if size == 0 {
                    // Every event has an id. Zeros are what a crash leaves at the end of a file.
                    return Err(self.malformed("its length is zero"));
                }
                self.check_size(size)?;
                let header = position + 1;
                return Ok(match usize::try_from(size) {
                    Ok(body) if self.buffer.len() - header >= body => Cut::Event { header, body },
                    _ => Cut::More,
                });
            }
        }
        Ok(Cut::More)
    }

    /// Takes an event out of the buffer and decodes it.
    fn take(&mut self, header: usize, body: usize) -> Result<StreamEvent, BepError> {
        self.raw.offset = self.offset;
        self.buffer.advance(header);
        self.raw.bytes = self.buffer.split_to(body).freeze();
        self.offset += (header + body) as u64;
        self.scanned = 0;
        let framed = if self.format == Some(Format::Json) {
            self.decoder.decode_json(&self.raw.bytes)
        } else {
            self.decoder.decode(&self.raw.bytes)
        };
        framed.map_err(|source| BepError::Event {
            path: self.path.clone(),
            offset: self.raw.offset,
            source: Box::new(source),
        })
    }

    /// What is left when the file is over.
    fn tail(&mut self) -> Result<Option<StreamEvent>, BepError> {
        if self.buffer.is_empty() {
            return Ok(None);
        }
        let truncated = BepError::Truncated {
            path: self.path.clone(),
            offset: self.offset,
            have: self.buffer.len() as u64,
        };
        if self.format == Some(Format::Json) {
            // The last line may lack its end; a whole object can be distinguished from a part of one.
            match self.take(0, self.buffer.len()) {
                Err(BepError::Event { source, .. }) if source.is_cut_short() => Err(truncated),
                taken => taken.map(Some),
            }
        } else {
            Err(truncated)
        }
    }

    /// Reads more. `false` at the end of a file that is not followed.
    async fn fill(&mut self) -> Result<bool, BepError> {
        loop {
            self.buffer.reserve(CHUNK);
            let read = match &mut self.input {
                Input::File(file, _) => file.read_buf(&mut self.buffer).await,
                Input::Pipe(pipe) => pipe.read_buf(&mut self.buffer).await,
            };
            match read {
                Ok(0) if !self.follow => return Ok(false),
                Ok(0) => self.check_unchanged().await?,
                Ok(_) => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // A terminal, say: everything is opened without blocking, for the sake of FIFOs.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(source) => {
                    return Err(BepError::Read {
                        path: self.path.clone(),
                        offset: self.read_so_far(),
                        source,
                    });
                }
            }
            time::sleep(POLL).await;
        }
    }

    /// At the present end of a followed file: whether its writer can still go on there.
    async fn check_unchanged(&self) -> Result<(), BepError> {
        let Input::File(file, identity) = &self.input else {
            // The pipe's writer is gone, and the next one would begin with a new event.
            return if self.buffer.is_empty() {
                Ok(())
            } else {
                Err(BepError::Truncated {
                    path: self.path.clone(),
                    offset: self.offset,
                    have: self.buffer.len() as u64,
                })
            };
        };
        let changed = |how| BepError::Changed {
            path: self.path.clone(),
            offset: self.read_so_far(),
            how,
        };
        let read = |source| BepError::Read {
            path: self.path.clone(),
            offset: self.read_so_far(),
            source,
        };
        let open = file.metadata().await.map_err(read)?;
        if open.is_file() && open.len() < self.read_so_far() {
            return Err(changed("truncated"));
        }
        match fs::metadata(&self.path).await {
            Ok(named) if (named.dev(), named.ino()) == *identity => Ok(()),
            Ok(_) => Err(changed("replaced")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(changed("removed")),
            Err(error) => Err(read(error)),
        }
    }

    fn check_size(&self, size: u64) -> Result<(), BepError> {
        if size <= self.limit {
            return Ok(());
        }
        Err(BepError::TooLarge {
            path: self.path.clone(),
            offset: self.offset,
            size,
            limit: self.limit,
        })
    }

    fn malformed(&self, reason: &'static str) -> BepError {
        BepError::Malformed {
            path: self.path.clone(),
            offset: self.offset,
            reason,
        }
    }

    fn read_so_far(&self) -> u64 {
        self.offset + self.buffer.len() as u64
    }
}

impl Input {
    async fn open(path: &Path) -> io::Result<Self> {
        // Without the flag, opening a FIFO would hold a thread until somebody writes, and could not be cancelled.
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).map_err(io::Error::other)?;
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(path)
            .await?;
        let metadata = file.metadata().await?;
        Ok(if metadata.file_type().is_fifo() {
            Self::Pipe(pipe::Receiver::from_file(file.into_std().await)?)
        } else {
            Self::File(file, (metadata.dev(), metadata.ino()))
        })
    }
}

#[cfg(test)]
mod tests;
