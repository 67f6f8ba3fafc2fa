//! A build event service behind the daemon, which notes what arrives, byte for byte, and misbehaves when it is told to.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use outhaul::proto::{
    build_event_stream,
    google::devtools::build::v1::{
        PublishBuildToolEventStreamRequest, PublishBuildToolEventStreamResponse,
        PublishLifecycleEventRequest, StreamId, build_event::Event,
    },
};
use outhaul_testkit::eventually;
use prost::Message as _;
use tokio::{
    net::TcpListener,
    runtime::Runtime,
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tonic::{Request, Response, Status, Streaming, body::Body, server::Grpc, transport::Server};

use super::raw::Raw;

/// As large as the daemon takes them.
const MAX_MESSAGE: usize = 256 << 20;

/// An event as it arrived.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    /// Counts the calls.
    pub(crate) call: u64,
    /// The highest number of its stream that had been acknowledged when the call began.
    pub(crate) acked_before: i64,
    /// The request, as it was on the wire.
    pub(crate) bytes: Bytes,
    /// The same, decoded.
    pub(crate) request: PublishBuildToolEventStreamRequest,
}

impl Seen {
    fn event(&self) -> Option<&Event> {
        let ordered = self.request.ordered_build_event.as_ref()?;
        ordered.event.as_ref()?.event.as_ref()
    }

    pub(crate) fn sequence(&self) -> i64 {
        self.request
            .ordered_build_event
            .as_ref()
            .map_or(0, |ordered| ordered.sequence_number)
    }

    pub(crate) fn invocation(&self) -> &str {
        let ordered = self.request.ordered_build_event.as_ref();
        ordered
            .and_then(|ordered| ordered.stream_id.as_ref())
            .map_or("", |id| &id.invocation_id)
    }

    /// Bazel's event, encoded; none in the request that ends a stream.
    pub(crate) fn bazel_event(&self) -> Option<&[u8]> {
        match self.event()? {
            Event::BazelEvent(any) => Some(&any.value),
            _ => None,
        }
    }

    /// Bazel's event.
    pub(crate) fn decoded(&self) -> Option<build_event_stream::BuildEvent> {
        let bytes = self.bazel_event()?;
        Some(build_event_stream::BuildEvent::decode(bytes).unwrap())
    }

    /// Whether it ends its stream.
    pub(crate) fn is_end(&self) -> bool {
        matches!(self.event(), Some(Event::ComponentStreamFinished(_)))
    }
}

/// A lifecycle call as it arrived.
#[derive(Debug, Clone)]
pub(crate) struct Lifecycle {
    pub(crate) stream: StreamId,
    /// `build_enqueued`, `attempt_started`, `attempt_finished` or `build_finished`.
    pub(crate) name: &'static str,
    /// Events of streams that had arrived before.
    pub(crate) after: usize,
}

type Hook = Box<dyn Fn(&Seen) + Send + Sync>;

/// What outlives the server's own end.
struct Shared {
    seen: Mutex<Vec<Seen>>,
    lifecycle: Mutex<Vec<Lifecycle>>,
    /// By invocation: the highest number acknowledged.
    acked: Mutex<HashMap<String, i64>>,
    /// Invocations whose calls ended with OK, everything acknowledged.
    closed: Mutex<Vec<String>>,
    calls: AtomicU64,
    /// Breaks every call after this many events, of which about half are acknowledged; 0 for never.
    cut_after: AtomicU64,
    /// How late acknowledgements are, in milliseconds.
    late_ms: AtomicU64,
    /// Stops reading after this number of a stream; 0 for never.
    pause_at: watch::Sender<i64>,
    paused: AtomicU64,
    hook: Hook,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The service, on a port of its own that it keeps.
pub(crate) struct Upstream {
    address: SocketAddr,
    shared: Arc<Shared>,
    /// `None` while it is down.
    runtime: Option<Runtime>,
}

impl Upstream {
    pub(crate) fn start() -> Self {
        Self::watched(|_| {})
    }

    /// One that calls a function with every event at the instant it arrives, before it is noted or acknowledged.
    pub(crate) fn watched(hook: impl Fn(&Seen) + Send + Sync + 'static) -> Self {
        let shared = Arc::new(Shared {
            seen: Mutex::default(),
            lifecycle: Mutex::default(),
            acked: Mutex::default(),
            closed: Mutex::default(),
            calls: AtomicU64::new(0),
            cut_after: AtomicU64::new(0),
            late_ms: AtomicU64::new(0),
            pause_at: watch::Sender::new(0),
            paused: AtomicU64::new(0),
            hook: Box::new(hook),
        });
        let mut upstream = Self {
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            shared,
            runtime: None,
        };
        upstream.come_back();
        upstream
    }

    /// The daemon's flag that forwards to it.
    pub(crate) fn flag(&self) -> String {
        format!("--bes-backend=grpc://{}", self.address)
    }

    /// Cuts every connection and listens no more.
    pub(crate) fn go_down(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    /// Listens again on the same port, and remembers everything.
    pub(crate) fn come_back(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let mut listener = None;
        eventually("the upstream's port is free", || {
            listener = runtime.block_on(TcpListener::bind(self.address)).ok();
            listener.is_some()
        });
        let listener = listener.expect("waited for");
        self.address = listener.local_addr().unwrap();
        let service = Service(self.shared.clone());
        runtime.spawn(
            Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener)),
        );
        self.runtime = Some(runtime);
    }

    /// Breaks every call after this many events; 0 for never.
    pub(crate) fn cut_after(&self, events: u64) {
        self.shared.cut_after.store(events, Ordering::Relaxed);
    }

    /// Acknowledges so much later.
    pub(crate) fn late(&self, by: Duration) {
        let ms = u64::try_from(by.as_millis()).unwrap();
        self.shared.late_ms.store(ms, Ordering::Relaxed);
    }

    /// Neither reads on nor acknowledges once event number `sequence` of a stream has come; 0 ends that.
    pub(crate) fn pause_at(&self, sequence: i64) {
        self.shared.paused.store(0, Ordering::Relaxed);
        self.shared.pause_at.send_replace(sequence);
    }

    /// Whether it has come to that.
    pub(crate) fn is_paused(&self) -> bool {
        self.shared.paused.load(Ordering::Relaxed) > 0
    }

    /// Calls with streams so far.
    pub(crate) fn calls(&self) -> u64 {
        self.shared.calls.load(Ordering::Relaxed)
    }

    /// The invocations whose events have come, in the order of their first ones.
    pub(crate) fn invocations(&self) -> Vec<String> {
        let mut invocations = Vec::new();
        for seen in lock(&self.shared.seen).iter() {
            if !invocations.iter().any(|id| id == seen.invocation()) {
                invocations.push(seen.invocation().to_owned());
            }
        }
        invocations
    }

    /// Everything of an invocation as it came, repetitions and all.
    pub(crate) fn seen(&self, invocation: &str) -> Vec<Seen> {
        lock(&self.shared.seen)
            .iter()
            .filter(|seen| seen.invocation() == invocation)
            .cloned()
            .collect()
    }

    /// An invocation's events, each once. Demands that they came in order and without gaps, and that what came again
    /// was the same, byte for byte.
    #[track_caller]
    pub(crate) fn stream(&self, invocation: &str) -> Vec<Seen> {
        let mut stream: Vec<Seen> = Vec::new();
        let mut last: Option<Seen> = None;
        for seen in self.seen(invocation) {
            let number = seen.sequence();
            let highest = i64::try_from(stream.len()).unwrap();
            match last.filter(|last| last.call == seen.call) {
                Some(last) => assert_eq!(
                    number,
                    last.sequence() + 1,
                    "the number after, in call {}",
                    seen.call
                ),
                None => assert!(
                    (1..=highest + 1).contains(&number),
                    "call {} begins with {number} after {highest}",
                    seen.call
                ),
            }
            if number > highest {
                stream.push(seen.clone());
            } else {
                let before = &stream[usize::try_from(number - 1).unwrap()];
                assert_eq!(before.bytes, seen.bytes, "event {number} came again, but changed");
            }
            last = Some(seen);
        }
        stream
    }

    /// Demands that nothing came again that the daemon knew to be acknowledged.
    #[track_caller]
    pub(crate) fn repeats_only_what_was_unacknowledged(&self, invocation: &str) {
        for seen in self.seen(invocation) {
            assert!(
                seen.sequence() > seen.acked_before,
                "{} came again in call {}, though {} was acknowledged",
                seen.sequence(),
                seen.call,
                seen.acked_before
            );
        }
    }

    /// Waits until an invocation's stream has come to its end and was closed well. Gives its events.
    #[track_caller]
    pub(crate) fn complete(&self, invocation: &str, log: impl Fn() -> String) -> Vec<Seen> {
        let deadline = std::time::Instant::now() + Duration::from_secs(90);
        while !lock(&self.shared.closed).iter().any(|id| id == invocation) {
            assert!(
                std::time::Instant::now() < deadline,
                "the stream {invocation} is not complete: {} events; the daemon said\n{}",
                self.seen(invocation).len(),
                log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        let stream = self.stream(invocation);
        assert!(
            stream.last().is_some_and(Seen::is_end),
            "{} events, and no end among them",
            stream.len()
        );
        assert_eq!(stream.iter().filter(|seen| seen.is_end()).count(), 1);
        stream
    }

    /// The lifecycle calls, in the order of their coming.
    pub(crate) fn lifecycle(&self) -> Vec<Lifecycle> {
        lock(&self.shared.lifecycle).clone()
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.go_down();
    }
}

/// The service as tonic wants it; the generated one would decode.
#[derive(Clone)]
struct Service(Arc<Shared>);

impl tonic::server::NamedService for Service {
    const NAME: &'static str = "google.devtools.build.v1.PublishBuildEvent";
}

impl tower::Service<http::Request<Body>> for Service {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let shared = self.0.clone();
        Box::pin(async move {
            let mut grpc = Grpc::new(Raw).max_decoding_message_size(MAX_MESSAGE);
            let streams = request.uri().path().ends_with("/PublishBuildToolEventStream");
            Ok(if streams {
                let call = tower::service_fn(move |request: Request<Streaming<Bytes>>| {
                    let shared = shared.clone();
                    async move { Ok::<_, Status>(stream(shared, request.into_inner())) }
                });
                grpc.streaming(call, request).await
            } else {
                let call = tower::service_fn(move |request: Request<Bytes>| {
                    let shared = shared.clone();
                    async move { lifecycle(&shared, request.into_inner()) }
                });
                grpc.unary(call, request).await
            })
        })
    }
}

fn lifecycle(shared: &Shared, bytes: Bytes) -> Result<Response<Bytes>, Status> {
    let request =
        PublishLifecycleEventRequest::decode(bytes).map_err(|e| Status::invalid_argument(e.to_string()))?;
    let ordered = request.build_event.unwrap_or_default();
    let name = match ordered.event.and_then(|event| event.event) {
        Some(Event::BuildEnqueued(_)) => "build_enqueued",
        Some(Event::InvocationAttemptStarted(_)) => "attempt_started",
        Some(Event::InvocationAttemptFinished(_)) => "attempt_finished",
        Some(Event::BuildFinished(_)) => "build_finished",
        _ => "another",
    };
    let after = lock(&shared.seen).len();
    lock(&shared.lifecycle).push(Lifecycle {
        stream: ordered.stream_id.unwrap_or_default(),
        name,
        after,
    });
    Ok(Response::new(Bytes::new()))
}

type Acks = UnboundedReceiverStream<Result<Bytes, Status>>;

fn stream(shared: Arc<Shared>, inbound: Streaming<Bytes>) -> Response<Acks> {
    let (acks, outbound) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let call = shared.calls.fetch_add(1, Ordering::Relaxed) + 1;
        if let Err(status) = receive(&shared, call, inbound, &acks).await {
            let _ = acks.send(Err(status));
        }
    });
    Response::new(UnboundedReceiverStream::new(outbound))
}

/// One call, until the client half-closes or it breaks.
async fn receive(
    shared: &Arc<Shared>,
    call: u64,
    mut inbound: Streaming<Bytes>,
    acks: &mpsc::UnboundedSender<Result<Bytes, Status>>,
) -> Result<(), Status> {
    let (late, mut due) = mpsc::unbounded_channel::<(Instant, i64, String, Bytes)>();
    let delivering = tokio::spawn({
        let (shared, acks) = (shared.clone(), acks.clone());
        async move {
            while let Some((at, number, invocation, ack)) = due.recv().await {
                tokio::time::sleep_until(at).await;
                if acks.send(Ok(ack)).is_err() {
                    break;
                }
                let mut acked = lock(&shared.acked);
                let highest = acked.entry(invocation).or_default();
                *highest = number.max(*highest);
            }
        }
    });
    let mut acked_before = None;
    let mut count = 0;
    let mut last = None;
    let mut withheld = Vec::new();
    while let Some(bytes) = inbound.message().await? {
        let request = PublishBuildToolEventStreamRequest::decode(bytes.clone())
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
        let mut seen = Seen {
            call,
            acked_before: 0,
            bytes,
            request,
        };
        let (number, invocation) = (seen.sequence(), seen.invocation().to_owned());
        seen.acked_before =
            *acked_before.get_or_insert_with(|| lock(&shared.acked).get(&invocation).copied().unwrap_or(0));
        let is_end = seen.is_end();
        tokio::task::block_in_place(|| (shared.hook)(&seen));
        let stream_id = seen
            .request
            .ordered_build_event
            .as_ref()
            .and_then(|ordered| ordered.stream_id.clone());
        lock(&shared.seen).push(seen);
        let mut pause_at = shared.pause_at.subscribe();
        if *pause_at.borrow() == number {
            shared.paused.fetch_add(1, Ordering::Relaxed);
            // Only the test ends this.
            let _ = pause_at.wait_for(|at| *at != number).await;
        }
        count += 1;
        let cut_after = shared.cut_after.load(Ordering::Relaxed);
        let ack = PublishBuildToolEventStreamResponse {
            stream_id,
            sequence_number: number,
        };
        withheld.push((number, invocation.clone(), Bytes::from(ack.encode_to_vec())));
        // A stream that ends before it is cut gets everything: its client waits for that.
        if cut_after == 0 || count <= (cut_after / 2).max(1) || (is_end && count < cut_after) {
            let at = Instant::now() + Duration::from_millis(shared.late_ms.load(Ordering::Relaxed));
            for (number, invocation, ack) in withheld.drain(..) {
                let _ = late.send((at, number, invocation, ack));
            }
        }
        last = Some((invocation, is_end));
        if cut_after > 0 && count >= cut_after {
            drop(late);
            let _ = delivering.await;
            return Err(Status::unavailable("cut by the test"));
        }
    }
    drop(late);
    let _ = delivering.await;
    if let Some((invocation, true)) = last {
        lock(&shared.closed).push(invocation);
    }
    Ok(())
}
