//! A stream's forwarder with everything around it.

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use outhaul_testkit::PATIENCE;
use tokio::sync::{mpsc, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{fake::Fake, requests};
use crate::{
    bep::event::StreamEvent,
    bes::{
        HoldMode, HoldPolicy,
        upstream::{
            Upstream,
            options::UpstreamOptions,
            outgoing::{ForwardStatus, Outgoing, OutgoingEvent},
            shared::Surroundings,
            window::Room,
        },
    },
    builds::{Builds, Progress, Settlement, StreamEnd, StreamKey},
    digest::Digest,
    exec_path::ExecPath,
    journal::RecordKind,
    transport::Endpoint,
};

/// An engine whose progress the test sets.
pub(super) struct Engine {
    pub(super) progress: watch::Sender<Progress>,
    /// Files on disk, by the sizes of their digests.
    pub(super) local: Mutex<HashMap<u64, PathBuf>>,
}

impl Builds for Engine {
    fn events(&self, _: &StreamKey, _: Vec<(i64, StreamEvent)>) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }

    fn limited(&self, _: &StreamKey, _: String) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }

    fn ended(&self, _: &StreamKey, _: StreamEnd) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }

    fn done(&self, _: &StreamKey) -> BoxFuture<'static, ()> {
        Box::pin(async {})
    }

    fn settled(&self, _: &StreamKey) -> BoxFuture<'static, Settlement> {
        Box::pin(async { Settlement::default() })
    }

    fn is_done(&self, _: &StreamKey) -> bool {
        false
    }

    fn progress(&self, _: &StreamKey) -> BoxFuture<'static, Option<watch::Receiver<Progress>>> {
        let progress = self.progress.subscribe();
        Box::pin(async { Some(progress) })
    }

    fn local_files(
        &self,
        _: &StreamKey,
        files: Vec<(Option<ExecPath>, Digest)>,
    ) -> BoxFuture<'static, Vec<Option<PathBuf>>> {
        let local = self.local.lock().unwrap();
        let found = files.iter().map(|(_, digest)| local.get(&digest.size()).cloned());
        let found = found.collect();
        Box::pin(async { found })
    }

    fn held(&self, _: &StreamKey, _: Duration, _: bool) {}
}

/// Options for a server at an address, without long waits.
pub(super) fn options(address: SocketAddr) -> UpstreamOptions {
    let endpoint = Endpoint::parse("--bes-backend", &format!("grpc://{address}")).unwrap();
    UpstreamOptions {
        first_retry: Duration::from_millis(1),
        longest_retry: Duration::from_millis(20),
        ..UpstreamOptions::new(endpoint)
    }
}

pub(super) struct Rig {
    pub(super) upstream: Upstream,
    pub(super) engine: Arc<Engine>,
    pub(super) around: Surroundings,
    pub(super) key: StreamKey,
    pub(super) queue: mpsc::UnboundedSender<Outgoing>,
    pub(super) status: watch::Receiver<ForwardStatus>,
    pub(super) saved: Arc<Mutex<Vec<i64>>>,
    pub(super) room: Arc<Room>,
}

impl Rig {
    /// To a fake that serves, holding nothing.
    pub(super) async fn start(fake: &Fake) -> Self {
        let address = fake.serve("127.0.0.1:0".parse().unwrap()).await;
        Self::with(options(address), HoldMode::Invocation, false, 0)
    }

    pub(super) fn with(options: UpstreamOptions, mode: HoldMode, strict: bool, acked: i64) -> Self {
        let hold = HoldPolicy {
            mode,
            timeout: PATIENCE * 10,
            strict,
            is_followed: false,
        };
        Self::under(options, hold, acked)
    }

    pub(super) fn under(options: UpstreamOptions, hold: HoldPolicy, acked: i64) -> Self {
        let engine = Arc::new(Engine {
            progress: watch::Sender::new(Progress::default()),
            local: Mutex::default(),
        });
        let around = Surroundings {
            builds: engine.clone(),
            hold,
            counters: Arc::default(),
            shutdown: CancellationToken::new(),
            forwards: TaskTracker::new(),
            halt: CancellationToken::new(),
        };
        let key = StreamKey {
            build_id: "build".to_owned(),
            invocation_id: "invocation".to_owned(),
            ..StreamKey::default()
        };
        let room = Arc::new(Room::new(options.window_bytes));
        let upstream = Upstream::new(options).unwrap();
        let saved = Arc::<Mutex<Vec<i64>>>::default();
        let save = {
            let saved = Arc::clone(&saved);
            Arc::new(move |acked| saved.lock().unwrap().push(acked))
        };
        let (queue, status) = upstream.forward_in(&around, &key, acked, save, Arc::clone(&room));
        Self {
            upstream,
            engine,
            around,
            key,
            queue,
            status,
            saved,
            room,
        }
    }

    /// Leaves the stream, and begins another one of the same build.
    pub(super) fn another(mut self) -> Self {
        let save = Arc::new(|_| {});
        (self.queue, self.status) =
            self.upstream
                .forward_in(&self.around, &self.key, 0, save, Arc::clone(&self.room));
        self
    }

    /// Hands events over, a few at a time.
    pub(super) fn send(&self, events: &[Bytes]) {
        for events in events.chunks(5) {
            let events = events.iter().map(|request| OutgoingEvent {
                sequence: requests::sequence(request),
                kind: match requests::event(request) {
                    Some(_) => RecordKind::Event,
                    None => RecordKind::Finished,
                },
                request: request.clone(),
            });
            let events = events.collect();
            self.pass(Outgoing::Events { events, room: None });
        }
    }

    pub(super) fn pass(&self, outgoing: Outgoing) {
        assert!(self.queue.send(outgoing).is_ok(), "the forwarder is gone");
    }

    pub(super) fn finish(&self) {
        self.pass(Outgoing::Ended(StreamEnd::Finished));
    }

    /// Waits until the status is such.
    pub(super) async fn until(&mut self, what: &str, condition: impl Fn(&ForwardStatus) -> bool) {
        let wait = self.status.wait_for(|status| condition(status));
        if tokio::time::timeout(PATIENCE, wait).await.is_err() {
            panic!("never {what}: {:?}", self.status.borrow());
        }
    }

    pub(super) async fn until_finished(&mut self) {
        self.until("finished", |status| status.finished).await;
    }
}

/// A stream of this many events and its end.
pub(super) fn stream(events: i64) -> Vec<Bytes> {
    let mut stream: Vec<_> = (1..=events)
        .map(|sequence| requests::with_id(sequence, if sequence % 3 == 0 { 5 } else { 2 }))
        .collect();
    stream.push(requests::last(events + 1));
    stream
}
