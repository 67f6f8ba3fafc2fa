//! The coordinator against a real output tree and the embedded cache, whose faults real servers don't produce on
//! demand.

mod checking;
mod faults;
mod nearby;
mod space;

use std::{
    fs,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use outhaul_testkit::{
    cache::{BlobFault, EmbeddedCache, RequestFault, Rpc, RunningCache, Times},
    until,
};
use tokio::{sync::mpsc, time::timeout};

use super::{place::Epoch, place::OutputRoot, *};
use crate::{
    digest::Digest,
    exec_path::ExecPath,
    metrics::Metrics,
    output::{Class, OutputContent},
    remote::{Attribution, GrpcCache, RemoteOptions},
    transport::Endpoint,
};

/// An output root, a cache and a coordinator.
struct Fixture {
    dir: tempfile::TempDir,
    cache: RunningCache,
    store: Arc<GrpcCache>,
    root: Arc<Root>,
    materializer: Materializer,
}

/// One asker.
struct Asker {
    session: Arc<Session>,
    completions: mpsc::UnboundedReceiver<Vec<Completion>>,
}

impl Fixture {
    async fn new() -> Self {
        Self::with(MaterializeOptions::default()).await
    }

    async fn with(options: MaterializeOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("execroot/_main/bazel-out")).unwrap();
        let cache = EmbeddedCache::builder().start().await.unwrap();
        let endpoint = Endpoint::parse("--remote-cache", &cache.endpoint()).unwrap();
        let store = Arc::new(GrpcCache::new(RemoteOptions::new(endpoint)).unwrap());
        let place = OutputRoot::open(&dir.path().join("execroot/_main"), false).unwrap();
        let root = Arc::new(Root {
            id: 1,
            place: Arc::new(place),
            epoch: Epoch::new(),
        });
        let materializer = Materializer::start(options, Metrics::default()).unwrap();
        Self {
            dir,
            cache,
            store,
            root,
            materializer,
        }
    }

    fn asker(&self, version: u64) -> Asker {
        let (sender, completions) = mpsc::unbounded_channel();
        let session = Arc::new(Session {
            root: self.root.clone(),
            version,
            store: self.store.clone(),
            attribution: Arc::new(Attribution::default()),
            trace: None,
            served: None,
            completions: sender,
        });
        Asker { session, completions }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("execroot/_main/bazel-out").join(name)
    }

    async fn want(&self, asker: &Asker, class: Class, wants: &[(&str, &Digest)]) {
        let wants = wants
            .iter()
            .map(|(name, digest)| Want::new(exec(name), OutputContent::Blob((*digest).clone()), class, None))
            .collect();
        self.materializer.want(&asker.session, wants).await;
    }
}

impl Asker {
    /// The next `n` ends, by path.
    async fn ends(&mut self, n: usize) -> Vec<(String, Outcome)> {
        let mut ends = Vec::new();
        while ends.len() < n {
            let list = timeout(Duration::from_secs(120), self.completions.recv());
            for completion in list.await.expect("an answer in time").expect("an answer") {
                ends.push((completion.path.to_string(), completion.outcome));
            }
        }
        assert_eq!(ends.len(), n, "{ends:?}");
        ends.sort_by(|a, b| a.0.cmp(&b.0));
        ends
    }

    async fn end(&mut self) -> Outcome {
        self.ends(1).await.remove(0).1
    }
}

fn exec(name: &str) -> ExecPath {
    ExecPath::new(&format!("bazel-out/{name}")).unwrap()
}

fn is_from(outcome: &Outcome, expected: Source) -> bool {
    matches!(outcome, Outcome::Downloaded { source, .. } if *source == expected)
}

#[tokio::test]
async fn one_blob_is_fetched_once_however_many_outputs_have_it() {
    let f = Fixture::new().await;
    let digest = f.cache.store().put("same bytes");
    let mut asker = f.asker(1);
    f.want(
        &asker,
        Class::Required,
        &[("a/x", &digest), ("a/y", &digest), ("b/z", &digest)],
    )
    .await;
    for (path, outcome) in asker.ends(3).await {
        assert!(is_from(&outcome, Source::Batch), "{path}: {outcome:?}");
    }
    for name in ["a/x", "a/y", "b/z"] {
        assert_eq!(fs::read(f.path(name)).unwrap(), b"same bytes");
    }
    assert_eq!(f.cache.stats().batch_read_blobs, 1);
}

#[tokio::test]
async fn writers_without_work_let_go_of_the_output_tree() {
    let f = Fixture::new().await;
    let digest = f.cache.store().put("bytes");
    let mut asker = f.asker(1);
    f.want(&asker, Class::Required, &[("a/x", &digest)]).await;
    assert!(asker.end().await.is_on_disk());
    assert!(Arc::strong_count(&f.root.place) > 1);
    until("the last descriptor's end", async || {
        Arc::strong_count(&f.root.place) == 1
    })
    .await;
    // They take it up again.
    f.want(&asker, Class::Required, &[("a/y", &digest)]).await;
    assert!(asker.end().await.is_on_disk());
}

#[tokio::test]
async fn what_is_there_is_not_fetched() {
    let f = Fixture::new().await;
    let digest = f.cache.store().put("bytes");
    fs::write(f.path("x"), "bytes").unwrap();
    let mut asker = f.asker(1);
    f.want(&asker, Class::Required, &[("x", &digest)]).await;
    assert!(matches!(asker.end().await, Outcome::Present { hashed: true, .. }));
    assert_eq!(f.cache.stats().batch_reads, 0);
}

#[tokio::test]
async fn with_a_limit_small_and_large_blobs_take_their_time() {
    let f = Fixture::with(MaterializeOptions {
        rate: Some(4 << 20),
        ..MaterializeOptions::default()
    })
    .await;
    let mut asker = f.asker(1);
    let large = f.cache.store().put(vec![7; 3 << 20]);
    let begun = Instant::now();
    f.want(&asker, Class::Required, &[("large", &large)]).await;
    assert!(is_from(&asker.end().await, Source::Stream));
    // The last portion waits for those before it.
    let least = Duration::from_millis(600);
    assert!(begun.elapsed() >= least, "{:?}", begun.elapsed());
    let small: Vec<Digest> = (0..2).map(|n| f.cache.store().put(vec![n; 1 << 20])).collect();
    for digest in &small {
        let name = digest.hash_hex();
        f.want(&asker, Class::Required, &[(&name, digest)]).await;
        assert!(is_from(&asker.end().await, Source::Batch));
    }
    let least = Duration::from_millis(1000);
    assert!(begun.elapsed() >= least, "{:?}", begun.elapsed());
    assert_eq!(fs::read(f.path("large")).unwrap(), vec![7; 3 << 20]);
}

#[tokio::test]
async fn every_kind_of_output_is_made() {
    let f = Fixture::new().await;
    let mut asker = f.asker(1);
    let empty = Digest::of(crate::digest::DigestFunction::Sha256, b"");
    let wants = [
        ("empty", OutputContent::Blob(empty)),
        ("inline", OutputContent::Inline("inline".into())),
        ("link", OutputContent::Symlink("../elsewhere".to_owned())),
        ("tree.d", OutputContent::Directory),
    ];
    let wants = wants
        .into_iter()
        .map(|(name, content)| Want::new(exec(name), content, Class::Required, None))
        .collect();
    f.materializer.want(&asker.session, wants).await;
    for (path, outcome) in asker.ends(4).await {
        assert!(is_from(&outcome, Source::Inline), "{path}: {outcome:?}");
    }
    assert_eq!(fs::read(f.path("empty")).unwrap(), b"");
    assert_eq!(fs::read(f.path("inline")).unwrap(), b"inline");
    assert_eq!(
        fs::read_link(f.path("link")).unwrap(),
        PathBuf::from("../elsewhere")
    );
    assert!(f.path("tree.d").is_dir());
    assert_eq!(
        f.cache.stats().batch_reads,
        0,
        "the empty blob is never asked for"
    );
}

#[tokio::test]
async fn wrong_bytes_are_asked_for_once_more_and_never_placed() {
    for size in [10, 3 << 20] {
        let f = Fixture::new().await;
        let once = f.cache.store().put(vec![1; size]);
        let always = f.cache.store().put(vec![2; size]);
        f.cache.faults().blob(&once, BlobFault::Corrupt, Times::Once);
        f.cache.faults().blob(&always, BlobFault::Corrupt, Times::Always);
        let mut asker = f.asker(1);
        f.want(&asker, Class::Required, &[("always", &always), ("once", &once)])
            .await;
        let ends = asker.ends(2).await;
        assert!(
            // Lost, so that Bazel builds it where it can.
            matches!(&ends[0].1, Outcome::Unavailable(reason) if reason.contains(&always.hash_hex())),
            "{size}: {ends:?}"
        );
        assert!(
            matches!(ends[1].1, Outcome::Downloaded { .. }),
            "{size}: {ends:?}"
        );
        assert!(!f.path("always").exists());
        assert_eq!(fs::read(f.path("once")).unwrap(), vec![1; size]);
    }
}

#[tokio::test]
async fn a_missing_blob_is_evicted_unless_the_disk_has_it_by_then() {
    let f = Fixture::new().await;
    let gone = Digest::of(crate::digest::DigestFunction::Sha256, b"never uploaded");
    let mut asker = f.asker(1);
    f.want(&asker, Class::Required, &[("gone", &gone)]).await;
    assert!(matches!(asker.end().await, Outcome::Evicted(reason) if reason.contains(&gone.hash_hex())));
    assert!(!f.path("gone").exists());

    // The cache takes its time to say no; meanwhile the build tool writes the file itself.
    f.cache.faults().request(
        Rpc::BatchRead,
        RequestFault::Delay(Duration::from_millis(300)),
        Times::Once,
    );
    f.want(&asker, Class::Required, &[("local", &gone)]).await;
    until("the request", async || f.cache.faults().fired() > 0).await;
    fs::write(f.path("local"), "never uploaded").unwrap();
    assert!(matches!(asker.end().await, Outcome::Present { .. }));
}

#[tokio::test]
async fn a_newer_version_ends_what_an_older_one_wanted() {
    for size in [10, 3 << 20] {
        let f = Fixture::new().await;
        let old = f.cache.store().put(vec![b'o'; size]);
        let new = f.cache.store().put(vec![b'n'; size]);
        f.root.epoch.begin(1);
        let mut first = f.asker(1);
        let stall = RequestFault::Delay(Duration::from_millis(700));
        f.cache.faults().every_request(stall, Times::First(1));
        f.want(&first, Class::Required, &[("x", &old)]).await;
        until("the request", async || f.cache.faults().fired() > 0).await;
        f.materializer.begin(&f.root, 2).await;
        assert_eq!(first.end().await, Outcome::Superseded);
        let mut second = f.asker(2);
        f.want(&second, Class::Required, &[("x", &new)]).await;
        assert!(matches!(second.end().await, Outcome::Downloaded { .. }));
        // What the old one still wants now is refused at once.
        f.want(&first, Class::Required, &[("y", &old)]).await;
        assert_eq!(first.end().await, Outcome::Superseded);
        // Its bytes, if they come at all, come to nothing.
        tokio::time::sleep(Duration::from_millis(900)).await;
        assert_eq!(fs::read(f.path("x")).unwrap(), vec![b'n'; size]);
        assert!(!f.path("y").exists());
    }
}

#[tokio::test]
async fn required_goes_before_optional_and_a_waiting_blob_moves_up() {
    let options = MaterializeOptions {
        batches_in_flight: 1,
        batch_count: 1,
        ..MaterializeOptions::default()
    };
    let f = Fixture::with(options).await;
    let blobs: Vec<Digest> = (0..4).map(|n| f.cache.store().put(format!("blob {n}"))).collect();
    let mut asker = f.asker(1);
    f.cache.faults().request(
        Rpc::BatchRead,
        RequestFault::Delay(Duration::from_millis(300)),
        Times::Once,
    );
    f.want(
        &asker,
        Class::Optional,
        &[("first", &blobs[0]), ("second", &blobs[1]), ("third", &blobs[2])],
    )
    .await;
    until("the request", async || f.cache.faults().fired() > 0).await;
    f.want(
        &asker,
        Class::Required,
        &[("urgent", &blobs[3]), ("third", &blobs[2])],
    )
    .await;
    let mut order = Vec::new();
    while order.len() < 5 {
        let list = timeout(Duration::from_secs(120), asker.completions.recv())
            .await
            .unwrap()
            .unwrap();
        order.extend(list.into_iter().map(|c| c.path.file_name().to_owned()));
    }
    // "third" has two askers by then and is answered to both. Which of it and "urgent", whose place on disk is looked at
    // first, is fetched before the other, does not matter.
    assert_eq!(order.first().map(String::as_str), Some("first"));
    assert_eq!(order.last().map(String::as_str), Some("second"));
    order.sort();
    assert_eq!(order, ["first", "second", "third", "third", "urgent"]);
}

#[tokio::test]
async fn what_is_paused_waits_until_it_is_resumed_or_nobody_can_do_that() {
    let f = Fixture::new().await;
    let large = f.cache.store().put(vec![7; 3 << 20]);
    let small = f.cache.store().put("small");
    let pausing = f.materializer.pausing().clone();
    let pause = |all| pausing.pause(Pause { all, until: None });
    let mut asker = f.asker(1);
    pause(false);
    f.want(&asker, Class::Optional, &[("large", &large), ("small", &small)])
        .await;
    f.want(&asker, Class::Required, &[("now", &f.cache.store().put("now"))])
        .await;
    assert_eq!(asker.ends(1).await[0].0, "bazel-out/now");
    pause(true);
    // The coordinator has heard of it by the end of this.
    f.materializer.begin(&f.root, 1).await;
    f.want(&asker, Class::Required, &[("small", &small)]).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(asker.completions.try_recv().is_err());
    pause(false);
    let ends = asker.ends(2).await;
    assert!(ends.iter().all(|(path, _)| path == "bazel-out/small"), "{ends:?}");
    pausing.resume();
    assert_eq!(asker.ends(1).await[0].0, "bazel-out/large");
    pause(true);
    f.want(&asker, Class::Required, &[("last", &f.cache.store().put("last"))])
        .await;
    drop(pausing);
    f.materializer.close().await;
    assert_eq!(asker.ends(1).await[0].0, "bazel-out/last");
}

#[tokio::test]
async fn a_large_blob_is_streamed_once_and_copied_for_the_rest() {
    let f = Fixture::new().await;
    let bytes = vec![7; 5 << 20];
    let digest = f.cache.store().put(bytes.clone());
    let mut asker = f.asker(1);
    f.want(&asker, Class::Required, &[("a/big", &digest), ("b/big", &digest)])
        .await;
    let ends = asker.ends(2).await;
    let sources: Vec<bool> = [Source::Stream, Source::Copy]
        .into_iter()
        .map(|source| ends.iter().any(|(_, outcome)| is_from(outcome, source)))
        .collect();
    assert_eq!(sources, [true, true], "{ends:?}");
    assert_eq!(f.cache.stats().stream_reads, 1);
    for name in ["a/big", "b/big"] {
        assert_eq!(fs::read(f.path(name)).unwrap(), bytes);
    }
}

#[tokio::test]
async fn one_output_that_cannot_be_placed_does_not_harm_the_others() {
    let f = Fixture::new().await;
    for size in [10, 3 << 20] {
        let digest = f.cache.store().put(vec![3; size]);
        let (blocked, free) = (format!("blocked{size}"), format!("free{size}"));
        fs::create_dir_all(f.path(&blocked).join("full")).unwrap();
        fs::write(f.path(&blocked).join("full/file"), "of the user's").unwrap();
        let mut asker = f.asker(1);
        f.want(&asker, Class::Required, &[(&blocked, &digest), (&free, &digest)])
            .await;
        let ends = asker.ends(2).await;
        assert!(
            matches!(&ends[0].1, Outcome::Failed(reason) if reason.contains(&blocked)),
            "{ends:?}"
        );
        assert!(matches!(ends[1].1, Outcome::Downloaded { .. }), "{ends:?}");
        assert_eq!(
            fs::read(f.path(&blocked).join("full/file")).unwrap(),
            b"of the user's"
        );
    }
}

#[tokio::test]
async fn more_bytes_than_may_be_in_flight_all_arrive() {
    let options = MaterializeOptions {
        bytes_in_flight: 1 << 20,
        batch_bytes: 256 << 10,
        large_in_flight: 1,
        ..MaterializeOptions::default()
    };
    let f = Fixture::with(options).await;
    let blobs: Vec<(String, Digest)> = (0..60)
        .map(|n| {
            (
                format!("d{}/f{n}", n % 7),
                f.cache.store().put(vec![n; 100_000 + usize::from(n)]),
            )
        })
        .collect();
    let mut asker = f.asker(1);
    let wants: Vec<(&str, &Digest)> = blobs
        .iter()
        .map(|(name, digest)| (name.as_str(), digest))
        .collect();
    f.want(&asker, Class::Required, &wants).await;
    for (path, outcome) in asker.ends(60).await {
        assert!(outcome.is_on_disk(), "{path}: {outcome:?}");
    }
    for (n, (name, _)) in blobs.iter().enumerate() {
        assert_eq!(fs::metadata(f.path(name)).unwrap().len(), 100_000 + n as u64);
    }
}
