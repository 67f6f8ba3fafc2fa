use super::*;

/// A value by its name, as commands print it.
fn value(prefix: &str, name: &str) -> String {
    format!("{prefix}_{}", name.to_ascii_uppercase())
}

const LINT: &str = "//tools:lint.bzl%lint";

fn target(label: &str, aspect: &str, state: &str) -> pb::Target {
    pb::Target {
        label: label.to_owned(),
        aspect: aspect.to_owned(),
        configuration: "c".to_owned(),
        state: pb::TargetState::from_str_name(&value("TARGET_STATE", state))
            .unwrap()
            .into(),
        success: true,
        required: 2,
        ..pb::Target::default()
    }
}

fn known(label: &str, aspect: &str) -> Event {
    Event::TargetKnown(target(label, aspect, "completed"))
}

fn settled(label: &str, aspect: &str) -> Event {
    Event::TargetSettled(target(label, aspect, "settled"))
}

fn failed(label: &str) -> Event {
    Event::TargetSettled(pb::Target {
        failed: 1,
        ..target(label, "", "failed")
    })
}

fn aborted(label: &str) -> Event {
    Event::TargetSettled(pb::Target {
        success: false,
        ..target(label, "", "aborted")
    })
}

fn invocation(state: &str, exit_code: Option<i32>) -> pb::Invocation {
    pb::Invocation {
        invocation_id: "i".to_owned(),
        state: pb::InvocationState::from_str_name(&value("INVOCATION_STATE", state))
            .unwrap()
            .into(),
        exit_code,
        ..pb::Invocation::default()
    }
}

fn over() -> Event {
    Event::Settled(invocation("settled", Some(0)))
}

fn end(label: &str, outcome: &str) -> Event {
    Event::Output(pb::OutputEnd {
        exec_path: "bazel-out/x".to_owned(),
        label: label.to_owned(),
        class: pb::OutputClass::Required.into(),
        outcome: pb::OutputOutcome::from_str_name(&value("OUTPUT_OUTCOME", outcome))
            .unwrap()
            .into(),
        error: "why".to_owned(),
        ..pb::OutputEnd::default()
    })
}

/// Feeds events up to the answer, which must come with the last of them and not before.
#[track_caller]
fn judged(patterns: &[&str], events: &[Event]) -> pb::WaitResponse {
    let mut judge = Judge::new(patterns).unwrap();
    let (last, before) = events.split_last().unwrap();
    for event in before {
        assert_eq!(judge.take(event), None, "over too early, at {event:?}");
    }
    judge.take(last).expect("over")
}

#[track_caller]
fn result(patterns: &[&str], events: &[Event]) -> String {
    judged(patterns, events).result().name()
}

#[test]
fn a_named_target_is_over_when_it_is_settled_whatever_else_goes_on() {
    let events = [known("//a:x", ""), failed("//a:y"), settled("//a:x", "")];
    let answer = judged(&["//a:x"], &events);
    assert_eq!(answer.result().name(), "settled");
    assert_eq!(answer.targets.len(), 1, "only what was waited for is told");
    assert_eq!(
        result(&["//a:y"], &[known("//a:y", ""), failed("//a:y")]),
        "failed"
    );
    let both = [settled("//a:x", ""), known("//a:y", ""), settled("//a:y", "")];
    assert_eq!(result(&["//a:x", "//a:y"], &both), "settled");
}

#[test]
fn a_label_stands_for_its_aspects_and_an_aspect_for_itself() {
    let events = [known("//a:x", LINT), settled("//a:x", ""), settled("//a:x", LINT)];
    assert_eq!(result(&["//a:x"], &events), "settled");
    for asked in ["//a:x%lint", &format!("//a:x%{LINT}"), &format!("//a:x%@{LINT}")] {
        let events = [settled("//a:x", ""), known("//a:x", LINT), settled("//a:x", LINT)];
        let answer = judged(&[asked], &events);
        assert_eq!(
            (&*answer.result().name(), answer.targets.len()),
            ("settled", 1),
            "{asked}"
        );
    }
    let answer = judged(&["//a:x%other"], &[settled("//a:x", LINT), over()]);
    assert_eq!(
        (&*answer.result().name(), &answer.not_found[..]),
        ("not_found", &["//a:x%other".to_owned()][..])
    );
}

#[test]
fn wildcards_wait_for_the_build_since_more_may_match() {
    for pattern in ["//a:all", "//a/...", "//..."] {
        assert_eq!(result(&[pattern], &[settled("//a:x", ""), over()]), "settled");
    }
    let mixed = [settled("//a:x", ""), failed("//b:y"), over()];
    assert_eq!(
        result(&["//a:all"], &mixed),
        "settled",
        "others' failures do not count"
    );
    let answer = judged(&["//..."], &mixed);
    assert_eq!(answer.result().name(), "failed");
    assert_eq!(answer.targets[0].label, "//b:y", "what failed comes first");
    assert_eq!(
        answer.failures,
        ["//b:y: 1 of 2 required outputs could not be downloaded"]
    );
    assert_eq!(result(&["//...", "-//b/..."], &mixed), "settled");
}

#[test]
fn what_the_build_never_had_is_named() {
    let answer = judged(&["//a:x", "//a:z", "//q/..."], &[settled("//a:x", ""), over()]);
    assert_eq!(
        (&*answer.result().name(), answer.not_found),
        ("not_found", vec!["//a:z".to_owned(), "//q/...".to_owned()])
    );
    let answer = judged(&["//a:y", "//a:z"], &[failed("//a:y"), over()]);
    assert_eq!(answer.result().name(), "failed", "a failure weighs more");
}

#[test]
fn what_is_not_built_has_failed() {
    let unbuilt = pb::Target {
        success: false,
        ..target("//a:x", "", "failed")
    };
    let answer = judged(&["//a:x"], &[Event::TargetSettled(unbuilt)]);
    assert_eq!(
        (&*answer.result().name(), &*answer.failures[0]),
        ("failed", "//a:x: was not built")
    );
    assert_eq!(result(&["//a:x"], &[aborted("//a:x")]), "failed");
    let hanging = [known("//a:x", ""), over()];
    assert_eq!(result(&["//a:x"], &hanging), "failed");
}

#[test]
fn skipped_targets_fail_only_who_names_them() {
    let events = [aborted("//a:x"), settled("//a:y", ""), over()];
    assert_eq!(result(&[], &events), "settled");
    assert_eq!(result(&["//..."], &events), "settled");
    assert_eq!(result(&["//a:x", "//a:y"], &events[..2]), "failed");
    let broken = [aborted("//a:x"), Event::Settled(invocation("settled", Some(1)))];
    assert_eq!(result(&["//..."], &broken), "failed");
}

#[test]
fn the_whole_build_counts_everything() {
    assert_eq!(result(&[], &[settled("//a:x", ""), over()]), "settled");
    for (state, code, expected) in [
        ("settled", Some(0), "settled"),
        ("settled", Some(3), "settled"),
        ("settled", Some(1), "failed"),
        ("interrupted", None, "failed"),
        ("superseded", Some(0), "failed"),
    ] {
        let events = [settled("//a:x", ""), Event::Settled(invocation(state, code))];
        assert_eq!(result(&[], &events), expected, "{state} {code:?}");
    }
    let mut lost = invocation("settled", Some(0));
    lost.failed = 1;
    lost.errors = vec!["bazel-out/x: no space".to_owned()];
    let answer = judged(&[], &[Event::Settled(lost)]);
    assert_eq!(
        (&*answer.result().name(), answer.failures),
        ("failed", vec!["bazel-out/x: no space".to_owned()])
    );
}

#[test]
fn what_a_newer_build_took_over_is_not_called_present() {
    let before = [
        settled("//a:x", ""),
        end("//a:y", "superseded"),
        settled("//a:y", ""),
    ];
    let answer = judged(&["//a:x", "//a:y"], &before);
    assert_eq!(answer.result().name(), "failed");
    assert_eq!(
        answer.failures,
        ["//a:y: outputs are superseded by a newer build"]
    );
    let mut late = invocation("superseded", Some(0));
    late.superseded = 3;
    assert_eq!(
        result(&["//a:x"], &[Event::Invocation(late), settled("//a:x", "")]),
        "failed"
    );
}

#[test]
fn outputs_that_could_not_be_had_are_told_with_their_targets() {
    let events = [end("//a:x", "evicted"), end("//b:y", "failed"), failed("//a:x")];
    let answer = judged(&["//a:x"], &events);
    assert_eq!(
        answer.failures,
        [
            "//a:x: 1 of 2 required outputs could not be downloaded",
            "bazel-out/x: evicted: why"
        ]
    );
}

#[test]
fn a_timeout_tells_what_there_is() {
    let mut judge = Judge::new(&["//a:x"]).unwrap();
    assert_eq!(judge.timed_out().invocation, None);
    judge.take(&Event::Invocation(invocation("running", None)));
    judge.take(&known("//a:x", ""));
    let answer = judge.timed_out();
    assert_eq!(answer.result().name(), "timed_out");
    assert_eq!(answer.targets.len(), 1);
    assert!(answer.failures.is_empty() && answer.invocation.is_some());
}

#[test]
fn targets_told_again_behind_a_gap_count_once() {
    let events = [
        known("//a:x", ""),
        settled("//a:y", ""),
        Event::Lagged(pb::Lagged {}),
        settled("//a:y", ""),
        settled("//a:x", ""),
    ];
    let answer = judged(&["//a:x", "//a:y"], &events);
    assert_eq!((&*answer.result().name(), answer.targets.len()), ("settled", 2));
}

#[test]
fn a_long_list_is_cut_and_the_cut_is_told() {
    let mut judge = Judge::new::<&str>(&[]).unwrap();
    for n in 0..TARGETS + 5 {
        judge.take(&settled(&format!("//a:{n}"), ""));
    }
    judge.take(&failed("//z:last"));
    let answer = judge.take(&over()).unwrap();
    assert_eq!((answer.targets.len(), answer.targets_left_out), (TARGETS, 6));
    assert_eq!(answer.targets[0].label, "//z:last");
}

#[test]
fn what_is_no_pattern_is_refused() {
    for text in ["a:b", "//a:", "//a...%lint"] {
        Judge::new(&[text]).expect_err(text);
    }
}

#[test]
fn a_label_is_over_when_it_is_in_all_its_configurations() {
    let in_configuration = |configuration: &str, state: &str| pb::Target {
        configuration: configuration.to_owned(),
        ..target("//:a", "", state)
    };
    let announced = |configuration| Event::TargetKnown(in_configuration(configuration, "announced"));
    let settled = |configuration| Event::TargetSettled(in_configuration(configuration, "settled"));
    let events = [announced("one"), announced("two"), settled("two"), settled("one")];
    assert_eq!(result(&["//:a"], &events), "settled");
}
