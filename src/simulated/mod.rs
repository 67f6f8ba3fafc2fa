//! A simulated network for tests: hosts, links that fail by a schedule, and a clock without real waiting.
//!
//! A test builds hosts with the real client and server code on turmoil's connections, takes a [`Schedule`] of faults from
//! a seed, and lets simulated minutes pass in milliseconds. What the network does follows from the seed alone, and so
//! does all else on one thread, but for `select!`s without an order and the jitter of the forwarder's waits. Files are
//! real: blocking work takes no simulated time (tokio's paused clock waits for it), but which of two things comes first
//! at one moment may differ from run to run where the journal's threads take part.
//!
//! * `OUTHAUL_SIM_SEED=N` runs that schedule only.
//! * `OUTHAUL_SIM_CASES=N` runs that many, `OUTHAUL_SIM_FIRST=N` begins at N instead of 0.

pub(crate) mod net;
pub(crate) mod schedule;

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

pub(crate) use outhaul_testkit::Chance;
pub(crate) use schedule::Schedule;

/// Failed schedules that are printed before a test gives up.
const PRINTED: usize = 5;

/// What a schedule, or many, came to.
#[derive(Debug, Default, Clone)]
pub(crate) struct Totals {
    /// Simulated time.
    pub(crate) elapsed: Duration,
    counts: BTreeMap<&'static str, u64>,
    most: BTreeMap<&'static str, u64>,
}

impl Totals {
    pub(crate) fn count(&mut self, what: &'static str, by: u64) {
        *self.counts.entry(what).or_default() += by;
    }

    /// Notes the largest of several.
    pub(crate) fn most(&mut self, what: &'static str, value: u64) {
        let most = self.most.entry(what).or_default();
        *most = value.max(*most);
    }

    pub(crate) fn get(&self, what: &str) -> u64 {
        self.counts.get(what).copied().unwrap_or(0)
    }

    fn add(&mut self, other: &Self) {
        self.elapsed += other.elapsed;
        for (what, by) in &other.counts {
            self.count(what, *by);
        }
        for (what, value) in &other.most {
            self.most(what, *value);
        }
    }
}

/// Runs `one` with each of `few` seeds, or with those that the environment names, and says what they came to.
///
/// # Panics
/// When a schedule fails, with its seed.
pub(crate) fn each_seed(test: &str, few: u64, one: impl Fn(u64) -> Result<Totals, String>) -> Totals {
    let given = |name: &str| {
        std::env::var(name).ok().map(|value| {
            value
                .parse::<u64>()
                .unwrap_or_else(|e| panic!("{name}={value}: {e}"))
        })
    };
    let seeds = match given("OUTHAUL_SIM_SEED") {
        Some(seed) => {
            // With RUST_LOG, what happened. There is one already if another test of the process was first.
            let _ = tracing_subscriber::fmt()
                .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
                .with_test_writer()
                .without_time()
                .try_init();
            seed..=seed
        }
        None => {
            let first = given("OUTHAUL_SIM_FIRST").unwrap_or(0);
            first..=first + given("OUTHAUL_SIM_CASES").unwrap_or(few).max(1) - 1
        }
    };
    let began = Instant::now();
    let (mut sum, mut passed, mut failed) = (Totals::default(), 0_u64, Vec::new());
    for seed in seeds {
        let ran = catch_unwind(AssertUnwindSafe(|| one(seed)));
        let why = match ran {
            Ok(Ok(totals)) => {
                passed += 1;
                sum.add(&totals);
                continue;
            }
            Ok(Err(why)) => why,
            Err(panic) => match panic.downcast_ref::<String>() {
                Some(why) => format!("panicked: {why}"),
                None => "panicked".to_owned(),
            },
        };
        failed.push(format!(
            "schedule {seed}: {why}\nagain with: OUTHAUL_SIM_SEED={seed} cargo test --lib {test}"
        ));
        if failed.len() == PRINTED {
            break;
        }
    }
    eprintln!(
        "{test}: {passed} schedules passed; {:.0} s simulated in {:.1} s; {:?}; at most {:?}",
        sum.elapsed.as_secs_f64(),
        began.elapsed().as_secs_f64(),
        sum.counts,
        sum.most,
    );
    assert!(
        failed.is_empty(),
        "{} schedules failed\n{}",
        failed.len(),
        failed.join("\n\n")
    );
    sum
}

/// Whether the environment asks for other schedules than a test's own: then it need not have met all that it can meet.
pub(crate) fn is_custom() -> bool {
    ["OUTHAUL_SIM_SEED", "OUTHAUL_SIM_CASES", "OUTHAUL_SIM_FIRST"]
        .iter()
        .any(|name| std::env::var_os(name).is_some())
}

/// Where hosts say that a promise was broken. A panic in a server's task would only end the connection.
#[derive(Clone, Default)]
pub(crate) struct Verdict(Arc<Mutex<Option<String>>>);

impl Verdict {
    /// Notes the first broken promise.
    pub(crate) fn check(&self, holds: bool, otherwise: impl FnOnce() -> String) {
        if !holds {
            let at = now();
            self.0
                .lock()
                .unwrap()
                .get_or_insert_with(|| format!("at {at:?}: {}", otherwise()));
        }
    }

    pub(crate) fn broken(&self) -> Option<String> {
        self.0.lock().unwrap().clone()
    }
}

/// Simulated time since the beginning, on a host.
pub(crate) fn now() -> Duration {
    turmoil::sim_elapsed().unwrap_or_default()
}

/// Lets time pass until `done`.
///
/// # Errors
/// A broken promise, or a host's failure, or that it took longer than `limit`; with the schedule so far.
pub(crate) fn run(
    sim: &mut turmoil::Sim<'_>,
    schedule: &mut Schedule,
    verdict: &Verdict,
    limit: Duration,
    mut done: impl FnMut(Duration) -> bool,
) -> Result<Duration, String> {
    let failure = loop {
        tracing::trace!(at = ?sim.elapsed(), "step");
        schedule.follow(sim);
        if let Err(error) = sim.step() {
            break format!("a host failed: {error}");
        }
        if let Some(broken) = verdict.broken() {
            break broken;
        }
        if done(sim.elapsed()) {
            return Ok(sim.elapsed());
        }
        if sim.elapsed() > limit {
            break format!("not done after {limit:?}");
        }
    };
    Err(format!("{failure}\n{schedule}"))
}
