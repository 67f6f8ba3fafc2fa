//! Reads a call's messages, each counted before it is kept.
//!
//! gRPC says how long a message is before its bytes come. The library would make a buffer of that size for everybody who
//! says so, and keep it for as long as the stream is open. Here room is taken from the [`Budget`] first, a message has
//! a buffer of its own, of just its size, and one that lies within what has come is not copied at all.

use std::{io::Read, time::Duration};

use bytes::Bytes;
use http::HeaderMap;
use http_body_util::BodyExt as _;
use tonic::{Code, Status, body::Body};

use super::budget::{Budget, Room};

/// Bytes before a message: whether it is compressed, and its length.
pub(super) const PREFIX: usize = 5;
/// What is as small is taken in after a long wait, room or not: the number of streams bounds how many there are.
const ANYWAY: usize = 64 << 10;
/// Compressed messages have this room for each byte at first.
const EXPANSION: usize = 8;
/// The largest window of a compressed message.
const WINDOW_LOG: u32 = 24;
/// Bytes that are decompressed between two looks at the room.
const STEP: u64 = 256 << 10;
/// Largest compressed message that is decompressed where it is read.
const AT_ONCE: usize = 16 << 10;

/// How messages are compressed that say that they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Gzip,
    Zstd,
}

/// A message and its room; `None` if it was taken in without.
pub(super) struct Message {
    pub(super) bytes: Bytes,
    pub(super) room: Option<Room>,
}

/// A call's messages.
pub(super) struct Inbound {
    body: Body,
    encoding: Option<Encoding>,
    /// What has come and is not read yet.
    chunk: Bytes,
    /// The largest message.
    most: usize,
    budget: Budget,
    /// The client has cancelled the call.
    cancelled: bool,
    /// How long it may wait for room; see [`Inbound::stalling`].
    stall: Option<Duration>,
    small_only: bool,
    stalled: bool,
    /// How many times the bytes of a message are in memory at once.
    copies: usize,
}

fn cut_short() -> Status {
    Status::internal("the call ended in the middle of a message")
}

impl Inbound {
    pub(super) fn new(body: Body, headers: &HeaderMap, most: usize, budget: Budget) -> Self {
        let encoding = match headers.get("grpc-encoding").map(http::HeaderValue::as_bytes) {
            Some(b"gzip") => Some(Encoding::Gzip),
            Some(b"zstd") => Some(Encoding::Zstd),
            // Others are refused before anything is read.
            _ => None,
        };
        Self {
            body,
            encoding,
            chunk: Bytes::new(),
            most,
            budget,
            cancelled: false,
            stall: None,
            small_only: true,
            stalled: false,
            copies: 1,
        }
    }

    /// Each message will be in memory twice.
    pub(super) fn copied(&mut self) {
        self.copies = 2;
    }

    /// After so long a wait, a message is taken in without room: an unread last event would hang a build without a
    /// deadline. Only small ones, if what waits can go to the journal, so that there will be room again.
    pub(super) fn stalling(&mut self, stall: Duration, small_only: bool) {
        self.stall = Some(stall);
        self.small_only = small_only;
    }

    /// The next message; `None` after the last.
    pub(super) async fn message(&mut self) -> Result<Option<Message>, Status> {
        let mut prefix = [0; PREFIX];
        let mut got = 0;
        while got < PREFIX {
            if !self.fill().await? {
                return if got == 0 || self.cancelled {
                    Ok(None)
                } else {
                    Err(cut_short())
                };
            }
            let n = self.chunk.len().min(PREFIX - got);
            prefix[got..got + n].copy_from_slice(&self.chunk.split_to(n));
            got += n;
        }
        let [flag, length @ ..] = prefix;
        let length = u32::from_be_bytes(length) as usize;
        let encoding = match (flag, self.encoding) {
            (0, _) => None,
            (1, Some(encoding)) => Some(encoding),
            (1, None) => {
                return Err(Status::internal(
                    "a message is compressed, but there is no grpc-encoding header",
                ));
            }
            (flag, _) => return Err(Status::internal(format!("invalid compression flag {flag}"))),
        };
        if length > self.most {
            return Err(too_large(self.most));
        }
        let expected = match encoding {
            Some(_) => length.saturating_mul(EXPANSION).min(self.most),
            None => length,
        };
        // Beside its bytes, some for what keeps it.
        let room = self.enter(super::budget::weight(expected) * self.copies).await;
        let Some(bytes) = self.read(length).await? else {
            return Ok(None);
        };
        match encoding {
            Some(encoding) => self.expand(encoding, bytes, room).await.map(Some),
            None => Ok(Some(Message { bytes, room })),
        }
    }

    async fn enter(&mut self, bytes: usize) -> Option<Room> {
        let room = self.budget.try_enter(bytes);
        if room.is_some() {
            return room;
        }
        let stall = self.stall.filter(|_| bytes <= ANYWAY || !self.small_only);
        let Some(stall) = stall else {
            return Some(self.budget.enter(bytes).await);
        };
        if self.stalled {
            return None;
        }
        let room = tokio::time::timeout(stall, self.budget.enter(bytes)).await.ok();
        self.stalled = room.is_none();
        room
    }

    /// Waits until something is in the chunk; `false` at the end.
    async fn fill(&mut self) -> Result<bool, Status> {
        while self.chunk.is_empty() {
            match self.body.frame().await {
                None => return Ok(false),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.chunk = data;
                    }
                }
                // As the library has it.
                Some(Err(status)) if status.code() == Code::Cancelled => {
                    self.cancelled = true;
                    return Ok(false);
                }
                Some(Err(status)) => return Err(status),
            }
        }
        Ok(true)
    }

    /// The bytes of a message that has its room; `None` if the client cancels before they are there.
    async fn read(&mut self, length: usize) -> Result<Option<Bytes>, Status> {
        if self.chunk.len() >= length {
            return Ok(Some(self.chunk.split_to(length)));
        }
        // The system gives it page by page, as it is filled.
        let mut bytes = Vec::with_capacity(length);
        let budget = self.budget.clone();
        let overstayed = budget.overstayed(length);
        tokio::pin!(overstayed);
        while bytes.len() < length {
            let more = tokio::select! {
                biased;
                more = self.fill() => more?,
                () = &mut overstayed => {
                    return Err(Status::unavailable(
                        "timed out waiting for the rest of a message while other messages need its memory \
                         (--limit=queue-memory=SIZE); send it again",
                    ));
                }
            };
            if !more {
                return if self.cancelled {
                    Ok(None)
                } else {
                    Err(cut_short())
                };
            }
            let n = self.chunk.len().min(length - bytes.len());
            bytes.extend_from_slice(&self.chunk.split_to(n));
        }
        Ok(Some(bytes.into()))
    }

    async fn expand(
        &mut self,
        encoding: Encoding,
        bytes: Bytes,
        room: Option<Room>,
    ) -> Result<Message, Status> {
        let (budget, most) = (self.budget.clone(), self.most);
        if bytes.len() <= AT_ONCE {
            return expanded(encoding, &bytes, room, &budget, most);
        }
        let work = move || expanded(encoding, &bytes, room, &budget, most);
        tokio::task::spawn_blocking(work)
            .await
            .map_err(|e| Status::internal(e.to_string()))?
    }
}

fn too_large(most: usize) -> Status {
    Status::out_of_range(format!("message exceeds the limit of {most} bytes"))
}

/// Decompresses a message as far as there is room for it.
fn expanded(
    encoding: Encoding,
    bytes: &[u8],
    mut room: Option<Room>,
    budget: &Budget,
    most: usize,
) -> Result<Message, Status> {
    let broken = |error: std::io::Error| Status::internal(format!("failed to decompress a message: {error}"));
    let mut reader: Box<dyn Read + '_> = match encoding {
        Encoding::Gzip => Box::new(flate2::read::GzDecoder::new(bytes)),
        Encoding::Zstd => {
            let mut reader = zstd::stream::read::Decoder::with_buffer(bytes).map_err(broken)?;
            reader.window_log_max(WINDOW_LOG).map_err(broken)?;
            Box::new(reader)
        }
    };
    let mut expanded = Vec::new();
    loop {
        let before = expanded.len();
        if let Some(room) = &mut room
            && !budget.grow(room, super::budget::weight(before) + STEP as usize)
        {
            return Err(Status::unavailable(
                "not enough memory for a compressed message at the moment (--limit=queue-memory=SIZE); send it \
                 again",
            ));
        }
        let n = (&mut reader)
            .take(STEP)
            .read_to_end(&mut expanded)
            .map_err(broken)?;
        if expanded.len() > most {
            return Err(too_large(most));
        }
        if n == 0 {
            break;
        }
    }
    expanded.shrink_to_fit();
    Ok(Message {
        bytes: expanded.into(),
        room,
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use bytes::Bytes;
    use futures::stream;
    use http_body::Frame;
    use http_body_util::StreamBody;
    use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

    use super::*;

    fn compressed(encoding: Encoding, bytes: &[u8]) -> Vec<u8> {
        match encoding {
            Encoding::Gzip => {
                let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                writer.write_all(bytes).unwrap();
                writer.finish().unwrap()
            }
            Encoding::Zstd => zstd::bulk::compress(bytes, 1).unwrap(),
        }
    }

    fn framed(flag: u8, bytes: &[u8]) -> Vec<u8> {
        let mut framed = vec![flag];
        framed.extend((bytes.len() as u32).to_be_bytes());
        framed.extend(bytes);
        framed
    }

    fn inbound(chunks: Vec<Bytes>, encoding: Option<Encoding>, most: usize, budget: &Budget) -> Inbound {
        let frames = chunks
            .into_iter()
            .map(|chunk| Ok::<_, Status>(Frame::data(chunk)));
        let body = Body::new(StreamBody::new(stream::iter(frames)));
        let mut headers = HeaderMap::new();
        match encoding {
            Some(Encoding::Gzip) => drop(headers.insert("grpc-encoding", "gzip".parse().unwrap())),
            Some(Encoding::Zstd) => drop(headers.insert("grpc-encoding", "zstd".parse().unwrap())),
            None => {}
        }
        Inbound::new(body, &headers, most, budget.clone())
    }

    async fn refused(inbound: &mut Inbound) -> Code {
        inbound
            .message()
            .await
            .err()
            .map_or(Code::Ok, |status| status.code())
    }

    #[tokio::test]
    async fn messages_are_read_however_they_are_cut_and_compressed() {
        for seed in 0..200 {
            let mut random = StdRng::seed_from_u64(seed);
            let encoding = [None, Some(Encoding::Gzip), Some(Encoding::Zstd)][seed as usize % 3];
            let (mut sent, mut wire) = (Vec::new(), Vec::new());
            for _ in 0..random.random_range(0..8) {
                let mut message = vec![0_u8; random.random_range(0..3000)];
                random.fill(&mut message[..]);
                let encoding = encoding.filter(|_| random.random());
                wire.extend(match encoding {
                    Some(encoding) => framed(1, &compressed(encoding, &message)),
                    None => framed(0, &message),
                });
                sent.push(message);
            }
            let mut chunks = Vec::new();
            let mut rest = Bytes::from(wire);
            while !rest.is_empty() {
                let most = random.random_range(1..2000);
                chunks.push(rest.split_to(rest.len().min(random.random_range(0..most))));
            }
            let budget = Budget::new(16 << 20);
            let mut inbound = inbound(chunks, encoding, 1 << 20, &budget);
            for message in sent {
                let read = inbound.message().await.unwrap().unwrap();
                assert_eq!(read.bytes, message, "{seed}");
                assert!(budget.taken() >= message.len());
            }
            assert!(inbound.message().await.unwrap().is_none());
            assert_eq!(budget.taken(), 0);
        }
    }

    #[tokio::test]
    async fn what_is_no_message_is_refused() {
        let budget = Budget::new(16 << 20);
        for (wire, code) in [
            (framed(0, &[0; 2000]), Code::OutOfRange),
            (framed(1, &[0; 10]), Code::Internal),
            (framed(7, &[0; 10]), Code::Internal),
            (framed(0, &[0; 10])[..9].to_vec(), Code::Internal),
            (vec![0, 0, 0], Code::Internal),
        ] {
            let mut inbound = inbound(vec![wire.clone().into()], None, 1000, &budget);
            assert_eq!(refused(&mut inbound).await, code, "{wire:?}");
        }
        assert_eq!(budget.taken(), 0);
    }

    #[tokio::test]
    async fn what_grows_beyond_the_limit_or_the_budget_is_refused() {
        for encoding in [Encoding::Gzip, Encoding::Zstd] {
            let bomb = framed(1, &compressed(encoding, &vec![0; 8 << 20]));
            let budget = Budget::new(64 << 20);
            let mut limited = inbound(vec![bomb.clone().into()], Some(encoding), 1 << 20, &budget);
            assert_eq!(refused(&mut limited).await, Code::OutOfRange);
            // Others have some of what it would need.
            let budget = Budget::new(8 << 20);
            let held = (budget.enter(100 << 10).await, budget.enter(200 << 10).await);
            let mut crowded = inbound(vec![bomb.clone().into()], Some(encoding), 64 << 20, &budget);
            assert_eq!(refused(&mut crowded).await, Code::Unavailable);
            drop(held);
            let mut broken = bomb.clone();
            let middle = bomb.len() / 2;
            broken[middle] ^= 0xff;
            broken.truncate(bomb.len() - 3);
            broken[1..5].copy_from_slice(&((bomb.len() - PREFIX - 3) as u32).to_be_bytes());
            let mut broken = inbound(vec![broken.into()], Some(encoding), 64 << 20, &budget);
            assert!(broken.message().await.is_err());
            assert_eq!(budget.taken(), 0);
        }
    }
}
