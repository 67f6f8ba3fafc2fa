//! Disk space: what recorded outputs take, and freeing it.

use std::{collections::HashSet, path::Path};

use outhaul::{
    demo::play,
    proto::build_event_stream::{BuildEvent, build_event::Payload, build_event_id::Id},
};
use outhaul_testkit::{Ran, finish, in_time, until};
use prost::Message as _;

use crate::{
    staging::stop,
    support::{World, outhaul},
};

async fn ask(world: &World, command: &str, args: &[&str]) -> Ran {
    let mut process = outhaul();
    process.args([command, "--json"]).args(args).arg(world.state());
    finish(process).await
}

/// The build run again, for the first of its targets alone: plays it to a daemon, and gives back that target's label.
async fn play_first_target(world: &World, address: &str) -> String {
    let again = world.build.incremental();
    let events: Vec<(Vec<u8>, BuildEvent)> = again
        .events()
        .map(|bytes| (bytes.clone(), BuildEvent::decode(&*bytes).unwrap()))
        .collect();
    let id = |event: &BuildEvent| event.id.clone().and_then(|id| id.id);
    let label = events.iter().find_map(|(_, event)| match id(event) {
        Some(Id::TargetCompleted(id)) => Some(id.label),
        _ => None,
    });
    let label = label.unwrap();
    // The sets that it refers to, and those that these refer to.
    let mut sets = HashSet::new();
    for _ in 0..events.len() {
        for (_, event) in &events {
            match (id(event), &event.payload) {
                (Some(Id::TargetCompleted(id)), Some(Payload::Completed(completed))) if id.label == label => {
                    let groups = completed.output_group.iter();
                    sets.extend(groups.flat_map(|group| group.file_sets.iter().map(|set| set.id.clone())));
                }
                (Some(Id::NamedSet(id)), Some(Payload::NamedSetOfFiles(set))) if sets.contains(&id.id) => {
                    sets.extend(set.file_sets.iter().map(|set| set.id.clone()));
                }
                _ => {}
            }
        }
    }
    let kept = events.into_iter().filter(|(_, event)| match id(event) {
        Some(Id::TargetCompleted(id)) => id.label == label,
        Some(Id::NamedSet(id)) => sets.contains(&id.id),
        _ => true,
    });
    let events: Vec<Vec<u8>> = kept.map(|(bytes, _)| bytes).collect();
    let (id, build_id) = (again.invocation_id(), again.build_id());
    let played = play(address, &id, &build_id, events.into_iter());
    in_time(played).await.unwrap();
    label
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_newest_build_does_not_want_is_removed_and_comes_back() {
    let world = World::new().await;
    let server = world.serve(&[]).await;
    world.play(&world.build, server.address()).await;
    let files = ask(&world, "du", &[]).await.expect(0).json().remove(0);
    assert_eq!(files["name"], world.path("workspace"));
    let bytes = files["bytes"].as_u64().unwrap();
    assert!(bytes > 1 << 20, "{files}");

    // However the workspace is written.
    let workspace = world.path("workspace");
    std::fs::create_dir_all(world.dir.path().join("workspace/app")).unwrap();
    std::fs::write(world.dir.path().join("workspace/MODULE.bazel"), "").unwrap();
    std::os::unix::fs::symlink(&workspace, world.path("link")).unwrap();
    for named in ["workspace/app", "workspace/app/..", "link", "link/app"] {
        let named = format!("--workspace={}", world.path(named));
        let found = ask(&world, "du", &[&named]).await.expect(0).json().remove(0);
        assert_eq!(found["name"], workspace, "{named}");
    }
    for (command, to_free) in [("du", None), ("evict", Some("--to-free=1"))] {
        let mut args = vec!["--workspace=/nowhere"];
        args.extend(to_free);
        let unknown = ask(&world, command, &args).await;
        unknown.says(3, &["no outputs of a workspace /nowhere are recorded"]);
    }

    // All of it is the newest build's.
    let ran = ask(&world, "evict", &["--to-free=1"]).await;
    ran.says(
        1,
        &["--to-free=1: only 0 B can be freed", "wanted by the newest build"],
    );
    world.assert_complete();

    let wanted = play_first_target(&world, server.address()).await;
    stop(server).await;
    // Without a daemon.
    let ran = ask(&world, "evict", &["--to-free=1TiB"]).await;
    let removed = ran.json();
    ran.says(1, &["can be freed"]);
    assert!(!removed.is_empty());
    for output in &removed {
        assert_ne!(output["label"], wanted);
        assert!(!Path::new(output["path"].as_str().unwrap()).exists());
    }
    let lacks = world.wrong_below(&world.exec_root());
    assert_eq!(lacks.len(), removed.len(), "{lacks:?}");
    let server = world.serve(&[]).await;
    world.play(&world.build, server.address()).await;
    world.assert_complete();
    play_first_target(&world, server.address()).await;
    stop(server).await;
    // No disk has twice its size free.
    let server = world.serve(&["--auto-evict", "--min-free-space=100%"]).await;
    until("it is removed", async || {
        !world.wrong_below(&world.exec_root()).is_empty()
    })
    .await;
    stop(server).await;
    let mut lacks_now = world.wrong_below(&world.exec_root());
    lacks_now.retain(|path| !lacks.contains(path));
    assert_eq!(lacks_now, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn output_bases_of_workspaces_that_are_gone_are_shown_and_then_removed() {
    let world = World::new().await;
    let workspace = world.path("workspace");
    std::fs::create_dir(&workspace).unwrap();
    std::fs::write(world.path("DO_NOT_BUILD_HERE"), &workspace).unwrap();
    let server = world.serve(&[]).await;
    world.play(&world.build, server.address()).await;
    let ran = ask(&world, "gc", &["--orphans", "--yes"]).await.expect(0);
    assert_eq!(ran.json().len(), 0, "its workspace is there");
    std::fs::remove_dir(&workspace).unwrap();
    // The state directory would go with this output base.
    stop(server).await;
    let elsewhere = tempfile::tempdir().unwrap();
    let state = elsewhere.path().join("state");
    std::fs::rename(world.path("state"), &state).unwrap();
    let state = format!("--state-dir={}", state.display());
    let mut wrong = outhaul();
    wrong.args(["gc", "--orphans", "--dry-run", "--yes", &state]);
    finish(wrong).await.says(2, &["cannot be used with"]);
    let orphans = async |args: &[&str]| {
        let mut process = outhaul();
        process.args(["gc", "--orphans", "--json", &state]).args(args);
        finish(process).await.expect(0)
    };
    let shown = orphans(&["--dry-run"]).await.json().remove(0);
    assert_eq!(shown["workspace"], workspace);
    assert!(
        shown["bytes"].as_u64() > Some(1 << 20) && shown["kept"].is_null(),
        "{shown}"
    );
    assert!(world.exec_root().exists(), "it was only shown");
    orphans(&["--yes"]).await;
    assert!(!world.exec_root().exists());
    assert_eq!(orphans(&[]).await.json().len(), 0);
}
