//! Programs that are measured from outside: their processor time and peak memory, by proc(5).

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use outhaul_testkit::{PATIENCE, Running, cpu, eventually, status};
use rustix::process::Signal;

/// A server in a process of its own. It is killed when this is dropped.
pub(crate) struct Process(Running);

impl Process {
    /// Starts the program and waits until `ready`.
    pub(crate) fn start(command: Command, ready: impl Fn() -> bool) -> Self {
        let mut running = Running::start(command);
        eventually("a server's start", || {
            assert!(running.is_running(), "{running}");
            ready()
        });
        Self(running)
    }

    /// Ends it as a service manager would.
    pub(crate) fn stop(self) {
        self.0.signal(Signal::TERM);
        self.0.wait();
    }

    /// Seconds of processor time so far.
    pub(crate) fn cpu(&self) -> f64 {
        cpu(self.0.id())
    }

    /// Most memory that it had at once, in bytes.
    pub(crate) fn peak(&self) -> Result<f64> {
        let kib = status(self.0.id(), "VmHWM").context("no VmHWM")?;
        Ok(kib as f64 * 1024.0)
    }

    /// Lets the peak count from now on.
    pub(crate) fn reset_peak(&self) -> Result<()> {
        Ok(fs::write(format!("/proc/{}/clear_refs", self.0.id()), "5")?)
    }

    /// Waits until it does nothing any more; gives when that began.
    pub(crate) fn rest(&self) -> Instant {
        let begun = Instant::now();
        let (mut last, mut since) = (self.cpu(), begun);
        while since.elapsed() < Duration::from_millis(150) && begun.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(10));
            let now = self.cpu();
            if now > last {
                (last, since) = (now, Instant::now());
            }
        }
        since
    }
}

/// Runs a program to its end; gives its wall time in seconds.
pub(crate) fn run(command: &mut Command, log: &Path) -> Result<f64> {
    let log_file = fs::File::create(log)?;
    command
        .stdin(Stdio::null())
        .stdout(log_file.try_clone()?)
        .stderr(log_file);
    let begun = Instant::now();
    let status = command
        .status()
        .with_context(|| format!("starting {}", command.get_program().display()))?;
    let wall = begun.elapsed().as_secs_f64();
    if !status.success() {
        let said = fs::read_to_string(log).unwrap_or_default();
        let end = said.len().saturating_sub(2000);
        let end = said.get(end..).unwrap_or_default();
        bail!("{} ended with {status}: {end}", command.get_program().display());
    }
    Ok(wall)
}
