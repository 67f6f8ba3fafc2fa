//! A file system whose times have steps of a second, for real: ext4 with small inodes on a loop device. Where that can't
//! be mounted (it takes root), the test says so and is skipped.

use std::{
    process::Command,
    thread::sleep,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::*;

struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let (image, at) = (dir.path().join("image"), dir.path().join("at"));
        fs::create_dir(&at).unwrap();
        fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
        let ran = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
        let mounted = ran(Command::new("mkfs.ext4").args(["-q", "-I", "128"]).arg(&image))
            && ran(Command::new("mount").args(["-o", "loop"]).args([&image, &at]));
        if !mounted {
            eprintln!("skipped: no ext4 with small inodes can be mounted here");
        }
        mounted.then_some(Self(dir))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("-l")
            .arg(self.0.path().join("at"))
            .output();
    }
}

fn now_ns() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as i64
}

#[test]
fn a_change_within_the_second_of_the_download_is_seen_on_coarse_clocks() {
    let Some(mounted) = Mounted::new() else { return };
    let mut f = Fixture::beneath(&mounted.0.path().join("at"));
    let path = exec("bazel-out/file");
    let content = OutputContent::Blob(digest("right"));
    // Both within one second.
    let past = Duration::from_nanos(now_ns() as u64 % 1_000_000_000);
    sleep(Duration::from_millis(1005).saturating_sub(past));
    let stamp = f.place("bazel-out/file", "right").unwrap().stamp;
    assert_eq!(
        stamp.ctime_ns % 1_000_000_000,
        0,
        "the file system's times are fine"
    );
    set_mode(&f.path("bazel-out/file"), 0o755);
    fs::write(f.path("bazel-out/file"), "wrong").unwrap();
    set_mode(&f.path("bazel-out/file"), 0o555);
    let changed = rustix::fs::lstat(f.path("bazel-out/file")).unwrap();
    assert!(
        super::sys::is_same_file(&stamp, &super::sys::stamp(&changed, 0)),
        "it took too long"
    );
    // As it would be recorded, be it a moment later or long after.
    for after in [30_000_000, 10_000_000_000] {
        let recorded = stamp.recorded_at(now_ns() + after);
        let check = f.placer.check(&path, &content, Some(&recorded)).unwrap();
        assert_eq!(check, Check::Differs);
    }
    // What is right is read once more, and then vouched for by its times.
    f.place("bazel-out/file", "right").unwrap();
    let look = |f: &mut Fixture, recorded: Option<&Stamp>| match f.placer.check(&path, &content, recorded) {
        Ok(Check::Present { stamp, how }) => (stamp, how),
        other => panic!("{other:?}"),
    };
    let (young, _) = look(&mut f, None);
    assert_eq!(look(&mut f, Some(&young)).1, Vouched::Content);
    sleep(Duration::from_millis(2100));
    let (old, how) = look(&mut f, Some(&young));
    assert_eq!(how, Vouched::Content);
    assert_eq!(look(&mut f, Some(&old)).1, Vouched::Stamp);
}
