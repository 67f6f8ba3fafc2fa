//! Bazel's disk cache, alone and before a remote cache.

use std::path::{Path, PathBuf};

use bazel_remote_apis::build::bazel::remote::execution::v2::ActionResult;
use outhaul::digest::{Digest, DigestFunction};
use outhaul_testkit::eventually;
use prost::Message as _;

use crate::harness::{Bazel, Cache, Daemon, Outhaul, Scratch, Stage, Version};

for_each_bazel!(embedded:
    actions_and_blobs_are_fetched_from_a_disk_cache,
    each_cache_gives_what_it_has_and_is_named,
    bazels_collector_costs_nothing_that_the_remote_cache_has,
);

/// Names of the files below `DIR/KIND/HH/`.
fn entries(disk: &Path, kind: &str) -> Vec<String> {
    let below = |dir: PathBuf| std::fs::read_dir(dir).into_iter().flatten().flatten();
    let directories = below(disk.join(kind));
    let files = directories.flat_map(|directory| below(directory.path()));
    files
        .map(|file| file.file_name().into_string().unwrap())
        .collect()
}

fn entry(disk: &Path, kind: &str, hash: &str) -> PathBuf {
    disk.join(kind).join(&hash[..2]).join(hash)
}

fn actions_and_blobs_are_fetched_from_a_disk_cache(stage: &Stage) {
    let cache = stage.cache();
    let dir = Scratch::new("disk");
    let disk = dir.join("disk cache");
    let bazel = Bazel::new(stage.version, "");
    let flag = format!("--disk_cache={}", disk.display());
    bazel.build(&[&flag, "//:a", "//gen:top", "//rules:nested"]).ok();
    let outhaul = Outhaul::new();
    // Before the remote cache, which has nothing.
    let stores = [
        vec![format!("--disk-cache={}", disk.display())],
        vec![
            format!("--remote-cache={}", cache.url()),
            format!(
                "--remote-cache=file://{}",
                disk.display().to_string().replace(' ', "%20")
            ),
        ],
    ];
    let (mut files, mut trees) = (0, 0);
    for (number, action) in entries(&disk, "ac").iter().enumerate() {
        let result = ActionResult::decode(&*std::fs::read(entry(&disk, "ac", action)).unwrap()).unwrap();
        let out = dir.join(format!("out{number}"));
        let mut args = vec![action.clone(), format!("--output-dir={}", out.display())];
        args.extend(stores[number % 2].iter().cloned());
        let args: Vec<String> = std::iter::once("action".to_owned()).chain(args).collect();
        fetch(&outhaul, dir.path(), &args);
        for file in &result.output_files {
            let bytes = std::fs::read(out.join(&file.path)).unwrap();
            let digest = Digest::of(DigestFunction::Sha256, &bytes);
            assert_eq!(
                file.digest.as_ref().unwrap().hash,
                digest.hash_hex(),
                "{}",
                file.path
            );
            files += 1;
        }
        for tree in &result.output_directories {
            assert!(out.join(&tree.path).is_dir(), "{}", tree.path);
            trees += 1;
        }
    }
    assert!(files >= 3 && trees >= 1, "{files} files, {trees} trees");
    let blob = Digest::of(DigestFunction::Sha256, b"this is a\n").hash_hex();
    let args = ["blob", &blob, "--output=blob", &stores[0][0]].map(str::to_owned);
    fetch(&outhaul, dir.path(), &args);
    assert_eq!(std::fs::read_to_string(dir.join("blob")).unwrap(), "this is a\n");
    let absent = "0".repeat(64);
    let args = ["blob", &absent, "--output=none", &stores[0][0]];
    let ran = run_fetch(&outhaul, dir.path(), &args).expect(3);
    assert!(
        ran.err.contains(&absent) && ran.err.contains("disk cache"),
        "{ran}"
    );
}

/// `outhaul fetch` has no state directory.
fn run_fetch<S: AsRef<std::ffi::OsStr>>(outhaul: &Outhaul, cwd: &Path, args: &[S]) -> outhaul_testkit::Ran {
    outhaul.stateless(cwd, "fetch", args)
}

fn fetch(outhaul: &Outhaul, cwd: &Path, args: &[String]) {
    run_fetch(outhaul, cwd, args).ok();
}

/// Outputs of these tests, and the targets that make them.
const OUTPUTS: [&str; 3] = [
    "bazel-bin/a.txt",
    "bazel-bin/gen/middle.txt",
    "bazel-bin/gen/top.txt",
];
const TARGETS: [&str; 3] = ["//:a", "//gen:middle", "//gen:top"];

/// A daemon that reads what builds name, and the outputs of one, downloaded.
fn built(stage: &Stage, cache: &Cache, disk: &Path) -> (Daemon, Bazel) {
    let daemon = Daemon::with(&[
        "--remote-cache=from-build",
        &format!("--allow-remote-cache={},file://{}", cache.url(), disk.display()),
    ]);
    let bazel = stage.bazel(cache);
    let flag = format!("--disk_cache={}", disk.display());
    bazel.build(&[&[flag.as_str()], &TARGETS[..]].concat()).ok();
    bazel.clean();
    bazel
        .build(&[&[flag.as_str(), &daemon.bes()], &TARGETS[..]].concat())
        .ok();
    daemon.settled();
    (daemon, bazel)
}

/// The digest of an output as the record has it.
fn digest(daemon: &Daemon, bazel: &Bazel, output: &str) -> Digest {
    let stat = daemon.outhaul().stat(bazel.workspace(), output);
    let text = stat["digest"].as_str().unwrap().replace(':', "/");
    format!("{text}/{}", stat["size"]).parse().unwrap()
}

fn each_cache_gives_what_it_has_and_is_named(stage: &Stage) {
    let cache = stage.cache();
    let dir = Scratch::new("disk");
    let disk = dir.join("disk");
    let (mut daemon, bazel) = built(stage, &cache, &disk);
    let in_disk = format!("disk cache {}", disk.display());
    let [both, remote, gone] = OUTPUTS;
    for output in OUTPUTS {
        let stat = daemon.outhaul().stat(bazel.workspace(), output);
        assert_eq!(stat["store"], in_disk.as_str(), "{stat:#}");
    }
    let status = daemon.settled();
    assert_eq!(status["stores"][&in_disk], 3, "{status:#}");
    let named = format!("file://{} {}", disk.display(), cache.url());
    assert_eq!(status["remote_cache"], named.as_str(), "{status:#}");
    assert!(
        daemon.log().contains(&format!("3 from {in_disk}")),
        "{}",
        daemon.log()
    );

    let digests = OUTPUTS.map(|output| digest(&daemon, &bazel, output));
    // The third one is in neither of them, and the first in the disk cache only.
    for digest in &digests[1..] {
        std::fs::remove_file(entry(&disk, "cas", &digest.hash_hex())).unwrap();
    }
    for digest in [&digests[0], &digests[2]] {
        assert!(cache.embedded().store().remove(digest), "{digest}");
    }
    // The chain is found again in the record.
    daemon.restart();
    for (output, store) in [(both, in_disk.as_str()), (remote, cache.url())] {
        bazel.delete(output);
        let got = daemon.outhaul().json(bazel.workspace(), "get", &[output]);
        assert_eq!(got[0]["outcome"], "downloaded", "{got:#?}");
        let why = daemon.outhaul().why(bazel.workspace(), output);
        assert_eq!(why["store"], store, "{why:#}");
    }
    bazel.delete(gone);
    let ran = daemon.outhaul().run(bazel.workspace(), "get", &[gone]).expect(1);
    for store in [in_disk.as_str(), cache.url()] {
        assert!(ran.err.contains(store), "{ran}");
    }
    let stat = daemon.outhaul().stat(bazel.workspace(), gone);
    assert_eq!(stat["state"], "evicted", "{stat:#}");
}

fn bazels_collector_costs_nothing_that_the_remote_cache_has(stage: &Stage) {
    let cache = stage.cache();
    let dir = Scratch::new("disk");
    let disk = dir.join("disk");
    let (daemon, bazel) = built(stage, &cache, &disk);
    let get = || {
        for output in OUTPUTS {
            bazel.delete(output);
        }
        let got = daemon.outhaul().json(bazel.workspace(), "get", &OUTPUTS);
        assert!(got.iter().all(|one| one["outcome"] == "downloaded"), "{got:#?}");
    };
    if stage.version == Version::Seven {
        // Collects as soon as the server is idle.
        let flag = format!("--disk_cache={}", disk.display());
        let collected = || {
            bazel
                .build(&[
                    &flag,
                    "--experimental_disk_cache_gc_max_size=1",
                    "--experimental_disk_cache_gc_idle_delay=0s",
                    "//:a",
                ])
                .ok();
        };
        collected();
        eventually("the disk cache is collected", || {
            get();
            // What is read just then, it leaves: its time has changed.
            entries(&disk, "cas").len() <= OUTPUTS.len()
        });
        collected();
        eventually("the rest is collected", || entries(&disk, "cas").is_empty());
    } else {
        // No collector: as a cron job does it.
        std::fs::remove_dir_all(disk.join("cas")).unwrap();
    }
    get();
    for output in OUTPUTS {
        let stat = daemon.outhaul().stat(bazel.workspace(), output);
        assert_eq!(stat["store"], cache.url(), "{stat:#}");
    }
}
