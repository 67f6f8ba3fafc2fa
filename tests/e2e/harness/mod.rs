//! What the tests stand on: Bazels, caches, the daemon, the command line, output trees.
//!
//! ```ignore
//! for_each_bazel!(real: outputs_come_back);
//!
//! fn outputs_come_back(stage: &Stage) {
//!     let cache = stage.cache();
//!     let daemon = Daemon::start(&cache);
//!     let bazel = stage.bazel(&cache);
//!     bazel.build(&[&daemon.bes(), "//..."]).ok();
//! }
//! ```

// Not every test file uses everything that is here.
#![allow(dead_code, unused_imports)]

mod bazel;
mod cache;
mod daemon;
mod expected;
mod output_service;
mod presence;
mod proxy;
mod raw;
mod scratch;
mod stage;
mod tree;
mod upstream;

pub(crate) use self::{
    bazel::{Bazel, Version, cache_hits, executed},
    cache::{Cache, CacheKind, Settings},
    daemon::{Daemon, Outhaul},
    expected::Expected,
    output_service::OutputService,
    presence::Presence,
    proxy::{Proxy, Way},
    raw::RawClient,
    scratch::Scratch,
    stage::{Scenario, Stage, has_all, run, run_all, run_rarely},
    tree::{Entry, Tree},
    upstream::{Seen, Upstream},
};

/// Makes a test for each Bazel of each function, which gets a [`Stage`]. The word in front says which cache
/// [`Stage::cache`] starts: `real` (bazel-remote where it is, else BuildGrid), `casd`, `nginx` or `embedded`. The words of
/// `CacheKind::of_word` that are not gRPC caches are for `kinds.rs`.
///
/// `with 4 rarely` is for what depends on Outhaul more than on Bazel: Bazel 4 is used only with `OUTHAUL_E2E=all`.
macro_rules! for_each_bazel {
    ($cache:ident with 4 rarely: $($test:ident),+ $(,)?) => {
        for_each_bazel!(@ $cache, run_rarely: $($test),+);
    };
    ($cache:ident: $($test:ident),+ $(,)?) => {
        for_each_bazel!(@ $cache, run: $($test),+);
    };
    (@ $cache:ident, $with_4:ident: $($test:ident),+) => {
        mod $cache {
            mod bazel4 {
                $(#[test]
                fn $test() {
                    crate::harness::$with_4(
                        concat!(module_path!(), "::", stringify!($test)),
                        crate::harness::Version::Four,
                        stringify!($cache),
                        super::super::$test,
                    );
                })+
            }
            mod bazel7 {
                $(#[test]
                fn $test() {
                    crate::harness::run(
                        concat!(module_path!(), "::", stringify!($test)),
                        crate::harness::Version::Seven,
                        stringify!($cache),
                        super::super::$test,
                    );
                })+
            }
        }
    };
}
