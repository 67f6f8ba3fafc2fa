//! Socket activation, ending when idle, and what the service manager hears.

use std::{
    net::TcpListener,
    os::{
        fd::OwnedFd,
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixDatagram, UnixListener},
    },
    process::{Command, Stdio},
    time::Duration,
};

use outhaul::proto::google::devtools::build::v1::{
    BuildEvent, OrderedBuildEvent, PublishBuildToolEventStreamRequest, StreamId, build_event::Event,
    publish_build_event_client::PublishBuildEventClient, stream_id::BuildComponent,
};
use outhaul_testkit::{
    PATIENCE, Running,
    cache::{RequestFault, Rpc, Times},
    clean, finish, in_time, until,
};
use rustix::process::Signal;

use crate::support::{World, outhaul, run};

/// Starts the daemon as systemd does: its sockets are descriptors 3 and 4, and `LISTEN_PID` is the daemon's own.
fn launcher(sockets: [OwnedFd; 2], world: &World, args: &[&str]) -> Command {
    let script = "exec 3<&0 4<&1 </dev/null >/dev/null
        LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=bes:bes exec \"$@\"";
    let mut command = clean(Command::new("sh"));
    let [first, second] = sockets;
    command
        .args(["-c", script, "sh", env!("CARGO_BIN_EXE_outhaul"), "serve"])
        .args(["--admin-listen=none", &world.state(), &world.cache_flag()])
        .args(args)
        .stdin(Stdio::from(first))
        .stdout(Stdio::from(second));
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn inherited_sockets_serve_the_first_connection_and_start_again_after_idleness() {
    let world = World::new().await;
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp_address = format!("grpc://{}", tcp.local_addr().unwrap());
    let path = world.path("bes.sock");
    let unix = UnixListener::bind(&path).unwrap();
    let unix_address = format!("unix:{path}");
    let start = async |args: &[&str]| {
        let sockets = [tcp.try_clone().unwrap().into(), unix.try_clone().unwrap().into()];
        Running::serve(launcher(sockets, &world, args)).await
    };
    // The connection is there before the daemon is, as when it makes systemd start it.
    let played = world.play(&world.build, &tcp_address);
    let ((), mut server) = tokio::join!(played, start(&["--idle-timeout=300ms"]));
    world.assert_complete();
    assert_eq!(server.addresses, [tcp_address.as_str(), unix_address.as_str()]);
    assert_eq!(server.end().await, Some(0));

    let removed = world.exec_root().join(&world.file("app/app").0.path);
    std::fs::remove_file(&removed).unwrap();
    let again = world.build.incremental();
    let played = world.play(&again, &unix_address);
    let ((), mut server) = tokio::join!(played, start(&["--idle-timeout=300ms"]));
    world.assert_complete();
    assert_eq!(server.end().await, Some(0));
    assert!(std::path::Path::new(&path).exists(), "the socket is its maker's");
}

#[tokio::test(flavor = "multi_thread")]
async fn descriptors_that_are_no_sockets_are_refused_in_words() {
    let world = World::new().await;
    let file = || std::fs::File::open("/dev/null").unwrap().into();
    let ran = finish(launcher([file(), file()], &world, &[])).await;
    ran.says(2, &["inherited socket", "fd 3"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_meant_for_another_process_are_left_alone() {
    let world = World::new().await;
    let mut command = outhaul();
    command
        .args(["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none"])
        .args([world.state(), world.cache_flag()])
        .env("LISTEN_FDS", "1")
        .env("LISTEN_PID", "1");
    let server = Running::serve(command).await;
    assert_eq!(server.addresses.len(), 1);
    world.play(&world.build, server.address()).await;
    world.assert_complete();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_does_not_end_while_outputs_are_on_their_way() {
    let world = World::new().await;
    let delay = RequestFault::Delay(Duration::from_millis(1500));
    for rpc in [Rpc::BatchRead, Rpc::StreamRead] {
        world.cache.faults().request(rpc, delay, Times::Always);
    }
    // Held, and not held.
    for (hold, build) in [
        ("invocation", world.build.clone()),
        ("none", world.build.incremental()),
    ] {
        let _ = std::fs::remove_dir_all(world.exec_root().join("bazel-out"));
        let hold = format!("--hold={hold}");
        let mut server = world.serve(&["--idle-timeout=200ms", &hold]).await;
        world.play(&build, server.address()).await;
        assert_eq!(server.end().await, Some(0));
        world.assert_complete();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_does_not_end_while_a_build_says_nothing_for_long() {
    let world = World::new().await;
    let mut server = world.serve(&["--idle-timeout=200ms"]).await;
    let uri = server.address().replace("grpc://", "http://");
    let channel = tonic::transport::Endpoint::from_shared(uri)
        .unwrap()
        .connect()
        .await
        .unwrap();
    let (send, receive) = tokio::sync::mpsc::channel(64);
    let stream_id = StreamId {
        build_id: world.build.build_id(),
        invocation_id: world.build.invocation_id(),
        component: BuildComponent::Tool.into(),
    };
    for (number, value) in (1..).zip(world.build.events().take(6)) {
        let any = prost_types::Any {
            type_url: "type.googleapis.com/build_event_stream.BuildEvent".to_owned(),
            value,
        };
        let event = OrderedBuildEvent {
            stream_id: Some(stream_id.clone()),
            sequence_number: number,
            event: Some(BuildEvent {
                event: Some(Event::BazelEvent(any)),
                ..BuildEvent::default()
            }),
        };
        let request = PublishBuildToolEventStreamRequest {
            ordered_build_event: Some(event),
            ..Default::default()
        };
        send.send(request).await.unwrap();
    }
    let answers = PublishBuildEventClient::new(channel)
        .publish_build_tool_event_stream(tokio_stream::wrappers::ReceiverStream::new(receive))
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(server.is_running(), "an action may take longer than the time-out");
    // The build is cut off; nothing comes any more.
    drop((send, answers));
    assert_eq!(server.end().await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_does_not_end_while_somebody_gets_an_output() {
    let world = World::new().await;
    let mut server = world.serve(&["--download=minimal", "--idle-timeout=1s"]).await;
    world.play(&world.build, server.address()).await;
    let delay = RequestFault::Delay(Duration::from_secs(3));
    for rpc in [Rpc::BatchRead, Rpc::StreamRead] {
        world.cache.faults().request(rpc, delay, Times::Always);
    }
    let path = &world.file("app/app").0.path;
    let asked = world.exec_root().join(path).display().to_string();
    let got = run(["get", &world.state(), &asked]).await;
    got.expect(0);
    assert!(world.exec_root().join(path).exists());
    assert_eq!(server.end().await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_manager_is_notified_when_the_listeners_are_open_and_when_they_close() {
    let world = World::new().await;
    let path = world.path("notify");
    let abstract_name = format!("outhaul-test-{}", std::process::id());
    let abstract_address = SocketAddr::from_abstract_name(&abstract_name).unwrap();
    for (name, socket) in [
        (path.clone(), UnixDatagram::bind(&path).unwrap()),
        (
            format!("@{abstract_name}"),
            UnixDatagram::bind_addr(&abstract_address).unwrap(),
        ),
    ] {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let reported = || {
            let mut message = [0; 64];
            let length = socket.recv(&mut message).unwrap();
            String::from_utf8_lossy(&message[..length]).into_owned()
        };
        let mut command = outhaul();
        command
            .args(["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none"])
            .args([world.state(), world.cache_flag()])
            .env("NOTIFY_SOCKET", name);
        let mut server = Running::serve(command).await;
        assert_eq!(tokio::task::block_in_place(reported), "READY=1");
        server.signal(Signal::TERM);
        assert_eq!(tokio::task::block_in_place(reported), "STOPPING=1");
        assert_eq!(server.end().await, Some(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_whose_log_nobody_reads_any_more_serves_and_ends() {
    let world = World::new().await;
    let path = world.path("bes.sock");
    let mut command = tokio::process::Command::from(outhaul());
    command
        .args([
            "serve",
            "--admin-listen=none",
            &format!("--bes-listen=unix:{path}"),
        ])
        .args([world.state(), world.cache_flag()])
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().unwrap();
    drop(child.stderr.take());
    until("its address", async || std::path::Path::new(&path).exists()).await;
    world.play(&world.build, &format!("unix:{path}")).await;
    world.assert_complete();
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(pid, Signal::TERM).unwrap();
    let ended = in_time(child.wait()).await;
    assert_eq!(ended.unwrap().code(), Some(0));
}
