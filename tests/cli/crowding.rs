//! Connections that are only held open, by anyone who can connect, keep no build and no probe out.

use std::{process::Command, time::Duration};

use outhaul::proto::outhaul::v1::{ListInvocationsRequest, watch_invocation_response::Event};
use outhaul_testkit::{Running, clean, in_time};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UnixStream},
};

use crate::{
    control::{all, by_id, client, watch},
    support::World,
};

/// Files that the daemon may have open.
const FILES: usize = 256;

#[tokio::test(flavor = "multi_thread")]
async fn held_connections_at_every_listener_keep_nobody_out_and_leave_files_for_builds() {
    let world = World::new().await;
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("ulimit -n {FILES} && exec \"$@\""), "sh"])
        .arg(env!("CARGO_BIN_EXE_outhaul"))
        .args(["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0"])
        .args([world.state(), world.cache_flag()])
        .arg(format!("--bes-listen=unix:{}", world.path("bes.sock")));
    let server = Running::serve(clean(command)).await;
    let log = server.logged("health and metrics on http://").await;
    let admin = log.split("health and metrics on http://").nth(1).unwrap();
    let admin = admin.lines().next().unwrap().trim();
    let events = server.address().trim_start_matches("grpc://").to_owned();
    // Who has a call under way keeps the place.
    let mut waiter = client(&world).await;
    let watched = watch(&mut waiter, by_id(&world.build.invocation_id())).await;
    let mut tcp = Vec::new();
    let mut unix = Vec::new();
    for n in 0..3 * FILES {
        for (address, half) in [(admin, "GET /healthz HT"), (&events, "PRI * HTTP/2.0\r\n")] {
            let mut held = connect(address).await;
            // What was displaced already does not take it.
            let _ = held.write_all(&half.as_bytes()[..n % (half.len() + 1)]).await;
            tcp.push(held);
        }
        for socket in ["bes.sock", "state/control.sock"] {
            let connecting = UnixStream::connect(world.path(socket));
            unix.push(in_time(connecting).await.unwrap());
        }
    }
    let pid = server.id();
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    assert!(files < FILES * 3 / 4, "{files} files are open");

    world.play(&world.build, server.address()).await;
    world.assert_complete();
    assert!(matches!(all(watched).await.last(), Some(Event::Settled(_))));
    let mut probe = connect(admin).await;
    let request = format!("GET /healthz HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n");
    probe.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    let reading = probe.read_to_string(&mut answer);
    in_time(reading).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let mut control = client(&world).await;
    let listed = control.list_invocations(ListInvocationsRequest::default());
    let listed = in_time(listed).await.unwrap();
    assert_eq!(listed.into_inner().invocations.len(), 1);
}

/// Nobody waits in a queue.
async fn connect(address: &str) -> TcpStream {
    let connecting = TcpStream::connect(address);
    tokio::time::timeout(Duration::from_secs(20), connecting)
        .await
        .unwrap()
        .unwrap()
}
