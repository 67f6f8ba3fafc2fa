//! `outhaul mount`: recorded builds through the kernel.

use std::{
    fs, io,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use outhaul::demo::{GeneratedBuild, Setting, Shape, play};
use outhaul_testkit::{
    Ran, Running,
    cache::{BlobFault, RequestFault, Times},
    clean, finish, in_time, peers, until,
};
use rustix::process::Signal;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    full_disk::SmallDisk,
    support::{World, outhaul, run},
};

/// A mount. Unmounted when this is dropped.
struct Mounted {
    at: PathBuf,
    running: Running,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-lq").arg(&self.at).status();
    }
}

impl Mounted {
    /// Mounts a world's builds. `None`, which is printed, where FUSE cannot be used.
    async fn start(test: &str, world: &World, args: &[&str]) -> Option<Self> {
        let at = world.dir.path().join("mnt");
        // `nohup` has them ignored, and so would the mount; what this process handles, its children begin with as usual.
        for kind in [SignalKind::hangup(), SignalKind::quit()] {
            let _ = signal(kind).unwrap();
        }
        Self::start_by(test, outhaul(), at, world, args).await
    }

    /// The same by a command of its own.
    async fn start_by(
        test: &str,
        mut command: Command,
        at: PathBuf,
        world: &World,
        args: &[&str],
    ) -> Option<Self> {
        command.arg("mount").arg(&at).arg(world.state()).args(args);
        let mut mounted = Self {
            at,
            running: Running::start(command),
        };
        let running = &mut mounted.running;
        until("it is mounted", async || {
            !running.is_running() || running.stderr().contains("mounted on")
        })
        .await;
        if !running.is_running() {
            let said = running.stderr();
            assert!(said.contains("failed to mount"), "{said}");
            peers::skip(test, &["fuse"], &said);
            return None;
        }
        Some(mounted)
    }

    /// The newest build.
    fn latest(&self) -> PathBuf {
        self.at.join("workspace/latest")
    }

    fn status(&self) -> String {
        fs::read_to_string(self.at.join(".outhaul/status")).unwrap()
    }
}

/// A world with a build of which nothing is on disk, and no daemon.
async fn recorded() -> World {
    let world = World::new().await;
    let mut server = world.serve(&["--download=minimal"]).await;
    world.play(&world.build, server.address()).await;
    server.signal(Signal::TERM);
    server.end().await;
    world
}

async fn shell(script: &str, args: [&Path; 2]) -> Ran {
    let mut command = clean(Command::new("sh"));
    command.args(["-c", script, "sh"]).args(args);
    finish(command).await
}

#[track_caller]
fn error_of<T>(result: io::Result<T>) -> Option<rustix::io::Errno> {
    rustix::io::Errno::from_io_error(&result.err().unwrap())
}

fn is_mounted(at: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.contains(&format!(" {} ", at.display()))
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_read_a_build_as_if_it_were_on_disk_and_once_over_the_network() {
    let world = recorded().await;
    let flag = world.cache_flag();
    let name = "programs_read_a_build_as_if_it_were_on_disk";
    let Some(mut mounted) = Mounted::start(name, &world, &[&flag, "--no-prefetch"]).await else {
        return;
    };
    let (latest, copies) = (mounted.latest(), world.dir.path().join("copies"));
    fs::create_dir_all(copies.join("tar")).unwrap();
    // Nothing is read for names and sizes.
    let before = world.cache.stats().bytes_out;
    let found = shell(
        "cd \"$1\" && find -L bazel-out ! -type d | LC_ALL=C sort",
        [&latest, &copies],
    )
    .await
    .ok();
    assert_eq!(world.cache.stats().bytes_out, before);
    let mut expected: Vec<&str> = world
        .build
        .outputs()
        .iter()
        .map(|output| output.path.as_str())
        .collect();
    expected.retain(|path| !path.ends_with(".d"));
    expected.sort_unstable();
    assert_eq!(found.out().lines().collect::<Vec<_>>(), expected);

    assert_eq!(world.wrong_below(&latest), Vec::<String>::new());
    let before = world.cache.stats().bytes_out;
    let script = "cp -r \"$1/bazel-out\" \"$2/bazel-out\" && tar -C \"$1/\" -cf - bazel-out | tar -C \"$2/tar\" -xf - \
                  && grep -r nothing-has-this \"$1/bazel-out\"; test $? = 1";
    shell(script, [&latest, &copies]).await.ok();
    for copy in [copies.clone(), copies.join("tar")] {
        assert_eq!(world.wrong_below(&copy), Vec::<String>::new());
    }
    let by_id = mounted.at.join("by-invocation").join(world.build.invocation_id());
    assert_eq!(world.wrong_below(&by_id), Vec::<String>::new());
    assert_eq!(world.cache.stats().bytes_out, before, "it was downloaded twice");

    assert_eq!(
        error_of(fs::write(latest.join("new"), "")),
        Some(rustix::io::Errno::ROFS)
    );
    assert_eq!(
        error_of(fs::read(latest.join("bazel-out/none"))),
        Some(rustix::io::Errno::NOENT)
    );
    assert!(mounted.status().contains("\nfailed: 0\n"), "{}", mounted.status());
    mounted.running.signal(Signal::TERM);
    assert_eq!(mounted.running.end().await, Some(0), "{}", mounted.running);
    assert!(!is_mounted(&mounted.at));

    // What an earlier mount has kept is verified before it is used, and needs no cache.
    let (_, digest) = world.file("app/app");
    let hash = digest.hash_hex();
    let kept = world.path(&format!(
        "state/mount/sha256/{}/{hash}-{}",
        &hash[..2],
        digest.size()
    ));
    let before = world.cache.stats().bytes_out;
    let mounted = Mounted::start("", &world, &[&flag, "--no-prefetch"])
        .await
        .unwrap();
    assert_eq!(world.wrong_below(&mounted.latest()), Vec::<String>::new());
    assert_eq!(world.cache.stats().bytes_out, before);
    fs::remove_file(&kept).unwrap();
    fs::write(&kept, vec![0; 5_000_000]).unwrap();
    assert_eq!(world.wrong_below(&mounted.latest()), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_cannot_be_had_fails_in_time_and_the_status_says_why() {
    let world = recorded().await;
    let (flag, faults) = (world.cache_flag(), world.cache.faults());
    let args = [&*flag, "--no-prefetch", "--timeout=1s", "--remote-retries=1"];
    let name = "a_file_that_cannot_be_had_fails_in_time";
    let Some(mounted) = Mounted::start(name, &world, &args).await else {
        return;
    };
    // A busy machine may take longer to read the list of builds than a reader waits.
    until("the build is there", async || {
        fs::read_dir(mounted.latest().join("bazel-out")).is_ok()
    })
    .await;
    let path = |suffix: &str| mounted.latest().join(&world.file(suffix).0.path);
    let fails = |suffix: &str, why: &str| {
        assert_eq!(error_of(fs::read(path(suffix))), Some(rustix::io::Errno::IO));
        let status = mounted.status();
        let line = status.lines().find(|line| line.contains(suffix));
        assert!(line.is_some_and(|line| line.contains(why)), "{why}: {status}");
    };
    // Lost, wrong, and of a cache that does not answer.
    let (_, lost) = world.file("index.html");
    let bytes = world.cache.store().get(lost).unwrap();
    world.cache.store().remove(lost);
    fails("index.html", "evicted from the cache");
    world.cache.store().put(bytes);
    until("it is there", async || fs::read(path("index.html")).is_ok()).await;
    faults.blob(
        world.file("app/app").1,
        BlobFault::CorruptAt(4_000_000),
        Times::Always,
    );
    fails("app/app", "digest");
    faults.clear();
    until("it is right", async || fs::read(path("app/app")).is_ok()).await;
    faults.every_request(RequestFault::Stall, Times::Always);
    fails("build.log", "not downloaded within 1.0s");
    // Who was there already is served, and all is well once the cache is.
    fs::read(path("app/app")).unwrap();
    faults.clear();
    faults.sever_connections();
    until("the cache's return is noticed", async || {
        fs::read(path("build.log")).is_ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_reader_that_waits_keeps_no_other_and_can_be_killed() {
    let world = recorded().await;
    let (flag, faults) = (world.cache_flag(), world.cache.faults());
    let name = "one_reader_that_waits_keeps_no_other";
    let Some(mut mounted) = Mounted::start(name, &world, &[&flag, "--no-prefetch", "--timeout=1h"]).await
    else {
        return;
    };
    let path = |suffix: &str| mounted.latest().join(&world.file(suffix).0.path);
    let slow = path("app/app");
    faults.blob(
        world.file("app/app").1,
        BlobFault::StallAfter(1000),
        Times::Always,
    );
    let mut readers: Vec<Running> = (0..8)
        .map(|_| {
            let mut command = clean(Command::new("cat"));
            command.arg(&slow);
            Running::start(command)
        })
        .collect();
    until("all wait", async || mounted.status().contains("waiting: 8")).await;
    fs::read(path("style.css")).unwrap();
    // Killed, and asked to end.
    readers[0].signal(Signal::KILL);
    readers[1].signal(Signal::TERM);
    for reader in &mut readers[..2] {
        assert_eq!(reader.end().await, None);
    }
    assert!(mounted.status().contains("waiting: 6"), "{}", mounted.status());
    // The others end with the mount, and the next one takes the place of what is left of it.
    mounted.running.kill();
    for reader in &mut readers[2..] {
        assert_eq!(reader.end().await, Some(1));
    }
    assert_eq!(
        error_of(fs::read_dir(&mounted.at)),
        Some(rustix::io::Errno::NOTCONN)
    );
    faults.clear();
    faults.sever_connections();
    let again = Mounted::start("", &world, &[&flag, "--no-prefetch"])
        .await
        .unwrap();
    assert_eq!(world.wrong_below(&again.latest()), Vec::<String>::new());

    // A living one stays.
    let at = again.at.display().to_string();
    let other = world.path("other-state");
    let args = ["mount", &at, "--state-dir", &other, &flag];
    run(args)
        .await
        .says(2, &["another `outhaul mount` is mounted there"]);
    let elsewhere = world.path("elsewhere");
    let args = ["mount", &elsewhere, &world.state(), &flag];
    run(args)
        .await
        .says(1, &["another `outhaul mount` uses it", "--store-dir"]);
    fs::write(Path::new(&elsewhere).join("file"), "").unwrap();
    run(args).await.says(2, &["not empty"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_store_makes_room_and_refuses_what_is_larger_than_it() {
    let world = recorded().await;
    let flag = world.cache_flag();
    let name = "a_full_store_makes_room";
    let Some(mounted) = Mounted::start(name, &world, &[&flag, "--no-prefetch", "--store-size=40KiB"]).await
    else {
        return;
    };
    let path = |suffix: &str| mounted.latest().join(&world.file(suffix).0.path);
    assert_eq!(
        error_of(fs::read(path("app/app"))),
        Some(rustix::io::Errno::NOSPC)
    );
    let status = mounted.status();
    assert!(
        status.contains("no room in the store") && status.contains("--store-size"),
        "{status}"
    );
    for _ in 0..2 {
        for suffix in ["images/a.png", "images/b.png", "index.html", "style.css"] {
            assert_eq!(fs::read(path(suffix)).unwrap().len(), 10_000);
        }
    }
    let kept = world.path("state/mount");
    let taken = shell(
        "find \"$1\" -type f -size +0c | wc -l",
        [Path::new(&kept), Path::new("")],
    );
    let taken: usize = taken.await.ok().out().trim().parse().unwrap();
    assert!(taken <= 3, "{taken} files of three blocks each");
}

#[tokio::test(flavor = "multi_thread")]
async fn other_users_read_only_where_they_are_let_in() {
    if !rustix::process::geteuid().is_root() {
        peers::skip(
            "other_users_read_only_where_they_are_let_in",
            &["root"],
            "only root can be another user",
        );
        return;
    }
    let world = recorded().await;
    let flag = world.cache_flag();
    fs::set_permissions(world.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    for (args, words) in [
        (&[&*flag, "--no-prefetch"][..], "Permission denied"),
        (&[&*flag, "--no-prefetch", "--allow-other"], ""),
    ] {
        let Some(mounted) = Mounted::start("other_users_read_only_where_they_are_let_in", &world, args).await
        else {
            return;
        };
        let path = mounted.latest().join(&world.file("style.css").0.path);
        let script = "exec setpriv --reuid=65534 --regid=65534 --clear-groups cat \"$1\"";
        let ran = shell(script, [&path, Path::new("")]).await;
        assert!(
            ran.err.contains(words) && ran.err.is_empty() == words.is_empty(),
            "{ran}"
        );
        assert_eq!(
            ran.stdout.len(),
            if words.is_empty() { 10_000 } else { 0 },
            "{ran}"
        );
    }
}

/// Not root, as most people are: `fusermount3` mounts for them.
#[tokio::test(flavor = "multi_thread")]
async fn a_user_other_than_root_mounts_and_unmounts() {
    const NAME: &str = "a_user_other_than_root_mounts_and_unmounts";
    const NOBODY: u32 = 65534;
    if !rustix::process::geteuid().is_root() {
        peers::skip(NAME, &["root"], "only root can be another user");
        return;
    }
    if !peers::are_there(NAME, &["fusermount3"]) {
        return;
    }
    let world = recorded().await;
    let at = world.dir.path().join("mnt");
    fs::create_dir(&at).unwrap();
    // Where anybody finds it.
    let program = world.path("outhaul");
    fs::copy(env!("CARGO_BIN_EXE_outhaul"), &program).unwrap();
    let owner = format!("{NOBODY}:{NOBODY}");
    let given = clean(Command::new("chown"))
        .args(["-R", &owner])
        .arg(world.dir.path())
        .status();
    assert!(given.unwrap().success());
    let flag = world.cache_flag();
    for signal in [Signal::TERM, Signal::KILL] {
        let mut command = clean(Command::new(&program));
        command.uid(NOBODY).gid(NOBODY).current_dir("/");
        let Some(mut mounted) = Mounted::start_by(NAME, command, at.clone(), &world, &[&flag]).await else {
            return;
        };
        let path = mounted.latest().join(&world.file("style.css").0.path);
        let script = "exec setpriv --reuid=65534 --regid=65534 --clear-groups cat \"$1\"";
        let ran = shell(script, [&path, Path::new("")]).await;
        assert_eq!((ran.stdout.len(), ran.code), (10_000, Some(0)), "{ran}");
        // Not even root is let in.
        assert_eq!(error_of(fs::read(&path)), Some(rustix::io::Errno::ACCESS));
        mounted.running.signal(signal);
        mounted.running.end().await;
        // What a killed one leaves, the next one unmounts.
        assert_eq!(is_mounted(&at), signal == Signal::KILL);
        if signal == Signal::KILL {
            std::mem::forget(mounted);
        }
    }
    let mut command = clean(Command::new(&program));
    command.uid(NOBODY).gid(NOBODY).current_dir("/");
    let mut mounted = Mounted::start_by(NAME, command, at.clone(), &world, &[&flag])
        .await
        .unwrap();
    mounted.running.signal(Signal::TERM);
    mounted.running.end().await;
    assert!(!is_mounted(&at));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_build_is_followed_and_what_it_was_asked_for_comes_before_it_is_read() {
    let world = World::new().await;
    let server = world.serve(&[]).await;
    let flag = world.cache_flag();
    let name = "the_newest_build_is_followed";
    let Some(mounted) = Mounted::start(name, &world, &[&flag]).await else {
        return;
    };
    assert!(!mounted.latest().exists());
    world.play(&world.build, server.address()).await;
    let link = mounted.latest();
    until("the first build is there", async || link.exists()).await;
    let id = world.build.invocation_id();
    assert_eq!(
        fs::read_link(&link).unwrap(),
        Path::new("../by-invocation").join(&id)
    );
    // What is on disk is taken from there.
    let before = world.cache.stats().bytes_out;
    assert_eq!(world.wrong_below(&link), Vec::<String>::new());
    assert_eq!(world.cache.stats().bytes_out, before);

    let next = world.build.incremental();
    world.play(&next, server.address()).await;
    let newer = Path::new("../by-invocation").join(next.invocation_id());
    until("the next one is the newest", async || {
        fs::read_link(&link).unwrap() == newer
    })
    .await;
    assert_eq!(
        world.wrong_below(&mounted.at.join("by-invocation").join(&id)),
        Vec::<String>::new()
    );
    drop(mounted);

    // The files gone from the output tree and the store, they are fetched at once.
    fs::remove_dir_all(world.exec_root().join("bazel-out")).unwrap();
    let store = format!("--store-dir={}", world.path("store"));
    let mounted = Mounted::start(name, &world, &[&flag, &store]).await.unwrap();
    let (_, digest) = world.file("app/app");
    let hash = digest.hash_hex();
    let kept = world.path(&format!("store/sha256/{}/{hash}-{}", &hash[..2], digest.size()));
    until("the program is there", async || Path::new(&kept).exists()).await;
    let status = mounted.status();
    assert!(status.contains("downloaded for readers: 0\n"), "{status}");
}

/// With `OUTHAUL_MOUNT_FILES=100000` it prints the figures of docs/benchmarks.md.
#[tokio::test(flavor = "multi_thread")]
async fn every_file_of_a_large_build_is_listed_once() {
    let files = std::env::var("OUTHAUL_MOUNT_FILES").map_or(3000, |text| text.parse().unwrap());
    let world = World::new().await;
    let shape = Shape {
        targets: files / 100,
        file_size: 8,
        ..Shape::default()
    };
    let filled = shape.fill(|bytes| world.cache.store().put(bytes));
    let server = world.serve(&["--download=minimal"]).await;
    let setting = Setting {
        workspace: world.path("workspace"),
        exec_root: world.exec_root().display().to_string(),
        remote_cache: world.cache.endpoint(),
        instance_name: String::new(),
    };
    let id = filled.invocation_id(1);
    let build_id = filled.invocation_id(2);
    let played = play(server.address(), &id, &build_id, filled.events(&setting, &id));
    in_time(played).await.unwrap();
    let name = "every_file_of_a_large_build_is_listed_once";
    let Some(mounted) = Mounted::start(name, &world, &[&world.cache_flag(), "--no-prefetch"]).await else {
        return;
    };
    let memory = || outhaul_testkit::status(mounted.running.id(), "VmRSS").unwrap();
    let before = memory();
    for (what, script) in [
        ("the first find", "find -L \"$1\" -type f | sort | uniq | wc -l"),
        (
            "with sizes",
            "find -L \"$1\" -type f -size -9c | sort | uniq | wc -l",
        ),
        ("again", "find -L \"$1\" -type f -size -9c | sort | uniq | wc -l"),
    ] {
        let ran = shell(script, [&mounted.latest(), Path::new("")]).await.ok();
        assert_eq!(ran.out().trim(), files.to_string());
        eprintln!("{what}: {:?}", ran.took);
    }
    let all = memory().saturating_sub(before) * 1024 / files as u64;
    eprintln!("{all} bytes a file, with what the allocator keeps");
}

/// Prints how fast a large file is read through the mount, and the same bytes from a file of the store.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement, for docs/benchmarks.md; OUTHAUL_MOUNT_MIB is how large the file is"]
async fn measured_second_read_of_a_file() {
    let mib = std::env::var("OUTHAUL_MOUNT_MIB").map_or(256, |mib| mib.parse().unwrap());
    let world = World::new().await;
    let server = world.serve(&["--download=minimal"]).await;
    let setting = Setting {
        workspace: world.path("workspace"),
        exec_root: world.exec_root().display().to_string(),
        remote_cache: world.cache.endpoint(),
        instance_name: String::new(),
    };
    let put = |bytes: Vec<u8>| {
        let is_app = bytes.len() == 5_000_000;
        let bytes = if is_app { vec![7; mib << 20] } else { bytes };
        world.cache.store().put(bytes)
    };
    let build = GeneratedBuild::new(put, setting, 2);
    world.play(&build, server.address()).await;
    let name = "measured_second_read_of_a_file";
    let Some(mounted) = Mounted::start(name, &world, &[&world.cache_flag(), "--no-prefetch"]).await else {
        return;
    };
    let app = world.file("app/app").0.path.clone();
    let script = "find \"$1\" -type f -size +$(($(stat -c %s \"$2\") / 2))c";
    let through = mounted.latest().join(app);
    let read = |path: &Path| {
        let began = std::time::Instant::now();
        let mut file = fs::File::open(path).unwrap();
        let (mut buffer, mut bytes) = (vec![0; 1 << 20], 0);
        loop {
            match io::Read::read(&mut file, &mut buffer).unwrap() {
                0 => break,
                read => bytes += read,
            }
        }
        assert_eq!(bytes, mib << 20);
        bytes as f64 / f64::from(1 << 30) / began.elapsed().as_secs_f64()
    };
    eprintln!("first, with its download: {:.2} GiB/s", read(&through));
    let store = world.path("state/mount");
    let kept = shell(script, [Path::new(&store), &through]).await.ok();
    let kept = PathBuf::from(kept.out().trim());
    for _ in 0..5 {
        let (second, itself) = (read(&through), read(&kept));
        eprintln!("again: {second:.2} GiB/s, the file in the store {itself:.2}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_mount_at_the_same_place_stays() {
    let world = recorded().await;
    let flag = world.cache_flag();
    let name = "what_others_mount_at_the_same_place_stays";
    let shell = async |script: &str, at: &Path| shell(script, [at, Path::new("")]).await;
    for script in [
        // While a file of ours is open, and after all are closed.
        "umount -l \"$1\" && mount -t tmpfs other \"$1\"",
        "umount \"$1\" && mount -t tmpfs other \"$1\"",
    ] {
        let Some(mut mounted) = Mounted::start(name, &world, &[&flag, "--no-prefetch"]).await else {
            return;
        };
        let path = mounted.latest().join(&world.file("style.css").0.path);
        let open = script.contains("-l").then(|| fs::File::open(&path).unwrap());
        let ran = shell(script, &mounted.at).await;
        if !ran.err.is_empty() {
            peers::skip(name, &["fuse"], &ran.err);
            return;
        }
        if open.is_some() {
            mounted.running.signal(Signal::TERM);
        }
        assert_eq!(mounted.running.end().await, Some(0), "{}", mounted.running);
        drop(open);
        assert!(is_mounted(&mounted.at), "{script}");
        shell("umount \"$1\"", &mounted.at).await.ok();
    }
    // Over ours, which stays below.
    let mut mounted = Mounted::start(name, &world, &[&flag, "--no-prefetch"])
        .await
        .unwrap();
    shell("mount -t tmpfs other \"$1\"", &mounted.at).await.ok();
    mounted.running.signal(Signal::HUP);
    assert_eq!(mounted.running.end().await, Some(1), "{}", mounted.running);
    let said = mounted.running.stderr();
    assert!(said.contains("something else is mounted over it"), "{said}");
    shell("umount \"$1\" && umount -l \"$1\"", &mounted.at).await.ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_the_terminal_unmounts() {
    let world = recorded().await;
    let flag = world.cache_flag();
    // A terminal that is closed sends its signal twice.
    for signals in [&[Signal::HUP, Signal::HUP][..], &[Signal::QUIT]] {
        let Some(mut mounted) = Mounted::start("closing_the_terminal_unmounts", &world, &[&flag]).await
        else {
            return;
        };
        for signal in signals {
            mounted.running.signal(*signal);
            // Two that come at once are one.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(mounted.running.end().await, Some(0), "{}", mounted.running);
        assert!(!is_mounted(&mounted.at));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_store_nor_record_can_be_hidden() {
    let world = recorded().await;
    let flag = world.cache_flag();
    let at = world.path("builds");
    let store = format!("--store-dir={at}/store");
    run(["mount", &at, &world.state(), &flag, &store])
        .await
        .says(2, &["the store", "would be hidden by the mount"]);
    assert!(!Path::new(&at).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_others_may_write_to_is_refused() {
    let world = recorded().await;
    let (flag, store) = (world.cache_flag(), world.path("store"));
    fs::create_dir(&store).unwrap();
    fs::set_permissions(&store, fs::Permissions::from_mode(0o777)).unwrap();
    let flags = format!("--store-dir={store}");
    run(["mount", &world.path("builds"), &world.state(), &flag, &flags])
        .await
        .says(1, &["others must not be able to write to it"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_store_can_do_without_makes_way_on_a_full_disk() {
    let world = recorded().await;
    let flag = world.cache_flag();
    let Some(disk) = SmallDisk::mount(&world.path("disk")).await else {
        return;
    };
    let store = format!("--store-dir={}", world.path("disk/store"));
    let name = "what_the_store_can_do_without_makes_way_on_a_full_disk";
    let Some(mounted) = Mounted::start(name, &world, &[&flag, &store, "--no-prefetch"]).await else {
        return;
    };
    let path = |suffix: &str| mounted.latest().join(&world.file(suffix).0.path);
    let mut program = fs::File::open(path("app/app")).unwrap();
    disk.fill();
    // What is open stays, so that there is nothing that could make way.
    assert_eq!(
        error_of(fs::read(path("images/a.png"))),
        Some(rustix::io::Errno::NOSPC)
    );
    let status = mounted.status();
    assert!(status.contains("no space left"), "{status}");
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut program, &mut bytes).unwrap();
    assert_eq!(bytes.len(), 5_000_000);
    drop(program);
    until("the program makes way", async || {
        fs::read(path("images/a.png")).is_ok()
    })
    .await;
    for suffix in ["images/b.png", "index.html", "style.css"] {
        assert_eq!(fs::read(path(suffix)).unwrap().len(), 10_000);
    }
    // Several at once, for all of which the program makes way.
    drop(mounted);
    fs::remove_file(disk.ballast()).unwrap();
    let store = format!("--store-dir={}", world.path("disk/other"));
    let Some(mounted) = Mounted::start(name, &world, &[&flag, &store, "--no-prefetch"]).await else {
        return;
    };
    let path = |suffix: &str| mounted.latest().join(&world.file(suffix).0.path);
    assert_eq!(fs::read(path("app/app")).unwrap().len(), 5_000_000);
    disk.fill();
    let readers: Vec<_> = [
        "images/a.png",
        "images/b.png",
        "index.html",
        "style.css",
        "part0.h",
    ]
    .map(path)
    .into_iter()
    .map(|path| std::thread::spawn(move || fs::read(&path).map(|bytes| (path, bytes.len()))))
    .collect();
    for reader in readers {
        let read = reader.join().unwrap();
        assert!(
            read.as_ref().is_ok_and(|(_, bytes)| *bytes > 0),
            "{read:?}: {}",
            mounted.status()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn small_files_beside_one_that_is_read_come_with_it() {
    let world = recorded().await;
    let flag = world.cache_flag();
    let name = "small_files_beside_one_that_is_read_come_with_it";
    let Some(mounted) = Mounted::start(name, &world, &[&flag]).await else {
        return;
    };
    let kept = |suffix: &str| {
        let (_, digest) = world.file(suffix);
        let hash = digest.hash_hex();
        let file = format!("state/mount/sha256/{}/{hash}-{}", &hash[..2], digest.size());
        Path::new(&world.path(&file)).exists()
    };
    fs::read(mounted.latest().join(&world.file("images/a.png").0.path)).unwrap();
    until("the one beside it is there", async || kept("images/b.png")).await;
    assert!(!kept("app/app"), "nothing else was asked for");
    let status = mounted.status();
    assert!(status.contains("downloaded for readers: 1\n"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_hangs_keeps_nobody_for_longer_than_the_timeout() {
    let world = World::new().await;
    let mut server = world.serve(&["--download=minimal"]).await;
    world.play(&world.build, server.address()).await;
    let flag = world.cache_flag();
    let name = "a_daemon_that_hangs_keeps_nobody";
    let args = [&*flag, "--no-prefetch", "--timeout=1s"];
    let Some(mounted) = Mounted::start(name, &world, &args).await else {
        return;
    };
    until("the build is there", async || {
        fs::read_dir(mounted.latest().join("bazel-out")).is_ok()
    })
    .await;
    server.signal(Signal::STOP);
    // A look in the next moment gets what is known, and then nobody waits for long.
    until("a question is late", async || {
        fs::read_dir(mounted.at.join("by-invocation")).is_err()
    })
    .await;
    let status = mounted.status();
    assert!(
        status.contains("did not answer within 1.0s (--timeout)"),
        "{status}"
    );
    // What was looked at is there still.
    let id = world.build.invocation_id();
    server.signal(Signal::CONT);
    until("it answers again", async || {
        fs::read_dir(mounted.at.join("by-invocation").join(&id).join("bazel-out")).is_ok()
    })
    .await;
    server.signal(Signal::TERM);
    server.end().await;
}
