//! Temp directories and their sweeping; a full disk; other mounts.

use std::process::Command;

use super::*;

#[test]
fn temp_files_lie_in_the_output_base_of_an_exec_root_and_else_in_the_root() {
    let mut f = Fixture::new();
    let _file = f.placer.begin_large(&exec("bazel-out/x"), &digest("x")).unwrap();
    assert!(f.base.path().join(".outhaul-tmp").is_dir());
    assert_eq!(mode(&f.base.path().join(".outhaul-tmp")), 0o700);

    let plain = tempfile::tempdir().unwrap();
    let root = Arc::new(OutputRoot::open(plain.path(), true).unwrap());
    let mut placer = Placer::new(root, PlaceOptions::default());
    let file = placer.begin_large(&exec("x"), &digest("x")).unwrap();
    assert!(plain.path().join(".outhaul-tmp").is_dir());
    drop((file, placer));
    assert!(!plain.path().join(".outhaul-tmp").exists());
}

#[test]
fn a_root_that_is_only_looked_at_gets_no_temp_directory() {
    let mut f = Fixture::new();
    assert_eq!(f.check("bazel-out/x", "x"), Check::Absent);
    f.root.sweep().unwrap();
    assert!(!f.base.path().join(".outhaul-tmp").exists());
}

#[test]
fn sweeping_removes_what_the_dead_left_and_nothing_of_the_living() {
    everywhere(|mut f| {
        let dead = f.base.path().join(".outhaul-tmp/4711-dead");
        fs::create_dir_all(dead.join("staging/sub")).unwrap();
        fs::write(dead.join("staging/sub/file"), "x").unwrap();
        let mut living = f
            .placer
            .begin_large(&exec("bazel-out/x"), &digest("hello"))
            .unwrap();
        living.write(b"hel").unwrap();

        let other = OutputRoot::open(f.root.path(), false).unwrap();
        assert_eq!(other.sweep().unwrap(), 1);
        assert!(!dead.exists());
        assert_eq!(f.root.sweep().unwrap(), 0);
        living.write(b"lo").unwrap();
        living.finish(&f.epoch, 1).unwrap();
        assert_eq!(f.read("bazel-out/x"), "hello");
    });
}

#[test]
fn a_temp_directory_that_somebody_deleted_is_made_again() {
    everywhere(|mut f| {
        f.place("bazel-out/x", "x").unwrap();
        fs::remove_dir_all(f.base.path().join(".outhaul-tmp")).unwrap();
        f.place("bazel-out/x", "y").unwrap();
        f.place("bazel-out/new/x", "y").unwrap();
        assert_eq!(f.read("bazel-out/x"), "y");
    });
}

#[test]
fn a_planted_temp_directory_is_not_used() {
    everywhere(|f| {
        let outside = f.outside();
        // The fixture may have one already.
        let _ = fs::remove_dir_all(f.base.path().join(".outhaul-tmp"));
        std::os::unix::fs::symlink(&outside, f.base.path().join(".outhaul-tmp")).unwrap();
        let mut placer = Placer::new(Arc::clone(&f.root), PlaceOptions::default());
        let file = placer.begin_large(&exec("bazel-out/x"), &digest("x")).unwrap();
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        assert!(
            f.root.path().join(".outhaul-tmp").is_dir(),
            "the root itself is the next choice"
        );
        drop(file);
    });
}

/// A mounted file system, unmounted when dropped. Skips loudly where mounting is not allowed.
pub(crate) struct Mount(PathBuf);

impl Mount {
    pub(crate) fn new(arguments: &[&str], at: &Path) -> Option<Self> {
        let status = Command::new("mount").args(arguments).arg(at).status();
        if status.is_ok_and(|s| s.success()) {
            return Some(Self(at.to_owned()));
        }
        eprintln!("SKIPPED: cannot mount here ({arguments:?})");
        None
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_is_noticed_before_the_download_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let Some(_mount) = Mount::new(&["-t", "tmpfs", "-o", "size=1m", "tmpfs"], dir.path()) else {
        return;
    };
    let mut f = Fixture::beneath(dir.path());
    let huge = Digest::new(DigestFunction::Sha256, &[7; 32], 1 << 30).unwrap();
    let error = f.placer.begin_large(&exec("bazel-out/huge"), &huge).unwrap_err();
    assert_eq!(error.kind, PlaceErrorKind::NoSpace);

    let text = "x".repeat(400 << 10);
    let paths = ["1", "2", "3", "4"].map(|n| format!("bazel-out/new/{n}"));
    let files: Vec<_> = paths.iter().map(|p| (p.as_str(), text.as_str())).collect();
    let results = f.place_all(&files);
    assert!(results[0].is_ok());
    assert_eq!(results[3].as_ref().unwrap_err().kind, PlaceErrorKind::NoSpace);
    for (path, result) in paths.iter().zip(&results) {
        assert_eq!(f.path(path).exists(), result.is_ok(), "{path}");
    }
    assert_eq!(
        f.place("bazel-out/one", &text).unwrap_err().kind,
        PlaceErrorKind::NoSpace
    );
    assert!(!f.path("bazel-out/one").exists());
    assert_eq!(f.leftovers(), Vec::<PathBuf>::new());
}

#[test]
fn files_reach_directories_on_other_mounts() {
    everywhere(|mut f| {
        let at = f.path("bazel-out/mounted");
        fs::create_dir(&at).unwrap();
        let Some(mount) = Mount::new(&["-t", "tmpfs", "tmpfs"], &at) else {
            return;
        };
        f.place("bazel-out/mounted/file", "one").unwrap();
        f.place("bazel-out/mounted/file", "two").unwrap();
        f.place("bazel-out/mounted/new/file", "three").unwrap();
        let mut large = f
            .placer
            .begin_large(&exec("bazel-out/mounted/large"), &digest("big"))
            .unwrap();
        large.write(b"big").unwrap();
        large.finish(&f.epoch, 1).unwrap();
        let link = exec("bazel-out/mounted/link");
        f.placer.place_symlink(&link, "a", &f.epoch, 1).unwrap();
        f.placer.place_symlink(&link, "b", &f.epoch, 1).unwrap();
        assert_eq!(f.read("bazel-out/mounted/file"), "two");
        assert_eq!(f.read("bazel-out/mounted/new/file"), "three");
        assert_eq!(f.read("bazel-out/mounted/large"), "big");
        f.placer.close_directories();
        f.root.let_go();
        assert_eq!(fs::read_dir(&at).unwrap().count(), 4, "nothing beside them");
        drop(mount);
    });
}

#[test]
fn what_a_killed_process_left_on_another_mount_is_swept() {
    // Somewhere in bazel-out, deep in it, with a blank; and bazel-out itself.
    for at in ["bazel-out/mounted", "bazel-out/a b/c", "bazel-out"] {
        let mut f = Fixture::new();
        let top = f.path(at);
        fs::create_dir_all(&top).unwrap();
        let Some(mount) = Mount::new(&["-t", "tmpfs", "tmpfs"], &top) else {
            return;
        };
        f.root.begin_build(false).unwrap();
        let below = format!("{at}/new/dir");
        f.place(&format!("{below}/file"), "one").unwrap();
        f.place(&format!("{below}/file"), "two").unwrap();
        let link = exec(&format!("{below}/link"));
        f.placer.place_symlink(&link, "a", &f.epoch, 1).unwrap();
        f.placer.place_symlink(&link, "b", &f.epoch, 1).unwrap();
        let names = |dir: &Path| -> Vec<_> {
            let mut names: Vec<_> = fs::read_dir(dir)
                .unwrap()
                .map(|e| e.unwrap().file_name())
                .collect();
            names.sort();
            names
        };
        // Wherever it is killed: what it has begun lies in one place, and nothing of the kind beside outputs.
        assert_eq!(names(&f.path(&below)), ["file", "link"], "{at}");
        assert_eq!(names(&top), [".outhaul-tmp", "new"], "{at}");
        let dead = top.join(".outhaul-tmp/4711-dead");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join("0"), "half").unwrap();
        let other = OutputRoot::open(f.root.path(), false).unwrap();
        assert_eq!(other.sweep().unwrap(), 1, "{at}");
        assert!(!dead.exists());
        f.place(&format!("{below}/file"), "three").unwrap();
        f.placer.close_directories();
        f.root.let_go();
        assert_eq!(names(&top), ["new"], "{at}");
        drop((f, other));
        drop(mount);
    }
}
