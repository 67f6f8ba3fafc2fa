//! Stores damaged by chance, in every way that comes to mind.

use std::{fs, path::PathBuf};

use outhaul_testkit::Chance;

use super::{
    damage::{ROWS, copy_dir, files, rounds, works_anyhow},
    *,
};

/// Chance that can be repeated.
struct Dice(Chance);

impl Dice {
    fn below(&mut self, end: usize) -> usize {
        self.0.below(end.max(1) as u64) as usize
    }
}

fn all_files(dir: &Path) -> Vec<PathBuf> {
    let mut found = files(dir);
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            found.extend(all_files(&entry.path()));
        }
    }
    found.sort();
    found
}

/// Does one thing to a file of a store, and says what. `older` is the same store some time ago.
fn damage(record: &Path, older: &Path, dice: &mut Dice) -> String {
    let files = all_files(record);
    if files.is_empty() {
        return "nothing is left".into();
    }
    let path = &files[dice.below(files.len())];
    let name = path.strip_prefix(record).unwrap().display().to_string();
    let mut bytes = fs::read(path).unwrap();
    // sled reserves space at the end; most damage is to be where something is.
    let used = bytes.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1);
    let what = match dice.below(9) {
        0 | 1 if used > 0 => {
            let (at, bit) = (dice.below(used), dice.below(8));
            bytes[at] ^= 1 << bit;
            format!("bit {bit} flipped at {at} of {used}")
        }
        2 if used > 0 => {
            let at = dice.below(used);
            bytes[at] = [0, 0xff, 0x7f, 0x80][dice.below(4)];
            format!("byte set at {at} of {used}")
        }
        3 => {
            let (at, len) = (dice.below(used), 1 + dice.below(8192));
            let end = bytes.len().min(at + len);
            bytes[at..end].fill(0);
            format!("zeros at {at}..{end} of {used}")
        }
        4 => {
            bytes.truncate(dice.below(used));
            format!("cut at {} of {used}", bytes.len())
        }
        5 => {
            fs::remove_file(path).unwrap();
            return format!("{name} removed");
        }
        6 => {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
            return format!("{name} is a directory");
        }
        7 => {
            // One file of an earlier time among those of now, as a restored backup may have it.
            let older = all_files(older);
            let from = &older[dice.below(older.len())];
            let to = record.join(from.file_name().unwrap());
            let _ = fs::remove_file(&to);
            // A directory that is in its place by now stays.
            let _ = fs::copy(from, to);
            return format!("{} from an earlier time", from.display());
        }
        _ => {
            let (from, to) = (dice.below(used), dice.below(used));
            let len = (1 + dice.below(4096)).min(used.saturating_sub(from.max(to)));
            bytes.copy_within(from..from + len, to);
            format!("{len} bytes of {from} at {to} of {used}")
        }
    };
    fs::write(path, bytes).unwrap();
    format!("{name}: {what}")
}

/// Repeated with `OUTHAUL_DAMAGE_SEED`; `OUTHAUL_DAMAGE_ROUNDS` says how many.
#[test]
fn a_store_damaged_in_any_way_costs_at_most_the_record() {
    let seed = std::env::var("OUTHAUL_DAMAGE_SEED")
        .ok()
        .and_then(|n| n.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| crate::units::now_ms().unsigned_abs());
    let base = tempfile::tempdir().unwrap();
    let older = tempfile::tempdir().unwrap();
    let (record, _) = open(base.path());
    let root = record.root("/exec", 1, 2);
    for part in 0..6 {
        record.put_outputs(root, numbered_rows(part * ROWS / 6..(part + 1) * ROWS / 6));
        run(record.flush()).unwrap();
        if part == 2 {
            copy_dir(&base.path().join("record"), older.path());
        }
    }
    drop(record);
    let mut quarantined = 0;
    let rounds = rounds(12) as u64;
    for round in 0..rounds {
        let mut dice = Dice(Chance::new(seed.wrapping_add(round)));
        let copy = tempfile::tempdir().unwrap();
        copy_dir(base.path(), copy.path());
        let what: Vec<_> = (0..=dice.below(2))
            .map(|_| damage(&copy.path().join("record"), older.path(), &mut dice))
            .collect();
        // Shown by the harness if what follows fails.
        eprintln!("seed {}: {what:?}", seed.wrapping_add(round));
        quarantined += u64::from(matches!(works_anyhow(copy.path()), Opening::Quarantined { .. }));
    }
    eprintln!("{rounds} damaged stores, {quarantined} set aside, seeds from {seed}");
}
