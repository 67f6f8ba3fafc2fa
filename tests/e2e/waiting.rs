//! Scripts that wait for a build: before it, during it, after it.

use crate::harness::{Daemon, Proxy, Stage, eventually};

for_each_bazel!(real: waits_end_when_the_files_are_there_whenever_they_began);

fn waits_end_when_the_files_are_there_whenever_they_began(stage: &Stage) {
    let asked = ["--keep_going", "//:a", "//gen:many", "//gen:top", "//gen:broken"];
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    bazel.build(&asked).ends_with(1);
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
        assert_eq!(bazel.text(files[0]), "this is a\n");
        assert_eq!(bazel.text(files[1]), "middle\ntop\n");
    }
    build.wait().ends_with(1);

    for (target, code) in [
        ("//gen:many", 0),
        ("//:all", 0),
        ("//gen/...", 1),
        ("//gen:broken", 1),
        ("//gen:never", 3),
        ("//other/...", 3),
    ] {
        let run = start(&[target]).wait().ends_with(code);
        let result = run.stdout.lines().last().expect("a result");
        assert!(result.contains(&format!("\"exit_code\":{code}")), "{result}");
    }
    // What comes after it need not build anything.
    bazel.run("info", &[&daemon.bes(), "release"]).ok();
    start(&["//gen:top"]).wait().ok();
    start(&["--next", "--timeout=1s"]).wait().ends_with(4);
}
