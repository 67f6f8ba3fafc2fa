//! The real daemon, and what it takes.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use outhaul_testkit::{Running, clean, status};
use rustix::process::Signal;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{load::World, samples::Sample};

/// A daemon, killed when this is dropped.
pub struct Daemon {
    pub process: Running,
    state: PathBuf,
    admin: String,
}

/// A command of the binary, with none of the caller's settings.
pub fn outhaul() -> Command {
    // Another one than was built just now, such as an installed one.
    let given = std::env::var_os("OUTHAUL_SOAK_BINARY");
    clean(Command::new(
        given.unwrap_or_else(|| env!("CARGO_BIN_EXE_outhaul").into()),
    ))
}

/// Ends a process, and waits for it.
pub async fn terminate(process: &mut Running, patience: Duration) -> Result<(), String> {
    if process.is_running() {
        process.signal(Signal::TERM);
    }
    match tokio::time::timeout(patience, process.end()).await {
        Ok(Some(0)) => Ok(()),
        Ok(code) => Err(format!("it ended with {code:?}")),
        Err(_) => Err(format!("it has not ended {patience:?} after SIGTERM")),
    }
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
            .arg(format!("--bes-backend={}", world.upstream_address()))
            .arg(format!("--state-dir={}", world.state().display()));
        let process = Running::serve(command).await;
        let log = process.stderr();
        let (_, admin) = log
            .split_once("health and metrics on http://")
            .expect("an address");
        Self {
            state: world.state(),
            admin: admin.lines().next().unwrap_or_default().to_owned(),
            process,
        }
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
        let pid = self.process.id();
        let (mut bytes, mut files, mut journals) = (0, 0, 0);
        walk(&self.state, &mut |path, length| {
            bytes += length;
            files += 1;
            let ending = path.extension().and_then(|e| e.to_str());
            journals += u64::from(matches!(ending, Some("journal" | "settled")));
        });
        Sample {
            at: begun.elapsed().as_secs_f64(),
            rss_kib: status(pid, "VmRSS").unwrap_or(0),
            anon_kib: status(pid, "RssAnon").unwrap_or(0),
            threads: status(pid, "Threads").unwrap_or(0),
            descriptors: std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |dir| dir.count() as u64),
            tasks: metric("outhaul_tasks"),
            state_kib: bytes / 1024,
            state_files: files,
            journals,
            invocations: metric("outhaul_invocations") + metric("outhaul_invocations_ended_total"),
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
