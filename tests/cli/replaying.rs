//! Builds that a daemon dies of when it goes on with them.

use outhaul_testkit::{
    Running,
    cache::{RequestFault, Rpc, Times},
    finish, until,
};
use rustix::process::Signal;

use crate::support::{World, outhaul};

/// The invocation as `status` prints it.
async fn status(world: &World) -> String {
    let mut command = outhaul();
    command
        .args(["status", "--json", &world.build.invocation_id()])
        .arg(world.state());
    finish(command).await.expect(0).out()
}

/// Files of the journal with an ending.
fn journals(world: &World, ending: &str) -> Vec<std::path::PathBuf> {
    let found = std::fs::read_dir(world.path("state/journal")).unwrap();
    let found = found.map(|entry| entry.unwrap().path());
    found
        .filter(|path| path.extension().is_some_and(|e| e == ending))
        .collect()
}

/// A daemon that ended while a build's outputs were on their way, which they are for good.
async fn broken_off(world: &World) {
    let faults = world.cache.faults();
    faults.request(Rpc::StreamRead, RequestFault::Stall, Times::Always);
    faults.request(Rpc::BatchRead, RequestFault::Stall, Times::Always);
    // As Bazel does before it executes anything: a build that is gone on with makes none.
    std::fs::create_dir_all(world.exec_root().join("bazel-out")).unwrap();
    let server = world.serve(&["--hold=none"]).await;
    world.play(&world.build, server.address()).await;
    end(server).await;
}

/// One that goes on with the build, and dies of that.
async fn dies(world: &World, signal: Signal) {
    let mut server = world.serve(&[]).await;
    server.logged("resumed a stream from the journal").await;
    assert_eq!(journals(world, "replaying").len(), 1);
    server.signal(signal);
    server.end().await;
}

async fn complete(world: &World) {
    until("the build is complete", async || {
        world.wrong_below(&world.exec_root()).is_empty()
    })
    .await;
}

async fn end(mut server: Running) {
    server.signal(Signal::TERM);
    assert_eq!(server.end().await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_whose_output_root_was_deleted_since_is_not_gone_on_with() {
    let world = World::new().await;
    broken_off(&world).await;
    std::fs::remove_dir_all(world.exec_root()).unwrap();
    let server = world.serve(&[]).await;
    let log = server.logged("it was there when this build began").await;
    assert!(!log.contains("ERROR"), "{log}");
    until("the build says why", async || {
        status(&world)
            .await
            .contains("it was there when this build began")
    })
    .await;
    assert!(!world.exec_root().exists());
    end(server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_journal_that_two_starts_died_of_is_set_aside_and_kept() {
    let world = World::new().await;
    broken_off(&world).await;
    dies(&world, Signal::ABORT).await;
    assert!(journals(&world, "set-aside").is_empty());
    dies(&world, Signal::KILL).await;

    let server = world.serve(&[]).await;
    let log = server.logged("its journal was moved to").await;
    assert!(
        log.contains("2 times in a row") && log.contains("restart outhaul"),
        "{log}"
    );
    let aside = journals(&world, "set-aside").remove(0);
    assert!(log.contains(&aside.display().to_string()), "{log}");
    assert!(journals(&world, "journal").is_empty() && journals(&world, "replaying").is_empty());
    let reported = status(&world).await;
    assert!(reported.contains("its journal was moved to"), "{reported}");
    end(server).await;

    // As the message says.
    std::fs::rename(&aside, aside.with_extension("journal")).unwrap();
    world.cache.faults().clear();
    let server = world.serve(&[]).await;
    complete(&world).await;
    end(server).await;
    assert!(journals(&world, "replaying").is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_is_ended_costs_no_build_its_outputs() {
    let world = World::new().await;
    broken_off(&world).await;
    dies(&world, Signal::KILL).await;
    // Killed before it is gone on with, ended in good order, as often as you like.
    for _ in 0..3 {
        let mut server = world.serve(&[]).await;
        assert_eq!(journals(&world, "journal").len(), 1);
        server.kill();
    }
    for _ in 0..3 {
        let server = world.serve(&[]).await;
        server.logged("resumed a stream from the journal").await;
        end(server).await;
    }
    world.cache.faults().clear();
    let server = world.serve(&[]).await;
    complete(&world).await;
    end(server).await;
    assert!(journals(&world, "set-aside").is_empty());
}
