//! The Bazel module of `dist/bazel`, with Bazel 7 and without a network: modules of Bazel's own come from its package, or
//! are empty.

use std::{fmt::Write as _, path::Path, process::Command};

use outhaul::digest::{Digest, DigestFunction};
use outhaul_testkit::{Ran, Running, clean};

use crate::harness::{Bazel, Scratch, Stage, Version, run};

#[test]
fn builds_run_under_exactly_the_pinned_program() {
    let name = concat!(module_path!(), "::builds_run_under_exactly_the_pinned_program");
    run(name, Version::Seven, "embedded", test);
}

/// Modules that Bazel's own need, and Debian's package does not have.
const EMPTY: &[&str] = &["apple_support", "buildozer", "protobuf", "zlib"];
const WRAPPER: &str = "@outhaul//:wrapper";

/// An archive as `scripts/package` makes them, whose program is the one that is tested. Gives the archive's checksum.
fn pack(dir: &Path, archive: &Path) -> String {
    let files = dir.join("outhaul-0.1.0-here");
    std::fs::create_dir_all(&files).unwrap();
    let text = format!("#!/bin/sh\nexec '{}' \"$@\"\n", env!("CARGO_BIN_EXE_outhaul"));
    std::fs::write(files.join("outhaul"), text).unwrap();
    let pack = r#"chmod 755 "$0/outhaul" && tar -czf "$1" -C "${0%/*}" "${0##*/}""#;
    let mut command = Command::new("sh");
    command.args(["-c", pack]).arg(&files).arg(archive);
    Running::start(command).wait().ok();
    Digest::of(DigestFunction::Sha256, &std::fs::read(archive).unwrap()).hash_hex()
}

/// Makes the workspace one of modules, which pins an archive.
fn pin(bazel: &Bazel, dir: &Path, archive: &Path, sum: &str) {
    let module = format!(
        r#"module(name = "example")
bazel_dep(name = "outhaul")
outhaul = use_extension("@outhaul//:outhaul.bzl", "outhaul")
outhaul.binary(
    platform = "linux-{}",
    sha256 = "{sum}",
    urls = ["file://{}"],
)
"#,
        std::env::consts::ARCH,
        archive.display()
    );
    bazel.write("MODULE.bazel", &module);
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("dist/bazel");
    let mut rc = format!(
        "common:bazel7 --noenable_workspace --lockfile_mode=off --registry=file://{}/none\n\
         common:bazel7 --override_module=outhaul={}\nbuild --spawn_strategy=local\n",
        dir.display(),
        ours.display()
    );
    for name in EMPTY {
        let empty = dir.join(name);
        std::fs::create_dir_all(&empty).unwrap();
        std::fs::write(empty.join("BUILD"), "").unwrap();
        std::fs::write(empty.join("MODULE.bazel"), format!("module(name = \"{name}\")\n")).unwrap();
        let _ = writeln!(rc, "common:bazel7 --override_module={name}={}", empty.display());
    }
    bazel.write(".bazelrc", &rc);
}

/// Runs a Bazel command by Bazel itself, or by the workspace's `tools/bazel` as Bazelisk does.
fn ran(bazel: &Bazel, dir: &Path, by_wrapper: bool, command: &str, args: &[&str]) -> Ran {
    let line = bazel.command_line(command);
    let program = match by_wrapper {
        true => bazel.path("tools/bazel"),
        false => line[0].clone().into(),
    };
    let mut process = clean(Command::new(program));
    process
        .args(&line[1..])
        .args(args)
        .current_dir(bazel.workspace())
        .env("BAZEL_REAL", &line[0])
        .env("HOME", dir)
        .env("XDG_CACHE_HOME", dir.join("cache"))
        .env("OUTHAUL_STATE_DIR", dir.join("state"));
    Running::start(process).wait()
}

fn test(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let scratch = Scratch::new("module");
    let dir = scratch.path();
    let archive = dir.join("outhaul.tar.gz");
    let sum = pack(dir, &archive);

    pin(&bazel, dir, &archive, &"0".repeat(64));
    let refused = ran(&bazel, dir, false, "run", &[WRAPPER]);
    assert!(refused.code != Some(0) && refused.err.contains(&sum), "{refused}");
    assert!(!bazel.has("tools/bazel"), "{refused}");

    pin(&bazel, dir, &archive, &sum);
    let written = ran(&bazel, dir, false, "run", &[WRAPPER]).ok();
    assert!(written.out().contains("commit them"), "{written}");
    let remote = format!("--remote_cache={}", cache.url());
    let flags = [remote.as_str(), "--remote_download_minimal", "//:a"];
    ran(&bazel, dir, false, "build", &flags).ok();
    bazel.clean();
    let built = ran(&bazel, dir, true, "build", &flags).ok();
    assert!(built.err.contains("outhaul: 1 downloaded"), "{built}");
    assert_eq!(bazel.text("bazel-bin/a.txt"), "this is a\n", "{built}");

    // Another program in its place is not run, and the next `bazel run` puts it right.
    let [installed] = std::fs::read_dir(dir.join("cache/outhaul"))
        .unwrap()
        .map(|entry| entry.unwrap().path().join("outhaul"))
        .collect::<Vec<_>>()
        .try_into()
        .unwrap();
    std::fs::remove_file(&installed).unwrap();
    let alone = ran(&bazel, dir, true, "build", &flags).ok();
    assert!(
        alone.err.contains("running Bazel without the pinned Outhaul") && !alone.err.contains("outhaul: 0"),
        "{alone}"
    );
    ran(&bazel, dir, true, "run", &[WRAPPER]).ok();
    let built = ran(&bazel, dir, true, "build", &flags).ok();
    assert!(built.err.contains("outhaul: 0 downloaded"), "{built}");
}
