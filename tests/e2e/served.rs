//! Builds whose outputs an output service has.

use std::{collections::BTreeSet, path::Path};

use outhaul_testkit::Ran;

use crate::harness::{Bazel, Daemon, Outhaul, OutputService, Stage, Version};

for_each_bazel!(embedded: what_an_output_service_has_is_present_and_can_be_warmed);

/// Bazel has it from version 7.2 on.
fn what_an_output_service_has_is_present_and_can_be_warmed(stage: &Stage) {
    if stage.version == Version::Four {
        return;
    }
    let cache = stage.cache();
    let targets = ["//:a", "//:b", "//gen:all"];
    stage.bazel(&cache).build(&targets).ok();
    let service = OutputService::start(&cache);
    let [address, prefix] = service.flags();
    let remote = format!("--remote-cache={}", cache.url());
    let mut daemon = Daemon::with(&[&remote, "--strict"]);
    let mut bazel = stage.bazel(&cache);
    // Its build tree stays with the service.
    bazel.keep_out();
    let build = |daemon: &Daemon| -> Ran {
        let flags = [daemon.bes(), address.clone(), prefix.clone()];
        let flags: Vec<&str> = flags.iter().map(String::as_str).chain(targets).collect();
        bazel.build(&flags).ok()
    };
    // All of it by cache hits; once more with nothing to do; with a change, and so an action that writes there itself.
    for change in [false, false, true] {
        if change {
            bazel.write("gen/source.txt", "changed");
        }
        let before = cache.embedded().stats();
        build(&daemon);
        let status = daemon.settled();
        let present = status["present"].as_u64().unwrap();
        assert!(
            status["downloaded"] == 0 && present >= 3,
            "{status:#}\n{}",
            daemon.log()
        );
        let said = status["errors"][0].as_str().unwrap_or_default();
        assert!(said.starts_with("the output service grpc://"), "{status:#}");
        let read = cache.embedded().stats().since(&before);
        assert_eq!(
            read.batch_read_blobs, 0,
            "Bazel reads none by batch, and Outhaul none at all"
        );
        assert_eq!(
            std::fs::read_link(Path::new(status["exec_root"].as_str().unwrap()).join("bazel-out")).unwrap(),
            service.tree()
        );
        assert_eq!(bazel.text("bazel-bin/a.txt"), "this is a\n");
    }
    daemon.restart_with(&[&remote, "--strict", "--warm-output-service"]);
    let before = cache.embedded().stats();
    build(&daemon);
    let status = daemon.settled();
    let said: BTreeSet<&str> = status["errors"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|e| e.as_str())
        .collect();
    assert!(said.iter().any(|said| said.starts_with("warmed ")), "{status:#}");
    let read = cache.embedded().stats().since(&before);
    assert!(read.batch_read_blobs >= 3, "{read:?}");
    under_run(
        &bazel,
        &[&address, &prefix, &format!("--remote_cache={}", cache.url())],
    );
    // Without the service, the tree is Bazel's own again: it puts its directory in the link's place once the build runs.
    bazel.build(&[&daemon.bes(), targets[0]]).ok();
    assert!(daemon.settled()["downloaded"] == 1, "{}", daemon.log());
    assert_eq!(bazel.text("bazel-bin/a.txt"), "this is a\n");
}

/// The same by `outhaul run`.
fn under_run(bazel: &Bazel, flags: &[&str]) {
    let outhaul = Outhaul::new();
    let mut args = vec![
        "--strict".to_owned(),
        "--warm-output-service".to_owned(),
        "--".to_owned(),
    ];
    args.extend(bazel.command_line("build"));
    args.extend(flags.iter().map(|flag| (*flag).to_owned()));
    args.push("//:a".to_owned());
    let run = outhaul.run(bazel.workspace(), "run", &args).ok();
    assert!(
        run.err
            .contains("0 downloaded (0 B), 1 already present, 0 failed"),
        "{run}"
    );
    assert!(run.err.contains("warmed 1 file"), "{run}");
}
