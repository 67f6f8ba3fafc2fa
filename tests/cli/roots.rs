//! Builds in very many output roots, one after the other, with few descriptors.

use outhaul::{
    demo::{Setting, Shape, play},
    digest::Digest,
};
use tokio::process::Command;

use crate::support::{PATIENCE, Server, World, clean};

/// Roots, each of a build of its own.
const ROOTS: usize = 120;

/// Plays the builds to a daemon that may have so many files open, and gives the most that it had between them.
async fn most_open(files: usize) -> usize {
    let world = World::new().await;
    let mut command = clean(Command::new("sh"));
    command
        .args(["-c", &format!("ulimit -n {files} && exec \"$@\""), "sh"])
        .arg(env!("CARGO_BIN_EXE_outhaul"))
        .args(["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none"])
        .args([world.state(), world.cache_flag()]);
    let server = Server::start(command).await;
    let shape = Shape {
        targets: 3,
        files_per_target: 8,
        file_size: 100,
        dirs_per_target: 2,
        ..Shape::default()
    };
    let filled = shape.fill(world.cache.store());
    let open = format!("/proc/{}/fd", server.child.id().unwrap());
    let mut most = 0;
    for n in 0..ROOTS {
        let root = world.dir.path().join(format!("{n}/execroot/_main"));
        std::fs::create_dir_all(root.join("bazel-out")).unwrap();
        let setting = Setting {
            workspace: world.path("workspace"),
            exec_root: root.display().to_string(),
            remote_cache: world.cache.endpoint(),
            instance_name: String::new(),
        };
        let id = filled.invocation_id(n as u64);
        let played = play(server.door(), &id, &id, filled.events(&setting, &id));
        tokio::time::timeout(PATIENCE, played).await.unwrap().unwrap();
        // Acknowledged, so all of it is there.
        for (path, digest) in filled.outputs() {
            let bytes = std::fs::read(root.join(&path));
            let bytes = bytes.unwrap_or_else(|e| panic!("build {n}: {path}: {e}"));
            assert_eq!(
                Digest::of(digest.function(), &bytes),
                *digest,
                "build {n}: {path}"
            );
        }
        most = most.max(std::fs::read_dir(&open).unwrap().count());
    }
    most
}

#[tokio::test(flavor = "multi_thread")]
async fn roots_of_settled_builds_keep_no_descriptors_but_for_those_used_last() {
    let most = most_open(1024).await;
    assert!(most < 2 * ROOTS, "{most} files are open");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_lacks_nothing_for_want_of_descriptors_that_idle_roots_hold() {
    // Less than the roots that are kept open would have.
    most_open(96).await;
}
