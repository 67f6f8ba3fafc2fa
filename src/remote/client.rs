//! One call to the server: a connection, the metadata, a deadline, and one more try after credentials were refused.
//!
//! What a call asks and how its answer is judged is in the modules that use this one.

use std::{future::Future, panic::AssertUnwindSafe, pin::pin, sync::Arc};

use bazel_remote_apis::google::rpc;
use futures::FutureExt as _;
use tonic::{Code, Extensions, Request, Response, Status, transport::Channel};

use super::{
    Attribution,
    call::Received,
    compression::Chooser,
    limits::Learned,
    metadata::metadata,
    options::RemoteOptions,
    pool::{Connections, Line, Pool},
    retry::{RetryPolicy, Timer},
    stall::StallWatch,
    status::{from_rpc, from_status},
};
use crate::{
    digest::{Digest, DigestFunction},
    transport::{Auth, Fault, RemoteError, RemoteErrorKind, Secrets},
};

/// The largest message that is taken. Batches are kept within gRPC's 4 MiB by what is asked for; what cannot be
/// bounded so, trees and action results and the pieces of streams, gets some air.
pub(crate) const MAX_MESSAGE: usize = 16 * 1024 * 1024;

/// How often in a row a call may meet a connection that is being ended, without that counting as a try.
const SENT_AWAY: u32 = 4;

/// The full names of the gRPC services that are called. A credential helper is asked about each.
pub(crate) mod services {
    pub(crate) const ACTION_CACHE: &str = "build.bazel.remote.execution.v2.ActionCache";
    pub(crate) const BYTE_STREAM: &str = "google.bytestream.ByteStream";
    pub(crate) const CAPABILITIES: &str = "build.bazel.remote.execution.v2.Capabilities";
    pub(crate) const CAS: &str = "build.bazel.remote.execution.v2.ContentAddressableStorage";
}

/// The means to call the server.
pub(crate) struct Client {
    pub(crate) options: RemoteOptions,
    pub(crate) pool: Pool,
    auth: Auth,
    pub(crate) retry: RetryPolicy,
    /// Whether batches are compressed.
    pub(crate) batches: Chooser,
    /// Whether streams are compressed.
    pub(crate) streams: Chooser,
    /// What the server turned out to refuse.
    pub(crate) learned: Learned,
    place: String,
}

/// A failed call, with the status code for those who must distinguish what is one kind to everybody else.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub(crate) error: RemoteError,
    pub(crate) code: Option<Code>,
    pub(crate) fault: Option<Fault>,
}

impl From<RemoteError> for Failure {
    fn from(error: RemoteError) -> Self {
        Self {
            error,
            code: None,
            fault: None,
        }
    }
}

impl Client {
    pub(crate) fn new(options: RemoteOptions, timer: Arc<dyn Timer>) -> Result<Self, RemoteError> {
        options.validate()?;
        Ok(Self {
            pool: Pool::new(&options)?,
            auth: Auth::new(&options.connect)?,
            retry: RetryPolicy::new(options.retries, options.max_retry_delay, timer),
            batches: Chooser::new(options.compression, options.connect.endpoint.is_local()),
            streams: Chooser::new(options.compression, options.connect.endpoint.is_local()),
            learned: Learned::default(),
            place: options.describe(),
            options,
        })
    }

    /// The endpoint and the instance.
    pub(crate) fn place(&self) -> &str {
        &self.place
    }

    /// `what`, and where: the context of errors.
    pub(crate) fn context(&self, what: impl std::fmt::Display) -> String {
        format!("{what} from {}", self.place)
    }

    /// What a server's words are shown without.
    pub(crate) fn secrets(&self) -> Arc<Secrets> {
        self.auth.secrets()
    }

    /// The instance name for requests.
    pub(crate) fn instance(&self) -> String {
        self.options.instance_name.clone()
    }

    /// One call over a connection that is not to be avoided; the connection comes with the answer, and is what `avoid`
    /// holds when it failed.
    pub(crate) async fn once<M, T, F, Fut>(
        &self,
        (service, context): (&'static str, &str),
        attribution: &Attribution,
        avoid: &mut Connections,
        message: &M,
        call: F,
    ) -> Result<(T, Line), Failure>
    where
        M: Clone,
        F: Fn(Channel, Request<M>) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let mut refreshed = false;
        let mut sent_away = 0;
        loop {
            let (headers, credentials) = self.auth.headers(service).await?;
            let metadata = metadata(attribution, &headers)?;
            let received = Received::default();
            let mut extensions = Extensions::default();
            extensions.insert(received.clone());
            let request = Request::from_parts(metadata, extensions, message.clone());
            let (line, channel) = self.pool.pick(*avoid);
            let answer = self.while_received(context, &received, call(channel, request));
            let failure = match answer.await {
                Ok(response) => return Ok((response.into_inner(), line)),
                Err(failure) => failure,
            };
            if failure.code == Some(Code::Unauthenticated)
                && !refreshed
                && self.auth.refresh(credentials).await
            {
                refreshed = true;
                continue;
            }
            if sent_away < SENT_AWAY && failure.fault == Some(Fault::SentAway) {
                sent_away += 1;
                continue;
            }
            *avoid = self.after(line, &failure);
            return Err(failure);
        }
    }

    /// Which connections the next try avoids after one failed: only the last one, so that after a restart of the server
    /// not every connection counts as bad. One on which nothing came is replaced, and of all of them only the new one is
    /// known not to be dead.
    pub(crate) fn after(&self, line: Line, failure: &Failure) -> Connections {
        // A server that says of itself that it was too slow is alive.
        if failure.error.kind == RemoteErrorKind::Timeout && failure.code != Some(Code::DeadlineExceeded) {
            self.pool.give_up(line);
            return Connections::all_but(line);
        }
        let mut avoid = Connections::default();
        avoid.insert(line.index);
        avoid
    }

    /// One call, tried again while that may help.
    pub(crate) async fn unary<M, T, F, Fut>(
        &self,
        (service, context): (&'static str, &str),
        attribution: &Attribution,
        message: &M,
        call: F,
    ) -> Result<T, Failure>
    where
        M: Clone,
        F: Fn(Channel, Request<M>) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let mut backoff = self.retry.start();
        let mut avoid = Connections::default();
        loop {
            match self
                .once((service, context), attribution, &mut avoid, message, &call)
                .await
            {
                Ok((answer, _)) => return Ok(answer),
                Err(failure) => {
                    if !failure.error.is_retryable() || !backoff.wait(&failure.error).await {
                        return Err(failure);
                    }
                }
            }
        }
    }

    /// A failed call, without credentials that the server may have repeated.
    pub(crate) fn failed(&self, context: &str, status: &Status) -> Failure {
        Failure {
            error: self
                .options
                .with_left_out(from_status(context, status, &self.secrets())),
            code: Some(status.code()),
            fault: Fault::of(status),
        }
    }

    /// The error for one blob of a batch, likewise.
    pub(crate) fn blob_error(&self, context: &str, status: &rpc::Status) -> RemoteError {
        from_rpc(context, status, &self.secrets())
    }

    /// A step of a call, cut at the deadline.
    pub(crate) async fn within_deadline<T>(
        &self,
        context: &str,
        step: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Failure> {
        self.while_received(context, &Received::default(), step).await
    }

    /// The same, but the deadline counts from the start again as long as enough of the answer comes: a batch of 4 MiB may
    /// take its time on a slow line.
    async fn while_received<T>(
        &self,
        context: &str,
        received: &Received,
        step: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Failure> {
        let window = self.options.stall_timeout;
        let mut watch = StallWatch::new(window, self.options.min_throughput);
        let mut step = pin!(guarded(step));
        let mut before = 0;
        loop {
            if let Ok(ended) = tokio::time::timeout(window, &mut step).await {
                return ended.map_err(|status| self.failed(context, &status));
            }
            let bytes = received.bytes();
            if watch.brought(bytes - before, window) {
                let message = match bytes {
                    0 => format!("no answer within {window:?}"),
                    _ => format!("the answer stalled after {bytes} bytes for {window:?}"),
                };
                return Err(RemoteError::timeout(context, message).into());
            }
            before = bytes;
        }
    }
}

/// A step of a call whose panic is a status. tonic 0.14 panics on a `grpc-status-details-bin` that is not base64, and
/// no server shall bring the daemon's tasks down.
pub(crate) async fn guarded<T>(step: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    AssertUnwindSafe(step)
        .catch_unwind()
        .await
        .unwrap_or_else(|_| Err(Status::data_loss("malformed response")))
}

/// A digest for a request.
pub(crate) fn to_wire(digest: &Digest) -> bazel_remote_apis::build::bazel::remote::execution::v2::Digest {
    bazel_remote_apis::build::bazel::remote::execution::v2::Digest {
        hash: digest.hash_hex(),
        // Nothing larger than i64::MAX has a digest that came over this protocol.
        size_bytes: i64::try_from(digest.size()).unwrap_or(i64::MAX),
    }
}

/// A digest in an answer to a request about digests of `function`; `None` if it is invalid.
pub(crate) fn from_wire(
    function: DigestFunction,
    digest: &bazel_remote_apis::build::bazel::remote::execution::v2::Digest,
) -> Option<Digest> {
    Digest::from_hex(
        Some(function),
        &digest.hash,
        u64::try_from(digest.size_bytes).ok()?,
    )
    .ok()
}
