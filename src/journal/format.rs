//! The bytes of a journal file: head, frame heads, records. No I/O here.

use bytes::{Buf, Bytes};
use prost::encoding::{decode_varint, encode_varint};

use tonic::metadata::MetadataMap;

use super::{headers, received::Received};
use crate::builds::StreamKey;

/// Changes when a reader of the old version would misread the new one.
const VERSION: u8 = 2;
/// zstd's magic numbers for frames that decoders skip: 0x184D2A50 to 0x184D2A5F (RFC 8878, 3.1.2).
const HEAD_MAGIC: u32 = 0x184D_2A50;
const FRAME_MAGIC: u32 = 0x184D_2A51;
const NAME: &[u8; 15] = b"outhaul-journal";
pub(super) const SUM_LEN: usize = 8;
/// Largest head: ids are limited long before that.
const MAX_HEAD: usize = 1 << 20;
/// Largest sum of records in one frame before compression; a message is at most 256 MiB.
pub(super) const MAX_RAW: usize = 288 << 20;

/// Magic and size of a skippable frame.
const SKIP_LEN: usize = 8;
/// Body length, raw length, count, flags, lowest and highest number, checksum.
const FRAME_HEAD_PAYLOAD: usize = 4 * 4 + 2 * 8 + SUM_LEN;
/// Bytes of a frame's head in the file.
pub(super) const FRAME_HEAD_LEN: usize = SKIP_LEN + FRAME_HEAD_PAYLOAD;
const FLAG_FINISHED: u32 = 1;

pub(super) fn checksum(parts: &[&[u8]]) -> [u8; SUM_LEN] {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    let mut sum = [0; SUM_LEN];
    sum.copy_from_slice(&hasher.finalize().as_bytes()[..SUM_LEN]);
    sum
}

/// A file's head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) key: StreamKey,
    /// Milliseconds since the epoch.
    pub(super) created_ms: u64,
}

impl Head {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::with_capacity(128);
        payload.extend_from_slice(NAME);
        payload.push(VERSION);
        payload.extend_from_slice(&self.created_ms.to_le_bytes());
        for id in [&self.key.build_id, &self.key.invocation_id] {
            encode_varint(id.len() as u64, &mut payload);
            payload.extend_from_slice(id.as_bytes());
        }
        if self.key.attempt > 0 {
            encode_varint(self.key.attempt.into(), &mut payload);
        }
        let sum = checksum(&[&payload]);
        payload.extend_from_slice(&sum);
        let mut out = Vec::with_capacity(payload.len() + SKIP_LEN);
        out.extend_from_slice(&HEAD_MAGIC.to_le_bytes());
        out.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        out.extend_from_slice(&payload);
        out
    }

    /// Length of the head's remainder, from the file's first 8 bytes.
    pub(super) fn payload_len(start: [u8; SKIP_LEN]) -> Result<usize, &'static str> {
        let mut start = &start[..];
        if start.get_u32_le() != HEAD_MAGIC {
            return Err("wrong magic number");
        }
        match start.get_u32_le() as usize {
            n if (NAME.len() + 1 + 8 + SUM_LEN..=MAX_HEAD).contains(&n) => Ok(n),
            _ => Err("impossible header length"),
        }
    }

    pub(super) fn decode(payload: &[u8]) -> Result<Self, &'static str> {
        let Some((body, sum)) = payload.split_last_chunk::<SUM_LEN>() else {
            return Err("short header");
        };
        let Some(mut rest) = body.strip_prefix(NAME) else {
            return Err("wrong name");
        };
        // The version comes before the checksum: another version may sum differently.
        if rest.try_get_u8() != Ok(VERSION) {
            return Err("unsupported format version");
        }
        if checksum(&[body]) != *sum {
            return Err("wrong header checksum");
        }
        let created_ms = rest.try_get_u64_le().map_err(|_| "short header")?;
        let mut id = || {
            let len = decode_varint(&mut rest).map_err(|_| "bad id")? as usize;
            let (id, after) = rest.split_at_checked(len).ok_or("bad id")?;
            rest = after;
            String::from_utf8(id.to_vec()).map_err(|_| "bad id")
        };
        let (build_id, invocation_id) = (id()?, id()?);
        let attempt = match rest {
            [] => 0,
            mut rest => decode_varint(&mut rest).map_err(|_| "bad attempt")?,
        };
        let key = StreamKey {
            build_id,
            invocation_id,
            attempt: u32::try_from(attempt).map_err(|_| "bad attempt")?,
        };
        Ok(Self { key, created_ms })
    }
}

/// What a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordKind {
    /// An event of the build event protocol.
    Event,
    /// The build tool's word that it has sent everything.
    Finished,
    /// Anything else that came on the stream.
    Other,
    /// What the client said in its headers, before the events of that connection. Secrets: not to be shown.
    Headers,
    /// What an exported build carries besides its events, for staging. Of a build from elsewhere alone.
    Runfile,
}

impl RecordKind {
    const fn wire(self) -> u8 {
        match self {
            Self::Event => 1,
            Self::Finished => 2,
            Self::Other => 3,
            Self::Headers => 4,
            Self::Runfile => 6,
        }
    }

    const fn from_wire(value: u8) -> Option<Self> {
        match value {
            1 => Some(Self::Event),
            2 => Some(Self::Finished),
            3 => Some(Self::Other),
            4 => Some(Self::Headers),
            // 5 was a lifecycle call, in a file of its own.
            6 => Some(Self::Runfile),
            _ => None,
        }
    }
}

/// One thing that was received, an event as a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its number in the stream; that of the next event for headers.
    pub sequence: i64,
    /// When it was received, in milliseconds since the epoch.
    pub received_ms: u64,
    /// What it is.
    pub kind: RecordKind,
    /// The encoded `google.devtools.build.v1.PublishBuildToolEventStreamRequest`, byte for byte as it came.
    pub payload: Bytes,
}

impl Record {
    /// The bytes of the `build_event_stream.BuildEvent` inside, if there is one.
    pub fn build_event(&self) -> Option<Bytes> {
        match self.kind {
            RecordKind::Event => Received::read(self.payload.clone()).ok()??.bazel_event,
            _ => None,
        }
    }

    /// The headers, if this is a record of headers.
    pub(crate) fn headers(&self) -> Option<MetadataMap> {
        (self.kind == RecordKind::Headers).then(|| headers::decode(self.payload.clone()))
    }
}

/// A payload of this many bytes is not copied into its batch.
const LARGE: usize = 256 << 10;

/// Records on their way into one frame.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    /// All bytes but those of large payloads.
    raw: Vec<u8>,
    /// Those, and before which byte of the others they belong.
    large: Vec<(usize, Bytes)>,
    len: usize,
    count: u32,
    lowest: i64,
    highest: i64,
    finished: bool,
}

impl Batch {
    pub(crate) fn push(&mut self, received_ms: u64, event: &Received) {
        let Received {
            kind,
            sequence,
            request,
            ..
        } = event;
        if request.len() < LARGE {
            return self.add(received_ms, *kind, *sequence, request);
        }
        self.begin(received_ms, *kind, *sequence, request.len());
        self.large.push((self.raw.len(), request.clone()));
        self.len += request.len();
    }

    /// Headers of the connection that the event of this number, pushed next, came on.
    pub(crate) fn push_headers(&mut self, received_ms: u64, sequence: i64, headers: &[u8]) {
        self.add(received_ms, RecordKind::Headers, sequence, headers);
    }

    pub(super) fn add(&mut self, received_ms: u64, kind: RecordKind, sequence: i64, payload: &[u8]) {
        self.begin(received_ms, kind, sequence, payload.len());
        self.raw.extend_from_slice(payload);
        self.len += payload.len();
    }

    /// All of a record but its payload.
    fn begin(&mut self, received_ms: u64, kind: RecordKind, sequence: i64, payload: usize) {
        let before = self.raw.len();
        encode_varint(payload as u64, &mut self.raw);
        self.raw.push(kind.wire());
        self.raw.extend_from_slice(&sequence.to_le_bytes());
        encode_varint(received_ms, &mut self.raw);
        self.len += self.raw.len() - before;
        if self.count == 0 {
            (self.lowest, self.highest) = (sequence, sequence);
        }
        self.lowest = self.lowest.min(sequence);
        self.highest = self.highest.max(sequence);
        self.finished |= kind == RecordKind::Finished;
        self.count = self.count.saturating_add(1);
    }

    /// Bytes before compression.
    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Empties it, keeping its memory unless that is unusually much.
    pub(crate) fn clear(&mut self) {
        self.count = 0;
        self.finished = false;
        self.len = 0;
        self.large.clear();
        self.raw.clear();
        self.raw.shrink_to(256 << 10);
    }

    /// The bytes, in one piece if there are no large payloads.
    pub(super) fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        let mut from = 0;
        let before = self.large.iter().flat_map(move |(at, payload)| {
            let piece = &self.raw[from..*at];
            from = *at;
            [piece, &payload[..]]
        });
        let rest = self.large.last().map_or(0, |(at, _)| *at);
        before.chain(std::iter::once(&self.raw[rest..]))
    }

    /// The bytes, if they are in one piece.
    pub(super) fn whole(&self) -> Option<&[u8]> {
        self.large.is_empty().then_some(&self.raw)
    }

    /// The frame's head for this compressed body.
    pub(super) fn head(&self, body: &[u8]) -> [u8; FRAME_HEAD_LEN] {
        let mut out = Vec::with_capacity(FRAME_HEAD_LEN);
        out.extend_from_slice(&FRAME_MAGIC.to_le_bytes());
        out.extend_from_slice(&(FRAME_HEAD_PAYLOAD as u32).to_le_bytes());
        out.extend_from_slice(&(body.len() as u32).to_le_bytes());
        out.extend_from_slice(&(self.len as u32).to_le_bytes());
        out.extend_from_slice(&self.count.to_le_bytes());
        out.extend_from_slice(&(if self.finished { FLAG_FINISHED } else { 0 }).to_le_bytes());
        out.extend_from_slice(&self.lowest.to_le_bytes());
        out.extend_from_slice(&self.highest.to_le_bytes());
        let sum = checksum(&[&out, body]);
        out.extend_from_slice(&sum);
        let mut head = [0; FRAME_HEAD_LEN];
        head.copy_from_slice(&out);
        head
    }
}

/// A frame's head, read back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FrameHead {
    pub(super) body_len: usize,
    pub(super) raw_len: usize,
    pub(super) highest: i64,
    pub(super) finished: bool,
    sum: [u8; SUM_LEN],
}

impl FrameHead {
    /// Reads a head; `None` when it cannot be one. Lengths are plausible then, but only [`Self::verify`] says that they
    /// are right.
    pub(super) fn decode(head: &[u8; FRAME_HEAD_LEN]) -> Option<Self> {
        let mut bytes = &head[..];
        if bytes.get_u32_le() != FRAME_MAGIC || bytes.get_u32_le() as usize != FRAME_HEAD_PAYLOAD {
            return None;
        }
        let body_len = bytes.get_u32_le() as usize;
        let raw_len = bytes.get_u32_le() as usize;
        let _count = bytes.get_u32_le();
        let finished = bytes.get_u32_le() & FLAG_FINISHED != 0;
        let _lowest = bytes.get_i64_le();
        let highest = bytes.get_i64_le();
        let mut sum = [0; SUM_LEN];
        sum.copy_from_slice(bytes);
        // zstd never makes data more than slightly larger.
        (raw_len <= MAX_RAW && body_len <= MAX_RAW + (MAX_RAW >> 8) + 1024).then_some(Self {
            body_len,
            raw_len,
            highest,
            finished,
            sum,
        })
    }

    pub(super) fn verify(&self, head: &[u8; FRAME_HEAD_LEN], body: &[u8]) -> bool {
        body.len() == self.body_len && checksum(&[&head[..FRAME_HEAD_LEN - SUM_LEN], body]) == self.sum
    }
}

/// Takes a decompressed frame apart.
pub(super) fn records(mut raw: Bytes) -> Result<Vec<Record>, &'static str> {
    let mut records = Vec::new();
    while raw.has_remaining() {
        let len = decode_varint(&mut raw).map_err(|_| "bad length")? as usize;
        let kind = raw.try_get_u8().map_err(|_| "short record")?;
        let kind = RecordKind::from_wire(kind).ok_or("unknown kind of record")?;
        let sequence = raw.try_get_i64_le().map_err(|_| "short record")?;
        let received_ms = decode_varint(&mut raw).map_err(|_| "bad time")?;
        if raw.len() < len {
            return Err("short record");
        }
        records.push(Record {
            sequence,
            received_ms,
            kind,
            payload: raw.split_to(len),
        });
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn heads_read_back(build_id in ".{0,60}", invocation_id in ".{0,60}", attempt: u32, created_ms: u64) {
            let head = Head { key: StreamKey { build_id, invocation_id, attempt }, created_ms };
            let bytes = head.encode();
            let (start, payload) = bytes.split_first_chunk::<SKIP_LEN>().unwrap();
            prop_assert_eq!(Head::payload_len(*start), Ok(payload.len()));
            prop_assert_eq!(Head::decode(payload), Ok(head));
        }

        #[test]
        fn arbitrary_bytes_are_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Head::decode(&bytes);
            let _ = records(Bytes::from(bytes.clone()));
            if let Some(head) = bytes.first_chunk::<FRAME_HEAD_LEN>() {
                let _ = FrameHead::decode(head);
            }
        }

        #[test]
        fn records_read_back(sequences in prop::collection::vec(any::<i64>(), 1..20), received_ms: u64) {
            let mut batch = Batch::default();
            for sequence_number in &sequences {
                batch.add(received_ms, RecordKind::Other, *sequence_number, b"x");
            }
            let read = records(Bytes::copy_from_slice(batch.whole().unwrap())).unwrap();
            prop_assert_eq!(read.iter().map(|r| r.sequence).collect::<Vec<_>>(), sequences.clone());
            prop_assert!(read.iter().all(|r| r.received_ms == received_ms && r.kind == RecordKind::Other));
            let head = batch.head(b"body");
            let decoded = FrameHead::decode(&head).unwrap();
            prop_assert!(decoded.verify(&head, b"body") && !decoded.verify(&head, b"bodY"));
            prop_assert_eq!(Some(&decoded.highest), sequences.iter().max());
        }
    }

    #[test]
    fn another_version_is_distinguished_from_damage() {
        let mut bytes = Head {
            key: StreamKey::default(),
            created_ms: 1,
        }
        .encode();
        bytes[SKIP_LEN + NAME.len()] = VERSION + 1;
        assert_eq!(
            Head::decode(&bytes[SKIP_LEN..]),
            Err("unsupported format version")
        );
    }
}
