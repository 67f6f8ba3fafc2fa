//! The kept inputs, and damaged copies of them, on every target.
//!
//! `OUTHAUL_FUZZ_CASES` is how many damaged inputs each target gets, `OUTHAUL_FUZZ_SEED` repeats a run.

use std::{fs, panic, path::Path};

use outhaul_testkit::number;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::TARGETS;

/// The inputs that are kept for a target, by name.
fn seeds(target: &str) -> Vec<(String, Vec<u8>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/seeds")
        .join(target);
    let mut seeds: Vec<_> = fs::read_dir(&directory)
        .unwrap_or_else(|e| panic!("{}: {e}", directory.display()))
        .map(|entry| entry.unwrap())
        .map(|entry| {
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read(entry.path()).unwrap())
        })
        .collect();
    seeds.sort();
    assert!(!seeds.is_empty(), "{target} has no seeds");
    seeds
}

#[test]
fn kept_inputs_do_no_harm() {
    for (target, run) in TARGETS {
        run(&[]);
        for (name, data) in seeds(target) {
            eprintln!("{target} {name}");
            run(&data);
        }
    }
}

/// One kind of damage, as by files, networks, or an attacker who knows the format.
fn damage(data: &mut Vec<u8>, other: &[u8], random: &mut StdRng) {
    let at = random.random_range(0..=data.len());
    let end = random.random_range(at..=data.len().min(at + 64));
    match random.random_range(0..8) {
        0 => data.truncate(at),
        1 => {
            data.drain(at..end);
        }
        2 => data[at..end].fill(random.random()),
        3 => {
            let piece = data[at..end].to_vec();
            data.splice(at..at, piece);
        }
        4 => {
            let from = random.random_range(0..=other.len());
            let to = random.random_range(from..=other.len().min(from + 64));
            data.splice(at..end, other[from..to].iter().copied());
        }
        5 => {
            // Ends of the ranges of numbers.
            let bytes: &[u8] = match random.random_range(0..4) {
                0 => &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
                1 => &[0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01],
                2 => &[0xff, 0xff, 0xff, 0xff, 0x0f],
                _ => &[0],
            };
            data.splice(at..end, bytes.iter().copied());
        }
        _ => {
            if let Some(byte) = data.get_mut(at) {
                *byte ^= 1 << random.random_range(0..8);
            }
        }
    }
}

#[test]
fn damaged_inputs_do_no_harm() {
    let cases = number("OUTHAUL_FUZZ_CASES").unwrap_or(100);
    let first = number("OUTHAUL_FUZZ_SEED").unwrap_or_else(|| rand::rng().random_range(0..1 << 32));
    for (target, run) in TARGETS {
        let seeds = seeds(target);
        for seed in first..first.saturating_add(cases) {
            let mut random = StdRng::seed_from_u64(seed);
            let mut data = seeds[random.random_range(0..seeds.len())].1.clone();
            // Most of a large one is more of the same.
            data.truncate(1 << 14);
            let other = &seeds[random.random_range(0..seeds.len())].1;
            for _ in 0..random.random_range(1..6) {
                damage(&mut data, other, &mut random);
            }
            if let Err(panic) = panic::catch_unwind(|| run(&data)) {
                eprintln!(
                    "{target}: OUTHAUL_FUZZ_SEED={seed} OUTHAUL_FUZZ_CASES=1, input {}",
                    hex::encode(&data)
                );
                panic::resume_unwind(panic);
            }
        }
    }
}

/// What opens, and opens, and is never closed; and the same closed again.
fn deep(opening: &str, middle: &str, closing: &str) -> Vec<u8> {
    const DEPTH: usize = 50_000;
    [&*opening.repeat(DEPTH), middle, &*closing.repeat(DEPTH)]
        .concat()
        .into_bytes()
}

#[test]
fn no_depth_overflows_the_stack() {
    let mut inputs = vec![
        deep("[", "", ""),
        deep("[", "1", "]"),
        deep("{\"a\":", "1", "}"),
        deep("x={a=", "1", "}"),
        deep("a.", "a = 1", ""),
        [b"a = ".to_vec(), deep("[", "1", "]")].concat(),
        [b"[".to_vec(), deep("a.", "a]", "")].concat(),
        [
            b"{\"progress\":{\"more\":".to_vec(),
            deep("[", "1", "]"),
            b"}}".to_vec(),
        ]
        .concat(),
        [b"{\"more\":".to_vec(), deep("{\"a\":", "1", "}"), b"}".to_vec()].concat(),
        deep("(", "a", ")"),
        deep("d/", "d", ""),
        deep("%25", "41", ""),
    ];
    // Groups of protocol buffers, which nest without giving their length, by several numbers.
    for number in [1_u8, 3, 5, 15] {
        let (opening, closing) = (number << 3 | 3, number << 3 | 4);
        inputs.push(vec![opening; 100_000]);
        inputs.push([vec![opening; 50_000], vec![closing; 50_000]].concat());
    }
    // Messages in messages, as far as their lengths have two bytes.
    let mut message = Vec::new();
    while message.len() < 16_000 {
        let mut outer = vec![0x0a];
        prost::encode_length_delimiter(message.len(), &mut outer).unwrap();
        outer.extend_from_slice(&message);
        message = outer;
    }
    inputs.push(message);
    for (target, run) in TARGETS {
        for (number, input) in inputs.iter().enumerate() {
            eprintln!("{target} {number}");
            run(input);
        }
    }
}
