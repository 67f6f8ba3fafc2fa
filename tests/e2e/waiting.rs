//! Scripts that wait for a build: before it, during it, after it.

use std::path::Path;

use outhaul_testkit::eventually;

use crate::harness::{Daemon, Proxy, Stage};

for_each_bazel!(real with 4 rarely: waits_end_when_the_files_are_there_whenever_they_began);

fn waits_end_when_the_files_are_there_whenever_they_began(stage: &Stage) {
    let asked = ["--keep_going", "//:a", "//gen:many", "//gen:top", "//gen:broken"];
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    bazel.build(&asked).expect(1);
    bazel.clean();
    let proxy = Proxy::start(&cache);
    let daemon = Daemon::with(&[&format!("--remote-cache={}", proxy.url())]);
    let workspace = bazel.workspace().to_owned();
    let start = |args: &[&str]| {
        let args = [&["--json"], args].concat();
        daemon.outhaul().start(&workspace, "wait", &args)
    };
    let files = ["bazel-bin/a.txt", "bazel-bin/gen/top.txt"];

    // Of the workspace that it is started in.
    let mut before = start(&["--next", "//:a", "//gen:top"]);
    eventually("it listens", || before.stdout().contains("\"waiting\""));
    proxy.hold();
    let build = bazel.start("build", &[&[daemon.bes().as_str()], &asked[..]].concat());
    eventually("outputs are on their way", || {
        let statuses = daemon.outhaul().statuses();
        statuses
            .first()
            .is_some_and(|status| status["pending"].as_u64() > Some(0))
    });
    let mut during = start(&["//:a", "//gen:top"]);
    eventually("the targets are known", || {
        [&before, &during]
            .iter()
            .all(|wait| wait.stdout().matches("\"target_known\"").count() >= 2)
    });
    assert!(before.is_running() && during.is_running());
    assert!(files.iter().all(|file| !bazel.has(file)));

    proxy.flow();
    for wait in [before, during] {
        wait.wait().ok();
        // Bazel makes its links only at the end of the build.
        let status = daemon.outhaul().status();
        let out = Path::new(status["exec_root"].as_str().unwrap()).join("bazel-out");
        assert_eq!(text(&out, "bin/a.txt"), "this is a\n");
        assert_eq!(text(&out, "bin/gen/top.txt"), "middle\ntop\n");
    }
    build.wait().expect(1);

    for (target, code) in [
        ("//gen:many", 0),
        ("//:all", 0),
        ("//gen/...", 1),
        ("//gen:broken", 1),
        ("//gen:never", 3),
        ("//other/...", 3),
    ] {
        let run = start(&[target]).wait().expect(code);
        let out = run.out();
        let result = out.lines().last().expect("a result");
        assert!(result.contains(&format!("\"exit_code\":{code}")), "{result}");
    }
    // What comes after it need not build anything.
    bazel.run("info", &[&daemon.bes(), "release"]).ok();
    start(&["//gen:top"]).wait().ok();
    start(&["--next", "--timeout=1s"]).wait().expect(4);
}

/// The text of an output in whichever configuration has it.
#[track_caller]
fn text(out: &Path, name: &str) -> String {
    let configurations = std::fs::read_dir(out).unwrap();
    let mut found =
        configurations.filter_map(|dir| std::fs::read_to_string(dir.unwrap().path().join(name)).ok());
    found
        .next()
        .unwrap_or_else(|| panic!("{name} is not in {}", out.display()))
}
