//! Archives that are made up: nothing outside of the target changes, and nothing in it is a part of something.
//!
//! `OUTHAUL_HOSTILE_CASES` is how many there are, `OUTHAUL_HOSTILE_SEED` repeats one.

use std::{fs, os::unix::fs::symlink};

use ::tar::EntryType;
use outhaul_testkit::Chance;
use rand::RngExt as _;

use super::{
    make::{Zip, ZipEntry},
    *,
};

const NAMES: &[&str] = &[
    "a",
    "b",
    "A",
    "d",
    "d/a",
    "d/b",
    "d/e/a",
    "d/..",
    "d/../a",
    "../outside/x",
    "../../x",
    "..",
    ".",
    "./a",
    "/x",
    "",
    "d//a",
    "a/",
    "d/",
    "l",
    "l/x",
    "l/d/x",
    "m/x",
    "m",
    ".outhaul-tmp",
    ".outhaul-tmp/x",
    "a\0b",
    "t/x",
    "d/e/f/g/h",
    "stage/a",
    "stage/d/b",
    "stage/l/x",
    "stage/l",
    "artifact_manifest.txt",
    "\u{e4}",
    "old",
    "old/x",
    "olddir",
    "out",
    "out/x",
];

const TARGETS: &[&str] = &[
    "a",
    "d",
    "d/e",
    ".",
    "..",
    "../outside",
    "../../outside",
    "/tmp",
    "d/../..",
    "l",
    "m",
    "",
    "./d",
    "stage/a",
    "d/e/../../..",
    "out",
    "../d",
];

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable}={text} is no number")),
    )
}

/// The content of a file says how long it is, so that a part of it is known.
fn content(chance: &mut Chance) -> String {
    let length = chance.pick(&[0, 1, 5, 511, 512, 513, 3000]);
    format!("{length}:{}", "x".repeat(length))
}

fn is_whole(content: &str) -> bool {
    let Some((length, rest)) = content.split_once(':') else {
        return false;
    };
    length.parse() == Ok(rest.len())
}

fn a_tar(chance: &mut Chance, flatten: bool) -> Vec<u8> {
    let mut tar = Tar::default();
    if flatten && chance.happens(0.9) {
        tar = tar.file(
            "artifact_manifest.txt",
            chance.pick(&["stage\n", "stage\nd\n", "d/e\n../outside\n", ""]),
        );
    }
    for _ in 0..chance.below(8) {
        let (name, to) = (chance.pick(NAMES), chance.pick(TARGETS));
        let data = content(chance);
        if chance.happens(0.1) {
            let path = [("path", chance.pick(NAMES)), ("linkpath", to)];
            tar = tar.pax(EntryType::XHeader, &path[..chance.between(1, 2) as usize]);
        }
        tar = match chance.below(12) {
            0..5 => tar.file(name, &data),
            5..7 => tar.directory(name),
            7..9 => tar.symlink(name, to),
            9 | 10 => tar.hard_link(name, chance.pick(NAMES)),
            _ => {
                // With another size than that of its data, what follows is its data as well: nothing is known of it.
                let size = chance.happens(0.3).then(|| chance.below(10_000));
                tar.entry(Entry {
                    mode: chance.number() as u32 & 0o7777,
                    link: to.as_bytes(),
                    size,
                    data: if size.is_some() { b"?" } else { data.as_bytes() },
                    ..Entry::new(EntryType::new(chance.pick(b"01234567SLKxgV\0D")), name)
                })
            }
        };
    }
    tar.end()
}

fn a_zip(chance: &mut Chance) -> Vec<u8> {
    let mut zip = Zip::default();
    for _ in 0..chance.below(8) {
        let data = content(chance);
        let is_link = chance.happens(0.3);
        let entry = ZipEntry {
            mode: if is_link {
                0o120_777
            } else {
                chance.pick(&[0o100_644, 0o100_755, 0o040_755, 0o010_644, 0])
            },
            local_name: chance.happens(0.05).then(|| chance.pick(NAMES)),
            size: chance.happens(0.05).then(|| chance.below(1 << 40)),
            overlaps: chance.happens(0.05),
            is_deflated: chance.happens(0.5),
            ..ZipEntry::new(
                chance.pick(NAMES),
                if is_link { chance.pick(TARGETS) } else { &data },
            )
        };
        zip = zip.entry(&entry);
    }
    zip.end()
}

/// Something of everything that may go wrong on the way.
fn damaged(chance: &mut Chance, mut bytes: Vec<u8>) -> Vec<u8> {
    match chance.below(10) {
        0 if !bytes.is_empty() => bytes.truncate(chance.below(bytes.len() as u64) as usize),
        1 => {
            for _ in 0..chance.between(1, 4) {
                let at = chance.below(bytes.len().max(1) as u64) as usize;
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << chance.below(8);
                }
            }
        }
        _ => {}
    }
    bytes
}

/// A target with something in it, and a directory beside it that links may lead to.
fn prepare(base: &Path, chance: &mut Chance) {
    fs::create_dir_all(base.join("outside/d")).unwrap();
    fs::write(base.join("outside/x"), "3:xxx").unwrap();
    if chance.happens(0.6) {
        fs::create_dir_all(base.join("in/t/olddir")).unwrap();
        fs::write(base.join("in/t/old"), "3:old").unwrap();
        symlink("../../outside", base.join("in/t/out")).unwrap();
        if chance.happens(0.3) {
            symlink("../../outside/x", base.join("in/t/a")).unwrap();
        }
    } else {
        fs::create_dir(base.join("in")).unwrap();
    }
}

/// Whether a description of a file, as [`tree`] gives it, is one of what was there or of something whole.
fn judge(path: &Path, what: &str, before: &BTreeMap<String, String>, name: &str) {
    if what.starts_with("-> ")
        || what.ends_with(" directory")
        || before.get(name).is_some_and(|old| old == what)
    {
        return;
    }
    let content = fs::read_to_string(path).unwrap();
    let is_known = content.starts_with('?') || is_whole(&content);
    assert!(is_known, "{name}: {content:?}");
    assert!(
        what.starts_with("644 ") || what.starts_with("755 "),
        "{name}: {what}"
    );
}

fn case(seed: u64) -> bool {
    let chance = &mut Chance::new(seed);
    let dir = tempfile::tempdir().unwrap();
    let base = fs::canonicalize(dir.path()).unwrap();
    prepare(&base, chance);
    let format = chance.pick(&[
        Format::Tar,
        Format::Tar,
        Format::TarGz,
        Format::TarZst,
        Format::TarXz,
        Format::Zip,
    ]);
    let flatten = format != Format::Zip && chance.happens(0.3);
    let how = How {
        format,
        mode: if flatten {
            Mode::Flatten
        } else {
            Mode::Extract {
                strip_components: chance.pick(&[0, 0, 0, 1]),
            }
        },
        options: StagingOptions {
            existing: chance.pick(&[Existing::Merge, Existing::Replace]),
            on_conflict: chance.pick(&[OnConflict::Fail, OnConflict::Last]),
            unsafe_links: chance.happens(0.3),
            lists: false,
        },
        ..How::default()
    };
    let archives: Vec<Vec<u8>> = (0..chance.between(1, 3))
        .map(|_| {
            if format == Format::Zip {
                let zip = a_zip(chance);
                damaged(chance, zip)
            } else {
                // Before compression only as far as the content of files is not changed without notice.
                let tar = a_tar(chance, flatten);
                let bytes = compress(format, &tar);
                if format == Format::Tar {
                    bytes
                } else {
                    damaged(chance, bytes)
                }
            }
        })
        .collect();
    let archives: Vec<&[u8]> = archives.iter().map(Vec::as_slice).collect();
    let (before, outside) = (tree(&base), tree(&base.join("outside")));
    let result = how.all(&base.join("in/t"), &archives);
    assert_eq!(tree(&base.join("outside")), outside);
    let after = tree(&base);
    match &result {
        Err(_) => assert_eq!(after, before),
        Ok(_) => {
            for (name, what) in &after {
                let is_allowed = ["in", "in/t", "outside"].contains(&name.as_str())
                    || name.starts_with("in/t/")
                    || name.starts_with("outside/");
                assert!(is_allowed && !name.contains(".outhaul"), "{name}");
                judge(&base.join(name), what, &before, name);
            }
        }
    }
    result.is_ok()
}

#[test]
fn archives_of_nonsense_change_nothing_outside_and_leave_nothing_partial() {
    let cases = number("OUTHAUL_HOSTILE_CASES").unwrap_or(40) * 5;
    let first = number("OUTHAUL_HOSTILE_SEED").unwrap_or_else(|| rand::rng().random_range(0..1 << 32));
    let mut unpacked = 0;
    for seed in first..first + cases {
        let done = std::panic::catch_unwind(|| case(seed));
        match done {
            Ok(is_unpacked) => unpacked += u64::from(is_unpacked),
            Err(panic) => {
                eprintln!("OUTHAUL_HOSTILE_SEED={seed} OUTHAUL_HOSTILE_CASES=1");
                std::panic::resume_unwind(panic);
            }
        }
    }
    eprintln!("{unpacked} of {cases} archives were unpacked");
    // As few as none would mean that nothing is tried.
    assert!(unpacked > 0 || cases < 100);
}
