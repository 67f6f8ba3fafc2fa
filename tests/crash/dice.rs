//! Chance that can be repeated, and the settings of a run.

use std::path::PathBuf;

use outhaul::chance::Chance;

/// Throws that can be repeated.
#[derive(Debug, Clone)]
pub(crate) struct Dice(Chance);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(Chance::new(seed))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0.number()
    }

    /// A number below `end`; 0 when that is 0.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        if end == 0 { 0 } else { self.next() % end }
    }

    /// True in so many of a hundred.
    pub(crate) fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        self.0.bytes(len)
    }
}

/// A number from the environment.
pub(crate) fn setting(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name}={text}: not a number")),
        Err(_) => default,
    }
}

/// How many cases a test is to try.
pub(crate) fn cases(default: u64) -> u64 {
    setting("OUTHAUL_CRASH_CASES", default)
}

/// The seed of a test's first world; by the clock, if nobody says.
pub(crate) fn first_seed() -> u64 {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos() as u64);
    setting("OUTHAUL_CRASH_SEED", now % 1_000_000_000)
}

/// Where scratch directories go.
pub(crate) fn scratch() -> tempfile::TempDir {
    let base = std::env::var_os("OUTHAUL_CRASH_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), PathBuf::from);
    std::fs::create_dir_all(&base).unwrap();
    tempfile::Builder::new()
        .prefix("crash-")
        .tempdir_in(base)
        .unwrap()
}
