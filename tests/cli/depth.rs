//! Directories deeper than a stack, a path or the descriptors of a process, wherever somebody may have made them.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Command,
};

use outhaul_testkit::{Running, clean, finish};
use rustix::fs::{Mode, OFlags, mkdirat, open, openat};

use crate::support::World;

const DEPTH: usize = 4000;

fn nest(path: &Path) {
    std::fs::create_dir_all(path).unwrap();
    let mut here: OwnedFd = open(path, OFlags::PATH, Mode::empty()).unwrap();
    for _ in 1..DEPTH {
        mkdirat(&here, "d", Mode::from_raw_mode(0o755)).unwrap();
        here = openat(&here, "d", OFlags::PATH, Mode::empty()).unwrap();
    }
}

/// The binary, with few descriptors for good.
fn outhaul(args: &[&str]) -> Command {
    let mut command = clean(Command::new("bash"));
    command
        .args([
            "-c",
            "ulimit -n 400; exec \"$0\" \"$@\"",
            env!("CARGO_BIN_EXE_outhaul"),
        ])
        .args(args);
    command
}

/// Every place of a file below a directory is taken by directories in directories.
fn occupy(world: &World, root: &Path) {
    for suffix in ["lib.a", "app"] {
        let output = world.build.outputs().iter().find(|o| o.path.ends_with(suffix));
        if let Some(output) = output {
            nest(&root.join(&output.path));
        }
    }
    let first = world.build.outputs().first().unwrap();
    let path = root.join(&first.path);
    if !path.exists() {
        nest(&path);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn directories_of_any_depth_are_removed_wherever_they_are_in_the_way() {
    let world = World::new().await;
    occupy(&world, &world.exec_root());
    nest(&world.dir.path().join(".outhaul-tmp/4711-dead"));
    for n in 1..=5 {
        nest(&PathBuf::from(
            world.path(&format!("state/record.quarantined-{n}")),
        ));
    }
    nest(&PathBuf::from(world.path("state/record.compact")));
    let mut command = outhaul(&["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none"]);
    command.args([world.state(), world.cache_flag()]);
    let mut server = Running::serve(command).await;
    world.play(&world.build, server.address()).await;
    world.assert_complete();
    assert!(!world.dir.path().join(".outhaul-tmp/4711-dead").exists());

    let to = world.path("to");
    occupy(&world, Path::new(&to));
    nest(&Path::new(&to).join(".outhaul-tmp/4711-dead"));
    let mut command = outhaul(&["stage", "--to", &to]);
    command.arg(world.state());
    finish(command).await.expect(0);
    assert_eq!(world.wrong_below(to.as_ref()), Vec::<String>::new());
    server.signal(rustix::process::Signal::TERM);
    assert_eq!(server.end().await, Some(0));

    let out = world.path("out");
    occupy(&world, Path::new(&out));
    nest(&Path::new(&out).join(".outhaul-tmp/4711-dead"));
    let file = world.event_file();
    let mut command = outhaul(&["fetch", "bep", &file, "--output-dir", &out]);
    command.arg(world.cache_flag());
    finish(command).await.expect(0);
    assert_eq!(world.wrong_below(out.as_ref()), Vec::<String>::new());

    // What is left would be too much for the code that removes the directory.
    let mut command = Command::new("rm");
    command.arg("-rf").arg(world.path("state"));
    finish(command).await.expect(0);
}
