//! `outhaul fetch archive`: from directories, an HTTP server and the cache.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use outhaul::digest::{Digest, DigestFunction};
use outhaul_testkit::{
    Ran, Running, clean, finish, peers,
    stores::{Store, StoreKind},
    until,
};
#[cfg(feature = "object-stores")]
use rustix::process::Signal;
use tokio::{io::AsyncWriteExt as _, net::TcpListener};

use crate::{
    full_disk::SmallDisk,
    support::{World, outhaul, run},
};

/// A directory with archives, and one to put things into.
pub struct Archives {
    pub dir: tempfile::TempDir,
}

impl Archives {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("in")).unwrap();
        Self { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The URL of the directory with the archives.
    pub fn url(&self) -> String {
        format!("file://{}/", self.path("in").display())
    }

    pub fn file(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path("in").join(name), bytes).unwrap();
    }

    /// A file with a checksum beside it.
    pub fn with_sum(&self, name: &str, bytes: &[u8]) {
        self.file(name, bytes);
        self.file(
            &format!("{name}.sha256sum"),
            format!("{}  {name}\n", sha256(bytes)).as_bytes(),
        );
    }

    pub async fn fetch(&self, args: &[&str]) -> Ran {
        let out = format!("--output-dir={}", self.path("out").display());
        run(["fetch", "archive", &out].into_iter().chain(args.iter().copied())).await
    }

    /// Every file below the output directory, with its bytes; nothing else may be there.
    fn found(&self) -> Vec<(String, String)> {
        let mut found = Vec::new();
        let mut directories = vec![self.path("out")];
        while let Some(directory) = directories.pop() {
            for entry in std::fs::read_dir(&directory).into_iter().flatten() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    directories.push(path);
                } else {
                    let bytes = String::from_utf8(std::fs::read(&path).unwrap()).unwrap();
                    let name = path.strip_prefix(self.path("out")).unwrap().display().to_string();
                    found.push((name, bytes));
                }
            }
        }
        found.sort();
        found
    }

    /// Nothing is left but what was there before.
    fn assert_only(&self, names: &[&str]) {
        let entries = std::fs::read_dir(self.dir.path()).unwrap();
        let mut left: Vec<_> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, names);
    }
}

pub fn sha256(bytes: &[u8]) -> String {
    Digest::of(DigestFunction::Sha256, bytes).hash_hex()
}

fn pairs(found: &[(String, String)]) -> Vec<(&str, &str)> {
    found.iter().map(|(name, bytes)| (&**name, &**bytes)).collect()
}

/// A tar of files.
pub fn tar(files: &[(&str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        builder.append_data(&mut header, name, bytes.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}

pub fn zst(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

/// An archive as TheRock's pipelines make them: a manifest, and files in a stage directory.
pub fn therock(stage: &str, files: &[(&str, &str)]) -> Vec<u8> {
    let manifest = format!("{stage}\n");
    let names: Vec<String> = files.iter().map(|(name, _)| format!("{stage}/{name}")).collect();
    let mut all = vec![("artifact_manifest.txt", &*manifest)];
    all.extend(
        names
            .iter()
            .map(|name| &**name)
            .zip(files.iter().map(|(_, bytes)| *bytes)),
    );
    zst(&tar(&all))
}

#[tokio::test]
async fn files_have_the_modes_that_the_umask_leaves() {
    use std::os::unix::fs::PermissionsExt as _;
    for (umask, file, directory) in [("022", 0o644, 0o755), ("077", 0o600, 0o700)] {
        let archives = Archives::new();
        archives.file("a.tar", &tar(&[("dir/x", "x")]));
        let program = outhaul();
        let mut command = Command::new("sh");
        command.args(["-c", &format!("umask {umask}; exec \"$0\" \"$@\"")]);
        command.arg(program.get_program());
        command.args(["fetch", "archive", &archives.url()]);
        command.arg(format!("--output-dir={}", archives.path("out").display()));
        finish(command).await.expect(0);
        for (path, mode) in [
            ("out/a", directory),
            ("out/a/dir", directory),
            ("out/a/dir/x", file),
        ] {
            let found = archives.path(path).metadata().unwrap().permissions().mode();
            assert_eq!(found & 0o777, mode, "{path} with {umask}");
        }
    }
}

#[tokio::test]
async fn archives_are_chosen_by_name_and_kept_as_they_are() {
    let archives = Archives::new();
    archives.with_sum("blas_lib_gfx942.tar.zst", b"lib");
    archives.file("blas_run_generic.tar.xz", b"run");
    archives.with_sum("fft_lib_generic.tar.zst", b"fft");
    archives.file("index.html", b"<html>");
    let url = archives.url();
    let args = [&*url, "--no-extract", "--include=blas_(lib|run)_", "--json"];
    let ran = archives.fetch(&args).await.expect(0);
    let both = [
        ("blas_lib_gfx942.tar.zst", "lib"),
        ("blas_run_generic.tar.xz", "run"),
    ];
    assert_eq!(pairs(&archives.found()), both);
    let lines = ran.json();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["name"], "blas_lib_gfx942.tar.zst");
    assert_eq!(lines[0]["outcome"], "downloaded");
    assert_eq!(lines[0]["digest"], format!("sha256:{}", sha256(b"lib")));
    assert_eq!(
        (&lines[1]["checksum"], &lines[1]["size"]),
        (&serde_json::Value::Null, &3.into())
    );
    // Only what has a checksum is known to be there.
    let lines = archives.fetch(&args).await.expect(0).json();
    assert_eq!(
        (&lines[0]["outcome"], &lines[1]["outcome"]),
        (&"present".into(), &"downloaded".into())
    );
    // What is there with other bytes is replaced.
    std::fs::write(archives.path("out/blas_lib_gfx942.tar.zst"), "other").unwrap();
    archives.fetch(&args).await.expect(0);
    assert_eq!(pairs(&archives.found()), both);
}

#[tokio::test]
async fn what_would_be_fetched_is_shown_and_not_fetched() {
    let archives = Archives::new();
    archives.with_sum("a.tar", b"a");
    archives.file("b.zip", b"bb");
    let ran = archives
        .fetch(&[&archives.url(), "--dry-run", "--optional=^b"])
        .await
        .expect(0);
    let lines: Vec<String> = ran.out().lines().map(str::to_owned).collect();
    let dir = archives.path("in").display().to_string();
    assert_eq!(
        lines,
        [
            format!("required  1 B  sha256:{}  {dir}/a.tar", sha256(b"a")),
            format!("optional  2 B  -  {dir}/b.zip"),
        ]
    );
    archives.assert_only(&["in"]);
}

#[tokio::test]
async fn a_wrong_request_is_refused_before_anything_is_downloaded() {
    let archives = Archives::new();
    archives.file("a.tar", b"a");
    archives.file("a.zip", b"a");
    let url = archives.url();
    for (args, code, parts) in [
        (
            vec![&*url, "--include=a", "--include=no"],
            3,
            vec!["--include=no matches no archive"],
        ),
        (vec![&*url, "--include=["], 2, vec!["--include=["]),
        (vec![&*url, "--exclude=a"], 3, vec!["no archives"]),
        // Both would be the directory `a`.
        (vec![&*url], 1, vec!["a.tar and ", "a.zip would both go to a"]),
        (
            vec![&*url, "--no-extract", "--flatten"],
            2,
            vec!["--no-extract", "--flatten"],
        ),
        (
            vec![&*url, "--limit=archive-size"],
            2,
            vec!["--limit=archive-size", "NAME=VALUE"],
        ),
        (vec![&*url, "--limit=size=4"], 2, vec!["archive-entries"]),
        (
            vec![&*url, "--checksum-file=/nonexistent"],
            2,
            vec!["--checksum-file=/nonexistent"],
        ),
        (vec!["file:///nonexistent/a.tar"], 2, vec!["/nonexistent/a.tar"]),
        (vec!["file://relative/"], 2, vec!["absolute"]),
        (vec!["ftp://h/a.tar"], 2, vec!["unknown scheme"]),
        (
            vec!["https://me:s3cret@h/a%2Fb?sig=s3cret"],
            2,
            vec!["https://h/a%2Fb: ", "NAME=URL"],
        ),
        (vec!["in/a.tar"], 2, vec!["in/a.tar"]),
        (vec!["./in/a.tar"], 2, vec!["./in/a.tar", "file:///"]),
        (vec!["user:s3cret@h/a.tar"], 2, vec!["h/a.tar: ", "neither"]),
        (vec!["http:/user:s3cret@h/a.tar"], 2, vec!["h/a.tar: ", "neither"]),
        (vec!["h/a.tar?sig=s3cret"], 2, vec!["h/a.tar: ", "neither"]),
        (
            vec!["http://user:s3cret/x@h/a.tar"],
            2,
            vec!["http://***", "port"],
        ),
        (
            vec!["http://user:s3cret#x@h/a.tar"],
            2,
            vec!["http://***", "port"],
        ),
        (
            vec!["http://user:s3cret?x@h/a.tar"],
            2,
            vec!["http://***", "port"],
        ),
        (
            vec!["http://user:s3cret@h:99999/a.tar"],
            2,
            vec!["http://h:99999/a.tar", "65535"],
        ),
        (vec![&format!("{}/7", sha256(b"a"))], 2, vec!["--remote-cache"]),
    ] {
        let ran = archives.fetch(&args).await.says(code, &parts);
        assert!(!ran.err.contains("s3cret"), "{}", ran.err);
    }
    archives.assert_only(&["in"]);
}

#[tokio::test]
async fn an_archive_that_is_not_what_its_checksum_says_is_not_kept() {
    let archives = Archives::new();
    archives.with_sum("a.tar", b"right");
    archives.with_sum("b.tar", b"right");
    archives.file("b.tar", b"wrong");
    archives.file("c.tar", b"unknown");
    let url = archives.url();
    let wrong = sha256(b"wrong");
    let ran = archives.fetch(&[&url, "--no-extract"]).await;
    ran.says(
        1,
        &[
            "b.tar",
            &wrong,
            &sha256(b"right"),
            "2 downloaded (12 B); 1 failed",
        ],
    );
    assert_eq!(
        pairs(&archives.found()),
        [("a.tar", "right"), ("c.tar", "unknown")]
    );
    // Nothing is downloaded if a checksum is missing that there must be.
    std::fs::remove_dir_all(archives.path("out")).unwrap();
    let ran = archives
        .fetch(&[&url, "--no-extract", "--checksum=require"])
        .await;
    ran.says(1, &["c.tar.sha256sum", "unfinished"]);
    archives.assert_only(&["in"]);
    // A list goes before what is beside them.
    let list = archives.path("list");
    std::fs::write(
        &list,
        format!("{wrong} *x/b.tar\n{}  c.tar\n", sha256(b"unknown")),
    )
    .unwrap();
    let list = format!("--checksum-file={}", list.display());
    let args = [&*url, "--no-extract", "--checksum=require", &list];
    archives.fetch(&args).await.expect(0);
    assert_eq!(archives.found().len(), 3);
    // One that may be missing fails nothing.
    std::fs::remove_dir_all(archives.path("out")).unwrap();
    let ran = archives.fetch(&[&url, "--no-extract", "--optional=^b"]).await;
    ran.says(0, &["optional: ", "b.tar"]);
    assert_eq!(archives.found().len(), 2);
    let ran = archives.fetch(&[&url, "--no-extract", "--checksum=none"]).await;
    ran.expect(0);
    // Nor does it if there is no other.
    for flag in ["--no-extract", "--extract", "--flatten"] {
        std::fs::remove_dir_all(archives.path("out")).unwrap();
        let ran = archives
            .fetch(&[&url, flag, "--include=^b", "--optional=^b"])
            .await;
        ran.says(0, &["optional: ", "b.tar", "archives: 1 failed"]);
        assert_eq!(archives.found(), []);
        std::fs::create_dir_all(archives.path("out")).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_in_the_cache_is_named_by_its_digest() {
    let archives = Archives::new();
    let world = World::new().await;
    let bytes = tar(&[("dir/x", "one"), ("dir/y", "two")]);
    let digest = world.cache.store().put(bytes.clone()).to_string();
    let cache = world.cache_flag();
    archives
        .fetch(&[&digest, &cache])
        .await
        .says(1, &["write NAME=URL", "--no-extract"]);
    archives.fetch(&[&digest, &cache, "--no-extract"]).await.expect(0);
    let kept = std::fs::read(archives.path("out").join(sha256(&bytes))).unwrap();
    assert_eq!(kept, bytes);
    std::fs::remove_dir_all(archives.path("out")).unwrap();
    let named = format!("x.tar={digest}");
    archives
        .fetch(&[&named, &cache, "--strip-components=1"])
        .await
        .expect(0);
    assert_eq!(pairs(&archives.found()), [("x", "one"), ("y", "two")]);
    let gone = format!("x.tar={}/7", sha256(b"gone"));
    archives
        .fetch(&[&gone, &cache])
        .await
        .says(3, &[&sha256(b"gone")]);
    assert_eq!(archives.found().len(), 2);
}

#[tokio::test]
async fn archives_of_a_directory_go_to_directories_of_their_own() {
    let archives = Archives::new();
    archives.with_sum("one.tar.zst", &zst(&tar(&[("a/x", "1"), ("b", "2")])));
    archives.file("two.tar", &tar(&[("a/x", "3")]));
    let url = archives.url();
    let ran = archives.fetch(&[&url]).await;
    ran.says(0, &["2 extracted", "3 files"]);
    let all = [("one/a/x", "1"), ("one/b", "2"), ("two/a/x", "3")];
    assert_eq!(pairs(&archives.found()), all);
    // What was there before is replaced as a whole, and what is not an archive's stays.
    std::fs::write(archives.path("out/one/old"), "old").unwrap();
    std::fs::write(archives.path("out/other"), "other").unwrap();
    archives.fetch(&[&url]).await.expect(0);
    assert_eq!(
        pairs(&archives.found())[..3],
        [("one/a/x", "1"), ("one/b", "2"), ("other", "other")]
    );
    // A symlink may lead to what nobody wants to lose.
    std::fs::rename(archives.path("out/one"), archives.path("out/kept")).unwrap();
    std::os::unix::fs::symlink("kept", archives.path("out/one")).unwrap();
    let ran = archives.fetch(&[&url]).await;
    ran.says(1, &["out/one cannot be replaced", "symlink"]);
    // Nor is there an archive that is called as its parent.
    archives.file("...tar", &tar(&[("x", "1")]));
    let ran = archives.fetch(&[&url]).await;
    ran.says(1, &["...tar: without its ending"]);
    std::fs::remove_file(archives.path("in/...tar")).unwrap();
    assert_eq!(archives.found().len(), 6);
    // A file that is named goes right into the directory.
    std::fs::remove_dir_all(archives.path("out")).unwrap();
    archives.fetch(&[&format!("{url}two.tar")]).await.expect(0);
    assert_eq!(pairs(&archives.found()), [("a/x", "3")]);
    archives.assert_only(&["in", "out"]);
}

#[tokio::test]
async fn what_is_published_is_reported_even_if_something_else_is_not() {
    let archives = Archives::new();
    archives.file("own.tar", &tar(&[("x", "1")]));
    let shared = archives.path("shared.tar");
    std::fs::write(&shared, tar(&[("in-the-way", "2")])).unwrap();
    std::fs::create_dir_all(archives.path("out/in-the-way/d")).unwrap();
    let url = archives.url();
    let shared = format!("file://{}", shared.display());
    for (flag, code) in [("--extract", 1), ("--optional=shared", 0)] {
        let ran = archives.fetch(&[&url, &shared, flag]).await;
        ran.says(code, &["in-the-way", "1 extracted", "1 failed"]);
    }
}

#[tokio::test]
async fn nothing_is_published_before_all_that_is_required_is_whole() {
    let archives = Archives::new();
    let good = therock("math-libs/BLAS/stage", &[("lib/a.so", "a"), ("lib/same", "s")]);
    archives.with_sum("blas_lib_generic.tar.zst", &good);
    let other = therock("core/stage", &[("bin/run", "r"), ("lib/same", "s")]);
    archives.with_sum("core_run_generic.tar.zst", &other);
    let cut = &therock("fft/stage", &[("lib/f.so", "f")])[..60];
    archives.file("fft_lib_generic.tar.zst", cut);
    let url = archives.url();
    let ran = archives.fetch(&[&url, "--flatten"]).await;
    ran.says(1, &["fft_lib_generic.tar.zst"]);
    archives.assert_only(&["in"]);
    // Bytes that can be unpacked, but are others than its checksum says.
    archives.file(
        "fft_lib_generic.tar.zst",
        &therock("fft/stage", &[("lib/f.so", "g")]),
    );
    let sum = format!("{}\n", sha256(b"others"));
    archives.file("fft_lib_generic.tar.zst.sha256sum", sum.as_bytes());
    for flags in [&["--flatten"][..], &[], &["--flatten", "--optional=fft"]] {
        let mut args = vec![&*url];
        args.extend(flags);
        let ran = archives.fetch(&args).await;
        let is_optional = flags.len() > 1;
        ran.says(
            i32::from(!is_optional),
            &["fft_lib_generic.tar.zst", &sha256(b"others")],
        );
        if is_optional {
            let found = archives.found();
            assert_eq!(
                pairs(&found),
                [("bin/run", "r"), ("lib/a.so", "a"), ("lib/same", "s")]
            );
        } else {
            assert_eq!(archives.found(), []);
        }
    }
}

#[tokio::test]
async fn files_that_differ_in_two_archives_are_not_chosen_by_chance() {
    let archives = Archives::new();
    archives.file(
        "a_lib_generic.tar.zst",
        &therock("a/stage", &[("lib/x", "from a")]),
    );
    archives.file(
        "b_lib_generic.tar.zst",
        &therock("b/stage", &[("lib/x", "from b")]),
    );
    let url = archives.url();
    let ran = archives.fetch(&[&url, "--flatten"]).await;
    ran.says(
        1,
        &[
            "lib/x",
            "a_lib_generic.tar.zst",
            "b_lib_generic.tar.zst",
            "--on-conflict=last",
        ],
    );
    archives.assert_only(&["in"]);
    archives
        .fetch(&[&url, "--flatten", "--on-conflict=last"])
        .await
        .expect(0);
    assert_eq!(pairs(&archives.found()), [("lib/x", "from b")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_leaves_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/a.tar", listener.local_addr().unwrap());
    let bytes = tar(&[("x", "1"), ("y", "2")]);
    tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((mut connection, _)) = listener.accept().await {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", bytes.len());
            connection.write_all(head.as_bytes()).await.unwrap();
            connection.write_all(&bytes[..600]).await.unwrap();
            // And no more.
            open.push(connection);
        }
    });
    for (flag, signal) in [("--extract", Signal::INT), ("--no-extract", Signal::TERM)] {
        let archives = Archives::new();
        let mut command = outhaul();
        command.args(["fetch", "archive", &url, flag, "--checksum=none", "--log=debug"]);
        command.arg(format!("--output-dir={}", archives.path("out").display()));
        let mut running = Running::start(command);
        until("it writes", async || is_written(&archives, running.id())).await;
        running.signal(signal);
        assert_eq!(running.end().await, Some(1), "{running}");
        assert!(running.stderr().contains("interrupted"), "{running}");
        assert_eq!(archives.found(), []);
        archives.assert_only(if flag == "--extract" {
            &["in"]
        } else {
            &["in", "out"]
        });
    }
}

#[tokio::test]
async fn archives_that_do_not_fit_on_the_disk_leave_what_was_there() {
    let archives = Archives::new();
    let Some(disk) = SmallDisk::mount(archives.path("out").to_str().unwrap()).await else {
        return;
    };
    let url = archives.url();
    archives.file("a.tar.zst", &therock("stage", &[("x", "old"), ("y", "kept")]));
    archives.fetch(&[&url, "--flatten"]).await.expect(0);
    let before = archives.found();
    assert_eq!(pairs(&before), [("x", "old"), ("y", "kept")]);
    let large = "large ".repeat(4 << 20);
    archives.file("a.tar.zst", &therock("stage", &[("x", "new"), ("z", &large)]));
    for mode in ["--flatten", "--extract"] {
        let ran = archives.fetch(&[&url, mode]).await.expect(1);
        assert!(ran.err.to_lowercase().contains("no space left"), "{ran}");
        assert_eq!(archives.found(), before, "{mode}: {ran}");
    }
    // The space of what was written is free again, and what fits is right.
    archives.file("a.tar.zst", &therock("stage", &[("x", "new"), ("z", "small")]));
    archives.fetch(&[&url, "--flatten"]).await.expect(0);
    assert_eq!(
        pairs(&archives.found()),
        [("x", "new"), ("y", "kept"), ("z", "small")]
    );
    drop(disk);
}

/// Whether something is put beside the output directory, or a file in it has no name yet.
fn is_written(archives: &Archives, pid: u32) -> bool {
    let beside = std::fs::read_dir(archives.dir.path()).into_iter().flatten();
    let is_beside = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.is_ok_and(|entry| entry.file_name() != "in" && entry.file_name() != "out")
    };
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten();
    let mut open = open.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    let out = archives.path("out");
    beside.into_iter().any(is_beside) || open.any(|path| path.parent() == Some(&out))
}

/// nginx with a directory, and with further settings of its server.
pub fn nginx(dir: &Path, settings: &str) -> (Running, String) {
    let store = dir.join("nginx");
    std::fs::create_dir_all(&store).unwrap();
    let _ = std::os::unix::fs::symlink(dir.join("in"), store.join("root"));
    let (running, address) = Running::listening("nginx", |address| {
        let config = store.join("nginx.conf");
        let text = include_str!("../../scripts/nginx.conf")
            .replace("ADDRESS;", &format!("{address}; {settings}"))
            .replace("DIR", &store.display().to_string());
        std::fs::write(&config, text).unwrap();
        let mut command = clean(Command::new(peers::program("nginx")));
        command.arg("-p").arg(&store).arg("-c").arg(config);
        command
    });
    (running, format!("http://{address}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_comes_from_an_http_server() {
    if !peers::are_there("an_archive_comes_from_an_http_server", &["nginx"]) {
        return;
    }
    let archives = Archives::new();
    let big = "0123456789".repeat(200_000);
    archives.with_sum("a:b+c.tar.zst", &zst(&tar(&[("big", &big)])));
    let (_nginx, server) = nginx(archives.dir.path(), "");
    let url = format!("{server}/a:b%2Bc.tar.zst");
    let ran = archives
        .fetch(&[&url, "--checksum=require", "--json"])
        .await
        .expect(0);
    assert_eq!(pairs(&archives.found()), [("big", &*big)]);
    assert_eq!(ran.json()[0]["name"], "a:b+c.tar.zst");
    archives.fetch(&[&url, "--no-extract"]).await.expect(0);
    let gone = format!("{server}/gone.tar.zst");
    archives.fetch(&[&gone]).await.says(3, &[&gone, "404"]);
    archives
        .fetch(&[&gone, "--checksum=require"])
        .await
        .says(1, &["gone.tar.zst.sha256sum"]);
}

/// Python's own server of a directory.
fn python(dir: &Path) -> (Running, String) {
    let (running, address) = Running::listening("python3 -m http.server", |address| {
        let mut command = clean(Command::new("python3"));
        let port = address.port().to_string();
        command.args(["-m", "http.server", &port, "--bind", "127.0.0.1", "--directory"]);
        command.arg(dir);
        command
    });
    (running, format!("http://{address}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_of_a_directory_come_from_an_http_server_that_shows_it() {
    let test = "archives_of_a_directory_come_from_an_http_server_that_shows_it";
    if !peers::are_there(test, &["nginx"]) {
        return;
    }
    let archives = Archives::new();
    let long = format!("{}.tar", "long-".repeat(30));
    for (name, text) in [
        ("a&b #1%41?;c.tar", "one"),
        ("gfx942:xnack+.tar", "two"),
        (&long, "three"),
    ] {
        archives.with_sum(name, &tar(&[("x", text)]));
    }
    archives.file("notes.html", b"<a href=\"none.tar\">");
    for directory in ["below", "empty"] {
        std::fs::create_dir(archives.path("in").join(directory)).unwrap();
    }
    archives.file("below/deep.tar", &tar(&[("x", "deep")]));
    archives.file("empty/notes.txt", b"n");
    let serve = |settings: &str| nginx(archives.dir.path(), settings);
    let servers = [
        serve("autoindex on;"),
        serve("autoindex on; autoindex_format json;"),
        python(&archives.path("in")),
    ];
    for (_, server) in &servers {
        let url = format!("{server}/");
        let ran = archives
            .fetch(&[&url, "--checksum=require", "--json"])
            .await
            .expect(0);
        assert_eq!(ran.json().len(), 3, "{ran}");
        let found = archives.found();
        let texts: Vec<_> = found.iter().map(|(_, text)| &**text).collect();
        assert_eq!(texts, ["one", "two", "three"], "{server} {found:?}");
        std::fs::remove_dir_all(archives.path("out")).unwrap();
        let args = [&url, "--include=^gfx", "--no-extract"];
        archives.fetch(&args).await.expect(0);
        assert_eq!(archives.found()[0].0, "gfx942:xnack+.tar");
        std::fs::remove_dir_all(archives.path("out")).unwrap();
        archives
            .fetch(&[&format!("{server}/empty/")])
            .await
            .says(3, &["/empty/", "no archives"]);
        archives
            .fetch(&[&format!("{server}/gone/")])
            .await
            .says(3, &["/gone/", "404", "name each file"]);
    }
    // One that shows none.
    let (_nginx, server) = serve("");
    archives
        .fetch(&[&format!("{server}/")])
        .await
        .says(1, &["403", "name each file"]);
}

#[cfg(feature = "object-stores")]
#[tokio::test(flavor = "multi_thread")]
async fn archives_come_from_buckets() {
    let test = "archives_come_from_buckets";
    for kind in StoreKind::ALL {
        if !kind.is_there(test) {
            continue;
        }
        let store = Store::start(kind);
        let lib = therock("blas/stage", &[("lib/blas.so", "blas")]);
        let run = therock("core/stage", &[("bin/run", "run")]);
        for (name, bytes) in [
            ("runs/1-linux/blas_lib_gfx942:xnack+.tar.zst", &*lib),
            ("runs/1-linux/core_run_generic.tar.zst", &run),
            ("runs/1-linux/logs/blas_lib_generic.tar.zst", b"not right below"),
            // Another run's, whose name begins so.
            ("runs/1-linux-other/blas_lib_generic.tar.zst", b"other"),
            ("runs/1-linux/index.html", b"<html>"),
        ] {
            store.put(name, bytes);
        }
        let sum = format!("{}\n", sha256(&lib));
        store.put(
            "runs/1-linux/blas_lib_gfx942:xnack+.tar.zst.sha256sum",
            sum.as_bytes(),
        );
        let archives = Archives::new();
        let fetch = async |url: &str, args: &[&str]| {
            let mut command = outhaul();
            command.args(["fetch", "archive", url]).args(args);
            command.envs(store.variables());
            command.arg(format!("--output-dir={}", archives.path("out").display()));
            finish(command).await
        };
        let url = store.url("runs/1-linux/", "");
        let args = ["--flatten", "--include=(lib|run)_"];
        fetch(&url, &args).await.expect(0);
        let both = [("bin/run", "run"), ("lib/blas.so", "blas")];
        assert_eq!(pairs(&archives.found()), both, "{kind:?}");
        let ran = fetch(&url, &["--checksum=require", "--no-extract"]).await;
        ran.says(1, &["core_run_generic.tar.zst.sha256sum", "unfinished"]);
        // One object, with its checksum beside it.
        std::fs::remove_dir_all(archives.path("out")).unwrap();
        let url = store.url("runs/1-linux/blas_lib_gfx942:xnack+.tar.zst", "");
        let args = ["--checksum=require", "--flatten", "--json"];
        let ran = fetch(&url, &args).await.expect(0);
        assert_eq!(pairs(&archives.found()), both[1..]);
        assert_eq!(ran.json()[0]["checksum"], format!("sha256:{}", sha256(&lib)));
        let gone = store.url("runs/1-linux/gone.tar.zst", "");
        fetch(&gone, &[]).await.says(3, &["gone.tar.zst"]);
        let empty = store.url("runs/2/", "");
        fetch(&empty, &[]).await.says(3, &["runs/2", "no archives"]);
    }
}
