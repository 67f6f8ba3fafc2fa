//! File systems with little space: small ones of their own, which takes the right to mount.

use std::{path::Path, process::Command};

use super::{
    place::{Mark, PlaceOptions},
    *,
};
use crate::digest::DigestFunction;

/// A small tmpfs, unmounted when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path, options: &str) -> Option<Self> {
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "outhaul-test"])
            .arg(at)
            .output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(at.to_owned())),
            other => {
                eprintln!("SKIPPED: cannot mount a tmpfs with {options}: {other:?}");
                None
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// A fixture whose output base lies on a small disk.
struct Small {
    f: Fixture,
    _disk: SmallDisk,
}

impl Small {
    async fn new(options: &str, space: Mark) -> Option<Self> {
        let options_of = MaterializeOptions {
            place: PlaceOptions {
                space,
                ..PlaceOptions::default()
            },
            // What is refused is reported as early as possible.
            bytes_in_flight: 1 << 20,
            batch_bytes: 256 << 10,
            ..MaterializeOptions::default()
        };
        let mut f = Fixture::with(options_of).await;
        let disk = SmallDisk::mount(f.dir.path(), options)?;
        let exec_root = f.dir.path().join("execroot/_main");
        fs::create_dir_all(exec_root.join("bazel-out")).unwrap();
        f.root = Arc::new(Root {
            id: 2,
            place: Arc::new(OutputRoot::open(&exec_root, false).unwrap()),
            epoch: Epoch::new(),
        });
        Some(Self { f, _disk: disk })
    }

    fn bytes_free(&self) -> u64 {
        let found = rustix::fs::statvfs(self.f.dir.path()).unwrap();
        found.f_bavail * found.f_frsize
    }

    /// Blobs of these sizes, as outputs `DIRECTORY/N`.
    fn blobs(&self, directory: &str, count: usize, size: usize) -> Vec<(String, Digest)> {
        (0..count)
            .map(|n| {
                let mut bytes = vec![7; size];
                bytes[..8].copy_from_slice(&(n as u64).to_le_bytes());
                bytes[8..16].copy_from_slice(&(directory.len() as u64).to_le_bytes());
                (format!("{directory}/{n:04}"), self.f.cache.store().put(bytes))
            })
            .collect()
    }

    /// Wants them all, and gives how many came and why the others did not.
    async fn bring(&self, class: Class, blobs: &[(String, Digest)]) -> (usize, Vec<String>) {
        let mut asker = self.f.asker(1);
        let wants: Vec<(&str, &Digest)> = blobs.iter().map(|(n, d)| (n.as_str(), d)).collect();
        self.f.want(&asker, class, &wants).await;
        let mut reasons = Vec::new();
        let mut came = 0;
        for (path, outcome) in asker.ends(blobs.len()).await {
            let file = self.f.dir.path().join("execroot/_main").join(&path);
            match outcome {
                Outcome::NoSpace(reason) | Outcome::Failed(reason) => {
                    assert!(!file.exists(), "{path} is there, and said not to be: {reason}");
                    reasons.push(reason);
                }
                outcome => {
                    assert!(outcome.is_on_disk(), "{path}: {outcome:?}");
                    let digest = &blobs.iter().find(|(n, _)| path.ends_with(n)).unwrap().1;
                    let bytes = fs::read(&file).unwrap();
                    assert_eq!(Digest::of(DigestFunction::Sha256, &bytes), *digest, "{path}");
                    came += 1;
                }
            }
        }
        (came, reasons)
    }

    /// Files that are not outputs: what must not be left.
    fn left_over(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut open = vec![self.f.dir.path().join(".outhaul-tmp")];
        while let Some(dir) = open.pop() {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                if entry.file_type().unwrap().is_dir() {
                    open.push(entry.path());
                } else {
                    found.push(entry.path());
                }
            }
        }
        found
    }
}

const MIB: u64 = 1 << 20;

#[tokio::test]
async fn what_becomes_required_while_it_is_refused_as_optional_comes() {
    let Some(small) = Small::new("size=32m", Mark::Amount(10 * MIB)).await else {
        return;
    };
    // Between the mark and twice as much.
    fs::write(small.f.dir.path().join("ballast"), vec![1; 16 << 20]).unwrap();
    for round in 0..40 {
        let wants = |class| {
            (0..25)
                .map(|n| {
                    let content = match n % 3 {
                        0 => OutputContent::Symlink("elsewhere".to_owned()),
                        1 => OutputContent::Directory,
                        _ => OutputContent::Inline("bytes".into()),
                    };
                    Want::new(exec(&format!("{round}/{n}")), content, class, None)
                })
                .collect::<Vec<_>>()
        };
        let (mut optional, mut required) = (small.f.asker(1), small.f.asker(1));
        small
            .f
            .materializer
            .want(&optional.session, wants(Class::Optional))
            .await;
        // Somewhere between the question and its refusal.
        for _ in 0..round {
            tokio::task::yield_now().await;
        }
        small
            .f
            .materializer
            .want(&required.session, wants(Class::Required))
            .await;
        for (path, outcome) in required.ends(25).await {
            assert!(outcome.is_on_disk(), "{path}: {outcome:?}");
        }
        optional.ends(25).await;
    }
}

#[tokio::test]
async fn optional_downloads_end_at_twice_the_mark_and_required_ones_at_the_mark() {
    let Some(small) = Small::new("size=32m", Mark::Amount(4 * MIB)).await else {
        return;
    };
    let many = small.blobs("optional", 400, 100 << 10);
    let (came, reasons) = small.bring(Class::Optional, &many).await;
    assert!(came > 200, "{came}");
    assert!(
        reasons.iter().all(|r| r.contains("(twice --min-free-space)")),
        "{reasons:?}"
    );
    let free = small.bytes_free();
    assert!((7 * MIB..10 * MIB).contains(&free), "{free}");
    assert!(
        small.f.cache.stats().batch_read_blobs < 400,
        "what would be refused is not fetched: {:?}",
        small.f.cache.stats()
    );

    let some = small.blobs("required", 20, 100 << 10);
    let (came, reasons) = small.bring(Class::Required, &some).await;
    assert_eq!((came, reasons), (20, vec![]));
    let large = small.blobs("large", 1, 5 << 20);
    let (came, reasons) = small.bring(Class::Required, &large).await;
    assert_eq!(came, 0);
    assert!(
        reasons[0].contains("the file has 5.0 MiB") && reasons[0].contains("(--min-free-space)"),
        "{reasons:?}"
    );
    let many = small.blobs("requested", 100, 100 << 10);
    let (came, reasons) = small.bring(Class::Required, &many).await;
    assert!(came < 100 && !reasons.is_empty());
    let free = small.bytes_free();
    assert!((3 * MIB..6 * MIB).contains(&free), "{free}");
    assert_eq!(small.left_over(), Vec::<PathBuf>::new());

    // Once there is space again, all of it comes.
    fs::remove_dir_all(small.f.path("optional")).unwrap();
    let since = Instant::now();
    loop {
        let (came, reasons) = small.bring(Class::Required, &many).await;
        if came == 100 {
            break;
        }
        assert!(since.elapsed() < Duration::from_secs(30), "{reasons:?}");
    }
    let (came, reasons) = small.bring(Class::Required, &large).await;
    assert_eq!((came, reasons), (1, vec![]));
}

#[tokio::test]
async fn a_full_disk_leaves_nothing_behind_and_space_lets_the_next_build_go_right() {
    for options in ["size=6m", "size=64m,nr_inodes=120"] {
        let Some(small) = Small::new(options, Mark::NOTHING).await else {
            return;
        };
        // A directory that is new, one that is not, files that are replaced, and files that are streamed.
        fs::create_dir(small.f.path("live")).unwrap();
        let mut blobs = small.blobs("new", 100, 40 << 10);
        blobs.extend(small.blobs("live", 100, 41 << 10));
        blobs.extend(small.blobs("large", 30, 2 << 20));
        for (name, _) in small.blobs("replaced", 5, 42 << 10) {
            fs::create_dir_all(small.f.path("replaced")).unwrap();
            fs::write(small.f.path(&name), "older").unwrap();
        }
        let replaced = small.blobs("replaced", 5, 42 << 10);
        let (came, reasons) = small.bring(Class::Required, &blobs).await;
        assert!(came > 20 && reasons.len() > 20, "{options}: {came}, {reasons:?}");
        assert!(
            reasons.iter().all(|r| r.contains("no space left")),
            "{options}: {reasons:?}"
        );
        let mut asker = small.f.asker(1);
        let wants: Vec<(&str, &Digest)> = replaced.iter().map(|(n, d)| (n.as_str(), d)).collect();
        small.f.want(&asker, Class::Required, &wants).await;
        for (path, outcome) in asker.ends(replaced.len()).await {
            if !outcome.is_on_disk() {
                let old = fs::read(small.f.dir.path().join("execroot/_main").join(&path)).unwrap();
                assert_eq!(old, b"older", "{path} is what it was: {outcome:?}");
            }
        }
        assert_eq!(small.left_over(), Vec::<PathBuf>::new(), "{options}");
        let used = |small: &Small| {
            let sum = |dir: &str| -> u64 {
                fs::read_dir(small.f.path(dir))
                    .into_iter()
                    .flatten()
                    .flatten()
                    .map(|entry| entry.metadata().unwrap().len().div_ceil(4096) * 4096)
                    .sum()
            };
            ["new", "live", "large", "replaced"].map(sum).iter().sum::<u64>()
        };
        let found = rustix::fs::statvfs(small.f.dir.path()).unwrap();
        let taken = (found.f_blocks - found.f_bfree) * found.f_frsize;
        assert_eq!(
            taken,
            used(&small),
            "{options}: nothing unnamed holds space either"
        );

        for dir in ["new", "live", "large"] {
            let _ = fs::remove_dir_all(small.f.path(dir));
        }
        let few: Vec<_> = small.blobs("later", 40, 30 << 10);
        let (came, reasons) = small.bring(Class::Required, &few).await;
        assert_eq!((came, reasons), (40, vec![]), "{options}");
    }
}
