//! Builds of one root that several processes follow, each with an epoch of its own.

use super::*;

#[test]
fn nothing_is_published_once_another_process_has_begun_a_newer_build() {
    let mut f = Fixture::new();
    let mine = Epoch::shared(f.root.claim("one"));
    let theirs = Epoch::shared(f.root.claim("two"));
    mine.begin(1);
    assert!(mine.claim(1, "a"));
    let (small, large) = (b"small".as_slice(), vec![7; 2_000_000]);
    let digest = |bytes: &[u8]| Digest::of(DigestFunction::Sha256, bytes);
    let (of_small, of_large) = (digest(small), digest(&large));
    let path = |n: u32, what: &str| ExecPath::new(&format!("bazel-out/{n}/{what}")).unwrap();
    let (second, third) = (f.path("bazel-out/2"), f.path("bazel-out/3/large"));
    let mut place = |n: u32, version: u64| {
        let file = path(n, "file");
        let item = Item {
            path: &file,
            digest: &of_small,
            bytes: small,
            is_new: false,
        };
        let mut outcomes = f.placer.place_many(&[item], &mine, version);
        let mut stream = f.placer.begin_large(&path(n, "large"), &of_large).unwrap();
        stream.write(&large).unwrap();
        outcomes.push(stream.finish(&mine, version));
        outcomes.push(f.placer.place_symlink(&path(n, "link"), "file", &mine, version));
        outcomes.push(f.placer.make_directory(&path(n, "directory"), &mine, version));
        outcomes
    };
    for (n, outcome) in place(1, 1).into_iter().enumerate() {
        outcome.unwrap_or_else(|e| panic!("{n}: {e}"));
    }
    assert!(mine.is_newest(1));
    assert_eq!((mine.claimed(), theirs.claimed()), (1, 1));
    theirs.begin(2);
    assert!(theirs.claim(2, "b"));
    assert!(!mine.is_newest(1) && mine.claimed() == 2);
    for (n, outcome) in place(2, 1).into_iter().enumerate() {
        assert!(outcome.is_err_and(|e| e.is_superseded()), "{n}");
    }
    assert!(!second.exists());
    // Ours again.
    mine.begin(3);
    assert!(mine.claim(3, "c"));
    assert!(!theirs.is_newest(2));
    for (n, outcome) in place(3, 3).into_iter().enumerate() {
        outcome.unwrap_or_else(|e| panic!("{n}: {e}"));
    }
    assert_eq!(fs::read(third).unwrap(), large);
}

#[test]
fn a_directory_without_an_output_base_is_nobody_elses_and_nothing_is_left_there() {
    let dir = tempfile::tempdir().unwrap();
    let root = OutputRoot::open(dir.path(), true).unwrap();
    assert!(root.claim("one").is_none());
    let epoch = Epoch::shared(root.claim("one"));
    assert!(epoch.claim(1, "a"));
    assert!(epoch.is_newest(0) && epoch.working().is_none());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
