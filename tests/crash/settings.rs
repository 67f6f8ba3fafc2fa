//! The settings of a run.

use std::path::PathBuf;

use outhaul_testkit::number;

/// How many cases a test is to try.
pub(crate) fn cases(default: u64) -> u64 {
    number("OUTHAUL_CRASH_CASES").unwrap_or(default)
}

/// The seed of a test's first world; by the clock, if nobody says.
pub(crate) fn first_seed() -> u64 {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos() as u64);
    number("OUTHAUL_CRASH_SEED").unwrap_or(now % 1_000_000_000)
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
