//! Builds, as recorded streams of real Bazels and as events in every order that has been seen.

mod hostile;
mod open;
mod trees;

use std::{collections::BTreeMap, path::Path, sync::Arc};

use super::{
    build::{Build, Effect, Named, TargetEnd},
    policy::{DownloadMode, Policy},
};
use crate::{
    bep::{
        EventFile,
        event::{
            CommandLine, Completed, Content, Event, File, NamedSet, OutputGroup, Started, TargetId,
            TestResult,
        },
    },
    digest::{Digest, DigestFunction},
    output::{Class, OutputContent},
};

/// Everything that a build names, by path; the class is the greatest that it gets.
type Outputs = BTreeMap<String, (Class, Named)>;

fn collect(effects: impl IntoIterator<Item = Effect>) -> Outputs {
    let mut outputs = Outputs::new();
    for effect in effects {
        if let Effect::Outputs(_, named) = effect {
            for named in named {
                let old = outputs.get(named.path.as_str()).map(|(class, _)| *class);
                if old.is_none_or(|old| named.class > old) {
                    outputs.insert(named.path.to_string(), (named.class, named));
                }
            }
        }
    }
    outputs
}

/// Plays a recorded stream of `bazel4` or `bazel7`.
async fn recorded(name: &str, policy: Policy) -> (Outputs, Vec<Effect>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bep").join(name);
    let mut file = EventFile::open(&path, false).await.unwrap();
    let mut build = Build::new(policy);
    let mut effects = Vec::new();
    while let Some(framed) = file.next().await.unwrap() {
        effects.extend(build.handle(0, framed.event));
    }
    effects.extend(build.end());
    (collect(effects.clone()), effects)
}

fn class_of(outputs: &Outputs, path: &str) -> Option<Class> {
    outputs
        .iter()
        .find(|(full, _)| full.ends_with(path))
        .map(|(_, (class, _))| *class)
}

const BAZELS: [&str; 2] = ["bazel4", "bazel7"];

#[tokio::test]
async fn a_build_requires_what_its_targets_give() {
    for bazel in BAZELS {
        let (outputs, effects) = recorded(&format!("{bazel}-build.bin"), Policy::default()).await;
        for path in [
            "bin/gen/one.txt",
            "bin/gen/many.d/second.txt",
            "bin/gen/empty.txt",
            "bin/rules/flat.d/1.txt",
            "bin/rules/nested.d/top.txt",
            "bin/rules/link.txt",
            "bin/rules/program",
            "bin/deep/er/down/here/leaf.txt",
        ] {
            assert_eq!(class_of(&outputs, path), Some(Class::Required), "{bazel} {path}");
        }
        // An empty tree is named by nothing but its root.
        let hollow = outputs
            .iter()
            .find(|(path, _)| path.ends_with("rules/hollow.d"))
            .unwrap();
        assert_eq!(hollow.1.1.content, OutputContent::Directory, "{bazel}");
        assert!(
            !outputs
                .keys()
                .any(|p| p.ends_with("flat.d") || p.ends_with("nested.d")),
            "{bazel}"
        );
        assert!(outputs.keys().all(|p| p.starts_with("bazel-out/")), "{bazel}");
        assert_eq!(
            class_of(&outputs, "gen/middle.txt"),
            None,
            "{bazel}: an intermediate output is not named"
        );
        assert!(effects.contains(&Effect::Finished { exit_code: 0 }), "{bazel}");
        assert!(
            !effects.iter().any(|e| matches!(e, Effect::Refused(_))),
            "{bazel}"
        );
        let started = effects
            .iter()
            .position(|e| matches!(e, Effect::Started(_)))
            .unwrap();
        let root = effects
            .iter()
            .position(|e| matches!(e, Effect::ExecRoot(_)))
            .unwrap();
        let first = effects
            .iter()
            .position(|e| matches!(e, Effect::Outputs(..)))
            .unwrap();
        assert!(
            started < root && root < first,
            "{bazel}: the root is known before any output"
        );
    }
}

#[tokio::test]
async fn a_null_build_names_everything_again() {
    for bazel in BAZELS {
        let (cold, _) = recorded(&format!("{bazel}-build.bin"), Policy::default()).await;
        let (null, _) = recorded(&format!("{bazel}-null.bin"), Policy::default()).await;
        let contents = |outputs: &Outputs| -> Vec<(String, OutputContent)> {
            outputs
                .iter()
                .map(|(path, (_, named))| (path.clone(), named.content.clone()))
                .collect()
        };
        assert_eq!(contents(&cold), contents(&null), "{bazel}");
    }
}

#[tokio::test]
async fn tests_require_their_outputs_and_leave_their_own_binaries() {
    for bazel in BAZELS {
        let (outputs, _) = recorded(&format!("{bazel}-test.bin"), Policy::default()).await;
        for path in [
            "testlogs/tests/pass/test.log",
            "testlogs/tests/sharded/shard_1_of_2/test.log",
            "testlogs/tests/sharded/shard_2_of_2/test.log",
            "testlogs/deep/er/deep_test/test.log",
        ] {
            assert_eq!(class_of(&outputs, path), Some(Class::Required), "{bazel} {path}");
        }
        if bazel == "bazel7" {
            // 4.2.3 does not name them for cached tests.
            for path in [
                "testlogs/tests/sharded/shard_2_of_2/test.xml",
                "testlogs/tests/outputs/test.outputs/outputs.zip",
                "testlogs/tests/outputs/test.outputs_manifest/MANIFEST",
            ] {
                assert_eq!(class_of(&outputs, path), Some(Class::Required), "{path}");
            }
        }
        assert_eq!(
            class_of(&outputs, "bin/tests/pass"),
            Some(Class::Known),
            "{bazel}"
        );
    }
}

#[tokio::test]
async fn runs_shards_and_attempts_have_places_of_their_own() {
    for bazel in BAZELS {
        let (outputs, _) = recorded(&format!("{bazel}-test-runs.bin"), Policy::default()).await;
        for path in [
            "testlogs/tests/pass/run_2_of_2/test.log",
            "testlogs/tests/sharded/shard_2_of_2_run_1_of_2/test.log",
        ] {
            assert_eq!(class_of(&outputs, path), Some(Class::Required), "{bazel} {path}");
        }
        let (outputs, _) = recorded(&format!("{bazel}-test-failing.bin"), Policy::default()).await;
        for path in [
            "testlogs/tests/fail/test.log",
            "testlogs/tests/flaky_pass/test.log",
            "testlogs/tests/flaky_pass/test_attempts/attempt_1.log",
            "testlogs/tests/flaky_fail/test.log",
            "testlogs/tests/flaky_fail/test_attempts/attempt_1.log",
            "testlogs/tests/flaky_fail/test_attempts/attempt_2.log",
        ] {
            assert_eq!(class_of(&outputs, path), Some(Class::Required), "{bazel} {path}");
        }
        let logs: Vec<_> = outputs
            .iter()
            .filter(|(path, _)| path.contains("flaky_pass") && path.ends_with(".log"))
            .collect();
        assert_ne!(
            logs[0].1.1.content, logs[1].1.1.content,
            "{bazel}: each attempt has its own log"
        );
    }
}

#[tokio::test]
async fn a_failing_target_gives_its_complete_groups() {
    for bazel in BAZELS {
        let (outputs, effects) = recorded(&format!("{bazel}-failing.bin"), Policy::default()).await;
        assert_eq!(
            class_of(&outputs, "bin/gen/one.txt"),
            Some(Class::Required),
            "{bazel}"
        );
        let good: Vec<_> = outputs
            .values()
            .filter(|(_, named)| &*named.group == "good")
            .collect();
        assert!(
            !good.is_empty() && good.iter().all(|(class, _)| *class == Class::Required),
            "{bazel}: {good:?}"
        );
        let failed = effects.iter().any(|effect| {
            matches!(effect, Effect::Target(target, TargetEnd::Completed { success: false, .. }, _) if target.label == "//rules:half")
        });
        assert!(failed, "{bazel}");
    }
}

#[tokio::test]
async fn groups_and_aspects_that_were_asked_for_count() {
    for bazel in BAZELS {
        let (outputs, effects) = recorded(&format!("{bazel}-groups.bin"), Policy::default()).await;
        let groups = |name: &str| {
            outputs
                .values()
                .filter(|(c, n)| &*n.group == name && *c == Class::Required)
                .count()
        };
        assert!(groups("extra") > 0 && groups("report") > 0, "{bazel}");
        let aspects = effects
            .iter()
            .any(|e| matches!(e, Effect::Target(t, ..) if !t.aspect.is_empty()));
        assert!(aspects, "{bazel}");
        let only = Policy {
            output_groups: vec!["extra".to_owned()],
            ..Policy::default()
        };
        let (outputs, _) = recorded(&format!("{bazel}-groups.bin"), only).await;
        assert!(
            outputs
                .values()
                .all(|(class, n)| (*class == Class::Required) == (&*n.group == "extra")),
            "{bazel}"
        );
    }
}

#[tokio::test]
async fn minimal_knows_everything_and_requires_what_is_picked() {
    let policy = Policy {
        mode: DownloadMode::Minimal,
        regexes: vec![".*/nested\\.d".parse().unwrap()],
        ..Policy::default()
    };
    for bazel in BAZELS {
        let (outputs, _) = recorded(&format!("{bazel}-build.bin"), policy.clone()).await;
        for (path, (class, named)) in &outputs {
            let picked = path.contains("nested.d/");
            assert_eq!(
                *class == Class::Required,
                picked,
                "{bazel} {path}: {}",
                named.rule
            );
        }
        assert!(outputs.keys().any(|path| path.contains("nested.d/")), "{bazel}");
    }
}

// Streams made by hand.

fn digest(text: &str) -> Digest {
    Digest::of(DigestFunction::Sha256, text.as_bytes())
}

fn file(name: &str) -> File {
    File {
        path: format!("bazel-out/k8/bin/{name}").into(),
        prefix_len: "bazel-out/k8/bin".len(),
        content: Content::Blob(digest(name)),
        uri: None,
    }
}

fn started() -> Event {
    Event::Started(Started {
        command: "build".to_owned(),
        invocation_id: "i".to_owned(),
        ..Started::default()
    })
}

fn root() -> Event {
    Event::ExecRoot("/ob/execroot/_main".to_owned())
}

fn set(id: &str, files: &[&str], children: &[&str]) -> Event {
    Event::NamedSet(NamedSet {
        id: id.to_owned(),
        files: files.iter().map(|name| file(name)).collect(),
        children: children.iter().map(|c| (*c).to_owned()).collect(),
        authority: None,
    })
}

fn completed(label: &str, sets: &[&str], incomplete: bool) -> Event {
    Event::Completed(Completed {
        target: TargetId {
            label: label.to_owned(),
            ..TargetId::default()
        },
        success: !incomplete,
        groups: vec![OutputGroup {
            name: "default".to_owned(),
            sets: sets.iter().map(|s| (*s).to_owned()).collect(),
            incomplete,
            ..OutputGroup::default()
        }],
        directories: Vec::new(),
    })
}

fn play(events: Vec<Event>) -> Vec<Effect> {
    let mut build = Build::new(Policy::default());
    let mut effects: Vec<Effect> = events
        .into_iter()
        .flat_map(|event| build.handle(0, event))
        .collect();
    effects.extend(build.end());
    effects
}

fn required(effects: &[Effect]) -> Vec<String> {
    collect(effects.to_vec())
        .into_iter()
        .filter(|(_, (class, _))| *class == Class::Required)
        .map(|(path, _)| path.trim_start_matches("bazel-out/k8/bin/").to_owned())
        .collect()
}

#[test]
fn the_order_of_events_does_not_matter() {
    let events = [
        started(),
        root(),
        set("0", &["a", "b"], &[]),
        set("1", &["c"], &["0"]),
        completed("//x", &["1"], false),
    ];
    for order in [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 4, 0, 3, 1], [3, 0, 1, 4, 2]] {
        let effects = play(order.iter().map(|&i| events[i].clone()).collect());
        assert_eq!(required(&effects), ["a", "b", "c"], "{order:?}");
        let root = effects
            .iter()
            .position(|e| matches!(e, Effect::ExecRoot(_)))
            .unwrap();
        let outputs = effects
            .iter()
            .position(|e| matches!(e, Effect::Outputs(..)))
            .unwrap();
        assert!(root < outputs, "{order:?}");
    }
}

#[test]
fn a_set_that_never_comes_counts_as_failed_and_the_rest_is_wanted() {
    let effects = play(vec![
        started(),
        root(),
        set("0", &["a"], &["9"]),
        completed("//x", &["0"], false),
    ]);
    assert_eq!(required(&effects), ["a"]);
    assert!(effects.iter().any(
        |e| matches!(e, Effect::Unusable(Class::Required, why) if why.contains("//x") && why.contains('9'))
    ));
}

#[test]
fn a_set_shared_by_many_targets_is_gone_through_once_a_class() {
    let mut events = vec![started(), root(), set("0", &["shared"], &[])];
    events.extend((0..50).map(|n| completed(&format!("//x:{n}"), &["0"], false)));
    // What was built of one that failed is wanted as much.
    events.push(completed("//x:broken", &["0"], true));
    let named: usize = play(events)
        .iter()
        .map(|e| {
            if let Effect::Outputs(_, named) = e {
                named.len()
            } else {
                0
            }
        })
        .sum();
    assert_eq!(named, 1);
}

#[test]
fn what_no_target_refers_to_is_still_known() {
    let effects = play(vec![started(), root(), set("0", &["orphan"], &[])]);
    let outputs = collect(effects);
    assert_eq!(class_of(&outputs, "orphan"), Some(Class::Known));
}

#[test]
fn among_many_trees_only_the_empty_ones_are_directories_of_their_own() {
    let trees = 40;
    let root_of = |tree: usize| file(&format!("t{tree}"));
    let full = (0..trees).filter(|tree| tree % 3 > 0);
    let set = NamedSet {
        id: "0".to_owned(),
        files: full.map(|tree| file(&format!("t{tree}/a/b"))).collect(),
        children: vec![],
        authority: None,
    };
    let complete = Completed {
        target: TargetId {
            label: "//x".to_owned(),
            ..TargetId::default()
        },
        success: true,
        groups: vec![OutputGroup {
            name: "default".to_owned(),
            sets: vec!["0".to_owned()],
            ..OutputGroup::default()
        }],
        directories: (0..trees).map(root_of).collect(),
    };
    let effects = play(vec![
        started(),
        root(),
        Event::NamedSet(set),
        Event::Completed(complete),
    ]);
    let outputs = collect(effects);
    for tree in 0..trees {
        let found = outputs.get(&format!("bazel-out/k8/bin/t{tree}"));
        let is_directory = found.is_some_and(|(_, named)| named.content == OutputContent::Directory);
        assert_eq!(is_directory, tree % 3 == 0, "{tree}");
    }
    assert_eq!(outputs.len(), trees);
}

#[test]
fn paths_that_lead_elsewhere_are_refused_or_left_alone() {
    let mut bad = file("x");
    bad.path = "bazel-out/../../etc/passwd".into();
    let mut source = file("y");
    (source.path, source.prefix_len) = ("pkg/source.sh".into(), 0);
    let mut external = file("z");
    external.path = "external/repo/z".into();
    let mut all = file("all");
    (all.path, all.prefix_len) = ("bazel-out".into(), 3);
    let set = NamedSet {
        id: "0".to_owned(),
        files: vec![bad, source, external, all, file("ok")],
        children: vec![],
        authority: None,
    };
    let effects = play(vec![
        started(),
        root(),
        Event::NamedSet(set),
        completed("//x", &["0"], false),
    ]);
    assert_eq!(required(&effects), ["ok"]);
    assert_eq!(collect(effects.clone()).len(), 1);
    assert!(
        effects
            .iter()
            .any(|e| matches!(e, Effect::Unusable(Class::Required, why) if why.contains("etc/passwd")))
    );
}

#[test]
fn a_tests_files_wait_for_its_summary_or_the_end() {
    let result = |shard| {
        Event::TestResult(TestResult {
            label: "//t:t".to_owned(),
            configuration: "c".to_owned(),
            run: 1,
            shard,
            attempt: 1,
            passed: true,
            files: vec![File {
                path: "test.log".into(),
                prefix_len: 0,
                content: Content::Blob(digest("log")),
                uri: None,
            }],
        })
    };
    let start = || {
        let test = Started {
            command: "test".to_owned(),
            ..Started::default()
        };
        let configuration = Event::Configuration {
            id: "c".to_owned(),
            mnemonic: "k8".to_owned(),
        };
        vec![Event::Started(test), root(), configuration, result(1)]
    };
    let summary = |shard_count| Event::TestSummary {
        label: "//t:t".to_owned(),
        configuration: "c".to_owned(),
        shard_count,
        run_count: 1,
    };
    let with = |more: Vec<Event>| required(&play(start().into_iter().chain(more).collect()));
    assert_eq!(with(vec![summary(0)]), ["bazel-out/k8/testlogs/t/t/test.log"]);
    // The summary knows of a shard whose result never came.
    assert_eq!(
        with(vec![summary(2)]),
        [
            "bazel-out/k8/testlogs/t/t/shard_1_of_2/test.log",
            "bazel-out/k8/testlogs/t/t/shard_1_of_2/test.shard",
        ]
    );
    let both = [
        "bazel-out/k8/testlogs/t/t/shard_1_of_2/test.log",
        "bazel-out/k8/testlogs/t/t/shard_1_of_2/test.shard",
        "bazel-out/k8/testlogs/t/t/shard_2_of_2/test.log",
        "bazel-out/k8/testlogs/t/t/shard_2_of_2/test.shard",
    ];
    assert_eq!(with(vec![result(2), result(2)]), both);
}

#[test]
fn a_target_aborted_after_its_completion_stays_what_it_was() {
    let target = Arc::new(TargetId {
        label: "//x".to_owned(),
        ..TargetId::default()
    });
    let abort = || Event::Aborted {
        target: Some((*target).clone()),
        reason: "SKIPPED".to_owned(),
        description: String::new(),
    };
    let effects = play(vec![started(), root(), abort(), abort()]);
    assert_eq!(
        effects
            .iter()
            .filter(|e| matches!(e, Effect::Target(_, TargetEnd::Aborted, _)))
            .count(),
        2
    );
}

#[test]
fn targets_that_were_given_up_for_others_failures_are_counted() {
    let aborted = |reason: &str| Event::Aborted {
        target: Some(TargetId {
            label: "//x".to_owned(),
            ..TargetId::default()
        }),
        reason: reason.to_owned(),
        description: String::new(),
    };
    for (mode, reason, is_said) in [
        ("minimal", "INCOMPLETE", true),
        ("minimal", "USER_INTERRUPTED", false),
        ("toplevel", "INCOMPLETE", false),
    ] {
        let line = CommandLine {
            label: "canonical".to_owned(),
            options: vec![("remote_download_outputs".to_owned(), mode.to_owned())],
        };
        let effects = play(vec![started(), Event::CommandLine(line), root(), aborted(reason)]);
        let said = effects.iter().any(|effect| {
            matches!(effect, Effect::Unusable(Class::Known, said) if said.starts_with("1 targets were not completed"))
        });
        assert_eq!(said, is_said, "{mode} {reason}");
    }
}

#[test]
fn outputs_that_the_build_tool_could_not_name_are_reported_at_the_end() {
    let unreadable = Event::Unreadable(vec![
        "/ob/execroot/_main/bazel-out/k8/bin/d/x".to_owned(),
        "/ob/execroot/_main/external/y".to_owned(),
        "/elsewhere/bazel-out/z".to_owned(),
    ]);
    let effects = play(vec![started(), unreadable, root(), completed("//x", &[], false)]);
    let unnamed = effects.iter().find_map(|e| match e {
        Effect::Unnamed(paths) => Some(paths.iter().map(ToString::to_string).collect::<Vec<_>>()),
        _ => None,
    });
    assert_eq!(unnamed, Some(vec!["bazel-out/k8/bin/d/x".to_owned()]));
}

/// Bazel says so only in a warning, which its user may have switched off. A group without outputs has no sets.
#[test]
fn a_target_whose_sets_have_no_files_is_told_at_the_end() {
    let hollow = |events: Vec<Event>| -> Vec<String> {
        let start = vec![started(), root()];
        let effects = play([start, events].concat());
        let of = |effect: &Effect| match effect {
            Effect::Hollow(target) => Some(target.label.clone()),
            _ => None,
        };
        effects.iter().filter_map(of).collect()
    };
    let empty = set("0", &[], &["1"]);
    assert_eq!(
        hollow(vec![
            empty.clone(),
            set("1", &[], &[]),
            completed("//x", &["0"], false)
        ]),
        ["//x"]
    );
    assert_eq!(
        hollow(vec![
            completed("//x", &["0"], false),
            set("1", &[], &[]),
            empty.clone()
        ]),
        ["//x"]
    );
    for others in [
        vec![
            empty.clone(),
            set("1", &["a"], &[]),
            completed("//x", &["0"], false),
        ],
        vec![completed("//x", &[], false)],
        // It has failed, or its sets have not come: that is another matter.
        vec![empty.clone(), set("1", &[], &[]), completed("//x", &["0"], true)],
        vec![empty.clone(), completed("//x", &["0"], false)],
        vec![completed("//x", &["0"], false)],
        // The build tool says why.
        vec![
            Event::Unreadable(vec!["/ob/execroot/_main/bazel-out/k8/bin/d/x".to_owned()]),
            set("0", &[], &[]),
            completed("//x", &["0"], false),
        ],
    ] {
        assert_eq!(hollow(others.clone()), Vec::<String>::new(), "{others:?}");
    }
}

#[test]
fn the_status_of_a_test_is_that_of_its_last_attempts() {
    let file = |name: &str| File {
        path: name.into(),
        prefix_len: 0,
        content: Content::Blob(digest(name)),
        uri: None,
    };
    let result = |label: &str, shard, attempt, passed| {
        Event::TestResult(TestResult {
            label: label.to_owned(),
            configuration: "c".to_owned(),
            run: 1,
            shard,
            attempt,
            passed,
            files: vec![file("test.log")],
        })
    };
    let summary = |label: &str, shard_count| Event::TestSummary {
        label: label.to_owned(),
        configuration: "c".to_owned(),
        shard_count,
        run_count: 1,
    };
    let rules = ["required test-output status=failed", "known test-output"];
    let mut build = Build::new(Policy {
        rules: rules.iter().map(|rule| rule.parse().unwrap()).collect(),
        ..Policy::default()
    });
    let test = Started {
        command: "test".to_owned(),
        ..Started::default()
    };
    let events = [
        Event::Started(test),
        root(),
        Event::Configuration {
            id: "c".to_owned(),
            mnemonic: "k8".to_owned(),
        },
        result("//t:passed", 1, 1, true),
        summary("//t:passed", 1),
        result("//t:flaky", 1, 1, false),
        result("//t:flaky", 1, 2, true),
        summary("//t:flaky", 1),
        result("//t:half", 1, 1, true),
        result("//t:half", 2, 1, false),
        summary("//t:half", 2),
    ];
    let effects: Vec<Effect> = (1..)
        .zip(events)
        .flat_map(|(number, event)| build.handle(number, event))
        .collect();
    let half = [
        "shard_1_of_2/test.log",
        "shard_1_of_2/test.shard",
        "shard_2_of_2/test.log",
    ];
    assert_eq!(
        required(&effects),
        half.map(|name| format!("bazel-out/k8/testlogs/t/half/{name}"))
    );
}
