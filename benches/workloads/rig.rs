//! What a workload runs in: a directory, a cache, a daemon in a process of its own, and the player.

use std::{
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Result, bail};
use outhaul::demo::{Setting, play};
use outhaul_testkit::{clean, cpu_of_threads};
use tokio::runtime::Runtime;

use crate::{cache::Cache, events::Stream, process::Process, samples::AGAINST};

/// Name of the player's threads.
const PLAYER: &str = "player";

/// Where everything is, and who plays.
pub(crate) struct Rig {
    base: PathBuf,
    /// The program that is measured, and perhaps another that it is compared with.
    programs: Vec<PathBuf>,
    /// Which of them runs.
    current: usize,
    /// What every daemon is started with beside what a workload wants.
    flags: Vec<String>,
    pub(crate) player: Runtime,
    /// Grows with every build that is played.
    number: u64,
}

/// The program that is measured.
pub(crate) struct Outhaul {
    program: PathBuf,
}

impl Outhaul {
    /// A command without the user's own settings.
    pub(crate) fn command(&self) -> Command {
        clean(Command::new(&self.program))
    }
}

/// A running `outhaul serve`.
pub(crate) struct Daemon {
    pub(crate) process: Process,
    address: String,
    /// Until it took builds, in seconds.
    pub(crate) start: f64,
}

/// What playing a build took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cost {
    /// Until the last acknowledgement, in seconds: as long as Bazel's command would have taken.
    pub(crate) wall: f64,
    /// Until the daemon had no more to do either.
    pub(crate) rest: f64,
    /// The daemon's processor time, in seconds.
    pub(crate) cpu: f64,
    /// The cache's.
    pub(crate) cache_cpu: f64,
    /// The player's.
    pub(crate) player_cpu: f64,
    /// Blobs that the cache was asked for, if it counts them.
    pub(crate) blobs: Option<u64>,
    /// The daemon's memory before it, in bytes.
    pub(crate) before: f64,
    /// The daemon's most memory during it, in bytes.
    pub(crate) peak: f64,
}

impl Rig {
    pub(crate) fn new(base: PathBuf, programs: Vec<PathBuf>, flags: Vec<String>) -> Result<Self> {
        let player = tokio::runtime::Builder::new_multi_thread()
            .thread_name(PLAYER)
            .enable_all()
            .build()?;
        Ok(Self {
            base,
            programs,
            current: 0,
            flags,
            player,
            number: 0,
        })
    }

    pub(crate) fn base(&self) -> &Path {
        &self.base
    }

    /// Lets each program have a turn; who begins changes from round to round.
    pub(crate) fn in_turns(
        &mut self,
        round: u32,
        mut turn: impl FnMut(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let count = self.programs.len();
        for number in 0..count {
            self.current = (number + round as usize) % count;
            turn(self)?;
        }
        self.current = 0;
        Ok(())
    }

    /// What the figures of the program that runs are called.
    pub(crate) fn name(&self, name: &str) -> String {
        if self.current == 0 {
            name.to_owned()
        } else {
            format!("{AGAINST}{name}")
        }
    }

    /// A command of `outhaul`.
    pub(crate) fn outhaul(&self) -> Outhaul {
        Outhaul {
            program: self.programs.get(self.current).cloned().unwrap_or_default(),
        }
    }

    /// Where the build's outputs belong.
    pub(crate) fn exec_root(&self) -> PathBuf {
        self.base.join("execroot/_main")
    }

    /// What the builds' events say of themselves.
    pub(crate) fn setting(&self, cache: &Cache) -> Setting {
        Setting {
            workspace: self.base.join("workspace").display().to_string(),
            exec_root: self.exec_root().display().to_string(),
            remote_cache: cache.endpoint(),
            instance_name: cache.instance().to_owned(),
        }
    }

    /// Begins with no record and no outputs.
    pub(crate) fn fresh(&self) -> Result<()> {
        remove(&self.base.join("state"))?;
        remove(&self.base.join("execroot"))?;
        Ok(fs::create_dir_all(self.exec_root())?)
    }

    /// Starts a daemon on what record there is.
    pub(crate) fn serve(&self, cache: &Cache, flags: &[&str]) -> Result<Daemon> {
        self.serve_through(cache, &cache.endpoint(), flags)
    }

    /// The same with a line to the cache that has an endpoint of its own.
    pub(crate) fn serve_through(&self, cache: &Cache, endpoint: &str, flags: &[&str]) -> Result<Daemon> {
        let socket = self.base.join("bes.sock");
        remove(&socket)?;
        let mut command = self.outhaul().command();
        command
            .envs(cache.variables())
            .arg("serve")
            .arg(format!("--bes-listen=unix:{}", socket.display()))
            .arg(format!("--state-dir={}", self.state().display()))
            .arg(format!("--remote-cache={endpoint}"))
            .arg(format!("--remote-instance-name={}", cache.instance()))
            .arg("--admin-listen=none")
            .args(flags)
            .args(&self.flags);
        let begun = Instant::now();
        let process = Process::start(command, || UnixStream::connect(&socket).is_ok());
        let start = begun.elapsed().as_secs_f64();
        process.rest();
        Ok(Daemon {
            process,
            address: format!("unix:{}", socket.display()),
            start,
        })
    }

    /// The daemon's journal and record.
    pub(crate) fn state(&self) -> PathBuf {
        self.base.join("state")
    }

    /// Plays the build once more.
    pub(crate) fn play(&mut self, daemon: &Daemon, cache: &Cache, stream: &Stream) -> Result<Cost> {
        self.number += 1;
        let (id, events) = stream.run(self.number);
        daemon.process.reset_peak()?;
        let (cpu, cache_cpu, player_cpu) = (
            daemon.process.cpu(),
            cache.cpu(),
            cpu_of_threads(std::process::id(), PLAYER),
        );
        let before = daemon.process.peak()?;
        let asked = cache.blobs_asked_for();
        let address = daemon.address.clone();
        let begun = Instant::now();
        // On the player's threads, so that their time is the player's.
        let played = self
            .player
            .spawn(async move { play(&address, &id, "b", events).await });
        self.player.block_on(played)??;
        let wall = begun.elapsed().as_secs_f64();
        let rest = daemon.process.rest();
        Ok(Cost {
            wall,
            rest: rest.saturating_duration_since(begun).as_secs_f64().max(wall),
            cpu: daemon.process.cpu() - cpu,
            cache_cpu: cache.cpu() - cache_cpu,
            player_cpu: cpu_of_threads(std::process::id(), PLAYER) - player_cpu,
            blobs: cache
                .blobs_asked_for()
                .zip(asked)
                .map(|(now, before)| now - before),
            before,
            peak: daemon.process.peak()?,
        })
    }
}

/// Removes a file or a directory that may not be there.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let removed = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            bail!("removing {}: {error}", path.display())
        }
        _ => Ok(()),
    }
}

/// The size of all files below a directory.
pub(crate) fn bytes_below(directory: &Path) -> Result<f64> {
    let mut bytes = 0;
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                directories.push(entry.path());
            } else {
                bytes += entry.metadata()?.len();
            }
        }
    }
    Ok(bytes as f64)
}
