//! Streams that no build tool sends. Each comes to its end in time that grows with its length alone: a test here that
//! takes minutes has found something that does not.

use super::*;
use crate::invocation::limits::BuildLimits;

/// Sets, targets and results: enough that a step for each pair of them would never end.
const MANY: usize = 50_000;

fn build() -> Build {
    let mut build = Build::new(Policy::default());
    build.handle(1, started());
    build.handle(2, root());
    build
}

fn names(effects: &[Effect]) -> usize {
    let count = |effect: &Effect| match effect {
        Effect::Outputs(_, named) => named.len(),
        _ => 0,
    };
    effects.iter().map(count).sum()
}

fn ends(effects: &[Effect]) -> usize {
    effects.iter().filter(|e| matches!(e, Effect::Target(..))).count()
}

#[test]
fn a_chain_of_sets_is_gone_through_whichever_end_comes_first() {
    for reversed in [false, true] {
        let mut build = build();
        let mut effects = build.handle(3, completed("//top", &[&(MANY - 1).to_string()], false));
        assert_eq!(ends(&effects), 0, "it waits for its sets");
        for n in 0..MANY {
            let id = if reversed { MANY - 1 - n } else { n };
            let below: Vec<String> = id.checked_sub(1).map(|id| id.to_string()).into_iter().collect();
            let below: Vec<&str> = below.iter().map(String::as_str).collect();
            effects.extend(build.handle(4, set(&id.to_string(), &[&format!("f{id}")], &below)));
        }
        assert_eq!((names(&effects), ends(&effects)), (MANY, 1));
        assert_eq!(names(&build.end()), 0);
    }
}

#[test]
fn targets_that_share_all_of_their_sets_name_each_file_once() {
    let mut build = build();
    let sets: Vec<String> = (0..300).map(|n| n.to_string()).collect();
    let ids: Vec<&str> = sets.iter().map(String::as_str).collect();
    for id in &ids {
        build.handle(3, set(id, &[id], &[]));
    }
    build.handle(4, set("all", &[], &ids));
    let mut effects = Vec::new();
    for n in 0..MANY as i64 {
        effects.extend(build.handle(5 + n, completed(&format!("//t:{n}"), &["all"], false)));
    }
    assert_eq!((names(&effects), ends(&effects)), (ids.len(), MANY));
    // None of it can be downloaded, and each is asked how much that is.
    for id in 0..ids.len() {
        let Some(Effect::Outputs(_, named)) = effects.first() else {
            panic!("no outputs")
        };
        build.fail_set(named[id].set.unwrap());
    }
    for n in 0..MANY {
        let target = TargetId {
            label: format!("//t:{n}"),
            ..TargetId::default()
        };
        assert!(build.failures(&target) > 0, "{n}");
    }
}

#[test]
fn cycles_dangling_references_and_repetitions_come_to_an_end() {
    let mut build = build();
    for (id, files, children) in [
        ("self", vec!["s"], vec!["self", "self"]),
        ("a", vec!["a"], vec!["b"]),
        ("b", vec!["b"], vec!["a", "nowhere"]),
        // The first one counts.
        ("a", vec!["other"], vec![]),
    ] {
        build.handle(3, set(id, &files, &children));
    }
    let mut effects = build.handle(4, completed("//cycle", &["self"], false));
    effects.extend(build.handle(
        5,
        completed("//both", &["a", "a", "b", "nowhere", "nothing"], false),
    ));
    assert_eq!(ends(&effects), 0);
    effects.extend(build.end());
    assert_eq!((names(&effects), ends(&effects)), (3, 2));
    let is_reported = |text: &str| {
        let reported =
            |e: &&Effect| matches!(e, Effect::Refused(why) | Effect::Unusable(_, why) if why.contains(text));
        effects.iter().any(|e| reported(&e))
    };
    assert!(is_reported(
        "//cycle refers to named sets of files that include each other"
    ));
    assert!(is_reported(
        "//both refers to named sets of files that were never sent: "
    ));
    // A broken stream that goes on, with unknown sets.
    let unknown: Vec<String> = (0..MANY).map(|n| format!("unknown {n}")).collect();
    let unknown: Vec<&str> = unknown.iter().map(String::as_str).collect();
    assert_eq!(ends(&build.handle(6, completed("//late", &unknown, false))), 1);
}

#[test]
fn very_many_results_of_one_test_all_find_their_places() {
    let mut build = Build::new(Policy::default());
    build.handle(
        1,
        Event::Started(Started {
            command: "test".to_owned(),
            ..Started::default()
        }),
    );
    build.handle(2, root());
    let result = |run: usize| {
        let mut log = file("test.log");
        (log.path, log.prefix_len) = (
            "bazel-out/k8/testlogs/test.log".into(),
            "bazel-out/k8/testlogs".len(),
        );
        Event::TestResult(TestResult {
            label: "//a:t".to_owned(),
            run: run as u32,
            shard: 1,
            attempt: 1,
            files: vec![log],
            ..TestResult::default()
        })
    };
    for n in 0..MANY {
        build.handle(3 + n as i64, result(n + 1));
    }
    // Again: they replace what they repeat.
    for n in 0..100 {
        build.handle((3 + MANY + n) as i64, result(n + 1));
    }
    let effects = build.handle(
        i64::MAX - 1,
        Event::TestSummary {
            label: "//a:t".to_owned(),
            configuration: String::new(),
            shard_count: 0,
            run_count: u32::MAX,
        },
    );
    assert_eq!(names(&effects), MANY);
    assert_eq!(build.lowest_open(), None);
}

#[test]
fn beyond_a_limit_a_stream_is_read_to_its_end_and_no_more_is_kept() {
    let policy = Policy {
        limits: BuildLimits {
            targets: 10,
            ..BuildLimits::default()
        },
        ..Policy::default()
    };
    let mut build = Build::new(policy);
    build.handle(1, started());
    build.handle(2, root());
    build.handle(3, set("0", &["a"], &[]));
    let mut effects = Vec::new();
    for n in 0..1000 {
        effects.extend(build.handle(4 + n, completed(&format!("//t:{n}"), &["0"], false)));
        effects.extend(build.handle(4 + n, set(&format!("s{n}"), &["b"], &[])));
    }
    assert_eq!(ends(&effects), 10);
    let reported: Vec<_> = effects
        .iter()
        .filter_map(|e| match e {
            Effect::Unusable(Class::Required, reason) => Some(reason.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(reported.len(), 1, "{reported:?}");
    assert!(reported[0].contains("--limit=targets="), "{reported:?}");
    let finished = Event::Finished {
        exit_code: 0,
        name: String::new(),
        ended_ms: 0,
    };
    assert_eq!(build.handle(5000, finished), [Effect::Finished { exit_code: 0 }]);
    assert_eq!(build.lowest_open(), None);
}

#[test]
fn paths_that_lead_elsewhere_are_refused_and_the_others_named() {
    let bad = [
        "../../etc/passwd",
        "/etc/passwd",
        "",
        ".",
        "a/../../../b",
        "a//b",
        "a/./b",
        "a\0b",
        "a/",
    ];
    let long = ["n".repeat(256), "d/".repeat(2100) + "x"];
    // Odd, and files nevertheless.
    let odd = [
        "a\nb",
        "\u{1b}[2J",
        "A",
        "a",
        ".outhaul-tmp/x",
        "..a",
        "con",
        " ",
        "é",
        "e\u{301}",
    ];
    let mut files = Vec::new();
    for name in bad
        .iter()
        .copied()
        .chain(long.iter().map(String::as_str))
        .chain(odd)
    {
        files.push(name);
    }
    let effects = play(vec![
        started(),
        root(),
        set("0", &files, &[]),
        completed("//x", &["0"], false),
    ]);
    assert_eq!(names(&effects), odd.len());
    let refused = effects
        .iter()
        .filter(|e| matches!(e, Effect::Unusable(..)))
        .count();
    assert_eq!(refused, bad.len() + long.len(), "{effects:?}");
}
