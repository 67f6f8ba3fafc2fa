//! A client in another language, generated from `control.proto` as any user would.

use serde_json::json;
use tokio::process::Command;

use crate::support::{World, clean, finish};

#[path = "../e2e/harness/peers.rs"]
#[allow(dead_code, reason = "the end-to-end tests use the rest")]
mod peers;

const PEER: &str = "grpc-python";

#[tokio::test(flavor = "multi_thread")]
async fn a_python_client_generated_from_the_protocol_works() {
    if !peers::are_there("a_python_client_generated_from_the_protocol_works", &[PEER]) {
        return;
    }
    let world = World::new().await;
    let mut server = world.serve(&["--rule=known label=//assets:tree"]).await;
    let asked = json!({
        "socket": world.path("state/control.sock"),
        "protos": concat!(env!("CARGO_MANIFEST_DIR"), "/proto"),
        "generated": world.path("generated"),
        "workspace": world.path("workspace"),
        "invocation_id": world.build.invocation_id(),
        "wanted": world.file("app/app").0.path,
        "size": world.file("app/app").1.size(),
        "known": world.file("index.html").0.path,
    });
    std::fs::create_dir(world.path("generated")).unwrap();
    // Begins to watch and wait before there is a build, and says so.
    let mut command = clean(Command::new(peers::program(PEER)));
    command
        .arg(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/cli/control_client.py"
        ))
        .arg(asked.to_string());
    let client = tokio::spawn(finish(command));
    let listening = world.path("generated/listening");
    let deadline = tokio::time::Instant::now() + crate::support::PATIENCE;
    while !std::path::Path::new(&listening).exists() && !client.is_finished() {
        assert!(
            tokio::time::Instant::now() < deadline,
            "the client does not listen"
        );
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    if !client.is_finished() {
        world.play(&world.build, server.door()).await;
    }
    let ran = client.await.unwrap().expect(0);
    assert!(ran.out().contains("all answered"), "{}{}", ran.out(), ran.err);
    assert!(world.exec_root().join(&world.file("index.html").0.path).exists());
    assert!(server.is_running());
}
