//! A cache, an exec root and a state directory that outlive many daemons.

use std::{path::PathBuf, process::Command};

use outhaul::demo::Setting;
use outhaul_testkit::{
    Chance,
    cache::{EmbeddedCache, RunningCache},
    clean,
};

use crate::{build::Builds, settings::scratch};

pub(crate) struct World {
    pub(crate) seed: u64,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) cache: RunningCache,
    pub(crate) builds: Builds,
    pub(crate) dice: Chance,
}

impl World {
    pub(crate) async fn new(seed: u64) -> Self {
        let cache = EmbeddedCache::builder().start().await.unwrap();
        let dir = scratch();
        let exec_root = dir.path().join("base/execroot/_main");
        std::fs::create_dir_all(&exec_root).unwrap();
        let setting = Setting {
            workspace: dir.path().join("workspace").display().to_string(),
            exec_root: exec_root.display().to_string(),
            remote_cache: cache.endpoint(),
            instance_name: String::new(),
        };
        let builds = Builds::new(cache.store(), setting, seed);
        Self {
            seed,
            dir,
            cache,
            builds,
            dice: Chance::new(seed),
        }
    }

    pub(crate) fn output_base(&self) -> PathBuf {
        self.dir.path().join("base")
    }

    pub(crate) fn exec_root(&self) -> PathBuf {
        self.dir.path().join("base/execroot/_main")
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// A command of the binary's on this world's state.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        self.command_in("state", args)
    }

    /// The same on another state directory.
    pub(crate) fn command_in(&self, state: &str, args: &[&str]) -> Command {
        let mut command = clean(Command::new(env!("CARGO_BIN_EXE_outhaul")));
        let state = self.dir.path().join(state);
        command.args(args).arg(format!("--state-dir={}", state.display()));
        command
    }

    pub(crate) fn cache_flag(&self) -> String {
        format!("--remote-cache={}", self.cache.endpoint())
    }

    pub(crate) fn serve(&self) -> Command {
        self.serve_in("state")
    }

    pub(crate) fn serve_in(&self, state: &str) -> Command {
        let mut command = self.command_in(
            state,
            &["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none"],
        );
        command.arg(self.cache_flag());
        command
    }
}
