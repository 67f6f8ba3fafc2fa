//! An upstream service that keeps what it has acknowledged, and nothing else, when it dies.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::ledger::Ledger;
use crate::{
    bes::{
        lifecycle::Call,
        raw::{PublishBuildEvent, PublishBuildEventServer},
    },
    journal::received::Received,
    proto::google::devtools::build::v1::PublishBuildToolEventStreamResponse,
    simulated::{Chance, net},
};

pub(super) const PORT: u16 = 8981;

/// Calls around a stream, half of them before it.
const CALLS: usize = 4;

/// When it acknowledges.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Answers {
    AtOnce,
    /// Each event some time after the one before.
    Late,
    /// Nothing before the client has said that nothing more comes.
    AtTheEnd,
}

/// Cheap to clone. What it keeps outlives its host.
#[derive(Clone)]
pub(super) struct Service(Arc<State>);

struct State {
    ledger: Arc<Ledger>,
    answers: Answers,
    chance: Mutex<Chance>,
    /// Events that were acknowledged, by streams.
    kept: Mutex<BTreeMap<String, Vec<Bytes>>>,
    /// Calls about streams' lives that were answered.
    calls: Mutex<BTreeSet<(String, &'static str)>>,
    received: AtomicU64,
    connections: AtomicU64,
}

impl Service {
    pub(super) fn new(ledger: &Arc<Ledger>, answers: Answers, chance: Chance) -> Self {
        Self(Arc::new(State {
            ledger: Arc::clone(ledger),
            answers,
            chance: Mutex::new(chance),
            kept: Mutex::default(),
            calls: Mutex::default(),
            received: AtomicU64::new(0),
            connections: AtomicU64::new(0),
        }))
    }

    /// Until its host dies.
    pub(super) async fn serve(self) -> turmoil::Result {
        let incoming = net::incoming(PORT).await?;
        let service = PublishBuildEventServer::new(self).max_decoding_message_size(1 << 30);
        tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(30)))
            .add_service(service)
            .serve_with_incoming(incoming)
            .await
            .map_err(Into::into)
    }

    pub(super) fn kept(&self, stream: &str) -> usize {
        self.0.kept.lock().unwrap().get(stream).map_or(0, Vec::len)
    }

    pub(super) fn received(&self) -> u64 {
        self.0.received.load(Ordering::Relaxed)
    }

    pub(super) fn connections(&self) -> u64 {
        self.0.connections.load(Ordering::Relaxed)
    }

    /// Whether it has all that the daemon has of every stream.
    pub(super) fn has_everything(&self, ledger: &Ledger) -> bool {
        ledger
            .plans
            .keys()
            .all(|name| self.kept(name) == ledger.journaled(name))
    }

    fn calls(&self, stream: &str) -> usize {
        let calls = self.0.calls.lock().unwrap();
        calls.iter().filter(|(name, _)| name == stream).count()
    }

    fn wait(&self) -> Duration {
        match self.0.answers {
            Answers::Late => self.0.chance.lock().unwrap().time(Duration::from_millis(500)),
            _ => Duration::ZERO,
        }
    }

    /// Keeps an event, and acknowledges it.
    fn keep(&self, stream: &str, event: &Received) -> PublishBuildToolEventStreamResponse {
        let mut kept = self.0.kept.lock().unwrap();
        let kept = kept.entry(stream.to_owned()).or_default();
        let at = usize::try_from(event.sequence - 1).unwrap_or(usize::MAX);
        if at == kept.len() {
            kept.push(event.request.clone());
        }
        let here = kept.get(at).is_some_and(|kept| *kept == event.request);
        self.0.ledger.verdict.check(here, || {
            format!(
                "{stream}: upstream gets {} with {} kept, or another one",
                event.sequence,
                kept.len()
            )
        });
        PublishBuildToolEventStreamResponse {
            stream_id: event.stream_id.clone(),
            sequence_number: event.sequence,
        }
    }

    /// What came on a connection: the bytes that were sent, in order, from the first that is not kept or an earlier one.
    fn came(&self, stream: &str, event: &Received, before: Option<i64>) {
        self.0.received.fetch_add(1, Ordering::Relaxed);
        let ledger = &self.0.ledger;
        let sequence = event.sequence;
        let in_order = match before {
            Some(before) => sequence == before + 1,
            None => sequence <= self.kept(stream) as i64 + 1,
        };
        ledger.verdict.check(in_order, || {
            format!(
                "{stream}: upstream gets {sequence} after {before:?}, with {} kept",
                self.kept(stream)
            )
        });
        ledger.verdict.check(
            !ledger.plans[stream].calls
                || self.calls(stream) >= CALLS / 2
                || ledger.lives.load(Ordering::Relaxed) > 1,
            || format!("{stream}: upstream gets {sequence} before it has heard of the build"),
        );
        let sent = ledger.plans[stream].requests.get((sequence - 1) as usize);
        ledger.verdict.check(sent == Some(&event.request), || {
            format!("{stream}: {sequence} is not what was sent")
        });
    }
}

#[tonic::async_trait]
impl PublishBuildEvent for Service {
    async fn publish_lifecycle_event(&self, request: Request<Bytes>) -> Result<Response<()>, Status> {
        let Ok(call) = Call::read(&request.into_inner()) else {
            return Err(Status::invalid_argument("no call"));
        };
        let stream = &call.invocation_id;
        let (kept, all) = (self.kept(stream), self.0.ledger.plans[stream].requests.len());
        self.0.ledger.verdict.check(call.opening || kept == all, || {
            format!(
                "{stream}: upstream hears {} with {kept} of {all} events",
                call.name
            )
        });
        self.0
            .calls
            .lock()
            .unwrap()
            .insert((call.invocation_id, call.name));
        Ok(Response::new(()))
    }

    type PublishBuildToolEventStreamStream =
        UnboundedReceiverStream<Result<PublishBuildToolEventStreamResponse, Status>>;

    async fn publish_build_tool_event_stream(
        &self,
        request: Request<Streaming<Bytes>>,
    ) -> Result<Response<Self::PublishBuildToolEventStreamStream>, Status> {
        let mut inbound = request.into_inner();
        self.0.connections.fetch_add(1, Ordering::Relaxed);
        let (answers, responses) = mpsc::unbounded_channel();
        let service = self.clone();
        tokio::spawn(async move {
            let mut name = None;
            let mut before = None;
            let mut unacked = Vec::new();
            loop {
                let request = match inbound.message().await {
                    Ok(Some(request)) => request,
                    Ok(None) => break,
                    Err(_) => return,
                };
                let Ok(Some(event)) = Received::read(request) else {
                    service.0.ledger.verdict.check(false, || "no event".to_owned());
                    return;
                };
                let name = name.get_or_insert_with(|| {
                    event
                        .stream_id
                        .as_ref()
                        .map(|id| id.invocation_id.clone())
                        .unwrap_or_default()
                });
                service.came(name, &event, before);
                before = Some(event.sequence);
                tokio::time::sleep(service.wait()).await;
                if service.0.answers == Answers::AtTheEnd {
                    unacked.push(event);
                } else {
                    let _ = answers.send(Ok(service.keep(name, &event)));
                }
            }
            for event in unacked {
                let _ = answers.send(Ok(service.keep(name.as_deref().unwrap_or_default(), &event)));
            }
        });
        Ok(Response::new(UnboundedReceiverStream::new(responses)))
    }
}
