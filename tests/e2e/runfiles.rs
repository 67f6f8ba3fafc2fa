//! What programs need at run time, which no event names.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
};

use outhaul::digest::{Digest, DigestFunction};
use outhaul_testkit::{Running, clean, eventually, peers};
use rustix::process::Signal;

use crate::harness::{Bazel, Daemon, Entry, Outhaul, Scratch, Stage, Tree, Version, executed};
use crate::staging::is_staged;

for_each_bazel!(real:
    a_program_is_brought_with_its_runfiles_as_bazel_itself_would,
    what_no_digest_is_known_of_is_counted,
    output_groups_that_leave_the_default_ones_out_bring_no_runfiles,
    what_the_action_cache_holds_is_known_and_can_be_downloaded,
    what_an_interrupted_build_left_is_not_believed,
    a_recorded_program_runs_without_bazel_and_then_without_the_cache,
    a_compiler_and_a_debugger_work_on_a_build_that_is_not_on_disk,
);

for_each_bazel!(embedded: what_a_compact_log_names_is_known_and_can_be_downloaded);

/// What a source of the program has.
const SOURCE: &str = "a source\n";
/// Version 4 makes no links to trees, and does not say what it has in the cache.
const PROGRAM: &str = "//runfiles:linked";

fn path_of(target: &str) -> String {
    let name = target.rsplit(':').next().unwrap();
    format!("bazel-bin/runfiles/{name}_/{name}.sh")
}

/// What a program prints, if it runs.
fn printed(bazel: &Bazel, target: &str) -> Result<String, String> {
    let run = Command::new(bazel.path(&path_of(target))).output();
    let run = run.map_err(|e| e.to_string())?;
    if run.status.success() && run.stderr.is_empty() {
        Ok(String::from_utf8(run.stdout).unwrap())
    } else {
        Err(String::from_utf8_lossy(&run.stderr).into_owned())
    }
}

/// Everything that Bazel's own top-level mode brings, whatever the output base is called: not the manifests, and where
/// links lead to below it.
fn brought(bazel: &Bazel) -> Tree {
    let is_manifest = |path: &str| path.ends_with("MANIFEST") || path.ends_with(".runfiles_manifest");
    let mut tree = bazel.bin().only(|path| !is_manifest(path));
    for entry in tree.0.values_mut() {
        if let Entry::Link { target, .. } = entry
            && let Some((_, below)) = target.split_once("/execroot/")
        {
            *target = below.to_owned();
        }
    }
    tree
}

#[track_caller]
fn assert_like(reference: &Tree, bazel: &Bazel, why: &dyn std::fmt::Display) {
    let differences = reference.differences(&brought(bazel));
    assert!(differences.is_empty(), "{}\n{why}", differences.join("\n"));
}

fn a_program_is_brought_with_its_runfiles_as_bazel_itself_would(stage: &Stage) {
    if stage.version == Version::Four {
        return;
    }
    let cache = stage.cache();
    let reference = stage.bazel(&cache);
    for _ in 0..2 {
        // The second time, everything comes from the cache.
        reference.clean();
        reference.build(&["--remote_download_toplevel", PROGRAM]).ok();
    }
    let expected = brought(&reference);
    let says = printed(&reference, PROGRAM).unwrap();
    assert!(
        says.contains("with space.txt: sub") && says.contains("elsewhere/app.txt: data"),
        "{says}"
    );

    let mut daemon = Daemon::start(&cache);
    let bazel = stage.bazel(&cache);
    let build = |daemon: &Daemon| bazel.build(&[&daemon.bes(), PROGRAM]).ok();
    let run = build(&daemon);
    assert_eq!(executed(&run), 0, "{run}");
    assert_like(&expected, &bazel, &daemon.log());
    assert_eq!(printed(&bazel, PROGRAM).as_ref(), Ok(&says), "{}", daemon.log());
    let status = daemon.settled();
    assert!(status["downloaded"].as_u64() >= Some(12), "{status:#}");

    // Nothing is executed for it, nothing is missing, and nothing is asked for twice.
    let run = build(&daemon);
    assert_eq!(executed(&run), 0, "{run}");
    assert_like(&expected, &bazel, &daemon.log());
    let status = daemon.settled();
    assert_eq!(status["downloaded"], 0, "{status:#}");

    // A file of a tree, one behind a link, and an intermediate one are gone.
    for path in [
        "runfiles/linked.tree/top.txt",
        "rules/link.real.txt",
        "gen/middle.txt",
    ] {
        bazel.delete(&format!("bazel-bin/{path}"));
    }
    let run = build(&daemon);
    assert_eq!(executed(&run), 0, "{run}");
    assert_eq!(printed(&bazel, PROGRAM).as_ref(), Ok(&says), "{}", daemon.log());
    daemon.settled();

    // What is in the runfiles changes, and the daemon was another one before.
    daemon.restart();
    bazel.write("runfiles/source.txt", "another source\n");
    bazel.write(
        "gen/BUILD",
        &bazel.text("gen/BUILD").replace("echo middle", "echo changed"),
    );
    let run = build(&daemon);
    let changed = says.replace("middle.txt: middle", "middle.txt: changed");
    let changed = changed.replace("source.txt: a source", "source.txt: another source");
    assert_ne!(changed, says);
    assert_eq!(
        printed(&bazel, PROGRAM).as_ref(),
        Ok(&changed),
        "{run}\n{}",
        daemon.log()
    );

    // With everything gone, and by the wrapper.
    bazel.clean();
    let outhaul = Outhaul::new();
    let mut line = vec!["--".to_owned()];
    line.extend(bazel.command_line("build"));
    line.extend([format!("--remote_cache={}", cache.url()), PROGRAM.to_owned()]);
    let run = outhaul.run(bazel.workspace(), "run", &line).ok();
    assert_eq!(printed(&bazel, PROGRAM).as_ref(), Ok(&changed), "{run}");
    assert!(run.err.contains(" 0 failed"), "{run}");
}

fn what_no_digest_is_known_of_is_counted(stage: &Stage) {
    let target = "//runfiles:app";
    let cache = stage.cache();
    let daemon = Daemon::with(&[&format!("--remote-cache={}", cache.url()), "--no-action-cache"]);
    let bazel = stage.bazel(&cache);
    bazel.build(&[target]).ok();
    bazel.clean();
    let run = bazel.build(&[&daemon.bes(), target]).ok();
    assert!(bazel.has(&path_of(target)), "{run}");
    assert!(!bazel.has("bazel-bin/runfiles/app.data.txt"));
    let status = daemon.outhaul().status();
    assert!(status["failed"].as_u64() >= Some(3), "{status:#}");
    let log = daemon.log();
    assert!(log.contains("app.data.txt, a runfile of "), "{log}");
}

fn output_groups_that_leave_the_default_ones_out_bring_no_runfiles(stage: &Stage) {
    let target = "//runfiles:app";
    let cache = stage.cache();
    let daemon = Daemon::start(&cache);
    let bazel = stage.bazel(&cache);
    bazel.build(&[target]).ok();
    bazel.clean();
    // The manifest of this one stays there for the next.
    bazel.build(&[target]).ok();
    bazel
        .build(&[&daemon.bes(), "--output_groups=default", target])
        .ok();
    daemon.settled();
    assert!(!bazel.has("bazel-bin/runfiles/app.data.txt"));
}

/// What `bazel dump --action_cache` says: path, digest and size of each output, and of each file of a tree.
pub(crate) fn dumped(bazel: &Bazel) -> BTreeSet<String> {
    let run = bazel.run("dump", &["--action_cache"]).ok();
    let mut named = BTreeSet::new();
    for line in run
        .out()
        .lines()
        .filter_map(|line| line.strip_prefix("      bazel-out/"))
    {
        let Some((path, value)) = line.split_once(" = ") else {
            continue;
        };
        let mut take = |path: &str, value: &str| {
            let field = |name: &str| {
                let (_, rest) = value.split_once(name)?;
                rest.split([',', '}']).next().map(str::to_lowercase)
            };
            if let (Some(digest), Some(size)) = (field("digest=0x"), field("size=")) {
                named.insert(format!("bazel-out/{path} {digest} {size}"));
            }
        };
        match value.split_once("childValues={") {
            None => take(path, value),
            Some((_, children)) => {
                // `a=Value{…}, b=Value{…}}, archived…`
                for child in children
                    .split("}, ")
                    .take_while(|child| !child.starts_with("archived"))
                {
                    if let Some((below, value)) = child.split_once('=') {
                        take(&format!("{path}/{below}"), value);
                    }
                }
            }
        }
    }
    named
}

pub(crate) fn what_the_action_cache_holds_is_known_and_can_be_downloaded(stage: &Stage) {
    if stage.version == Version::Four {
        return;
    }
    let asked = [PROGRAM, "//gen:top", "//rules:flat", "//rules:link"];
    let cache = stage.cache();
    let daemon = Daemon::start(&cache);
    let bazel = stage.bazel(&cache);
    bazel.build(&asked).ok();
    bazel.clean();
    bazel.build(&[&[daemon.bes().as_str()], &asked[..]].concat()).ok();
    daemon.settled();
    let dumped = dumped(&bazel);
    assert!(dumped.len() > 15, "{dumped:?}");
    let stated = |path: &str| {
        let stat = daemon.outhaul().stat(bazel.workspace(), path);
        let digest = stat["digest"].as_str().unwrap_or_default().replace("sha256:", "");
        format!("{path} {digest} {}", stat["size"])
    };
    for line in &dumped {
        // A path may have spaces; digests and sizes have none.
        let path = line.rsplitn(3, ' ').last().unwrap();
        assert_eq!(stated(path), *line);
    }
    read_through_a_mount(&daemon, &bazel, &dumped);
    // One that nobody has asked for.
    let middle = "bazel-bin/gen/middle.txt";
    bazel.delete(middle);
    let why = daemon.outhaul().why(bazel.workspace(), middle);
    assert_eq!(why["event"], "action_cache", "{why:#}");
    let got = daemon.outhaul().json(bazel.workspace(), "get", &[middle]);
    assert_eq!(got[0]["outcome"], "downloaded", "{got:#?}");
    assert_eq!(bazel.text(middle), "middle\n");

    // A file that lies there and is another one is newer than what the action cache says.
    let real = bazel.path(middle).canonicalize().unwrap();
    bazel.delete(middle);
    std::fs::write(&real, "by hand\n").unwrap();
    let run = daemon.outhaul().run(bazel.workspace(), "get", &[middle]);
    assert!(run.err.contains("left unchanged"), "{run}");
    assert_eq!(bazel.text(middle), "by hand\n");
}

/// A mount of a daemon's builds, at a place of its own. None, which is printed, where FUSE cannot be used.
fn mounted(test: &str, daemon: &Daemon, bazel: &Bazel) -> Option<(Scratch, Running)> {
    let at = Scratch::new("mount");
    let place = at.join("builds");
    let args = [place.to_str().unwrap(), "--no-prefetch"];
    let mut mount = daemon.outhaul().start(bazel.workspace(), "mount", &args);
    eventually("it is mounted", || {
        !mount.is_running() || mount.stderr().contains("mounted on")
    });
    if !mount.is_running() {
        peers::skip(test, &["fuse"], &mount.stderr());
        return None;
    }
    Some((at, mount))
}

/// Demands that a mount has all these files, as lines of path, digest and size, with their bytes.
fn read_through_a_mount(daemon: &Daemon, bazel: &Bazel, dumped: &BTreeSet<String>) {
    let Some((at, mount)) = mounted("runfiles::read_through_a_mount", daemon, bazel) else {
        return;
    };
    let id = daemon.outhaul().status()["invocation_id"]
        .as_str()
        .unwrap()
        .to_owned();
    let build = at.join("builds/by-invocation").join(id);
    for line in dumped {
        let mut words = line.rsplitn(3, ' ');
        let (_, digest, path) = (words.next(), words.next().unwrap(), words.next().unwrap());
        let bytes = std::fs::read(build.join(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
        assert_eq!(
            Digest::of(DigestFunction::Sha256, &bytes).hash_hex(),
            digest,
            "{path}"
        );
    }
    mount.signal(Signal::TERM);
    mount.wait().ok();
}

/// A header, and a program with debug information.
fn a_compiler_and_a_debugger_work_on_a_build_that_is_not_on_disk(stage: &Stage) {
    const NAME: &str = "runfiles::a_compiler_and_a_debugger_work";
    let has = |program: &str| clean(Command::new(program)).arg("--version").output().is_ok();
    if stage.version == Version::Four {
        return;
    }
    if !has("cc") || !has("gdb") {
        peers::skip(NAME, &[], "there is no cc or no gdb");
        return;
    }
    let cache = stage.cache();
    let daemon = Daemon::start(&cache);
    let bazel = stage.bazel(&cache);
    let package = bazel.workspace().join("native");
    std::fs::create_dir(&package).unwrap();
    let write = |name: &str, text: &str| std::fs::write(package.join(name), text).unwrap();
    let build = "genrule(name = \"header\", outs = [\"answer.h\"], cmd = \"echo '#define ANSWER 42' > $@\")\n\
                 genrule(name = \"app\", srcs = [\"built\"], outs = [\"bin/app\"], cmd = \"cp $< $@\", executable = True)\n";
    write("BUILD", build);
    write(
        "first.c",
        "int answer(void) {\n  return 42;\n}\nint main(void) { return answer() - 42; }\n",
    );
    write(
        "second.c",
        "#include \"native/answer.h\"\n_Static_assert(ANSWER == 42, \"\");\n",
    );
    let mut compile = clean(Command::new("cc"));
    compile
        .current_dir(&package)
        .args(["-g", "-o", "built", "first.c"]);
    assert!(compile.status().unwrap().success());
    let asked = ["--remote_download_minimal", "//native:all"];
    bazel.build(&asked).ok();
    bazel.clean();
    bazel.build(&[&[daemon.bes().as_str()], &asked[..]].concat()).ok();
    daemon.settled();
    for path in ["bazel-bin/native/answer.h", "bazel-bin/native/bin/app"] {
        bazel.delete(path);
    }
    let Some((at, mount)) = mounted(NAME, &daemon, &bazel) else {
        return;
    };
    let id = daemon.outhaul().status()["invocation_id"]
        .as_str()
        .unwrap()
        .to_owned();
    let below = bazel.path("bazel-bin/native").canonicalize().unwrap();
    let below = below
        .strip_prefix(bazel.exec_root().canonicalize().unwrap())
        .unwrap()
        .to_owned();
    let native = at.join("builds/by-invocation").join(id).join(below);

    let mut compile = clean(Command::new("cc"));
    compile
        .arg("-fsyntax-only")
        .arg("-I")
        .arg(native.parent().unwrap());
    let compiled = compile.arg(package.join("second.c")).output().unwrap();
    assert!(compiled.status.success(), "{compiled:?}");
    let mut debug = clean(Command::new("gdb"));
    debug.args([
        "-nx",
        "-batch",
        "-ex",
        "break answer",
        "-ex",
        "run",
        "-ex",
        "backtrace",
    ]);
    let debugged = debug.arg(native.join("bin/app")).output().unwrap();
    let said = String::from_utf8_lossy(&debugged.stdout);
    for part in ["#0  answer () at first.c:2", "in main () at first.c:4"] {
        assert!(
            said.contains(part),
            "{said}\n{}",
            String::from_utf8_lossy(&debugged.stderr)
        );
    }
    mount.signal(Signal::TERM);
    mount.wait().ok();
}

fn what_a_compact_log_names_is_known_and_can_be_downloaded(stage: &Stage) {
    if stage.version == Version::Four {
        return;
    }
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let outhaul = Outhaul::new();
    let scratch = Scratch::new("log");
    let log = scratch.join("compact.log").display().to_string();
    let asked = ["//gen:top", "//tests:outputs", PROGRAM];
    // With it, what is big enough is stored and read compressed.
    let compression = "--remote_cache_compression";
    bazel.test(&[&[compression], &asked[..]].concat()).ok();
    let made = Tree::of(&bazel.exec_root().join("bazel-out"));
    bazel.clean();

    // Without an action cache, the log alone knows of what no event names.
    let flags = [
        compression.to_owned(),
        "--nouse_action_cache".to_owned(),
        format!("--execution_log_compact_file={log}"),
    ];
    let mut line = vec!["--".to_owned()];
    line.extend(bazel.command_line("test"));
    line.extend_from_slice(cache.bazel());
    line.extend(flags);
    line.extend(asked.map(str::to_owned));
    let run = outhaul.run(bazel.workspace(), "run", &line).ok();
    let middle = "bazel-bin/gen/middle.txt";
    bazel.delete(middle);
    let got = outhaul.json(bazel.workspace(), "get", &[middle]);
    assert_eq!(got[0]["outcome"], "downloaded", "{got:#?}\n{run}");
    assert_eq!(bazel.text(middle), "middle\n");
    let why = outhaul.why(bazel.workspace(), middle);
    assert_eq!(why["event"], "execution_log", "{why:#}");

    let to = format!("--output-dir={}", scratch.join("fetched").display());
    let settings = cache.settings();
    let line = [&["log"], &settings.and(&[&log, &to])[..]].concat();
    outhaul.stateless(scratch.path(), "fetch", &line).ok();
    let fetched = Tree::of(&scratch.join("fetched/bazel-out"));
    for (path, entry) in &fetched.0 {
        let reference = made.0.get(path).and_then(Entry::hash);
        assert_eq!(entry.hash(), reference, "{path}");
    }
    for part in [
        "/gen/middle.txt",
        "/sub/with space.txt",
        "/outputs/test.xml",
        "/test.outputs/outputs.zip",
    ] {
        let has = fetched.files().iter().any(|path| path.ends_with(part));
        assert!(has, "{part}: {:?}", fetched.files());
    }
}

fn what_an_interrupted_build_left_is_not_believed(stage: &Stage) {
    if stage.version == Version::Four {
        return;
    }
    let cache = stage.cache();
    let daemon = Daemon::start(&cache);
    let bazel = stage.bazel(&cache);
    bazel.build(&["//runfiles:app"]).ok();
    bazel.clean();
    bazel.build(&["//runfiles:app"]).ok();
    // Nothing is read or written in this one: what lies there is that of the build before.
    bazel
        .build(&[&daemon.bes(), "--nouse_action_cache", "//runfiles:app"])
        .ok();
    let status = daemon.outhaul().status();
    assert!(status["failed"].as_u64() >= Some(3), "{status:#}");
    assert!(daemon.log().contains("--nouse_action_cache"), "{}", daemon.log());
    // And in the next they come.
    bazel.build(&[&daemon.bes(), "//runfiles:app"]).ok();
    daemon.settled();
    printed(&bazel, "//runfiles:app").unwrap();
}

fn a_recorded_program_runs_without_bazel_and_then_without_the_cache(stage: &Stage) {
    if stage.version == Version::Four {
        return;
    }
    let cache = stage.cache();
    let mut daemon = Daemon::with(&[&format!("--remote-cache={}", cache.url()), "--download=minimal"]);
    let bazel = stage.bazel(&cache);
    bazel.write("gen/BUILD", &format!("{}{ENVIRONMENT}", bazel.text("gen/BUILD")));
    let asked = [PROGRAM, "//gen:environment"];
    bazel.build(&asked).ok();
    bazel.clean();
    bazel.build(&[&[daemon.bes().as_str()], &asked[..]].concat()).ok();
    daemon.settled();
    assert!(!bazel.has(&path_of(PROGRAM)), "nothing is asked for");

    // To where it needs neither Bazel nor the workspace.
    let staged = Scratch::new("staged");
    let stage_to = |outhaul: &Outhaul, name: &str| {
        let to = staged.join(name).display().to_string();
        let args = ["--runfiles", "--flatten", "--to", &to, PROGRAM];
        outhaul.run(bazel.workspace(), "stage", &args).ok();
        to
    };
    let absent = stage_to(daemon.outhaul(), "absent");
    assert!(!bazel.has(&path_of(PROGRAM)), "the output tree stays as it was");

    // By its target, with all that it needs, arguments, and the exit code.
    let outhaul = daemon.outhaul();
    let run = outhaul.run(bazel.workspace(), "exec", &[PROGRAM]).ok();
    let says = printed(&bazel, PROGRAM).unwrap();
    assert!(says.contains("with space.txt: sub"), "{says}");
    assert_eq!(run.out(), says);
    let environment = ["//gen:environment", "--", "--option", "two words"];
    let run = outhaul.run(bazel.workspace(), "exec", &environment).expect(7);

    // As `bazel run` runs it.
    let by_bazel = bazel.run("run", &environment).expect(7);
    let lines = |out: &str| -> BTreeSet<String> { out.lines().map(str::to_owned).collect() };
    let (ours, theirs) = (lines(&run.out()), lines(&by_bazel.out()));
    assert_eq!(ours, theirs, "{run}\n{by_bazel}");
    assert!(ours.contains("arguments: --option,two words,"), "{ours:?}");

    // With nothing to download from. By its path, too.
    daemon.restart_with(&["--remote-cache=grpc://127.0.0.1:9"]);
    let outhaul = daemon.outhaul();
    let run = outhaul.run(bazel.workspace(), "exec", &[&path_of(PROGRAM)]).ok();
    assert_eq!(run.out(), says);
    let got = outhaul.json(bazel.workspace(), "get", &["--runfiles", PROGRAM]);
    assert!(got.len() > 10, "{got:#?}");
    assert!(got.iter().all(|line| line["outcome"] == "present"), "{got:#?}");
    let present = stage_to(outhaul, "present");
    let to = staged.join("present").display().to_string();
    assert_eq!(bazel.text("runfiles/source.txt"), SOURCE);
    bazel.delete("runfiles/source.txt");
    let again = ["--runfiles", "--flatten", "--to", &to, PROGRAM];
    let run = outhaul.run(bazel.workspace(), "stage", &again).expect(1);
    assert!(run.err.contains("runfiles/source.txt"), "{run}");
    let exported = export(outhaul, &bazel, staged.path());
    let exec_root = bazel.exec_root();
    std::fs::rename(&exec_root, exec_root.with_extension("away")).unwrap();
    let workspace = bazel.workspace().with_extension("away");
    std::fs::rename(bazel.workspace(), &workspace).unwrap();
    runs_from_its_export(&exported, staged.path(), &says);
    std::fs::rename(&workspace, bazel.workspace()).unwrap();
    for to in [absent, present] {
        let run = Command::new(format!("{to}/linked.sh")).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&run.stdout), says, "{run:?}");
        is_staged(&to, &["--runfiles", "--flatten", PROGRAM]);
    }
    std::fs::rename(exec_root.with_extension("away"), &exec_root).unwrap();
    // Another output has the same bytes.
    bazel.delete("bazel-bin/runfiles/linked.data.txt");
    let run = outhaul.run(bazel.workspace(), "exec", &[PROGRAM]).ok();
    assert_eq!(run.out(), says);
    // What is lost is named, and the program not run.
    daemon.restart_with(&["--remote-cache=grpc://127.0.0.1:9", "--local-sources=off"]);
    let outhaul = daemon.outhaul();
    bazel.delete("bazel-bin/runfiles/linked.data.txt");
    let run = outhaul.run(bazel.workspace(), "exec", &[PROGRAM]);
    assert!(
        run.err.contains("linked.data.txt") && run.err.contains("not run"),
        "{run}"
    );
    assert!(run.out().is_empty(), "{run}");
}

/// The build as a file, and what a remote cache has of it in a disk cache: the build's outputs, but not its sources.
fn export(outhaul: &Outhaul, bazel: &Bazel, to: &Path) -> PathBuf {
    bazel.write("runfiles/source.txt", SOURCE);
    let exported = to.join("app.outhaul");
    let args = ["--runfiles", "-o", exported.to_str().unwrap()];
    outhaul.run(bazel.workspace(), "export", &args).ok();
    let mut open = vec![bazel.exec_root().join("bazel-out")];
    while let Some(directory) = open.pop() {
        for entry in directory.read_dir().unwrap() {
            let entry = entry.unwrap();
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                open.push(entry.path());
            } else if kind.is_file() {
                let bytes = std::fs::read(entry.path()).unwrap();
                let hash = Digest::of(DigestFunction::Sha256, &bytes).hash_hex();
                let shard = to.join("disk/cas").join(&hash[..2]);
                std::fs::create_dir_all(&shard).unwrap();
                std::fs::write(shard.join(hash), bytes).unwrap();
            }
        }
    }
    exported
}

/// On a machine that has neither the workspace nor Bazel, and no network.
fn runs_from_its_export(exported: &Path, scratch: &Path, says: &str) {
    let is_permitted = Command::new("unshare").args(["-n", "true"]).status();
    let mut command = if is_permitted.is_ok_and(|status| status.success()) {
        let mut command = Command::new("unshare");
        command.args(["-n", env!("CARGO_BIN_EXE_outhaul")]);
        command
    } else {
        eprintln!("SKIPPED: a part of a test: it may not make network namespaces");
        Command::new(env!("CARGO_BIN_EXE_outhaul"))
    };
    command
        .arg("exec")
        .arg("--from-export")
        .arg(exported)
        .arg(PROGRAM);
    for (flag, path) in [
        ("--to", "app"),
        ("--state-dir", "elsewhere"),
        ("--disk-cache", "disk"),
    ] {
        command.arg(flag).arg(scratch.join(path));
    }
    std::fs::create_dir(scratch.join("elsewhere")).unwrap();
    let run = clean(command).current_dir(scratch).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&run.stdout), says, "{run:?}");
}

/// A program that prints how it was started.
const ENVIRONMENT: &str = r#"
genrule(
    name = "environment",
    outs = ["environment.sh"],
    cmd = """cat > $@ <<'END'
#!/bin/sh
echo "program: $$0"
echo "directory: $$(pwd)"
printf "arguments: "
printf "%s," "$$@"
echo
env | grep -e ^BUILD_ -e ^RUNFILES_ -e ^TEST_
exit 7
END
""",
    executable = True,
)
"#;
