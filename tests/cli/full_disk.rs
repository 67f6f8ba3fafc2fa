//! A state directory whose disk is full: builds go on, and all is well again once there is space.

use std::{io::Write as _, path::Path, process::Command};

use outhaul_testkit::{clean, finish, until};

use crate::support::{World, run};

/// A small file system, for as long as this lives.
pub struct SmallDisk(String);

impl SmallDisk {
    pub async fn mount(at: &str) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let mut command = clean(Command::new("mount"));
        command.args(["-t", "tmpfs", "-o", "size=12m,mode=700", "outhaul-test", at]);
        let ran = finish(command).await;
        if ran.code != Some(0) {
            eprintln!("SKIPPED: it may not mount a file system: {ran}");
            return None;
        }
        Some(Self(at.to_owned()))
    }

    pub fn ballast(&self) -> std::path::PathBuf {
        Path::new(&self.0).join("ballast")
    }

    pub fn fill(&self) {
        let mut file = std::fs::File::create(self.ballast()).unwrap();
        for piece in [&[1_u8; 65536][..], &[1; 4096], &[1; 1]] {
            while file.write_all(piece).is_ok() {}
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l", &self.0]).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_state_directory_costs_no_build_anything() {
    let world = World::new().await;
    let state = world.path("state");
    let Some(disk) = SmallDisk::mount(&state).await else {
        return;
    };
    let server = world.serve(&["--strict"]).await;
    disk.fill();
    // Journalled or not, it is played to its end, and its outputs are there.
    world.play(&world.build, server.address()).await;
    world.assert_complete();
    server.logged("journal").await;
    std::fs::remove_file(disk.ballast()).unwrap();
    std::fs::remove_dir_all(world.exec_root().join("bazel-out")).unwrap();
    let next = world.build.incremental();
    world.play(&next, server.address()).await;
    world.assert_complete();
    // With space it is written down again, what was not written before included.
    until("it is settled", async || {
        let ran = run(["status", "--json", &world.state(), &next.invocation_id()]).await;
        ran.code == Some(0) && ran.json()[0]["state"] == "settled"
    })
    .await;
    drop(server);
}
