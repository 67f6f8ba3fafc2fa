//! Others work in the same tree at the same time.

use std::{
    os::unix::fs::symlink,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use super::*;

/// Runs `disturb` over and over in one thread while `work` runs in this one.
fn disturbed(disturb: impl Fn() + Sync, work: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    /// Also when `work` panics: otherwise the scope would wait for ever.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                disturb();
            }
        });
        let _stop = Stop(&stop);
        work();
    });
}

#[test]
fn a_link_planted_while_placing_never_leads_a_byte_outside() {
    everywhere(|mut f| {
        let outside = f.outside();
        fs::write(outside.join("file"), "precious").unwrap();
        fs::create_dir(f.path("bazel-out/real")).unwrap();
        let (real, away, link) = (
            f.path("bazel-out/real"),
            f.path("bazel-out/away"),
            f.path("bazel-out/real/file"),
        );
        disturbed(
            || {
                // The parent becomes a link to the outside, and back; the file too.
                let _ = fs::rename(&real, &away);
                let _ = symlink(&outside, &real);
                let _ = fs::remove_file(&real);
                let _ = fs::rename(&away, &real);
                let _ = fs::remove_file(&link);
                let _ = symlink(outside.join("file"), &link);
            },
            || {
                for i in 0..500 {
                    // Refused, superseded by the disturber or placed: only never outside.
                    let _ = f.place("bazel-out/real/file", &format!("ours {i}"));
                    let _ = f.place(&format!("bazel-out/real/{i}/file"), "ours");
                }
            },
        );
        assert_eq!(fs::read_to_string(outside.join("file")).unwrap(), "precious");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    });
}

/// A tree, and Bazel's link to it, which is an output with the same files.
#[test]
fn one_file_by_way_of_a_linked_directory_and_without_it_comes_at_the_same_time() {
    everywhere(|f| {
        fs::create_dir(f.path("bazel-out/tree")).unwrap();
        symlink(f.path("bazel-out/tree"), f.path("bazel-out/link")).unwrap();
        let (root, epoch) = (&f.root, &f.epoch);
        thread::scope(|scope| {
            for directory in ["tree", "link"] {
                scope.spawn(move || {
                    let mut placer = Placer::new(Arc::clone(root), PlaceOptions::default());
                    let digest = digest(b"same");
                    for n in 0..300 {
                        let path = exec(&format!("bazel-out/{directory}/{n}"));
                        let item = Item {
                            path: &path,
                            digest: &digest,
                            bytes: b"same",
                            is_new: false,
                        };
                        let placed = placer.place_many(&[item], epoch, 1).remove(0);
                        placed.unwrap_or_else(|error| panic!("{path}: {error}"));
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(f.path("bazel-out/tree")).unwrap().count(), 300);
    });
}

#[test]
fn placers_in_one_directory_do_not_lose_each_others_files() {
    everywhere(|f| {
        let root = &f.root;
        let epoch = &f.epoch;
        thread::scope(|scope| {
            for worker in 0..4 {
                scope.spawn(move || {
                    let mut placer = Placer::new(Arc::clone(root), PlaceOptions::default());
                    for dir in 0..40 {
                        let files: Vec<_> = ["shared".to_owned(), format!("own-{worker}")]
                            .iter()
                            .map(|name| (exec(&format!("bazel-out/{dir}/{name}")), digest("same"), "same"))
                            .collect();
                        let items: Vec<_> = files.iter().map(item).collect();
                        for result in placer.place_many(&items, epoch, 1) {
                            result.unwrap();
                        }
                    }
                });
            }
        });
        for dir in 0..40 {
            let count = fs::read_dir(f.path(&format!("bazel-out/{dir}"))).unwrap().count();
            assert_eq!(count, 5, "directory {dir}");
        }
        assert_eq!(f.leftovers(), Vec::<PathBuf>::new());
    });
}

#[test]
fn writers_that_make_a_fresh_bazel_out_together_all_find_it() {
    for _ in 0..200 {
        let f = Fixture::new();
        fs::remove_dir(f.path("bazel-out")).unwrap();
        f.root.begin_build(true).unwrap();
        let (root, epoch) = (&f.root, &f.epoch);
        let together = &std::sync::Barrier::new(4);
        thread::scope(|scope| {
            for worker in 0..4 {
                scope.spawn(move || {
                    let mut placer = Placer::new(Arc::clone(root), PlaceOptions::default());
                    together.wait();
                    let file = (exec(&format!("bazel-out/{worker}/file")), digest("x"), "x");
                    placer.place_many(&[item(&file)], epoch, 1).remove(0).unwrap();
                });
            }
        });
    }
}

#[test]
fn writers_in_one_read_only_directory_do_not_lock_each_other_out() {
    everywhere(|f| {
        let dir = f.path("bazel-out/tree");
        fs::create_dir(&dir).unwrap();
        set_mode(&dir, 0o555);
        let (root, epoch) = (&f.root, &f.epoch);
        thread::scope(|scope| {
            for worker in 0..4 {
                scope.spawn(move || {
                    let mut placer = Placer::new(Arc::clone(root), PlaceOptions::default());
                    for i in 0..50 {
                        let file = (exec(&format!("bazel-out/tree/{worker}-{i}")), digest("x"), "x");
                        placer.place_many(&[item(&file)], epoch, 1).remove(0).unwrap();
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 200);
        assert_eq!(mode(&dir), 0o555);
    });
}

#[test]
fn nothing_older_appears_once_a_new_invocation_has_begun() {
    everywhere(|mut f| {
        let version = std::sync::atomic::AtomicU64::new(1);
        let (bazel_out, root) = (f.path("bazel-out"), Arc::clone(&f.root));
        let Fixture { epoch, placer, .. } = &mut f;
        let epoch = &*epoch;
        thread::scope(|scope| {
            let begin = scope.spawn(|| {
                for next in 2..60 {
                    epoch.begin(next);
                    // What the older ones have placed is all that they ever will.
                    let count = || walk_count(&bazel_out, next - 1);
                    let before = count();
                    thread::yield_now();
                    assert_eq!(count(), before, "version {} went on", next - 1);
                    version.store(next, Ordering::SeqCst);
                }
            });
            let mut i = 0;
            while !begin.is_finished() {
                i += 1;
                let now = version.load(Ordering::SeqCst);
                let files = [
                    (exec(&format!("bazel-out/v{now}/{i}/new")), digest("x"), "x"),
                    (exec(&format!("bazel-out/v{now}/live-{i}")), digest("x"), "x"),
                ];
                for file in &files {
                    let _ = placer.place_many(&[item(file)], epoch, now);
                }
            }
            begin.join().unwrap();
        });
        drop(root);
    });
}

/// How many entries are below a version's directory.
fn walk_count(bazel_out: &Path, version: u64) -> usize {
    fn count(dir: &Path) -> usize {
        fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| 1 + count(&e.path()))
            .sum()
    }
    count(&bazel_out.join(format!("v{version}")))
}

#[test]
fn a_tree_that_is_cleaned_while_placing_is_never_made_again() {
    everywhere(|mut f| {
        let bazel_out = f.path("bazel-out");
        let cleaned = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(std::time::Duration::from_millis(5));
                // As `bazel clean --async` does: moved away whole, then deleted.
                fs::rename(&bazel_out, bazel_out.with_file_name("cleaned")).unwrap();
                cleaned.store(true, Ordering::SeqCst);
            });
            for i in 0..100_000 {
                let was_cleaned = cleaned.load(Ordering::SeqCst);
                let result = f.place(&format!("bazel-out/{}/{i}", i % 10), "x");
                if was_cleaned {
                    assert!(is_gone(&result), "{result:?}");
                    break;
                }
            }
        });
        assert!(!f.path("bazel-out").exists());
    });
}
