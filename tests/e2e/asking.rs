//! Metadata before bytes: `stat`, `why` and `get`.

use crate::harness::{Bazel, Daemon, Stage, executed};

for_each_bazel!(real with 4 rarely: outputs_are_known_before_they_are_fetched_and_say_why);

pub(crate) fn outputs_are_known_before_they_are_fetched_and_say_why(stage: &Stage) {
    let asked = ["//gen:top", "//gen:middle", "//rules:nested", "//:a"];
    let cache = stage.cache();
    let mut daemon = Daemon::reading(cache.settings(), &["--target=//gen:top,//rules:flat"]);
    let bazel = stage.bazel(&cache);
    bazel.build(&asked).ok();
    bazel.clean();
    let build = |daemon: &Daemon| bazel.build(&[&[daemon.bes().as_str()], &asked[..]].concat()).ok();
    let run = build(&daemon);
    assert_eq!(executed(&run), 0, "{run}");

    // Skipped, for its target is not among those that are wanted: known, down to the last byte.
    let middle = "bazel-bin/gen/middle.txt";
    assert!(!bazel.has(middle));
    let stat = daemon.outhaul().stat(bazel.workspace(), middle);
    assert_eq!(stat["state"], "known", "{stat:#}");
    // That of "middle\n".
    let digest = "sha256:ae66b56de7f246402ca90af69034fc9d67190b5e6868351a3943b093e5445008";
    assert_eq!(stat["digest"], digest, "{stat:#}");
    assert_eq!(stat["size"], 7, "{stat:#}");
    assert_eq!(stat["label"], "//gen:middle", "{stat:#}");
    let why = daemon.outhaul().why(bazel.workspace(), middle);
    assert_eq!(why["class"], "known", "{why:#}");
    assert!(
        why["rule"].as_str().is_some_and(|rule| rule.contains("--target")),
        "{why:#}"
    );

    // Downloaded.
    let top = daemon.outhaul().why(bazel.workspace(), "bazel-bin/gen/top.txt");
    assert_eq!(
        (&top["class"], &top["state"]),
        (&"required".into(), &"materialized".into()),
        "{top:#}"
    );
    assert!(top["source"].is_string() && top["source"] != "present", "{top:#}");
    assert_eq!(bazel.text("bazel-bin/gen/top.txt"), "middle\ntop\n");

    // Anyone who asks gets it: by the path that users see, by an absolute one, by the exec path, and a whole tree.
    let get = |path: &str| daemon.outhaul().json(bazel.workspace(), "get", &[path]);
    let got = get(middle);
    assert_eq!(got[0]["outcome"], "downloaded", "{got:#?}");
    assert_eq!(bazel.text(middle), "middle\n");
    assert_eq!(get(middle)[0]["outcome"], "present");
    let absolute = bazel.path("bazel-bin/a.txt");
    assert_eq!(get(absolute.to_str().unwrap())[0]["outcome"], "downloaded");
    assert_eq!(bazel.text("bazel-bin/a.txt"), "this is a\n");
    bazel.delete("bazel-bin/a.txt");
    assert_eq!(
        get(&exec_path(&bazel, "bazel-bin/a.txt"))[0]["outcome"],
        "downloaded"
    );
    assert_eq!(bazel.text("bazel-bin/a.txt"), "this is a\n");
    let tree = get("bazel-bin/rules/nested.d");
    assert_eq!(tree.len(), 5, "{tree:#?}");
    assert_eq!(
        bazel.text("bazel-bin/rules/nested.d/sub/deeper/deeper.txt"),
        "deeper\n"
    );
    let stat = daemon.outhaul().stat(bazel.workspace(), middle);
    assert_eq!(stat["state"], "materialized", "{stat:#}");

    // Present at the next build.
    let run = build(&daemon);
    assert_eq!(executed(&run), 0, "{run}");
    let top = daemon.outhaul().why(bazel.workspace(), "bazel-bin/gen/top.txt");
    assert_eq!(top["state"], "materialized", "{top:#}");
    let status = daemon.settled();
    assert_eq!(
        (&status["downloaded"], &status["present"]),
        (&0.into(), &1.into()),
        "{status:#}"
    );

    // Never named by a build: nothing is known, and the exit code says so.
    let run = daemon
        .outhaul()
        .run(bazel.workspace(), "stat", &["bazel-bin/gen/one.txt"])
        .expect(3);
    assert!(run.err.contains("no recorded build has named it"), "{run}");

    // What is known outlives the daemon, and can be asked for without one.
    bazel.delete(middle);
    daemon.terminate();
    let stat = daemon.outhaul().stat(bazel.workspace(), middle);
    assert_eq!(
        (&stat["state"], &stat["digest"]),
        (&"known".into(), &digest.into()),
        "{stat:#}"
    );
}

fn exec_path(bazel: &Bazel, path: &str) -> String {
    let real = bazel.path(path).parent().unwrap().canonicalize().unwrap();
    let below = real.strip_prefix(bazel.exec_root()).unwrap();
    below
        .join(bazel.path(path).file_name().unwrap())
        .display()
        .to_string()
}
