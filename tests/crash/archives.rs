//! `fetch archive`, killed on the way, and run again to its end.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use outhaul_testkit::{Chance, clean, finish};

use crate::{
    one_shot::killed,
    settings::{cases, first_seed, scratch},
};

/// Bytes by path.
type Files = BTreeMap<String, Vec<u8>>;

/// Some files, each of which says which version it is of and how long it is. Two versions have most paths in common.
fn files(dice: &mut Chance, archive: u64, version: &str) -> Files {
    let mut files = Files::new();
    for number in 0..150 {
        if dice.happens(0.1) {
            continue;
        }
        let length = dice.below(40_000) as usize;
        let mut bytes = format!("{version} {length} ").into_bytes();
        bytes.extend((0..length).map(|_| dice.number() as u8));
        files.insert(format!("d{}/{archive}-{number}.bin", number % 7), bytes);
    }
    files
}

/// Whether a file is a whole one, of any version.
fn is_whole(bytes: &[u8]) -> bool {
    let mut words = bytes.splitn(3, |byte| *byte == b' ');
    let (Some(_), Some(length), Some(rest)) = (words.next(), words.next(), words.next()) else {
        return false;
    };
    std::str::from_utf8(length).is_ok_and(|length| length.parse() == Ok(rest.len()))
}

/// Packs files as TheRock does it: below a stage directory, after a manifest that names it.
fn pack(files: &Files) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |name: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, bytes).unwrap();
    };
    add("artifact_manifest.txt", b"stage\n");
    for (name, bytes) in files {
        add(&format!("stage/{name}"), bytes);
    }
    zstd::encode_all(&*tar.into_inner().unwrap(), 1).unwrap()
}

/// All files below a directory but those of our own, which may be left by a kill.
fn below(dir: &Path) -> Files {
    let (mut files, mut open) = (Files::new(), vec![dir.to_owned()]);
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(&next).into_iter().flatten().map(Result::unwrap) {
            let path = entry.path();
            if entry.file_name().to_string_lossy().starts_with(".outhaul") {
                continue;
            }
            if path.is_dir() {
                open.push(path);
            } else {
                let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
                files.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    files
}

fn fetch(from: &Path, to: &Path, mode: &str) -> Command {
    let mut command = clean(Command::new(env!("CARGO_BIN_EXE_outhaul")));
    command.args(["fetch", "archive", mode]);
    command.arg(format!("file://{}/", from.display()));
    command.arg(format!("--output-dir={}", to.display()));
    command
}

/// What must be there in the end, and where files may stay that only the older archives had.
fn expected(mode: &str, old: &[Files], new: &[Files]) -> Files {
    let mut all = Files::new();
    if mode == "--flatten" {
        // Beside what is there.
        old.iter().chain(new).for_each(|files| all.extend(files.clone()));
        return all;
    }
    for (number, files) in new.iter().enumerate() {
        all.insert(format!("{number}/artifact_manifest.txt"), b"stage\n".to_vec());
        let files = files
            .iter()
            .map(|(name, bytes)| (format!("{number}/stage/{name}"), bytes.clone()));
        all.extend(files);
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_fetch_of_archives_leaves_whole_files_and_the_next_one_ends_right() {
    let seed = first_seed();
    let dir = scratch();
    let mut dice = Chance::new(seed);
    let mut usual = Duration::from_millis(200);
    let (mut kills, mut rounds, wanted) = (0, 0, cases(6));
    while kills < wanted {
        rounds += 1;
        let mode = dice.pick(&["--extract", "--flatten"]);
        let (from, to) = (
            dir.path().join(format!("in{rounds}")),
            dir.path().join(format!("out{rounds}")),
        );
        fs::create_dir(&from).unwrap();
        let mut versions = Vec::new();
        for version in ["old", "new"] {
            let archives: Vec<Files> = (0..3).map(|archive| files(&mut dice, archive, version)).collect();
            for (number, files) in archives.iter().enumerate() {
                fs::write(from.join(format!("{number}.tar.zst")), pack(files)).unwrap();
            }
            versions.push(archives);
            if version == "old" && dice.happens(0.7) {
                finish(fetch(&from, &to, mode)).await.expect(0);
            }
        }
        let before = below(&to);
        let old = if before.is_empty() { &[][..] } else { &versions[0] };
        let expected = expected(mode, old, &versions[1]);
        let was_killed = killed(fetch(&from, &to, mode), &mut dice, &mut usual).await;
        let note = format!("seed {seed}, round {rounds}, {mode}");
        for (name, bytes) in below(&to) {
            let is_manifest = name.ends_with("artifact_manifest.txt") && bytes == b"stage\n";
            assert!(is_manifest || is_whole(&bytes), "{note}: {name} is there in part");
            assert!(
                before.get(&name) == Some(&bytes) || expected.get(&name) == Some(&bytes),
                "{note}: {name} is neither the old file nor the new one"
            );
        }
        let began = Instant::now();
        finish(fetch(&from, &to, mode)).await.expect(0);
        // So that the moments of the next kill are spread over all of it.
        usual = (usual + began.elapsed().mul_f64(1.1)) / 2;
        let found = below(&to);
        assert!(
            found == expected,
            "{note}: {:?} instead of {:?}",
            found.keys(),
            expected.keys()
        );
        kills += u64::from(was_killed);
        fs::remove_dir_all(&from).unwrap();
        fs::remove_dir_all(&to).unwrap();
    }
    // Killed ones leave directories of ours beside their targets, and the next one takes them away or not; nothing else.
    let left: Vec<String> = crate::check::names(dir.path()).into_iter().collect();
    assert!(left.iter().all(|name| name.starts_with(".outhaul")), "{left:?}");
    eprintln!("fetch archive: {kills} kills in {rounds} rounds, seed {seed}");
}
