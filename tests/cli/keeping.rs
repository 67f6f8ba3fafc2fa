//! What becomes of recorded builds: taken elsewhere, and forgotten.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use outhaul_testkit::{PATIENCE, Ran, Running, finish};
use serde_json::Value;

use crate::{
    staging::{entries, is_staged, recorded, stage, stop},
    support::{World, outhaul, run},
};

async fn gc(world: &World, args: &[&str]) -> Ran {
    let mut command = outhaul();
    command
        .args(["gc", "--json", "--max-age=1d"])
        .args(args)
        .arg(world.state());
    finish(command).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_never_ran_the_build_stages_from_its_export() {
    let world = World::new().await;
    let server = recorded(&world).await;
    let file = world.path("build.outhaul");
    let id = world.build.invocation_id();
    let mut command = outhaul();
    command.args(["export", &id, "-o", &file]).arg(world.state());
    finish(command).await.expect(0);
    stop(server).await;
    // Without a daemon, and to standard output, it is the same file.
    let mut command = outhaul();
    command.args(["export", "-o", "-"]).arg(world.state());
    assert_eq!(
        finish(command).await.expect(0).stdout,
        std::fs::read(&file).unwrap()
    );
    // Nothing of the first machine is left but the file.
    std::fs::remove_dir_all(world.dir.path().join("execroot")).unwrap();
    std::fs::remove_dir_all(world.dir.path().join("state")).unwrap();

    let state = format!("--state-dir={}", world.path("elsewhere"));
    for said in ["imported build", "recorded here already"] {
        let ran = run(["import", &file, &state]).await.expect(0);
        assert!(ran.err.contains(said), "{}", ran.err);
    }
    // The file does not say who is sent credentials.
    let header = "--remote-header=x-token=abc";
    let to = world.path("refused");
    let args = ["stage", "--invocation", &id, "--to", &to, header, &state];
    let before = world.cache.stats();
    run(args)
        .await
        .says(1, &["--remote-cache", "--allow-remote-cache"]);
    let asked = world.cache.stats().since(&before);
    assert_eq!((asked.batch_reads, asked.stream_reads), (0, 0));
    assert!(!Path::new(&to).exists(), "nothing was written");
    let named = world.cache_flag();
    let allowed = named.replace("--remote-cache=", "--allow-remote-cache=");
    for flag in [&named, &allowed] {
        run(args.into_iter().chain([flag.as_str()])).await.expect(0);
        std::fs::remove_dir_all(&to).unwrap();
    }
    let to = world.path("out");
    run(["stage", "--invocation", &id, "--to", &to, &state])
        .await
        .expect(0);
    assert_eq!(world.wrong_below(to.as_ref()), Vec::<String>::new());
    let ran = run(["status", "--json", &id, &state]).await.expect(0);
    assert_eq!(ran.json()[0]["state"], "settled");
    assert!(
        ran.json()[0]["targets"]
            .as_array()
            .unwrap()
            .iter()
            .any(|t| t["label"] == "//app:app")
    );
    let ran = run(["ls", "--json", &id, &state]).await.expect(0);
    assert_eq!(ran.json().len(), world.build.outputs().len());
    assert!(ran.json().iter().all(|o| o["state"] == "known"));

    // A daemon finds nothing to do for it, and it is not what its workspace was built with last.
    let mut serve = outhaul();
    serve.args([
        "serve",
        "--bes-listen=127.0.0.1:0",
        "--admin-listen=none",
        &state,
        &world.cache_flag(),
    ]);
    let server = Running::serve(serve).await;
    assert!(!world.exec_root().exists(), "nothing is written for it unasked");
    std::fs::create_dir_all(world.exec_root()).unwrap();
    let ran = run(["import", &file, &state]).await;
    ran.says(1, &["--state-dir"]);
    let own = world.build.incremental();
    world.play(&own, server.address()).await;
    let ran = run([
        "stage",
        "--workspace",
        &world.path("workspace/sub"),
        "--to",
        &world.path("own"),
        &state,
    ])
    .await;
    ran.expect(0);
    let answer = is_staged(&world.path("own"), &[])
        .await
        .expect(0)
        .json()
        .remove(0);
    assert_eq!(answer["invocation_ids"], serde_json::json!([own.invocation_id()]));

    let damaged = world.path("damaged");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&damaged, &bytes[..bytes.len() - 9]).unwrap();
    let other = format!("--state-dir={}", world.path("third"));
    run(["import", &damaged, &other])
        .await
        .says(1, &[&damaged, "at byte"]);
    run(["import", "/no/such", &other]).await.says(2, &["/no/such"]);
    let ran = run(["status", "--json", &other]).await.expect(0);
    assert_eq!(ran.json(), Vec::<Value>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn gc_shows_its_plan_and_keeps_what_was_staged_lately() {
    let world = World::new().await;
    let server = recorded(&world).await;
    let second = world.build.incremental();
    world.play(&second, server.address()).await;
    let ran = run(["gc", &world.state()]).await;
    ran.says(1, &["daemon", "--retention-age"]);
    stop(server).await;
    let state = world.dir.path().join("state/journal");
    let journals = || {
        entries(&state)
            .into_iter()
            .filter(|p| p.extension().is_some_and(|e| e == "settled"))
            .collect::<Vec<_>>()
    };
    assert_eq!(journals().len(), 2);
    for journal in journals() {
        let file = std::fs::File::options().append(true).open(journal).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(9 * 86400))
            .unwrap();
    }
    let first = world.build.invocation_id();
    stage(&world, &world.path("out"), &["--invocation", &first, "//lib:lib"])
        .await
        .expect(0);
    let timestamp = world.dir.path().join("out/.outhaul/staged.timestamp");
    assert!(
        timestamp
            .metadata()
            .unwrap()
            .modified()
            .unwrap()
            .elapsed()
            .unwrap()
            < PATIENCE
    );

    let ran = gc(&world, &["--dry-run"]).await.expect(0);
    let planned = ran.json();
    assert_eq!(planned.len(), 1, "{planned:?}");
    assert_eq!(
        (&planned[0]["kind"], &planned[0]["invocation_id"]),
        (&"journal".into(), &second.invocation_id().into())
    );
    assert_eq!(journals().len(), 2, "a plan deletes nothing");
    gc(&world, &[]).await.expect(0);
    assert_eq!(journals().len(), 1);
    assert_eq!(gc(&world, &[]).await.expect(0).json(), Vec::<Value>::new());
    stage(
        &world,
        &world.path("again"),
        &["--invocation", &first, "//lib:lib"],
    )
    .await
    .expect(0);
    // By size what was not used for longest goes.
    gc(&world, &["--max-size=0"]).await.expect(0);
    assert_eq!(journals().len(), 0);
    run(["gc", "--max-age=x", &world.state()])
        .await
        .says(2, &["--retention-age=x"]);
    run(["gc", "--max-age=14", &world.state()])
        .await
        .says(2, &["--retention-age=14", "write 14d"]);
}
