//! Links to the outside, planted before and while everything that touches an output tree is at work.
//!
//! `OUTHAUL_RACES` is how many rounds there are on each kind of fixture, `OUTHAUL_RACES_SEED` repeats what was done in
//! one (though not how the threads met).

use std::{
    collections::BTreeMap,
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::fs::{MetadataExt as _, symlink},
    },
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::{super::temp::TempName, *};
use crate::removal::{nest, remove_all};

pub(super) fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable}={text} is no number")),
    )
}

/// Directories of the tree that become links, with a directory of the same name outside for each.
const SWAPPED: [&str; 6] = [
    "k8",
    "k8/bin",
    "k8/bin/a",
    "k8/tree.d",
    "k8/ro.d",
    "k8/tree.d/sub",
];
/// Names of files, there and outside.
const FILES: [&str; 3] = ["file", "other", "link"];

/// A place outside that looks just like the tree, so that whatever goes through a link finds what it looks for.
fn make_outside(f: &Fixture) -> PathBuf {
    let outside = f.outside();
    for directory in SWAPPED {
        let directory = outside.join(directory);
        fs::create_dir_all(directory.join("empty")).unwrap();
        for name in FILES {
            fs::write(directory.join(name), "precious").unwrap();
        }
    }
    // What a dead process would have left.
    fs::create_dir_all(outside.join("tmp/4711-dead/sub")).unwrap();
    fs::write(outside.join("tmp/4711-dead/sub/file"), "precious").unwrap();
    set_mode(&outside.join("k8/ro.d"), 0o555);
    outside
}

/// Everything about the outside that somebody could have changed.
fn look(outside: &Path) -> BTreeMap<PathBuf, (u32, u64, i64, i64, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut todo = vec![outside.to_owned()];
    while let Some(path) = todo.pop() {
        let stat = fs::symlink_metadata(&path).unwrap();
        let bytes = if stat.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            Vec::new()
        } else {
            fs::read(&path).unwrap()
        };
        // Changes of what is in a directory are seen in its time, too.
        let state = (stat.mode(), stat.ino(), stat.mtime(), stat.mtime_nsec(), bytes);
        found.insert(path, state);
    }
    found
}

/// Swaps directories and files of the tree for links to the outside and back, until stopped.
fn plant(tree: &Path, base: &Path, outside: &Path, stop: &AtomicBool, random: &mut StdRng) -> u64 {
    let away = base.join("away");
    fs::create_dir_all(&away).unwrap();
    let mut planted = 0;
    while !stop.load(Ordering::Relaxed) {
        match random.random_range(0..9) {
            // Deeper than any stack, in a file's place.
            8 if random.random_range(0..50) == 0 => {
                let directory = tree.join(SWAPPED[random.random_range(0..SWAPPED.len())]);
                let spare = away.join("deep");
                if fs::canonicalize(&directory).is_ok_and(|real| real.starts_with(base.join("execroot")))
                    && nest(&spare, random.random_range(1..5000)).is_ok()
                {
                    let name = FILES[random.random_range(0..FILES.len())];
                    let _ = fs::remove_file(directory.join(name));
                    planted += u64::from(fs::rename(&spare, directory.join(name)).is_ok());
                }
                let _ = remove_all(&spare);
            }
            // A file.
            0 => {
                let directory = SWAPPED[random.random_range(0..SWAPPED.len())];
                let name = FILES[random.random_range(0..FILES.len())];
                let (inside, to) = (
                    tree.join(directory).join(name),
                    outside.join(directory).join(name),
                );
                // Through a link that is there now, it would be the outside's own.
                if let Ok(real) = fs::canonicalize(tree.join(directory))
                    && real.starts_with(base.join("execroot"))
                {
                    let spare = away.join("file");
                    let _ = fs::remove_file(&spare);
                    let _ = symlink(&to, &spare);
                    let _ = rustix::fs::rename(&spare, &inside);
                    planted += 1;
                }
            }
            // The whole tree.
            1 => {
                let _ = fs::rename(tree, away.join("bazel-out"));
                let _ = symlink(outside, tree);
                thread::yield_now();
                let _ = fs::remove_file(tree);
                let _ = fs::rename(away.join("bazel-out"), tree);
                planted += 1;
            }
            _ => {
                let directory = SWAPPED[random.random_range(0..SWAPPED.len())];
                let (inside, spare) = (tree.join(directory), away.join("directory"));
                let to = match random.random_range(0..3) {
                    0 => outside.join(directory),
                    1 => Path::new(&"../".repeat(3 + directory.matches('/').count()))
                        .join("outside")
                        .join(directory),
                    _ => outside.to_owned(),
                };
                if fs::rename(&inside, &spare).is_ok() {
                    let _ = symlink(&to, &inside);
                    for _ in 0..random.random_range(0..3) {
                        thread::yield_now();
                    }
                    // Only ever a link: a directory is not removed like this.
                    let _ = fs::remove_file(&inside);
                    if fs::rename(&spare, &inside).is_err() {
                        // It was created again in the meantime.
                        let _ = fs::rename(&spare, base.join(format!("lost-{planted}")));
                    }
                    planted += 1;
                }
            }
        }
    }
    planted
}

/// Everything that is done in an output tree, in no order. What comes of it is the planter's business.
fn work(f: &mut Fixture, random: &mut StdRng, steps: usize) {
    let any_path = |random: &mut StdRng| {
        let directory = SWAPPED[random.random_range(0..SWAPPED.len())];
        let name = FILES[random.random_range(0..FILES.len())];
        match random.random_range(0..4) {
            0 => format!("bazel-out/{directory}/new-{}/{name}", random.random_range(0..50)),
            _ => format!("bazel-out/{directory}/{name}"),
        }
    };
    for _ in 0..steps {
        let path = any_path(random);
        let bytes = format!("ours {}", random.random_range(0..4));
        match random.random_range(0..12) {
            0 => {
                let _ = f.placer.place_symlink(&exec(&path), "file", &f.epoch, 1);
            }
            1 => {
                let _ = f.placer.make_directory(&exec(&path), &f.epoch, 1);
            }
            2 => {
                if let Ok(mut file) = f.placer.begin_large(&exec(&path), &digest(&bytes)) {
                    let _ = file.write(bytes.as_bytes());
                    let _ = file.finish(&f.epoch, 1);
                }
            }
            3 => {
                let content = OutputContent::Blob(digest(&bytes));
                if let Ok(Check::Present { stamp, .. }) = f.placer.check(&exec(&path), &content, None) {
                    let to = any_path(random);
                    let _ = f.placer.copy_within(
                        (&exec(&path), &stamp),
                        &exec(&to),
                        &digest(&bytes),
                        false,
                        &f.epoch,
                        1,
                    );
                }
                f.placer.close_directories();
            }
            4 => {
                let _ = f.placer.read_file(&exec(&path), &digest(&bytes));
            }
            5 => {
                let _ = f.root.begin_build(random.random());
            }
            6 => {
                let _ = f.root.sweep();
            }
            _ => {
                // Many of one directory go through staging where it is new.
                let directory = path
                    .rsplit_once('/')
                    .map_or("", |(directory, _)| directory)
                    .to_owned();
                let files: Vec<_> = (0..random.random_range(1..5))
                    .map(|n| {
                        (
                            format!("{directory}/{}", FILES.get(n).copied().unwrap_or("more")),
                            bytes.clone(),
                        )
                    })
                    .collect();
                let files: Vec<(&str, &str)> = files.iter().map(|(p, b)| (&**p, &**b)).collect();
                let _ = f.place_all(&files);
            }
        }
    }
}

#[test]
fn whatever_is_planted_while_everything_is_at_work_nothing_outside_changes() {
    let rounds = number("OUTHAUL_RACES").unwrap_or(3);
    let first = number("OUTHAUL_RACES_SEED").unwrap_or_else(|| rand::rng().random_range(0..1 << 32));
    let total = std::sync::atomic::AtomicU64::new(0);
    for seed in first..first.saturating_add(rounds) {
        eprintln!("OUTHAUL_RACES_SEED={seed} OUTHAUL_RACES=1");
        everywhere(|mut f| {
            let mut random = StdRng::seed_from_u64(seed);
            let outside = make_outside(&f);
            let before = look(&outside);
            let (tree, base) = (f.path("bazel-out"), f.base.path().to_owned());
            for directory in SWAPPED {
                fs::create_dir_all(tree.join(directory)).unwrap();
            }
            set_mode(&tree.join("k8/ro.d"), 0o555);
            let stop = AtomicBool::new(false);
            thread::scope(|scope| {
                /// Also when the work panics: otherwise the scope would wait for ever.
                struct Stop<'a>(&'a AtomicBool);
                impl Drop for Stop<'_> {
                    fn drop(&mut self) {
                        self.0.store(true, Ordering::Relaxed);
                    }
                }
                let mut planting = StdRng::seed_from_u64(seed ^ 1);
                let planter = scope.spawn({
                    let (tree, base, outside, stop) = (&tree, &base, &outside, &stop);
                    move || plant(tree, base, outside, stop, &mut planting)
                });
                {
                    let _stop = Stop(&stop);
                    work(&mut f, &mut random, 300);
                }
                total.fetch_add(planter.join().unwrap(), Ordering::Relaxed);
            });
            assert_eq!(
                look(&outside),
                before,
                "OUTHAUL_RACES_SEED={seed}: something outside has changed"
            );
        });
    }
    eprintln!("{total:?} links planted, nothing outside changed");
    assert!(total.into_inner() > rounds, "nothing was planted");
}

#[test]
fn links_that_are_there_before_anything_begins_lead_nobody_outside() {
    for swapped in SWAPPED {
        everywhere(|mut f| {
            let outside = make_outside(&f);
            let before = look(&outside);
            let (tree, mut random) = (f.path("bazel-out"), StdRng::seed_from_u64(7));
            let inside = tree.join(swapped);
            fs::create_dir_all(inside.parent().unwrap()).unwrap();
            symlink(outside.join(swapped), &inside).unwrap();
            work(&mut f, &mut random, 200);
            assert_eq!(look(&outside), before, "{swapped}");
        });
    }
}

#[test]
fn a_build_tree_that_is_a_link_leads_nobody_outside() {
    for fresh in [false, true] {
        everywhere(|mut f| {
            let outside = make_outside(&f);
            let before = look(&outside);
            fs::remove_dir(f.path("bazel-out")).unwrap();
            symlink(&outside, f.path("bazel-out")).unwrap();
            f.root.begin_build(fresh).unwrap();
            work(&mut f, &mut StdRng::seed_from_u64(9), 200);
            assert_eq!(look(&outside), before);
        });
    }
}

#[test]
fn a_temp_directory_that_is_a_link_is_neither_used_nor_swept() {
    for inner in [false, true] {
        everywhere(|mut f| {
            f.root.let_go();
            let outside = make_outside(&f);
            let before = look(&outside);
            let temp = f.base.path().join(".outhaul-tmp");
            let _ = fs::remove_dir_all(&temp);
            if inner {
                // The directory is real, what a dead process has left in it is not.
                fs::create_dir(&temp).unwrap();
                symlink(outside.join("tmp/4711-dead"), temp.join("4711-dead")).unwrap();
                fs::create_dir(temp.join("4712-dead")).unwrap();
                symlink(outside.join("tmp"), temp.join("4712-dead/tmp")).unwrap();
            } else {
                symlink(outside.join("tmp"), &temp).unwrap();
            }
            let _ = f.root.sweep();
            f.place("bazel-out/new/file", "x").unwrap();
            f.place("bazel-out/new/file", "y").unwrap();
            let _ = f.root.sweep();
            assert_eq!(look(&outside), before);
            assert_eq!(f.read("bazel-out/new/file"), "y");
        });
    }
}

/// The daemon's own temp directory, and what is on its way in it, become links.
#[test]
fn links_planted_into_the_temp_directory_lead_nobody_outside() {
    everywhere(|mut f| {
        let outside = make_outside(&f);
        let before = look(&outside);
        let temp = f.base.path().join(".outhaul-tmp");
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for process in fs::read_dir(&temp).into_iter().flatten().flatten() {
                        // Not through what was planted before.
                        if !process.file_type().is_ok_and(|t| t.is_dir()) {
                            continue;
                        }
                        // What is being filled.
                        for entry in fs::read_dir(process.path()).into_iter().flatten().flatten() {
                            let _ = fs::rename(entry.path(), f.base.path().join("stolen"));
                            let _ = symlink(outside.join("k8/bin"), entry.path());
                        }
                        let _ = fs::rename(process.path(), f.base.path().join("stolen-too"));
                        let _ = symlink(outside.join("tmp"), process.path());
                        let _ = fs::remove_dir_all(f.base.path().join("stolen"));
                        let _ = fs::remove_dir_all(f.base.path().join("stolen-too"));
                        let _ = fs::remove_file(f.base.path().join("stolen"));
                    }
                }
            });
            let mut placer = Placer::new(Arc::clone(&f.root), PlaceOptions::default());
            placer.staged = 1;
            for i in 0..300 {
                let files: Vec<_> = FILES
                    .iter()
                    .map(|name| (exec(&format!("bazel-out/{i}/{name}")), digest("x"), "x"))
                    .collect();
                let items: Vec<_> = files.iter().map(item).collect();
                let _ = placer.place_many(&items, &f.epoch, 1);
                let _ = placer.place_symlink(&exec("bazel-out/link"), "x", &f.epoch, 1);
                let _ = placer.place_symlink(&exec("bazel-out/link"), "y", &f.epoch, 1);
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(look(&outside), before);
        let _ = f.place("bazel-out/end", "x");
    });
}

#[test]
fn depth_costs_neither_stack_nor_descriptors() {
    const DEPTH: usize = 1500;
    everywhere(|mut f| {
        let tree = f.path("bazel-out/k8");
        fs::create_dir_all(&tree).unwrap();
        for name in ["file", "link", "large"] {
            nest(&tree.join(name), DEPTH).unwrap();
        }
        nest(&tree.join("full"), DEPTH).unwrap();
        fs::write(tree.join("full/d/d/file"), "x").unwrap();
        let left = f.base.path().join(".outhaul-tmp/4711-dead");
        fs::create_dir_all(left.parent().unwrap()).unwrap();
        nest(&left, DEPTH).unwrap();
        let temp = f.root.temp().unwrap();
        let own = TempName::new(temp);
        nest(
            &PathBuf::from(format!("/proc/self/fd/{}", own.temp.as_fd().as_raw_fd())).join(&own.name),
            DEPTH,
        )
        .unwrap();
        // As small as a thread's stack ever is.
        let worker = thread::Builder::new().stack_size(192 << 10).spawn(move || {
            f.place("bazel-out/k8/file", "x").unwrap();
            f.placer
                .place_symlink(&exec("bazel-out/k8/link"), "file", &f.epoch, 1)
                .unwrap();
            let mut large = f
                .placer
                .begin_large(&exec("bazel-out/k8/large"), &digest("x"))
                .unwrap();
            large.write(b"x").unwrap();
            large.finish(&f.epoch, 1).unwrap();
            let error = f.place("bazel-out/k8/full", "x").unwrap_err().to_string();
            assert!(error.contains("a non-empty directory"), "{error}");
            drop(own);
            f.root.sweep().unwrap();
            assert!(!left.exists());
            // As deep as a path can say, and by a link, for which the way is walked.
            let deep = format!("bazel-out/{}", "d/".repeat(1900));
            let placed = f.place(&format!("{deep}file"), "x");
            // Without `openat2`, every way is walked.
            assert_eq!(placed.is_ok(), f.root.has_openat2());
            symlink("d", f.path("bazel-out/way")).unwrap();
            let error = f.place(&format!("bazel-out/way/{}file", "d/".repeat(1800)), "x");
            let error = error.unwrap_err().to_string();
            assert!(error.contains("more than 256 directories deep"), "{error}");
            drop(f);
        });
        worker.unwrap().join().unwrap();
    });
}
