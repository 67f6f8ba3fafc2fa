//! The daemon's end on SIGTERM, whatever hangs at the time: in time, and with nothing lost.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use outhaul::demo::play;
use outhaul_testkit::{
    Running,
    cache::{RequestFault, Rpc, Times},
    clean, finish, in_time, until,
};
use rustix::process::Signal;
use tokio::{io::AsyncWriteExt as _, net::TcpListener};

use crate::{support::World, waiting::unblock};

/// What the manual promises, with something for a busy machine.
const DEADLINE: Duration = Duration::from_secs(22 + 15);

/// Sends SIGTERM, and demands a good end in time.
async fn ends(mut server: Running) -> String {
    let asked = Instant::now();
    server.signal(Signal::TERM);
    assert_eq!(server.end().await, Some(0));
    let took = asked.elapsed();
    assert!(took < DEADLINE, "{took:?}");
    server.logged("shutting down: SIGTERM").await
}

/// A client that plays the world's build and stays as long as it is held. Whether it is let go well does not matter.
fn held_client(world: &World, server: &Running) -> tokio::task::JoinHandle<()> {
    let (build, address) = (world.build.clone(), server.address().to_owned());
    tokio::spawn(async move {
        let (id, build_id) = (build.invocation_id(), build.build_id());
        let _ = play(&address, &id, &build_id, build.events()).await;
    })
}

/// The next daemon brings everything, without the client.
async fn is_completed_by_the_next(world: &World, args: &[&str]) {
    let server = world.serve(args).await;
    until("the rest of the build", async || {
        world.wrong_below(&world.exec_root()).is_empty()
    })
    .await;
    ends(server).await;
    let left = world.dir.path().join(".outhaul-tmp");
    assert!(!left.exists(), "{} is left", left.display());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_hangs_and_clients_that_are_held_do_not_keep_it() {
    let world = World::new().await;
    for rpc in [Rpc::BatchRead, Rpc::StreamRead] {
        let faults = world.cache.faults();
        faults.request(rpc, RequestFault::Stall, Times::Always);
    }
    let server = world.serve(&[]).await;
    let client = held_client(&world, &server);
    // One that says nothing at all, and one that stops in the middle of its greeting.
    let address = server.address().trim_start_matches("grpc://").to_owned();
    let _silent = tokio::net::TcpStream::connect(&address).await.unwrap();
    let mut odd = tokio::net::TcpStream::connect(&address).await.unwrap();
    odd.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0")
        .await
        .unwrap();
    until("the cache is asked", async || world.cache.faults().fired() > 0).await;
    ends(server).await;
    in_time(client).await.unwrap();
    unblock(&world);
    is_completed_by_the_next(&world, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_service_that_hangs_does_not_keep_it() {
    let world = World::new().await;
    // Connections are made, and nobody ever answers.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let upstream = format!("--bes-backend=grpc://{}", listener.local_addr().unwrap());
    let accepting = tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            kept.push(stream);
        }
    });
    let server = world.serve(&[&upstream, "--hold-timeout=1s"]).await;
    let client = held_client(&world, &server);
    until("the build's outputs", async || {
        world.wrong_below(&world.exec_root()).is_empty()
    })
    .await;
    ends(server).await;
    accepting.abort();
    in_time(client).await.unwrap();
    let kept = std::fs::read_dir(world.path("state/journal"))
        .unwrap()
        .flatten()
        .any(|entry| entry.path().extension().is_some_and(|e| e == "journal"));
    assert!(kept, "what upstream has not got is kept for the next daemon");
}

/// A program for which a directory is a file system whose process never answers, in a namespace of its own.
fn behind_hung(directory: impl AsRef<std::ffi::OsStr>, program: &str) -> Command {
    let script = "exec 3<>/dev/fuse; mount -i -t fuse \
                  -o fd=3,rootmode=40000,user_id=0,group_id=0 outhaul-test \"$0\" && exec \"$@\"";
    let mut command = clean(Command::new("unshare"));
    command
        .args(["--mount", "--propagation=private", "sh", "-c", script])
        .arg(directory)
        .arg(program);
    command
}

/// Whether that is possible here.
async fn may_hang(directory: impl AsRef<std::ffi::OsStr>) -> bool {
    let tried = finish(behind_hung(directory, "true")).await;
    let may = tried.code == Some(0);
    if !may {
        eprintln!("SKIPPED: it may not mount a FUSE file system: {tried}");
    }
    may
}

#[tokio::test(flavor = "multi_thread")]
async fn an_output_tree_that_hangs_does_not_keep_it() {
    let world = World::new().await;
    let hung = world.exec_root().join("bazel-out/k8-fastbuild/bin/lib");
    std::fs::create_dir_all(&hung).unwrap();
    if !may_hang(&hung).await {
        return;
    }
    let mut command = behind_hung(&hung, env!("CARGO_BIN_EXE_outhaul"));
    command
        .args(["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none"])
        // With this many, some do not hang.
        .args([world.state(), world.cache_flag(), "--writers=16".to_owned()]);
    let server = Running::serve(command).await;
    let client = held_client(&world, &server);
    let all = world.build.outputs().len();
    until("what lies elsewhere", async || {
        world.wrong_below(&world.exec_root()).len() < all
    })
    .await;
    ends(server).await;
    in_time(client).await.unwrap();
    is_completed_by_the_next(&world, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_does_not_open_does_not_keep_it() {
    let world = World::new().await;
    let record = world.path("state/record");
    std::fs::create_dir_all(&record).unwrap();
    if !may_hang(&record).await {
        return;
    }
    let mut command = behind_hung(&record, env!("CARGO_BIN_EXE_outhaul"));
    command
        .args(["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none"])
        .args([world.state(), world.cache_flag()]);
    let mut daemon = Running::start(command);
    // Written right before the store is opened.
    until("the record is being opened", async || {
        std::path::Path::new(&world.path("state/record.opening")).exists()
    })
    .await;
    daemon.signal(Signal::TERM);
    let ended = tokio::time::timeout(DEADLINE, daemon.end()).await;
    assert_eq!(ended.expect("it ends"), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_that_hangs_does_not_keep_it() {
    let world = World::new().await;
    let server = world.serve(&["--on-settled=sleep 1000"]).await;
    world.play(&world.build, server.address()).await;
    ends(server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_it_at_once_and_loses_nothing() {
    let world = World::new().await;
    for rpc in [Rpc::BatchRead, Rpc::StreamRead] {
        let faults = world.cache.faults();
        faults.request(rpc, RequestFault::Stall, Times::Always);
    }
    // Nobody drops this connection, so the listeners would take their time.
    let mut server = world.serve(&[]).await;
    let address = server.address().trim_start_matches("grpc://").to_owned();
    let _silent = tokio::net::TcpStream::connect(&address).await.unwrap();
    let client = held_client(&world, &server);
    until("the cache is asked", async || world.cache.faults().fired() > 0).await;
    server.signal(Signal::TERM);
    server.logged("shutting down: SIGTERM").await;
    server.signal(Signal::INT);
    let code = server.end().await;
    assert!(matches!(code, Some(0 | 1)), "{code:?}");
    client.abort();
    unblock(&world);
    is_completed_by_the_next(&world, &[]).await;
}
