//! Processes: started with a clean environment, waited for with a limit, and what they said.

use std::{
    fmt,
    fs::File,
    net::SocketAddr,
    os::unix::fs::FileExt as _,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{LOOK, PATIENCE, free_address};

/// Lets a command get no settings from the caller's environment.
pub fn clean(mut command: Command) -> Command {
    for (name, _) in std::env::vars_os() {
        let ours = [
            "OUTHAUL_",
            "LISTEN_",
            "OTEL_",
            "TRACEPARENT",
            "BAZEL",
            "RUST_LOG", // and those of object stores
            "AWS_",
            "AZURE_",
            "GOOGLE_",
            "GCE_",
            "CLOUDSDK_",
        ];
        if name
            .to_str()
            .is_some_and(|n| ours.iter().any(|p| n.starts_with(p)))
        {
            command.env_remove(name);
        }
    }
    command
        .env_remove("NOTIFY_SOCKET")
        .env_remove("XDG_CONFIG_HOME")
        .env_remove("XDG_STATE_HOME")
        .env("HOME", "/nonexistent")
        .stdin(Stdio::null());
    command
}

/// Runs a command to its end.
pub async fn finish(command: Command) -> Ran {
    let mut running = Running::captured(command);
    running.end().await;
    running.ran()
}

/// Whether a process, or a child of it, listens at a port (proc(5): `/proc/net/tcp`).
fn listens(pid: u32, port: u16) -> bool {
    const LISTEN: &str = "0A";
    let port = format!(":{port:04X}");
    let tables =
        ["/proc/net/tcp", "/proc/net/tcp6"].map(|table| std::fs::read_to_string(table).unwrap_or_default());
    let socket = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let is_it = fields.get(1)?.ends_with(&port) && *fields.get(3)? == LISTEN;
        is_it.then_some(format!("socket:[{}]", fields.get(9)?))
    };
    let sockets: Vec<String> = tables
        .iter()
        .flat_map(|table| table.lines())
        .filter_map(socket)
        .collect();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let all = children.split_whitespace().filter_map(|child| child.parse().ok());
    std::iter::once(pid).chain(all).any(|pid: u32| {
        let open = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten();
        let mut open = open.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
        open.any(|target| sockets.iter().any(|socket| target.as_os_str() == socket.as_str()))
    })
}

/// A process. Killed when this is dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    line: String,
    // Files, because a server that it leaves behind would hold pipes open.
    stdout: File,
    stderr: File,
    started: Instant,
    /// Where a daemon takes build events.
    pub addresses: Vec<String>,
}

impl Running {
    /// Starts a command without input.
    pub fn start(mut command: Command) -> Self {
        command.stdin(Stdio::null());
        Self::captured(command)
    }

    fn captured(mut command: Command) -> Self {
        let stdout = tempfile::tempfile().unwrap();
        command.stdout(stdout.try_clone().unwrap());
        let mut running = Self::spawn(command);
        running.stdout = stdout;
        running
    }

    fn spawn(mut command: Command) -> Self {
        let stderr = tempfile::tempfile().unwrap();
        command.stderr(stderr.try_clone().unwrap());
        let line = format!("{command:?}");
        Self {
            child: command.spawn().unwrap_or_else(|e| panic!("{line}: {e}")),
            line,
            stdout: tempfile::tempfile().unwrap(),
            stderr,
            started: Instant::now(),
            addresses: Vec::new(),
        }
    }

    /// Starts a server's program on a free port of this machine, and waits until it listens there; with another port if
    /// somebody else was faster to take the first one. `what` is its name for messages, `command` starts it at an address.
    #[track_caller]
    pub fn listening(what: &str, mut command: impl FnMut(SocketAddr) -> Command) -> (Self, SocketAddr) {
        let mut said = String::new();
        for _ in 0..3 {
            let address = free_address();
            let mut running = Self::start(command(address));
            let began = Instant::now();
            while running.is_running() && began.elapsed() < PATIENCE {
                // Another program may answer there.
                if listens(running.id(), address.port()) {
                    return (running, address);
                }
                std::thread::sleep(LOOK);
            }
            said = running.stderr();
        }
        panic!("{what} does not start; it said\n{said}");
    }

    /// Starts a command that is a daemon, with its own standard input and output, and waits until its listeners are open.
    pub async fn serve(command: Command) -> Self {
        let mut running = Self::spawn(command);
        let began = Instant::now();
        while !running.is_open() {
            assert!(began.elapsed() < PATIENCE, "it does not listen: {running}");
            tokio::time::sleep(LOOK).await;
        }
        running
    }

    /// Whether a daemon's listeners are open; panics if it has ended.
    #[track_caller]
    pub fn is_open(&mut self) -> bool {
        let is_running = self.is_running();
        let log = self.stderr();
        let is_open = log.contains("control socket");
        assert!(is_open || is_running, "the daemon has ended:\n{log}");
        let lines = log.lines();
        let addresses = lines.filter_map(|line| line.split_once("listening for build events on "));
        self.addresses = addresses
            .map(|(_, address)| match address.starts_with("unix:") {
                true => address.to_owned(),
                false => format!("grpc://{address}"),
            })
            .collect();
        is_open
    }

    /// The first of its listeners.
    pub fn address(&self) -> &str {
        &self.addresses[0]
    }

    /// Waits for words in the log, and gives all of it.
    pub async fn logged(&self, part: &str) -> String {
        let began = Instant::now();
        loop {
            let log = self.stderr();
            if log.contains(part) {
                return log;
            }
            assert!(began.elapsed() < PATIENCE, "no {part:?} in: {log}");
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal. It must not have been waited for.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// What was written to standard output so far.
    pub fn stdout(&self) -> String {
        text(&bytes(&self.stdout))
    }

    /// What was written to standard error so far.
    pub fn stderr(&self) -> String {
        text(&bytes(&self.stderr))
    }

    /// Waits for it to end by itself; gives its exit code.
    pub async fn end(&mut self) -> Option<i32> {
        let asked = Instant::now();
        while self.is_running() {
            assert!(asked.elapsed() < PATIENCE, "it does not end: {self}");
            tokio::time::sleep(LOOK).await;
        }
        self.child.wait().unwrap().code()
    }

    /// Blocks until it has ended. A build tool may take its time.
    pub fn wait(mut self) -> Ran {
        let asked = Instant::now();
        while self.is_running() {
            assert!(asked.elapsed() < 4 * PATIENCE, "it does not end: {self}");
            std::thread::sleep(LOOK);
        }
        self.ran()
    }

    /// What became of it, once it has ended.
    pub fn ran(mut self) -> Ran {
        Ran {
            code: self.child.wait().unwrap().code(),
            stdout: bytes(&self.stdout),
            err: self.stderr(),
            took: self.started.elapsed(),
            line: std::mem::take(&mut self.line),
        }
    }
}

impl fmt::Display for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (out, err) = (self.stdout(), self.stderr());
        write!(f, "{}, which said\n{out}{err}", self.line)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Not from where the process, which shares the file's position, writes.
fn bytes(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// How a process ended.
#[derive(Debug, Clone)]
pub struct Ran {
    line: String,
    /// `None` when a signal ended it.
    pub code: Option<i32>,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub err: String,
    /// From its start to its end.
    pub took: Duration,
}

impl Ran {
    /// Standard output as text.
    pub fn out(&self) -> String {
        text(&self.stdout)
    }

    /// One JSON value a line.
    pub fn json(&self) -> Vec<Value> {
        let out = self.out();
        out.lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
            .collect()
    }

    /// Demands exit code 0.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.expect(0)
    }

    /// Demands an exit code.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "the exit code; {self}");
        self
    }

    /// An error that says what is wrong, in words.
    #[track_caller]
    pub fn says(self, code: i32, parts: &[&str]) -> Self {
        let ran = self.expect(code);
        for part in parts {
            assert!(ran.err.contains(part), "no {part:?} in: {}", ran.err);
        }
        assert!(!ran.err.contains("panicked"), "{}", ran.err);
        ran
    }
}

impl fmt::Display for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (line, code, took) = (&self.line, self.code, self.took);
        write!(
            f,
            "{line} ended with {code:?} after {took:?} and said\n{}{}",
            self.out(),
            self.err
        )
    }
}
