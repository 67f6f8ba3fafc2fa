//! Builds whose cache misbehaves at random, and the promises that hold all the same.
//!
//! A case is made from a seed: a build ([`build`]), what its cache does wrong and when ([`schedule`]). It is run through
//! the rooms of the daemon with the real client over real connections, once with the faults and once without them
//! ([`run`]), and checked ([`check`]). Several caches, one after the other, are in [`chain`]. Cases are repeated and counted by the environment:
//!
//! * `OUTHAUL_FAULT_CASES`: how many; the default suits `cargo test`.
//! * `OUTHAUL_FAULT_SEED`: the first case's seed; the others' follow it. Given out with every failure.
//! * `OUTHAUL_FAULT_STEPS`: the only faults of the schedule that are used, by number, such as `0,3`.

// What the cases came to is printed with `--nocapture`.
#![allow(clippy::print_stdout)]

mod build;
mod chain;
mod check;
mod run;
mod schedule;
mod steps;

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use futures::StreamExt as _;
use outhaul_testkit::{Chance, number, status};

use run::Counts;
use schedule::Case;

/// Cases that run at the same time: most of their time, they wait.
const AT_ONCE: usize = 6;
/// The most memory in KiB that the process may ever have had, servers and all. A bomb that goes off takes more.
const MEMORY: u64 = 900 << 10;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_faults_leave_every_file_right_or_absent() {
    let cases = number("OUTHAUL_FAULT_CASES").unwrap_or(24);
    let all = play(cases, Case::new).await;
    if let Some(most) = status(std::process::id(), "VmHWM") {
        println!("peak memory: {} MiB", most >> 10);
        assert!(most < MEMORY, "{} MiB", most >> 10);
    }
    assert_eq!(all.cases, cases);
    assert!(all.files_checked > 0 && all.fired.values().sum::<u64>() > 0);
}

/// The same case with as few faults as it takes to fail.
async fn shrunk(mut case: Case, mut why: String) -> (Case, String) {
    let mut at = 0;
    while at < case.steps.len() {
        let mut smaller = case.clone();
        smaller.drop_step(at);
        match run::run(&smaller).await {
            Err(said) => (case, why) = (smaller, said),
            Ok(_) => at += 1,
        }
    }
    (case, why)
}

/// Schedules that harm nobody who tries again as often as the client does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_that_pass_cost_no_file() {
    let cases = number("OUTHAUL_FAULT_CASES").map_or(12, |cases| cases.div_ceil(2));
    let all = play(cases, Case::passing).await;
    assert_eq!(all.cases, cases);
}

/// Runs this many cases, and adds up what they came to.
async fn play(cases: u64, make: fn(u64) -> Case) -> Counts {
    let first = number("OUTHAUL_FAULT_SEED").unwrap_or_else(some_seed);
    let only: Option<Vec<usize>> = std::env::var("OUTHAUL_FAULT_STEPS").ok().map(|steps| {
        steps
            .split(',')
            .map(|n| n.trim().parse().expect("a number"))
            .collect()
    });
    println!("{cases} cases from OUTHAUL_FAULT_SEED={first}");
    let mut ends = futures::stream::iter(0..cases)
        .map(|n| {
            let mut case = make(first.wrapping_add(n));
            if let Some(only) = &only {
                case.keep(only);
            }
            tokio::spawn(async move {
                let end = run::run(&case).await;
                (case, end)
            })
        })
        .buffer_unordered(AT_ONCE);
    let mut all = Counts::default();
    while let Some(end) = ends.next().await {
        let (case, end) = end.expect("no case panics");
        match end {
            Ok(counts) => all.add(&counts),
            Err(why) => {
                let (small, why) = shrunk(case, why).await;
                panic!("{why}\n\n{small}");
            }
        }
    }
    println!("{all}");
    all
}

fn some_seed() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    // Short enough to be copied by hand.
    Chance::new(now.unwrap_or(Duration::ZERO).as_nanos() as u64).number() % 1_000_000_000
}

#[test]
fn a_case_is_made_by_its_seed_alone() {
    for seed in 0..5 {
        assert_eq!(Case::new(seed).to_string(), Case::new(seed).to_string());
        assert_eq!(Case::passing(seed).to_string(), Case::passing(seed).to_string());
    }
    let mut kinds = BTreeMap::<&str, u32>::new();
    let mut chance = Chance::new(1);
    for _ in 0..3000 {
        *kinds.entry(steps::step(&mut chance, 20, 3).name()).or_default() += 1;
    }
    // Every kind of fault there is comes up among this many.
    for name in steps::NAMES {
        assert!(kinds.contains_key(name), "{name}: {kinds:?}");
    }
    let unknown: Vec<_> = kinds.keys().filter(|name| !steps::NAMES.contains(name)).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}
