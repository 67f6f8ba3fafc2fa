//! `outhaul watch`: a line for each file, once it is whole.

use std::{
    collections::BTreeMap,
    os::unix::fs::MetadataExt as _,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use outhaul::{
    demo::play,
    digest::{Digest, DigestFunction},
    proto::build_event_stream::{BuildEvent, build_event_id::Id},
};
use outhaul_testkit::{
    cache::{RequestFault, Rpc, Times},
    finish, in_time,
};
use prost::Message as _;
use serde_json::Value;
use tokio::{
    io::{BufReader, Lines},
    process::{Child, ChildStdout},
};

use crate::{
    support::{World, following, outhaul, run},
    waiting::{PERSISTENT, unblock},
};

/// A watch that goes on.
struct Watch {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Watch {
    fn start(world: &World, args: &[&str]) -> Self {
        let mut command = outhaul();
        command.arg("watch").arg(world.state()).args(args);
        let (child, lines) = following(command);
        Self { child, lines }
    }

    /// The next line, whose file is looked at right away.
    async fn next(&mut self) -> Option<Value> {
        let line = in_time(self.lines.next_line()).await.unwrap()?;
        let line: Value = serde_json::from_str(&line).unwrap();
        let path = Path::new(line["path"].as_str().unwrap());
        if line["digest"].is_null() {
            assert!(path.is_symlink() || path.is_dir(), "{line:#}");
        } else {
            let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{e}: {line:#}"));
            let digest = Digest::of(DigestFunction::Sha256, &bytes);
            assert_eq!(
                line["digest"],
                format!("sha256:{}", digest.hash_hex()),
                "{line:#}"
            );
            assert_eq!(line["size"], digest.size(), "{line:#}");
        }
        Some(line)
    }

    /// All that comes until the end, by exec path; each once.
    async fn rest(mut self, mut all: BTreeMap<String, Value>) -> (BTreeMap<String, Value>, Option<i32>) {
        while let Some(line) = self.next().await {
            let path = line["exec_path"].as_str().unwrap().to_owned();
            assert!(all.insert(path.clone(), line).is_none(), "{path} twice");
        }
        let status = in_time(self.child.wait()).await.unwrap();
        (all, status.code())
    }
}

fn all_of(world: &World) -> Vec<String> {
    let mut paths: Vec<String> = world
        .build
        .outputs()
        .iter()
        .map(|output| output.path.clone())
        .collect();
    paths.sort();
    paths
}

fn paths(lines: &BTreeMap<String, Value>) -> Vec<String> {
    lines.keys().cloned().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_file_has_a_line_when_it_is_whole_whenever_the_watch_begins() {
    let world = World::new().await;
    world
        .cache
        .faults()
        .request(Rpc::StreamRead, RequestFault::Stall, Times::Always);
    let server = world.serve(PERSISTENT).await;
    let id = world.build.invocation_id();
    let before = Watch::start(&world, &["--invocation", &id]);
    world.play(&world.build, server.address()).await;
    // The large ones are still to come.
    let mut during = Watch::start(&world, &[]);
    let mut first = BTreeMap::new();
    let line = during.next().await.unwrap();
    assert_ne!(line["size"], 5_000_000, "{line:#}");
    first.insert(line["exec_path"].as_str().unwrap().to_owned(), line);
    unblock(&world);
    // //broken:broken fails in this build.
    let (lines, code) = before.rest(BTreeMap::new()).await;
    assert_eq!((paths(&lines), code), (all_of(&world), Some(1)));
    let app = lines.values().find(|line| line["size"] == 5_000_000).unwrap();
    assert_eq!(
        (&app["label"], &app["class"], &app["outcome"], &app["source"]),
        (
            &"//app:app".into(),
            &"required".into(),
            &"downloaded".into(),
            &"stream".into()
        )
    );
    let (lines, code) = during.rest(first).await;
    assert_eq!((paths(&lines), code), (all_of(&world), Some(1)));
    // Afterwards, with a daemon and without.
    let mut server = server;
    for is_alone in [false, true] {
        if is_alone {
            server.signal(rustix::process::Signal::TERM);
            server.end().await;
        }
        let (lines, _) = Watch::start(&world, &["--invocation", &id])
            .rest(BTreeMap::new())
            .await;
        assert_eq!(paths(&lines), all_of(&world));
        let (lines, code) = Watch::start(&world, &["//app:app"]).rest(BTreeMap::new()).await;
        assert_eq!(code, Some(0));
        assert!(lines.values().all(|line| line["label"] == "//app:app") && !lines.is_empty());
        let (lines, _) = Watch::start(&world, &["--path=.*/lib[^/]*[.]a"])
            .rest(BTreeMap::new())
            .await;
        assert_eq!(lines.len(), 1, "{lines:#?}");
        let (lines, _) = Watch::start(&world, &["--output-group=none"])
            .rest(BTreeMap::new())
            .await;
        assert!(lines.is_empty(), "{lines:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn later_builds_are_followed_and_what_is_lost_is_reported() {
    let world = World::new().await;
    let server = world.serve(&[]).await;
    world.play(&world.build, server.address()).await;
    let workspace = format!("--workspace={}", world.path("workspace"));
    let mut watch = Watch::start(&world, &[&workspace, "--follow"]);
    for _ in 0..all_of(&world).len() {
        assert_eq!(
            watch.next().await.unwrap()["invocation_id"],
            world.build.invocation_id()
        );
    }
    let second = world.build.incremental();
    let deleted = world.exec_root().join(&world.file("app/app").0.path);
    std::fs::remove_file(&deleted).unwrap();
    world.play(&second, server.address()).await;
    let mut outcomes = BTreeMap::new();
    for _ in second.outputs() {
        let line = watch.next().await.unwrap();
        assert_eq!(line["invocation_id"], second.invocation_id());
        *outcomes
            .entry(line["outcome"].as_str().unwrap().to_owned())
            .or_insert(0) += 1;
    }
    assert_eq!(outcomes["downloaded"], 1, "{outcomes:?}");
    watch.child.kill().await.unwrap();

    // An output that fails to download has no line, and fails the watch of its target.
    let lost = world.file("liblib.a");
    world.cache.store().remove(lost.1);
    std::fs::remove_file(world.exec_root().join(&lost.0.path)).unwrap();
    world.play(&world.build.incremental(), server.address()).await;
    let mut command = outhaul();
    command.args(["watch", "//lib:lib"]).arg(world.state());
    let ran = finish(command)
        .await
        .says(1, &["//lib:lib", "could not be downloaded"]);
    assert!(!ran.out().contains("liblib.a"), "{ran}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_target_has_named_before_has_a_line_for_the_target_that_is_given() {
    let world = World::new().await;
    let server = world.serve(PERSISTENT).await;
    let id = world.build.invocation_id();
    // As a filegroup of another target's outputs, which Bazel has completed before.
    let mut events: Vec<Vec<u8>> = world.build.events().collect();
    let named = |bytes: &Vec<u8>| BuildEvent::decode(&**bytes).unwrap();
    let is_app = |event: &BuildEvent| {
        let id = event.id.as_ref().and_then(|id| id.id.as_ref());
        matches!(id, Some(Id::TargetCompleted(of)) if of.label == "//app:app" && of.aspect.is_empty())
    };
    let at = events.iter().position(|bytes| is_app(&named(bytes))).unwrap();
    let mut group = named(&events[at]);
    if let Some(Id::TargetCompleted(of)) = group.id.as_mut().and_then(|id| id.id.as_mut()) {
        of.label = "//app:group".to_owned();
    }
    events.insert(at + 1, group.encode_to_vec());
    let during = Watch::start(&world, &["--invocation", &id, "//app:group"]);
    let build_id = world.build.build_id();
    let played = play(server.address(), &id, &build_id, events.into_iter());
    in_time(played).await.unwrap();
    let (during, code) = during.rest(BTreeMap::new()).await;
    assert_eq!(code, Some(0));
    let (after, _) = Watch::start(&world, &["--invocation", &id, "//app:group"])
        .rest(BTreeMap::new())
        .await;
    let (of_app, _) = Watch::start(&world, &["--invocation", &id, "//app:app"])
        .rest(BTreeMap::new())
        .await;
    assert!(
        during.values().all(|line| line["label"] == "//app:group"),
        "{during:#?}"
    );
    assert!(during.contains_key(&world.file("app/app").0.path), "{during:#?}");
    assert_eq!((paths(&during), paths(&after)), (paths(&of_app), paths(&of_app)));
}

#[tokio::test]
async fn wrong_watches_are_refused() {
    for (args, parts) in [
        (&["app:app"][..], &["app:app", "target pattern"][..]),
        (&["--path=("], &["--path"]),
        (&["--invocation=a", "--follow"], &["--follow"]),
    ] {
        run(["watch"].into_iter().chain(args.iter().copied()))
            .await
            .says(2, parts);
    }
}

/// Prints how long after a file got its final name its line comes, with a reader that opens each file at its line.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement of some minutes, for docs/reliability.md; OUTHAUL_WATCH_BUILDS is how many builds there are"]
async fn measured_from_the_final_name_to_the_line() {
    let builds = std::env::var("OUTHAUL_WATCH_BUILDS").map_or(1000, |builds| builds.parse().unwrap());
    let world = World::new().await;
    let server = world.serve(&[]).await;
    world.play(&world.build, server.address()).await;
    let workspace = format!("--workspace={}", world.path("workspace"));
    let mut watch = Watch::start(&world, &[&workspace, "--follow"]);
    for _ in 0..all_of(&world).len() {
        watch.next().await.unwrap();
    }
    let (mut missing, mut short, mut delays) = (0, 0, Vec::new());
    let mut build = world.build.incremental();
    for _ in 0..builds {
        for output in build.outputs() {
            let _ = std::fs::remove_file(world.exec_root().join(&output.path));
        }
        let read = async {
            for _ in build.outputs() {
                let line = in_time(watch.lines.next_line()).await.unwrap().unwrap();
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
                let line: Value = serde_json::from_str(&line).unwrap();
                let path = line["path"].as_str().unwrap();
                let Ok(metadata) = std::fs::symlink_metadata(path) else {
                    missing += 1;
                    continue;
                };
                // Nothing changes a file after that; the time is that of the system's last tick.
                let named = Duration::new(
                    metadata.ctime().try_into().unwrap(),
                    metadata.ctime_nsec().try_into().unwrap(),
                );
                if line["outcome"] == "downloaded" {
                    delays.push(now.saturating_sub(named));
                }
                if metadata.is_file() {
                    let bytes = std::fs::read(path).unwrap_or_default();
                    short += usize::from(line["size"] != bytes.len());
                }
            }
        };
        tokio::join!(world.play(&build, server.address()), read);
        build = build.incremental();
    }
    delays.sort_unstable();
    let at = |part: usize| delays[(delays.len() - 1) * part / 1000];
    eprintln!(
        "{builds} builds, {} downloaded files: {missing} missing, {short} short; median {:?}, 99 % {:?}, 99.9 % {:?}, most {:?}",
        delays.len(),
        at(500),
        at(990),
        at(999),
        at(1000)
    );
    assert_eq!((missing, short), (0, 0));
}
