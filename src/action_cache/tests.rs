use std::{fs, path::Path};

use super::{
    ActionCacheError, Extent, Reading,
    facts::Facts,
    read,
    write::{Action, Metadata, Written},
};
use crate::digest::{Digest, DigestFunction};

const SHA256: DigestFunction = DigestFunction::Sha256;

fn digest(text: &str) -> Digest {
    Digest::of(SHA256, text.as_bytes())
}

fn metadata(text: &str) -> Metadata {
    Metadata {
        hash: digest(text).hash().to_vec(),
        size: i64::try_from(text.len()).unwrap(),
        expires_ms: -1,
        link_to: None,
    }
}

fn action(primary: &str, files: &[(&str, &str)]) -> Action {
    Action {
        primary: primary.to_owned(),
        files: files
            .iter()
            .map(|(path, text)| ((*path).to_owned(), metadata(text)))
            .collect(),
        ..Action::default()
    }
}

fn decode(written: &Written) -> Result<Facts, String> {
    let decoded = Facts::decode(&written.files(), SHA256);
    decoded
        .map(|(facts, _)| facts)
        .map_err(|(file, fault)| format!("{file}: {}", fault.what))
}

#[test]
fn outputs_trees_and_links_are_reported_and_the_journal_counts_more() {
    let mut written = Written::new(16);
    written.put(
        &action(
            "bazel-out/k8/bin/a",
            &[("bazel-out/k8/bin/a", "old"), ("bazel-out/k8/bin/b", "b")],
        ),
        false,
    );
    written.put(
        &action("bazel-out/k8/bin/gone", &[("bazel-out/k8/bin/gone", "x")]),
        false,
    );
    let mut linking = action("bazel-out/k8/bin/link", &[("bazel-out/k8/bin/link", "b")]);
    linking.inputs = vec!["a/source.c".to_owned(), "ü.h".to_owned()];
    linking.files[0].1.link_to = Some("bazel-out/k8/bin/b".to_owned());
    // A link to a source file needs no download.
    linking
        .files
        .push(("bazel-out/k8/bin/source".to_owned(), metadata("s")));
    linking.files[1].1.link_to = Some("a/source.c".to_owned());
    written.put(&linking, false);
    let tree = Action {
        primary: "bazel-out/k8/bin/t".to_owned(),
        trees: vec![
            (
                "bazel-out/k8/bin/t".to_owned(),
                vec![
                    ("x".to_owned(), metadata("tx")),
                    ("sub/ü y".to_owned(), metadata("ty")),
                ],
            ),
            ("bazel-out/k8/bin/empty".to_owned(), Vec::new()),
        ],
        ..Action::default()
    };
    written.put(&tree, false);
    written.put(
        &action("bazel-out/k8/bin/a", &[("bazel-out/k8/bin/a", "new")]),
        true,
    );
    written.remove("bazel-out/k8/bin/gone");
    let facts = decode(&written).unwrap();
    let reported: Vec<(&str, u64)> = facts
        .outputs()
        .iter()
        .map(|output| (output.path.as_str(), output.digest.size()))
        .collect();
    assert_eq!(
        reported,
        [
            ("bazel-out/k8/bin/a", 3),
            ("bazel-out/k8/bin/link", 1),
            ("bazel-out/k8/bin/t/sub/ü y", 2),
            ("bazel-out/k8/bin/t/x", 2),
        ]
    );
    assert_eq!(facts.get("bazel-out/k8/bin/a").unwrap().digest, digest("new"));
    let link = facts.get("bazel-out/k8/bin/link").unwrap();
    assert_eq!(link.link_to.as_ref().unwrap().as_str(), "bazel-out/k8/bin/b");
    assert_eq!(facts.tree("bazel-out/k8/bin/t").count(), 2);
    assert_eq!(facts.tree("bazel-out/k8/bin").count(), 0);
    assert_eq!(facts.tree("bazel-out/k8/bin/t/sub").count(), 0);
}

#[test]
fn of_two_actions_words_the_owners_counts_then_the_later_and_else_none() {
    let b = "bazel-out/k8/bin/b";
    let reported = |first: (&str, i64), second: (&str, i64)| {
        let mut written = Written::new(17);
        for ((primary, expires_ms), text) in [(first, "1"), (second, "2")] {
            let mut one = action(primary, &[(b, text)]);
            one.files[0].1.expires_ms = expires_ms;
            written.put(&one, false);
        }
        let facts = decode(&written).unwrap();
        let is_ambiguous = facts.is_ambiguous(&b.parse().unwrap());
        let digest = facts.get(b).map(|output| output.digest.clone());
        assert_ne!(is_ambiguous, digest.is_some());
        digest
    };
    assert_eq!(reported(("bazel-out/k8/bin/a", 9), (b, -1)), Some(digest("2")));
    assert_eq!(
        reported(("bazel-out/a", 9), ("bazel-out/c", 8)),
        Some(digest("1"))
    );
    // What Bazel 8 leaves of an action whose outputs another one has now.
    assert_eq!(reported(("bazel-out/k8/bin/a", 9), (b, 8)), Some(digest("1")));
    assert_eq!(reported(("bazel-out/k8/bin/a", 9), (b, 9)), Some(digest("2")));
    assert_eq!(reported(("bazel-out/a", 9), ("bazel-out/c", 9)), None);
}

/// Anything that a path, a number or a length may be, and not make sense.
#[test]
fn what_makes_no_sense_is_refused_as_a_whole() {
    let good = action("bazel-out/k8/bin/a", &[("bazel-out/k8/bin/a", "a")]);
    let with = |change: fn(&mut Action)| {
        let mut written = Written::new(16);
        written.put(&good, false);
        let mut bad = action("bazel-out/k8/bin/b", &[("bazel-out/k8/bin/b", "b")]);
        change(&mut bad);
        written.put(&bad, false);
        written
    };
    assert_eq!(decode(&with(|_| ())).unwrap().outputs().len(), 2);
    for (written, part) in [
        (
            with(|a| a.files[0].0 = "etc/passwd".to_owned()),
            "not under bazel-out",
        ),
        (
            with(|a| a.files[0].0 = "bazel-out/../x".to_owned()),
            "not under bazel-out",
        ),
        (
            with(|a| a.files[0].0 = "bazel-outer/x".to_owned()),
            "not under bazel-out",
        ),
        (with(|a| a.files[0].1.size = -1), "negative size"),
        (
            with(|a| a.files[0].1.link_to = Some("bazel-out/../../x".to_owned())),
            "invalid symlink target",
        ),
        (
            with(|a| a.trees = vec![("bazel-out/t".to_owned(), vec![("../x".to_owned(), metadata("x"))])]),
            "not under bazel-out",
        ),
        (
            with(|a| a.trees = vec![("etc".to_owned(), vec![("x".to_owned(), metadata("x"))])]),
            "not under bazel-out",
        ),
    ] {
        let error = decode(&written).unwrap_err();
        assert!(error.contains(part), "{error}, not {part}");
    }
    // It has not run since builds here had another digest function.
    let older = with(|a| a.files[0].1.hash.truncate(20));
    assert_eq!(decode(&older).unwrap().outputs().len(), 1);
    let mut short_index = with(|_| ());
    short_index.index.truncate(16);
    assert!(
        decode(&short_index)
            .unwrap_err()
            .contains("more strings than exist")
    );
    let mut twice = with(|_| ());
    let again = twice.index[16..].to_vec();
    twice.index_journal.extend(&again);
    assert!(
        decode(&twice).is_ok(),
        "a journal may have again what is in the index"
    );
    let len = twice.index_journal.len();
    twice.index_journal[len - 6] ^= 1;
    assert!(decode(&twice).unwrap_err().contains("same number"));
}

/// Whatever byte is cut off or changed: an error, the same facts, or facts that make sense, never a panic. A length that
/// lies allocates nothing.
#[test]
fn damaged_files_are_refused_or_make_sense() {
    let mut written = Written::new(16);
    written.put(
        &action(
            "bazel-out/k8/bin/a",
            &[("bazel-out/k8/bin/a", "a"), ("bazel-out/k8/bin/b", "b")],
        ),
        false,
    );
    written.put(
        &action("bazel-out/k8/bin/c", &[("bazel-out/k8/bin/c", "c")]),
        true,
    );
    let whole = decode(&written).unwrap();
    type Pick = fn(&mut Written) -> &mut Vec<u8>;
    let files: [Pick; 3] = [|w| &mut w.actions, |w| &mut w.journal, |w| &mut w.index];
    for pick in files {
        let len = pick(&mut written.clone()).len();
        for at in 0..len {
            let mut cut = written.clone();
            pick(&mut cut).truncate(at);
            // Between two records nothing shows it.
            if let Ok(facts) = decode(&cut) {
                let is_reported = |output| whole.outputs().contains(output);
                assert!(facts.outputs().iter().all(is_reported), "cut at {at}: {facts:?}");
            }
            for bit in 0..8 {
                let mut flipped = written.clone();
                pick(&mut flipped)[at] ^= 1 << bit;
                if let Ok(facts) = decode(&flipped) {
                    assert!(facts.outputs().len() <= whole.outputs().len() + 1);
                }
            }
        }
    }
}

/// Files as Bazel 7.7.1 has left them, with what its `dump --action_cache` said of them.
#[test]
fn files_of_bazel_7_are_read_as_bazel_itself_reads_them() {
    for name in ["built", "changed"] {
        let from = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/action_cache/bazel7")
            .join(name);
        let base = tempfile::tempdir().unwrap();
        let directory = base.path().join("action_cache");
        fs::create_dir(&directory).unwrap();
        for entry in fs::read_dir(&from).unwrap() {
            let entry = entry.unwrap();
            if entry.file_name() != "outputs" {
                fs::copy(entry.path(), directory.join(entry.file_name())).unwrap();
            }
        }
        let Reading::Read(facts, state) = read(base.path(), SHA256, None).unwrap() else {
            panic!("{name}: nothing was read");
        };
        let reported: Vec<String> = facts
            .outputs()
            .iter()
            .map(|output| {
                let link = output.link_to.as_ref().map_or("null", |path| path.as_str());
                format!(
                    "{} {} {} {link}",
                    output.path,
                    output.digest.hash_hex(),
                    output.digest.size()
                )
            })
            .collect();
        let expected = fs::read_to_string(from.join("outputs")).unwrap();
        assert_eq!(reported, expected.lines().collect::<Vec<_>>(), "{name}");
        assert!(matches!(
            read(base.path(), SHA256, Some(&state)),
            Ok(Reading::Unchanged)
        ));
    }
}

/// Each build writes the workspace's status again: that alone is no reason to read all of it again.
#[test]
fn a_journal_that_grows_by_what_has_no_outputs_changes_nothing() {
    let mut written = some(16);
    written.put(&action("bazel-out/stable-status.txt", &[]), false);
    let base = directory(&[
        ("action_cache_v16.blaze", &written.actions),
        ("filename_index_v16.blaze", &written.index),
    ]);
    let journal = base.path().join("action_cache/action_journal_v16.blaze");
    let append = |from: usize, written: &Written| {
        let mut file = fs::File::options()
            .append(true)
            .create(true)
            .open(&journal)
            .unwrap();
        std::io::Write::write_all(&mut file, &written.journal[from..]).unwrap();
    };
    let Ok(Reading::Read(_, state)) = read(base.path(), SHA256, None) else {
        panic!("nothing was read");
    };
    let is_unchanged = || matches!(read(base.path(), SHA256, Some(&state)), Ok(Reading::Unchanged));
    assert!(is_unchanged());
    written.put(&action("bazel-out/stable-status.txt", &[]), true);
    append(0, &written);
    assert!(is_unchanged());
    let len = written.journal.len();
    written.put(&action("bazel-out/stable-status.txt", &[]), true);
    append(len, &written);
    assert!(is_unchanged());
    // An action whose output is no longer remote, as it was executed here.
    let len = written.journal.len();
    written.put(&action("bazel-out/a", &[]), true);
    append(len, &written);
    let Ok(Reading::Read(facts, state)) = read(base.path(), SHA256, Some(&state)) else {
        panic!("the change is not seen");
    };
    assert!(facts.outputs().is_empty());
    // And one that has become remote.
    let len = written.journal.len();
    written.put(&action("bazel-out/a", &[("bazel-out/a", "new")]), true);
    append(len, &written);
    assert!(matches!(
        read(base.path(), SHA256, Some(&state)),
        Ok(Reading::Read(..))
    ));
}

/// An action that is executed again, and a new one: only they are reported, with a string that is new.
#[test]
fn what_a_journal_has_more_is_reported_alone() {
    let mut written = some(16);
    let base = directory(&[
        ("action_cache_v16.blaze", &written.actions),
        ("filename_index_v16.blaze", &written.index),
    ]);
    let Ok(Reading::Read(facts, state)) = read(base.path(), SHA256, None) else {
        panic!("nothing was read");
    };
    assert_eq!((facts.extent(), facts.outputs().len()), (Extent::Whole, 1));
    let index = written.index.len();
    written.put(&action("bazel-out/b", &[("bazel-out/b", "b")]), true);
    let name = |name: &str| base.path().join("action_cache").join(name);
    let write = |written: &Written| {
        fs::write(name("action_journal_v16.blaze"), &written.journal).unwrap();
        let new_strings = [&written.index[..16], &written.index[index..]].concat();
        fs::write(name("filename_index_v16.journal"), new_strings).unwrap();
    };
    write(&written);
    let Ok(Reading::Read(facts, state)) = read(base.path(), SHA256, Some(&state)) else {
        panic!("nothing was read");
    };
    assert_eq!((facts.extent(), facts.outputs().len()), (Extent::Grown, 1));
    assert_eq!(facts.get("bazel-out/b").unwrap().digest, digest("b"));
    written.put(&action("bazel-out/a", &[("bazel-out/a", "new")]), true);
    write(&written);
    let Ok(Reading::Read(facts, state)) = read(base.path(), SHA256, Some(&state)) else {
        panic!("nothing was read");
    };
    assert_eq!((facts.extent(), facts.outputs().len()), (Extent::Grown, 1));
    assert_eq!(facts.get("bazel-out/a").unwrap().digest, digest("new"));
    // One that is gone, whose outputs are not reported any more.
    written.remove("bazel-out/b");
    write(&written);
    let Ok(Reading::Read(facts, _)) = read(base.path(), SHA256, Some(&state)) else {
        panic!("nothing was read");
    };
    assert_eq!((facts.extent(), facts.outputs().len()), (Extent::Whole, 1));
}

/// A directory with these files.
fn directory(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let base = tempfile::tempdir().unwrap();
    let directory = base.path().join("action_cache");
    fs::create_dir(&directory).unwrap();
    for (name, bytes) in files {
        fs::write(directory.join(name), bytes).unwrap();
    }
    base
}

fn some(format: i64) -> Written {
    let mut written = Written::new(format);
    written.put(&action("bazel-out/a", &[("bazel-out/a", "a")]), false);
    written
}

#[test]
fn only_known_formats_are_read_and_the_number_is_reported() {
    assert!(matches!(
        read(tempfile::tempdir().unwrap().path(), SHA256, None),
        Ok(Reading::Absent)
    ));
    for (in_name, in_header, known) in [
        (Some(16), 16, true),
        (Some(17), 17, true),
        (None, 18, true),
        (Some(16), 17, false),
        (Some(12), 12, false),
        (Some(21), 21, false),
        (None, 25, false),
    ] {
        let written = some(in_header);
        let named = |rest: [&str; 3]| match in_name {
            Some(number) => format!("{}_v{number}{}", rest[0], rest[1]),
            None => format!("{}{}", rest[0], rest[2]),
        };
        let actions = named(["action_cache", ".blaze", ".blaze"]);
        let journal = named(["action_journal", ".blaze", ".blaze"]);
        let index = named(["filename_index", ".blaze", ".blaze"]);
        let index_journal = named(["filename_index", ".journal", "_journal.blaze"]);
        let base = directory(&[
            (&actions, &written.actions),
            (&journal, &written.journal),
            (&index, &written.index),
            // Opened, and not written to yet.
            (&index_journal, b""),
        ]);
        match read(base.path(), SHA256, None) {
            Ok(Reading::Read(facts, _)) if known => assert_eq!(facts.outputs().len(), 1),
            Err(error @ ActionCacheError::Format { .. }) if !known => {
                let text = error.to_string();
                assert!(text.contains(&format!("format {}", in_header)), "{text}");
                assert_eq!(text.contains("no digests"), in_header == 12, "{text}");
            }
            other => panic!("{in_name:?} {in_header}: {other:?}"),
        }
    }
}

#[test]
fn of_two_formats_in_one_directory_the_one_that_was_written_last_counts() {
    let (old, new) = (some(12), some(16));
    let base = directory(&[
        ("action_cache_v16.blaze", &new.actions),
        ("filename_index_v16.blaze", &new.index),
        ("action_cache_v12.blaze", &old.actions),
        ("filename_index_v12.blaze", &old.index),
    ]);
    let set = |name: &str, seconds: u64| {
        let file = fs::File::options()
            .write(true)
            .open(base.path().join("action_cache").join(name));
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        file.unwrap().set_modified(time).unwrap();
    };
    set("action_cache_v12.blaze", 1000);
    set("action_cache_v16.blaze", 2000);
    assert!(matches!(read(base.path(), SHA256, None), Ok(Reading::Read(..))));
    set("action_cache_v12.blaze", 3000);
    assert!(read(base.path(), SHA256, None).unwrap_err().is_lasting());
    // A server that has run before writes its journal alone.
    fs::write(base.path().join("action_cache/action_journal_v16.blaze"), b"").unwrap();
    set("action_journal_v16.blaze", 4000);
    assert!(matches!(read(base.path(), SHA256, None), Ok(Reading::Read(..))));
    set("action_journal_v16.blaze", 2500);
    assert!(read(base.path(), SHA256, None).unwrap_err().is_lasting());
}

#[test]
fn links_pipes_and_directories_in_the_files_place_are_not_read() {
    let written = some(16);
    let base = directory(&[
        ("real", &written.actions),
        ("filename_index_v16.blaze", &written.index),
    ]);
    let actions = base.path().join("action_cache/action_cache_v16.blaze");
    std::os::unix::fs::symlink("real", &actions).unwrap();
    let error = read(base.path(), SHA256, None).unwrap_err().to_string();
    assert!(error.contains("symlink"), "{error}");
    fs::remove_file(&actions).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &actions, rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
    let error = read(base.path(), SHA256, None).unwrap_err().to_string();
    assert!(error.contains("not a regular file"), "{error}");
    fs::remove_file(&actions).unwrap();
    fs::create_dir(&actions).unwrap();
    assert!(read(base.path(), SHA256, None).is_err());
    fs::remove_dir(&actions).unwrap();
    // Between the old file's end and the new one's beginning.
    fs::write(base.path().join("action_cache/action_journal_v16.blaze"), b"").unwrap();
    assert!(matches!(
        read(base.path(), SHA256, None),
        Err(ActionCacheError::Busy { .. })
    ));
}

/// A reader beside a writer that replaces the files as Bazel does, in its order: each state that is read is one that was
/// there, whole.
#[test]
fn what_is_read_while_it_is_written_is_one_state_or_none() {
    let base = directory(&[]);
    let directory = base.path().join("action_cache");
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut written = Written::new(16);
            for round in 0..300 {
                let path = format!("bazel-out/{round}");
                written.put(
                    &action(&path, &[(&path, "x"), ("bazel-out/last", &round.to_string())]),
                    false,
                );
                let put = |name: &str, bytes: &[u8]| {
                    let temporary = directory.join(format!("{name}.tmp"));
                    fs::write(&temporary, bytes).unwrap();
                    // Bazel deletes, then renames.
                    let _ = fs::remove_file(directory.join(name));
                    fs::rename(&temporary, directory.join(name)).unwrap();
                };
                put("filename_index_v16.blaze", &written.index);
                put("action_cache_v16.blaze", &written.actions);
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        let mut last = 0;
        while !done.load(std::sync::atomic::Ordering::Relaxed) {
            match read(base.path(), SHA256, None) {
                Ok(Reading::Read(facts, _)) => {
                    // One of each round so far; `last` has as many contradicting actions as rounds.
                    let rounds = facts.outputs().len();
                    assert!(rounds >= last, "{rounds} after {last}");
                    last = rounds;
                }
                Ok(_) | Err(ActionCacheError::Busy { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
    });
}
