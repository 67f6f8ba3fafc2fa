//! Much older Bazels than those that all else is tried with: one test with 2.1.0.

use crate::harness::{Outhaul, Scratch, Stage, Version, run};

#[test]
fn a_build_of_bazel_2_is_left_to_it_and_whole() {
    let name = concat!(module_path!(), "::a_build_of_bazel_2_is_left_to_it_and_whole");
    run(name, Version::Two, "embedded", test);
}

fn test(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let outhaul = Outhaul::new();
    let dir = Scratch::new("disk-cache");
    for flag in [
        format!("--disk_cache={}", dir.path().display()),
        format!("--remote_cache={}", cache.url()),
    ] {
        // The second time, from the cache.
        for _ in 0..2 {
            bazel.clean();
            let line = bazel.command_line("build");
            let args = ["--strict".to_owned(), "--".to_owned()];
            let targets = [flag.clone(), "//:all".to_owned(), "//gen:many".to_owned()];
            let all: Vec<String> = args.into_iter().chain(line).chain(targets).collect();
            let run = outhaul.run(bazel.workspace(), "run", &all).ok();
            assert!(run.err.contains(" 0 failed"), "{run}");
            assert!(!run.err.contains("received no events of"), "{run}");
            assert_eq!(bazel.text("bazel-bin/a.txt"), "this is a\n", "{run}");
            assert!(bazel.has("bazel-bin/gen/many.d/second.txt"), "{run}");
        }
    }
    let line = bazel.command_line("run");
    let args = std::iter::once("--".to_owned()).chain(line);
    let all: Vec<String> = args.chain(["//gen:tool".to_owned()]).collect();
    let run = outhaul.run(bazel.workspace(), "run", &all).ok();
    assert!(run.out().ends_with("tool\n"), "{run}");
}
