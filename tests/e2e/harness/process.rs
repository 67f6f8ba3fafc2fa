//! Processes: started, waited for with a bound, and what they said.

use std::{
    fmt,
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal};

/// Longer than anything here takes, on a machine that has other things to do.
const PATIENCE: Duration = Duration::from_secs(240);
/// How often something is looked at while waiting for it.
const LOOK: Duration = Duration::from_millis(10);

/// Waits until something is so; panics with `what` if it does not come to be within some seconds.
pub(crate) fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !so() {
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "waited a minute in vain: {what}"
        );
        std::thread::sleep(LOOK);
    }
}

/// A process under way. Killed when dropped.
pub(crate) struct Running {
    child: Option<Child>,
    line: String,
    stdout: PathBuf,
    stderr: PathBuf,
    started: Instant,
}

impl Running {
    /// Starts a command whose output goes to files in `dir`: pipes would be held open by a server that it leaves
    /// behind.
    pub(crate) fn start(mut command: Command, dir: &Path) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        std::fs::create_dir_all(dir).unwrap();
        let (stdout, stderr) = (
            dir.join(format!("{number}.stdout")),
            dir.join(format!("{number}.stderr")),
        );
        command
            .stdin(Stdio::null())
            .stdout(File::create(&stdout).unwrap())
            .stderr(File::create(&stderr).unwrap());
        let line = format!("{command:?}");
        let child = command.spawn().unwrap_or_else(|e| panic!("{line}: {e}"));
        Self {
            child: Some(child),
            line,
            stdout,
            stderr,
            started: Instant::now(),
        }
    }

    pub(crate) fn is_running(&mut self) -> bool {
        let child = self.child.as_mut().expect("only `wait` takes it");
        child.try_wait().unwrap().is_none()
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.as_ref().expect("only `wait` takes it").id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("only `wait` takes it");
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// What was written to standard error so far.
    pub(crate) fn stderr(&self) -> String {
        read(&self.stderr)
    }

    /// What was written to standard output so far.
    pub(crate) fn stdout(&self) -> String {
        read(&self.stdout)
    }

    /// Waits for its end.
    pub(crate) fn wait(mut self) -> Run {
        while self.is_running() {
            assert!(
                self.started.elapsed() < PATIENCE,
                "{} does not end; it said\n{}{}",
                self.line,
                read(&self.stdout),
                read(&self.stderr)
            );
            std::thread::sleep(LOOK);
        }
        let mut child = self.child.take().expect("only this takes it");
        let status = child.wait().unwrap();
        Run {
            line: self.line.clone(),
            code: status.code(),
            stdout: read(&self.stdout),
            stderr: read(&self.stderr),
            took: self.started.elapsed(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}

/// What became of a process.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    line: String,
    /// `None` when a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) took: Duration,
}

impl Run {
    /// Demands exit code 0.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        self.ends_with(0)
    }

    /// Demands an exit code.
    #[track_caller]
    pub(crate) fn ends_with(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "the exit code; {self}");
        self
    }

    /// Number of actions that a Bazel ran: of its "N processes", those that came neither from a cache nor from within.
    #[track_caller]
    pub(crate) fn executed(&self) -> u64 {
        self.processes()
            .iter()
            .filter(|(kind, _)| !kind.ends_with("cache hit") && kind != "internal")
            .map(|(_, count)| count)
            .sum()
    }

    /// Number of actions that a Bazel took from the remote cache.
    #[track_caller]
    pub(crate) fn remote_hits(&self) -> u64 {
        self.processes()
            .iter()
            .filter(|(kind, _)| kind == "remote cache hit")
            .map(|(_, count)| count)
            .sum()
    }

    /// `INFO: 9 processes: 4 remote cache hit, 5 internal.`
    #[track_caller]
    fn processes(&self) -> Vec<(String, u64)> {
        let line = self.stderr.lines().find_map(|line| {
            line.split_once(" processes: ")
                .or_else(|| line.split_once(" process: "))
        });
        let Some((_, kinds)) = line else {
            panic!("no line tells the processes; {self}");
        };
        kinds
            .trim_end_matches('.')
            .split(", ")
            .map(|part| {
                let (count, kind) = part.split_once(' ').unwrap();
                (kind.to_owned(), count.parse().unwrap())
            })
            .collect()
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} ended with {:?} after {:?} and said\n{}{}",
            self.line, self.code, self.took, self.stdout, self.stderr
        )
    }
}
