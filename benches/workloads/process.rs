//! Programs that are measured from outside: their processor time and peak memory, by proc(5).

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// Nothing here takes so long to start, to end or to come to rest.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server in a process of its own. It is killed when this is dropped.
pub(crate) struct Process(Child);

impl Process {
    /// Starts the program and waits until `ready`.
    pub(crate) fn start(mut command: Command, log: &Path, ready: impl Fn() -> bool) -> Result<Self> {
        let log_file = fs::File::options().create(true).append(true).open(log)?;
        command
            .stdin(Stdio::null())
            .stdout(log_file.try_clone()?)
            .stderr(log_file);
        let child = command
            .spawn()
            .with_context(|| format!("starting {}", command.get_program().display()))?;
        let mut process = Self(child);
        let begun = Instant::now();
        while !ready() {
            let ended = process.0.try_wait()?;
            if ended.is_some() || begun.elapsed() > PATIENCE {
                let said = fs::read_to_string(log).unwrap_or_default();
                bail!("{} does not start: {said}", command.get_program().display());
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(process)
    }

    /// Ends it as a service manager would.
    pub(crate) fn stop(mut self) -> Result<()> {
        if let Some(pid) = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw) {
            kill_process(pid, Signal::TERM)?;
        }
        let begun = Instant::now();
        while self.0.try_wait()?.is_none() {
            if begun.elapsed() > PATIENCE {
                bail!("a server does not end");
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Seconds of processor time so far.
    pub(crate) fn cpu(&self) -> Result<f64> {
        cpu(Path::new(&format!("/proc/{}/stat", self.0.id())))
    }

    /// Most memory that it had at once, in bytes.
    pub(crate) fn peak(&self) -> Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let kib = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .and_then(|rest| rest.split_whitespace().next())
            .context("no VmHWM")?;
        Ok(kib.parse::<f64>()? * 1024.0)
    }

    /// Lets the peak count from now on.
    pub(crate) fn reset_peak(&self) -> Result<()> {
        Ok(fs::write(format!("/proc/{}/clear_refs", self.0.id()), "5")?)
    }

    /// Waits until it does nothing any more; gives when that began.
    pub(crate) fn rest(&self) -> Result<Instant> {
        let begun = Instant::now();
        let (mut last, mut since) = (self.cpu()?, begun);
        while since.elapsed() < Duration::from_millis(150) && begun.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(10));
            let now = self.cpu()?;
            if now > last {
                (last, since) = (now, Instant::now());
            }
        }
        Ok(since)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// User and system time in seconds: fields 14 and 15 of stat, in ticks.
fn cpu(stat: &Path) -> Result<f64> {
    let stat = fs::read_to_string(stat)?;
    let fields = stat.rsplit_once(')').context("no command in stat")?.1;
    let ticks = |n: usize| -> Result<f64> {
        let field = fields.split_whitespace().nth(n).context("a short stat")?;
        Ok(field.parse()?)
    };
    Ok((ticks(11)? + ticks(12)?) / rustix::param::clock_ticks_per_second() as f64)
}

/// Seconds of processor time of this process's threads with such a name.
pub(crate) fn cpu_of_threads(name: &str) -> Result<f64> {
    let mut sum = 0.0;
    for thread in fs::read_dir("/proc/self/task")? {
        let thread = thread?.path();
        // A thread may end meanwhile.
        let named = fs::read_to_string(thread.join("comm")).unwrap_or_default();
        if named.trim() == name {
            sum += cpu(&thread.join("stat")).unwrap_or_default();
        }
    }
    Ok(sum)
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
