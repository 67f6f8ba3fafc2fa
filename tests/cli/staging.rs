//! Staging, with and without a daemon, here and elsewhere.

use std::path::{Path, PathBuf};

use outhaul::demo::{GeneratedBuild, Setting};
use outhaul_testkit::{
    Ran, Running,
    cache::{BlobFault, RequestFault, Rpc, Times},
    finish, in_time, until,
};

use crate::support::{World, outhaul, requests, run};

const STAGED: [&str; 12] = [
    "aspect",
    "class",
    "digest",
    "directory",
    "error",
    "exec_path",
    "label",
    "outcome",
    "output_group",
    "path",
    "size",
    "symlink_target",
];

/// A build of which nothing was downloaded, in a daemon's record.
pub(crate) async fn recorded(world: &World) -> Running {
    let server = world.serve(&["--download=minimal"]).await;
    world.play(&world.build, server.address()).await;
    server
}

pub(crate) async fn stop(mut server: Running) {
    server.signal(rustix::process::Signal::TERM);
    assert_eq!(server.end().await, Some(0));
}

pub(crate) async fn stage(world: &World, to: &str, args: &[&str]) -> Ran {
    let mut command = outhaul();
    command
        .args(["stage", "--json", "--to", to])
        .arg(world.state())
        .args(args);
    finish(command).await
}

pub(crate) async fn is_staged(to: &str, args: &[&str]) -> Ran {
    run(["is-staged", "--json", "--to", to]
        .into_iter()
        .chain(args.iter().copied()))
    .await
}

/// How often an outcome is reported.
fn count(ran: &Ran, outcome: &str) -> usize {
    ran.json().iter().filter(|o| o["outcome"] == outcome).count()
}

/// Every entry below a directory but the marker's, sorted.
pub(crate) fn entries(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten() {
            let entry = entry.unwrap();
            if entry.file_name() == ".outhaul" {
                continue;
            }
            if entry.file_type().unwrap().is_dir() {
                open.push(entry.path());
            }
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn all_of_a_build_is_staged_once_with_a_daemon_and_without() {
    let world = World::new().await;
    let server = recorded(&world).await;
    let total = world.build.outputs().len();
    let mut server = Some(server);
    for to in ["first", "second"] {
        let to = world.path(to);
        let ran = stage(&world, &to, &[]).await.expect(0);
        assert_eq!(world.wrong_below(to.as_ref()), Vec::<String>::new());
        assert_eq!(count(&ran, "downloaded"), total);
        let keys: Vec<String> = ran.json()[0].as_object().unwrap().keys().cloned().collect();
        assert_eq!(keys, STAGED);

        let before = world.cache.stats();
        let ran = stage(&world, &to, &[]).await.expect(0);
        assert_eq!(count(&ran, "present"), total);
        let asked = world.cache.stats().since(&before);
        assert_eq!(
            (asked.batch_reads, asked.stream_reads),
            (0, 0),
            "nothing is transferred twice"
        );
        is_staged(&to, &[]).await.expect(0);
        if let Some(server) = server.take() {
            stop(server).await;
        }
    }
    assert!(
        !world.exec_root().join("bazel-out").exists(),
        "the output tree is nobody's business here"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_output_trees_copy_is_taken_if_it_is_right_and_the_caches_if_not() {
    let world = World::new().await;
    let server = world.serve(&[]).await;
    world.play(&world.build, server.address()).await;
    // Rows of what was placed follow the files.
    for name in ["liblib.a", "part0.h"] {
        let path = world
            .exec_root()
            .join(&world.file(name).0.path)
            .display()
            .to_string();
        until("it is recorded", async || {
            let ran = run(["stat", "--json", &path, &world.state()]).await;
            !ran.json()[0]["source"].is_null()
        })
        .await;
    }
    // The cache has lost what the output tree has; and the output tree has lost what the cache has.
    let (evicted, digest) = world.file("liblib.a");
    world.cache.store().remove(digest);
    let (changed, _) = world.file("part0.h");
    let path = world.exec_root().join(&changed.path);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "changed").unwrap();
    let to = world.path("out");
    let ran = stage(&world, &to, &["//lib:lib"]).await.expect(0);
    let of = |path: &str| ran.json().iter().find(|o| o["exec_path"] == path).unwrap()["outcome"].clone();
    assert_eq!(
        (of(&evicted.path), of(&changed.path)),
        ("copied".into(), "downloaded".into())
    );
    is_staged(&to, &["//lib:lib"]).await.expect(0);
    assert_eq!(
        std::fs::read(&path).unwrap(),
        b"changed",
        "the output tree is not touched"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_output_root_has_is_staged_without_the_cache() {
    let world = World::new().await;
    let server = world.serve(&[]).await;
    world.play(&world.build, server.address()).await;
    let second = world.dir.path().join("second/execroot/_main");
    std::fs::create_dir_all(&second).unwrap();
    let setting = Setting {
        workspace: world.path("other"),
        exec_root: second.display().to_string(),
        remote_cache: world.cache.endpoint(),
        instance_name: String::new(),
    };
    let again = GeneratedBuild::new(|bytes| world.cache.store().put(bytes), setting, 1).incremental();
    world.play(&again, server.address()).await;
    assert_eq!(world.wrong_below(&second), Vec::<String>::new());
    std::fs::remove_dir_all(second.join("bazel-out")).unwrap();
    world.cache.store().clear();
    let to = world.path("out");
    let other = format!("--workspace={}", world.path("other"));
    let ran = stage(&world, &to, &[&other, "//lib:lib"]).await.expect(0);
    assert!(
        count(&ran, "copied") > 0 && count(&ran, "downloaded") == 0,
        "{ran}"
    );
    is_staged(&to, &["//lib:lib"]).await.expect(0);
    stop(server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn optional_outputs_come_after_required_ones_or_not_at_all() {
    let world = World::new().await;
    let server = recorded(&world).await;
    world.cache.store().remove(world.file("lint.report").1);
    let app = world.file("app/app").0.path.clone();
    // It stalls until the test says otherwise.
    world
        .cache
        .faults()
        .request(Rpc::StreamRead, RequestFault::Stall, Times::Always);
    let to = world.path("daemon");
    let args = ["//lib:lib", "//app:app", "--required", r".*\.h"];
    let ran = stage(&world, &to, &args).await.expect(0);
    assert!(ran.err.contains("optional still downloading"), "{}", ran.err);
    assert!(
        ran.json()
            .iter()
            .any(|o| o["exec_path"] == *app && o["outcome"].is_null() && o["error"].is_null())
    );
    assert!(!Path::new(&to).join(&app).exists());
    let answer = is_staged(&to, &args).await.expect(0).json().remove(0);
    assert_eq!(answer["complete"], false);
    world.cache.faults().clear();
    world.cache.faults().sever_connections();
    // The daemon goes on after its answer.
    until("it is complete", async || {
        is_staged(&to, &args).await.expect(0).json()[0]["complete"] == true
    })
    .await;
    assert!(Path::new(&to).join(&app).exists());

    let to = world.path("all");
    let all = [&args[..], &["--wait-all"]].concat();
    let ran = stage(&world, &to, &all).await.expect(0);
    assert!(
        ran.err.contains("lint.report") && ran.err.contains("evicted"),
        "{}",
        ran.err
    );
    assert_eq!(count(&ran, "downloaded"), 7);
    stop(server).await;
    // Without a daemon the command itself ends with all of it.
    let to = world.path("alone");
    stage(&world, &to, &args).await.expect(0);
    assert!(Path::new(&to).join(&app).exists());
    assert_eq!(is_staged(&to, &args).await.expect(0).json()[0]["complete"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_required_artifact_that_is_evicted_stages_nothing() {
    let world = World::new().await;
    let mut server = Some(recorded(&world).await);
    let (gone, digest) = world.file("app/app");
    world.cache.store().remove(digest);
    for to in ["daemon", "alone"] {
        let to = world.path(to);
        let ran = stage(&world, &to, &["//app/..."]).await;
        ran.says(1, &[&gone.path, &digest.hash_hex(), "evicted"]);
        assert!(!Path::new(&to).exists(), "nothing was written");
        is_staged(&to, &[]).await.expect(1);
        if let Some(server) = server.take() {
            stop(server).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_wrong_are_not_staged_and_leave_no_marker() {
    let world = World::new().await;
    let _server = recorded(&world).await;
    let (wrong, digest) = world.file("liblib.a");
    world
        .cache
        .faults()
        .blob(digest, BlobFault::Corrupt, Times::Always);
    let to = world.path("out");
    let ran = stage(&world, &to, &["//lib:lib"]).await;
    ran.says(1, &[&wrong.path]);
    assert!(!Path::new(&to).join(&wrong.path).exists());
    is_staged(&to, &[]).await.expect(1);
    assert!(
        !entries(to.as_ref())
            .iter()
            .any(|p| p.to_string_lossy().contains(".outhaul-tmp"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_comes_after_a_stage_that_has_failed() {
    let world = World::new().await;
    // A job that is still at work goes on at once.
    let server = world
        .serve(&["--download=minimal", "--remote-retry-max-delay=10ms"])
        .await;
    world.play(&world.build, server.address()).await;
    let (wrong, digest) = world.file("liblib.a");
    let app = world.file("app/app").0.path.clone();
    let faults = world.cache.faults();
    faults.blob(digest, BlobFault::Corrupt, Times::Always);
    // What is optional stalls until the other has failed.
    faults.request(Rpc::StreamRead, RequestFault::Stall, Times::Always);
    let to = world.path("out");
    let args = ["//lib:lib", "//app:app", "--required", r".*/liblib\.a"];
    stage(&world, &to, &args).await.says(1, &[&wrong.path]);
    // Another stage takes longer to get the same than the stalled download would take to go on.
    faults.clear();
    faults.sever_connections();
    let other = world.path("other");
    stage(&world, &other, &["//app:app", "--include", r".*/app"])
        .await
        .expect(0);
    assert!(Path::new(&other).join(&app).exists());
    assert!(!Path::new(&to).join(&app).exists(), "it came after the answer");
    let temporary = |path: &PathBuf| path.to_string_lossy().contains(".outhaul-tmp");
    assert!(
        !entries(to.as_ref()).iter().any(temporary),
        "nobody uses it any more"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn overlapping_stages_at_once_both_end_well() {
    let world = World::new().await;
    let mut server = Some(recorded(&world).await);
    for to in ["daemon", "alone"] {
        let to = world.path(to);
        let wishes: [&[&str]; 4] = [
            &["//lib:lib"],
            &["//app:app"],
            &["//app:app", "--include", r".*\.h"],
            &["//lib:lib"],
        ];
        let stages = wishes.map(|wish| stage(&world, &to, wish));
        for ran in futures::future::join_all(stages).await {
            ran.expect(0);
        }
        for wish in wishes {
            is_staged(&to, wish).await.expect(0);
        }
        let answer = is_staged(&to, &[]).await.expect(0).json().remove(0);
        assert_eq!(answer["problems"], serde_json::json!([]));
        assert!(
            !entries(to.as_ref())
                .iter()
                .any(|p| p.to_string_lossy().contains(".outhaul-tmp"))
        );
        if let Some(server) = server.take() {
            stop(server).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_still_runs_is_not_staged_from() {
    use outhaul::proto::google::devtools::build::v1::publish_build_event_client::PublishBuildEventClient;
    let world = World::new().await;
    let server = recorded(&world).await;
    let next = world.build.incremental();
    let id = next.invocation_id();
    let events: Vec<Vec<u8>> = next.events().collect();
    let all = events.len();
    let requests = requests(&next.build_id(), &id, events, true);
    let (first, rest) = requests.split_at(all / 2);
    let (send, receive) = tokio::sync::mpsc::channel(all + 1);
    for request in first {
        send.send(request.clone()).await.unwrap();
    }
    let address = server.address().replace("grpc://", "http://");
    let mut client = PublishBuildEventClient::connect(address).await.unwrap();
    let mut acks = client
        .publish_build_tool_event_stream(tokio_stream::wrappers::ReceiverStream::new(receive))
        .await
        .unwrap()
        .into_inner();
    let to = world.path("out");
    until("it begins", async || {
        let ran = run(["status", "--json", &id, &world.state()]).await;
        ran.code == Some(0) && ran.json()[0]["workspace"] != ""
    })
    .await;
    stage(&world, &to, &["--invocation", &id])
        .await
        .says(1, &[&id, "still running"]);
    for request in rest {
        send.send(request.clone()).await.unwrap();
    }
    drop(send);
    while in_time(acks.message()).await.unwrap().is_some() {}
    stage(&world, &to, &["--invocation", &id]).await.expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_control_api_stages_and_looks() {
    use outhaul::proto::outhaul::v1 as pb;
    let world = World::new().await;
    let _server = recorded(&world).await;
    let socket = format!("unix://{}", world.path("state/control.sock"));
    let channel = tonic::transport::Endpoint::from_shared(socket)
        .unwrap()
        .connect()
        .await
        .unwrap();
    let mut client = pb::control_client::ControlClient::new(channel);
    let directory = world.path("out");
    let request = pb::StageRequest {
        directory: directory.clone(),
        dry_run: true,
        ..pb::StageRequest::default()
    };
    let answer = client.stage(request.clone()).await.unwrap().into_inner();
    assert_eq!(
        (answer.staged, answer.outputs.len()),
        (false, world.build.outputs().len())
    );
    let looked = pb::IsStagedRequest {
        directory,
        ..pb::IsStagedRequest::default()
    };
    assert!(
        !client
            .is_staged(looked.clone())
            .await
            .unwrap()
            .into_inner()
            .staged
    );
    let request = pb::StageRequest {
        dry_run: false,
        ..request
    };
    let answer = client.stage(request).await.unwrap().into_inner();
    assert!(answer.staged && answer.pending == 0);
    let answer = client.is_staged(looked).await.unwrap().into_inner();
    assert!(answer.staged && answer.complete, "{answer:?}");
    assert_eq!(answer.invocation_ids, [world.build.invocation_id()]);
    let relative = pb::IsStagedRequest {
        directory: "out".to_owned(),
        ..pb::IsStagedRequest::default()
    };
    let refused = client.is_staged(relative).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_an_error_before_anything_is_written() {
    let world = World::new().await;
    let _server = recorded(&world).await;
    let to = world.path("out");
    for (args, code, parts) in [
        (&["//no:such"][..], 3, &["//no:such", "no such target"][..]),
        (&["--include=nope"], 3, &["--include=nope"]),
        (&["--required=nope"], 3, &["--required=nope"]),
        (
            &["--output-group=nope"],
            3,
            &["--output-group=nope", "lint_report"],
        ),
        (&["--invocation=nope"], 3, &["nope"]),
        (&["--workspace=/nope"], 3, &["/nope"]),
        (&["--include=("], 2, &["--include=("]),
        (&["nonsense"], 2, &["nonsense"]),
    ] {
        stage(&world, &to, args).await.says(code, parts);
    }
    let ran = stage(&world, &to, &["--dry-run", "--flatten", "//app:app"])
        .await
        .expect(0);
    let mut paths: Vec<String> = ran
        .json()
        .iter()
        .map(|o| o["path"].as_str().unwrap().to_owned())
        .collect();
    paths.sort();
    let expected = [
        "app",
        "liblib.a",
        "part0.h",
        "part1.h",
        "part2.h",
        "part3.h",
        "version.txt",
    ];
    assert_eq!(paths, expected);
    assert!(
        ran.json()
            .iter()
            .all(|o| o["class"] == "required" && o["digest"].is_string())
    );
    assert!(!Path::new(&to).exists(), "nothing was written");
    // A file where the directory should be.
    std::fs::write(&to, "").unwrap();
    stage(&world, &to, &[]).await.says(2, &["--to", &to]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_deleted_or_changed_is_named_and_staged_again() {
    let world = World::new().await;
    let _server = recorded(&world).await;
    let to = world.path("out");
    let args = ["--flatten", "//lib:lib"];
    stage(&world, &to, &args).await.expect(0);
    is_staged(&to, &args).await.expect(0);
    let file = |name: &str| Path::new(&to).join(name);
    std::fs::remove_file(file("part0.h")).unwrap();
    // The same size and time, other bytes.
    let times = std::fs::metadata(file("part1.h")).unwrap();
    std::fs::remove_file(file("part1.h")).unwrap();
    std::fs::write(file("part1.h"), vec![0; times.len() as usize]).unwrap();
    let changed = std::fs::File::options()
        .write(true)
        .open(file("part1.h"))
        .unwrap();
    changed.set_modified(times.modified().unwrap()).unwrap();
    let answer = is_staged(&to, &[]).await.expect(1).json().remove(0);
    let problems: Vec<&str> = answer["problems"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p.as_str().unwrap())
        .collect();
    assert_eq!(
        problems,
        ["part0.h: missing", "part1.h: changed since it was staged"]
    );
    run(["is-staged", "--to", &to])
        .await
        .says(1, &["part0.h", "part1.h"]);
    let ran = stage(&world, &to, &args).await.expect(0);
    assert_eq!((count(&ran, "downloaded"), count(&ran, "present")), (2, 4));
    is_staged(&to, &args).await.expect(0);
    is_staged(&to, &["//app:app"]).await.expect(1);
    is_staged(&to, &["--invocation", "nope"]).await.expect(1);
}
