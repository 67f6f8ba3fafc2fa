//! The `PublishBuildEvent` service: its calls, and how it ends.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use futures::{StreamExt as _, stream::BoxStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use super::{
    budget::Budget,
    context::{BesOptions, Context, shutting_down},
    counted::Handed,
    counters::{Counters, CountersNow},
    lifecycle::{Call, Lifecycle},
    limits::BesLimits,
    raw::PublishBuildEvent,
    reader::{MAX_ID, Reader, malformed},
    recovery,
    stream::UPSTREAM_DRAIN,
    upstream::{LifecycleEvent, Upstream},
};
use crate::{
    builds::{Builds, Decoders},
    journal::{Journal, JournalError},
    metrics::Count,
    proto::google::devtools::build::v1::PublishBuildToolEventStreamResponse,
};

/// What the handlers of all calls share.
struct Shared {
    lifecycle: Lifecycle,
    /// Streams that may still be opened.
    openings: Arc<Semaphore>,
    connections: AtomicU64,
    /// Streams of answers that were not sent to their end yet.
    answers: TaskTracker,
}

/// The service. Cheap to clone.
#[derive(Clone)]
pub struct BesService {
    context: Arc<Context>,
    shared: Arc<Shared>,
}

impl BesService {
    /// A service without connections. Without a journal, nothing outlives the process. With an upstream service,
    /// streams and lifecycle calls are forwarded to it.
    pub fn new(
        builds: Arc<dyn Builds>,
        decoders: Decoders,
        journal: Option<Journal>,
        upstream: Option<Upstream>,
        options: BesOptions,
    ) -> Self {
        let openings = Arc::new(Semaphore::new(options.limits.streams));
        let shared = Shared {
            lifecycle: Lifecycle::default(),
            openings,
            connections: AtomicU64::new(0),
            answers: TaskTracker::new(),
        };
        Self {
            context: Arc::new(Context::new(builds, decoders, journal, upstream, options)),
            shared: Arc::new(shared),
        }
    }

    /// Goes on from the journal: the events of every unfinished stream are handed to the engine again, then their
    /// end, unless their client comes back in time. What upstream has not got is sent there. Call it once, before
    /// serving. Returns how many streams it was. Those that a process has died of are gone on with a little later, one
    /// after the other, so that it is known which one it was if that happens again.
    ///
    /// # Errors
    /// When the journal cannot be listed.
    pub(crate) async fn recover(&self) -> Result<usize, JournalError> {
        recovery::recover(&self.context).await
    }

    #[cfg(test)]
    pub(super) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// What clients may ask for.
    pub fn limits(&self) -> BesLimits {
        self.context.options.limits
    }

    /// Memory for what clients send. Other services beside this one share it.
    pub(crate) fn budget(&self) -> Budget {
        self.context.budget.clone()
    }

    /// Whether a client is still there that was not answered to the end.
    pub(crate) fn is_answering(&self) -> bool {
        !self.shared.answers.is_empty()
    }

    /// The counts.
    pub(crate) fn counters(&self) -> CountersNow {
        self.context.counters.now()
    }

    /// The counts, also after the service has ended.
    pub(crate) fn counting(&self) -> impl Fn() -> Vec<Count> + Send + Sync + 'static {
        let counters = Arc::clone(&self.context.counters);
        move || counters.each().collect()
    }

    /// Streams that are open, being settled, or ended a short while ago.
    pub fn streams(&self) -> usize {
        self.context.streams.len()
    }

    /// Whether the upstream service still has to get something: also of builds that may go on.
    pub(crate) fn has_undelivered(&self) -> bool {
        self.context
            .upstream
            .as_ref()
            .is_some_and(Upstream::has_undelivered)
    }

    /// Whether the upstream service took what it was sent last.
    pub(crate) fn is_upstream_healthy(&self) -> bool {
        self.context.upstream.as_ref().is_some_and(Upstream::is_healthy)
    }

    /// Lets clients go that wait for outputs, from now on: the user wants the build to end, and Bazel does not tell
    /// that. The builds go on.
    pub(crate) fn hurry(&self) {
        self.context.hurry.cancel();
    }

    /// The clients' processes have ended: streams that have lost their connection do not wait for another one.
    pub(crate) fn clients_ended(&self) {
        self.context.clients_ended.cancel();
    }

    /// Ends every connection: held ones with what they wait for (unless strict), others with `UNAVAILABLE`, so that
    /// Bazel tries again and finds the next daemon. Returns when all tasks are done. Unsettled streams stay
    /// unfinished in the journal.
    pub async fn close(&self) {
        self.context.shutdown.cancel();
        self.context.tasks.close();
        let halt = async {
            // Streams have their own patience with upstream. Calls that still wait are lost.
            let drained = self.shared.lifecycle.drained();
            if self.context.upstream.as_ref().is_some_and(Upstream::is_healthy) {
                let _ = tokio::time::timeout(UPSTREAM_DRAIN, drained).await;
            }
        };
        tokio::join!(self.context.tasks.wait(), halt);
        self.context.halt.cancel();
        self.context.forwards.close();
        self.context.forwards.wait().await;
        if let Some(journal) = self.context.journal.clone() {
            let _ = tokio::task::spawn_blocking(move || journal.forget_replays()).await;
        }
    }
}

#[tonic::async_trait]
impl PublishBuildEvent for BesService {
    /// Lifecycle events (build enqueued, invocation attempt started and finished, build finished) come on the
    /// component `CONTROLLER` and say nothing that the stream does not say as well; only upstream may want them.
    async fn publish_lifecycle_event(&self, request: Request<Bytes>) -> Result<Response<()>, Status> {
        let (context, shared) = (&self.context, &self.shared);
        Counters::add(&context.counters.lifecycle_events);
        let (headers, _, request) = request.into_parts();
        let call = Call::read(&request).map_err(malformed)?;
        tracing::debug!(
            build_id = call.build_id,
            invocation_id = call.invocation_id,
            event = call.name,
            "lifecycle event"
        );
        if let Some(upstream) = &context.upstream {
            if call.build_id.len() > MAX_ID {
                return Err(Status::invalid_argument("build_id is too long"));
            }
            let most = context.options.limits.lifecycle_calls;
            if !shared.lifecycle.has_room(&context.counters, most) {
                // Refusing it would fail the build because upstream is away.
                return Ok(Response::new(()));
            }
            let event = LifecycleEvent {
                opening: call.opening,
                _pending: shared.lifecycle.count(&request),
                request,
                headers,
            };
            upstream.lifecycle(&context.surroundings(), &call.build_id, event);
        }
        Ok(Response::new(()))
    }

    type PublishBuildToolEventStreamStream =
        BoxStream<'static, Result<PublishBuildToolEventStreamResponse, Status>>;

    async fn publish_build_tool_event_stream(
        &self,
        request: Request<Streaming<Bytes>>,
    ) -> Result<Response<Self::PublishBuildToolEventStreamStream>, Status> {
        if self.context.shutdown.is_cancelled() {
            return Err(shutting_down());
        }
        let most = self.context.options.limits.streams;
        let Ok(place) = Arc::clone(&self.shared.openings).try_acquire_owned() else {
            return Err(self.context.refused("streams", most, "open streams"));
        };
        // Unbounded, but of small items: a client has at most one acknowledgement per event that it sent.
        let (acks, responses) = mpsc::unbounded_channel();
        let id = self.shared.connections.fetch_add(1, Ordering::Relaxed);
        let reader = Reader::new(&self.context, id, place);
        let (headers, extensions, _) = request.into_parts();
        let mut inbound = extensions
            .get::<Handed>()
            .and_then(Handed::take)
            .ok_or_else(|| Status::internal("the stream has no messages; this is a bug in outhaul"))?;
        inbound.stalling(self.context.options.stall, self.context.journal.is_some());
        self.context.tasks.spawn(reader.run(headers, inbound, acks));
        let open = self.shared.answers.token();
        let responses = UnboundedReceiverStream::new(responses).inspect(move |_| _ = &open);
        Ok(Response::new(responses.boxed()))
    }
}
