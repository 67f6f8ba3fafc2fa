use std::time::Duration;

use insta::assert_snapshot;
use ratatui::{Terminal, backend::TestBackend, crossterm::event::KeyCode};

use super::*;
use crate::{
    cli::top::{
        look::{Answer, Subject, Told},
        screen::tests::press,
    },
    printable::is_plain,
};

/// When all of this is.
const NOW: i64 = 1_700_000_060_000;

fn theme() -> Theme {
    Theme {
        has_colours: true,
        address: "/state/control.sock".to_owned(),
        now_ms: Some(NOW),
    }
}

fn terminal(top: &mut Top, theme: &Theme, width: u16, height: u16) -> Terminal<TestBackend> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, top, theme)).unwrap();
    terminal
}

fn shown(top: &mut Top, width: u16, height: u16) -> String {
    terminal(top, &theme(), width, height).backend().to_string()
}

fn connected() -> Top {
    let mut top = Top::default();
    top.take(Told::Connected, Duration::ZERO);
    top
}

fn running() -> pb::Invocation {
    pb::Invocation {
        invocation_id: "4d31".to_owned(),
        command: "build".to_owned(),
        workspace: "/home/me/src".to_owned(),
        state: pb::InvocationState::Running.into(),
        started_ms: NOW - 12_000,
        downloaded: 1200,
        downloaded_bytes: 30 << 20,
        present: 34,
        known: 5,
        remote_cache: "grpcs://cache.example".to_owned(),
        ..pb::Invocation::default()
    }
}

fn failed() -> pb::Invocation {
    pb::Invocation {
        invocation_id: "77aa".to_owned(),
        command: "test".to_owned(),
        workspace: "/home/me/src".to_owned(),
        state: pb::InvocationState::Settled.into(),
        started_ms: NOW - 300_000,
        settled_ms: NOW - 200_000,
        exit_code: Some(3),
        downloaded: 10,
        downloaded_bytes: 4096,
        failed: 2,
        hold_us: 1_500_000,
        errors: vec![
            "bazel-out/k8-fastbuild/bin/app/app: the cache does not have the blob \
             0123456789012345678901234567890123456789012345678901234567890123/77; build //app:app again"
                .to_owned(),
        ],
        evicted: 3,
        evicted_target_count: 4,
        evicted_targets: vec!["//app:app".to_owned(), "//lib:lib".to_owned()],
        ..pb::Invocation::default()
    }
}

fn target(label: &str, state: pb::TargetState, failed: u64) -> pb::Target {
    pb::Target {
        label: label.to_owned(),
        state: state.into(),
        required: 4,
        optional: 1,
        failed,
        ..pb::Target::default()
    }
}

/// The screen of a build.
fn of_build(seen: Seen) -> Top {
    let mut top = connected();
    let list = vec![seen.build.clone()];
    top.take(
        Told::Answer(Subject::Builds, Answer::Builds(list)),
        Duration::ZERO,
    );
    press(&mut top, [KeyCode::Enter]);
    let mut before = seen.build.clone();
    before.downloaded_bytes /= 2;
    let subject = Subject::Build(seen.build.invocation_id.clone());
    let before = Seen {
        build: before,
        ..Seen::default()
    };
    for (second, seen) in [(0, before), (10, seen)] {
        let answer = Answer::Build(Box::new(seen));
        top.take(Told::Answer(subject.clone(), answer), Duration::from_secs(second));
    }
    top
}

fn seen_running() -> Seen {
    let output = |path: &str, bytes| pb::PendingOutput {
        exec_path: path.to_owned(),
        label: "//app:app".to_owned(),
        bytes,
        ..pb::PendingOutput::default()
    };
    Seen {
        build: running(),
        waiting: pb::Waiting {
            hold_until_ms: NOW + 588_000,
            hold_limit: "--hold-timeout=600s".to_owned(),
            required: 300,
            optional: 6,
            bytes: 30 << 20,
            outputs: vec![
                output("bazel-out/k8-fastbuild/bin/app/app", 20 << 20),
                output("bazel-out/k8-fastbuild/bin/app/lib.a", 1 << 20),
            ],
        },
        targets: vec![
            target("//app:app", pb::TargetState::Completed, 0),
            target("//lib:lib", pb::TargetState::Settled, 0),
        ],
        all_targets: 2,
    }
}

fn seen_failed() -> Seen {
    Seen {
        build: failed(),
        targets: vec![target("//app:app", pb::TargetState::Failed, 2)],
        all_targets: 100_000,
        ..Seen::default()
    }
}

#[test]
fn nothing_is_known_before_a_daemon_answers() {
    let mut top = Top::default();
    assert_snapshot!("connecting", shown(&mut top, 80, 6));
    let reason = "Connection refused (os error 111)".to_owned();
    top.take(Told::Lost(reason), Duration::ZERO);
    assert_snapshot!("lost", shown(&mut top, 60, 6));
}

#[test]
fn it_is_said_above_all_else_that_downloads_are_paused() {
    let mut top = connected();
    let pause = pb::Pause {
        all: true,
        until_ms: 0,
    };
    top.take(Told::Paused(Some(pause)), Duration::ZERO);
    let screen = shown(&mut top, 100, 6);
    assert!(
        screen.contains("all downloads are paused (`outhaul pause --all`)"),
        "{screen}"
    );
    top.take(Told::Paused(None), Duration::ZERO);
    let screen = shown(&mut top, 100, 6);
    assert!(!screen.contains("paused"), "{screen}");
}

#[test]
fn builds_or_that_there_are_none() {
    let mut top = connected();
    let list = |list| Told::Answer(Subject::Builds, Answer::Builds(list));
    top.take(list(Vec::new()), Duration::ZERO);
    assert_snapshot!("no_builds", shown(&mut top, 80, 6));
    let draining = pb::Invocation {
        command: String::new(),
        state: pb::InvocationState::Draining.into(),
        ..running()
    };
    top.take(list(vec![running(), draining, failed()]), Duration::ZERO);
    press(&mut top, [KeyCode::Down]);
    assert_snapshot!("builds", shown(&mut top, 100, 8));
    assert_snapshot!("builds_narrow", shown(&mut top, 40, 8));
}

#[test]
fn one_build_while_it_runs_and_when_it_has_failed() {
    assert_snapshot!("build_running", shown(&mut of_build(seen_running()), 80, 24));
    assert_snapshot!("build_failed", shown(&mut of_build(seen_failed()), 80, 24));
    assert_snapshot!("build_narrow", shown(&mut of_build(seen_running()), 32, 24));
}

#[test]
fn what_does_not_fit_is_scrolled_and_no_further_than_to_its_end() {
    let mut seen = seen_failed();
    let label = |n| format!("//:t{n}");
    seen.targets = (0..50)
        .map(|n| target(&label(n), pb::TargetState::Settled, 0))
        .collect();
    let mut top = of_build(seen);
    assert!(!shown(&mut top, 80, 24).contains("//:t49 "));
    press(&mut top, [KeyCode::End]);
    let end = shown(&mut top, 80, 24);
    assert!(end.contains("//:t49 ") && !end.contains("//:t10 "), "{end}");
    press(&mut top, [KeyCode::Up]);
    let above = shown(&mut top, 80, 24);
    assert!(!above.contains("//:t49 ") && above.contains("//:t48 "), "{above}");
    press(&mut top, [KeyCode::Home]);
    assert!(shown(&mut top, 80, 24).contains("failed  test"));
}

#[test]
fn wide_characters_and_long_names_keep_their_columns() {
    let mut build = failed();
    build.workspace = format!("/home/{}/ワークスペース/日本語", "long".repeat(40));
    let label = format!("//{}:日本語のターゲット", "パッケージ/".repeat(12));
    let seen = Seen {
        targets: vec![target(&label, pb::TargetState::Settled, 0)],
        all_targets: 1,
        build: build.clone(),
        ..Seen::default()
    };
    assert_snapshot!("build_wide_characters", shown(&mut of_build(seen), 60, 24));
    let mut top = connected();
    let told = Told::Answer(Subject::Builds, Answer::Builds(vec![build]));
    top.take(told, Duration::ZERO);
    assert_snapshot!("builds_wide_characters", shown(&mut top, 80, 5));
}

#[test]
fn hostile_names_write_nothing_but_themselves() {
    let name = "a\nb\u{1b}[2J\u{9b}\u{202e}\u{7}";
    let mut seen = seen_running();
    let build = &mut seen.build;
    for field in [
        &mut build.command,
        &mut build.workspace,
        &mut build.remote_cache,
        &mut build.invocation_id,
    ] {
        *field = name.to_owned();
    }
    build.stores.insert(name.to_owned(), 1);
    build.errors = vec![name.to_owned()];
    (build.evicted, build.evicted_targets) = (1, vec![name.to_owned()]);
    seen.waiting.hold_limit = name.to_owned();
    seen.waiting.outputs[0].exec_path = name.to_owned();
    seen.targets[0].label = name.to_owned();
    seen.targets[0].aspect = name.to_owned();
    let found = pb::Output {
        exec_path: name.to_owned(),
        label: name.to_owned(),
        ..pb::Output::default()
    };
    let why = pb::why_response::Answer {
        output: Some(found.clone()),
        lines: vec![name.to_owned()],
    };
    let caches = Caches {
        standing: vec![pb::list_caches_response::Cache {
            name: name.to_owned(),
            passed_over_ms: Some(7),
            reason: name.to_owned(),
        }],
        given: vec![pb::report_response::Entry {
            name: name.to_owned(),
            ..pb::report_response::Entry::default()
        }],
    };
    let usage = pb::DiskUsageResponse {
        entries: vec![pb::disk_usage_response::Entry {
            name: name.to_owned(),
            ..pb::disk_usage_response::Entry::default()
        }],
        ..pb::DiskUsageResponse::default()
    };
    let mut screens = vec![of_build(seen)];
    for content in [
        Content::Outputs(pb::FindOutputsResponse {
            outputs: vec![found],
            more: true,
        }),
        Content::Output(Box::new(why)),
        Content::Caches(caches),
        Content::Disk(usage),
        Content::Nothing(name.to_owned()),
    ] {
        let mut top = connected();
        top.screen().content = content;
        screens.push(top);
    }
    let mut lost = connected();
    lost.take(Told::Lost(name.to_owned()), Duration::ZERO);
    screens.push(lost);
    for top in &mut screens {
        let terminal = terminal(top, &theme(), 100, 40);
        let cells = &terminal.backend().buffer().content;
        let text: String = cells.iter().map(|cell| cell.symbol()).collect();
        assert!(text.chars().all(is_plain), "{text:?}");
        assert!(text.contains(r"a\nb\u{1b}[2J\u{9b}\u{202e}"), "{text}");
    }
}

#[test]
fn no_size_of_a_terminal_is_too_small() {
    let mut screens = [
        Top::default(),
        of_build(seen_running()),
        of_build(seen_failed()),
        connected(),
    ];
    screens[3].take(
        Told::Answer(Subject::Builds, Answer::Builds(vec![running()])),
        Duration::ZERO,
    );
    for top in &mut screens {
        for (width, height) in [(1, 1), (2, 40), (12, 3), (500, 2)] {
            shown(top, width, height);
            press(top, [KeyCode::Char('?')]);
            shown(top, width, height);
            press(top, [KeyCode::Down, KeyCode::Char('/'), KeyCode::Char('日')]);
            shown(top, width, height);
            press(top, [KeyCode::Esc]);
        }
    }
}

#[test]
fn without_colours_there_is_none() {
    let plain = Theme {
        has_colours: false,
        ..theme()
    };
    for mut top in [of_build(seen_running()), of_build(seen_failed())] {
        let coloured = |theme: &Theme, top: &mut Top| {
            let terminal = terminal(top, theme, 80, 24);
            let mut cells = terminal.backend().buffer().content.iter();
            cells.any(|cell| cell.fg != Color::Reset || cell.bg != Color::Reset)
        };
        assert!(coloured(&theme(), &mut top));
        assert!(!coloured(&plain, &mut top));
    }
}

#[test]
fn caches_disk_a_search_and_its_answer() {
    let mut top = connected();
    press(&mut top, [KeyCode::Right]);
    let caches = Caches {
        standing: vec![
            pb::list_caches_response::Cache {
                name: "grpcs://near.example".to_owned(),
                ..pb::list_caches_response::Cache::default()
            },
            pb::list_caches_response::Cache {
                name: "grpcs://far.example".to_owned(),
                passed_over_ms: Some(27_000),
                reason: "grpcs://far.example: connection refused".to_owned(),
            },
        ],
        given: vec![pb::report_response::Entry {
            name: "grpcs://near.example".to_owned(),
            downloaded: 1234,
            downloaded_bytes: 3 << 30,
            ..pb::report_response::Entry::default()
        }],
    };
    top.take(
        Told::Answer(Subject::Caches, Answer::Caches(caches)),
        Duration::ZERO,
    );
    assert_snapshot!("caches", shown(&mut top, 80, 9));
    press(&mut top, [KeyCode::Right]);
    let entry = |name: &str, bytes| pb::disk_usage_response::Entry {
        name: name.to_owned(),
        outputs: 40,
        bytes,
        ..pb::disk_usage_response::Entry::default()
    };
    let usage = pb::DiskUsageResponse {
        entries: vec![entry("/home/me/src", 4 << 30), entry("", 1 << 30)],
        outputs: 80,
        bytes: 5 << 30,
    };
    top.take(Told::Answer(Subject::Disk, Answer::Disk(usage)), Duration::ZERO);
    assert_snapshot!("disk", shown(&mut top, 80, 7));
    press(&mut top, "/app".chars().map(KeyCode::Char));
    assert_snapshot!("searching", shown(&mut top, 80, 4));
    press(&mut top, [KeyCode::Enter]);
    let output = pb::Output {
        exec_root: "/o/execroot/_main".to_owned(),
        exec_path: "bazel-out/k8-fastbuild/bin/app/app".to_owned(),
        label: "//app:app".to_owned(),
        state: pb::OutputState::Evicted.into(),
        digest: Some(pb::Digest {
            function: "sha256".to_owned(),
            hash: "ab".repeat(32),
            size: 77,
        }),
        ..pb::Output::default()
    };
    let found = pb::FindOutputsResponse {
        outputs: vec![output.clone()],
        more: true,
    };
    let subject = top.subject();
    top.take(Told::Answer(subject, Answer::Outputs(found)), Duration::ZERO);
    assert_snapshot!("found", shown(&mut top, 80, 5));
    press(&mut top, [KeyCode::Enter]);
    let why = pb::why_response::Answer {
        output: Some(output),
        lines: vec!["required: a top-level output of //app:app".to_owned()],
    };
    let subject = top.subject();
    top.take(
        Told::Answer(subject, Answer::Output(Some(Box::new(why)))),
        Duration::ZERO,
    );
    assert_snapshot!("why", shown(&mut top, 80, 10));
    press(&mut top, [KeyCode::Char('?')]);
    assert_snapshot!("help", shown(&mut top, 80, 17));
}

#[test]
fn texts_are_fitted_and_broken_by_columns() {
    assert_eq!(fitted("//app:app", 9), "//app:app");
    assert_eq!(fitted("//app:app", 5), "…:app");
    assert_eq!(fitted("日本語", 5), "…本語");
    assert_eq!(fitted("日本語", 4), "…語");
    assert_eq!(
        (fitted("ab", 1), fitted("ab", 0)),
        ("…".to_owned(), String::new())
    );
    let lines = |text: &str, width| -> Vec<String> {
        let lines = wrapped(text, width, Style::new());
        lines.iter().map(ToString::to_string).collect()
    };
    assert_eq!(lines("one two three", 8), ["one two", "three"]);
    assert_eq!(lines("abcdefgh x", 3), ["abc", "def", "gh", "x"]);
    assert_eq!(lines("日本 語", 4), ["日本", "語"]);
    assert_eq!(lines("", 4), [""]);
    assert_eq!(bar(0.5, 4), "[##--]");
}
