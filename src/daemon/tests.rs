//! Builds through the daemon's services, with the embedded cache.

mod deleted;
mod elsewhere;
mod evicting;
mod following;
mod hostile;
mod other_process;
mod runfiles;
mod served;

use std::time::Duration;

use outhaul_testkit::{
    PATIENCE,
    cache::{EmbeddedCache, RequestFault, Rpc, RunningCache, Times},
};
use tokio::{sync::watch, time::timeout};

use super::Services;
use crate::{
    bep::event::{
        CommandLine, Completed, Content, Event, File, NamedSet, OutputGroup, Started, StreamEvent, TargetId,
        TestResult,
    },
    builds::{Builds as _, Progress, StreamEnd, StreamKey},
    digest::Digest,
    exec_path::ExecPath,
    invocation::{Report, feed::Change, policy::Policy, watching::Watch},
    materialize::{MaterializeOptions, Outcome},
    proto::outhaul::v1 as pb,
    record::{InvocationRow, InvocationState, OutputState, Record, TargetState},
    remote::{GrpcCache, RemoteOptions},
    roots::{Destination, RootRules},
    sources::SourceRule,
    transport::Endpoint,
};

struct Fixture {
    dir: tempfile::TempDir,
    cache: RunningCache,
    services: Services,
    key: StreamKey,
    sent: i64,
}

impl Fixture {
    async fn new(holds_sets: bool) -> Self {
        Self::at("execroot/_main", "/w", holds_sets).await
    }

    /// With an exec root of this name in a directory of its own.
    async fn at(exec_root: &str, workspace: &str, holds_sets: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self::within(dir, exec_root, workspace, Destination::ExecRoot, holds_sets).await
    }

    /// The same in a directory that is there, with outputs that go elsewhere.
    async fn within(
        dir: tempfile::TempDir,
        exec_root: &str,
        workspace: &str,
        destination: Destination,
        holds_sets: bool,
    ) -> Self {
        std::fs::create_dir_all(dir.path().join(exec_root)).unwrap();
        let cache = EmbeddedCache::builder().start().await.unwrap();
        let endpoint = Endpoint::parse("--remote-cache", &cache.endpoint()).unwrap();
        let store = GrpcCache::new(RemoteOptions::new(endpoint)).unwrap();
        let (record, _) = Record::open(&dir.path().join("state")).unwrap();
        let services = Services::open(
            record,
            Policy::default(),
            RootRules {
                destination,
                path_maps: Vec::new(),
                allowed: vec![dir.path().to_owned()],
                ..RootRules::default()
            },
            SourceRule::Fixed(store.into()),
            MaterializeOptions::default(),
            holds_sets,
        )
        .unwrap();
        let mut fixture = Self {
            dir,
            cache,
            services,
            key: StreamKey {
                build_id: "build".to_owned(),
                invocation_id: "invocation".to_owned(),
                ..StreamKey::default()
            },
            sent: 0,
        };
        let root = fixture.dir.path().join(exec_root);
        fixture.begin(&root, workspace).await;
        fixture
    }

    /// A build begins.
    async fn begin(&mut self, exec_root: &std::path::Path, workspace: &str) {
        self.send(Event::Started(Started {
            command: "test".to_owned(),
            workspace: workspace.to_owned(),
            ..Started::default()
        }))
        .await;
        self.send(Event::ExecRoot(exec_root.display().to_string())).await;
    }

    /// Another build of the same root begins.
    async fn again(&mut self, invocation_id: &str) {
        self.key.invocation_id = invocation_id.to_owned();
        let root = self.dir.path().join("execroot/_main");
        self.begin(&root, "/w").await;
    }

    fn exec_root(&self) -> std::path::PathBuf {
        self.dir.path().join("execroot/_main")
    }

    /// Hands the engine the next event, and says its number.
    async fn send(&mut self, event: Event) -> i64 {
        self.sent += 1;
        let framed = StreamEvent { event, last: false };
        self.services
            .engine
            .events(&self.key, vec![(self.sent, framed)])
            .await;
        self.sent
    }

    async fn finish(&self) {
        self.services.engine.ended(&self.key, StreamEnd::Finished).await;
    }

    async fn set(&mut self, id: &str, files: Vec<File>, children: &[&str]) -> i64 {
        self.send(Event::NamedSet(NamedSet {
            id: id.to_owned(),
            files,
            children: children.iter().map(|c| (*c).to_owned()).collect(),
            authority: None,
        }))
        .await
    }

    async fn complete(&mut self, label: &str, sets: &[&str]) -> i64 {
        self.send(Event::Completed(Completed {
            target: target(label),
            success: true,
            groups: vec![OutputGroup {
                name: "default".to_owned(),
                sets: sets.iter().map(|s| (*s).to_owned()).collect(),
                ..OutputGroup::default()
            }],
            directories: Vec::new(),
        }))
        .await
    }

    async fn progress(&self) -> watch::Receiver<Progress> {
        self.services.engine.progress(&self.key).await.unwrap()
    }

    async fn watch(&self) -> Watch {
        self.services.engine.watch(&self.key.invocation_id).await.unwrap()
    }

    /// Holds every answer of the cache back until it is let.
    fn stall(&self) {
        for rpc in [Rpc::BatchRead, Rpc::StreamRead] {
            self.cache
                .faults()
                .request(rpc, RequestFault::Stall, Times::Always);
        }
    }
}

fn target(label: &str) -> TargetId {
    TargetId {
        label: label.to_owned(),
        ..TargetId::default()
    }
}

fn output(name: &str, digest: &Digest) -> File {
    File {
        path: format!("bazel-out/k8/bin/{name}").into(),
        prefix_len: "bazel-out/k8/bin".len(),
        content: Content::Blob(digest.clone()),
        uri: None,
    }
}

fn absent(text: &str) -> Digest {
    Digest::of(crate::digest::DigestFunction::Sha256, text.as_bytes())
}

async fn reached(progress: &mut watch::Receiver<Progress>, through: i64) -> Progress {
    let reached = progress.wait_for(|p| p.through >= through);
    timeout(PATIENCE, reached)
        .await
        .expect("in time")
        .unwrap()
        .clone()
}

/// Everything that a listener gets until the end.
async fn heard(mut changes: Watch) -> Vec<Change> {
    let mut heard = Vec::new();
    while let Some(change) = timeout(PATIENCE, changes.recv()).await.expect("in time") {
        heard.push(change);
    }
    heard
}

fn states(heard: &[Change], label: &str) -> Vec<TargetState> {
    let state = |change: &Change| match change {
        Change::Target(row) if row.label == label => Some(row.state),
        _ => None,
    };
    heard.iter().filter_map(state).collect()
}

fn report(heard: &[Change]) -> &Report {
    match heard.last() {
        Some(Change::Settled(report)) => report,
        other => panic!("the last word is {other:?}"),
    }
}

#[tokio::test]
async fn a_completion_is_settled_when_everything_up_to_it_is_there_and_not_before() {
    let mut f = Fixture::new(false).await;
    f.stall();
    let digest = f.cache.store().put("bytes");
    f.set("0", vec![output("a", &digest)], &[]).await;
    let first = f.complete("//:a", &["0"]).await;
    let mut progress = f.progress().await;
    let before = reached(&mut progress, first - 1).await;
    assert_eq!((before.through, before.failed_at), (first - 1, None));
    // Shares the set: nothing new is wanted for it, and it is not settled any sooner.
    let second = f.complete("//:b", &["0"]).await;
    assert!(
        f.services
            .engine
            .snapshot("invocation")
            .await
            .is_some_and(|(_, pending)| pending == 1)
    );
    assert_eq!(progress.borrow_and_update().through, first - 1);
    f.cache.faults().clear();
    f.cache.faults().sever_connections();
    reached(&mut progress, second).await;
    let path = f.dir.path().join("execroot/_main/bazel-out/k8/bin/a");
    assert_eq!(std::fs::read(path).unwrap(), b"bytes");
}

#[tokio::test]
async fn a_build_that_is_reported_to_be_settled_is_on_record() {
    let mut f = Fixture::new(false).await;
    let digest = f.cache.store().put("bytes");
    f.set("0", vec![output("a", &digest)], &[]).await;
    f.complete("//:a", &["0"]).await;
    f.finish().await;
    f.services.engine.settled(&f.key).await;
    // The row is written some milliseconds after the file is placed.
    let (row, pending) = f.services.engine.snapshot("invocation").await.unwrap();
    assert_eq!((row.state, pending), (InvocationState::Settled, 0));
    let path = ExecPath::new("bazel-out/k8/bin/a").unwrap();
    let output = f.services.record.output(row.root.unwrap(), &path).unwrap();
    assert_eq!(output.state, OutputState::Materialized);
    assert_eq!(
        f.services.record.targets("invocation")[0].state,
        TargetState::Settled
    );
}

#[tokio::test]
async fn a_failure_is_reported_with_its_number_and_to_every_target_that_shares_it() {
    let mut f = Fixture::new(false).await;
    let digest = f.cache.store().put("bytes");
    f.set("0", vec![output("lost", &absent("never uploaded"))], &[])
        .await;
    f.set("1", vec![output("there", &digest)], &[]).await;
    f.set("2", vec![output("other", &digest)], &["0"]).await;
    f.complete("//:fine", &["1"]).await;
    let fails = f.complete("//:owner", &["0"]).await;
    f.complete("//:sharer", &["2"]).await;
    let last = f.complete("//:also_fine", &["1"]).await;
    let changes = f.watch().await;
    let mut progress = f.progress().await;
    let reported = reached(&mut progress, last).await;
    assert_eq!(reported.failed_at, Some(fails));
    assert!(reported.messages[0].contains("bin/lost"), "{reported:?}");
    f.finish().await;
    let heard = heard(changes).await;
    for (label, state) in [
        ("//:fine", TargetState::Settled),
        ("//:owner", TargetState::Failed),
        ("//:sharer", TargetState::Failed),
        ("//:also_fine", TargetState::Settled),
    ] {
        assert_eq!(states(&heard, label).last(), Some(&state), "{label}: {heard:?}");
    }
    assert_eq!(report(&heard).failed, 1);
    let rows = f.services.record.targets("invocation");
    assert_eq!(
        rows.iter().filter(|row| row.state == TargetState::Failed).count(),
        2
    );
}

#[tokio::test]
async fn a_test_is_settled_with_its_logs() {
    let mut f = Fixture::new(false).await;
    let log = f.cache.store().put("log");
    f.send(Event::Configured {
        label: "//:t".to_owned(),
        kind: "sh_test rule".to_owned(),
        completions: Vec::new(),
    })
    .await;
    f.send(Event::Configuration {
        id: String::new(),
        mnemonic: "k8-fastbuild".to_owned(),
    })
    .await;
    let completed = f.complete("//:t", &[]).await;
    let changes = f.watch().await;
    let mut progress = f.progress().await;
    reached(&mut progress, completed).await;
    let result = f
        .send(Event::TestResult(TestResult {
            label: "//:t".to_owned(),
            run: 1,
            shard: 1,
            attempt: 1,
            files: vec![File {
                path: "test.log".into(),
                prefix_len: 0,
                content: Content::Blob(log.clone()),
                uri: None,
            }],
            ..TestResult::default()
        }))
        .await;
    assert!(f.services.engine.snapshot("invocation").await.is_some());
    assert_eq!(progress.borrow_and_update().through, result - 1);
    let summary = f
        .send(Event::TestSummary {
            label: "//:t".to_owned(),
            configuration: String::new(),
            shard_count: 1,
            run_count: 1,
        })
        .await;
    reached(&mut progress, summary).await;
    let files = vec![(None, log.clone()), (None, absent("nowhere"))];
    let found = f.services.engine.local_files(&f.key, files).await;
    let path = found[0].as_ref().expect("the log is on disk");
    assert_eq!(std::fs::read(path).unwrap(), b"log");
    assert_eq!(found[1], None);
    f.finish().await;
    let heard = heard(changes).await;
    assert_eq!(
        states(&heard, "//:t"),
        [TargetState::Completed, TargetState::Settled]
    );
    let at = |wanted: &dyn Fn(&Change) -> bool| heard.iter().position(wanted).expect("reported");
    let placed = at(&|c| {
        let Change::Output(ended) = c else { return false };
        matches!(ended.outcome, Outcome::Downloaded { bytes: 3, .. })
    });
    assert!(placed < at(&|c| matches!(c, Change::Target(row) if row.state == TargetState::Settled)));
}

#[tokio::test]
async fn a_held_set_is_settled_with_what_is_required_of_it() {
    let mut f = Fixture::new(true).await;
    let digest = f.cache.store().put("bytes");
    let set = f.set("0", vec![output("a", &digest)], &[]).await;
    let mut progress = f.progress().await;
    assert_eq!(reached(&mut progress, set - 1).await.through, set - 1);
    let completed = f.complete("//:a", &["0"]).await;
    reached(&mut progress, completed).await;
    f.finish().await;
    timeout(PATIENCE, f.services.engine.settled(&f.key))
        .await
        .expect("in time");
    // A slow follower still learns where the files are, after the end.
    let path = ExecPath::new("bazel-out/k8/bin/a").unwrap();
    let found = f
        .services
        .engine
        .local_files(
            &f.key,
            vec![(Some(path.clone()), digest), (Some(path), absent("other"))],
        )
        .await;
    assert!(
        found[0].as_ref().is_some_and(|path| path.exists()) && found[1].is_none(),
        "{found:?}"
    );
}

#[tokio::test]
async fn a_cancelled_build_wants_nothing_any_more() {
    let mut f = Fixture::new(false).await;
    f.stall();
    let digest = f.cache.store().put("bytes");
    f.set("0", vec![output("a", &digest)], &[]).await;
    f.complete("//:a", &["0"]).await;
    f.finish().await;
    let changes = f.watch().await;
    assert!(f.services.engine.cancel("invocation").await);
    assert!(!f.services.engine.cancel("another").await);
    let heard = heard(changes).await;
    assert!(
        heard
            .iter()
            .any(|c| matches!(c, Change::Output(ended) if ended.outcome.reason().contains("cancelled"))),
        "{heard:?}"
    );
    assert_eq!(report(&heard).failed, 1);
    // Who comes late hears the end as well.
    let late = self::heard(f.watch().await).await;
    assert_eq!(states(&late, "//:a"), [TargetState::Failed]);
    assert_eq!(report(&late).line, report(&heard).line);
}

#[tokio::test]
async fn a_build_is_done_only_when_it_is_on_record_for_good() {
    let mut f = Fixture::new(false).await;
    let digest = f.cache.store().put("bytes");
    f.set("0", vec![output("a", &digest)], &[]).await;
    f.complete("//:a", &["0"]).await;
    f.finish().await;
    let engine = &f.services.engine;
    timeout(PATIENCE, engine.settled(&f.key)).await.expect("in time");
    timeout(PATIENCE, engine.done(&f.key)).await.expect("in time");
    // What a process that is killed now would leave: the journal is released from here on.
    let left = f.dir.path().join("left");
    copy_dir(&f.dir.path().join("state/record"), &left.join("record"));
    let (record, opening) = Record::open(&left).unwrap();
    let row = record.invocation("invocation");
    assert_eq!(
        row.as_ref().map(|row| row.state),
        Some(InvocationState::Settled),
        "{opening:?}"
    );
    let path = ExecPath::new("bazel-out/k8/bin/a").unwrap();
    let root = row.and_then(|row| row.root).unwrap();
    assert!(record.output(root, &path).is_some());
}

fn copy_dir(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[tokio::test]
async fn an_output_counts_once_however_many_groups_and_targets_name_it() {
    let mut f = Fixture::new(false).await;
    let digest = f.cache.store().put("bytes");
    let files: Vec<File> = (0..30).map(|n| output(&format!("t{n}.d/x"), &digest)).collect();
    let trees: Vec<File> = (0..31).map(|n| output(&format!("t{n}.d"), &digest)).collect();
    f.set("0", files.clone(), &[]).await;
    f.set("1", files, &[]).await;
    for (n, set) in ["0", "1"].into_iter().cycle().take(40).enumerate() {
        // Known by two rules of their own, and the last ones required.
        let is_last = n >= 38;
        let is_test = !is_last && n / 2 % 2 == 1;
        if is_test {
            f.send(Event::Configured {
                label: format!("//:t{n}"),
                kind: "sh_test rule".to_owned(),
                completions: Vec::new(),
            })
            .await;
        }
        f.send(Event::Completed(Completed {
            target: target(&format!("//:t{n}")),
            success: true,
            groups: vec![OutputGroup {
                name: if is_last || is_test {
                    "default"
                } else {
                    "_hidden_x"
                }
                .to_owned(),
                sets: vec![set.to_owned()],
                ..OutputGroup::default()
            }],
            directories: trees.clone(),
        }))
        .await;
        if n == 37 {
            let row = f.services.engine.snapshot("invocation").await.unwrap().0;
            // Of each tree the file, and the empty one.
            assert_eq!(
                (row.outputs.known, row.outputs.present, row.outputs.failed),
                (31, 0, 0)
            );
            let targets = f.services.engine.targets("invocation").await.unwrap();
            assert_eq!(targets.iter().map(|row| row.known).sum::<u64>(), 31);
        }
    }
    f.finish().await;
    let settled = timeout(PATIENCE, f.services.engine.settled(&f.key))
        .await
        .unwrap();
    assert_eq!(settled.failed, 0);
    let row = f.services.engine.snapshot("invocation").await.unwrap().0;
    assert_eq!(
        (row.outputs.known, row.outputs.downloaded + row.outputs.present),
        (0, 31)
    );
}

/// A file that the stream names without saying what is in it.
fn local(name: &str) -> File {
    File {
        content: Content::Unknown,
        uri: Some(format!("file:///elsewhere/bazel-out/k8/bin/{name}").into()),
        ..output(name, &absent(""))
    }
}

#[tokio::test]
async fn what_is_named_without_a_digest_is_present_or_has_failed_and_is_never_left_out() {
    let mut f = Fixture::new(false).await;
    let bin = f.exec_root().join("bazel-out/k8/bin");
    std::fs::create_dir_all(bin.join("directory")).unwrap();
    std::fs::write(bin.join("there"), "").unwrap();
    std::os::unix::fs::symlink("there", bin.join("link")).unwrap();
    std::os::unix::fs::symlink("nowhere", bin.join("dangling")).unwrap();
    // What another event names with its digest counts as that.
    let both = f.cache.store().put("both");
    let names = ["there", "directory", "link", "dangling", "absent", "both"];
    f.set("0", names.iter().map(|name| local(name)).collect(), &[])
        .await;
    f.set("1", vec![output("both", &both)], &[]).await;
    f.complete("//:t", &["0", "1"]).await;
    f.finish().await;
    let settlement = timeout(PATIENCE, f.services.engine.settled(&f.key))
        .await
        .unwrap();
    assert_eq!(settlement.failed, 2, "{settlement:?}");
    for name in ["dangling", "absent"] {
        let path = format!("bazel-out/k8/bin/{name}: ");
        let said = settlement
            .messages
            .iter()
            .find(|message| message.starts_with(&path));
        assert!(
            said.is_some_and(|said| said.contains("without a digest")),
            "{settlement:?}"
        );
    }
    let (row, _) = f.services.engine.snapshot("invocation").await.unwrap();
    assert_eq!(
        (row.outputs.present, row.outputs.downloaded, row.outputs.failed),
        (3, 1, 2)
    );
    f.services.engine.done(&f.key).await;
    assert_eq!(f.services.record.targets("invocation")[0].failed, 2);
}

#[tokio::test]
async fn a_target_with_files_that_were_never_named_has_failed() {
    let mut f = Fixture::new(false).await;
    f.set("0", Vec::new(), &["9"]).await;
    f.complete("//:lacks", &["0"]).await;
    f.complete("//:whole", &[]).await;
    f.finish().await;
    let settlement = timeout(PATIENCE, f.services.engine.settled(&f.key))
        .await
        .unwrap();
    assert_eq!(settlement.failed, 1, "{settlement:?}");
    f.services.engine.done(&f.key).await;
    let mut targets = f.services.record.targets("invocation");
    targets.sort_by(|a, b| a.label.cmp(&b.label));
    let failed: Vec<_> = targets.iter().map(|row| (&*row.label, row.failed)).collect();
    assert_eq!(failed, [("//:lacks", 1), ("//:whole", 0)]);
}

#[tokio::test]
async fn what_bazel_leaves_out_where_it_downloads_itself_is_reported_and_fails_nothing() {
    let asks_for_more = Policy {
        rules: vec!["required path=.*".parse().unwrap()],
        ..Policy::default()
    };
    for (build_id, mode, policy, failed) in [
        ("build", "remote_cache", Policy::default(), 0),
        ("build", "remote_download_toplevel", Policy::default(), 0),
        ("build", "remote_download_minimal", Policy::default(), 1),
        ("build", "remote_download_toplevel", asks_for_more, 1),
        // As of a file, which may come from another machine.
        ("", "remote_download_toplevel", Policy::default(), 1),
    ] {
        let case = format!("{build_id:?} {mode} {policy:?}");
        let mut f = Fixture::new(false).await;
        f.services.engine.set_policy(policy);
        f.key.build_id = build_id.to_owned();
        f.again("second").await;
        f.send(Event::CommandLine(CommandLine {
            label: "canonical".to_owned(),
            options: vec![(mode.to_owned(), String::new())],
        }))
        .await;
        f.set("0", vec![local("absent")], &[]).await;
        f.complete("//:t", &["0"]).await;
        f.finish().await;
        let settlement = timeout(PATIENCE, f.services.engine.settled(&f.key))
            .await
            .unwrap();
        assert_eq!(settlement.failed, failed, "{case}: {settlement:?}");
        assert!(
            settlement.messages[0].contains("without a digest"),
            "{settlement:?}"
        );
        f.services.engine.done(&f.key).await;
        assert_eq!(f.services.record.targets("second")[0].failed, failed, "{case}");
    }
}

#[tokio::test]
async fn a_combined_coverage_report_is_brought_to_its_place() {
    let mut f = Fixture::new(false).await;
    let report = f.cache.store().put("report");
    f.send(Event::CombinedReport(File {
        path: "coverage_report.lcov".into(),
        prefix_len: 0,
        content: Content::Blob(report),
        uri: None,
    }))
    .await;
    f.finish().await;
    timeout(PATIENCE, f.services.engine.settled(&f.key))
        .await
        .unwrap();
    let placed = f.exec_root().join("bazel-out/_coverage/_coverage_report.dat");
    assert_eq!(std::fs::read(placed).unwrap(), b"report");
}
