//! Leases with the embedded cache and a real record.

use std::{path::Path, sync::Arc, time::Duration};

use outhaul_testkit::{
    PATIENCE,
    cache::{EmbeddedCache, RequestFault, Rpc, RunningCache, Times},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{keep::caught, lost::Lost, *};
use crate::{
    digest::{Digest, DigestFunction},
    exec_path::ExecPath,
    metrics::Metrics,
    output::OutputContent,
    record::{InvocationRow, InvocationState, OutputRow, OutputState, Record, RootId},
    remote::{GrpcCache, RemoteOptions},
    roots::{RootRules, Roots},
    sources::{SourceRule, Sources},
    transport::Endpoint,
    units::now_ms,
};

pub(super) struct Fixture {
    dir: tempfile::TempDir,
    pub(super) cache: RunningCache,
    pub(super) context: LeaseContext,
    pub(super) root: RootId,
}

impl Fixture {
    pub(super) async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let exec_root = dir.path().join("execroot/_main");
        std::fs::create_dir_all(exec_root.join("bazel-out")).unwrap();
        let cache = EmbeddedCache::builder().start().await.unwrap();
        let endpoint = Endpoint::parse("--remote-cache", &cache.endpoint()).unwrap();
        let mut options = RemoteOptions::new(endpoint);
        options.retries = 0;
        let store = GrpcCache::new(options).unwrap();
        let (record, _) = Record::open(&dir.path().join("state")).unwrap();
        let context = LeaseContext {
            roots: Arc::new(Roots::new(RootRules::default(), record.clone())),
            sources: Arc::new(Sources::new(SourceRule::Fixed(store.into()))),
            metrics: Metrics::default(),
            record,
        };
        let (root, _) = context.roots.open(exec_root.to_str().unwrap()).unwrap();
        let this = Self {
            dir,
            cache,
            context,
            root,
        };
        this.build("first");
        this
    }

    /// A build that is settled just now is the root's newest.
    pub(super) fn build(&self, id: &str) {
        self.context.record.put_invocation(&InvocationRow {
            invocation_id: id.to_owned(),
            root: Some(self.root),
            version: self.context.record.next_version(self.root),
            state: InvocationState::Settled,
            started_ms: now_ms(),
            settled_ms: now_ms(),
            ..InvocationRow::default()
        });
    }

    /// Blobs of the cache as outputs of a target, on record and nowhere else.
    pub(super) fn outputs(&self, target: &str, count: usize) -> Vec<(ExecPath, Digest)> {
        let outputs: Vec<(ExecPath, Digest)> = (0..count)
            .map(|n| {
                let path = ExecPath::new(&format!("bazel-out/{target}/{n}")).unwrap();
                (path, self.cache.store().put(format!("{target} {n}")))
            })
            .collect();
        let rows = outputs.iter().map(|(path, digest)| {
            let mut row = OutputRow::known(OutputContent::Blob(digest.clone()));
            row.label = format!("//:{target}").into();
            (path.clone(), row)
        });
        self.context.record.put_outputs(self.root, rows.collect());
        outputs
    }

    pub(super) fn state(&self, path: &ExecPath) -> OutputState {
        self.context.record.output(self.root, path).unwrap().state
    }

    fn file(&self, path: &ExecPath) -> std::path::PathBuf {
        let file = self.dir.path().join("execroot/_main").join(path.as_path());
        std::fs::create_dir_all(file.parent().unwrap_or(Path::new("/"))).unwrap();
        file
    }

    /// Keeps leases until the handle is dropped.
    fn keep(&self, interval: Duration) -> (LostOutputs, AbortOnDropHandle<()>) {
        let lost_outputs = LostOutputs::default();
        let options = LeaseOptions {
            interval,
            age: Duration::from_secs(3600),
            rate: 1_000_000,
        };
        let keeping = keep(
            self.context.clone(),
            options,
            lost_outputs.clone(),
            CancellationToken::new(),
        );
        (lost_outputs, AbortOnDropHandle::new(tokio::spawn(keeping)))
    }

    async fn lost(&self, lost_outputs: &LostOutputs, outputs: u64) -> Lost {
        let looking = async {
            loop {
                let newest = self.context.record.newest_invocation(self.root).unwrap();
                if let Some(lost) = lost_outputs.lost(self.root, &newest.invocation_id)
                    && lost.outputs == outputs
                {
                    return lost;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, looking).await.expect("in time")
    }
}

const OFTEN: Duration = Duration::from_millis(40);

#[tokio::test]
async fn what_the_cache_loses_is_marked_and_unmarked_when_it_is_back() {
    let f = Fixture::new().await;
    let (a, b) = (f.outputs("a", 3), f.outputs("b", 2));
    let (lost_outputs, _keeping) = f.keep(OFTEN);
    f.lost(&lost_outputs, 0).await;
    assert!(a.iter().chain(&b).all(|(p, _)| f.state(p) == OutputState::Known));

    f.cache.store().remove(&a[1].1);
    f.cache.store().remove(&b[0].1);
    let lost = f.lost(&lost_outputs, 2).await;
    assert_eq!(lost.targets().collect::<Vec<_>>(), ["//:a", "//:b"]);
    assert_eq!(f.state(&a[1].0), OutputState::Evicted);
    assert_eq!(f.state(&a[0].0), OutputState::Known);
    let row = f.context.record.output(f.root, &a[1].0).unwrap();
    assert!(row.error.contains("build its target again"), "{}", row.error);

    f.cache.store().put("a 1");
    let lost = f.lost(&lost_outputs, 1).await;
    assert_eq!(lost.targets().collect::<Vec<_>>(), ["//:b"]);
    let row = f.context.record.output(f.root, &a[1].0).unwrap();
    assert_eq!((row.state, &*row.error), (OutputState::Known, ""));
    let text = f.context.metrics.render();
    for line in [
        "outhaul_leases_total{kind=\"lost\"} 2",
        "outhaul_leases_total{kind=\"returned\"} 1",
        "outhaul_evicted_outputs 1",
    ] {
        assert!(text.contains(line), "{line} is missing in\n{text}");
    }

    // A newer build of the root goes on with them.
    f.build("second");
    let lost = f.lost(&lost_outputs, 1).await;
    assert_eq!(lost.invocation_id, "second");
    assert_eq!(lost_outputs.lost(f.root, "first"), None);
}

#[tokio::test]
async fn only_what_is_nowhere_else_is_asked_for_and_what_lies_on_disk_is_not_lost() {
    let f = Fixture::new().await;
    let outputs = f.outputs("a", 3);
    // One was brought to disk, one was built here and never was in the cache.
    let mut row = f.context.record.output(f.root, &outputs[0].0).unwrap();
    row.state = OutputState::Materialized;
    f.context
        .record
        .put_outputs(f.root, vec![(outputs[0].0.clone(), row)]);
    f.cache.store().remove(&outputs[0].1);
    std::fs::write(f.file(&outputs[1].0), "a 1").unwrap();
    f.cache.store().remove(&outputs[1].1);
    let empty = Digest::of(DigestFunction::Sha256, b"");
    let path = ExecPath::new("bazel-out/a/empty").unwrap();
    let row = OutputRow::known(OutputContent::Blob(empty));
    f.context.record.put_outputs(f.root, vec![(path.clone(), row)]);

    let (lost_outputs, _keeping) = f.keep(Duration::from_secs(600));
    f.lost(&lost_outputs, 0).await;
    assert_eq!(f.cache.stats().find_missing_blobs, 2);
    assert_eq!(f.state(&outputs[0].0), OutputState::Materialized);
    assert_eq!(f.state(&outputs[1].0), OutputState::Materialized, "adopted");
    assert_eq!(f.state(&path), OutputState::Known);
}

#[tokio::test]
async fn many_outputs_are_asked_for_in_few_requests_and_again_after_a_restart() {
    let f = Fixture::new().await;
    // As many as one likes; more than two requests' worth.
    let count = std::env::var("OUTHAUL_LEASE_OUTPUTS").map_or(9001, |n| n.parse().unwrap());
    let outputs = f.outputs("many", count);
    f.cache.store().remove(&outputs[count - 500].1);
    {
        let (lost_outputs, _keeping) = f.keep(Duration::from_secs(600));
        f.lost(&lost_outputs, 1).await;
    }
    let stats = f.cache.stats();
    let count = count as u64;
    assert_eq!(
        (stats.find_missing, stats.find_missing_blobs),
        (count.div_ceil(4000), count)
    );
    // Another daemon's life begins with the same record.
    let (lost_outputs, _keeping) = f.keep(Duration::from_secs(600));
    let lost = f.lost(&lost_outputs, 1).await;
    assert_eq!(lost.targets().collect::<Vec<_>>(), ["//:many"]);
    assert_eq!(f.cache.stats().find_missing_blobs, 2 * count);
}

#[tokio::test]
async fn a_cache_that_cannot_be_asked_loses_nothing() {
    let f = Fixture::new().await;
    let outputs = f.outputs("a", 2);
    let faults = f.cache.faults();
    faults.request(
        Rpc::FindMissing,
        RequestFault::Status(tonic::Code::Internal),
        Times::Always,
    );
    let (lost_outputs, _keeping) = f.keep(OFTEN);
    let asked = async {
        while f.cache.stats().find_missing < 3 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, asked).await.expect("in time");
    assert!(outputs.iter().all(|(p, _)| f.state(p) == OutputState::Known));
    assert_eq!(lost_outputs.lost(f.root, "first"), None);
    f.cache.faults().clear();
    f.cache.store().remove(&outputs[0].1);
    f.lost(&lost_outputs, 1).await;
}

/// Whose cache is asked is up to the newest build.
#[tokio::test]
async fn what_was_brought_to_another_cache_is_not_lost_by_this_one() {
    let mut f = Fixture::new().await;
    let other = EmbeddedCache::builder().start().await.unwrap();
    let template = RemoteOptions::new(Endpoint::parse("--remote-cache", "grpc://unused:1").unwrap());
    f.context.sources = Arc::new(Sources::new(SourceRule::FromBuild {
        template: Box::new(template),
        before: Vec::new(),
        allowed: None,
    }));
    let build = |id: &str, cache: String, instance: &str| {
        f.build(id);
        let mut row = f.context.record.invocation(id).unwrap();
        row.remote_cache = cache;
        row.remote_instance_name = instance.to_owned();
        f.context.record.put_invocation(&row);
    };
    let rows = |target: &str, invocation: &str| {
        let outputs = f.outputs(target, 2);
        let rows = outputs.iter().map(|(path, _)| {
            let mut row = f.context.record.output(f.root, path).unwrap();
            row.invocation_id = invocation.into();
            (path.clone(), row)
        });
        f.context.record.put_outputs(f.root, rows.collect());
        outputs
    };
    build("there", other.endpoint(), "");
    build("instance", f.cache.endpoint(), "another");
    build("before", f.cache.endpoint(), "");
    build("here", f.cache.endpoint(), "");
    let elsewhere = [rows("a", "there"), rows("b", "instance")].concat();
    let unknown = rows("c", "forgotten");
    let here = [rows("d", "before"), rows("e", "here")].concat();
    for (_, digest) in elsewhere.iter().chain(&unknown).chain(&here) {
        f.cache.store().remove(digest);
    }
    f.cache.store().put("c 0");

    let (lost_outputs, _keeping) = f.keep(Duration::from_secs(600));
    f.lost(&lost_outputs, 4).await;
    for (path, _) in elsewhere.iter().chain(&unknown) {
        assert_eq!(f.state(path), OutputState::Known, "{path:?}");
    }
    assert!(here.iter().all(|(p, _)| f.state(p) == OutputState::Evicted));
    let asked = f.cache.stats().find_missing_blobs;
    assert_eq!(asked, 6, "what may be here is kept, though nobody knows");
    assert_eq!(other.stats().find_missing, 0);
}

#[tokio::test]
async fn a_newer_build_is_seen_though_each_pass_takes_longer_than_the_interval() {
    let f = Fixture::new().await;
    f.outputs("a", 10);
    let (lost_outputs, _keeping) = f.keep(Duration::from_micros(1));
    f.lost(&lost_outputs, 0).await;
    f.build("second");
    assert_eq!(f.lost(&lost_outputs, 0).await.invocation_id, "second");
}

#[tokio::test]
async fn a_pass_that_panics_is_one_that_failed() {
    let panicking = async {
        assert!(std::hint::black_box(false), "as it may happen");
        Ok(())
    };
    let error = caught(panicking).await.unwrap_err().to_string();
    assert!(error.contains("bug in outhaul"), "{error}");
}
