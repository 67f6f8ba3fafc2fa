#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| outhaul::fuzzing::digest(data));
