//! Several claims of one root, as if of several processes.

use std::sync::mpsc;

use super::*;

fn claim(dir: &Path, who: &str) -> Claim {
    Claim::new(dir, OsStr::new("_main"), who)
}

#[test]
fn what_a_process_begins_ends_what_others_began_before() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (claim(dir.path(), "one"), claim(dir.path(), "two"));
    assert_eq!(one.newest(), 0);
    assert!(one.is_newest(1), "nobody has said anything");
    one.begin(5, "a");
    assert!(one.is_newest(5) && one.newest() == 5);
    two.begin(7, "b");
    assert!(two.is_newest(7));
    assert!(!one.is_newest(5));
    // One that comes again from the journal later.
    one.begin(6, "c");
    assert!(!one.is_newest(6) && two.is_newest(7));
    assert_eq!(two.newest(), 7);
    let file = std::fs::read(dir.path().join(".outhaul-newest._main")).unwrap();
    assert_eq!(&file[LEN..], b"two");
    one.begin(8, "d");
    assert!(one.is_newest(8) && !two.is_newest(7));
}

#[test]
fn who_follow_the_same_build_both_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (claim(dir.path(), "one"), claim(dir.path(), "two"));
    one.begin(5, "a");
    two.begin(9, "a");
    assert!(one.is_newest(5) && two.is_newest(9));
    one.begin(4, "a");
    assert!(one.is_newest(4) && two.is_newest(9));
    assert!(!one.is_newest(3), "nothing older comes with it");
    // Without ids, nothing is the same.
    one.begin(10, "");
    two.begin(11, "");
    assert!(!one.is_newest(10));
}

#[test]
fn a_file_that_makes_no_sense_holds_nobody_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(".outhaul-newest._main");
    let mut dead = Entry {
        version: u64::MAX,
        build: 1,
    }
    .encode();
    dead[30] ^= 1;
    for bytes in [&b""[..], b"outhaul1", &[0xff; 100], &dead] {
        std::fs::write(&path, bytes).unwrap();
        let one = claim(dir.path(), "one");
        assert_eq!(one.newest(), 0);
        one.begin(5, "a");
        assert!(one.is_newest(5));
        assert_eq!(one.newest(), 5);
        std::fs::write(&path, bytes).unwrap();
        assert!(one.is_newest(5));
    }
    // Neither does what cannot be a file of ours.
    std::fs::remove_file(&path).unwrap();
    for round in 0..3 {
        match round {
            0 => std::os::unix::fs::symlink("elsewhere", &path).unwrap(),
            1 => std::fs::create_dir(&path).unwrap(),
            _ => rustix::fs::mknodat(
                rustix::fs::CWD,
                &path,
                rustix::fs::FileType::Fifo,
                rustix::fs::Mode::from_raw_mode(0o600),
                0,
            )
            .unwrap(),
        }
        let one = claim(dir.path(), "one");
        one.begin(5, "a");
        assert!(one.is_newest(5) && one.is_newest(1) && one.newest() == 0);
        assert!(one.working().is_none());
        match round {
            1 => std::fs::remove_dir(&path).unwrap(),
            _ => std::fs::remove_file(&path).unwrap(),
        }
    }
    assert!(!dir.path().join("elsewhere").exists());
}

#[test]
fn a_new_build_waits_for_those_who_are_publishing_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (claim(dir.path(), "one"), claim(dir.path(), "two"));
    one.begin(1, "a");
    let (first, second) = (one.working().unwrap(), one.working().unwrap());
    drop(second);
    let (begun, has_begun) = mpsc::channel();
    let thread = thread::spawn(move || {
        two.begin(2, "b");
        begun.send(()).unwrap();
    });
    let began = Instant::now();
    // The word is out at once.
    while one.is_newest(1) {
        assert!(began.elapsed() < Duration::from_secs(20));
    }
    if began.elapsed() < PATIENCE / 4 {
        assert!(has_begun.try_recv().is_err(), "it did not wait");
    }
    drop(first);
    has_begun.recv_timeout(Duration::from_secs(20)).unwrap();
    thread.join().unwrap();
}

#[test]
fn a_new_build_does_not_wait_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (claim(dir.path(), "one"), claim(dir.path(), "two"));
    assert!(one.begin(1, "a"));
    let stuck = one.working().unwrap();
    assert!(!two.begin(2, "b"), "it sees that it is not alone");
    assert!(two.is_newest(2) && !one.is_newest(1));
    // Neither is who follows the same build, nor who began it and comes again.
    assert!(!claim(dir.path(), "three").begin(2, "b"));
    assert!(!two.is_alone());
    drop(stuck);
    assert!(two.is_alone());
    // What is published here says nothing of others.
    let own = two.working().unwrap();
    assert!(!two.is_alone());
    drop(own);
    assert!(two.is_alone() && two.begin(3, "c"));
    // One that is older than the newest has nothing to look after.
    let _working = two.working();
    assert!(one.begin(2, "d"));
}

#[test]
fn of_many_who_begin_at_once_the_newest_stays() {
    for _ in 0..50 {
        let dir = tempfile::tempdir().unwrap();
        let claims: Vec<_> = (1..=6).map(|n| (n, claim(dir.path(), &n.to_string()))).collect();
        thread::scope(|scope| {
            for (n, claim) in &claims {
                scope.spawn(move || claim.begin(*n, &n.to_string()));
            }
        });
        for (n, claim) in &claims {
            assert_eq!((claim.newest(), claim.is_newest(*n)), (6, *n == 6));
        }
    }
}

#[test]
fn who_only_removes_sees_builds_of_others_and_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let claim = |who: &str| Claim::new(dir.path(), "_main".as_ref(), who);
    for before in [0, 5] {
        if before > 0 {
            claim("earlier").begin(before, "earlier");
        }
        let remover = claim("remover");
        assert_eq!(remover.join().unwrap(), before);
        assert!(remover.is_newest(before), "nobody has begun anything newer");
        let working = remover.working();
        assert!(working.is_some());
        // It waits for a second, and knows then that it is not alone.
        assert!(!claim("builder").begin(before + 4, "newer"));
        drop(working);
        assert!(!remover.is_newest(before));
        std::fs::remove_file(dir.path().join(".outhaul-newest._main")).unwrap();
    }
}
