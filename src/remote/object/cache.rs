//! A bucket as a cache: blobs and action results below the keys of a layout.

use std::{fmt::Display, io, sync::Arc};

use async_trait::async_trait;
use bazel_remote_apis::build::bazel::remote::execution::v2::ActionResult;
use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture};
use tokio::sync::Semaphore;

use super::{
    bucket::{Bucket, Reading},
    service::PARALLEL,
};
use crate::{
    digest::{Digest, DigestFunction},
    remote::{
        ActionStore, Attribution, BatchAnswer, BlobStore, Capabilities, RemoteOptions, Sink,
        casblob::{self, Decoder, Header, Parsed},
        disk::decode,
        inflate::Inflater,
        layout::{Encoding, Kind, Layout},
        reading::Collect,
        stream::largest_stream,
    },
    transport::{RemoteError, RemoteErrorKind},
};

/// Sum of the blobs' sizes that one call for small blobs may have, in bytes.
const BATCH: u64 = 4 << 20;
/// The largest action result, in bytes.
const MAX_RESULT: u64 = 64 << 20;
/// How much of a compressed object is read at first to find a place in it: enough for 500 chunks.
const BEGINNING: u64 = 4096;

/// A bucket that a cache keeps its blobs in. Its bytes are no more believed than any server's.
pub(crate) struct ObjectCache {
    bucket: Bucket,
    layout: Layout,
    slots: Semaphore,
}

impl ObjectCache {
    /// Opens the bucket at the options' address. Connects nothing yet.
    ///
    /// # Errors
    /// [`RemoteErrorKind::Config`], naming what is wrong with the address or the credentials.
    pub(crate) fn new(options: &RemoteOptions) -> Result<Self, RemoteError> {
        options.validate()?;
        Self::with(Bucket::open(options)?)
    }

    pub(super) fn with(bucket: Bucket) -> Result<Self, RemoteError> {
        let address = bucket.address();
        let layout = Layout::new(
            address.layout.as_deref(),
            address.template.as_deref(),
            address.encoding.as_deref(),
        )
        .map_err(|e| RemoteError::config(format!("--remote-cache={address}"), e.to_string()))?;
        Ok(Self {
            bucket,
            layout,
            slots: Semaphore::new(PARALLEL),
        })
    }

    fn error(&self, kind: RemoteErrorKind, what: &str, message: impl Display) -> RemoteError {
        RemoteError::new(kind, format!("{what} in {}", self.bucket.address()), message)
    }

    /// One request after the other, until one succeeds or no other may.
    async fn retrying<'a, T>(
        &self,
        ask: impl Fn() -> BoxFuture<'a, Result<T, RemoteError>> + Send + Sync,
    ) -> Result<T, RemoteError> {
        // Nobody closes it.
        let _slot = self.slots.acquire().await;
        self.bucket.retry().run(ask).await
    }

    /// Brings a blob's bytes from `offset` on into the sink, resuming where the sink's bytes end.
    async fn transfer(&self, digest: &Digest, offset: u64, sink: &mut dyn Sink) -> Result<(), RemoteError> {
        let key = self.layout.key(Kind::Blob, digest).unwrap_or_default();
        let mut transfer = Transfer {
            cache: self,
            key: &key,
            digest,
            at: offset,
            sink,
        };
        let mut backoff = self.bucket.retry().start_at(offset);
        while transfer.at < digest.size() {
            match transfer.attempt().await {
                Ok(()) => break,
                Err(error) => backoff.resume(error, transfer.at).await?,
            }
        }
        Ok(())
    }

    async fn whole(&self, digest: &Digest) -> Result<Bytes, RemoteError> {
        let _slot = self.slots.acquire().await;
        let mut whole = Collect::default();
        self.transfer(digest, 0, &mut whole).await?;
        Ok(whole.into_bytes())
    }

    async fn result(&self, action: &Digest) -> Result<Option<Arc<ActionResult>>, RemoteError> {
        let what = format!("result for action {action}");
        // Its blobs can be read all the same.
        let key = self.layout.key(Kind::Action, action).ok_or_else(|| {
            self.error(
                RemoteErrorKind::Rejected,
                &what,
                "the layout does not say where action results are; use template= with {kind}",
            )
        })?;
        let bytes = match self.retrying(|| self.read_result(&key, &what).boxed()).await {
            Err(error) if error.is_not_found() => return Ok(None),
            bytes => bytes?,
        };
        let result = decode(&bytes).map_err(|message| {
            let message = format!("the object {key:?} is not an action result: {message}");
            self.error(RemoteErrorKind::Protocol, &what, message)
        })?;
        Ok(Some(Arc::new(result)))
    }

    async fn read_result(&self, key: &str, what: &str) -> Result<Vec<u8>, RemoteError> {
        let mut reading = self.bucket.get(key, 0, None).await?;
        let mut bytes = Vec::new();
        while let Some(piece) = reading.next().await? {
            if (bytes.len() + piece.len()) as u64 > MAX_RESULT {
                return Err(self.error(RemoteErrorKind::Protocol, what, "it is too large"));
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }

    async fn casblob_size(&self, key: &str, what: &str) -> Result<Option<u64>, RemoteError> {
        let (beginning, _) = self.bucket.beginning(key, casblob::FIXED as u64).await?;
        let message = |e| self.error(RemoteErrorKind::Protocol, what, format!("the object {key:?} {e}"));
        casblob::plain_size(&beginning).map(Some).map_err(message)
    }

    async fn plain_size(&self, function: DigestFunction, hash: &[u8]) -> Result<Option<u64>, RemoteError> {
        let what = format!("blob {}", hex::encode(hash));
        let unknown = |message: &str| self.error(RemoteErrorKind::Config, &what, message);
        let key = self
            .layout
            .key_of_hash(function, hash)
            .ok_or_else(|| unknown("the layout's keys have sizes in them: give HASH/SIZE"))?;
        let size = match self.layout.encoding(Kind::Blob) {
            Encoding::Identity => self.retrying(|| self.bucket.size(&key).boxed()).await,
            Encoding::Zstd => Err(unknown(
                "compressed objects do not have their size: give HASH/SIZE",
            )),
            Encoding::Casblob => self.retrying(|| self.casblob_size(&key, &what).boxed()).await,
        };
        match size {
            Err(error) if error.is_not_found() => Ok(None),
            size => size,
        }
    }
}

/// A blob on its way.
struct Transfer<'a> {
    cache: &'a ObjectCache,
    key: &'a str,
    digest: &'a Digest,
    /// How many of the blob's bytes the sink has.
    at: u64,
    sink: &'a mut dyn Sink,
}

/// Unpacks an object, or what of it comes.
enum Unpacker {
    Identity,
    Zstd(Inflater),
    Casblob(Decoder),
}

impl Unpacker {
    /// Takes some of `input` and gives a piece of what it holds, at most one byte more than `left`.
    fn run(&mut self, input: &mut &[u8], left: u64) -> io::Result<Bytes> {
        match self {
            Self::Identity => Ok(Bytes::copy_from_slice(std::mem::take(input))),
            Self::Zstd(inflater) => inflater.run(input, left),
            Self::Casblob(decoder) => decoder.run(input, left).map_err(io::Error::other),
        }
    }
}

impl Transfer<'_> {
    /// One object, from where we are to its end, however that comes.
    async fn attempt(&mut self) -> Result<(), RemoteError> {
        let bucket = &self.cache.bucket;
        let size = self.digest.size();
        match self.cache.layout.encoding(Kind::Blob) {
            Encoding::Identity => {
                let reading = bucket.get(self.key, self.at, None).await?;
                if reading.size != size {
                    return Err(self.protocol(format!("has {} bytes instead of {size}", reading.size)));
                }
                self.take(reading, Unpacker::Identity, 0).await
            }
            Encoding::Zstd => {
                let reading = bucket.get(self.key, 0, None).await?;
                let inflater = Inflater::new().map_err(|e| self.protocol(e))?;
                self.take(reading, Unpacker::Zstd(inflater), self.at).await
            }
            Encoding::Casblob if self.at == 0 => {
                let reading = bucket.get(self.key, 0, None).await?;
                let decoder = Decoder::new(size, Some(reading.size));
                self.take(reading, Unpacker::Casblob(decoder), 0).await
            }
            Encoding::Casblob => {
                let (header, etag) = self.header().await?;
                if header.size() != size {
                    return Err(self.protocol(format!("holds {} bytes instead of {size}", header.size())));
                }
                let (from, skip) = header.place_of(self.at);
                // An object that was written again in the meantime has its chunks elsewhere.
                let rewritten = |mut error: RemoteError| {
                    if error.kind == RemoteErrorKind::Protocol && etag.is_some() {
                        error.kind = RemoteErrorKind::Unavailable;
                    }
                    error
                };
                let reading = bucket.get(self.key, from, etag.as_deref()).await;
                let reading = reading.map_err(rewritten)?;
                let decoder = Decoder::from_chunk(&header).map_err(|e| self.protocol(e))?;
                self.take(reading, Unpacker::Casblob(decoder), skip).await
            }
        }
    }

    async fn header(&mut self) -> Result<(Header, Option<String>), RemoteError> {
        let mut bytes = BEGINNING;
        loop {
            let (beginning, reading) = self.cache.bucket.beginning(self.key, bytes).await?;
            match Header::parse(&beginning, Some(reading.size)) {
                Ok(Parsed::Header(header)) => return Ok((header, reading.etag)),
                Ok(Parsed::Needs(more)) if more as u64 > bytes => bytes = more as u64,
                Ok(Parsed::Needs(_)) => return Err(self.protocol("ends within its header")),
                Err(error) => return Err(self.protocol(error)),
            }
        }
    }

    /// Hands the object's bytes to the sink, but for the first `skip` ones.
    async fn take(
        &mut self,
        mut reading: Reading,
        mut unpacker: Unpacker,
        mut skip: u64,
    ) -> Result<(), RemoteError> {
        let most = largest_stream(self.digest.size());
        let mut wire = 0;
        while let Some(piece) = reading.next().await? {
            wire += piece.len() as u64;
            if let Unpacker::Identity = unpacker {
                self.give(piece).await?;
                continue;
            }
            if wire > most {
                return Err(self.protocol("is larger than the blob can be"));
            }
            let mut input = &*piece;
            loop {
                let left = self.digest.size() - self.at + skip;
                let mut bytes = unpacker.run(&mut input, left).map_err(|e| self.protocol(e))?;
                if bytes.is_empty() {
                    break;
                }
                let skipped = bytes.len().min(usize::try_from(skip).unwrap_or(usize::MAX));
                skip -= skipped as u64;
                self.give(bytes.split_off(skipped)).await?;
            }
        }
        if self.at < self.digest.size() {
            return Err(self.protocol(format!("holds only {} of {} bytes", self.at, self.digest.size())));
        }
        Ok(())
    }

    async fn give(&mut self, bytes: Bytes) -> Result<(), RemoteError> {
        let length = bytes.len() as u64;
        if length > self.digest.size() - self.at {
            return Err(self.protocol("holds more bytes than the blob has"));
        }
        if length > 0 {
            self.sink.write(bytes).await.map_err(|message| {
                self.cache
                    .error(RemoteErrorKind::Sink, &format!("blob {}", self.digest), message)
            })?;
            self.at += length;
        }
        Ok(())
    }

    fn protocol(&self, message: impl Display) -> RemoteError {
        let what = format!("blob {}", self.digest);
        self.cache.error(
            RemoteErrorKind::Protocol,
            &what,
            format!("the object {:?} {message}", self.key),
        )
    }
}

#[async_trait]
impl BlobStore for ObjectCache {
    async fn capabilities(&self) -> Result<Capabilities, RemoteError> {
        Ok(Capabilities::plain(BATCH))
    }

    async fn read_batch(&self, digests: &[Digest], _: &Attribution, _: bool) -> Vec<BatchAnswer> {
        let whole = move |digest: Digest| async move {
            let answer = self.whole(&digest).await;
            (digest, answer)
        };
        futures::stream::iter(digests.to_vec())
            .map(whole)
            .buffered(PARALLEL)
            .collect()
            .await
    }

    async fn read_stream(
        &self,
        digest: &Digest,
        offset: u64,
        _: &Attribution,
        _: bool,
        sink: &mut dyn Sink,
    ) -> Result<(), RemoteError> {
        self.transfer(digest, offset, sink).await
    }

    async fn find_missing(&self, digests: &[Digest], _: &Attribution) -> Result<Vec<Digest>, RemoteError> {
        let is_missing = |digest: Digest| async move {
            if digest.is_empty() {
                return Ok(None);
            }
            let key = self.layout.key(Kind::Blob, &digest).unwrap_or_default();
            let size = self.retrying(|| self.bucket.size(&key).boxed()).await?;
            Ok(size.is_none().then_some(digest))
        };
        let asked = futures::stream::iter(digests.to_vec());
        let mut answers = asked.map(is_missing).buffered(PARALLEL);
        let mut absent = Vec::new();
        while let Some(answer) = answers.next().await {
            absent.extend(answer?);
        }
        Ok(absent)
    }

    fn describe(&self) -> String {
        self.bucket.address().to_string()
    }
}

#[async_trait]
impl ActionStore for ObjectCache {
    async fn action_result(
        &self,
        action: &Digest,
        _: &Attribution,
    ) -> Result<Option<Arc<ActionResult>>, RemoteError> {
        self.result(action).await
    }

    async fn blob_size(&self, function: DigestFunction, hash: &[u8]) -> Result<Option<u64>, RemoteError> {
        self.plain_size(function, hash).await
    }

    async fn probe(&self) -> Result<(), RemoteError> {
        let any = Digest::of(DigestFunction::Sha256, b"outhaul");
        let key = self.layout.key(Kind::Blob, &any).unwrap_or_default();
        self.bucket.probe(&key).await
    }
}
