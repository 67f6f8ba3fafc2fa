//! An upstream service that keeps the bytes that it gets, and misbehaves on demand.

use std::{
    collections::VecDeque,
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use outhaul_testkit::PATIENCE;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tonic::{
    Code, Request, Response, Status, Streaming,
    body::Body,
    metadata::MetadataMap,
    server::{Grpc, NamedService, StreamingService, UnaryService},
};

use super::requests::{event, sequence};
use crate::{
    bes::raw::RawCodec, proto::google::devtools::build::v1::PublishBuildToolEventStreamResponse as Ack,
};

/// What it does with one connection of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plan {
    /// Acknowledges everything at once, and closes.
    Good,
    /// Breaks the stream after this many acknowledgements.
    CutAfter(usize),
    /// Answers with a status.
    Refuse(Code),
    /// Acknowledges when there is a permit for it.
    Late,
    /// Acknowledges nothing before the client has said that nothing more comes.
    AtTheEnd,
    /// Acknowledges the second event, not the first.
    OutOfOrder,
    /// Acknowledges a number that was not sent.
    Wrong,
    /// Closes with OK at an event, without its acknowledgement.
    CloseAt(i64),
}

/// One connection as it was seen.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    /// The requests, byte for byte.
    pub(super) requests: Vec<Bytes>,
    pub(super) headers: MetadataMap,
    /// How the client ended it: `true` if it half-closed after the stream's last event, `false` if it
    /// cancelled.
    pub(super) end: Option<bool>,
}

/// What is looked at when an event comes.
type Hook = Box<dyn Fn(i64) + Send + Sync>;

pub(super) struct State {
    pub(super) plans: Mutex<VecDeque<Plan>>,
    pub(super) default: Mutex<Plan>,
    pub(super) seen: watch::Sender<Vec<Seen>>,
    /// The highest number acknowledged.
    pub(super) acked: Mutex<i64>,
    /// Numbers that connections began with, and what was due then.
    pub(super) began: Mutex<Vec<(i64, i64)>>,
    pub(super) late: Semaphore,
    pub(super) hook: Mutex<Option<Hook>>,
    /// Lifecycle calls' requests, and streams' last events, in the order that they came in.
    pub(super) order: Mutex<Vec<Bytes>>,
    /// Answers to the next lifecycle calls.
    pub(super) refusals: Mutex<VecDeque<Code>>,
}

#[derive(Clone)]
pub(super) struct Fake(pub(super) Arc<State>);

impl Fake {
    pub(super) fn new(plans: impl IntoIterator<Item = Plan>, default: Plan) -> Self {
        Self(Arc::new(State {
            plans: Mutex::new(plans.into_iter().collect()),
            default: Mutex::new(default),
            seen: watch::Sender::new(Vec::new()),
            acked: Mutex::new(0),
            began: Mutex::default(),
            late: Semaphore::new(0),
            hook: Mutex::default(),
            order: Mutex::default(),
            refusals: Mutex::default(),
        }))
    }

    /// Serves until the test's runtime ends.
    pub(super) async fn serve(&self, at: SocketAddr) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind(at).await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tonic::transport::Server::builder()
            .add_service(self.clone())
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(server);
        address
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.0.seen.borrow().clone()
    }

    /// Every number that came, in order, again and again if it did.
    pub(super) fn numbers(&self) -> Vec<i64> {
        let seen = self.seen();
        seen.iter()
            .flat_map(|s| &s.requests)
            .map(|r| sequence(r))
            .collect()
    }

    pub(super) async fn until(&self, what: &str, condition: impl Fn(&[Seen]) -> bool) {
        let mut seen = self.0.seen.subscribe();
        let wait = seen.wait_for(|seen| condition(seen));
        assert!(
            tokio::time::timeout(PATIENCE, wait).await.is_ok(),
            "never {what}: {:?}",
            self.numbers()
        );
    }

    async fn connection(
        self,
        plan: Plan,
        index: usize,
        mut inbound: Streaming<Bytes>,
        acks: mpsc::UnboundedSender<Result<Ack, Status>>,
    ) {
        let ack = |sequence_number: i64| {
            let mut acked = self.0.acked.lock().unwrap();
            *acked = sequence_number.max(*acked);
            let _ = acks.send(Ok(Ack {
                stream_id: None,
                sequence_number,
            }));
        };
        let mut count = 0;
        let mut last = false;
        let mut unacked = Vec::new();
        loop {
            let Ok(Some(request)) = inbound.message().await else {
                unacked.drain(..).for_each(ack);
                // tonic reports a cancelled request as one that ended. But only then does no client wait for answers.
                let cancelled = !last && tokio::time::timeout(PATIENCE, acks.closed()).await.is_ok();
                self.0.seen.send_modify(|s| s[index].end = Some(!cancelled));
                return;
            };
            last = event(&request).is_none();
            let sequence = sequence(&request);
            if let Some(hook) = &*self.0.hook.lock().unwrap() {
                hook(sequence);
            }
            if count == 0 {
                let due = *self.0.acked.lock().unwrap() + 1;
                self.0.began.lock().unwrap().push((sequence, due));
            }
            count += 1;
            self.0.order.lock().unwrap().push(request.clone());
            self.0.seen.send_modify(|s| s[index].requests.push(request));
            match plan {
                Plan::Good => ack(sequence),
                Plan::CutAfter(n) => {
                    ack(sequence);
                    if count == n {
                        let _ = acks.send(Err(Status::unavailable("as ordered")));
                        return;
                    }
                }
                Plan::Late => {
                    self.0.late.acquire().await.unwrap().forget();
                    ack(sequence);
                }
                Plan::AtTheEnd => unacked.push(sequence),
                Plan::OutOfOrder if count == 1 => {}
                Plan::OutOfOrder => {
                    let _ = acks.send(Ok(Ack {
                        stream_id: None,
                        sequence_number: sequence,
                    }));
                }
                Plan::Wrong => {
                    let _ = acks.send(Ok(Ack {
                        stream_id: None,
                        sequence_number: sequence + 1000,
                    }));
                }
                Plan::CloseAt(n) if n == sequence => return,
                Plan::CloseAt(_) => ack(sequence),
                Plan::Refuse(_) => unreachable!("refused before"),
            }
        }
    }
}

impl StreamingService<Bytes> for Fake {
    type Response = Ack;
    type ResponseStream = UnboundedReceiverStream<Result<Ack, Status>>;
    type Future = BoxFuture<'static, Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        let fake = self.clone();
        Box::pin(async move {
            let plan = fake.0.plans.lock().unwrap().pop_front();
            let plan = plan.unwrap_or(*fake.0.default.lock().unwrap());
            if let Plan::Refuse(code) = plan {
                return Err(Status::new(code, "as ordered"));
            }
            let (headers, _, inbound) = request.into_parts();
            let mut index = 0;
            fake.0.seen.send_modify(|seen| {
                index = seen.len();
                seen.push(Seen {
                    requests: Vec::new(),
                    headers,
                    end: None,
                });
            });
            let (acks, answers) = mpsc::unbounded_channel();
            tokio::spawn(fake.connection(plan, index, inbound, acks));
            Ok(Response::new(UnboundedReceiverStream::new(answers)))
        })
    }
}

impl UnaryService<Bytes> for Fake {
    type Response = ();
    type Future = BoxFuture<'static, Result<Response<()>, Status>>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let fake = self.clone();
        Box::pin(async move {
            fake.0.order.lock().unwrap().push(request.into_inner());
            match fake.0.refusals.lock().unwrap().pop_front() {
                Some(code) => Err(Status::new(code, "as ordered")),
                None => Ok(Response::new(())),
            }
        })
    }
}

impl NamedService for Fake {
    const NAME: &'static str = "google.devtools.build.v1.PublishBuildEvent";
}

impl tonic::codegen::Service<http::Request<Body>> for Fake {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let fake = self.clone();
        Box::pin(async move {
            Ok(if request.uri().path().ends_with("/PublishLifecycleEvent") {
                Grpc::new(RawCodec::<(), Bytes>::default())
                    .unary(fake, request)
                    .await
            } else {
                Grpc::new(RawCodec::<Ack, Bytes>::default())
                    .streaming(fake, request)
                    .await
            })
        })
    }
}
