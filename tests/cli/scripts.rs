//! The script of `dist/ci` with a build tool that only plays: what it does when things are not as they should be.

use std::{path::Path, process::Command};

use outhaul_testkit::{clean, finish, free_address, until};

use crate::support::{World, program};

/// `dist/ci/build` with a build tool that is this shell script.
fn build(world: &World, port: &str, bazel: &str) -> Command {
    let path = world.path("bazel");
    program(&path, &format!("#!/bin/sh\n{bazel}\n"));
    let program = Path::new(env!("CARGO_BIN_EXE_outhaul")).parent().unwrap();
    let mut command = clean(Command::new(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("dist/ci/build"),
    ));
    command
        .arg("//...")
        .env(
            "PATH",
            format!("{}:{}", program.display(), std::env::var("PATH").unwrap()),
        )
        .env("OUTHAUL_REMOTE_CACHE", world.cache.endpoint())
        .env("OUTHAUL_PORT", port)
        .env("ARTIFACTS", world.path("artifacts"))
        .env("BAZEL", path);
    command
}

fn port(address: &str) -> String {
    address.rsplit_once(':').unwrap().1.to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_build_script_does_not_take_somebody_elses_daemon_for_its_own() {
    let world = World::new().await;
    let server = world.serve(&[]).await;
    let mut command = build(&world, &port(server.address()), "echo built");
    command.env("OUTHAUL_LOG", "error");
    let ran = finish(command).await.says(1, &["--bes-listen", "in use"]);
    assert!(!ran.out().contains("built"), "{}", ran.out());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_build_script_keeps_what_the_backend_has_not_got() {
    let world = World::new().await;
    let address = free_address();
    let (ready, played) = (world.path("ready"), world.path("played"));
    let bazel = format!("touch '{ready}'; until [ -e '{played}' ]; do sleep 0.1; done; exit 37");
    let mut command = build(&world, &address.port().to_string(), &bazel);
    command
        .env("OUTHAUL_BES_BACKEND", "grpc://127.0.0.1:1")
        .env("OUTHAUL_LOG", "error")
        .env("OUTHAUL_LOG_JSON", "true");
    let play = async {
        until("the build tool is started", async || Path::new(&ready).exists()).await;
        world.play(&world.build, &format!("grpc://{address}")).await;
        std::fs::write(&played, "").unwrap();
    };
    let (ran, ()) = tokio::join!(finish(command), play);
    let ran = ran.says(37, &["not everything has got to grpc://127.0.0.1:1"]);
    let (_, rest) = ran.err.split_once("--state-dir=").unwrap();
    let (kept, _) = rest.split_once('`').unwrap();
    let journals = std::fs::read_dir(Path::new(kept).join("journal")).unwrap();
    let journals: Vec<_> = journals.map(|entry| entry.unwrap().path()).collect();
    std::fs::remove_dir_all(kept).unwrap();
    assert!(
        journals
            .iter()
            .any(|path| path.extension().is_some_and(|e| e == "journal")),
        "{journals:?}"
    );
}
