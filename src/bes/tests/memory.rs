//! What clients make us hold is counted before it is held, and comes back.

use bytes::Bytes;
use http_body::Frame;
use http_body_util::StreamBody;
use outhaul_testkit::until;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Status, body::Body, transport::Channel};
use tower::ServiceExt as _;

use super::harness::{Daemon, Seen, Upload, options};
use crate::bes::{BesOptions, HoldMode, limits::BesLimits};

const QUEUE: usize = 4 << 20;

fn limited(change: impl FnOnce(&mut BesLimits)) -> BesOptions {
    let mut options = options(HoldMode::None);
    options.limits.queue = QUEUE;
    change(&mut options.limits);
    options
}

/// A call whose message is announced, begun and left there; it ends when this is dropped.
struct Unfinished {
    _rest: mpsc::UnboundedSender<Result<Frame<Bytes>, Status>>,
    call: tokio::task::JoinHandle<()>,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        self.call.abort();
    }
}

async fn channel(daemon: &Daemon) -> Channel {
    Channel::from_shared(format!("http://{}", daemon.address))
        .unwrap()
        .connect()
        .await
        .unwrap()
}

fn begin(channel: &Channel, method: &str, encoding: Option<&str>, length: u32, sent: usize) -> Unfinished {
    let (rest, frames) = mpsc::unbounded_channel();
    let mut bytes = vec![u8::from(encoding.is_some())];
    bytes.extend(length.to_be_bytes());
    bytes.resize(bytes.len() + sent, 0);
    rest.send(Ok(Frame::data(bytes.into()))).unwrap();
    let mut request = http::Request::post(format!("/google.devtools.build.v1.PublishBuildEvent/{method}"))
        .header("content-type", "application/grpc");
    if let Some(encoding) = encoding {
        request = request.header("grpc-encoding", encoding);
    }
    let body = Body::new(StreamBody::new(UnboundedReceiverStream::new(frames)));
    let request = request.body(body).unwrap();
    let call = channel.clone().oneshot(request);
    Unfinished {
        _rest: rest,
        call: tokio::spawn(async move {
            if let Ok(answer) = call.await {
                // The answers of a stream come for as long as it is open.
                let _ = http_body_util::BodyExt::collect(answer.into_body()).await;
            }
        }),
    }
}

async fn serves_others(daemon: &Daemon, name: &str) {
    let mut upload = Upload::open(daemon, name).await;
    upload.send_all(1..=3);
    upload.finish(4);
    upload.acked(1..=4).await;
    upload.closed().await;
}

#[tokio::test]
async fn unfinished_messages_are_counted_as_they_are_announced_and_hold_nobody_back() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(limited(|_| {}), Some(dir.path())).await;
    let budget = daemon.service.budget();
    let channel = channel(&daemon).await;
    for method in ["PublishBuildToolEventStream", "PublishLifecycleEvent"] {
        let unfinished: Vec<_> = (0..30)
            .map(|_| begin(&channel, method, None, 1 << 20, 100))
            .collect();
        // Of the half that is for large ones.
        until("counted", async || budget.taken() > 1 << 20).await;
        serves_others(&daemon, &format!("beside {method}")).await;
        assert!(budget.taken() <= QUEUE / 2 + 4096, "{}", budget.taken());
        drop(unfinished);
        until("given back", async || budget.taken() == 0).await;
    }
    daemon.stop().await;
}

#[tokio::test]
async fn what_is_begun_at_random_stays_within_the_budget_and_comes_back() {
    let seed = std::env::var("OUTHAUL_HOSTILE_SEED")
        .ok()
        .and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or_else(rand::random);
    eprintln!("OUTHAUL_HOSTILE_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(limited(|l| l.message = 16 << 20), Some(dir.path())).await;
    let budget = daemon.service.budget();
    for round in 0..10 {
        let channel = channel(&daemon).await;
        let mut unfinished = Vec::new();
        for _ in 0..random.random_range(1..40) {
            let method = ["PublishBuildToolEventStream", "PublishLifecycleEvent"][random.random_range(0..2)];
            let encoding = [None, None, Some("gzip"), Some("zstd"), Some("none")][random.random_range(0..5)];
            let length = match random.random_range(0..4) {
                0 => random.random_range(0..1000),
                1 => random.random_range(0..64 << 10),
                2 => random.random_range(0..32 << 20),
                _ => random.random(),
            };
            let sent = random.random_range(0..20_000).min(length as usize);
            unfinished.push(begin(&channel, method, encoding, length, sent));
            assert!(budget.taken() <= QUEUE, "{}", budget.taken());
        }
        serves_others(&daemon, &format!("round {round}")).await;
        assert!(budget.taken() <= QUEUE, "{}", budget.taken());
        drop(unfinished);
        until("given back", async || budget.taken() == 0).await;
    }
    daemon.stop().await;
}

#[tokio::test]
async fn a_message_keeps_its_room_until_the_engine_or_the_journal_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::gated(limited(|_| {}), Some(dir.path())).await;
    let budget = daemon.service.budget();
    let mut upload = Upload::open(&daemon, "one").await;
    upload.send(1, vec![b'1'; 50 << 10]);
    upload.acked([1]).await;
    assert!(
        budget.taken() > 50 << 10,
        "it waits in memory: {}",
        budget.taken()
    );
    // Larger than all that is for large ones: it waits on the disk, and is counted again when it is read back.
    upload.send(2, vec![b'2'; 6 << 20]);
    upload.acked([2]).await;
    until("journalled", async || budget.taken() < 100 << 10).await;
    daemon.engine.gate.close();
    upload.finish(3);
    upload.acked([3]).await;
    let both = |seen: &[Seen]| seen.iter().filter(|s| matches!(s, Seen::Event(..))).count() == 2;
    daemon.engine.until("delivered both", both).await;
    until("given back", async || budget.taken() == 0).await;
    daemon.stop().await;
}

#[tokio::test]
async fn a_build_whose_journal_is_full_goes_on_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let most = 100 << 10;
    let daemon = Daemon::start(limited(|l| l.journal = most), Some(dir.path())).await;
    let mut random = StdRng::seed_from_u64(1);
    let mut upload = Upload::open(&daemon, "one").await;
    for n in 1..=20 {
        // Nothing that could be compressed.
        let mut bytes = n.to_string().into_bytes();
        bytes.push(0);
        bytes.extend((0..20_000).map(|_| random.random::<u8>()));
        upload.send(n, bytes);
        upload.acked([n]).await;
    }
    upload.finish(21);
    upload.acked([21]).await;
    upload.closed().await;
    let ended = |seen: &[Seen]| seen.iter().any(|s| matches!(s, Seen::Ended(..)));
    daemon.engine.until("ended", ended).await;
    let seen = daemon.engine.seen();
    let limits: Vec<_> = seen
        .iter()
        .filter_map(|s| match s {
            Seen::Limited(_, reason) => Some(reason),
            _ => None,
        })
        .collect();
    assert!(
        limits.len() == 1 && limits[0].contains("--limit=journal-size="),
        "{limits:?}"
    );
    assert_eq!(
        daemon.engine.numbers().len(),
        20,
        "what is not kept is still passed on"
    );
    assert_eq!(daemon.service.counters().journal_failures, 1);
    let files = std::fs::read_dir(dir.path()).unwrap();
    let sizes = files.map(|file| file.unwrap().metadata().unwrap());
    let largest = sizes
        .filter(std::fs::Metadata::is_file)
        .map(|file| file.len())
        .max();
    assert!(
        largest.unwrap() <= most && largest.unwrap() > most / 2,
        "{largest:?}"
    );
    // The next one has a journal of its own.
    serves_others(&daemon, "two").await;
    assert_eq!(daemon.service.counters().journal_failures, 1);
    until("given back", async || daemon.service.budget().taken() == 0).await;
    daemon.stop().await;
}
