//! Several archives, targets that exist, and work that ends in the middle.

use std::{fs, os::unix::fs::symlink, sync::Barrier, thread};

use super::*;
use crate::{
    digest::{Digest, DigestFunction},
    materialize::place::Mount,
    output::OutputContent,
};

const REPLACE: StagingOptions = StagingOptions {
    existing: Existing::Replace,
    on_conflict: OnConflict::Fail,
    unsafe_links: false,
    lists: false,
};

#[test]
fn what_is_only_a_way_to_a_directory_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    for last in [".", "..", "../"] {
        let error = Staging::open(&out.join(last), REPLACE).unwrap_err();
        assert!(error.to_string().contains("no name of its own"), "{error}");
        let merge = StagingOptions {
            existing: Existing::Merge,
            ..REPLACE
        };
        Staging::open(&out.join(last), merge).unwrap();
    }
    assert_eq!(tree(dir.path()).len(), 1);
}

#[test]
fn a_target_is_replaced_as_a_whole_or_merged_into() {
    let tar = Tar::default().file("d/new", "new").file("both", "new").end();
    for (existing, expected) in [
        (
            Existing::Replace,
            vec![("both", "644 new"), ("d", "755 directory"), ("d/new", "644 new")],
        ),
        (
            Existing::Merge,
            vec![
                ("both", "644 new"),
                ("d", "755 directory"),
                ("d/new", "644 new"),
                ("d/old", "644 old"),
                ("old", "644 old"),
            ],
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("t");
        fs::create_dir_all(target.join("d")).unwrap();
        for name in ["old", "d/old", "both"] {
            fs::write(target.join(name), "old").unwrap();
        }
        let mut how = How::default();
        how.options.existing = existing;
        let published = how.all(&target, &[&tar]).unwrap();
        assert!(published.existed);
        assert_eq!(tree(&target), lines(&expected), "{existing:?}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "{existing:?}");
    }
}

#[test]
fn what_is_in_the_way_keeps_everything_from_being_published() {
    let tar = Tar::default()
        .file("a", "new")
        .file("d/x", "new")
        .file("z/y", "new")
        .end();
    for (name, expected) in [
        ("file", "a file where a directory is to be"),
        ("link", "a symlink where a directory is to be"),
        ("directory", "a directory where a file is to be"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        match name {
            "file" => fs::write(dir.path().join("z"), "old").unwrap(),
            "link" => symlink("elsewhere", dir.path().join("z")).unwrap(),
            _ => fs::create_dir_all(dir.path().join("a/b")).unwrap(),
        }
        let before = tree(dir.path());
        let error = How::default().all(dir.path(), &[&tar]).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(tree(dir.path()), before);
    }
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("t");
    for make in [
        |path: &Path| fs::write(path, "old").unwrap(),
        |path: &Path| symlink("gone", path).unwrap(),
    ] {
        make(&target);
        let before = tree(dir.path());
        let error = How::default().all(&target, &[&tar]).unwrap_err();
        assert!(matches!(error, ArchiveError::InTheWay { .. }), "{error}");
        assert_eq!(tree(dir.path()), before);
        fs::remove_file(&target).unwrap();
    }
}

#[test]
fn files_and_links_that_are_there_are_replaced_not_written_through() {
    let dir = tempfile::tempdir().unwrap();
    let (target, other) = (dir.path().join("t"), dir.path().join("other"));
    fs::create_dir(&target).unwrap();
    fs::write(&other, "other").unwrap();
    symlink("../other", target.join("a")).unwrap();
    fs::hard_link(&other, target.join("b")).unwrap();
    let tar = Tar::default().file("a", "new").file("b", "new").end();
    How::default().all(&target, &[&tar]).unwrap();
    assert_eq!(tree(&target), lines(&[("a", "644 new"), ("b", "644 new")]));
    assert_eq!(fs::read_to_string(other).unwrap(), "other");
}

#[test]
fn archives_share_files_only_with_the_same_bytes() {
    let one = Tar::default()
        .file("a", "1")
        .file("both", "same")
        .symlink("l", "a")
        .end();
    let two = Tar::default()
        .file("both", "same")
        .hard_link("copy", "both")
        .symlink("l", "a")
        .end();
    let dir = tempfile::tempdir().unwrap();
    How::default().all(&dir.path().join("t"), &[&one, &two]).unwrap();
    let expected = [
        ("a", "644 1"),
        ("both", "644 same"),
        ("copy", "644 same"),
        ("l", "-> a"),
    ];
    assert_eq!(tree(&dir.path().join("t")), lines(&expected));

    let three = Tar::default().file("a", "3").end();
    let error = How::default()
        .all(&dir.path().join("u"), &[&one, &three])
        .unwrap_err();
    let text = error.to_string();
    assert!(text.contains("\"a\" of 1.tar conflicts with 0.tar"), "{text}");
    assert!(text.contains("--on-conflict=last"), "{text}");
    assert!(!dir.path().join("u").exists());

    // A hard link to a file of another archive is not one to a file of its own.
    let four = Tar::default().hard_link("copy", "a").end();
    assert!(How::default().all(&dir.path().join("u"), &[&one, &four]).is_err());
}

#[test]
fn nothing_is_published_with_a_part_of_an_archive_among_it() {
    let good = Tar::default().file("a", "1").end();
    let bad = Tar::default().file("b", "2").file("../c", "3").end();
    let dir = tempfile::tempdir().unwrap();
    let how = How::default();
    let (staging, _) = how.stage(&dir.path().join("t"), &[&good]).unwrap();
    unpack(&bad[..], &how.archive("bad.tar", 1), &staging).unwrap_err();
    let error = staging.publish().unwrap_err().to_string();
    assert!(error.contains("only a part of bad.tar"), "{error}");
    assert_eq!(tree(dir.path()).len(), 0);
}

#[test]
fn the_last_archive_wins_in_any_order() {
    let mut how = How::default();
    how.options.on_conflict = OnConflict::Last;
    let one = Tar::default()
        .file("a", "1")
        .file("b", "1")
        .symlink("c", "a")
        .end();
    let two = Tar::default()
        .file("a", "2")
        .symlink("b", "a")
        .file("c", "2")
        .file("c", "3")
        .end();
    let expected = lines(&[("a", "644 2"), ("b", "-> a"), ("c", "644 3")]);
    for orders in [[0, 1], [1, 0]] {
        let dir = tempfile::tempdir().unwrap();
        let staging = Staging::open(&dir.path().join("t"), how.options).unwrap();
        for order in orders {
            let bytes = if order == 0 { &one } else { &two };
            unpack(&bytes[..], &how.archive("x", order), &staging).unwrap();
        }
        staging.publish().unwrap();
        assert_eq!(tree(&dir.path().join("t")), expected, "{orders:?}");
    }
    let three = Tar::default().file("a/b", "").end();
    let dir = tempfile::tempdir().unwrap();
    assert!(how.all(&dir.path().join("t"), &[&one, &three]).is_err());
}

#[test]
fn the_executable_one_of_two_equal_files_wins() {
    let plain = Tar::default().file("a", "1").end();
    let executable = Tar::default().entry(Entry {
        mode: 0o700,
        data: b"1",
        ..Entry::new(::tar::EntryType::Regular, "a")
    });
    let executable = executable.end();
    for archives in [[&plain[..], &executable], [&executable, &plain]] {
        let dir = tempfile::tempdir().unwrap();
        How::default().all(dir.path(), &archives).unwrap();
        assert_eq!(tree(dir.path()), lines(&[("a", "755 1")]));
    }
}

#[test]
fn archives_are_unpacked_at_the_same_time() {
    const THREADS: u32 = 4;
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("t");
    let how = How::default();
    let staging = Staging::open(&target, how.options).unwrap();
    let tars: Vec<Vec<u8>> = (0..THREADS)
        .map(|thread| {
            let shared = (0..50).fold(Tar::default(), |tar, n| {
                tar.file(&format!("d{}/e/same{n}", n % 5), &format!("{n}").repeat(2000))
            });
            shared.file(&format!("own{thread}"), "own").end()
        })
        .collect();
    let barrier = Barrier::new(THREADS as usize);
    thread::scope(|scope| {
        for (order, tar) in tars.iter().enumerate() {
            let (how, staging, barrier) = (&how, &staging, &barrier);
            scope.spawn(move || {
                barrier.wait();
                let done = unpack(&tar[..], &how.archive("x", order as u32), staging).unwrap();
                assert_eq!(done.files, 51);
            });
        }
    });
    let published = staging.publish().unwrap();
    assert_eq!(published.files, 50 + u64::from(THREADS));
    assert_eq!(tree(&target).len(), 50 + THREADS as usize + 10);
}

/// Ends the work of publishing after this many steps, as a kill does: nothing is cleared away.
fn interrupted(how: &How, target: &Path, tar: &[u8], steps: usize) -> bool {
    let (staging, _) = how.stage(target, &[tar]).unwrap();
    let mut done = 0;
    let published = staging.publish_with(&mut || {
        done += 1;
        if done > steps {
            return Err(ArchiveError::InTheWay {
                path: "x".into(),
                reason: "interrupted",
            });
        }
        Ok(())
    });
    published.is_err()
}

#[test]
fn each_file_is_whole_when_publishing_ends_in_the_middle_and_again_gives_all() {
    let tar = Tar::default()
        .file("a", "new a")
        .file("d/b", "new b")
        .file("d/c", "new c")
        .file("e/f/g", "new g")
        .symlink("l", "a")
        .end();
    for options in [How::default().options, REPLACE] {
        let how = How {
            options,
            ..How::default()
        };
        let mut steps = 0;
        loop {
            let dir = tempfile::tempdir().unwrap();
            let target = dir.path().join("t");
            fs::create_dir_all(target.join("d")).unwrap();
            for name in ["a", "d/b", "old"] {
                fs::write(target.join(name), "old").unwrap();
            }
            let before = tree(&target);
            let was_interrupted = interrupted(&how, &target, &tar, steps);
            let between = tree(&target);
            how.all(&target, &[&tar]).unwrap();
            let after = tree(&target);
            for (path, what) in &between {
                let is_known = before.get(path) == Some(what) || after.get(path) == Some(what);
                assert!(is_known, "{path}: {what}");
            }
            let gone = before.keys().find(|path| !between.contains_key(*path));
            assert_eq!(gone.filter(|_| was_interrupted), None);
            assert_eq!(after["d/b"], "644 new b");
            assert_eq!(after.contains_key("old"), options.existing == Existing::Merge);
            if !was_interrupted {
                break;
            }
            steps += 1;
        }
        let least = if options.existing == Existing::Merge { 5 } else { 1 };
        assert!(steps >= least, "{steps}");
    }
}

#[test]
fn what_a_killed_process_left_is_swept() {
    let dir = tempfile::tempdir().unwrap();
    for at in [dir.path().to_owned(), dir.path().join("t")] {
        fs::create_dir_all(at.join(".outhaul-tmp/999999-1/tree/d")).unwrap();
        fs::write(at.join(".outhaul-tmp/999999-1/tree/d/x"), "half").unwrap();
    }
    let tar = Tar::default().file("a", "1").end();
    How::default().all(&dir.path().join("t"), &[&tar]).unwrap();
    assert_eq!(tree(&dir.path().join("t")), lines(&[("a", "644 1")]));
    fs::remove_dir_all(dir.path().join("t")).unwrap();
    How::default().all(&dir.path().join("t"), &[&tar]).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_dropped_staging_directory_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("t");
    let tar = Tar::default().file("d/a", "1").symlink("l", "d").end();
    let (staging, unpacked) = How::default().stage(&target, &[&tar]).unwrap();
    assert_eq!((unpacked.files, unpacked.links, unpacked.bytes), (1, 1, 1));
    assert!(!target.exists());
    drop(staging);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_full_disk_is_an_error_that_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let Some(_mount) = Mount::new(&["-t", "tmpfs", "-o", "size=1m", "tmpfs"], dir.path()) else {
        return;
    };
    let large = Tar::default()
        .file("a", "1")
        .file("d/large", &"x".repeat(2 << 20))
        .end();
    let small = Tar::default().file("a", "1").end();
    let target = dir.path().join("t");
    for existing in [Existing::Merge, Existing::Replace] {
        let mut how = How::default();
        how.options.existing = existing;
        let error = how.all(&target, &[&large]).unwrap_err();
        let ArchiveError::Place { source, .. } = &error else {
            panic!("{error}");
        };
        use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        assert!(
            matches!(source.kind(), StorageFull | QuotaExceeded | FileTooLarge),
            "{error}"
        );
        assert!(error.to_string().contains("d/large"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        // What was written of it is free again.
        how.all(&target, &[&small]).unwrap();
        fs::remove_dir_all(&target).unwrap();
    }
}

#[test]
fn what_is_listed_is_what_is_published_below_a_directory() {
    let tar = Tar::default()
        .file("d/a", "one")
        .hard_link("b", "d/a")
        .symlink("d/l", "a")
        .directory("empty")
        .end();
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("t");
    fs::create_dir(&target).unwrap();
    let how = How::default();
    let options = StagingOptions {
        lists: true,
        ..how.options
    };
    let staging = Staging::open(&target, options).unwrap();
    let below = Archive {
        below: "x/y",
        ..how.archive("0.tar", 7)
    };
    unpack(&*tar, &below, &staging).unwrap();
    // A symlink must not lead out of the archive's own directory either.
    let out = Tar::default().symlink("l", "../z").end();
    assert!(unpack(&*out, &below, &staging).is_err());
    let staged = Staging::open(&target, options).unwrap();
    unpack(&*tar, &below, &staged).unwrap();
    let listed = staged.listed();
    let paths: Vec<_> = listed.iter().map(|one| (one.path.as_str(), one.order)).collect();
    let expected = ["x/y/b", "x/y/d/a", "x/y/d/l", "x/y/empty"].map(|path| (path, 7));
    assert_eq!(paths, expected);
    let one = OutputContent::Blob(Digest::of(DigestFunction::Sha256, b"one"));
    let link = OutputContent::Symlink("a".to_owned());
    let contents: Vec<_> = listed.iter().map(|one| one.content.clone()).collect();
    assert_eq!(contents, [one.clone(), one, link, OutputContent::Directory]);
    // Into the directory that is open, whatever has its path now.
    let opened = std::os::fd::OwnedFd::from(fs::File::open(&target).unwrap());
    assert!(staged.is_beside(&opened));
    let moved = dir.path().join("moved");
    fs::rename(&target, &moved).unwrap();
    fs::create_dir(&target).unwrap();
    drop(staging);
    staged.publish_into(&opened).unwrap();
    for one in listed.iter().filter(|one| one.inode != 0) {
        let found = fs::symlink_metadata(moved.join(one.path.as_path())).unwrap();
        assert_eq!(std::os::unix::fs::MetadataExt::ino(&found), one.inode);
    }
    assert_eq!(fs::read_to_string(moved.join("x/y/b")).unwrap(), "one");
    assert_eq!(tree(&target).len(), 0);
    let elsewhere = Staging::open(&target, options).unwrap();
    assert!(!elsewhere.is_beside(&opened));
}

#[test]
fn what_several_archives_have_is_listed_for_each() {
    let one = Tar::default()
        .file("same", "s")
        .symlink("l", "same")
        .directory("e")
        .end();
    let two = Tar::default()
        .file("other", "o")
        .file("same", "s")
        .file("same", "s")
        .symlink("l", "same")
        .directory("e")
        .end();
    let dir = tempfile::tempdir().unwrap();
    let how = How::default();
    let options = StagingOptions {
        lists: true,
        ..how.options
    };
    let staging = Staging::open(&dir.path().join("t"), options).unwrap();
    unpack(&*one, &how.archive("0.tar", 0), &staging).unwrap();
    unpack(&*two, &how.archive("1.tar", 1), &staging).unwrap();
    let listed = staging.listed();
    let found: Vec<_> = listed.iter().map(|one| (one.path.as_str(), one.order)).collect();
    let expected = [
        ("e", 0),
        ("e", 1),
        ("l", 0),
        ("l", 1),
        ("other", 1),
        ("same", 0),
        ("same", 1),
    ];
    assert_eq!(found, expected);
    assert!(
        listed
            .windows(2)
            .all(|two| two[0].path != two[1].path || two[0].content == two[1].content)
    );
}

#[test]
fn all_that_is_listed_together_is_within_one_limit() {
    let two = Tar::default().file("d/a", "1").file("d/b", "2").end();
    let dir = tempfile::tempdir().unwrap();
    let how = How::default();
    let options = StagingOptions {
        lists: true,
        ..how.options
    };
    let listable = Listable::new(6);
    let open = |name| {
        let staging = Staging::open(&dir.path().join(name), options).unwrap();
        staging.share(listable.clone());
        staging
    };
    let (first, second) = (open("x"), open("y"));
    unpack(&*two, &how.archive("0.tar", 0), &first).unwrap();
    unpack(&*two, &how.archive("1.tar", 0), &second).unwrap();
    // Shared paths count as well, for they are listed twice.
    let error = unpack(&*two, &how.archive("2.tar", 1), &second).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("2.tar") && text.contains(" 6 "), "{text}");
    // What is not listed any more makes room.
    drop((first, second));
    unpack(&*two, &how.archive("3.tar", 0), &open("z")).unwrap();
    listable.hold(4);
    let third = open("z");
    assert!(unpack(&*two, &how.archive("4.tar", 0), &third).is_err());
}
