//! A cache that speaks Bazel's HTTP cache protocol: `GET` of `cas/HASH` and `ac/HASH` below a base URL (Bazel's
//! `HttpCacheClient`). The protocol knows no capabilities and no batches, and names blobs by their hash alone, whatever
//! the digest function.

mod body;
mod read;
mod request;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, HashSet},
    fmt, io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use async_trait::async_trait;
use bazel_remote_apis::build::bazel::remote::execution::v2::ActionResult;
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use http::{Method, Response, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use parking_lot::Mutex;

use self::{
    body::{Decoder, encoding, length},
    request::{Ask, Server, cas, empty},
};
use super::{
    ActionStore, Attribution, BatchAnswer, BlobStore, Capabilities, RemoteOptions, Sink,
    capabilities::MAX_BATCH,
    client::MAX_MESSAGE,
    disk::decode,
    reading::Collect,
    retry::{SystemTimer, Timer},
};
use crate::{
    digest::{Digest, DigestFunction},
    transport::{HttpFault, RemoteError, RemoteErrorKind, http_head::content_range},
};

/// An HTTP cache. Cheap to clone: clones share the connections.
#[derive(Clone)]
pub(crate) struct HttpCache(Arc<Server>);

impl fmt::Debug for HttpCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HttpCache").field(&self.0.place()).finish()
    }
}

/// Where a blob is: in the cache, with its size if the server says that.
type Found = Option<Option<u64>>;

impl HttpCache {
    /// Reads the files that the options name, and connects nothing yet.
    ///
    /// # Errors
    /// [`RemoteErrorKind::Config`], naming the flag, when the options cannot work.
    pub(crate) fn new(options: RemoteOptions) -> Result<Self, RemoteError> {
        Self::with_timer(options, Arc::new(SystemTimer))
    }

    /// As [`HttpCache::new`], with another clock for the waits between tries.
    ///
    /// # Errors
    /// As [`HttpCache::new`].
    pub(crate) fn with_timer(options: RemoteOptions, timer: Arc<dyn Timer>) -> Result<Self, RemoteError> {
        if !options.instance_name.is_empty() {
            tracing::warn!(
                cache = %options.connect.endpoint,
                "--remote-instance-name is not used: an HTTP cache has no instances, but paths"
            );
        }
        Ok(Self(Arc::new(Server::new(options, timer)?)))
    }

    /// One blob, whole.
    async fn whole(&self, digest: &Digest, avoid: bool) -> Result<Bytes, RemoteError> {
        let mut whole = Collect::default();
        read::read(&self.0, digest, 0, avoid, &mut whole).await?;
        Ok(whole.into_bytes())
    }

    /// Whether the server has a blob. Asks once; servers that do not know `HEAD` are asked for a single byte.
    async fn look(&self, context: &str, path: &str) -> Result<Found, RemoteError> {
        let _connection = self.0.connection().await;
        let answer = self.0.send(context, &Ask::plain(Method::HEAD, path)).await?;
        match answer.status() {
            StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED => {}
            _ => return self.found(context, answer).await,
        }
        let ask = Ask {
            range: Some("bytes=0-0".to_owned()),
            ..Ask::plain(Method::GET, path)
        };
        let answer = self.0.send(context, &ask).await?;
        self.found(context, answer).await
    }

    async fn found(&self, context: &str, answer: Response<Incoming>) -> Result<Found, RemoteError> {
        let headers = answer.headers();
        match answer.status() {
            StatusCode::OK if encoding(headers).is_empty() => Ok(Some(length(headers))),
            StatusCode::OK => Ok(Some(None)),
            StatusCode::PARTIAL_CONTENT => Ok(Some(content_range(headers).and_then(|range| range.total))),
            // It has no first byte.
            StatusCode::RANGE_NOT_SATISFIABLE => Ok(Some(Some(0))),
            _ => match self.0.refused(context, answer).await {
                error if error.is_not_found() => Ok(None),
                error => Err(error),
            },
        }
    }

    /// An entry of the action cache, if there is one.
    async fn entry(&self, context: &str, path: &str) -> Result<Option<Bytes>, RemoteError> {
        let _connection = self.0.connection().await;
        let answer = self.0.send(context, &Ask::plain(Method::GET, path)).await?;
        if answer.status() != StatusCode::OK {
            let error = self.0.refused(context, answer).await;
            return if error.is_not_found() {
                Ok(None)
            } else {
                Err(error)
            };
        }
        let mut whole = Collect::default();
        let most = MAX_MESSAGE as u64;
        let length = self.pour(context, answer, most, |piece| whole.add(piece)).await?;
        if length > most {
            let message = format!("the server's answer exceeds the maximum of {most} bytes");
            return Err(RemoteError::protocol(context, message));
        }
        Ok(Some(whole.into_bytes()))
    }

    /// Reads a body to its end, or until there is more of it than `most`; gives its length.
    async fn pour(
        &self,
        context: &str,
        answer: Response<Incoming>,
        most: u64,
        mut keep: impl FnMut(Bytes),
    ) -> Result<u64, RemoteError> {
        let protocol = |error: io::Error| RemoteError::protocol(context, error);
        let (head, mut body) = answer.into_parts();
        let mut decoder = Decoder::of(&head.headers).map_err(protocol)?;
        let mut count = 0;
        let limit = self.0.options.stall_timeout;
        loop {
            let next = tokio::time::timeout(limit, body.frame())
                .await
                .map_err(|_| RemoteError::timeout(context, format!("stalled for {limit:?}")))?;
            let (mut piece, is_end) = match next {
                None => (decoder.finish().map_err(protocol)?, true),
                Some(frame) => {
                    let frame = frame.map_err(|e| self.0.broken(context, HttpFault::of(&e)))?;
                    (frame.into_data().unwrap_or_default(), false)
                }
            };
            if is_end {
                count += piece.len() as u64;
                keep(piece);
                return Ok(count);
            }
            loop {
                let piece = decoder
                    .run(&mut piece, most.saturating_sub(count))
                    .map_err(protocol)?;
                if piece.is_empty() {
                    break;
                }
                count += piece.len() as u64;
                keep(piece);
                if count > most {
                    return Ok(count);
                }
            }
        }
    }
}

#[async_trait]
impl BlobStore for HttpCache {
    async fn capabilities(&self) -> Result<Capabilities, RemoteError> {
        // The protocol has none. A batch is held in memory.
        futures::future::ready(Ok(Capabilities::plain(MAX_BATCH))).await
    }

    /// One `GET` for each blob, as many at once as there are connections.
    async fn read_batch(&self, digests: &[Digest], _: &Attribution, avoid: bool) -> Vec<BatchAnswer> {
        let hope = Hope::new(self.0.options.connections());
        let distinct: HashSet<Digest> = digests.iter().cloned().collect();
        let hope = &hope;
        let reads = distinct.into_iter().map(|digest| async move {
            if let Some(error) = hope.is_lost() {
                return (digest, Err(error));
            }
            let answer = self.whole(&digest, avoid).await;
            hope.heard(&answer);
            (digest, answer)
        });
        let answers: HashMap<Digest, Result<Bytes, RemoteError>> = futures::stream::iter(reads)
            .buffer_unordered(self.0.options.connections())
            .collect()
            .await;
        let answer = |digest: &Digest| match answers.get(digest) {
            Some(answer) => (digest.clone(), answer.clone()),
            None => (digest.clone(), Ok(Bytes::new())),
        };
        digests.iter().map(answer).collect()
    }

    async fn read_stream(
        &self,
        digest: &Digest,
        offset: u64,
        _: &Attribution,
        avoid: bool,
        sink: &mut dyn Sink,
    ) -> Result<(), RemoteError> {
        read::read(&self.0, digest, offset, avoid, sink).await
    }

    /// One `HEAD` for each blob.
    async fn find_missing(&self, digests: &[Digest], _: &Attribution) -> Result<Vec<Digest>, RemoteError> {
        let distinct: HashSet<Digest> = digests.iter().filter(|d| !d.is_empty()).cloned().collect();
        let looks = distinct.into_iter().map(|digest| async move {
            let context = self.0.context(format_args!("blob {digest}"));
            let path = cas(&digest);
            let found = self.0.retry.run(|| self.look(&context, &path)).await?;
            Ok(found.is_none().then_some(digest))
        });
        let mut missing: HashSet<Digest> = futures::stream::iter(looks)
            .buffer_unordered(self.0.options.connections())
            .try_filter_map(|missing| async move { Ok(missing) })
            .try_collect()
            .await?;
        // Taken out when reported, so that one asked about twice is reported once.
        Ok(digests.iter().filter(|d| missing.remove(*d)).cloned().collect())
    }

    fn describe(&self) -> String {
        self.0.place().to_owned()
    }
}

#[async_trait]
impl ActionStore for HttpCache {
    async fn action_result(
        &self,
        action: &Digest,
        _: &Attribution,
    ) -> Result<Option<Arc<ActionResult>>, RemoteError> {
        let context = self.0.context(format_args!("result for action {action}"));
        let path = format!("ac/{}", action.hash_hex());
        let Some(bytes) = self.0.retry.run(|| self.entry(&context, &path)).await? else {
            return Ok(None);
        };
        let result = decode(&bytes).map_err(|e| {
            let message = format!("the server's answer is not an action result: {e}");
            RemoteError::protocol(context, message)
        })?;
        Ok(Some(Arc::new(result)))
    }

    /// By `HEAD`; where the server does not say the length, by counting the bytes.
    async fn blob_size(&self, _: DigestFunction, hash: &[u8]) -> Result<Option<u64>, RemoteError> {
        let path = format!("cas/{}", hex::encode(hash));
        let context = self.0.context(format_args!("blob {}", hex::encode(hash)));
        let found = self.0.retry.run(|| self.look(&context, &path)).await?;
        let Some(None) = found else {
            return Ok(found.flatten());
        };
        let counted = self.0.retry.run(|| async {
            let _connection = self.0.connection().await;
            let answer = self.0.send(&context, &Ask::plain(Method::GET, &path)).await?;
            if answer.status() != StatusCode::OK {
                return Err(self.0.refused(&context, answer).await);
            }
            self.pour(&context, answer, u64::MAX, drop).await
        });
        match counted.await {
            Err(error) if error.is_not_found() => Ok(None),
            counted => counted.map(Some),
        }
    }

    async fn probe(&self) -> Result<(), RemoteError> {
        let context = format!("remote cache {}", self.0.place());
        let path = empty(self.0.options.digest_function);
        match self.look(&context, &path).await {
            Ok(_) => Ok(()),
            Err(mut error) => {
                match error.kind {
                    RemoteErrorKind::Unavailable => {
                        error.message = format!("failed to reach the server ({})", error.message);
                    }
                    RemoteErrorKind::Rejected => {
                        error.message = format!("the server is not an HTTP cache ({})", error.message);
                    }
                    _ => {}
                }
                Err(error)
            }
        }
    }
}

/// Failures of a batch after which its other blobs are not asked for, if the server has answered for none.
const FEW: usize = 3;

/// Whether it makes sense to ask for a batch's other blobs, after all that can be tried was tried for some.
struct Hope {
    has_answered: AtomicBool,
    /// Blobs that are asked for at once.
    at_once: usize,
    /// How many blobs failed, and how, once that says something of the others.
    lost: Mutex<(usize, Option<RemoteError>)>,
}

impl Hope {
    fn new(at_once: usize) -> Self {
        Self {
            has_answered: AtomicBool::new(false),
            at_once,
            lost: Mutex::default(),
        }
    }

    fn heard(&self, answer: &Result<Bytes, RemoteError>) {
        use RemoteErrorKind as Kind;
        let error = match answer {
            Err(error) if !matches!(error.kind, Kind::NotFound | Kind::Protocol) => error,
            _ => return self.has_answered.store(true, Relaxed),
        };
        // What is refused may be this one blob, and comes sooner than what is sent: all that are under way may come.
        let enough = match error.kind {
            Kind::Denied | Kind::Rejected => self.at_once.max(FEW),
            _ => self.at_once.min(FEW),
        };
        let mut lost = self.lost.lock();
        lost.0 += 1;
        if lost.0 >= enough {
            lost.1.get_or_insert_with(|| error.clone());
        }
    }

    /// Why not, if the server has said nothing else.
    fn is_lost(&self) -> Option<RemoteError> {
        if self.has_answered.load(Relaxed) {
            return None;
        }
        self.lost.lock().1.clone()
    }
}
