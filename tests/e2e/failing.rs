//! Builds that fail.

use crate::harness::{Daemon, Stage, cache_hits};

for_each_bazel!(real: what_was_built_beside_a_failure_is_there);

pub(crate) fn what_was_built_beside_a_failure_is_there(stage: &Stage) {
    let asked = [
        "--keep_going",
        "--output_groups=+good,+mixed",
        "//:a",
        "//gen:one",
        "//gen:broken",
        "//rules:flat",
        "//rules:half",
    ];
    let cache = stage.cache();
    let daemon = Daemon::start(&cache);
    let bazel = stage.bazel(&cache);
    bazel.build(&asked).expect(1);
    bazel.clean();
    let run = bazel
        .build(&[&[daemon.bes().as_str()], &asked[..]].concat())
        .expect(1);
    assert!(cache_hits(&run) >= 4, "{run}");
    assert_eq!(bazel.text("bazel-bin/a.txt"), "this is a\n");
    assert_eq!(bazel.text("bazel-bin/gen/one.txt"), "one\n");
    assert_eq!(bazel.text("bazel-bin/rules/flat.d/3.txt"), "flat 3\n");
    // Of the target that failed, the group that is complete.
    assert_eq!(bazel.text("bazel-bin/rules/half.good.txt"), "good\n");
    assert!(!bazel.has("bazel-bin/rules/half.bad.txt"));
    assert!(!bazel.has("bazel-bin/gen/broken.txt"));
    let status = daemon.settled();
    assert_eq!(status["exit_code"], 1, "{status:#}");
}
