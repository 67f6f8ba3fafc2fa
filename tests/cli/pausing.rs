//! Downloads that are paused, and go on again.

use crate::{
    staging::stop,
    support::{World, run},
};

#[tokio::test(flavor = "multi_thread")]
async fn no_build_waits_for_what_is_paused_and_commands_say_why_they_wait() {
    let world = World::new().await;
    let server = world.serve(&[]).await;
    let state = world.state();
    run(["resume", &state]).await.says(0, &["were not paused"]);
    run(["pause", &state, "--all"])
        .await
        .says(0, &["all downloads are paused (`outhaul pause --all`)"]);
    // Its end would be held back until its outputs are there.
    world.play(&world.build, server.address()).await;
    let (output, _) = world.file("app/app");
    let path = world.exec_root().join(&output.path);
    assert!(!path.exists());
    run(["status", &state]).await.says(0, &["`outhaul resume`"]);
    run(["wait", &state, "--timeout=5s"])
        .await
        .says(4, &["waiting: all downloads are paused"]);
    // What a build waits for is not paused any more.
    run(["pause", &state, "--for=1h"])
        .await
        .says(0, &["optional outputs are paused for another "]);
    run(["get", &state, path.to_str().unwrap()]).await.expect(0);
    run(["resume", &state]).await.says(0, &["downloads are resumed"]);
    // A target of it is broken.
    run(["wait", &state]).await.expect(1);
    world.assert_complete();
    run(["pause", &state, "--for=0s"])
        .await
        .says(2, &["--for=0s: must be greater than zero"]);
    stop(server).await;
    for command in ["pause", "resume"] {
        run([command, &state]).await.says(1, &["no daemon answers on "]);
    }
}
