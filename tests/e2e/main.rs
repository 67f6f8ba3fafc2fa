//! End to end: real Bazels, real caches and the real binary.
//!
//! The peers are installed by `scripts/install-peers`. A test whose peers are missing says so and passes, unless
//! `OUTHAUL_REQUIRE_PEERS=1`. Run with `cargo test --test e2e`; what a Bazel, a cache or the daemon said is part of
//! the message of a failed assertion.

#![allow(clippy::unwrap_used)]

#[macro_use]
mod harness;

mod alike;
mod asking;
mod ci;
mod cold;
mod disk;
mod failing;
mod faults;
mod flags;
mod google;
mod holding;
mod incremental;
mod intermediates;
mod kill;
mod kinds;
mod module;
mod oldest;
mod parallel;
mod proxy;
mod proxy_bytes;
mod proxy_ends;
mod proxy_faults;
mod proxy_many;
mod runfiles;
mod running;
mod served;
mod staging;
mod stores;
mod testing;
mod waiting;
