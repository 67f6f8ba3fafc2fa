//! A blob by `GET`, resumed by range where it broke off.
//!
//! Servers differ in what they make of `Range`: some send the whole blob, another part of it or an error, and some
//! encode what they send although they were asked not to. Only what begins at or before the next byte that the sink waits
//! for can be used; where a range brings something else, the whole blob is asked for, and what the sink has is skipped.

use std::fmt::Display;

use bytes::{Buf as _, Bytes};
use http::{HeaderMap, Method, StatusCode, header, response::Parts};
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use tokio::time::Instant;

use super::{
    body::{Decoder, encoding, length},
    request::{Ask, Server, cas},
};
use crate::{
    digest::Digest,
    remote::{
        Sink,
        compression::Running,
        stall::StallWatch,
        stream::{COMPRESSION_THRESHOLD, END_GRACE, largest_stream},
    },
    transport::{HttpFault, RemoteError, RemoteErrorKind, http_head::content_range},
};

/// Reads a blob into a sink from byte `offset`. See [`crate::remote::BlobStore::read_stream`].
pub(super) async fn read(
    server: &Server,
    digest: &Digest,
    offset: u64,
    avoid: bool,
    sink: &mut dyn Sink,
) -> Result<(), RemoteError> {
    let context = server.context(format_args!("blob {digest}"));
    if offset > digest.size() {
        let message = format!("requested from byte {offset}, past its end");
        return Err(RemoteError::rejected(context, message));
    }
    let pays = server.may_know_zstd() && digest.size() >= COMPRESSION_THRESHOLD;
    // Where wrong bytes came before, compression is left out, in case that was to blame.
    let running = server.chooser.begin(pays && offset == 0 && !avoid);
    let mut transfer = Transfer {
        server,
        context,
        digest,
        path: cas(digest),
        way: if running.zstd() { Way::Zstd } else { Way::Plain },
        running,
        ranges: true,
        fresh: avoid,
        offset,
        sink,
    };
    let mut backoff = server.retry.start_at(offset);
    // The empty blob, and the rest of a blob that is complete, need no request.
    while transfer.offset < digest.size() {
        match transfer.attempt().await {
            Ok(Attempt::Done) => break,
            Ok(Attempt::Again) => {}
            Err(error) => backoff.resume(error, transfer.offset).await?,
        }
    }
    Ok(())
}

/// How a request ended that is not a failure.
enum Attempt {
    /// All bytes are there.
    Done,
    /// Another request, which asks for something else, may bring them.
    Again,
}

/// What is asked for, and what is made of an encoding that the answer names.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// zstd, undone.
    Zstd,
    /// No encoding; one that comes all the same is undone.
    Plain,
    /// No encoding; a named one is not believed.
    Undecoded,
}

struct Transfer<'a> {
    server: &'a Server,
    context: String,
    digest: &'a Digest,
    path: String,
    way: Way,
    running: Running<'a>,
    /// Whether parts are asked for.
    ranges: bool,
    fresh: bool,
    /// How many of the blob's bytes the sink has.
    offset: u64,
    sink: &'a mut dyn Sink,
}

impl Transfer<'_> {
    /// One request, from the offset to the blob's end.
    async fn attempt(&mut self) -> Result<Attempt, RemoteError> {
        let before = self.offset;
        let is_part = self.ranges && before > 0;
        let _connection = self.server.connection().await;
        let ask = Ask {
            method: Method::GET,
            path: &self.path,
            range: is_part.then(|| format!("bytes={before}-")),
            zstd: self.way == Way::Zstd && before == 0,
            fresh: self.fresh,
        };
        let answer = self.server.send(&self.context, &ask).await?;
        match answer.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => {}
            StatusCode::RANGE_NOT_SATISFIABLE if is_part => {
                self.ranges = false;
                return Ok(Attempt::Again);
            }
            _ => return Err(self.server.refused(&self.context, answer).await),
        }
        let (head, body) = answer.into_parts();
        let is_encoded = !encoding(&head.headers).is_empty();
        if ask.zstd && !is_encoded && self.digest.size() >= COMPRESSION_THRESHOLD {
            self.server.found_plain();
        }
        let begins = self.begins(&head);
        let Some(start) = begins.filter(|start| *start == 0 || !is_encoded) else {
            if is_part {
                self.ranges = false;
                return Ok(Attempt::Again);
            }
            return Err(self.protocol("the server sent a part of a blob that was not requested"));
        };
        match self.receive(&head.headers, body, start).await {
            // What an encoding is named for may be plain, or be encoded otherwise; nothing wrong has been used yet.
            Err(error) if error.kind == RemoteErrorKind::Protocol && is_encoded && self.offset == before => {
                self.way = match self.way {
                    Way::Zstd => Way::Plain,
                    Way::Plain => Way::Undecoded,
                    Way::Undecoded => return Err(error),
                };
                tracing::debug!(%error, "requesting the blob without an encoding");
                Ok(Attempt::Again)
            }
            Err(error) => Err(error),
            Ok(()) if self.offset == self.digest.size() => Ok(Attempt::Done),
            // A part that is less than was asked for.
            Ok(()) if start > 0 && self.offset > before => Ok(Attempt::Again),
            Ok(()) => Err(self.too_short(&head.headers)),
        }
    }

    /// Which byte of the blob the answer begins with; `None` if what it brings cannot be used.
    fn begins(&self, head: &Parts) -> Option<u64> {
        match content_range(&head.headers) {
            // Some servers answer 200 all the same.
            Some(range) => {
                let is_right = range.total.is_none_or(|total| total == self.digest.size());
                (is_right && range.first <= self.offset).then_some(range.first)
            }
            None => (head.status == StatusCode::OK).then_some(0),
        }
    }

    /// Takes the body in, up to its end or the blob's.
    async fn receive(
        &mut self,
        headers: &HeaderMap,
        mut body: Incoming,
        start: u64,
    ) -> Result<(), RemoteError> {
        let size = self.digest.size();
        let given = length(headers);
        // On a second try: decoded, it was wrong.
        let is_plain = self.way == Way::Undecoded || self.fresh && given == Some(size);
        let mut decoder = match is_plain {
            true => Decoder::Plain,
            false => Decoder::of(headers).map_err(|e| self.protocol(e))?,
        };
        if let Some(given) = given.filter(|_| decoder.is_plain())
            && (start.saturating_add(given) > size
                || start == 0 && given < size && !headers.contains_key(header::CONTENT_RANGE))
        {
            return Err(self.protocol(format!("the server has {given} bytes of it")));
        }
        let options = &self.server.options;
        let mut watch = StallWatch::new(options.stall_timeout, options.min_throughput);
        let mut skip = self.offset - start;
        let mut wire = 0;
        while self.offset < size {
            let began = Instant::now();
            let next = tokio::time::timeout(watch.left(), body.frame()).await;
            let waited = began.elapsed();
            let Ok(next) = next else {
                if watch.is_stalled(waited) {
                    return Err(self.stalled());
                }
                continue;
            };
            let Some(frame) = next else {
                let rest = decoder.finish().map_err(|e| self.protocol(e))?;
                return self.take(rest, &mut skip).await;
            };
            let frame = frame.map_err(|e| self.server.broken(&self.context, HttpFault::of(&e)))?;
            // Trailers say nothing.
            let Ok(mut piece) = frame.into_data() else {
                continue;
            };
            if watch.brought(piece.len(), waited) {
                return Err(self.stalled());
            }
            wire += piece.len() as u64;
            // Frames with nothing in them count as progress, and need not end.
            if !decoder.is_plain() && wire > largest_stream(size) {
                return Err(self.protocol("the server sent more compressed bytes than the blob can have"));
            }
            loop {
                let left = size - self.offset + skip;
                let piece = decoder.run(&mut piece, left).map_err(|e| self.protocol(e))?;
                if piece.is_empty() {
                    break;
                }
                self.take(piece, &mut skip).await?;
            }
        }
        self.finish(body, &mut decoder).await
    }

    /// Hands bytes to the sink, but for those that it has, unless they are more than there should be.
    async fn take(&mut self, mut bytes: Bytes, skip: &mut u64) -> Result<(), RemoteError> {
        let skipped = usize::try_from(*skip).map_or(bytes.len(), |skip| skip.min(bytes.len()));
        bytes.advance(skipped);
        *skip -= skipped as u64;
        let length = bytes.len() as u64;
        if length > self.digest.size() - self.offset {
            return Err(self.excess());
        }
        if length == 0 {
            return Ok(());
        }
        self.sink
            .write(bytes)
            .await
            .map_err(|message| RemoteError::sink(&self.context, message))?;
        self.offset += length;
        if (self.way == Way::Zstd) == self.running.zstd() {
            self.running.brought(length);
        }
        Ok(())
    }

    /// All bytes are there: nothing but the end may follow, and one that does not come is not waited for.
    async fn finish(&mut self, mut body: Incoming, decoder: &mut Decoder) -> Result<(), RemoteError> {
        let deadline = Instant::now() + END_GRACE.min(self.server.options.stall_timeout);
        while !body.is_end_stream() {
            let Ok(Some(Ok(frame))) = tokio::time::timeout_at(deadline, body.frame()).await else {
                break;
            };
            let Ok(mut piece) = frame.into_data() else {
                continue;
            };
            if !decoder
                .run(&mut piece, 0)
                .map_err(|e| self.protocol(e))?
                .is_empty()
            {
                return Err(self.excess());
            }
        }
        Ok(())
    }

    fn protocol(&self, message: impl Display) -> RemoteError {
        RemoteError::protocol(self.context.clone(), message)
    }

    fn excess(&self) -> RemoteError {
        self.protocol("the server sent more bytes than the blob has")
    }

    /// A body with an end of its own that comes too early is all that the server has. One that only the connection's end
    /// ends may have broken off.
    fn too_short(&self, headers: &HeaderMap) -> RemoteError {
        let has_end =
            headers.contains_key(header::CONTENT_LENGTH) || headers.contains_key(header::TRANSFER_ENCODING);
        let kind = match has_end {
            true => RemoteErrorKind::Protocol,
            false => RemoteErrorKind::Unavailable,
        };
        let message = format!("the server's answer ended at byte {}", self.offset);
        RemoteError::new(kind, self.context.clone(), message)
    }

    fn stalled(&self) -> RemoteError {
        let options = &self.server.options;
        let message = format!(
            "stalled at byte {}: less than {} bytes/s over {:?}",
            self.offset,
            options.min_throughput.max(1),
            options.stall_timeout
        );
        RemoteError::timeout(self.context.clone(), message)
    }
}
