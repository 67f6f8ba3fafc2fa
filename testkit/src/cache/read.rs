//! `ByteStream.Read`: a blob, or the end of one, as a stream of messages.

use std::io::{self, Write as _};

use bazel_remote_apis::google::bytestream::ReadRequest;
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt as _};
use tonic::{Request, Status};

use super::{
    batch_read::{garble, spoil},
    cas::ZSTD_LEVEL,
    context::{Shared, busy, injected},
    faults::{BlobFault, Transfer, packed},
    resource::Resource,
    stats::{Rpc, add},
};
use outhaul_digest::Digest;

/// Bytes in a message. Well below the 4 MiB that gRPC's clients take by default, also where zstd makes data grow.
const MESSAGE: usize = 1 << 20;

/// Bytes that are compressed at a time, so that a message ends near [`MESSAGE`].
const COMPRESSED_PIECE: usize = 256 << 10;

/// Bytes that are compressed before a message is sent, however small they became: other tasks want the thread.
const COMPRESSED_MESSAGE: usize = 8 << 20;

/// A stream of messages' data.
pub(super) type ReadStream = BoxStream<'static, Result<Bytes, Ending>>;

/// How a stream ends that does not end well.
#[derive(Debug)]
pub(super) enum Ending {
    /// With a status.
    Status(Status),
    /// With a status, after the beginning of a message that has these bytes and promises more.
    Within(Bytes, Status),
    /// Reset by the transport.
    Reset,
    /// Without a status.
    Nothing,
}

impl From<Status> for Ending {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

/// Where a fault ends a stream, in bytes before compression, and how.
#[derive(Debug, Clone, Copy)]
struct Limit {
    at: u64,
    how: BlobFault,
}

impl Limit {
    const fn of(fault: BlobFault) -> Option<Self> {
        let at = match fault {
            BlobFault::CutAfter(at)
            | BlobFault::CutWithin(at)
            | BlobFault::EndAfter(at)
            | BlobFault::ResetAfter(at)
            | BlobFault::StallAfter(at) => at,
            _ => return None,
        };
        Some(Self { at, how: fault })
    }
}

/// A stream in the making.
struct Reading {
    context: Shared,
    digest: Digest,
    blob: Bytes,
    position: u64,
    end: u64,
    /// Bytes before compression that went out.
    sent: u64,
    encoder: Option<zstd::stream::write::Encoder<'static, Vec<u8>>>,
    fault: Option<BlobFault>,
    limit: Option<Limit>,
    done: bool,
}

/// Checks a request and makes its stream.
pub(super) async fn read(context: &Shared, request: Request<ReadRequest>) -> Result<ReadStream, Status> {
    context.enter(Rpc::StreamRead, &request).await?;
    let request = request.into_inner();
    let resource = Resource::for_read(&request.resource_name)?;
    let digest = context.resource(&resource)?;
    if request.read_offset > 0 {
        add(&context.counters.stream_reads_resumed, 1);
    }
    if resource.compressed {
        add(&context.counters.stream_reads_compressed, 1);
    }
    let place = Transfer {
        batch: false,
        compressed: resource.compressed,
    };
    let fault = context.faults.on_blob(&digest, place);
    match fault {
        Some(BlobFault::Status(code)) => return Err(injected(code)),
        Some(BlobFault::RetryAfter(patience)) => return Err(busy(patience)),
        Some(BlobFault::Evict) => {
            context.store.remove(&digest);
        }
        Some(BlobFault::Delay(time)) => tokio::time::sleep(time).await,
        _ => {}
    }
    let not_found = || Status::not_found(format!("blob {digest} is not here"));
    let blob = context.store.get(&digest).ok_or_else(not_found)?;
    let size = blob.len() as u64;
    let (offset, end) = range(&request, size, &resource, &digest)?;
    let end = match fault {
        Some(BlobFault::Resize(by @ ..0)) => end.saturating_add_signed(by).max(offset),
        _ => end,
    };
    if let Some(fault) = fault.filter(|_| resource.compressed)
        && let Some(packed) = packed(&slice(&blob, offset, size - offset), fault)
    {
        add(&context.counters.wire_bytes_out, packed.len() as u64);
        let mut packed = Bytes::from(packed);
        let messages = std::iter::from_fn(move || {
            let length = packed.len().min(MESSAGE);
            (length > 0).then(|| Ok(packed.split_to(length)))
        });
        return Ok(stream::iter(messages).boxed());
    }
    let encoder = resource
        .compressed
        .then(|| zstd::stream::write::Encoder::new(Vec::new(), ZSTD_LEVEL))
        .transpose()
        .map_err(|error| failed(&digest, &error))?;
    let reading = Reading {
        context: context.clone(),
        digest,
        blob,
        position: offset,
        end,
        sent: 0,
        encoder,
        fault,
        limit: fault.and_then(Limit::of),
        done: false,
    };
    Ok(stream::try_unfold(reading, Reading::next).boxed())
}

/// Which bytes of a blob are asked for.
fn range(
    request: &ReadRequest,
    size: u64,
    resource: &Resource<'_>,
    digest: &Digest,
) -> Result<(u64, u64), Status> {
    let offset = u64::try_from(request.read_offset)
        .ok()
        .filter(|&offset| offset <= size)
        .ok_or_else(|| Status::out_of_range(format!("offset {} of blob {digest}", request.read_offset)))?;
    let end = match u64::try_from(request.read_limit) {
        Ok(0) => size,
        // The API: a limit has no meaning for compressed bytes.
        Ok(_) if resource.compressed => {
            return Err(Status::invalid_argument(
                "read_limit must be 0 for compressed blobs",
            ));
        }
        Ok(limit) => size.min(offset.saturating_add(limit)),
        Err(_) => return Err(Status::invalid_argument("read_limit is negative")),
    };
    Ok((offset, end))
}

impl Reading {
    /// The next message; `None` after the last one.
    async fn next(mut self) -> Result<Option<(Bytes, Self)>, Ending> {
        if self.done {
            return self.end();
        }
        let data = if self.encoder.is_some() {
            self.compressed_message().await?.into()
        } else {
            self.plain_message().await?
        };
        // The empty blob needs no message, an empty frame is not empty.
        if data.is_empty() {
            return self.end();
        }
        add(&self.context.counters.wire_bytes_out, data.len() as u64);
        Ok(Some((data, self)))
    }

    /// The end of all bytes.
    fn end(&self) -> Result<Option<(Bytes, Self)>, Ending> {
        match self.fault {
            Some(BlobFault::NoTrailers) => Err(Ending::Nothing),
            _ => Ok(None),
        }
    }

    async fn plain_message(&mut self) -> Result<Bytes, Ending> {
        let piece = self.piece(MESSAGE);
        if piece.is_empty() {
            self.at_limit().await?;
        }
        self.done = self.position == self.end && self.limit.is_none();
        Ok(self.spoiled(piece))
    }

    async fn compressed_message(&mut self) -> Result<Vec<u8>, Ending> {
        let from = self.sent;
        loop {
            let piece = self.piece(COMPRESSED_PIECE);
            let was_empty = piece.is_empty();
            let piece = self.spoiled(piece);
            let error = |error| failed(&self.digest, &error);
            let Some(encoder) = &mut self.encoder else {
                return Ok(Vec::new());
            };
            encoder.write_all(&piece).map_err(error)?;
            if self.position == self.end && self.limit.is_none() {
                self.done = true;
                let finished = self.encoder.take().map(zstd::stream::write::Encoder::finish);
                let data = finished.transpose().map_err(error)?;
                return Ok(self.garbled(data.unwrap_or_default(), from));
            }
            let full = encoder.get_ref().len() + COMPRESSED_PIECE > MESSAGE
                || self.sent - from >= COMPRESSED_MESSAGE as u64;
            if full || was_empty {
                // What a fault ends here shall have arrived.
                encoder.flush().map_err(error)?;
                let data = std::mem::take(encoder.get_mut());
                if !data.is_empty() {
                    return Ok(self.garbled(data, from));
                }
                self.at_limit().await?;
            }
        }
    }

    /// The next bytes of the blob; none at the end, or where a fault ends the stream.
    fn piece(&mut self, most: usize) -> Bytes {
        let allowed = match self.limit {
            Some(limit) => limit.at - self.sent,
            None => u64::MAX,
        };
        let length = (self.end - self.position).min(allowed).min(most as u64);
        let piece = slice(&self.blob, self.position, length);
        self.position += length;
        self.sent += length;
        add(&self.context.counters.bytes_out, length);
        piece
    }

    /// Ends the stream as the fault asks, if this is the place; at the blob's end, the fault came too late.
    async fn at_limit(&mut self) -> Result<(), Ending> {
        let Some(limit) = self.limit.take().filter(|limit| limit.at == self.sent) else {
            return Ok(());
        };
        let broken = || injected(tonic::Code::Unavailable);
        match limit.how {
            BlobFault::StallAfter(_) => std::future::pending().await,
            BlobFault::ResetAfter(_) => Err(Ending::Reset),
            BlobFault::CutWithin(_) => {
                // No bytes of a blob can be put between those of a compressed message.
                let left = (self.end - self.position).min(if self.encoder.is_some() { 0 } else { 7 });
                let more = slice(&self.blob, self.position, left);
                Err(Ending::Within(more, broken()))
            }
            BlobFault::EndAfter(_) => {
                self.end = self.position;
                Ok(())
            }
            _ => Err(broken().into()),
        }
    }

    /// The piece's bytes, changed where a fault asks for it.
    fn spoiled(&self, piece: Bytes) -> Bytes {
        let (first, last) = (self.sent == piece.len() as u64, self.position == self.end);
        let fault = match self.fault {
            Some(fault @ (BlobFault::Corrupt | BlobFault::CorruptAt(_))) if first => fault,
            Some(fault @ BlobFault::Resize(1..)) if last => fault,
            _ => return piece,
        };
        let mut data = Vec::from(piece);
        spoil(&mut data, fault);
        data.into()
    }

    fn garbled(&self, mut data: Vec<u8>, from: u64) -> Vec<u8> {
        if from == 0 && self.fault == Some(BlobFault::GarbleCompression) {
            garble(&mut data);
        }
        data
    }
}

/// Bytes of a blob, as far as it has them. 64 bits, as everywhere: no offset is cut.
fn slice(blob: &Bytes, offset: u64, length: u64) -> Bytes {
    let start = (offset as usize).min(blob.len());
    blob.slice(start..start.saturating_add(length as usize).min(blob.len()))
}

fn failed(digest: &Digest, error: &io::Error) -> Status {
    Status::internal(format!("reading blob {digest}: {error}"))
}
