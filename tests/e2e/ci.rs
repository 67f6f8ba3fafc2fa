//! The scripts that `docs/ci.md` offers, as they are.

use std::{
    collections::BTreeSet,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use outhaul_testkit::{Ran, Running, clean};

use crate::harness::{Bazel, Expected, Presence, Scratch, Stage, Upstream};

for_each_bazel!(real: the_recipes_build_wait_stage_export_and_stage_elsewhere);

/// Runs a script of `dist/ci`, with the program on its path.
fn script(name: &str, cwd: &Path, env: &[(&str, &str)], args: &[&str]) -> Ran {
    let program = Path::new(env!("CARGO_BIN_EXE_outhaul")).parent().unwrap();
    let path = std::env::var("PATH").unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("dist/ci").join(name);
    let mut command = clean(Command::new(script));
    command
        .args(args)
        .current_dir(cwd)
        .env("PATH", format!("{}:{path}", program.display()))
        .envs(env.iter().copied());
    Running::start(command).wait()
}

/// A command that is `bazel build` in this Bazel's own way.
fn bazel_command(bazel: &Bazel, dir: &Scratch) -> PathBuf {
    let line: Vec<String> = bazel
        .command_line("build")
        .iter()
        .map(|word| format!("'{word}'"))
        .collect();
    let path = dir.join("bazel");
    let text = format!(
        "#!/bin/sh\n[ \"$1\" = build ] || exit 99\nshift\nexec {} \"$@\"\n",
        line.join(" ")
    );
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// The files right in a directory.
fn names(dir: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    entries
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_type().unwrap().is_file())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect()
}

fn the_recipes_build_wait_stage_export_and_stage_elsewhere(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let expected = Expected::of(&bazel, &["//..."]);
    let presence = Presence::default();
    let upstream = Upstream::watched(presence.watch());
    let dir = Scratch::new("ci");
    let artifacts = dir.join("artifacts");
    let wrapper = bazel_command(&bazel, &dir);
    let backend = upstream.flag().replace("--bes-backend=", "");
    let env = [
        ("OUTHAUL_REMOTE_CACHE", cache.url()),
        ("OUTHAUL_BES_BACKEND", backend.as_str()),
        ("ARTIFACTS", artifacts.to_str().unwrap()),
        ("ARTIFACT_REGEX", r".*/gen/(one|top)\.txt"),
        ("BAZEL", wrapper.to_str().unwrap()),
    ];
    let run = script("build", bazel.workspace(), &env, &["//..."]).ok();
    assert_eq!(expected.missing(&bazel), Vec::<String>::new(), "{run}");
    let staged = |path: &str| {
        let configuration = bazel.path("bazel-bin").canonicalize().unwrap();
        let below = configuration.strip_prefix(bazel.exec_root()).unwrap().to_owned();
        std::fs::read_to_string(artifacts.join(below).join(path))
    };
    assert_eq!(staged("gen/one.txt").unwrap(), "one\n", "{run}");
    assert_eq!(staged("gen/top.txt").unwrap(), "middle\ntop\n", "{run}");
    staged("gen/from_source.txt").expect_err("nobody asked for it");
    // Upstream has heard everything before the script ended, and nothing too early.
    let [id] = upstream.invocations().try_into().expect("one stream");
    assert!(
        upstream.stream(&id).last().is_some_and(|seen| seen.is_end()),
        "{run}"
    );
    assert!(
        !run.err.contains("not everything has got to"),
        "nothing is left behind: {run}"
    );
    let looked = presence.looked();
    assert!(
        looked.files > 20 && looked.wrong_for(stage.version).is_empty(),
        "{looked:#?}"
    );

    // A machine that has nothing but the file and the cache.
    let exported = dir.join(format!("artifacts.d/{id}.outhaul"));
    let elsewhere = Scratch::new("ci-elsewhere");
    let to = elsewhere.join("dist");
    let package = |patterns: &[&str]| {
        let args = [&[exported.to_str().unwrap(), to.to_str().unwrap()], patterns].concat();
        script("package", elsewhere.path(), &[], &args)
    };
    let run = package(&[r".*/gen/no_such\.txt"]);
    assert!(
        run.code != Some(0) && run.err.contains("no_such"),
        "a pattern that matches nothing is an error: {run}"
    );
    let run = package(&[r".*/gen/many\.txt", r".*/gen/tool\.sh"]).ok();
    assert_eq!(
        names(&to),
        BTreeSet::from(["many.txt".to_owned(), "tool.sh".to_owned()]),
        "{run}"
    );
    assert_eq!(
        std::fs::read_to_string(to.join("many.txt")).unwrap(),
        "many: many.txt\n"
    );

    // A build that fails does so with Bazel's own code, and stages nothing.
    let run = script("build", bazel.workspace(), &env, &["//gen:broken"]);
    assert_eq!(run.code, Some(1), "{run}");
    assert!(run.err.contains("broken on purpose"), "{run}");
}
