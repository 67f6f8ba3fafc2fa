//! Where the programs of others are.

use std::path::{Path, PathBuf};

fn directory() -> PathBuf {
    match std::env::var_os("OUTHAUL_PEERS") {
        Some(dir) => dir.into(),
        None => Path::new(&std::env::var_os("HOME").expect("HOME is set")).join(".cache/outhaul-peers"),
    }
    .join("bin")
}

/// A peer's program, if it is installed.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = directory().join(name);
    path.exists().then_some(path)
}

/// A peer's program, which [`are_there`] has found.
pub fn program(name: &str) -> PathBuf {
    find(name).unwrap_or_else(|| panic!("{name} is not in {}", directory().display()))
}

/// Whether a test that finds no such peer fails instead of being skipped: `OUTHAUL_REQUIRE_PEERS` is `1`, or a list of
/// names with commas that has this one.
pub fn is_required(name: &str) -> bool {
    let required = std::env::var("OUTHAUL_REQUIRE_PEERS").unwrap_or_default();
    required == "1" || required.split(',').any(|one| one == name)
}

/// Whether a test can run; says loudly what is missing if not.
pub fn are_there(test: &str, names: &[&str]) -> bool {
    let missing: Vec<&str> = names
        .iter()
        .copied()
        .filter(|name| find(name).is_none())
        .collect();
    if missing.is_empty() {
        return true;
    }
    let reason = format!(
        "no {} in {}; scripts/install-peers installs it",
        missing.join(", "),
        directory().display()
    );
    skip(test, &missing, &reason);
    false
}

/// Says loudly that a test is skipped because of what is missing; panics if that is required.
#[track_caller]
pub fn skip(test: &str, missing: &[&str], reason: &str) {
    let message = format!("SKIPPED: {test}: {reason}");
    assert!(!missing.iter().any(|name| is_required(name)), "{message}");
    // Past the test runner, which shows nothing of a test that passes.
    let mut terminal = std::io::stderr().lock();
    let _ = std::io::Write::write_all(&mut terminal, format!("\n{message}\n").as_bytes());
}
