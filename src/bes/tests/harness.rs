//! A service with a scripted engine, and a client that speaks as Bazel does.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use outhaul_testkit::PATIENCE;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, watch},
    task::JoinHandle,
    time::timeout,
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming, transport::Channel};

use crate::{
    bep::{
        BepError,
        event::{CommandLine, Event, Started, StreamEvent},
    },
    bes::{BesAddress, BesListener, BesOptions, BesService, HoldMode, HoldPolicy, Upstream, serve},
    builds::{Builds, Decoders, Progress, Settlement, StreamEnd, StreamKey},
    digest::Digest,
    exec_path::ExecPath,
    journal::{Journal, JournalError, JournalOptions},
    proto::google::devtools::build::v1::{
        BuildEvent, OrderedBuildEvent, PublishBuildToolEventStreamRequest,
        PublishBuildToolEventStreamResponse, StreamId,
        build_event::{self, BuildComponentStreamFinished},
        publish_build_event_client::PublishBuildEventClient,
        stream_id::BuildComponent,
    },
};

pub(in crate::bes) fn key(invocation: &str) -> StreamKey {
    StreamKey {
        build_id: "build".to_owned(),
        invocation_id: invocation.to_owned(),
        ..StreamKey::default()
    }
}

/// What the engine saw of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::bes) enum Seen {
    Event(String, i64, String),
    Limited(String, String),
    Ended(String, StreamEnd),
    Held(String, bool),
}

/// An engine that notes its calls and settles when the test allows it.
pub(in crate::bes) struct Engine {
    seen: Mutex<Vec<Seen>>,
    /// Numbers of the events so far, by stream: attempts under the same ids are streams of their own.
    delivered: Mutex<HashMap<StreamKey, Vec<i64>>>,
    changed: watch::Sender<()>,
    settlement: watch::Sender<Option<Settlement>>,
    /// How far it is settled, if it says.
    pub(in crate::bes) progress: watch::Sender<Option<Progress>>,
    /// One permit is used for every event; closed means no limit.
    pub(in crate::bes) gate: Semaphore,
    /// Whether optional outputs are still on their way.
    pub(in crate::bes) rest: watch::Sender<bool>,
    /// Whether nothing is downloaded.
    pub(in crate::bes) stopped: watch::Sender<bool>,
    /// What an earlier process has done with every stream.
    pub(in crate::bes) done: std::sync::atomic::AtomicBool,
}

impl Engine {
    /// Events wait for permits.
    pub(in crate::bes) fn gated() -> Self {
        Self {
            seen: Mutex::default(),
            delivered: Mutex::default(),
            rest: watch::Sender::new(false),
            stopped: watch::Sender::new(false),
            done: std::sync::atomic::AtomicBool::new(false),
            changed: watch::Sender::new(()),
            settlement: watch::Sender::new(None),
            progress: watch::Sender::new(None),
            gate: Semaphore::new(0),
        }
    }

    pub(in crate::bes) fn open() -> Self {
        let engine = Self::gated();
        engine.gate.close();
        engine
    }

    fn note(&self, seen: Seen) {
        self.seen.lock().unwrap().push(seen);
        self.changed.send_replace(());
    }

    pub(in crate::bes) fn settle(&self, failed: u64) {
        self.settlement.send_replace(Some(Settlement {
            failed,
            messages: vec!["bazel-out/x: evicted".to_owned(); failed as usize],
            superseded: false,
        }));
    }

    pub(in crate::bes) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    pub(in crate::bes) fn delivered(&self) -> HashMap<StreamKey, Vec<i64>> {
        self.delivered.lock().unwrap().clone()
    }

    pub(in crate::bes) fn numbers(&self) -> Vec<i64> {
        let number = |seen| match seen {
            Seen::Event(_, n, _) => Some(n),
            _ => None,
        };
        self.seen().into_iter().filter_map(number).collect()
    }

    pub(in crate::bes) fn texts(&self) -> Vec<String> {
        let text = |seen| match seen {
            Seen::Event(_, _, text) => Some(text),
            _ => None,
        };
        self.seen().into_iter().filter_map(text).collect()
    }

    /// Waits until what was seen satisfies the condition.
    pub(in crate::bes) async fn until(&self, what: &str, condition: impl Fn(&[Seen]) -> bool) {
        let mut changed = self.changed.subscribe();
        let wait = async {
            while !condition(&self.seen()) {
                changed.changed().await.unwrap();
            }
        };
        if timeout(PATIENCE, wait).await.is_err() {
            panic!("never {what}: {:?}", self.seen());
        }
    }

    pub(in crate::bes) async fn until_ended(&self, end: StreamEnd) {
        let what = format!("ended with {end:?}");
        self.until(&what, |seen| {
            seen.iter().any(|s| matches!(s, Seen::Ended(_, e) if *e == end))
        })
        .await;
    }
}

impl Builds for Engine {
    fn events(&self, stream: &StreamKey, events: Vec<(i64, StreamEvent)>) -> BoxFuture<'_, ()> {
        let (key, stream) = (stream.clone(), stream.to_string());
        Box::pin(async move {
            for (sequence, event) in events {
                if let Ok(permit) = self.gate.acquire().await {
                    permit.forget();
                }
                let text = match event.event {
                    Event::Started(started) => started.invocation_id,
                    Event::CommandLine(line) => line.label,
                    Event::Skipped(_) => "skipped".to_owned(),
                    _ => panic!("not what was sent"),
                };
                assert_ne!(text, "panic", "as ordered");
                let mut delivered = self.delivered.lock().unwrap();
                delivered.entry(key.clone()).or_default().push(sequence);
                drop(delivered);
                self.note(Seen::Event(stream.clone(), sequence, text));
            }
        })
    }

    fn limited(&self, stream: &StreamKey, reason: String) -> BoxFuture<'_, ()> {
        self.note(Seen::Limited(stream.to_string(), reason));
        Box::pin(async {})
    }

    fn ended(&self, stream: &StreamKey, end: StreamEnd) -> BoxFuture<'_, ()> {
        self.note(Seen::Ended(stream.to_string(), end));
        Box::pin(async {})
    }

    fn done(&self, _: &StreamKey) -> BoxFuture<'static, ()> {
        let mut rest = self.rest.subscribe();
        Box::pin(async move {
            let _ = rest.wait_for(|rest| !rest).await;
        })
    }

    fn settled(&self, _: &StreamKey) -> BoxFuture<'static, Settlement> {
        let mut settlement = self.settlement.subscribe();
        Box::pin(async move {
            settlement
                .wait_for(Option::is_some)
                .await
                .unwrap()
                .clone()
                .unwrap()
        })
    }

    fn is_done(&self, _: &StreamKey) -> bool {
        self.done.load(std::sync::atomic::Ordering::Relaxed)
    }

    fn progress(&self, _: &StreamKey) -> BoxFuture<'static, Option<watch::Receiver<Progress>>> {
        let mut reported = self.progress.subscribe();
        let Some(first) = reported.borrow_and_update().clone() else {
            return Box::pin(async { None });
        };
        let (sender, receiver) = watch::channel(first);
        tokio::spawn(async move {
            while reported.changed().await.is_ok() {
                sender.send_replace(reported.borrow_and_update().clone().unwrap_or_default());
            }
        });
        Box::pin(async { Some(receiver) })
    }

    fn local_files(
        &self,
        _: &StreamKey,
        files: Vec<(Option<ExecPath>, Digest)>,
    ) -> BoxFuture<'static, Vec<Option<PathBuf>>> {
        Box::pin(async move { vec![None; files.len()] })
    }

    fn stopped(&self) -> BoxFuture<'static, ()> {
        let mut stopped = self.stopped.subscribe();
        Box::pin(async move {
            let _ = stopped.wait_for(|stopped| *stopped).await;
        })
    }

    fn held(&self, stream: &StreamKey, _: Duration, timed_out: bool) {
        self.note(Seen::Held(stream.to_string(), timed_out));
    }
}

/// Reads the test's own events: text, except `bad`; `--name=value` is a command line with that option.
pub(in crate::bes) fn decode(bytes: &Bytes) -> Result<StreamEvent, BepError> {
    // Long events are padded.
    let text = bytes.split(|b| *b == 0).next().unwrap_or_default();
    match std::str::from_utf8(text) {
        Ok("bad") | Err(_) => Err(BepError::Malformed {
            path: PathBuf::new(),
            offset: 0,
            reason: "as ordered",
        }),
        Ok(text) if text.starts_with("--") => Ok(StreamEvent {
            event: Event::CommandLine(CommandLine {
                label: "canonical".to_owned(),
                options: text[2..]
                    .split_once('=')
                    .map(|(name, value)| (name.to_owned(), value.to_owned()))
                    .into_iter()
                    .collect(),
            }),
            last: false,
        }),
        Ok(text) => Ok(StreamEvent {
            event: Event::Started(Started {
                invocation_id: text.to_owned(),
                ..Started::default()
            }),
            last: false,
        }),
    }
}

pub(in crate::bes) fn options(mode: HoldMode) -> BesOptions {
    BesOptions {
        hold: HoldPolicy {
            mode,
            timeout: PATIENCE * 10,
            strict: false,
            is_followed: false,
        },
        reconnect_grace: Duration::from_millis(300),
        ..BesOptions::default()
    }
}

/// A running daemon's worth of this room.
pub(in crate::bes) struct Daemon {
    pub(in crate::bes) engine: Arc<Engine>,
    pub(in crate::bes) service: BesService,
    pub(in crate::bes) address: BesAddress,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// A program that another test has begun to start has our descriptors for a moment, and so the lock of a journal that was let go.
pub(in crate::bes) async fn opened<F: Future<Output = ()>>(
    dir: &std::path::Path,
    options: JournalOptions,
    sleep: impl Fn(Duration) -> F,
) -> Journal {
    for _ in 0..1000 {
        match Journal::open(dir, options) {
            Err(JournalError::InUse { .. }) => sleep(Duration::from_millis(10)).await,
            journal => return journal.unwrap(),
        }
    }
    panic!("{} stays locked", dir.display());
}

impl Daemon {
    /// Serves on TCP, with a journal if there is a directory for it.
    pub(in crate::bes) async fn start(options: BesOptions, journal: Option<&std::path::Path>) -> Self {
        Self::listen(options, journal, &"127.0.0.1:0".parse().unwrap()).await
    }

    pub(in crate::bes) async fn listen(
        options: BesOptions,
        journal: Option<&std::path::Path>,
        address: &BesAddress,
    ) -> Self {
        Self::with(Arc::new(Engine::open()), options, journal, address, None).await
    }

    /// With an engine whose events wait for permits.
    pub(in crate::bes) async fn gated(options: BesOptions, journal: Option<&std::path::Path>) -> Self {
        let engine = Arc::new(Engine::gated());
        Self::with(engine, options, journal, &"127.0.0.1:0".parse().unwrap(), None).await
    }

    /// After a process that was done with every stream, but for what upstream has not got.
    pub(in crate::bes) async fn behind_one_that_was_done(
        options: BesOptions,
        journal: &std::path::Path,
        upstream: Option<Upstream>,
    ) -> Self {
        let engine = Arc::new(Engine::open());
        engine.done.store(true, std::sync::atomic::Ordering::Relaxed);
        let address = "127.0.0.1:0".parse().unwrap();
        Self::with(engine, options, Some(journal), &address, upstream).await
    }

    /// With an upstream service.
    pub(in crate::bes) async fn forwarding(
        options: BesOptions,
        journal: Option<&std::path::Path>,
        upstream: Option<Upstream>,
    ) -> Self {
        let engine = Arc::new(Engine::open());
        Self::with(
            engine,
            options,
            journal,
            &"127.0.0.1:0".parse().unwrap(),
            upstream,
        )
        .await
    }

    async fn with(
        engine: Arc<Engine>,
        options: BesOptions,
        journal: Option<&std::path::Path>,
        address: &BesAddress,
        upstream: Option<Upstream>,
    ) -> Self {
        let journal_options = JournalOptions {
            most: options.limits.journal,
            ..JournalOptions::default()
        };
        let journal = match journal {
            Some(dir) => Some(opened(dir, journal_options, tokio::time::sleep).await),
            None => None,
        };
        let decoders: Decoders = Arc::new(|| Box::new(decode));
        let service = BesService::new(engine.clone(), decoders, journal, upstream, options);
        service.recover().await.unwrap();
        let listener = BesListener::bind(address).unwrap();
        let address = listener.address().unwrap();
        let stop = CancellationToken::new();
        let serving = serve(service.clone(), vec![listener], stop.clone());
        let task = tokio::spawn(async move { serving.await.unwrap() });
        Self {
            engine,
            service,
            address,
            stop,
            task,
        }
    }

    pub(in crate::bes) async fn client(&self) -> PublishBuildEventClient<Channel> {
        let url = match &self.address {
            BesAddress::Tcp(at) => format!("http://{at}"),
            BesAddress::Unix(path) => format!("unix:{}", path.display()),
        };
        PublishBuildEventClient::connect(url).await.unwrap()
    }

    pub(in crate::bes) async fn stop(self) {
        self.stop.cancel();
        timeout(PATIENCE, self.task).await.unwrap().unwrap();
    }
}

pub(in crate::bes) fn request(
    invocation: &str,
    sequence: i64,
    event: build_event::Event,
) -> PublishBuildToolEventStreamRequest {
    PublishBuildToolEventStreamRequest {
        ordered_build_event: Some(OrderedBuildEvent {
            stream_id: Some(StreamId {
                build_id: "build".to_owned(),
                component: BuildComponent::Tool.into(),
                invocation_id: invocation.to_owned(),
            }),
            sequence_number: sequence,
            event: Some(BuildEvent {
                event_time: None,
                event: Some(event),
            }),
        }),
        ..PublishBuildToolEventStreamRequest::default()
    }
}

/// One connection's stream, as Bazel opens it.
pub(in crate::bes) struct Upload {
    invocation: String,
    sender: Option<mpsc::UnboundedSender<PublishBuildToolEventStreamRequest>>,
    answers: Streaming<PublishBuildToolEventStreamResponse>,
}

impl Upload {
    pub(in crate::bes) async fn open(daemon: &Daemon, invocation: &str) -> Self {
        Self::on(&mut daemon.client().await, invocation).await
    }

    pub(in crate::bes) async fn on(client: &mut PublishBuildEventClient<Channel>, invocation: &str) -> Self {
        let (sender, requests) = mpsc::unbounded_channel();
        let answers = client
            .publish_build_tool_event_stream(UnboundedReceiverStream::new(requests))
            .await
            .unwrap()
            .into_inner();
        Self {
            invocation: invocation.to_owned(),
            sender: Some(sender),
            answers,
        }
    }

    /// Through a TCP relay that breaks when its task is aborted.
    pub(in crate::bes) async fn through_a_wire(daemon: &Daemon, invocation: &str) -> (Self, JoinHandle<()>) {
        let BesAddress::Tcp(server) = daemon.address else {
            panic!("TCP only")
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let relay = tokio::spawn(async move {
            let (mut near, _) = listener.accept().await.unwrap();
            let mut far = TcpStream::connect(server).await.unwrap();
            let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
        });
        let mut client = PublishBuildEventClient::connect(url).await.unwrap();
        (Self::on(&mut client, invocation).await, relay)
    }

    pub(in crate::bes) fn send(&self, sequence: i64, bytes: impl Into<Vec<u8>>) {
        let event = build_event::Event::BazelEvent(prost_types::Any {
            type_url: "type.googleapis.com/build_event_stream.BuildEvent".to_owned(),
            value: bytes.into(),
        });
        self.raw(request(&self.invocation, sequence, event));
    }

    /// Events whose text is their number.
    pub(in crate::bes) fn send_all(&self, sequences: impl IntoIterator<Item = i64>) {
        for n in sequences {
            self.send(n, n.to_string());
        }
    }

    pub(in crate::bes) fn raw(&self, request: PublishBuildToolEventStreamRequest) {
        self.sender.as_ref().unwrap().send(request).unwrap();
    }

    /// The last event, and the half-close after it.
    pub(in crate::bes) fn finish(&mut self, sequence: i64) {
        let event = build_event::Event::ComponentStreamFinished(BuildComponentStreamFinished { r#type: 1 });
        self.raw(request(&self.invocation, sequence, event));
        self.half_close();
    }

    pub(in crate::bes) fn half_close(&mut self) {
        self.sender = None;
    }

    pub(in crate::bes) async fn answer(&mut self) -> Result<Option<i64>, Status> {
        let answer = timeout(PATIENCE, self.answers.message())
            .await
            .expect("an answer in time");
        let answer = answer?;
        if let Some(answer) = &answer {
            assert_eq!(answer.stream_id.as_ref().unwrap().invocation_id, self.invocation);
        }
        Ok(answer.map(|a| a.sequence_number))
    }

    /// Expects exactly these acknowledgements next.
    pub(in crate::bes) async fn acked(&mut self, sequences: impl IntoIterator<Item = i64>) {
        for n in sequences {
            assert_eq!(self.answer().await.unwrap(), Some(n));
        }
    }

    /// Expects that nothing comes for now.
    pub(in crate::bes) async fn quiet(&mut self) {
        let silence = timeout(Duration::from_millis(150), self.answers.message()).await;
        assert!(silence.is_err(), "{silence:?}");
    }

    /// Expects the stream's good end.
    pub(in crate::bes) async fn closed(&mut self) {
        assert_eq!(self.answer().await.unwrap(), None);
    }

    pub(in crate::bes) async fn refused(&mut self, code: Code) -> Status {
        let status = self.answer().await.expect_err("an error");
        assert_eq!(status.code(), code, "{status}");
        status
    }
}
