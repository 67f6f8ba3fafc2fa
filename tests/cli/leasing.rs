//! Leases, as users see them: what the cache has lost is reported with the targets to build again, and comes back.

use outhaul_testkit::until;
use serde_json::Value;

use crate::support::{World, run};

/// The newest invocation, once this many of its outputs are lost.
async fn status(world: &World, evicted: u64) -> Value {
    let mut status = Value::Null;
    until("outputs are lost", async || {
        let ran = run(["status", "--json", &world.state()]).await.expect(0);
        status = ran.json().remove(0);
        status["evicted"] == evicted && status["state"] == "settled"
    })
    .await;
    status
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_cache_loses_is_reported_and_can_be_downloaded_once_it_is_back() {
    let world = World::new().await;
    let server = world
        .serve(&["--lease-renewal=200ms", "--download=minimal"])
        .await;
    world.play(&world.build, server.address()).await;
    status(&world, 0).await;
    let (output, digest) = world.file("lib/liblib.a");
    let bytes = world.cache.store().get(digest).unwrap();
    let path = world.exec_root().join(&output.path).display().to_string();
    world.cache.store().remove(digest);

    let lost = status(&world, 1).await;
    assert_eq!(lost["evicted_target_count"], 1);
    let targets = lost["evicted_targets"].as_array().unwrap();
    assert_eq!(targets.len(), 1, "{lost:#}");
    let target = targets[0].as_str().unwrap();
    let ran = run(["status", &world.state()]).await.expect(0);
    assert!(
        ran.out().contains(&format!(
            "1 outputs of its output root are no longer in the cache; to get them, build again: {target}"
        )),
        "{}",
        ran.out()
    );
    let ran = run(["stat", &path, &world.state()]).await.expect(0);
    assert!(
        ran.out().contains("state: evicted")
            && ran.out().contains("reason: it is no longer in the remote cache"),
        "{}",
        ran.out()
    );
    // It is a note; who wants the output still asks the cache.
    let ran = run(["get", &path, &world.state()]).await;
    ran.says(1, &["evicted"]);
    world.cache.store().put(bytes);
    run(["get", &path, &world.state()]).await.expect(0);
    let ran = run(["stat", "--json", &path, &world.state()]).await.expect(0);
    assert_eq!(ran.json()[0]["state"], "materialized");
    status(&world, 0).await;
}
