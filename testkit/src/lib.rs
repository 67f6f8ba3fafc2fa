//! What the tests and the benchmarks share: a cache that misbehaves on demand, random numbers from a seed, processes,
//! waiting with a limit, and the programs of others.

#![allow(clippy::unwrap_used)]

pub mod cache;
mod chance;
pub mod peers;
mod process;
pub mod stores;

use std::{
    net::{SocketAddr, TcpListener},
    panic::Location,
    path::Path,
    time::{Duration, Instant},
};

pub use chance::Chance;
pub use process::{Ran, Running, clean, finish};

/// Longest wait for anything but a build tool.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How often something is looked at while waiting for it.
const LOOK: Duration = Duration::from_millis(10);

/// Blocks until something is so; panics with `what` if it takes longer than [`PATIENCE`].
#[track_caller]
pub fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !so() {
        assert!(began.elapsed() < PATIENCE, "waited a minute in vain: {what}");
        std::thread::sleep(LOOK);
    }
}

/// As [`eventually`], for what runs on tokio.
pub async fn until(what: &str, mut so: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !so().await {
        assert!(began.elapsed() < PATIENCE, "waited a minute in vain: {what}");
        tokio::time::sleep(LOOK).await;
    }
}

/// What a future gives; panics if it takes longer than [`PATIENCE`].
#[track_caller]
pub fn in_time<T>(future: impl Future<Output = T>) -> impl Future<Output = T> {
    let caller = Location::caller();
    async move {
        let ended = tokio::time::timeout(PATIENCE, future).await;
        ended.unwrap_or_else(|_| panic!("hangs at {caller}"))
    }
}

/// A number in a process's status (proc(5)), such as `VmHWM`; in KiB if it is of memory.
pub fn status(pid: u32, name: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Seconds of processor time of a process so far.
pub fn cpu(pid: u32) -> f64 {
    seconds(ticks(Path::new(&format!("/proc/{pid}")), "", 0).unwrap_or_default())
}

/// The same of its children that have ended and were waited for, and of theirs.
pub fn cpu_of_children(pid: u32) -> f64 {
    seconds(ticks(Path::new(&format!("/proc/{pid}")), "", 2).unwrap_or_default())
}

/// The same of its threads that are there and whose names begin so.
pub fn cpu_of_threads(pid: u32, name: &str) -> f64 {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    seconds(
        threads
            .filter_map(|thread| ticks(&thread.ok()?.path(), name, 0))
            .sum(),
    )
}

fn seconds(ticks: u64) -> f64 {
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// User and system time: fields 14 and 15 of stat (proc(5)), or that many later. A thread may have ended meanwhile.
fn ticks(dir: &Path, name: &str, later: usize) -> Option<u64> {
    let stat = std::fs::read_to_string(dir.join("stat")).ok()?;
    let (before, fields) = stat.rsplit_once(") ")?;
    let (_, its_name) = before.split_once('(')?;
    let mut times = fields.split_whitespace().skip(11 + later).map(str::parse::<u64>);
    let (user, system) = (times.next()?.ok()?, times.next()?.ok()?);
    its_name.starts_with(name).then_some(user + system)
}

/// A number from the environment.
pub fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable}={text} is no number")),
    )
}

/// An address that was free a moment ago.
pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}
