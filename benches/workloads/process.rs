//! Programs that are measured from outside: their processor time and peak memory, by proc(5).

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use outhaul_testkit::{PATIENCE, Running, cpu, cpu_of_children, eventually, status};
use rustix::process::Signal;

/// How often a program's memory is looked at.
const LOOK: Duration = Duration::from_millis(5);

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

/// What a program took that has ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ended {
    /// In seconds.
    pub(crate) wall: f64,
    /// Processor time of it and of what it waited for, in seconds.
    pub(crate) cpu: f64,
    /// Most memory that it had at once, in bytes; the last few milliseconds do not count.
    pub(crate) peak: f64,
}

/// Runs a program without input to its end; gives its wall time in seconds.
pub(crate) fn run(command: &mut Command, log: &Path) -> Result<f64> {
    command.stdin(Stdio::null());
    Ok(watched(command, log)?.wall)
}

/// Runs a program to its end.
pub(crate) fn watched(command: &mut Command, log: &Path) -> Result<Ended> {
    let log_file = fs::File::create(log)?;
    command.stdout(log_file.try_clone()?).stderr(log_file);
    let before = cpu_of_children(std::process::id());
    let begun = Instant::now();
    let mut child = command
        .spawn()
        .with_context(|| format!("starting {}", command.get_program().display()))?;
    let mut peak = 0;
    let (ended, waited) = mpsc::channel::<()>();
    let id = child.id();
    let looking = thread::spawn(move || {
        // Another process may have the number when this looks for the last time, but that has hardly begun.
        while waited.recv_timeout(LOOK) == Err(mpsc::RecvTimeoutError::Timeout) {
            peak = peak.max(status(id, "VmHWM").unwrap_or_default());
        }
        peak
    });
    let status = child.wait();
    let wall = begun.elapsed().as_secs_f64();
    drop(ended);
    let peak = looking.join().unwrap_or_default() as f64 * 1024.0;
    let cpu = cpu_of_children(std::process::id()) - before;
    let status = status?;
    if !status.success() {
        let said = fs::read_to_string(log).unwrap_or_default();
        let end = said.len().saturating_sub(2000);
        let end = said.get(end..).unwrap_or_default();
        bail!("{} ended with {status}: {end}", command.get_program().display());
    }
    Ok(Ended { wall, cpu, peak })
}
