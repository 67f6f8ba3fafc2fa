//! Outputs that no event names: all that Bazel itself lists of them is listed here, and can be downloaded.

use std::collections::BTreeMap;

use outhaul_testkit::eventually;
use rustix::process::Signal;

use crate::{
    harness::{Bazel, Daemon, Stage, Tree, Version, cache_hits, executed, has_all, run},
    runfiles::{dumped, what_the_action_cache_holds_is_known_and_can_be_downloaded},
};

for_each_bazel!(real: all_that_many_actions_made_is_listed_and_downloaded);

/// Actions that make one output each: fewer where time is short.
fn parts() -> u64 {
    if has_all() { 1000 } else { 150 }
}

/// The first ones depend on the file `few`.
const FEW: u64 = 10;
const TARGET: &str = "//many:top";

/// Names that a shell, a listing or a table could take for something else, nested and empty trees, and a file that depends on
/// all of these, which is all that anybody asks for.
const RULES: &str = r##"
ODD = ["a b", "a'b", 'a"b', "$HOME", "(a)[b]{c}", "#~+@!%&^", "-x", ".hidden", "a=b,c", "l" * 200, "a.tree/x", "*?"]

def _top_impl(ctx):
    made = []
    def make(out, command, inputs = []):
        made.append(out)
        ctx.actions.run_shell(outputs = [out], inputs = inputs, arguments = [out.path], command = command)
    for i in range(ctx.attr.parts):
        name = ODD[i % len(ODD)] if i // len(ODD) == 3 else "part"
        out = ctx.actions.declare_file("%d/%s" % (i, name))
        few = [ctx.file.few] if i < ctx.attr.few_parts else []
        make(out, "echo %d %s > \"$1\"" % (i, "$(cat many/few)" if few else ""), few)
    nested = "mkdir -p $1/a/b/c $1/'d e'; echo deep > $1/a/b/c/file; echo top > $1/top; for i in $(seq 50); do echo $i > \"$1/d e/$i\"; done"
    for name, command in [("nested.tree", nested), ("empty.tree", ":"), ("e/m/p/t/y.tree", ":")]:
        make(ctx.actions.declare_directory(name), command)
    top = ctx.actions.declare_file(ctx.label.name)
    ctx.actions.run_shell(outputs = [top], inputs = made, arguments = [top.path], command = ctx.attr.before + "echo top > \"$1\"")
    return [DefaultInfo(files = depset([top]))]

top = rule(
    implementation = _top_impl,
    attrs = {
        "parts": attr.int(),
        "few_parts": attr.int(),
        "few": attr.label(allow_single_file = True),
        "before": attr.string(),
    },
)
"##;

/// Writes the package, with what its last action does first.
fn write_package(bazel: &Bazel, few: &str, before: &str) {
    std::fs::create_dir_all(bazel.workspace().join("many")).unwrap();
    bazel.write("many/few", few);
    bazel.write("many/defs.bzl", RULES);
    bazel.write(
        "many/BUILD",
        &format!(
            "load(\":defs.bzl\", \"top\")\n\
             top(name = \"top\", parts = {}, few_parts = {FEW}, few = \"few\", before = \"{before}\")\n",
            parts()
        ),
    );
}

/// What Bazel itself downloads where it downloads everything.
fn all_of(reference: &Bazel) -> Tree {
    reference.build(&[TARGET]).ok();
    reference.clean();
    let run = reference.build(&["--remote_download_all", TARGET]).ok();
    assert_eq!(executed(&run), 0, "{run}");
    Tree::of(&reference.path("bazel-bin/many"))
}

/// Demands that all that Bazel lists is listed here with its digest and size. Gives how many that are.
#[track_caller]
fn assert_listed(bazel: &Bazel, daemon: &Daemon) -> usize {
    let listed = daemon.outhaul().json(bazel.workspace(), "ls", &[]);
    let listed: BTreeMap<&str, (&str, u64)> = listed
        .iter()
        .map(|output| {
            let digest = output["digest"].as_str().unwrap_or_default();
            let digest = digest.trim_start_matches("sha256:");
            let size = output["size"].as_u64().unwrap_or_default();
            (output["exec_path"].as_str().unwrap(), (digest, size))
        })
        .collect();
    let dumped = dumped(bazel);
    for line in &dumped {
        let mut words = line.rsplitn(3, ' ');
        let (size, digest, path) = (words.next(), words.next().unwrap(), words.next().unwrap());
        let size = size.unwrap().parse().unwrap();
        assert_eq!(
            listed.get(path),
            Some(&(digest, size)),
            "{line}\n{}",
            daemon.log()
        );
    }
    dumped.len()
}

/// Downloads everything of the package, and demands that it is what Bazel downloads.
#[track_caller]
fn assert_downloaded(bazel: &Bazel, daemon: &Daemon, expected: &Tree) {
    let run = daemon
        .outhaul()
        .run(bazel.workspace(), "get", &["--json", "--all-of", "//many/..."])
        .ok();
    let differences = expected.differences(&Tree::of(&bazel.path("bazel-bin/many")));
    assert!(
        differences.is_empty(),
        "{}\n{}\n{}",
        differences.join("\n"),
        run.err,
        daemon.log()
    );
}

fn all_that_many_actions_made_is_listed_and_downloaded(stage: &Stage) {
    let cache = stage.cache();
    if stage.version == Version::Four {
        let (daemon, bazel) = (Daemon::start(&cache), stage.bazel(&cache));
        bazel.build(&[&daemon.bes(), "//gen:top"]).ok();
        daemon.settled();
        let get = daemon
            .outhaul()
            .run(bazel.workspace(), "get", &["bazel-bin/gen/middle.txt"]);
        let said = "which holds no digests of outputs";
        assert!(get.code == Some(3) && get.err.contains(said), "{get}");
        return;
    }
    let reference = stage.bazel(&cache);
    write_package(&reference, "few", "");
    let expected = all_of(&reference);
    let daemon = Daemon::start(&cache);
    let bazel = stage.bazel(&cache);
    let built = |arguments: &[&str]| {
        let run = bazel
            .build(&[&[daemon.bes().as_str(), TARGET], arguments].concat())
            .ok();
        assert_eq!(executed(&run), 0, "{run}");
        daemon.settled();
        run
    };
    write_package(&bazel, "few", "");
    assert!(cache_hits(&built(&[])) > parts());
    assert!(assert_listed(&bazel, &daemon) as u64 > parts() + 50);
    assert_downloaded(&bazel, &daemon, &expected);

    // Nothing is built, and then some of it again.
    built(&[]);
    assert_listed(&bazel, &daemon);
    for few in ["other", "a third"] {
        write_package(&reference, few, "");
        let expected = all_of(&reference);
        write_package(&bazel, few, "");
        let hits = cache_hits(&built(&[]));
        assert!((FEW..parts()).contains(&hits), "{hits} cache hits");
        assert_listed(&bazel, &daemon);
        assert_downloaded(&bazel, &daemon, &expected);
        // All of it from the cache, and by another server.
        if few == "other" {
            bazel.clean();
            assert!(cache_hits(&built(&[])) > parts());
            assert_listed(&bazel, &daemon);
            assert_downloaded(&bazel, &daemon, &expected);
            bazel.run("shutdown", &[]).ok();
            built(&[]);
            assert_listed(&bazel, &daemon);
            assert_downloaded(&bazel, &daemon, &expected);
        }
    }
    a_build_that_is_interrupted(&reference, &bazel, &daemon);
}

/// It has taken outputs from the cache, and does not save its action cache: nothing of that is believed, and the next build
/// tells all.
fn a_build_that_is_interrupted(reference: &Bazel, bazel: &Bazel, daemon: &Daemon) {
    write_package(reference, "interrupted", "");
    let expected = all_of(reference);
    let mark = bazel.workspace().join("it_runs");
    let before = format!("touch '{}'; sleep 600; ", mark.display());
    write_package(bazel, "interrupted", &before);
    let changed = "bazel-bin/many/0/part";
    // It tells the build by its length.
    let known = || {
        let stat = daemon.outhaul().stat(bazel.workspace(), changed);
        stat["size"].as_u64()
    };
    let (before, after) = (Some(10), Some(14));
    assert_eq!(known(), before);
    let build = bazel.start("build", &[&daemon.bes(), TARGET]);
    eventually("the last action runs", || mark.exists());
    build.signal(Signal::INT);
    build.wait().expect(8);
    eventually("the build is over", || {
        let status = daemon.outhaul().status();
        status["exit_code"] == 8 && status["state"] == "settled"
    });
    assert_eq!(known(), before);

    write_package(bazel, "interrupted", "");
    bazel.build(&[&daemon.bes(), TARGET]).ok();
    daemon.settled();
    assert_eq!(known(), after);
    assert_listed(bazel, daemon);
    assert_downloaded(bazel, daemon, &expected);
}

/// The digests are the same ones, wherever Bazel has found its actions.
#[test]
fn the_action_cache_is_read_with_every_kind_of_cache() {
    let few = ["nginx", "disk"];
    let more = ["casd", "embedded", "disk_and_nginx", "bucket", "disk_bucket"];
    let caches = if has_all() {
        [&few[..], &more].concat()
    } else {
        few.into()
    };
    for cache in caches {
        run(
            &format!("intermediates::{cache}"),
            Version::Seven,
            cache,
            what_the_action_cache_holds_is_known_and_can_be_downloaded,
        );
    }
}
