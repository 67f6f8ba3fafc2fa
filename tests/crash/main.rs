//! Crashes of the real binary: SIGKILL at any moment, restarts, and what is on disk before and after them.
//!
//! The cache and the build tool are in this process, and survive. Settings are environment variables:
//!
//! | variable | meaning |
//! |---|---|
//! | `OUTHAUL_CRASH_CASES` | how many kills of a daemon there are, 6 if not set |
//! | `OUTHAUL_CRASH_SEED` | the first world's seed, to repeat what a failure names |
//! | `OUTHAUL_CRASH_DIR` | where the worlds are made, for another file system than that of cargo's target directory |
#![allow(clippy::unwrap_used)]

mod archives;
mod build;
mod check;
mod client;
mod kill;
mod one_shot;
mod serving;
mod settings;
mod torn;
mod two;
mod world;
