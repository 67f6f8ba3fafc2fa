//! Is it already there?

use std::{os::unix::fs::symlink, thread::sleep, time::Duration};

use super::*;

fn is_present(check: Check, expected: Vouched) -> bool {
    matches!(check, Check::Present { how, .. } if how == expected)
}

#[test]
fn right_bytes_are_present_and_anything_else_is_not() {
    everywhere(|mut f| {
        assert_eq!(f.check("bazel-out/d/file", "x"), Check::Absent);
        fs::create_dir(f.path("bazel-out/d")).unwrap();
        assert_eq!(f.check("bazel-out/d/file", "x"), Check::Absent);
        fs::write(f.path("bazel-out/d/file"), "x").unwrap();
        assert!(is_present(f.check("bazel-out/d/file", "x"), Vouched::Content));
        assert_eq!(f.check("bazel-out/d/file", "y"), Check::Differs);
        assert_eq!(f.check("bazel-out/d/file", "longer"), Check::Differs);
        assert_eq!(f.check("bazel-out/d", "x"), Check::Differs);
        assert_eq!(f.check("bazel-out/d/file/below", "x"), Check::Differs);
        fs::write(f.path("bazel-out/empty"), "").unwrap();
        assert!(is_present(f.check("bazel-out/empty", ""), Vouched::Content));
    });
}

#[test]
fn a_recorded_stamp_vouches_until_the_file_is_touched() {
    everywhere(|mut f| {
        let path = exec("bazel-out/file");
        let content = OutputContent::Blob(digest("right"));
        fs::write(f.path("bazel-out/file"), "wrong").unwrap();
        // The bytes are wrong: that they count as present shows that they were not read.
        let stamp = old_stamp(&f.path("bazel-out/file"));
        let check = f.placer.check(&path, &content, Some(&stamp)).unwrap();
        assert!(is_present(check, Vouched::Stamp));
        let racy = Stamp {
            taken_ns: stamp.ctime_ns,
            ..stamp
        };
        assert_eq!(
            f.placer.check(&path, &content, Some(&racy)).unwrap(),
            Check::Differs
        );
        // A change of mode shows in the change time alone.
        sleep(Duration::from_millis(20));
        set_mode(&f.path("bazel-out/file"), 0o600);
        assert_eq!(
            f.placer.check(&path, &content, Some(&stamp)).unwrap(),
            Check::Differs
        );
    });
}

#[test]
fn the_stamp_of_a_check_vouches_in_the_next_one() {
    everywhere(|mut f| {
        f.place("bazel-out/file", "x").unwrap();
        sleep(Duration::from_millis(30));
        let Check::Present { stamp, .. } = f.check("bazel-out/file", "x") else {
            panic!("not present");
        };
        let content = OutputContent::Blob(digest("x"));
        let again = f
            .placer
            .check(&exec("bazel-out/file"), &content, Some(&stamp))
            .unwrap();
        assert!(is_present(again, Vouched::Stamp));
    });
}

#[test]
fn links_are_looked_through_and_directories_are_followed_inside_the_root_only() {
    everywhere(|mut f| {
        fs::write(f.path("bazel-out/file"), "x").unwrap();
        fs::write(f.outside().join("file"), "x").unwrap();
        symlink(f.path("bazel-out/file"), f.path("bazel-out/inside")).unwrap();
        symlink(f.outside().join("file"), f.path("bazel-out/outside")).unwrap();
        symlink("nothing", f.path("bazel-out/dangling")).unwrap();
        symlink(f.outside(), f.path("bazel-out/parent")).unwrap();
        assert!(is_present(f.check("bazel-out/inside", "x"), Vouched::Content));
        // As the executable of a test, which Bazel links to its source.
        assert!(is_present(f.check("bazel-out/outside", "x"), Vouched::Content));
        assert_eq!(f.check("bazel-out/outside", "y"), Check::Differs);
        symlink(f.outside(), f.path("bazel-out/to-a-directory")).unwrap();
        symlink("/dev/zero", f.path("bazel-out/to-a-device")).unwrap();
        assert_eq!(f.check("bazel-out/to-a-directory", "x"), Check::Differs);
        assert_eq!(f.check("bazel-out/to-a-device", "x"), Check::Differs);
        let stamp = old_stamp(&f.outside().join("file"));
        let other = OutputContent::Blob(digest("y"));
        let vouched = f
            .placer
            .check(&exec("bazel-out/outside"), &other, Some(&stamp))
            .unwrap();
        assert!(is_present(vouched, Vouched::Stamp));
        assert_eq!(f.check("bazel-out/dangling", "x"), Check::Absent);
        let content = OutputContent::Blob(digest("x"));
        let refused = f
            .placer
            .check(&exec("bazel-out/parent/file"), &content, None)
            .unwrap_err();
        assert!(
            matches!(refused.kind, PlaceErrorKind::Escapes { .. }),
            "{refused}"
        );
    });
}

#[test]
fn every_kind_of_content_is_compared_in_its_own_way() {
    everywhere(|mut f| {
        fs::write(f.path("bazel-out/file"), "inline").unwrap();
        fs::create_dir(f.path("bazel-out/dir")).unwrap();
        symlink("some/target", f.path("bazel-out/link")).unwrap();
        symlink("dir", f.path("bazel-out/to-dir")).unwrap();
        let inline = |text: &'static str| OutputContent::Inline(text.into());
        let link = |text: &str| OutputContent::Symlink(text.to_owned());
        let cases = [
            ("file", inline("inline"), true),
            ("file", inline("outline"), false),
            ("file", inline("inlinE"), false),
            ("file", OutputContent::Directory, false),
            ("file", link("some/target"), false),
            ("link", link("some/target"), true),
            ("link", link("other/target"), false),
            ("dir", OutputContent::Directory, true),
            ("to-dir", OutputContent::Directory, true),
            ("dir", inline(""), false),
        ];
        for (name, content, expected) in cases {
            let check = f
                .placer
                .check(&exec(&format!("bazel-out/{name}")), &content, None)
                .unwrap();
            assert_eq!(
                matches!(check, Check::Present { .. }),
                expected,
                "{name}: {content:?}"
            );
        }
    });
}

#[test]
fn a_fifo_in_a_files_place_does_not_block() {
    everywhere(|mut f| {
        let path = f.path("bazel-out/fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
        assert_eq!(f.check("bazel-out/fifo", ""), Check::Differs);
        f.place("bazel-out/fifo", "x").unwrap();
        assert_eq!(f.read("bazel-out/fifo"), "x");
    });
}

#[test]
fn a_directory_that_was_replaced_is_not_remembered_for_long() {
    everywhere(|mut f| {
        f.place("bazel-out/d/file", "x").unwrap();
        assert!(is_present(f.check("bazel-out/d/file", "x"), Vouched::Content));
        fs::rename(f.path("bazel-out/d"), f.path("moved")).unwrap();
        sleep(Duration::from_millis(60));
        assert_eq!(f.check("bazel-out/d/file", "x"), Check::Absent);
        fs::remove_dir_all(f.root.path()).unwrap();
        f.placer.close_directories();
        let content = OutputContent::Blob(digest("x"));
        assert!(is_gone(&f.placer.check(
            &exec("bazel-out/d/file"),
            &content,
            None
        )));
    });
}

#[test]
fn more_directories_than_are_kept_open_can_be_checked() {
    let mut f = Fixture::new();
    for i in 0..300 {
        f.place(&format!("bazel-out/{i}/file"), "x").unwrap();
    }
    for i in 0..300 {
        assert!(is_present(
            f.check(&format!("bazel-out/{i}/file"), "x"),
            Vouched::Content
        ));
    }
}
