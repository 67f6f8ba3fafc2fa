//! Builds that follow others.

use std::os::unix::fs::PermissionsExt as _;

use crate::harness::{Daemon, Stage, cache_hits, executed};

for_each_bazel!(real with 4 rarely:
    deleted_and_damaged_outputs_come_back_without_execution,
    a_target_whose_actions_all_hit_the_cache_appears,
);

pub(crate) fn deleted_and_damaged_outputs_come_back_without_execution(stage: &Stage) {
    let cache = stage.cache();
    let daemon = Daemon::start(&cache);
    let bazel = stage.bazel(&cache);
    bazel.build(&["//..."]).ok();
    bazel.clean();
    bazel.build(&[&daemon.bes(), "//..."]).ok();
    let before = bazel.bin();
    assert!(before.files().len() > 10, "{before}");

    for path in [
        "a.txt",
        "gen/top.txt",
        "gen/empty.txt",
        // Only one of the three that its action makes.
        "gen/many.d/first.txt",
        "deep/er/down",
        "rules/program",
        "rules/flat.d",
        "rules/nested.d/sub/sub.txt",
    ] {
        bazel.delete(&format!("bazel-bin/{path}"));
    }
    // Of the same length, so that only the bytes say.
    let damaged = bazel.path("bazel-bin/gen/one.txt");
    std::fs::set_permissions(&damaged, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::write(&damaged, "ONE\n").unwrap();

    let run = bazel.build(&[&daemon.bes(), "//..."]).ok();
    assert_eq!(executed(&run), 0, "{run}");
    let differences = before.differences(&bazel.bin());
    assert!(differences.is_empty(), "{}\n{run}", differences.join("\n"));
    daemon.settled();

    // And now that all is there again, nothing is downloaded.
    let run = bazel.build(&[&daemon.bes(), "//..."]).ok();
    assert_eq!(executed(&run), 0, "{run}");
    let status = daemon.settled();
    assert_eq!(status["downloaded"], 0, "{status:#}");
}

pub(crate) fn a_target_whose_actions_all_hit_the_cache_appears(stage: &Stage) {
    let cache = stage.cache();
    let daemon = Daemon::start(&cache);
    let bazel = stage.bazel(&cache);
    bazel.build(&["//:a", "//:b"]).ok();
    bazel.clean();
    bazel.build(&[&daemon.bes(), "//:a"]).ok();
    assert_eq!(bazel.text("bazel-bin/a.txt"), "this is a\n");
    assert!(!bazel.has("bazel-bin/b.txt"));
    let run = bazel.build(&[&daemon.bes(), "//:b"]).ok();
    assert_eq!(executed(&run), 0, "{run}");
    assert_eq!(cache_hits(&run), 1, "{run}");
    assert_eq!(bazel.text("bazel-bin/b.txt"), "this is b\n");
    daemon.settled();
}
