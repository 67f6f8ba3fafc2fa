//! The bytes of the file, written and read.

use std::{
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use bytes::{Buf as _, Bytes};
use prost::encoding::{decode_varint, encode_varint};
use serde::{Deserialize, Serialize};

use super::super::error::StageError;
use crate::journal::RecordKind;

const MAGIC: &[u8; 14] = b"outhaul-build\n";
/// Changes when a reader of the old version would misread the new one.
const VERSION: u8 = 1;
const HEADER: u8 = b'H';
const RECORDS: u8 = b'R';
const END: u8 = b'E';
const SUM: usize = 8;
/// Records are gathered to about this many bytes.
const FRAME: usize = 1 << 20;
/// A single event may be 256 MiB.
const MAX_FRAME: usize = 300 << 20;
/// What a file may make its reader hold goes by the file's own size: a fixed factor for each compressed byte, and some
/// for nothing. What a writer packs more tightly, it fills up.
const PER_BYTE: u64 = 256;
const FREE: u64 = 8 << 20;
/// What an event takes besides its bytes, and what a byte of it may become once it is decoded.
const EVENT: u64 = 256;
const DECODED: u64 = 8;
/// Of a frame that decoders of zstd pass over.
const SKIPPED: u32 = 0x184D_2A50;
const LEVEL: i32 = 9;

/// What is known of the build besides its events.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Header {
    /// Invocation ID of the build.
    pub(crate) invocation_id: String,
    /// Its build id.
    pub(crate) build_id: String,
    /// `build`, `test`, …
    pub(crate) command: String,
    /// The workspace, where it was built.
    pub(crate) workspace: String,
    /// The exec root, where it was built.
    pub(crate) exec_root: String,
    /// When it began, in milliseconds since the epoch.
    pub(crate) started_ms: i64,
    /// When it was settled; 0 for never.
    pub(crate) settled_ms: i64,
    /// The build tool's exit code, if it is known.
    pub(crate) exit_code: Option<i32>,
    /// The build tool's version.
    pub(crate) build_tool_version: String,
    /// Where its blobs are, without credentials.
    pub(crate) remote_cache: String,
    /// The instance name there.
    pub(crate) remote_instance_name: String,
    /// The digest function's name.
    pub(crate) digest_function: String,
    /// Whether its stream had come to its end.
    pub(crate) finished: bool,
    /// The Outhaul that wrote the file.
    pub(crate) written_by: String,
}

/// One event of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) kind: RecordKind,
    pub(super) sequence: i64,
    pub(super) received_ms: u64,
    /// The `build_event_stream.BuildEvent`; empty if it is not one.
    pub(super) event: Bytes,
}

const fn letter(kind: RecordKind) -> u8 {
    match kind {
        RecordKind::Event => b'e',
        RecordKind::Finished => b'f',
        RecordKind::Runfile => b'r',
        _ => b'o',
    }
}

const fn kind(letter: u8) -> Option<RecordKind> {
    match letter {
        b'e' => Some(RecordKind::Event),
        b'f' => Some(RecordKind::Finished),
        b'o' => Some(RecordKind::Other),
        b'r' => Some(RecordKind::Runfile),
        _ => None,
    }
}

fn checksum(length: [u8; 4], body: &[u8]) -> [u8; SUM] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&length);
    hasher.update(body);
    let mut sum = [0; SUM];
    sum.copy_from_slice(&hasher.finalize().as_bytes()[..SUM]);
    sum
}

/// Writes the file.
pub(super) struct Writer<W> {
    out: W,
    frame: Vec<u8>,
    lines: u64,
    account: Account,
}

/// What was packed, and what it costs to hold that unpacked.
#[derive(Debug, Default)]
struct Account {
    packed: u64,
    cost: u64,
}

impl Account {
    fn add(&mut self, event: usize) {
        self.cost += EVENT + DECODED * event as u64;
    }

    /// What it may still cost.
    const fn left(&self) -> u64 {
        (FREE + PER_BYTE * self.packed).saturating_sub(self.cost)
    }

    /// Bytes that must be packed besides, for what it costs.
    const fn lacks(&self) -> u64 {
        self.cost
            .saturating_sub(FREE)
            .div_ceil(PER_BYTE)
            .saturating_sub(self.packed)
    }
}

impl<W: Write> Writer<W> {
    pub(super) fn new(mut out: W, header: &Header) -> io::Result<Self> {
        out.write_all(MAGIC)?;
        out.write_all(&[VERSION])?;
        let mut writer = Self {
            out,
            frame: vec![HEADER],
            lines: 0,
            account: Account::default(),
        };
        serde_json::to_writer(&mut writer.frame, header)?;
        writer.flush()?;
        Ok(writer)
    }

    pub(super) fn line(&mut self, line: &Line) -> io::Result<()> {
        if self.frame.is_empty() {
            self.frame.push(RECORDS);
        }
        encode_varint(line.event.len() as u64, &mut self.frame);
        self.frame.push(letter(line.kind));
        self.frame.extend_from_slice(&line.sequence.to_le_bytes());
        encode_varint(line.received_ms, &mut self.frame);
        self.frame.extend_from_slice(&line.event);
        self.lines += 1;
        self.account.add(line.event.len());
        if self.frame.len() >= FRAME {
            self.flush()
        } else {
            Ok(())
        }
    }

    /// Writes the end, and says how many events there are.
    pub(super) fn end(mut self) -> io::Result<(W, u64)> {
        self.flush()?;
        self.frame.push(END);
        self.frame.extend_from_slice(&self.lines.to_le_bytes());
        self.flush()?;
        self.out.flush()?;
        Ok((self.out, self.lines))
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.frame.is_empty() {
            return Ok(());
        }
        let mut body = zstd::bulk::compress(&self.frame, LEVEL)?;
        self.account.packed += body.len() as u64;
        let lacks = self.account.lacks();
        if lacks > 0 {
            let filling = u32::try_from(lacks).map_err(io::Error::other)?;
            body.extend(SKIPPED.to_le_bytes());
            body.extend(filling.to_le_bytes());
            body.resize(body.len() + filling as usize, 0);
            self.account.packed += 8 + lacks;
        }
        let length = u32::try_from(body.len()).map_err(io::Error::other)?.to_le_bytes();
        self.out.write_all(&length)?;
        self.out.write_all(&checksum(length, &body))?;
        self.out.write_all(&body)?;
        self.frame.clear();
        Ok(())
    }
}

/// For [`super::fuzz`].
#[cfg(any(test, fuzzing))]
impl Writer<Vec<u8>> {
    /// A file whose checksums are right, with a frame of these very bytes, and its end.
    pub(super) fn forged(raw: &[u8]) -> Vec<u8> {
        let forged = Self::new(Vec::new(), &Header::default()).and_then(|mut writer| {
            writer.frame.extend_from_slice(raw);
            Ok(writer.end()?.0)
        });
        forged.unwrap_or_default()
    }

    /// A file of some events with these bytes in them, and the events.
    pub(super) fn sample(data: &[u8]) -> Option<(Vec<u8>, Vec<Line>)> {
        let mut writer = Self::new(Vec::new(), &Header::default()).ok()?;
        let mut lines = Vec::new();
        for (sequence, event) in (1..).zip(data.chunks(50).take(8)) {
            let line = Line {
                kind: RecordKind::Event,
                sequence,
                received_ms: 7,
                event: Bytes::copy_from_slice(event),
            };
            writer.line(&line).ok()?;
            lines.push(line);
        }
        Some((writer.end().ok()?.0, lines))
    }
}

/// A file whose checksums are right, with frames of records of these bytes, as tight as they get.
#[cfg(test)]
pub(super) fn bomb(frames: &[Vec<u8>]) -> Vec<u8> {
    let header = Header {
        invocation_id: "bomb".to_owned(),
        ..Header::default()
    };
    let mut out = Writer::new(Vec::new(), &header).unwrap().out;
    let mut packed = std::collections::HashMap::new();
    for raw in frames {
        let body = packed
            .entry(raw)
            .or_insert_with(|| zstd::bulk::compress(&[&[RECORDS], &raw[..]].concat(), LEVEL).unwrap());
        let length = u32::try_from(body.len()).unwrap().to_le_bytes();
        out.extend(length);
        out.extend(checksum(length, body));
        out.extend_from_slice(body);
    }
    out
}

/// Reads the file.
pub(super) struct Reader<R> {
    input: R,
    path: PathBuf,
    /// Where the next frame begins.
    at: u64,
    lines: u64,
    account: Account,
}

impl<R: Read> Reader<R> {
    pub(super) fn new(input: R, path: &Path) -> Result<(Self, Header), StageError> {
        let mut reader = Self {
            input,
            path: path.to_owned(),
            at: 0,
            lines: 0,
            account: Account::default(),
        };
        let mut start = [0; MAGIC.len() + 1];
        if !reader.fill(&mut start)? || !start.starts_with(MAGIC) {
            return Err(reader.damaged("it is not a build exported by outhaul"));
        }
        if start[MAGIC.len()] != VERSION {
            let reason = format!(
                "it has version {}, but this outhaul reads version {VERSION}",
                start[MAGIC.len()]
            );
            return Err(reader.damaged(&reason));
        }
        reader.at = start.len() as u64;
        let (frame, next) = reader.frame()?;
        let header = match frame.split_first() {
            Some((&HEADER, header)) => serde_json::from_slice(header)
                .map_err(|e| reader.damaged(&format!("failed to read its header: {e}")))?,
            _ => return Err(reader.damaged("it has no header")),
        };
        reader.at = next;
        Ok((reader, header))
    }

    /// The next events; `None` after the last.
    pub(super) fn lines(&mut self) -> Result<Option<Vec<Line>>, StageError> {
        let (frame, next) = self.frame()?;
        match frame.split_first() {
            Some((&RECORDS, rest)) => {
                let rest = frame.slice_ref(rest);
                let lines = lines(rest, &mut self.account).map_err(|reason| self.damaged(reason))?;
                self.lines += lines.len() as u64;
                self.at = next;
                Ok(Some(lines))
            }
            Some((&END, count)) => {
                if count != self.lines.to_le_bytes() {
                    return Err(self.damaged("events are missing"));
                }
                self.at = next;
                let mut more = [0; 1];
                if self.fill(&mut more)? {
                    return Err(self.damaged("trailing data after its end"));
                }
                Ok(None)
            }
            _ => Err(self.damaged("unknown kind of frame")),
        }
    }

    fn frame(&mut self) -> Result<(Bytes, u64), StageError> {
        let mut head = [0; 4 + SUM];
        if !self.fill(&mut head)? {
            return Err(self.damaged("it is truncated"));
        }
        let mut length = [0; 4];
        length.copy_from_slice(&head[..4]);
        let size = u32::from_le_bytes(length) as usize;
        if size > MAX_FRAME {
            return Err(self.damaged("impossible length of a frame"));
        }
        let mut body = Vec::new();
        // As much as there is, so that a wrong length costs no memory.
        let read = (&mut self.input).take(size as u64).read_to_end(&mut body);
        read.map_err(StageError::io("read", &self.path))?;
        if body.len() != size {
            return Err(self.damaged("it is truncated within a frame"));
        }
        if checksum(length, &body)[..] != head[4..] {
            return Err(self.damaged("wrong checksum"));
        }
        self.account.packed += body.len() as u64;
        let mut raw = Vec::new();
        // A small frame can be a huge one. What parts events in it is not in the account.
        let most = (self.account.left() / DECODED + FRAME as u64).min(MAX_FRAME as u64);
        let unpacked =
            zstd::Decoder::new(&*body).and_then(|decoder| decoder.take(most + 1).read_to_end(&mut raw));
        if unpacked.is_err() {
            return Err(self.damaged("failed to decompress it"));
        }
        if raw.len() as u64 > most {
            return Err(self.damaged(TOO_MUCH));
        }
        Ok((raw.into(), self.at + (head.len() + size) as u64))
    }

    /// Fills the buffer; `false` where the file ends before that.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<bool, StageError> {
        match self.input.read_exact(buffer) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(e) => Err(StageError::io("read", &self.path)(e)),
        }
    }

    fn damaged(&self, reason: &str) -> StageError {
        StageError::Archive {
            path: self.path.clone(),
            offset: self.at,
            reason: reason.to_owned(),
        }
    }
}

const TOO_MUCH: &str = "it decompresses to far more than a file of its size can contain";

fn lines(mut raw: Bytes, account: &mut Account) -> Result<Vec<Line>, &'static str> {
    let mut lines = Vec::new();
    while raw.has_remaining() {
        let length = decode_varint(&mut raw).map_err(|_| "bad length of an event")?;
        let kind = raw
            .try_get_u8()
            .ok()
            .and_then(kind)
            .ok_or("unknown kind of event")?;
        let sequence = raw.try_get_i64_le().map_err(|_| "short event")?;
        let received_ms = decode_varint(&mut raw).map_err(|_| "bad time of an event")?;
        let length = usize::try_from(length).map_err(|_| "bad length of an event")?;
        if raw.len() < length {
            return Err("short event");
        }
        account.add(length);
        if account.lacks() > 0 {
            return Err(TOO_MUCH);
        }
        lines.push(Line {
            kind,
            sequence,
            received_ms,
            event: raw.split_to(length),
        });
    }
    Ok(lines)
}
