//! The real daemon, and what it takes.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{load::World, samples::Sample};

/// A daemon, killed when this is dropped.
pub struct Daemon {
    child: Child,
    log: PathBuf,
    state: PathBuf,
    /// Where builds are played to.
    pub door: String,
    admin: String,
}

/// A command of the binary, with none of the caller's settings.
pub fn outhaul() -> Command {
    // Another one than was built just now, such as an installed one.
    let given = std::env::var_os("OUTHAUL_SOAK_BINARY");
    let mut command = Command::new(given.unwrap_or_else(|| env!("CARGO_BIN_EXE_outhaul").into()));
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|n| n.starts_with("OUTHAUL_")) {
            command.env_remove(name);
        }
    }
    command
        .env("HOME", "/nonexistent")
        .env_remove("XDG_CONFIG_HOME")
        .stdin(Stdio::null());
    command
}

/// Starts a daemon, and gives it once its doors are open, with its log.
pub async fn spawn(mut command: Command, log: &Path) -> (Child, String) {
    let file = std::fs::File::create(log).expect("a log");
    let mut child = command.stderr(file).spawn().expect("the daemon starts");
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let text = std::fs::read_to_string(log).unwrap_or_default();
        if text.contains("control socket") {
            return (child, text);
        }
        let ended = child.try_wait().expect("it can be asked");
        assert!(
            ended.is_none() && Instant::now() < deadline,
            "the daemon does not start: {ended:?}\n{text}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What follows words in a log, up to the end of the line.
pub fn said<'t>(log: &'t str, words: &str) -> &'t str {
    let line = log.lines().find_map(|line| line.split_once(words));
    line.map_or("", |(_, rest)| rest.trim())
}

/// Ends a process, and waits for it.
pub async fn terminate(child: &mut Child, patience: Duration) -> Result<i32, String> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // It may have ended by itself.
        let _ = kill_process(pid, Signal::TERM);
    }
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        if let Ok(Some(status)) = child.try_wait() {
            return Ok(status.code().unwrap_or(-1));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Err(format!("it has not ended {patience:?} after SIGTERM"))
}

impl Daemon {
    /// With short retention and leases, so that both come often.
    pub async fn start(world: &World) -> Self {
        let mut command = outhaul();
        command
            .args(["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0"])
            .args(["--retention-age=40s", "--retention-size=8MiB"])
            .args([
                "--lease-renewal=3s",
                "--lease-age=1m",
                "--hold-timeout=5s",
                "--linger=0s",
            ])
            .args([
                "--remote-timeout=2s",
                "--remote-retries=2",
                "--remote-retry-max-delay=200ms",
            ])
            .arg(format!("--remote-cache={}", world.cache.endpoint()))
            .arg(format!("--bes-backend={}", world.upstream_door()))
            .arg(format!("--state-dir={}", world.state().display()));
        let log = world.dir.path().join(format!("log.{}", world.next_number()));
        let (child, text) = spawn(command, &log).await;
        Self {
            child,
            state: world.state(),
            door: format!("grpc://{}", said(&text, "listening for build events on ")),
            admin: said(&text, "health and metrics on http://").to_owned(),
            log,
        }
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|ended| ended.is_none())
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    async fn metrics(&self) -> String {
        let asking = async {
            let mut stream = TcpStream::connect(&self.admin).await?;
            stream
                .write_all(b"GET /metrics HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n\r\n")
                .await?;
            let mut text = String::new();
            stream.read_to_string(&mut text).await?;
            std::io::Result::Ok(text)
        };
        let asked = tokio::time::timeout(Duration::from_secs(20), asking).await;
        asked.ok().and_then(Result::ok).unwrap_or_default()
    }

    pub async fn sample(&self, begun: Instant) -> Sample {
        let metrics = self.metrics().await;
        let metric = |name: &str| -> u64 {
            let values = metrics.lines().filter_map(|line| {
                let rest = line.strip_prefix(name)?;
                let (labels, value) = rest.rsplit_once(' ')?;
                (labels.is_empty() || labels.starts_with('{')).then(|| value.parse::<f64>().ok())?
            });
            values.sum::<f64>() as u64
        };
        let proc = PathBuf::from(format!("/proc/{}", self.child.id()));
        let status = std::fs::read_to_string(proc.join("status")).unwrap_or_default();
        let field = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let word = line.and_then(|rest| rest.trim_start_matches(':').split_whitespace().next());
            word.and_then(|word| word.parse().ok()).unwrap_or(0)
        };
        let (mut bytes, mut files, mut journals) = (0, 0, 0);
        walk(&self.state, &mut |path, length| {
            bytes += length;
            files += 1;
            let ending = path.extension().and_then(|e| e.to_str());
            journals += u64::from(matches!(ending, Some("journal" | "settled")));
        });
        Sample {
            at: begun.elapsed().as_secs_f64(),
            rss_kib: field("VmRSS"),
            anon_kib: field("RssAnon"),
            threads: field("Threads"),
            descriptors: std::fs::read_dir(proc.join("fd")).map_or(0, |dir| dir.count() as u64),
            tasks: metric("outhaul_tasks"),
            state_kib: bytes / 1024,
            state_files: files,
            journals,
            invocations: metric("outhaul_invocations"),
        }
    }

    /// Waits until nothing is on its way any more, and pools of threads have shrunk.
    pub async fn quiet(&self, begun: Instant, patience: Duration) -> Result<Sample, String> {
        let deadline = Instant::now() + patience;
        // Longer than an idle thread of the runtime's pool lives.
        let mut lowest: Option<Sample> = None;
        let settled = Instant::now() + Duration::from_secs(12).min(patience / 2);
        loop {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let metrics = self.metrics().await;
            let is_busy = ["running", "draining"].iter().any(|state| {
                let name = format!("outhaul_invocations{{state=\"{state}\"}} ");
                let line = metrics.lines().find_map(|line| line.strip_prefix(&*name));
                line.is_some_and(|n| n.trim() != "0")
            });
            let sample = self.sample(begun).await;
            if !is_busy && Instant::now() > settled {
                return Ok(match lowest {
                    Some(lowest) => Sample {
                        tasks: lowest.tasks.min(sample.tasks),
                        ..sample
                    },
                    None => sample,
                });
            }
            if !is_busy && lowest.as_ref().is_none_or(|lowest| sample.tasks < lowest.tasks) {
                lowest = Some(sample);
            }
            if Instant::now() > deadline {
                return Err(format!(
                    "not quiet within {patience:?}: {}",
                    metrics
                        .lines()
                        .filter(|line| line.starts_with("outhaul_invocations"))
                        .collect::<Vec<_>>()
                        .join(", ")
                ));
            }
        }
    }

    pub async fn end(&mut self, patience: Duration) -> Result<(), String> {
        match terminate(&mut self.child, patience).await? {
            0 => Ok(()),
            code => Err(format!("the daemon ended with {code}")),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Every file below a directory, with its length.
pub fn walk(dir: &Path, see: &mut impl FnMut(&Path, u64)) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(meta) if meta.is_dir() => walk(&entry.path(), see),
            Ok(meta) => see(&entry.path(), meta.len()),
            Err(_) => {}
        }
    }
}
