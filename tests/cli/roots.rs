//! Output roots: very many of them, one after the other, with few descriptors; and places that may not be one.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use outhaul::{
    demo::{FilledShape, GeneratedBuild, Setting, Shape, play},
    digest::Digest,
    proto::google::devtools::build::v1::publish_build_event_client::PublishBuildEventClient,
};
use outhaul_testkit::{Running, clean, in_time};
use rustix::process::Signal;
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::StreamExt as _;
use tonic::Status;

use crate::support::{World, outhaul, requests, run};

/// Roots, each of a build of its own.
const ROOTS: usize = 120;

const SHAPE: Shape = Shape {
    targets: 3,
    files_per_target: 8,
    file_size: 100,
    dirs_per_target: 2,
    files_per_set: 5000,
    seed: 1,
};

/// A daemon that may have this many files open.
async fn with_files(world: &World, files: usize) -> Running {
    let mut command = clean(Command::new("sh"));
    command
        .args(["-c", &format!("ulimit -n {files} && exec \"$@\""), "sh"])
        .arg(env!("CARGO_BIN_EXE_outhaul"))
        .args(["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none"])
        .args([world.state(), world.cache_flag()]);
    Running::serve(command).await
}

/// How many a daemon has open.
fn files_of(server: &Running) -> usize {
    let open = format!("/proc/{}/fd", server.id());
    std::fs::read_dir(open).unwrap().count()
}

fn root(world: &World, n: usize) -> PathBuf {
    world.dir.path().join(format!("{n}/execroot/_main"))
}

/// Of a build in a new root.
fn setting(world: &World, n: usize) -> Setting {
    let root = root(world, n);
    std::fs::create_dir_all(root.join("bazel-out")).unwrap();
    Setting {
        workspace: world.path("workspace"),
        exec_root: root.display().to_string(),
        remote_cache: world.cache.endpoint(),
        instance_name: String::new(),
    }
}

#[track_caller]
fn assert_complete(world: &World, filled: &FilledShape, n: usize) {
    for (path, digest) in filled.outputs() {
        let bytes = std::fs::read(root(world, n).join(&path));
        let bytes = bytes.unwrap_or_else(|e| panic!("build {n}: {path}: {e}"));
        assert_eq!(
            Digest::of(digest.function(), &bytes),
            *digest,
            "build {n}: {path}"
        );
    }
}

/// Plays the builds to a daemon that may have this many files open, and gives the most that it had between them.
async fn most_open(files: usize) -> usize {
    let world = World::new().await;
    let server = with_files(&world, files).await;
    let filled = SHAPE.fill(|bytes| world.cache.store().put(bytes));
    let mut most = 0;
    for n in 0..ROOTS {
        let id = filled.invocation_id(n as u64);
        let played = play(
            server.address(),
            &id,
            &id,
            filled.events(&setting(&world, n), &id),
        );
        in_time(played).await.unwrap();
        // Acknowledged, so all of it is there.
        assert_complete(&world, &filled, n);
        most = most.max(files_of(&server));
    }
    most
}

#[tokio::test(flavor = "multi_thread")]
async fn roots_of_settled_builds_keep_no_descriptors_but_for_those_used_last() {
    let most = most_open(1024).await;
    assert!(most < 2 * ROOTS, "{most} files are open");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_lacks_nothing_for_want_of_descriptors_that_idle_roots_hold() {
    // Less than the roots that are kept open would have.
    most_open(96).await;
}

/// Clients that are lost within seconds of each other.
const LOST: usize = 150;

/// Sends events to a listener, and waits until they are acknowledged. The stream goes on after that: the connection to the
/// daemon is closed without a word, as when the client's machine dies.
async fn send(server: &str, id: &str, events: Vec<Vec<u8>>, ends: bool) -> Result<(), Status> {
    let requests = requests(id, id, events, ends);
    let sent = requests.len();
    let between = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = between.local_addr().unwrap();
    let daemon = server.trim_start_matches("grpc://").to_owned();
    let wire = tokio::spawn(async move {
        let (mut client, _) = between.accept().await?;
        let mut daemon = TcpStream::connect(daemon).await?;
        tokio::io::copy_bidirectional(&mut client, &mut daemon).await
    });
    let mut client = PublishBuildEventClient::connect(format!("http://{address}"))
        .await
        .unwrap();
    let requests = tokio_stream::iter(requests).chain(tokio_stream::pending());
    let mut acks = client
        .publish_build_tool_event_stream(requests)
        .await?
        .into_inner();
    for _ in 0..sent {
        assert!(acks.message().await?.is_some());
    }
    wire.abort();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn builds_whose_clients_are_lost_keep_no_descriptors_while_they_wait_for_them() {
    let world = World::new().await;
    let server = with_files(&world, 2 * LOST).await;
    let filled = SHAPE.fill(|bytes| world.cache.store().put(bytes));
    let build = |n: usize| {
        let id = filled.invocation_id(n as u64);
        let events: Vec<_> = filled.events(&setting(&world, n), &id).collect();
        (id, events)
    };
    let builds: Vec<_> = (0..LOST).map(build).collect();
    for (n, (id, events)) in builds.iter().enumerate() {
        let half = events[..events.len() / 2].to_vec();
        let sent = in_time(send(server.address(), id, half, false)).await;
        sent.unwrap_or_else(|status| panic!("client {n}: {status}"));
    }
    // There were never more than the limit. They are closed soon, and not only when clients are waited for no longer.
    let lost = Instant::now();
    while files_of(&server) >= LOST * 3 / 2 {
        assert!(
            lost.elapsed() < Duration::from_secs(8),
            "{} files are open",
            files_of(&server)
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Some come back.
    for n in [0, LOST / 2, LOST - 1] {
        let (id, events) = &builds[n];
        in_time(send(server.address(), id, events.clone(), true))
            .await
            .unwrap();
        assert_complete(&world, &filled, n);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_names_a_place_that_is_not_for_it_gets_nothing_written() {
    let world = World::new().await;
    let make = |name: &str| {
        let path = world.path(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    };
    let (home, allowed, outside) = (make("home"), make("allowed"), make("outside/execroot"));
    let open_to_all = make("open/execroot");
    let (keys, repository) = (make("user/.ssh"), make("src/project"));
    let above = std::path::Path::new(&open_to_all).parent().unwrap();
    std::fs::set_permissions(above, std::fs::Permissions::from_mode(0o777)).unwrap();
    let link = format!("{allowed}/link");
    std::os::unix::fs::symlink(&outside, &link).unwrap();
    let dotted = format!("{allowed}/../outside/execroot");
    let allow = format!("--allow-exec-root={allowed}");
    for (n, (exec_root, flag, reason)) in [
        (
            "/",
            None,
            "is the root directory, or is or contains a home directory",
        ),
        (
            "//",
            None,
            "is the root directory, or is or contains a home directory",
        ),
        (
            home.as_str(),
            None,
            "is the root directory, or is or contains a home directory",
        ),
        (
            &*world.path(""),
            None,
            "is the root directory, or is or contains a home directory",
        ),
        (&open_to_all, None, "can write to"),
        (&keys, None, "does not look like a Bazel exec root"),
        (&repository, None, "allow it with --allow-exec-root"),
        (&outside, None, "does not look like a Bazel exec root"),
        ("outside/execroot", None, "not an absolute path"),
        (&dotted, None, "\"..\""),
        (
            &outside,
            Some(&allow),
            "not in a directory given with --allow-exec-root",
        ),
        (
            &link,
            Some(&allow),
            "not in a directory given with --allow-exec-root",
        ),
        (&dotted, Some(&allow), "\"..\""),
        (
            "/proc/self/cwd",
            Some(&allow),
            "not in a directory given with --allow-exec-root",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let setting = Setting {
            workspace: world.path("workspace"),
            exec_root: exec_root.to_owned(),
            remote_cache: world.cache.endpoint(),
            instance_name: String::new(),
        };
        let build = GeneratedBuild::new(|bytes| world.cache.store().put(bytes), setting, 1);
        let mut command = outhaul();
        command
            .args(["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none"])
            .args([
                format!("--state-dir={}", world.path(&format!("state{n}"))),
                world.cache_flag(),
            ])
            .args(flag)
            .env("HOME", &home);
        let server = Running::serve(command).await;
        // The build is not failed for it.
        world.play(&build, server.address()).await;
        let state = format!("--state-dir={}", world.path(&format!("state{n}")));
        let status = run(["status", "--json", &state]).await.expect(0);
        let reported = status.json()[0].to_string().replace("\\\"", "\"");
        assert!(reported.contains(reason), "{exec_root}: {reported}");
    }
    for root in [&home, &outside, &open_to_all, &allowed, &keys, &repository] {
        assert!(!std::path::Path::new(root).join("bazel-out").exists(), "{root}");
    }
    assert!(!std::path::Path::new("/bazel-out").exists());
}

/// Bazel has put them there by itself.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_where_outhaul_must_not_write_counts_as_present() {
    let world = World::new().await;
    let mut server = world.serve(&[]).await;
    world.play(&world.build, server.address()).await;
    world.assert_complete();
    server.signal(Signal::TERM);
    server.end().await;
    let above = world.path("execroot");
    std::fs::set_permissions(above, std::fs::Permissions::from_mode(0o777)).unwrap();
    let counts = async |number: u64| {
        let state = format!("--state-dir={}", world.path(&format!("state{number}")));
        let mut command = outhaul();
        command
            .args(["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none"])
            .args([&state, &world.cache_flag()]);
        let server = Running::serve(command).await;
        world.play(&world.build, server.address()).await;
        let status = run(["status", "--json", &state]).await.expect(0).json();
        assert_eq!(status[0]["downloaded"], 0, "{status:?}");
        let count = |name: &str| status[0][name].as_u64().unwrap();
        (count("present"), count("failed"))
    };
    let (all, failed) = counts(1).await;
    assert!(all > 10 && failed == 0, "{all} {failed}");
    let (large, small) = (&world.file("app/app").0.path, &world.file("index.html").0.path);
    std::fs::remove_file(world.exec_root().join(small)).unwrap();
    let large = world.exec_root().join(large);
    std::fs::remove_file(&large).unwrap();
    std::fs::write(large, "another size").unwrap();
    assert_eq!(counts(2).await, (all - 2, 2));
}
