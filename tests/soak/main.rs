//! The daemon for a long time: thousands of builds in many output roots, with everything that goes wrong in a year, and at
//! the end as much memory, descriptors, threads, tasks and disk as at the beginning.
//!
//! `scripts/soak [MINUTES]` runs it; `cargo test` does not. Prints a table, and ends with 1 if something has grown, was
//! left behind, or went wrong. `OUTHAUL_SOAK_SEED` repeats the choices of a run, as far as the machine's timing lets.

#![allow(
    clippy::print_stdout,
    unreachable_pub,
    reason = "a program that prints a table"
)]

mod daemon;
mod load;
mod samples;

use std::{
    process::ExitCode,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use self::{
    daemon::{Daemon, terminate},
    load::World,
    samples::{Bound, ENOUGH, Sample, leak, table},
};

/// How long the daemon may take until all is quiet, once nobody asks anything of it.
const QUIET: Duration = Duration::from_secs(90);
/// How long it may take to end.
const ENDING: Duration = Duration::from_secs(30);
/// From one look to the next.
const EVERY: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    // As `cargo test` asks every test program.
    if std::env::args().any(|arg| arg == "--list") {
        return ExitCode::SUCCESS;
    }
    let minutes: f64 = std::env::args().find_map(|arg| arg.parse().ok()).unwrap_or(30.0);
    let seed = std::env::var("OUTHAUL_SOAK_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| u64::from(std::process::id()) ^ 0x5eed);
    println!("soak: {minutes} minutes, OUTHAUL_SOAK_SEED={seed}");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let time = Duration::from_secs_f64(minutes * 60.0);
    let wrong = runtime.block_on(soak(time, seed));
    for line in &wrong {
        println!("WRONG: {line}");
    }
    // What still waits for a lost stream ends with us.
    runtime.shutdown_background();
    if wrong.is_empty() {
        println!("soak: passed");
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

async fn soak(time: Duration, seed: u64) -> Vec<String> {
    let mut wrong = Vec::new();
    let begun = Instant::now();
    let world = Arc::new(World::new(seed).await);
    let mut daemon = Daemon::start(&world).await;
    let mut samples: Vec<Sample> = Vec::new();
    // Everything has been used once, and every pool has what it keeps, before it counts.
    let mut quiet = Vec::new();
    for _ in 0..4 {
        let until = Instant::now() + time / 4;
        let load = world.load(&daemon, until);
        while Instant::now() < until && daemon.process.is_running() {
            tokio::time::sleep(EVERY.min(until.saturating_duration_since(Instant::now()))).await;
            samples.push(daemon.sample(begun).await);
        }
        load.await;
        if !daemon.process.is_running() {
            wrong.push("the daemon has ended by itself".to_owned());
            break;
        }
        world.calm().await;
        match daemon.quiet(begun, QUIET).await {
            Ok(sample) => quiet.push(sample),
            Err(reason) => wrong.push(reason),
        }
    }
    println!("{}", table("busy, now and then", &thinned(&samples)));
    println!("{}", table("quiet, after each quarter", &quiet));
    println!("{}", world.reported());
    if let [first, .., before, last] = &quiet[..] {
        wrong.extend(Bound::check(first, last));
        wrong.extend(leak(before, last));
        if last.invocations.saturating_sub(before.invocations) < ENOUGH {
            println!("leaks per build are not judged: the last quarter had fewer than {ENOUGH} builds");
        }
    } else {
        wrong.push("there are too few quiet moments to compare".to_owned());
    }
    wrong.extend(world.last_builds(&daemon).await);
    if let Err(reason) = terminate(&mut daemon.process, ENDING).await {
        wrong.push(reason);
    }
    wrong.extend(world.left_over());
    let log = daemon.process.stderr();
    for word in ["panicked", "this is a bug"] {
        wrong.extend(
            log.lines()
                .filter(|line| line.contains(word))
                .map(|line| format!("in the log: {line}")),
        );
    }
    // It goes on from what it has left.
    let mut again = Daemon::start(&world).await;
    if again.process.stderr().contains("quarantine") {
        wrong.push("the record was not whole after a clean end".to_owned());
    }
    wrong.extend(world.last_builds(&again).await);
    if let Err(reason) = terminate(&mut again.process, ENDING).await {
        wrong.push(reason);
    }
    let played = world.counts.played.load(Ordering::Relaxed);
    println!(
        "soak: {played} builds in {:.0} s; the daemon's log has {} lines",
        begun.elapsed().as_secs_f64(),
        log.lines().count()
    );
    wrong.extend((played == 0).then(|| "no build was played".to_owned()));
    wrong
}

/// Some of many.
fn thinned(samples: &[Sample]) -> Vec<Sample> {
    let step = samples.len().div_ceil(24).max(1);
    samples.iter().step_by(step).cloned().collect()
}
