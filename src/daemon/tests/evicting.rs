//! Removing outputs that the cache still has.
//!
//! `OUTHAUL_EVICT_CASES` is how many random lives of a workspace there are, `OUTHAUL_EVICT_SEED` repeats one.

use std::{
    collections::{BTreeMap, HashMap},
    os::unix::fs::MetadataExt as _,
    time::{Duration, SystemTime},
};

use outhaul_testkit::{Chance, number};
use tokio::sync::mpsc;
use tonic::Status;

use super::*;

use crate::{
    daemon::evicting::relieve, materialize::place::Mark, output::Class, proto::outhaul::v1::EvictRequest,
    units::now_ms,
};

impl Fixture {
    /// Another build, of files with these names and bytes, comes to its end.
    async fn built(&mut self, invocation_id: &str, files: &[(&str, &str)]) {
        // The one before has its place by then: the newest of two that begin at once would be either.
        let before = self.services.engine.snapshot(&self.key.invocation_id).await;
        assert!(before.is_none_or(|(row, _)| row.root.is_some()));
        self.again(invocation_id).await;
        let files: Vec<File> = files
            .iter()
            .map(|(name, bytes)| output(name, &self.cache.store().put((*bytes).to_owned())))
            .collect();
        self.set("0", files, &[]).await;
        self.complete("//:all", &["0"]).await;
        self.finish().await;
        let settled = timeout(PATIENCE, self.services.engine.settled(&self.key));
        let settled = settled.await.expect("in time");
        // One of no files is reported to name none.
        assert!(settled.failed == 0 && !settled.superseded, "{settled:?}");
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.exec_root().join("bazel-out/k8/bin").join(name)
    }

    /// As if it had been used last this many minutes ago.
    fn used(&self, name: &str, minutes: u64) {
        let then = SystemTime::now() - Duration::from_secs(60 * minutes);
        let times = std::fs::FileTimes::new().set_accessed(then).set_modified(then);
        let file = std::fs::File::open(self.file(name)).unwrap();
        file.set_times(times).unwrap();
    }

    async fn evict(&self, request: EvictRequest) -> (Vec<String>, BTreeMap<String, u64>) {
        reported(self.services.service.evict(request)).await.unwrap()
    }
}

/// The names of what was removed, in order, and what was left by reason.
async fn reported(
    mut answers: mpsc::Receiver<Result<pb::EvictResponse, Status>>,
) -> Result<(Vec<String>, BTreeMap<String, u64>), Status> {
    let (mut removed, mut left) = (Vec::new(), BTreeMap::new());
    while let Some(part) = timeout(PATIENCE, answers.recv()).await.expect("in time") {
        let part = part?;
        let names = part
            .outputs
            .iter()
            .map(|output| output.exec_path.rsplit('/').next().unwrap_or_default().to_owned());
        removed.extend(names);
        left.extend(part.left.into_iter().map(|left| (left.reason, left.outputs)));
    }
    Ok((removed, left))
}

/// All that may go.
const EVERYTHING: EvictRequest = EvictRequest {
    bytes: u64::MAX,
    workspace: String::new(),
    include_newest: true,
    dry_run: false,
};

fn left(entries: &[(&str, u64)]) -> BTreeMap<String, u64> {
    entries
        .iter()
        .map(|(reason, outputs)| ((*reason).to_owned(), *outputs))
        .collect()
}

#[tokio::test]
async fn what_was_used_least_recently_goes_first_and_comes_back() {
    let mut f = Fixture::new(false).await;
    let files = [("a", "of a"), ("b", "of b"), ("c", "of c"), ("d", "of d")];
    f.built("first", &files).await;
    for (name, minutes) in [("a", 10), ("b", 30), ("c", 20), ("d", 40)] {
        f.used(name, minutes);
    }
    let request = EvictRequest {
        bytes: 1,
        ..EVERYTHING
    };
    for name in ["d", "b", "c"] {
        assert_eq!(f.evict(request.clone()).await.0, [name]);
        assert!(!f.file(name).exists());
    }
    let dry_run = EvictRequest {
        dry_run: true,
        ..request
    };
    assert_eq!(f.evict(dry_run).await.0, ["a"]);
    assert!(f.file("a").exists(), "it was only to be shown");
    let path = f.file("d").display().to_string();
    let why = f.services.service.why(vec![path.clone()]).await;
    assert!(
        why[0]
            .lines
            .iter()
            .any(|line| line.contains("removed to free disk space")),
        "{:?}",
        why[0].lines
    );
    let got = f.services.service.materialize(vec![path]).await;
    assert_eq!(
        got[0].outcome(),
        pb::OutputOutcome::Downloaded,
        "{}",
        got[0].error
    );
    // A build that names them as before brings the others.
    f.built("second", &files).await;
    for (name, bytes) in files {
        assert_eq!(std::fs::read_to_string(f.file(name)).unwrap(), bytes);
    }
}

#[tokio::test]
async fn only_what_was_downloaded_is_unchanged_and_in_the_cache_goes() {
    let mut f = Fixture::new(false).await;
    // The build tool has made one of them itself.
    std::fs::create_dir_all(f.file("")).unwrap();
    std::fs::write(f.file("made"), "made").unwrap();
    let names = ["made", "changed", "replaced", "lost", "gone", "fine", "touched"];
    f.built("first", &names.map(|name| (name, name))).await;
    let write = |name: &str, text: &str| {
        std::fs::remove_file(f.file(name)).unwrap();
        std::fs::write(f.file(name), text).unwrap();
    };
    write("changed", "CHANGED");
    write("touched", "touched");
    write("replaced", "by something longer");
    std::fs::remove_file(f.file("gone")).unwrap();
    f.cache.store().remove(&absent("lost"));
    let (mut removed, reported) = f.evict(EVERYTHING).await;
    removed.sort();
    assert_eq!(removed, ["fine", "touched"]);
    assert_eq!(
        reported,
        left(&[
            ("changed since they were downloaded", 1),
            ("not downloaded by outhaul", 1),
            ("not in the cache any more", 1),
        ])
    );
    let texts = [("made", "made"), ("changed", "CHANGED"), ("lost", "lost")];
    for (name, text) in texts {
        assert_eq!(std::fs::read_to_string(f.file(name)).unwrap(), text);
    }
    f.cache.faults().request(
        Rpc::FindMissing,
        RequestFault::Status(tonic::Code::PermissionDenied),
        Times::Always,
    );
    f.built("second", &[("fine", "fine")]).await;
    let (removed, reported) = f.evict(EVERYTHING).await;
    assert_eq!(removed, Vec::<String>::new());
    assert!(
        reported
            .keys()
            .any(|reason| reason.starts_with("the cache cannot say whether it has them: ")),
        "{reported:?}"
    );
    assert!(f.file("fine").exists());
}

#[tokio::test]
async fn nothing_goes_while_a_build_runs_or_that_the_newest_build_wants() {
    let mut f = Fixture::new(false).await;
    f.built("first", &[("a", "of a")]).await;
    f.again("second").await;
    let (removed, reported) = f.evict(EVERYTHING).await;
    assert_eq!(removed, Vec::<String>::new());
    let running = format!("in {}: a build is running", f.exec_root().display());
    assert_eq!(reported, left(&[(&running, 0)]));
    f.finish().await;
    f.services.engine.settled(&f.key).await;
    // What it names is not known here, where no journal is kept: it may be anything.
    let request = EvictRequest {
        include_newest: false,
        ..EVERYTHING
    };
    let (removed, reported) = f.evict(request).await;
    assert_eq!((removed.len(), reported.len()), (0, 1), "{reported:?}");
    let elsewhere = EvictRequest {
        workspace: "/elsewhere".to_owned(),
        ..EVERYTHING
    };
    let refused = self::reported(f.services.service.evict(elsewhere))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), tonic::Code::NotFound);
    assert_eq!(
        refused.message(),
        "no outputs of a workspace /elsewhere are recorded"
    );
    assert!(f.file("a").exists());
    assert_eq!(f.evict(EVERYTHING).await.0, ["a"]);
}

#[tokio::test]
async fn on_a_full_disk_what_the_newest_build_does_not_want_goes_by_itself() {
    let mut f = Fixture::new(false).await;
    f.built("first", &[("a", "of a"), ("b", "of b")]).await;
    // No disk has twice its size free.
    let (full, never) = ("100%".parse().unwrap(), Mark::NOTHING);
    let mut tries = HashMap::new();
    relieve(&f.services, full, &mut tries).await;
    assert!(
        f.file("a").exists() && f.file("b").exists(),
        "the newest build wants them"
    );
    let (row, _) = f.services.engine.snapshot("first").await.unwrap();
    let path = ExecPath::new("bazel-out/k8/bin/a").unwrap();
    f.services.record.update_outputs(
        row.root.unwrap(),
        &[path],
        |path| path,
        |_, seen| {
            let mut row = seen.to_row()?;
            row.class = Class::Known;
            Some(row)
        },
    );
    relieve(&f.services, full, &mut tries).await;
    assert!(f.file("a").exists(), "too little was removed a moment ago");
    relieve(&f.services, never, &mut HashMap::new()).await;
    assert!(f.file("a").exists());
    relieve(&f.services, full, &mut HashMap::new()).await;
    assert!(!f.file("a").exists() && f.file("b").exists());
    let metrics = f.services.metrics.render();
    assert!(
        metrics.contains("outhaul_auto_evicted_outputs_total 1\n"),
        "{metrics}"
    );
    // It leaves another file system alone.
    let device = std::fs::metadata(f.exec_root()).unwrap().dev();
    let elsewhere = f.services.service.evict_from(EVERYTHING, Some(device + 1));
    assert_eq!(reported(elsewhere).await.unwrap().0, Vec::<String>::new());
}

#[tokio::test]
async fn a_workspace_that_is_not_recorded_is_an_error() {
    let mut f = Fixture::new(false).await;
    f.built("first", &[("a", "of a")]).await;
    let usage = |workspace: String| {
        f.services.service.disk_usage(pb::DiskUsageRequest {
            workspace,
            ..pb::DiskUsageRequest::default()
        })
    };
    assert_eq!(usage("/w".to_owned()).await.unwrap().outputs, 1);
    let unknown = usage("/nowhere".to_owned()).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::NotFound);
}

#[tokio::test]
async fn a_build_that_begins_meanwhile_loses_nothing() {
    let mut f = Fixture::new(false).await;
    f.built("first", &[("a", "of a")]).await;
    let request = RequestFault::Stall;
    f.cache.faults().request(Rpc::FindMissing, request, Times::Always);
    let before = f.cache.stats();
    let answers = f.services.service.evict(EVERYTHING);
    let asked = async {
        while f.cache.stats().since(&before).find_missing == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(PATIENCE, asked).await.expect("in time");
    f.built("second", &[("a", "of a")]).await;
    f.cache.faults().clear();
    f.cache.faults().sever_connections();
    let (removed, reported) = reported(answers).await.unwrap();
    assert_eq!(removed, Vec::<String>::new());
    assert_eq!(
        reported,
        left(&[("in an output root where a build has begun", 1)])
    );
    assert!(f.file("a").exists());
}

#[tokio::test]
async fn what_lies_where_a_link_leads_or_has_several_names_stays() {
    let mut f = Fixture::new(false).await;
    f.built("first", &[("d/f", "of f"), ("e/f", "of f"), ("g", "of g")])
        .await;
    std::fs::remove_dir_all(f.file("d")).unwrap();
    std::os::unix::fs::symlink("e", f.file("d")).unwrap();
    std::fs::hard_link(f.file("g"), f.exec_root().join("kept")).unwrap();
    let (removed, reported) = f.evict(EVERYTHING).await;
    // By its own name, it may go.
    assert_eq!(removed, ["f"]);
    assert_eq!(
        reported,
        left(&[
            ("changed since they were downloaded", 1),
            ("files with several names, so that nothing would be freed", 1)
        ])
    );
    assert!(f.file("g").exists() && f.file("d").is_symlink());
}

#[tokio::test]
async fn what_is_on_disk_is_counted() {
    let mut f = Fixture::new(false).await;
    let large = "x".repeat(100_000);
    f.built("first", &[("a", "of a"), ("b", &large), ("c", "of c")])
        .await;
    std::fs::remove_file(f.file("c")).unwrap();
    f.built("second", &[("a", "of another a")]).await;
    let usage = |by: pb::DiskUsageBy| {
        let request = pb::DiskUsageRequest {
            by: by.into(),
            ..pb::DiskUsageRequest::default()
        };
        f.services.service.disk_usage(request)
    };
    for (by, names) in [
        (pb::DiskUsageBy::Workspace, &[("/w", 2)][..]),
        (pb::DiskUsageBy::Target, &[("//:all", 2)]),
        (pb::DiskUsageBy::Invocation, &[("first", 1), ("second", 1)]),
    ] {
        let usage = usage(by).await.unwrap();
        let reported: Vec<(&str, u64)> = usage.entries.iter().map(|e| (&*e.name, e.outputs)).collect();
        assert_eq!(reported, names);
        assert_eq!(usage.outputs, 2);
        assert!(usage.bytes >= 100_000, "{usage:?}");
        assert_eq!(usage.bytes, usage.entries.iter().map(|e| e.bytes).sum::<u64>());
        assert!(
            usage
                .entries
                .iter()
                .all(|e| (now_ms() - e.used_ms).abs() < 3_600_000)
        );
    }
}

/// A workspace that is built in, cleaned up and changed at random, with a cache that loses blobs: whatever was removed
/// could be downloaded again at that moment, and was as it had been downloaded.
async fn random_life(seed: u64) {
    let chance = &mut Chance::new(seed);
    let mut f = Fixture::new(false).await;
    let names = ["a", "b", "c", "d/e", "d/f"];
    let mut builds = 0;
    for step in 0..chance.between(3, 12) {
        match chance.below(6) {
            0 | 1 => {
                builds += 1;
                let files: Vec<(&str, String)> = names
                    .into_iter()
                    .filter(|_| chance.happens(0.7))
                    .collect::<Vec<_>>()
                    .into_iter()
                    .map(|name| (name, format!("{name} of {}", chance.below(3))))
                    .collect();
                let files: Vec<(&str, &str)> = files.iter().map(|(name, text)| (*name, &**text)).collect();
                f.built(&format!("build {builds}"), &files).await;
            }
            2 => {
                let digests = f.cache.store().digests();
                if !digests.is_empty() {
                    f.cache
                        .store()
                        .remove(&digests[chance.below(digests.len() as u64) as usize]);
                }
            }
            3 => {
                let file = f.file(chance.pick(&names));
                if file.exists() {
                    std::fs::remove_file(&file).unwrap();
                    if chance.happens(0.5) {
                        std::fs::write(&file, "own").unwrap();
                    }
                }
            }
            _ => {
                let mut before: BTreeMap<&str, Vec<u8>> = names
                    .into_iter()
                    .filter_map(|name| Some((name, std::fs::read(f.file(name)).ok()?)))
                    .collect();
                let answers = f.services.service.evict(EvictRequest {
                    bytes: chance.pick(&[1, 5000, u64::MAX]),
                    ..EVERYTHING
                });
                // The caller goes away, or a build begins beside it.
                match chance.below(4) {
                    0 => drop(answers),
                    1 => {
                        builds += 1;
                        f.built(&format!("build {builds}"), &[("a", "a of 1")]).await;
                        // The eviction may begin only now.
                        before.insert("a", b"a of 1".to_vec());
                    }
                    _ => {
                        reported(answers).await.unwrap();
                    }
                }
                while f.services.service.is_busy() {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                for (name, bytes) in before {
                    let digest = Digest::of(crate::digest::DigestFunction::Sha256, &bytes);
                    assert!(
                        f.file(name).exists() || f.cache.store().contains(&digest),
                        "seed {seed}, step {step}: {name} cannot be downloaded again"
                    );
                    assert!(
                        f.file(name).exists() || bytes != b"own",
                        "seed {seed}, step {step}"
                    );
                }
            }
        }
    }
}

#[tokio::test]
async fn whatever_is_removed_can_be_downloaded_again() {
    let seed = number("OUTHAUL_EVICT_SEED");
    let cases = number("OUTHAUL_EVICT_CASES").unwrap_or(if seed.is_some() { 1 } else { 40 });
    let first = seed.unwrap_or_else(|| now_ms().unsigned_abs());
    for seed in first..first + cases {
        eprintln!("OUTHAUL_EVICT_SEED={seed}");
        random_life(seed).await;
    }
}

#[tokio::test]
async fn what_an_older_build_has_named_does_not_replace_a_file_that_may_be_newer() {
    let mut f = Fixture::new(false).await;
    f.built("first", &[("a", "of a"), ("b", "of b")]).await;
    f.built("second", &[("b", "newer b")]).await;
    for name in ["a", "b"] {
        std::fs::remove_file(f.file(name)).unwrap();
        std::fs::write(f.file(name), "by Bazel").unwrap();
    }
    let paths = ["a", "b"].map(|name| f.file(name).display().to_string());
    let got = f.services.service.materialize(paths.to_vec()).await;
    assert!(got[0].error.contains("left unchanged"), "{:?}", got[0]);
    // What the newest build names is not known here.
    assert!(got[0].error.contains("no journal is kept"), "{:?}", got[0]);
    assert_eq!(std::fs::read_to_string(f.file("a")).unwrap(), "by Bazel");
    // The newest build says what this is.
    assert_eq!(got[1].error, "");
    assert_eq!(std::fs::read_to_string(f.file("b")).unwrap(), "newer b");
    // One that runs may name it yet.
    f.again("third").await;
    let b = output("b", &f.cache.store().put("newest b"));
    f.set("0", vec![b], &[]).await;
    let got = f.services.service.materialize(paths[..1].to_vec()).await;
    assert!(got[0].error.contains("still running"), "{:?}", got[0]);
    assert_eq!(std::fs::read_to_string(f.file("a")).unwrap(), "by Bazel");
    f.finish().await;
    std::fs::remove_file(f.file("a")).unwrap();
    let got = f.services.service.materialize(paths[..1].to_vec()).await;
    assert_eq!(got[0].outcome(), pb::OutputOutcome::Downloaded);
}
