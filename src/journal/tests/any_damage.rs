//! A journal file damaged by chance.

use outhaul_testkit::Chance;

use super::*;

/// Repeated with `OUTHAUL_DAMAGE_SEED`; `OUTHAUL_DAMAGE_ROUNDS` says how many.
#[test]
fn a_file_damaged_in_any_way_gives_what_came_before_the_damage_and_can_be_continued() {
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse().ok());
    let seed: u64 = number("OUTHAUL_DAMAGE_SEED").unwrap_or_else(now_ms);
    let rounds: u64 = number("OUTHAUL_DAMAGE_ROUNDS").unwrap_or(300);
    let dir = tempfile::tempdir().unwrap();
    let (whole, ends, name) = {
        let journal = open(&dir.path().join("made"));
        let (mut writer, _) = journal.stream(&key("i")).unwrap();
        let head = fs::metadata(writer.path()).unwrap().len() as usize;
        let mut ends = vec![(head, 0)];
        let mut next = 1;
        for count in [1, 3, 40, 2, 200, 1, 7] {
            let at = append(&mut writer, next..next + count);
            next += count;
            ends.push(((at.offset + at.len) as usize, next - 1));
        }
        let name = writer.path().file_name().unwrap().to_owned();
        (fs::read(writer.path()).unwrap(), ends, name)
    };
    let mut shortened = 0;
    for round in 0..rounds {
        let seed = seed.wrapping_add(round);
        let mut chance = Chance::new(seed);
        let mut below = |end: usize| chance.below(end.max(1) as u64) as usize;
        let mut bytes = whole.clone();
        let at = below(bytes.len());
        let len = (1 + below(500)).min(bytes.len() - at);
        let what = below(6);
        match what {
            0 => bytes[at] ^= 1 << below(8),
            1 => bytes[at..at + len].fill(0),
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..at + len)),
            4 => drop(bytes.splice(at..at, vec![0x50; len])),
            // A part of it twice, as from a page that was written elsewhere.
            _ => {
                let from = below(bytes.len() - len);
                bytes.copy_within(from..from + len, at);
            }
        }
        let context = format!("seed {seed}: damage {what} at {at}, {len} bytes");
        let first = bytes.iter().zip(&whole).position(|(a, b)| a != b);
        let first = first.unwrap_or(bytes.len().min(whole.len()));
        let sound = ends.iter().rev().find(|(end, _)| *end <= first);
        let place = dir.path().join(format!("{round}"));
        let journal = open(&place);
        fs::write(place.join(&name), &bytes).unwrap();
        // Read, listed and planned by others before it is taken up.
        let read: Vec<i64> = journal
            .read("i")
            .map(|records| records.map_while(Result::ok).map(|r| r.sequence).collect())
            .unwrap_or_default();
        drop(journal.plan(Some(Duration::ZERO), Some(0)).unwrap());
        let (mut writer, recovered) = journal.stream(&key("i")).unwrap();
        let kept = recovered.highest.unwrap_or(0);
        let expected = sound.map_or(0, |(_, last)| *last);
        assert!(kept >= expected, "{context}: {kept} of {expected}");
        assert!(
            ends.iter().any(|(_, last)| *last == kept),
            "{context}: {kept} was never the last of a frame"
        );
        shortened += u64::from(kept < ends[ends.len() - 1].1);
        assert!(read.len() as i64 <= kept || kept == 0, "{context}");
        append(&mut writer, [kept + 1]);
        drop(writer);
        let after = numbers(&journal, "i");
        // What was damaged is cut, unless whole frames were doubled: upstream and engine know those by their numbers.
        let mut known: Vec<i64> = after.clone();
        known.sort_unstable();
        known.dedup();
        assert_eq!(known, (1..=kept + 1).collect::<Vec<_>>(), "{context}");
    }
    eprintln!("{rounds} damaged journals, {shortened} shortened, seeds from {seed}");
}
