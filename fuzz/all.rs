//! The fuzzer of the target that `OUTHAUL_FUZZ_TARGET` names.
#![no_main]

use std::sync::LazyLock;

use outhaul::fuzzing::{TARGETS, Target};

static RUN: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("OUTHAUL_FUZZ_TARGET").unwrap_or_default();
    let Some((_, run)) = TARGETS.iter().find(|(target, _)| *target == name) else {
        eprintln!("OUTHAUL_FUZZ_TARGET={name}: there is no such target");
        std::process::exit(2);
    };
    *run
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| RUN(data));
