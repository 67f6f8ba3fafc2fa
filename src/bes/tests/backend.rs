//! An upstream event service that is controlled by the test, and a client that sends bytes as they are.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use outhaul_testkit::PATIENCE;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinHandle,
    time::timeout,
};
use tokio_stream::{
    StreamExt as _,
    wrappers::{TcpListenerStream, UnboundedReceiverStream},
};
use tonic::{Request, Response, Status, Streaming, metadata::MetadataMap, transport::Channel};

use super::harness::Daemon;
use crate::{
    bes::{
        BesAddress,
        lifecycle::Call,
        raw::{PublishBuildEvent, PublishBuildEventClient, PublishBuildEventServer},
        upstream::{Upstream, UpstreamOptions},
    },
    journal::received::Received,
    proto::google::devtools::build::v1::PublishBuildToolEventStreamResponse,
    transport::Endpoint,
};

/// What came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Came {
    Event(i64),
    /// The client has sent everything and half-closed.
    Closed,
    Call(&'static str),
}

/// The service. Cheap to clone; what came is kept over a [`Self::stop`].
#[derive(Clone)]
pub(super) struct Backend {
    came: Arc<Mutex<Vec<Came>>>,
    requests: Arc<Mutex<Vec<Bytes>>>,
    headers: Arc<Mutex<Vec<MetadataMap>>>,
    changed: watch::Sender<()>,
    /// Events up to this number are acknowledged.
    acks: watch::Sender<i64>,
    address: Arc<Mutex<Option<SocketAddr>>>,
    task: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl Backend {
    /// Listens, and acknowledges everything.
    pub(super) async fn start() -> Self {
        let backend = Self {
            came: Arc::default(),
            requests: Arc::default(),
            headers: Arc::default(),
            changed: watch::Sender::new(()),
            acks: watch::Sender::new(i64::MAX),
            address: Arc::default(),
            task: Arc::default(),
        };
        backend.listen().await;
        backend
    }

    /// Listens again, on the port that it had.
    pub(super) async fn listen(&self) {
        let address = *self.address.lock().unwrap();
        let address = address.unwrap_or_else(|| "127.0.0.1:0".parse().unwrap());
        let listener = TcpListener::bind(address).await.unwrap();
        *self.address.lock().unwrap() = Some(listener.local_addr().unwrap());
        let service = PublishBuildEventServer::new(self.clone()).max_decoding_message_size(256 << 20);
        let serving = tonic::transport::Server::builder()
            .initial_stream_window_size(8 << 20)
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener));
        let task = tokio::spawn(async move { serving.await.unwrap() });
        *self.task.lock().unwrap() = Some(task);
    }

    /// Listens no more.
    pub(super) async fn stop(&self) {
        let task = self.task.lock().unwrap().take();
        if let Some(task) = task {
            task.abort();
            let _ = task.await;
        }
    }

    /// Acknowledges up to this number from now on.
    pub(super) fn ack_up_to(&self, sequence: i64) {
        self.acks.send_replace(sequence);
    }

    pub(super) fn upstream(&self) -> Upstream {
        self.upstream_with(|_| {})
    }

    pub(super) fn upstream_with(&self, change: impl FnOnce(&mut UpstreamOptions)) -> Upstream {
        let address = self.address.lock().unwrap().unwrap();
        let endpoint = Endpoint::parse("--bes-backend", &format!("grpc://{address}")).unwrap();
        let mut options = UpstreamOptions::new(endpoint);
        change(&mut options);
        Upstream::new(options).unwrap()
    }

    fn note(&self, came: Came) {
        self.came.lock().unwrap().push(came);
        self.changed.send_replace(());
    }

    pub(super) fn came(&self) -> Vec<Came> {
        self.came.lock().unwrap().clone()
    }

    /// Requests of streams, each as often as it came.
    pub(super) fn requests(&self) -> Vec<Bytes> {
        self.requests.lock().unwrap().clone()
    }

    /// Headers of streams and calls.
    pub(super) fn headers(&self) -> Vec<MetadataMap> {
        self.headers.lock().unwrap().clone()
    }

    pub(super) fn numbers(&self) -> Vec<i64> {
        let number = |came| match came {
            Came::Event(n) => Some(n),
            _ => None,
        };
        self.came().into_iter().filter_map(number).collect()
    }

    pub(super) async fn until(&self, what: &str, condition: impl Fn(&[Came]) -> bool) {
        let mut changed = self.changed.subscribe();
        let wait = async {
            while !condition(&self.came()) {
                changed.changed().await.unwrap();
            }
        };
        if timeout(PATIENCE, wait).await.is_err() {
            panic!("never {what}: {:?}", self.came());
        }
    }

    pub(super) async fn until_closed(&self) {
        self.until("closed", |came| came.contains(&Came::Closed)).await;
    }
}

#[tonic::async_trait]
impl PublishBuildEvent for Backend {
    async fn publish_lifecycle_event(&self, request: Request<Bytes>) -> Result<Response<()>, Status> {
        let (headers, _, request) = request.into_parts();
        self.headers.lock().unwrap().push(headers);
        self.note(Came::Call(Call::read(&request).unwrap().name));
        Ok(Response::new(()))
    }

    type PublishBuildToolEventStreamStream =
        UnboundedReceiverStream<Result<PublishBuildToolEventStreamResponse, Status>>;

    async fn publish_build_tool_event_stream(
        &self,
        request: Request<Streaming<Bytes>>,
    ) -> Result<Response<Self::PublishBuildToolEventStreamStream>, Status> {
        let (headers, _, mut inbound) = request.into_parts();
        self.headers.lock().unwrap().push(headers);
        let (answers, responses) = mpsc::unbounded_channel();
        let (received, mut unacked) = mpsc::unbounded_channel();
        let backend = self.clone();
        tokio::spawn(async move {
            while let Some(Ok(request)) = inbound.next().await {
                let event = Received::read(request.clone()).unwrap().unwrap();
                backend.requests.lock().unwrap().push(request);
                backend.note(Came::Event(event.sequence));
                received.send(Some(event)).unwrap();
            }
            let _ = received.send(None);
        });
        let backend = self.clone();
        tokio::spawn(async move {
            let mut limit = backend.acks.subscribe();
            let mut finished = false;
            while let Some(Some(event)) = unacked.recv().await {
                limit.wait_for(|limit| *limit >= event.sequence).await.unwrap();
                finished = event.kind == crate::journal::RecordKind::Finished;
                let _ = answers.send(Ok(PublishBuildToolEventStreamResponse {
                    stream_id: event.stream_id,
                    sequence_number: event.sequence,
                }));
            }
            if finished {
                backend.note(Came::Closed);
            }
        });
        Ok(Response::new(UnboundedReceiverStream::new(responses)))
    }
}

/// Opens a stream that sends bytes as they are.
pub(super) async fn upload(
    daemon: &Daemon,
    headers: MetadataMap,
) -> (
    mpsc::UnboundedSender<Bytes>,
    Streaming<PublishBuildToolEventStreamResponse>,
) {
    let (sender, requests) = mpsc::unbounded_channel();
    let mut client = client(daemon).await;
    let request = Request::from_parts(
        headers,
        Default::default(),
        UnboundedReceiverStream::new(requests),
    );
    let answers = client.publish_build_tool_event_stream(request).await.unwrap();
    (sender, answers.into_inner())
}

pub(super) async fn client(daemon: &Daemon) -> PublishBuildEventClient<Channel> {
    let BesAddress::Tcp(address) = daemon.address else {
        panic!("TCP only")
    };
    PublishBuildEventClient::connect(format!("http://{address}"))
        .await
        .unwrap()
}
