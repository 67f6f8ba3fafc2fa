//! A client in another language, generated from `control.proto` as any user would.

use std::process::Command;

use outhaul_testkit::{clean, finish, peers, until};
use serde_json::json;

use crate::{
    control::stall,
    support::World,
    waiting::{PERSISTENT, unblock},
};

const PEER: &str = "grpc-python";

#[tokio::test(flavor = "multi_thread")]
async fn a_python_client_generated_from_the_protocol_works() {
    if !peers::are_there("a_python_client_generated_from_the_protocol_works", &[PEER]) {
        return;
    }
    let world = World::new().await;
    stall(&world);
    let args = [PERSISTENT, &["--rule=known label=//assets:tree"]].concat();
    let mut server = world.serve(&args).await;
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
    // One that has ended has said why.
    let said = async |name: &str| {
        let file = std::path::PathBuf::from(world.path(&format!("generated/{name}")));
        until(name, async || file.exists() || client.is_finished()).await;
    };
    said("listening").await;
    world.play(&world.build, server.address()).await;
    said("following").await;
    unblock(&world);
    let ran = client.await.unwrap().expect(0);
    assert!(ran.out().contains("all answered"), "{}{}", ran.out(), ran.err);
    assert!(world.exec_root().join(&world.file("index.html").0.path).exists());
    assert!(server.is_running());
}
