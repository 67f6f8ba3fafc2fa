//! Small files, symlinks and directories.

use std::os::unix::fs::{MetadataExt as _, symlink};

use super::*;

#[test]
fn files_are_placed_with_their_mode_and_the_stamp_of_the_published_file() {
    everywhere(|mut f| {
        // Into a new directory, a live one, and over another file.
        for (round, how) in [
            ("a/one", How::Created),
            ("a/two", How::Created),
            ("a/one", How::Replaced),
        ] {
            let path = format!("bazel-out/{round}");
            let bytes = format!("{round} {how:?}");
            let placed = f.place(&path, &bytes).unwrap();
            assert_eq!(placed.how, how);
            assert_eq!(f.read(&path), bytes);
            assert_eq!(mode(&f.path(&path)), 0o555);
            let seen = old_stamp(&f.path(&path));
            assert!(sys::is_same_file(&placed.stamp, &seen), "{placed:?} {seen:?}");
        }
        assert_eq!(mode(&f.path("bazel-out/a")), 0o755);
        assert_eq!(f.leftovers(), Vec::<PathBuf>::new());
    });
}

#[test]
fn writable_files_get_0755() {
    let mut f = Fixture::new();
    let options = PlaceOptions {
        writable: true,
        ..PlaceOptions::default()
    };
    f.placer = Placer::new(Arc::clone(&f.root), options);
    f.place("bazel-out/new/file", "x").unwrap();
    f.place("bazel-out/file", "x").unwrap();
    assert_eq!(mode(&f.path("bazel-out/new/file")), 0o755);
    assert_eq!(mode(&f.path("bazel-out/file")), 0o755);
}

#[test]
fn bytes_that_do_not_match_their_digest_are_never_placed() {
    everywhere(|mut f| {
        let (good, bad) = (exec("bazel-out/d/good"), exec("bazel-out/d/bad"));
        let right = digest("right");
        for _ in 0..2 {
            let items = [
                Item {
                    path: &bad,
                    digest: &right,
                    bytes: b"wrong",
                    is_new: false,
                },
                Item {
                    path: &good,
                    digest: &right,
                    bytes: b"right",
                    is_new: false,
                },
            ];
            let results = f.placer.place_many(&items, &f.epoch, 1);
            let error = results[0].as_ref().unwrap_err();
            assert!(matches!(error.kind, PlaceErrorKind::Mismatch { .. }), "{error}");
            assert!(results[1].is_ok());
            assert!(!f.path("bazel-out/d/bad").exists());
        }
        let only_bad = exec("bazel-out/e/bad");
        let items = [Item {
            path: &only_bad,
            digest: &right,
            bytes: b"wrong",
            is_new: false,
        }];
        assert!(f.placer.place_many(&items, &f.epoch, 1)[0].is_err());
        assert!(!f.path("bazel-out/e").exists(), "no directory for nothing");
    });
}

#[test]
fn every_item_is_answered_in_order_whatever_directory_it_is_for() {
    everywhere(|mut f| {
        fs::create_dir(f.path("bazel-out/live")).unwrap();
        let files = [
            ("bazel-out/x/1", "1"),
            ("bazel-out/x/2", "2"),
            ("bazel-out/x/1", "again"),
            ("bazel-out/live/3", "3"),
            ("bazel-out/top", "4"),
            ("bazel-out/x/5", "5"),
        ];
        let results = f.place_all(&files);
        assert_eq!(results.len(), files.len());
        for ((path, bytes), result) in files.iter().zip(&results) {
            assert_eq!(result.as_ref().unwrap().stamp.size, bytes.len() as u64, "{path}");
        }
        assert_eq!(f.read("bazel-out/x/1"), "again");
        assert_eq!(f.read("bazel-out/top"), "4");
    });
}

#[test]
fn right_bytes_are_left_alone() {
    everywhere(|mut f| {
        fs::write(f.path("bazel-out/file"), "same").unwrap();
        let before = fs::metadata(f.path("bazel-out/file")).unwrap();
        let placed = f.place("bazel-out/file", "same").unwrap();
        assert_eq!(placed.how, How::Kept);
        let after = fs::metadata(f.path("bazel-out/file")).unwrap();
        assert_eq!(
            (before.ino(), before.ctime_nsec()),
            (after.ino(), after.ctime_nsec())
        );
    });
}

#[test]
fn a_replaced_file_keeps_its_bytes_for_those_who_have_it_open_or_linked() {
    everywhere(|mut f| {
        fs::write(f.path("bazel-out/file"), "old").unwrap();
        fs::hard_link(f.path("bazel-out/file"), f.path("partner")).unwrap();
        f.place("bazel-out/file", "new").unwrap();
        assert_eq!(f.read("partner"), "old");
        assert_eq!(f.read("bazel-out/file"), "new");
    });
}

#[test]
fn a_link_in_a_files_place_stays_if_it_leads_to_the_right_bytes_and_is_replaced_if_not() {
    everywhere(|mut f| {
        f.place("bazel-out/real/file", "one").unwrap();
        symlink(f.path("bazel-out/real/file"), f.path("bazel-out/link")).unwrap();
        assert_eq!(f.place("bazel-out/link", "one").unwrap().how, How::Kept);
        assert!(f.path("bazel-out/link").is_symlink());
        assert_eq!(f.place("bazel-out/link", "two").unwrap().how, How::Replaced);
        assert!(!f.path("bazel-out/link").is_symlink());
        assert_eq!(f.read("bazel-out/link"), "two");
        assert_eq!(f.read("bazel-out/real/file"), "one");
    });
}

/// As Bazel leaves the outputs of `ctx.actions.symlink`, when it has downloaded neither file.
#[test]
fn a_link_to_nothing_stays_and_the_file_is_put_there_until_another_output_is() {
    everywhere(|mut f| {
        let missing = f.path("bazel-out/real/dir/missing");
        symlink(&missing, f.path("bazel-out/dangling")).unwrap();
        symlink("dangling", f.path("bazel-out/chain")).unwrap();
        assert_eq!(f.place("bazel-out/chain", "one").unwrap().how, How::Created);
        assert_eq!(f.place("bazel-out/dangling", "one").unwrap().how, How::Kept);
        assert!(f.path("bazel-out/dangling").is_symlink() && f.path("bazel-out/chain").is_symlink());
        assert_eq!(f.read("bazel-out/real/dir/missing"), "one");
        f.place("bazel-out/real/dir/missing", "two").unwrap();
        for (path, bytes) in [("dangling", "one"), ("chain", "one"), ("real/dir/missing", "two")] {
            assert_eq!(f.read(&format!("bazel-out/{path}")), bytes, "{path}");
        }
    });
}

/// A tree's link and the file that it leads to, by two writers at once.
#[test]
fn a_link_stays_whose_target_comes_while_its_own_file_is_written() {
    everywhere(|f| {
        for (now, is_kept) in [("one", true), ("two", false)] {
            let _ = fs::remove_file(f.path("bazel-out/link"));
            let _ = fs::remove_file(f.path("bazel-out/real"));
            symlink("real", f.path("bazel-out/link")).unwrap();
            let path = exec("bazel-out/link");
            let job = f.placer.job(&f.epoch, 1);
            let dir = job.parent(&path).unwrap();
            let _open = writable::Writable::open(&job.root.writable, &dir).unwrap();
            let site = publish::Site::find(&job, &path, &dir).unwrap();
            fs::write(f.path("bazel-out/real"), now).unwrap();
            let file = publish::NewFile::named(job.root, job.mode(&path)).unwrap();
            sys::write_all(&file, b"one").unwrap();
            site.publish(&job, &digest("one"), file).unwrap();
            assert_eq!(f.path("bazel-out/link").is_symlink(), is_kept, "{now}");
            assert_eq!(f.read("bazel-out/link"), "one");
            assert_eq!(f.read("bazel-out/real"), now);
        }
    });
}

#[test]
fn a_link_out_of_the_root_is_replaced_and_nothing_is_written_through_it() {
    everywhere(|mut f| {
        let precious = f.outside().join("precious");
        fs::write(&precious, "precious").unwrap();
        let targets = [
            precious.as_path(),
            Path::new("../../../outside/precious"),
            Path::new("link"),
        ];
        for target in targets {
            let _ = fs::remove_file(f.path("bazel-out/link"));
            symlink(target, f.path("bazel-out/link")).unwrap();
            f.place("bazel-out/link", "ours").unwrap();
            assert!(!f.path("bazel-out/link").is_symlink());
            assert_eq!(f.read("bazel-out/link"), "ours");
            assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
        }
        // To a directory, even inside: the link goes, the directory stays.
        fs::create_dir(f.path("bazel-out/dir")).unwrap();
        symlink("dir", f.path("bazel-out/to-dir")).unwrap();
        f.place("bazel-out/to-dir", "ours").unwrap();
        assert!(f.path("bazel-out/dir").is_dir());
        assert_eq!(f.read("bazel-out/to-dir"), "ours");
    });
}

#[test]
fn a_parent_that_leads_out_of_the_root_is_refused() {
    everywhere(|mut f| {
        symlink(f.outside(), f.path("bazel-out/out")).unwrap();
        for path in ["bazel-out/out/file", "bazel-out/out/sub/file"] {
            let error = f.place(path, "x").unwrap_err();
            assert!(matches!(error.kind, PlaceErrorKind::Escapes { .. }), "{error}");
            assert!(error.to_string().contains("bazel-out/out"), "{error}");
        }
        assert_eq!(fs::read_dir(f.outside()).unwrap().count(), 0);
    });
}

#[test]
fn a_parent_that_is_an_absolute_link_inside_the_root_is_used() {
    everywhere(|mut f| {
        symlink(f.path("bazel-out/real"), f.path("bazel-out/link")).unwrap();
        f.place("bazel-out/link/sub/file", "x").unwrap();
        f.place("bazel-out/link/file", "y").unwrap();
        assert_eq!(f.read("bazel-out/real/sub/file"), "x");
        assert_eq!(f.read("bazel-out/real/file"), "y");
        assert!(f.path("bazel-out/link").is_symlink());
    });
}

#[test]
fn files_and_directories_change_places_without_losing_files() {
    everywhere(|mut f| {
        f.place("bazel-out/was-file", "x").unwrap();
        f.place("bazel-out/was-file/sub/file", "y").unwrap();
        assert_eq!(f.read("bazel-out/was-file/sub/file"), "y");

        let error = f.place("bazel-out/was-file", "z").unwrap_err();
        assert!(matches!(error.kind, PlaceErrorKind::Conflict(_)), "{error}");
        assert_eq!(f.read("bazel-out/was-file/sub/file"), "y");

        fs::create_dir_all(f.path("bazel-out/empty/a/b")).unwrap();
        f.place("bazel-out/empty", "w").unwrap();
        assert_eq!(f.read("bazel-out/empty"), "w");
        assert_eq!(f.leftovers(), Vec::<PathBuf>::new());
    });
}

#[test]
fn an_older_invocation_places_nothing() {
    everywhere(|mut f| {
        f.epoch.begin(2);
        let is_superseded = |e: &PlaceError| matches!(e.kind, PlaceErrorKind::Superseded);
        assert!(is_superseded(&f.place("bazel-out/new/file", "x").unwrap_err()));
        assert!(is_superseded(&f.place("bazel-out/file", "x").unwrap_err()));
        let (path, epoch) = (exec("bazel-out/other"), &f.epoch);
        assert!(is_superseded(
            &f.placer.place_symlink(&path, "t", epoch, 1).unwrap_err()
        ));
        assert!(is_superseded(
            &f.placer.make_directory(&path, epoch, 1).unwrap_err()
        ));
        assert_eq!(fs::read_dir(f.path("bazel-out")).unwrap().count(), 0);
        f.placer.make_directory(&path, epoch, 2).unwrap();
    });
}

#[test]
fn a_cleaned_tree_is_not_made_again() {
    everywhere(|mut f| {
        f.place("bazel-out/d/file", "x").unwrap();
        fs::remove_dir_all(f.path("bazel-out")).unwrap();
        assert!(is_gone(&f.place("bazel-out/d/file", "x")));
        assert!(!f.path("bazel-out").exists());
        fs::create_dir(f.path("bazel-out")).unwrap();
        assert!(is_gone(&f.place("bazel-out/d/file", "x")));
        f.root.begin_build(false).unwrap();
        f.place("bazel-out/d/file", "x").unwrap();
        fs::remove_dir_all(f.root.path()).unwrap();
        assert!(is_gone(&f.place("bazel-out/d/file", "x")));
        assert!(!f.root.path().exists());
    });
}

#[test]
fn a_fresh_build_gets_its_bazel_out_from_us_once() {
    everywhere(|mut f| {
        fs::remove_dir(f.path("bazel-out")).unwrap();
        f.root.begin_build(true).unwrap();
        f.place("bazel-out/file", "x").unwrap();
        fs::remove_dir_all(f.path("bazel-out")).unwrap();
        assert!(!f.path("bazel-out").exists());
        assert!(is_gone(&f.place("bazel-out/other", "x")));
    });
}

#[test]
fn a_directory_that_is_an_output_is_not_removed_for_a_file_in_its_parents_place() {
    everywhere(|mut f| {
        let found = exec("bazel-out/found/tree");
        fs::create_dir_all(f.path("bazel-out/found/tree")).unwrap();
        let seen = f.placer.check(&found, &OutputContent::Directory, None);
        assert!(matches!(seen, Ok(Check::Present { .. })));
        let made = exec("bazel-out/made/tree");
        f.placer.make_directory(&made, &f.epoch, 1).unwrap();
        for above in ["found", "made"] {
            let path = format!("bazel-out/{above}");
            f.place(&path, "x").unwrap_err();
            f.placer
                .place_symlink(&exec(&path), "to", &f.epoch, 1)
                .unwrap_err();
            assert!(f.path(&path).join("tree").is_dir());
            // What another process has put in its own place makes way.
            fs::remove_dir(f.path(&path).join("tree")).unwrap();
            fs::write(f.path(&path).join("tree"), "x").unwrap();
            f.placer
                .make_directory(&exec(&format!("{path}/tree")), &f.epoch, 1)
                .unwrap();
            // In its own place, the later word counts; and then there is nothing above it to be kept.
            f.place(&format!("{path}/tree"), "x").unwrap();
            fs::remove_file(f.path(&path).join("tree")).unwrap();
            f.place(&path, "x").unwrap();
        }
    });
}

#[test]
fn read_only_directories_are_filled_and_stay_read_only() {
    everywhere(|mut f| {
        fs::create_dir_all(f.path("bazel-out/tree/sub")).unwrap();
        set_mode(&f.path("bazel-out/tree/sub"), 0o555);
        set_mode(&f.path("bazel-out/tree"), 0o555);
        f.place("bazel-out/tree/file", "x").unwrap();
        f.place("bazel-out/tree/sub/file", "x").unwrap();
        f.place("bazel-out/tree/new/file", "x").unwrap();
        let refused = f.place("bazel-out/tree/sub", "x");
        assert!(refused.is_err());
        assert_eq!(mode(&f.path("bazel-out/tree")), 0o555, "also after an error");
        assert_eq!(mode(&f.path("bazel-out/tree/sub")), 0o555);
        // As Bazel makes the directories in a tree.
        assert_eq!(mode(&f.path("bazel-out/tree/new")), 0o555);
    });
}

#[test]
fn symlinks_are_made_as_they_are_and_replace_what_is_there() {
    everywhere(|mut f| {
        let path = exec("bazel-out/a/link");
        let cases = [
            ("dangling/x", How::Created),
            ("dangling/x", How::Kept),
            ("/etc/passwd", How::Replaced),
        ];
        for (target, how) in cases {
            let placed = f.placer.place_symlink(&path, target, &f.epoch, 1).unwrap();
            assert_eq!(placed.how, how);
            assert_eq!(
                fs::read_link(f.path("bazel-out/a/link")).unwrap(),
                Path::new(target)
            );
        }
        fs::create_dir_all(f.path("bazel-out/dir/sub")).unwrap();
        let dir = exec("bazel-out/dir");
        f.placer.place_symlink(&dir, "x", &f.epoch, 1).unwrap();
        assert!(f.path("bazel-out/dir").is_symlink());
        f.place("bazel-out/full/file", "x").unwrap();
        let full = exec("bazel-out/full");
        assert!(f.placer.place_symlink(&full, "x", &f.epoch, 1).is_err());
        assert_eq!(f.leftovers(), Vec::<PathBuf>::new());
    });
}

#[test]
fn directories_are_made_with_their_parents() {
    everywhere(|mut f| {
        let path = exec("bazel-out/a/b");
        assert_eq!(
            f.placer.make_directory(&path, &f.epoch, 1).unwrap().how,
            How::Created
        );
        assert_eq!(
            f.placer.make_directory(&path, &f.epoch, 1).unwrap().how,
            How::Kept
        );
        fs::write(f.path("bazel-out/file"), "").unwrap();
        f.placer
            .make_directory(&exec("bazel-out/file"), &f.epoch, 1)
            .unwrap();
        assert!(f.path("bazel-out/file").is_dir());
    });
}
