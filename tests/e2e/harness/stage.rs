//! What a test is given.

use std::sync::{Condvar, Mutex, PoisonError};

use outhaul_testkit::peers;

use super::{
    bazel::{Bazel, Version},
    cache::{Cache, CacheKind},
};

/// Tests that may have Bazels at the same time: each is a JVM with a heap of half a gigabyte, and busy.
const AT_ONCE: usize = 2;

static BUSY: Mutex<usize> = Mutex::new(0);
static FREE: Condvar = Condvar::new();

/// Which Bazel and which cache a test is to use.
pub(crate) struct Stage {
    pub(crate) version: Version,
    pub(crate) cache: CacheKind,
}

impl Stage {
    /// An empty cache.
    pub(crate) fn cache(&self) -> Cache {
        Cache::start(self.cache)
    }

    /// A Bazel that uses a cache.
    pub(crate) fn bazel(&self, cache: &Cache) -> Bazel {
        Bazel::new(self.version, cache.url())
    }
}

/// One of the places for tests with Bazels.
struct Place;

impl Place {
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
    let needed: Vec<&str> = std::iter::once(version.peer()).chain(cache.peer()).collect();
    if !peers::are_there(name, &needed) {
        return;
    }
    let _place = Place::take();
    test(&Stage { version, cache });
}
