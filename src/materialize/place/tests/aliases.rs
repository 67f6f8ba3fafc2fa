//! Outputs that share a file because a link leads from one to the other.
//!
//! `OUTHAUL_RACES` is how many rounds there are, `OUTHAUL_RACES_SEED` repeats what was done in one.

use std::{
    collections::BTreeMap,
    os::unix::fs::{MetadataExt as _, symlink},
    thread,
};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::{planted::number, *};

fn present(f: &mut Fixture, path: &str, bytes: &str) {
    let check = f.check(path, bytes);
    assert!(matches!(check, Check::Present { .. }), "{path}: {check:?}");
}

#[test]
fn a_file_where_a_link_was_is_not_written_through_it() {
    for first in ["alias", "real"] {
        everywhere(|mut f| {
            symlink("real", f.path("bazel-out/alias")).unwrap();
            fs::write(f.path("bazel-out/real"), "before").unwrap();
            let second = if first == "alias" { "real" } else { "alias" };
            for name in [first, second] {
                f.place(&format!("bazel-out/{name}"), name).unwrap();
            }
            assert_eq!(f.read("bazel-out/alias"), "alias");
            assert_eq!(f.read("bazel-out/real"), "real");
        });
    }
}

#[test]
fn an_output_found_behind_a_link_keeps_its_bytes_when_what_is_there_changes() {
    everywhere(|mut f| {
        // Through a chain, of which each part is an output itself, and twice.
        let names = ["bazel-out/a", "bazel-out/again", "bazel-out/b"];
        for replaced in ["bazel-out/b", "bazel-out/c"] {
            for name in names {
                let _ = fs::remove_file(f.path(name));
            }
            f.root.begin_build(false).unwrap();
            f.place("bazel-out/c", "old").unwrap();
            symlink("b", f.path(names[0])).unwrap();
            symlink(f.path("bazel-out/b"), f.path(names[1])).unwrap();
            symlink("c", f.path(names[2])).unwrap();
            for name in names {
                present(&mut f, name, "old");
            }
            f.place(replaced, "new").unwrap();
            for name in ["bazel-out/a", "bazel-out/again", "bazel-out/b", "bazel-out/c"] {
                let expected = if name == replaced { "new" } else { "old" };
                assert_eq!(f.read(name), expected, "{name} after {replaced}");
            }
        }
        // Also when a link takes the place of what it leant on.
        let _ = fs::remove_file(f.path("bazel-out/a"));
        f.place("bazel-out/c", "old").unwrap();
        symlink("c", f.path("bazel-out/a")).unwrap();
        present(&mut f, "bazel-out/a", "old");
        let c = exec("bazel-out/c");
        f.placer.place_symlink(&c, "elsewhere", &f.epoch, 1).unwrap();
        assert_eq!(f.read("bazel-out/a"), "old");
        assert_eq!(f.leftovers(), Vec::<PathBuf>::new());
    });
}

#[test]
fn what_lies_behind_a_linked_directory_is_nobody_elses_to_replace() {
    everywhere(|mut f| {
        fs::create_dir(f.path("bazel-out/real")).unwrap();
        symlink(f.path("bazel-out/real"), f.path("bazel-out/dir")).unwrap();
        f.place("bazel-out/dir/placed", "one").unwrap();
        fs::write(f.path("bazel-out/real/found"), "one").unwrap();
        present(&mut f, "bazel-out/dir/found", "one");
        fs::write(f.path("bazel-out/real/other"), "other").unwrap();
        for path in [
            "bazel-out/real/placed",
            "bazel-out/real/found",
            "bazel-out/dir/other",
            "bazel-out/dir",
        ] {
            let error = f.place(path, "two").unwrap_err();
            assert!(matches!(error.kind, PlaceErrorKind::Conflict(_)), "{error}");
        }
        // Nor links, nor directories.
        for (name, is_link) in [("link", true), ("sub", false)] {
            let (path, behind) = (
                format!("bazel-out/real/{name}"),
                exec(&format!("bazel-out/dir/{name}")),
            );
            if is_link {
                f.placer.place_symlink(&behind, "placed", &f.epoch, 1).unwrap();
            } else {
                f.placer.make_directory(&behind, &f.epoch, 1).unwrap();
            }
            f.place(&path, "two").unwrap_err();
        }
        // The same bytes are no matter.
        for name in ["placed", "found"] {
            let placed = f.place(&format!("bazel-out/real/{name}"), "one").unwrap();
            assert_eq!(placed.how, How::Kept);
            assert_eq!(f.read(&format!("bazel-out/dir/{name}")), "one");
        }
        assert_eq!(f.read("bazel-out/real/other"), "other");
        // The next build is another matter.
        f.root.begin_build(false).unwrap();
        f.place("bazel-out/real/found", "two").unwrap();
    });
}

#[test]
fn a_way_around_to_another_output_is_no_way_to_be_there() {
    everywhere(|mut f| {
        let workspace = f.outside();
        symlink(f.path("bazel-out"), workspace.join("bazel-out")).unwrap();
        f.place("bazel-out/real", "x").unwrap();
        symlink(workspace.join("bazel-out/real"), f.path("bazel-out/alias")).unwrap();
        assert_eq!(f.check("bazel-out/alias", "x"), Check::Differs);
        // To the workspace's own files it is one.
        fs::write(workspace.join("source"), "x").unwrap();
        symlink(workspace.join("source"), f.path("source")).unwrap();
        for target in [workspace.join("source"), f.path("source")] {
            let _ = fs::remove_file(f.path("bazel-out/alias"));
            symlink(target, f.path("bazel-out/alias")).unwrap();
            present(&mut f, "bazel-out/alias", "x");
        }
    });
}

#[test]
fn outputs_that_are_one_file_by_hard_links_part_when_one_is_replaced() {
    everywhere(|mut f| {
        f.place("bazel-out/a", "old").unwrap();
        fs::hard_link(f.path("bazel-out/a"), f.path("bazel-out/b")).unwrap();
        present(&mut f, "bazel-out/b", "old");
        f.place("bazel-out/a", "new").unwrap();
        assert_eq!(f.read("bazel-out/b"), "old");
    });
}

/// Names that lie in each other's way, by links that are there before.
const NAMES: [&str; 6] = ["a", "b", "c", "d/a", "d/b", "e/a"];

/// Several writers bring a build's outputs, with any links between them there before: whatever was reported to be there has
/// its own bytes at the end.
#[test]
fn whatever_links_are_there_every_output_that_is_reported_has_its_bytes() {
    let rounds = number("OUTHAUL_RACES").unwrap_or(3) * 40;
    let first = number("OUTHAUL_RACES_SEED").unwrap_or_else(|| rand::rng().random_range(0..1 << 32));
    for seed in first..first.saturating_add(rounds) {
        let mut random = StdRng::seed_from_u64(seed);
        let f = Fixture::new();
        for directory in ["d", "real"] {
            fs::create_dir(f.path(&format!("bazel-out/{directory}"))).unwrap();
        }
        let e = ["d", "real", "../bazel-out/d", "e/../real"][random.random_range(0..4)];
        symlink(e, f.path("bazel-out/e")).unwrap();
        for _ in 0..random.random_range(1..8) {
            let path = f
                .path("bazel-out")
                .join(NAMES[random.random_range(0..NAMES.len())]);
            let _ = fs::remove_file(&path);
            let to = NAMES[random.random_range(0..NAMES.len())];
            let _ = match random.random_range(0..4) {
                0 => symlink(f.path("bazel-out").join(to), &path),
                1 => symlink(to, &path),
                2 => fs::hard_link(f.path("bazel-out").join(to), &path),
                _ => fs::write(&path, random.random_range(0..3_u32).to_string()),
            };
        }
        let bytes = NAMES.map(|_| random.random_range(0..3_u32).to_string());
        let reported = thread::scope(|scope| {
            let (f, bytes) = (&f, &bytes);
            let writers: Vec<_> = (0..3)
                .map(|writer| {
                    scope.spawn(move || {
                        let mut placer = Placer::new(Arc::clone(&f.root), PlaceOptions::default());
                        placer.staged = 1;
                        let mut reported = BTreeMap::new();
                        for (n, name) in NAMES.iter().enumerate().filter(|(n, _)| n % 3 == writer) {
                            let path = exec(&format!("bazel-out/{name}"));
                            let content = OutputContent::Blob(digest(&bytes[n]));
                            let check = placer.check(&path, &content, None);
                            let is_there = match check {
                                Ok(Check::Present { .. }) => true,
                                Ok(found) => {
                                    let file = (path, digest(&bytes[n]), bytes[n].as_str());
                                    let is_new = found == Check::Absent;
                                    let items = [Item {
                                        is_new,
                                        ..item(&file)
                                    }];
                                    placer.place_many(&items, &f.epoch, 1).remove(0).is_ok()
                                }
                                Err(_) => false,
                            };
                            if is_there {
                                reported.insert(*name, bytes[n].clone());
                            }
                        }
                        reported
                    })
                })
                .collect();
            let reported = writers.into_iter().flat_map(|writer| writer.join().unwrap());
            reported.collect::<BTreeMap<_, _>>()
        });
        let mut inodes = BTreeMap::new();
        for (name, bytes) in reported {
            let path = f.path("bazel-out").join(name);
            let found = fs::read_to_string(&path).unwrap();
            assert_eq!(found, bytes, "OUTHAUL_RACES_SEED={seed}: {name}");
            let inode = fs::metadata(&path).unwrap().ino();
            let of = inodes.entry(inode).or_insert_with(|| bytes.clone());
            assert_eq!(*of, bytes, "OUTHAUL_RACES_SEED={seed}: {name}");
        }
    }
}
