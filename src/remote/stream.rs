//! Large blobs, as streams that survive a broken connection.
//!
//! `ByteStream.Read` names the blob and an offset. When a stream ends early, breaks or stalls, the next one starts
//! where the bytes that the sink took end, without compression: some servers do not know offsets of compressed blobs, one
//! even forgets the blob (Buildfarm).

use std::{fmt::Display, time::Duration};

use bazel_remote_apis::google::bytestream::ReadRequest;
use bytes::Bytes;
use tokio::time::Instant;

use super::{
    Attribution, Capabilities, Sink,
    call::Pieces,
    client::{Client, Failure, guarded, services},
    compression::Running,
    inflate::Inflater,
    pool::Connections,
    stall::StallWatch,
    wire,
};
use crate::{
    digest::Digest,
    transport::{RemoteError, RemoteErrorKind},
};

/// Smaller blobs are not worth a zstd frame. Bazel's `--experimental_remote_cache_compression_threshold`.
pub(super) const COMPRESSION_THRESHOLD: u64 = 100;

/// How long the end of a stream is waited for after its last byte.
pub(super) const END_GRACE: Duration = Duration::from_secs(2);

/// Streams a blob into a sink from byte `offset`. See [`super::BlobStore::read_stream`].
pub(crate) async fn read(
    client: &Client,
    capabilities: &Capabilities,
    digest: &Digest,
    offset: u64,
    attribution: &Attribution,
    avoid: Connections,
    sink: &mut dyn Sink,
) -> Result<(), RemoteError> {
    let context = client.context(format_args!("blob {digest}"));
    if offset > digest.size() {
        return Err(RemoteError::rejected(
            context,
            format!("requested from byte {offset}, past its end"),
        ));
    }
    let running = client
        .streams
        // Where wrong bytes came before, compression is left out, in case that was to blame.
        .begin(
            capabilities.zstd_streams
                && digest.size() >= COMPRESSION_THRESHOLD
                && avoid == Connections::default(),
        );
    let mut transfer = Transfer {
        client,
        context,
        digest,
        attribution,
        avoid,
        compressed: running.zstd() && offset == 0,
        running,
        offset,
        sink,
    };
    let mut backoff = client.retry.start_at(offset);
    // The empty blob, and the rest of a blob that is complete, need no request.
    while transfer.offset < digest.size() {
        let failure = match transfer.attempt().await {
            Ok(()) => break,
            Err(failure) => failure,
        };
        // A proxy that hands on its backend's capabilities may not know the compressed names itself.
        if transfer.compressed && failure.error.kind == RemoteErrorKind::Rejected {
            tracing::debug!(error = %failure.error, "requesting the uncompressed blob");
            transfer.compressed = false;
            continue;
        }
        transfer.compressed &= transfer.offset == 0;
        backoff.resume(failure.error, transfer.offset).await?;
    }
    Ok(())
}

struct Transfer<'a> {
    client: &'a Client,
    context: String,
    digest: &'a Digest,
    attribution: &'a Attribution,
    avoid: Connections,
    compressed: bool,
    running: Running<'a>,
    /// How many of the blob's bytes the sink has.
    offset: u64,
    sink: &'a mut dyn Sink,
}

impl Transfer<'_> {
    /// One stream, from the offset to its end, however that comes.
    async fn attempt(&mut self) -> Result<(), Failure> {
        let request = ReadRequest {
            resource_name: self.resource_name(),
            read_offset: i64::try_from(self.offset).unwrap_or(i64::MAX),
            read_limit: 0,
        };
        let request = wire::read_request(&request);
        let (mut stream, line) = self
            .client
            .once(
                (services::BYTE_STREAM, &self.context),
                self.attribution,
                &mut self.avoid,
                &request,
                wire::read,
            )
            .await?;
        self.client.pool.note(self.digest, line.index);
        let result = self.receive(&mut stream).await;
        if let Err(failure) = &result {
            self.avoid = self.client.after(line, failure);
        }
        result
    }

    async fn receive(&mut self, stream: &mut Pieces) -> Result<(), Failure> {
        let mut inflater = if self.compressed {
            Some(Inflater::new().map_err(|e| self.protocol(e))?)
        } else {
            None
        };
        let mut watch = StallWatch::new(
            self.client.options.stall_timeout,
            self.client.options.min_throughput,
        );
        let most = largest_stream(self.digest.size() - self.offset);
        let mut wire = 0_u64;
        while self.offset < self.digest.size() {
            let before = Instant::now();
            let next = tokio::time::timeout(watch.left(), guarded(stream.next())).await;
            let waited = before.elapsed();
            let Ok(next) = next else {
                // Bytes on the wire count, not those that came out of the decompressor.
                if watch.is_stalled(waited) {
                    return Err(self.stalled());
                }
                continue;
            };
            let piece = match next {
                Ok(Some(piece)) => piece,
                Ok(None) => return Err(self.ended_early().into()),
                Err(status) => return Err(self.client.failed(&self.context, &status)),
            };
            if watch.brought(piece.len(), waited) {
                return Err(self.stalled());
            }
            match &mut inflater {
                None => self.take(piece).await?,
                Some(inflater) => {
                    // Frames with nothing in them count as progress, and need not end.
                    wire += piece.len() as u64;
                    if wire > most {
                        return Err(self
                            .protocol("the server sent more compressed bytes than the blob can have")
                            .into());
                    }
                    self.inflate(inflater, &piece).await?;
                }
            }
        }
        self.finish(stream, inflater.as_mut()).await
    }

    /// Unpacks a message into the sink, piece by piece.
    async fn inflate(&mut self, inflater: &mut Inflater, data: &[u8]) -> Result<(), Failure> {
        let mut rest = data;
        loop {
            let left = self.digest.size() - self.offset;
            let piece = inflater.run(&mut rest, left).map_err(|e| self.protocol(e))?;
            if piece.is_empty() {
                return Ok(());
            }
            self.take(piece).await?;
        }
    }

    /// Hands bytes to the sink, unless they are more than there should be.
    async fn take(&mut self, bytes: Bytes) -> Result<(), Failure> {
        let left = self.digest.size() - self.offset;
        let length = bytes.len() as u64;
        if length > left {
            return Err(self
                .protocol("the server sent more bytes than the blob has")
                .into());
        }
        if length == 0 {
            return Ok(());
        }
        self.sink
            .write(bytes)
            .await
            .map_err(|message| RemoteError::sink(&self.context, message))?;
        self.offset += length;
        if self.compressed == self.running.zstd() {
            self.running.brought(length);
        }
        Ok(())
    }

    /// All bytes are there: nothing but the end may follow. An error instead of the end does not take them away
    /// (Bazel reads streams so too), and an end that does not come is not waited for.
    async fn finish(
        &mut self,
        stream: &mut Pieces,
        mut inflater: Option<&mut Inflater>,
    ) -> Result<(), Failure> {
        let deadline = Instant::now() + END_GRACE.min(self.client.options.stall_timeout);
        while let Ok(Ok(Some(piece))) = tokio::time::timeout_at(deadline, guarded(stream.next())).await {
            let excess = match &mut inflater {
                None => true,
                // The frame's own end is still to come.
                Some(inflater) => {
                    let mut rest = &*piece;
                    !inflater
                        .run(&mut rest, 0)
                        .map_err(|e| self.protocol(e))?
                        .is_empty()
                }
            };
            if excess {
                return Err(self
                    .protocol("the server sent more bytes than the blob has")
                    .into());
            }
        }
        Ok(())
    }

    fn resource_name(&self) -> String {
        let mut name = self.client.instance();
        if !name.is_empty() {
            name.push('/');
        }
        name.push_str(if self.compressed {
            "compressed-blobs/zstd/"
        } else {
            "blobs/"
        });
        if self.digest.function().is_named() {
            name.push_str(self.digest.function().name());
            name.push('/');
        }
        name.push_str(&format!("{}/{}", self.digest.hash_hex(), self.digest.size()));
        name
    }

    fn protocol(&self, message: impl Display) -> RemoteError {
        RemoteError::protocol(self.context.clone(), message)
    }

    fn stalled(&self) -> Failure {
        let options = &self.client.options;
        RemoteError::timeout(
            self.context.clone(),
            format!(
                "stalled at byte {}: less than {} bytes/s over {:?}",
                self.offset,
                options.min_throughput.max(1),
                options.stall_timeout
            ),
        )
        .into()
    }

    fn ended_early(&self) -> RemoteError {
        RemoteError::unavailable(
            self.context.clone(),
            format!("the stream ended at byte {} without an error", self.offset),
        )
    }
}

/// The maximum compressed size of this many bytes: a few percent more, if they come in many frames.
pub(super) const fn largest_stream(bytes: u64) -> u64 {
    bytes.saturating_add(bytes / 8).saturating_add(1 << 20)
}
