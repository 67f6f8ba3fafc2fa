//! Which events are open, and what sets stand for.

use super::*;

#[test]
fn an_event_is_open_until_its_outputs_are_reported() {
    let mut build = Build::new(Policy::default());
    // Waits for the command and the root, then for a set.
    build.handle(1, completed("//x", &["0"], false));
    assert_eq!(build.lowest_open(), Some(1));
    build.handle(2, started());
    build.handle(3, root());
    assert_eq!(build.lowest_open(), Some(1));
    let effects = build.handle(4, set("0", &["a"], &[]));
    assert_eq!(build.lowest_open(), None);
    let numbers = effects.iter().filter_map(|effect| match effect {
        Effect::Outputs(_, named) => Some(named[0].sequence),
        Effect::Target(_, _, sequence) => Some(*sequence),
        _ => None,
    });
    assert_eq!(
        numbers.collect::<Vec<_>>(),
        [1, 1],
        "the target's number, not the set's"
    );
}

#[test]
fn a_test_result_is_open_until_the_summary_says_where_its_files_belong() {
    let mut build = Build::new(Policy::default());
    build.handle(1, started());
    build.handle(2, root());
    let result = TestResult {
        label: "//x".to_owned(),
        run: 1,
        shard: 1,
        attempt: 1,
        files: vec![File {
            path: "bazel-out/k8/testlogs/test.log".into(),
            prefix_len: "bazel-out/k8/testlogs".len(),
            content: Content::Blob(digest("log")),
            uri: None,
        }],
        ..TestResult::default()
    };
    build.handle(3, Event::TestResult(result.clone()));
    build.handle(
        4,
        Event::TestResult(TestResult {
            shard: 2,
            ..result.clone()
        }),
    );
    // A repeated one takes the place of the first.
    build.handle(5, Event::TestResult(result));
    assert_eq!(build.lowest_open(), Some(4));
    let effects = build.handle(
        6,
        Event::TestSummary {
            label: "//x".to_owned(),
            configuration: String::new(),
            shard_count: 2,
            run_count: 1,
        },
    );
    assert_eq!(build.lowest_open(), None);
    assert!(
        effects
            .iter()
            .any(|e| matches!(e, Effect::Tested(t, 6) if t.label == "//x"))
    );
    // Then they are on their way, and hold back the results that named them.
    let mut numbers = Vec::new();
    for effect in &effects {
        if let Effect::Outputs(_, named) = effect {
            numbers.extend(named.iter().map(|n| n.sequence));
        }
    }
    numbers.sort_unstable();
    assert_eq!(numbers, [4, 5]);
}

#[test]
fn held_sets_are_open_until_a_target_refers_to_them() {
    let mut build = Build::new(Policy::default()).holding_sets(true);
    build.handle(1, started());
    build.handle(2, root());
    build.handle(3, set("0", &["a"], &[]));
    build.handle(4, set("1", &["b"], &["0"]));
    build.handle(5, set("2", &["c"], &[]));
    assert_eq!(build.lowest_open(), Some(3));
    let effects = build.handle(6, completed("//x", &["1"], false));
    assert_eq!(build.lowest_open(), Some(5));
    let mut numbers = Vec::new();
    for effect in &effects {
        if let Effect::Outputs(_, named) = effect {
            numbers.extend(named.iter().map(|n| n.sequence));
        }
    }
    numbers.sort_unstable();
    assert_eq!(numbers, [3, 4]);
    build.end();
    assert_eq!(build.lowest_open(), None);
}

#[test]
fn what_a_set_stands_for_counts_for_every_target_that_reaches_it() {
    let mut build = Build::new(Policy::default());
    build.handle(1, started());
    build.handle(2, root());
    build.handle(3, set("0", &["a"], &[]));
    build.handle(4, set("1", &["b"], &["0"]));
    let effects = build.handle(5, completed("//x", &["0"], false));
    build.handle(6, completed("//y", &["1"], false));
    build.handle(7, completed("//z", &[], false));
    let Some(Effect::Outputs(_, named)) = effects.first() else {
        panic!("{effects:?}")
    };
    for _ in 0..3 {
        build.fail_set(named[0].set.unwrap());
    }
    let mut sum = |label: &str| {
        let target = TargetId {
            label: label.to_owned(),
            ..TargetId::default()
        };
        build.failures(&target)
    };
    assert_eq!(
        (sum("//x"), sum("//y"), sum("//z"), sum("//unknown")),
        (3, 3, 0, 0)
    );
}
