//! Big files and copies.

use std::{os::unix::fs::MetadataExt as _, process::Command, thread, thread::sleep, time::Duration};

use super::*;

/// A few MiB that do not repeat, and not a whole number of anything.
fn big() -> Vec<u8> {
    (0u64..400_001).flat_map(|i| (i * i).to_le_bytes()).collect()
}

#[test]
fn a_stream_is_verified_and_published_whatever_its_pieces() {
    everywhere(|mut f| {
        let bytes = big();
        let path = exec("bazel-out/new/dir/file");
        for piece in [1000, 1 << 20, (1 << 20) + 7, bytes.len()] {
            let mut file = f.placer.begin_large(&path, &digest(&bytes)).unwrap();
            for piece in bytes.chunks(piece) {
                file.write(piece).unwrap();
            }
            assert_eq!(file.offset(), bytes.len() as u64);
            let placed = file.finish(&f.epoch, 1).unwrap();
            let seen = old_stamp(&f.path(path.as_str()));
            assert!(sys::is_same_file(&placed.stamp, &seen));
            assert!(fs::read(f.path(path.as_str())).unwrap() == bytes);
            assert_eq!(mode(&f.path(path.as_str())), 0o555);
            fs::write(f.path("bazel-out/other"), "old").unwrap();
            fs::rename(f.path("bazel-out/other"), f.path(path.as_str())).unwrap();
        }
        assert_eq!(f.leftovers(), Vec::<PathBuf>::new());
    });
}

#[test]
fn a_file_that_tmpfs_has_no_room_for_fails_before_its_first_byte() {
    let tmpfs = Path::new("/dev/shm");
    if !tmpfs.is_dir() {
        return;
    }
    let mut f = Fixture::beneath(tmpfs);
    let room = sys::free_on_tmpfs(fs::File::open(f.path("bazel-out")).unwrap()).unwrap();
    let Some(room) = room.filter(|room| *room < u64::MAX) else {
        return;
    };
    let too_big = Digest::new(DigestFunction::Sha256, &[7; 32], room.saturating_mul(2)).unwrap();
    let error = f
        .placer
        .begin_large(&exec("bazel-out/file"), &too_big)
        .unwrap_err();
    assert!(error.is_errno(rustix::io::Errno::NOSPC), "{error}");
    assert_eq!(f.leftovers(), Vec::<PathBuf>::new());
}

#[test]
fn a_dropped_or_wrong_stream_leaves_nothing() {
    everywhere(|mut f| {
        let bytes = big();
        let path = exec("bazel-out/new/file");
        let mut dropped = f.placer.begin_large(&path, &digest(&bytes)).unwrap();
        dropped.write(&bytes[..5_000]).unwrap();
        drop(dropped);

        let mut short = f.placer.begin_large(&path, &digest(&bytes)).unwrap();
        short.write(&bytes[1..]).unwrap();
        let error = short.finish(&f.epoch, 1).unwrap_err();
        assert!(
            matches!(error.kind, PlaceErrorKind::Mismatch { actual: Some(_), .. }),
            "{error}"
        );

        let mut long = f.placer.begin_large(&path, &digest(&bytes)).unwrap();
        long.write(&bytes).unwrap();
        let error = long.write(b"!").unwrap_err();
        assert!(
            matches!(error.kind, PlaceErrorKind::Mismatch { actual: None, .. }),
            "{error}"
        );
        drop(long);

        let mut late = f.placer.begin_large(&path, &digest(&bytes)).unwrap();
        late.write(&bytes).unwrap();
        f.epoch.begin(2);
        assert!(matches!(
            late.finish(&f.epoch, 1).unwrap_err().kind,
            PlaceErrorKind::Superseded
        ));

        assert!(!f.path("bazel-out/new").exists());
        assert_eq!(f.leftovers(), Vec::<PathBuf>::new());
    });
}

#[test]
fn a_stream_moves_between_threads_and_outlives_its_placer() {
    let mut f = Fixture::new();
    let path = exec("bazel-out/file");
    let mut file = f.placer.begin_large(&path, &digest("hello")).unwrap();
    let Fixture {
        base,
        root,
        epoch,
        placer,
        ..
    } = f;
    drop((placer, root));
    thread::spawn(move || {
        file.write(b"hello").unwrap();
        file.finish(&epoch, 1).unwrap();
    })
    .join()
    .unwrap();
    assert_eq!(
        fs::read(base.path().join("execroot/_main/bazel-out/file")).unwrap(),
        b"hello"
    );
    assert!(
        !base.path().join(".outhaul-tmp").exists(),
        "the last one clears up"
    );
}

#[test]
fn a_published_program_can_be_executed_at_once() {
    everywhere(|mut f| {
        let script = "#!/bin/sh\nexit 42\n";
        let path = exec("bazel-out/program");
        let mut file = f.placer.begin_large(&path, &digest(script)).unwrap();
        file.write(script.as_bytes()).unwrap();
        file.finish(&f.epoch, 1).unwrap();
        f.place("bazel-out/small", script).unwrap();
        for program in ["bazel-out/program", "bazel-out/small"] {
            // Another test's child may hold a descriptor of ours between its fork and its exec.
            let status = (0..50).find_map(|_| {
                Command::new(f.path(program)).status().ok().or_else(|| {
                    sleep(Duration::from_millis(20));
                    None
                })
            });
            assert_eq!(status.unwrap().code(), Some(42));
        }
    });
}

#[test]
fn a_stream_keeps_right_bytes_that_came_meanwhile() {
    everywhere(|mut f| {
        let path = exec("bazel-out/file");
        let mut file = f.placer.begin_large(&path, &digest("hello")).unwrap();
        file.write(b"hello").unwrap();
        fs::write(f.path("bazel-out/file"), "hello").unwrap();
        assert_eq!(file.finish(&f.epoch, 1).unwrap().how, How::Kept);
        assert_eq!(mode(&f.path("bazel-out/file")) & 0o200, 0o200);
    });
}

#[test]
fn an_empty_stream_is_an_empty_file() {
    everywhere(|mut f| {
        let file = f
            .placer
            .begin_large(&exec("bazel-out/empty"), &digest(""))
            .unwrap();
        file.finish(&f.epoch, 1).unwrap();
        assert_eq!(f.read("bazel-out/empty"), "");
    });
}

#[test]
fn a_copy_is_a_file_of_its_own_with_the_right_bytes() {
    everywhere(|mut f| {
        let bytes = big();
        fs::write(f.path("bazel-out/from"), &bytes).unwrap();
        let (from, to) = (exec("bazel-out/from"), exec("bazel-out/new/to"));
        let stamp = old_stamp(&f.path("bazel-out/from"));
        let placed = f
            .placer
            .copy_within((&from, &stamp), &to, &digest(&bytes), false, &f.epoch, 1)
            .unwrap();
        assert_eq!(placed.how, How::Created);
        assert!(fs::read(f.path("bazel-out/new/to")).unwrap() == bytes);
        let (a, b) = (f.path("bazel-out/from"), f.path("bazel-out/new/to"));
        assert_ne!(fs::metadata(a).unwrap().ino(), fs::metadata(&b).unwrap().ino());
        assert_eq!(mode(&b), 0o555);
    });
}

#[test]
fn a_source_that_changed_or_never_had_the_blob_is_not_copied() {
    fn copy(f: &mut Fixture, stamp: &Stamp, bytes: &str) -> PlaceErrorKind {
        let (from, to) = (exec("bazel-out/from"), exec("bazel-out/to"));
        let result = f
            .placer
            .copy_within((&from, stamp), &to, &digest(bytes), false, &f.epoch, 1);
        result.unwrap_err().kind
    }
    everywhere(|mut f| {
        let from = f.path("bazel-out/from");
        fs::write(&from, "wrong").unwrap();
        let stamp = old_stamp(&from);
        let racy = Stamp { taken_ns: 0, ..stamp };
        assert!(matches!(
            copy(&mut f, &racy, "right"),
            PlaceErrorKind::Mismatch { .. }
        ));
        assert_eq!(copy(&mut f, &racy, "longer"), PlaceErrorKind::SourceChanged);
        fs::remove_file(&from).unwrap();
        assert_eq!(copy(&mut f, &stamp, "wrong"), PlaceErrorKind::SourceChanged);
        sleep(Duration::from_millis(20));
        fs::write(&from, "other").unwrap();
        assert_eq!(copy(&mut f, &stamp, "other"), PlaceErrorKind::SourceChanged);
        assert!(!f.path("bazel-out/to").exists());
    });
}
