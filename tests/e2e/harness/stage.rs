//! What a test is given.

use std::{
    cell::RefCell,
    panic::{AssertUnwindSafe, catch_unwind},
    rc::Rc,
    sync::{Condvar, Mutex, PoisonError},
    time::Instant,
};

use outhaul_testkit::peers;

use super::{
    bazel::{Bazel, Version},
    cache::{Cache, CacheKind},
};

/// Tests that may have Bazels at the same time. Each is a JVM with a heap of half a gigabyte, busy but for what it waits for.
const AT_ONCE: usize = 3;

static BUSY: Mutex<usize> = Mutex::new(0);
static FREE: Condvar = Condvar::new();

/// A scenario and its name.
pub(crate) type Scenario = (&'static str, fn(&Stage));

/// Which Bazel and which cache a test is to use.
pub(crate) struct Stage {
    pub(crate) version: Version,
    pub(crate) cache: CacheKind,
    /// What several scenarios share, each after the other.
    shared: Option<Shared>,
}

/// A cache that gets fuller, and Bazels whose servers go on.
struct Shared {
    cache: Rc<Cache>,
    bazels: RefCell<Vec<Bazel>>,
}

impl Stage {
    /// A cache: empty, or with what earlier scenarios have put there.
    pub(crate) fn cache(&self) -> Rc<Cache> {
        match &self.shared {
            Some(shared) => {
                shared.cache.collect();
                Rc::clone(&shared.cache)
            }
            None => Rc::new(Cache::start(self.cache)),
        }
    }

    /// A Bazel that uses a cache, without outputs.
    pub(crate) fn bazel(&self, cache: &Cache) -> Bazel {
        let new = || Bazel::using(self.version, cache.bazel());
        let Some(shared) = &self.shared else { return new() };
        let mut bazels = shared.bazels.borrow_mut();
        if let Some(free) = bazels.iter().find(|bazel| bazel.is_free()) {
            free.renew();
            return free.clone();
        }
        bazels.push(new());
        bazels[bazels.len() - 1].clone()
    }
}

/// One of the places for tests with Bazels.
struct Place;

impl Place {
    /// A place, unless a peer is missing.
    fn take_if_there(name: &str, version: Version, cache: CacheKind) -> Option<Self> {
        let needed = [&[version.peer()], cache.peers()].concat();
        peers::are_there(name, &needed).then(Self::take)
    }

    fn take() -> Self {
        let busy = BUSY.lock().unwrap_or_else(PoisonError::into_inner);
        let mut busy = FREE
            .wait_while(busy, |busy| *busy >= AT_ONCE)
            .unwrap_or_else(PoisonError::into_inner);
        *busy += 1;
        Self
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *BUSY.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        FREE.notify_one();
    }
}

/// Runs a test, if its peers are there and as soon as there is room.
pub(crate) fn run(name: &str, version: Version, cache: &str, test: fn(&Stage)) {
    let cache = CacheKind::of_word(cache);
    let Some(_place) = Place::take_if_there(name, version, cache) else {
        return;
    };
    test(&Stage {
        version,
        cache,
        shared: None,
    });
}

/// Whether tests that take long and seldom find anything are wanted, too.
pub(crate) fn has_all() -> bool {
    std::env::var_os("OUTHAUL_E2E").is_some_and(|value| value == "all")
}

/// The same as [`run`], with `OUTHAUL_E2E=all` only.
pub(crate) fn run_rarely(name: &str, version: Version, cache: &str, test: fn(&Stage)) {
    if has_all() {
        run(name, version, cache, test);
    } else {
        eprintln!("{name}: not run: OUTHAUL_E2E=all, which scripts/e2e sets, runs it");
    }
}

/// Runs scenarios with one cache, and with Bazels whose servers go on: as many take the time of a few.
pub(crate) fn run_all(name: &str, version: Version, cache: &str, scenarios: &[Scenario]) {
    let cache = CacheKind::of_word(cache);
    let Some(_place) = Place::take_if_there(name, version, cache) else {
        return;
    };
    let stage = Stage {
        version,
        cache,
        shared: Some(Shared {
            cache: Rc::new(Cache::start(cache)),
            bazels: RefCell::default(),
        }),
    };
    let mut failed = Vec::new();
    for (scenario, test) in scenarios {
        let began = Instant::now();
        // The next ones do not depend on it: each begins without outputs, and with a daemon of its own.
        let is_done = catch_unwind(AssertUnwindSafe(|| test(&stage))).is_ok();
        let took = began.elapsed().as_secs_f64();
        let result = if is_done { "ok" } else { "FAILED" };
        eprintln!("{cache:?}: {scenario}: {result} in {took:.1} s");
        if !is_done {
            failed.push(*scenario);
        }
    }
    assert!(failed.is_empty(), "failed with {cache:?}: {}", failed.join(", "));
}
