//! The notifier with receivers that behave and receivers that do not.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse as _, Response},
};
use outhaul_testkit::PATIENCE;
use serde_json::Value;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    time::timeout,
};

use super::{
    Event, Hook, NotifyOptions, NotifyUrl, Secret, document::Document, http::Poster, notifier::Notifier,
    retry::Answer, retry::Patience,
};
use crate::{
    invocation::{
        Report,
        feed::{Change, InvocationChange},
        tally::Tally,
    },
    metrics::Metrics,
    record::{InvocationState, TargetRow, TargetState},
    transport::{Delays, https},
};

/// What a receiver got.
#[derive(Debug, Clone)]
struct Got {
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Got {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// The target's label, or the word `invocation`.
    fn subject(&self) -> String {
        let json = self.json();
        json["target"]["label"]
            .as_str()
            .unwrap_or("invocation")
            .to_owned()
    }
}

/// Status codes, with `Retry-After` where there is one.
type Answers = VecDeque<(u16, Option<&'static str>)>;

/// An HTTP server that gives the test's answers, then 200.
#[derive(Clone)]
struct Receiver {
    address: std::net::SocketAddr,
    answers: Arc<Mutex<Answers>>,
    got: watch::Sender<Vec<Got>>,
    /// While false, no request is answered.
    open: watch::Sender<bool>,
}

impl Receiver {
    async fn start(answers: &[(u16, Option<&'static str>)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let receiver = Self {
            address: listener.local_addr().unwrap(),
            answers: Arc::new(Mutex::new(answers.iter().copied().collect())),
            got: watch::Sender::default(),
            open: watch::Sender::new(true),
        };
        let app = Router::new().fallback(answer).with_state(receiver.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        receiver
    }

    fn url(&self) -> NotifyUrl {
        format!("http://user:hush@{}/hush?token=hush", self.address)
            .parse()
            .unwrap()
    }

    /// Waits for this many documents and returns them.
    async fn got(&self, count: usize) -> Vec<Got> {
        let mut got = self.got.subscribe();
        let waited = timeout(PATIENCE, got.wait_for(|got| got.len() >= count)).await;
        waited.expect("the documents come").unwrap().clone()
    }
}

async fn answer(State(receiver): State<Receiver>, headers: HeaderMap, body: bytes::Bytes) -> Response {
    receiver.got.send_modify(|got| {
        got.push(Got {
            headers,
            body: body.to_vec(),
        });
    });
    let _ = receiver.open.subscribe().wait_for(|open| *open).await;
    let next = receiver.answers.lock().unwrap().pop_front();
    let (status, retry_after) = next.unwrap_or((200, None));
    let status = StatusCode::from_u16(status).unwrap();
    match retry_after {
        Some(text) => (status, [("retry-after", text)]).into_response(),
        None => status.into_response(),
    }
}

/// The real waits, a thousand times shorter.
fn hasty() -> Patience {
    Patience {
        delays: Delays::doubling(Duration::from_millis(1), Duration::from_millis(60)),
        ..Patience::default()
    }
}

struct World {
    changes: mpsc::UnboundedSender<InvocationChange>,
    metrics: Metrics,
    notifier: Notifier,
}

impl World {
    fn new(options: NotifyOptions) -> Self {
        Self::with(options, 1000, hasty())
    }

    fn with(options: NotifyOptions, bound: usize, patience: Patience) -> Self {
        let (changes, listening) = mpsc::unbounded_channel();
        let metrics = Metrics::default();
        let notifier = Notifier::with_patience(
            options,
            listening,
            &metrics,
            patience,
            bound,
            Duration::from_millis(500),
        )
        .unwrap();
        Self {
            changes,
            metrics,
            notifier,
        }
    }

    fn notify(&self, change: Change) {
        let reported = InvocationChange {
            invocation_id: "i".to_owned(),
            change,
        };
        self.changes.send(reported).unwrap();
    }

    fn target(&self, label: &str) {
        self.notify(Change::Target(Arc::new(TargetRow {
            label: label.to_owned(),
            state: TargetState::Settled,
            ..TargetRow::default()
        })));
    }

    fn settled(&self) {
        self.notify(Change::Settled(Box::new(Report {
            invocation_id: "i".to_owned(),
            build_id: String::new(),
            line: String::new(),
            messages: Vec::new(),
            failed: 0,
            exit_code: Some(0),
            workspace: "/ws".to_owned(),
            exec_root: "/e".to_owned(),
            command: "build".to_owned(),
            state: InvocationState::Settled,
            tally: Tally::default(),
        })));
    }

    async fn close(self) -> Metrics {
        timeout(PATIENCE, self.notifier.close()).await.expect("it closes");
        self.metrics
    }
}

/// Everything to one URL.
fn to(receiver: &Receiver) -> NotifyOptions {
    NotifyOptions {
        urls: vec![receiver.url()],
        events: vec![Event::TargetSettled, Event::InvocationSettled],
        ..NotifyOptions::default()
    }
}

#[track_caller]
fn counted(metrics: &Metrics, via: &str, outcome: &str, count: u64) {
    let line = format!("outhaul_notifications_total{{via=\"{via}\",outcome=\"{outcome}\"}} {count}\n");
    let text = metrics.render();
    assert!(text.contains(&line), "{line} is missing in\n{text}");
}

fn subjects(got: &[Got]) -> Vec<String> {
    got.iter().map(Got::subject).collect()
}

#[tokio::test]
async fn documents_come_in_order_with_their_headers_and_a_signature() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("secret");
    std::fs::write(&path, "hush\n").unwrap();
    let secret = Secret::read(&path).unwrap();
    let receiver = Receiver::start(&[]).await;
    let world = World::new(NotifyOptions {
        secret: Some(secret.clone()),
        ..to(&receiver)
    });
    world.notify(Change::Begun {
        workspace: "/ws".to_owned(),
        command: "build".to_owned(),
    });
    let labels: Vec<String> = (0..20).map(|n| format!("//a:{n}")).collect();
    for label in &labels {
        world.target(label);
    }
    world.settled();
    let metrics = world.close().await;

    let got = receiver.got(21).await;
    assert_eq!(subjects(&got[..20]), labels);
    for (number, got) in got.iter().enumerate() {
        let event = if number < 20 {
            "target_settled"
        } else {
            "invocation_settled"
        };
        assert_eq!(got.header("content-type"), "application/json");
        assert_eq!(got.header("x-outhaul-event"), event);
        assert_eq!(got.header("x-outhaul-signature-256"), secret.sign(&got.body));
        // "user:hush"
        assert_eq!(got.header("authorization"), "Basic dXNlcjpodXNo");
        assert_eq!(got.json()["event"], event);
        assert_eq!(got.json()["workspace"], "/ws");
    }
    counted(&metrics, "url", "sent", 21);
}

#[tokio::test]
async fn what_may_pass_is_tried_again_with_the_same_delivery_id_and_before_what_comes_after() {
    let receiver = Receiver::start(&[(503, None), (429, Some("0")), (408, None)]).await;
    let world = World::new(to(&receiver));
    world.target("//a");
    world.target("//b");
    let got = receiver.got(5).await;
    assert_eq!(subjects(&got), ["//a", "//a", "//a", "//a", "//b"]);
    let ids: Vec<&str> = got.iter().map(|g| g.header("x-outhaul-delivery")).collect();
    assert!(
        ids[..4].iter().all(|id| *id == ids[0]) && ids[4] != ids[0],
        "{ids:?}"
    );
    counted(&world.close().await, "url", "sent", 2);
}

#[tokio::test]
async fn a_receiver_that_comes_up_late_gets_everything() {
    // A port on which no process listens.
    let address = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    };
    let late = Receiver {
        address,
        answers: Arc::default(),
        got: watch::Sender::default(),
        open: watch::Sender::new(true),
    };
    let patience = Patience {
        tries: 10_000,
        ..hasty()
    };
    let world = World::with(to(&late), 1000, patience);
    world.target("//a");
    world.target("//b");
    tokio::time::sleep(Duration::from_millis(50)).await;
    let listener = TcpListener::bind(address).await.unwrap();
    let app = Router::new().fallback(answer).with_state(late.clone());
    tokio::spawn(async move { axum::serve(listener, app).await });
    assert_eq!(subjects(&late.got(2).await), ["//a", "//b"]);
    counted(&world.close().await, "url", "sent", 2);
}

#[tokio::test]
async fn what_is_refused_is_not_tried_again_and_holds_up_nothing() {
    let receiver = Receiver::start(&[(400, None), (302, None)]).await;
    let world = World::new(to(&receiver));
    for label in ["//a", "//b", "//c"] {
        world.target(label);
    }
    assert_eq!(subjects(&receiver.got(3).await), ["//a", "//b", "//c"]);
    let metrics = world.close().await;
    counted(&metrics, "url", "failed", 2);
    counted(&metrics, "url", "sent", 1);
}

#[tokio::test]
async fn an_answer_whose_body_never_ends_is_an_answer() {
    let receiver = Receiver::start(&[]).await;
    // Another port for the same receiver.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endless = Receiver {
        address: listener.local_addr().unwrap(),
        ..receiver
    };
    let answer = async |State(receiver): State<Receiver>, headers: HeaderMap, body: bytes::Bytes| {
        let _ = answer(State(receiver), headers, body).await;
        let never = futures::stream::pending::<io::Result<bytes::Bytes>>();
        axum::body::Body::from_stream(never)
    };
    let app = Router::new().fallback(answer).with_state(endless.clone());
    tokio::spawn(async move { axum::serve(listener, app).await });
    let patience = Patience {
        deadline: Duration::from_secs(3),
        ..hasty()
    };
    let world = World::with(to(&endless), 1000, patience);
    world.target("//a");
    world.target("//b");
    assert_eq!(subjects(&endless.got(2).await), ["//a", "//b"]);
    world.target("//c");
    assert_eq!(subjects(&endless.got(3).await), ["//a", "//b", "//c"]);
    let backlog = world.notifier.backlog();
    timeout(PATIENCE, async {
        while !backlog.is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("all is delivered");
}

#[tokio::test]
async fn patience_ends_after_eight_tries() {
    let receiver = Receiver::start(&[(500, None); 8]).await;
    let world = World::new(to(&receiver));
    world.target("//a");
    world.target("//b");
    let got = receiver.got(9).await;
    assert_eq!(subjects(&got[7..]), ["//a", "//b"]);
    let metrics = world.close().await;
    counted(&metrics, "url", "failed", 1);
    counted(&metrics, "url", "sent", 1);
}

#[tokio::test]
async fn a_receiver_that_hangs_delays_no_other_and_loses_its_oldest() {
    let hanging = Receiver::start(&[]).await;
    hanging.open.send_replace(false);
    let well = Receiver::start(&[]).await;
    let world = World::with(
        NotifyOptions {
            urls: vec![hanging.url(), well.url()],
            ..to(&well)
        },
        3,
        hasty(),
    );
    world.target("//0");
    // The first is under way; there is room for three of the next.
    hanging.got(1).await;
    for number in 1..=5 {
        world.target(&format!("//{number}"));
        well.got(number + 1).await;
    }
    hanging.open.send_replace(true);
    let got = hanging.got(4).await;
    assert_eq!(subjects(&got), ["//0", "//3", "//4", "//5"]);
    let metrics = world.close().await;
    counted(&metrics, "url", "dropped", 2);
    counted(&metrics, "url", "sent", 10);
}

/// On one thread: the notifier does not run before all changes are sent.
#[tokio::test]
async fn a_burst_within_the_bound_is_delivered_whole() {
    let receiver = Receiver::start(&[]).await;
    let world = World::with(to(&receiver), 10_000, hasty());
    let labels: Vec<String> = (0..5000).map(|n| format!("//a:{n}")).collect();
    for label in &labels {
        world.target(label);
    }
    assert_eq!(subjects(&receiver.got(5000).await), labels);
    let metrics = world.close().await;
    counted(&metrics, "url", "sent", 5000);
}

#[tokio::test]
async fn closing_waits_only_so_long_and_counts_what_is_lost() {
    let hanging = Receiver::start(&[]).await;
    hanging.open.send_replace(false);
    let world = World::new(to(&hanging));
    for label in ["//a", "//b", "//c"] {
        world.target(label);
    }
    hanging.got(1).await;
    assert!(!world.notifier.backlog().is_empty());
    counted(&world.close().await, "url", "dropped", 3);
}

#[tokio::test]
async fn only_what_is_asked_for_is_sent_also_to_the_command() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("told");
    let receiver = Receiver::start(&[]).await;
    let world = World::new(NotifyOptions {
        events: vec![Event::InvocationSettled],
        hook: Some(Hook {
            command: format!("cat >> '{}'; exit 1", file.display()),
            timeout: PATIENCE,
        }),
        ..to(&receiver)
    });
    world.target("//a");
    world.settled();
    assert_eq!(subjects(&receiver.got(1).await), ["invocation"]);
    // Long enough for the shell: closing alone gives it half a second.
    timeout(PATIENCE, async {
        while !world.metrics.render().contains("via=\"command\"") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("the command ends");
    counted(&world.close().await, "command", "failed", 1);
    let reported = std::fs::read_to_string(file).unwrap();
    let reported: Value = serde_json::from_str(reported.trim_end()).unwrap();
    assert_eq!(reported["event"], "invocation_settled");
}

/// A log in memory.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// On one thread, whose log is read.
#[tokio::test]
async fn the_log_names_the_receiver_and_none_of_its_secrets() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(move || writer.clone())
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let receiver = Receiver::start(&[(500, None), (404, None)]).await;
    let world = World::new(to(&receiver));
    world.target("//a");
    receiver.got(2).await;
    // No process listens there.
    let gone = World::with(
        NotifyOptions {
            urls: vec!["http://user:hush@127.0.0.1:1/hush?hush".parse().unwrap()],
            ..to(&receiver)
        },
        10,
        hasty(),
    );
    gone.target("//a");
    counted(&world.close().await, "url", "failed", 1);
    gone.close().await;
    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let origin = format!("http://{}", receiver.address);
    assert!(log.contains(&origin) && log.contains("404"), "{log}");
    assert!(!log.contains("hush"), "{log}");
}

#[tokio::test]
async fn https_is_spoken_and_certificates_are_checked() {
    let signed = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(signed.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![signed.cert.der().clone()], key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
                let Ok(mut stream) = acceptor.accept(stream).await else {
                    return;
                };
                let mut text = Vec::new();
                while !text.ends_with(b"{}") && stream.read_buf(&mut text).await.is_ok_and(|n| n > 0) {}
                let _ = stream
                    .write_all(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n")
                    .await;
                let _ = stream.shutdown().await;
            });
        }
    });
    let document = Document {
        event: Event::TargetSettled,
        invocation_id: "i".to_owned(),
        delivery: "d".to_owned(),
        body: "{}".into(),
    };
    let url = || -> NotifyUrl { format!("https://localhost:{port}/x").parse().unwrap() };
    let post = async |roots| {
        let tls = https::trusting(roots).unwrap().with_no_client_auth();
        let poster = Poster::with_client(url(), None, https::client(tls));
        timeout(PATIENCE, poster.post(&document, PATIENCE)).await.unwrap()
    };
    let mut roots = rustls::RootCertStore::empty();
    let Answer::Later { reason, .. } = post(roots.clone()).await else {
        panic!("an unknown certificate was accepted");
    };
    assert!(reason.contains("certificate"), "{reason}");
    roots.add(signed.cert.der().clone()).unwrap();
    assert_eq!(post(roots).await, Answer::Taken);
}
