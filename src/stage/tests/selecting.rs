//! What a wish picks, and how names of files and patterns are judged.

use super::*;

#[test]
fn without_a_wish_everything_that_targets_name_is_required() {
    let selection = select(Wish::default()).unwrap();
    let build = build();
    let expected: BTreeSet<_> = build.outputs().iter().map(|o| o.path.as_str()).collect();
    let found: BTreeSet<_> = selection.artifacts.iter().map(|a| a.exec_path.as_str()).collect();
    assert_eq!(found, expected);
    assert!(
        selection
            .artifacts
            .iter()
            .all(|a| a.class == Class::Required && a.place == a.exec_path)
    );
    assert_eq!(selection.notes, Vec::<String>::new());
}

#[test]
fn of_two_contents_for_one_path_in_one_event_the_first_is_picked_and_the_other_reported() {
    let events = build().events().map(|event| {
        let mut event = BuildEvent::decode(&*event).unwrap();
        if let Some(Payload::NamedSetOfFiles(set)) = &mut event.payload
            && let Some(first) = set.files.first().cloned()
        {
            let other = file::File::Contents("other".into());
            set.files.push(pb::File {
                file: Some(other),
                ..first
            });
        }
        event.encode_to_vec()
    });
    let dir = tempfile::tempdir().unwrap();
    let (_journal, entry) = journalled(dir.path(), events);
    let recorded = Recorded::read(entry.read().unwrap(), None).unwrap();
    let selection = recorded.everything("inv").unwrap();
    assert_eq!(selection.artifacts, select(Wish::default()).unwrap().artifacts);
    assert!(!selection.notes.is_empty());
    for note in selection.notes {
        assert!(note.contains("other content"), "{note}");
    }
}

#[test]
fn a_target_has_the_files_that_it_shares_with_others_too() {
    for target in ["//app:app", "//app/..."] {
        let found = select(Wish {
            targets: texts(&[target, "-//app:current"]),
            ..Wish::default()
        });
        let found = found.unwrap();
        let expected = [&HEADERS[..], &["liblib.a", "app", "version.txt"]].concat();
        assert_eq!(names(&found, Class::Required), set(&expected), "{target}");
        assert!(
            found
                .artifacts
                .iter()
                .all(|a| &*a.label == "//app:app" && &*a.group == "default")
        );
    }
}

#[test]
fn groups_and_regexes_pick_and_leave_out() {
    let found = select(Wish {
        output_groups: texts(&["lint_report"]),
        ..Wish::default()
    });
    assert_eq!(names(&found.unwrap(), Class::Required), set(&["lint.report"]));
    let found = select(Wish {
        // A tree's root stands for all of the tree.
        include: texts(&[".*/assets/tree.d", r".*\.h"]),
        exclude: texts(&[".*/part[12].h", ".*/images/.*"]),
        ..Wish::default()
    });
    let expected = ["part0.h", "part3.h", "index.html", "style.css"];
    assert_eq!(names(&found.unwrap(), Class::Required), set(&expected));
}

#[test]
fn trees_are_whole_unless_something_of_them_is_left_out() {
    let trees = |wish: Wish| select(wish).unwrap().trees;
    let ends = |trees: &[String], end: &str| trees.iter().any(|tree| tree.ends_with(end));
    assert!(ends(&trees(Wish::default()), "/assets/tree.d"));
    let of = |include: &[&str], exclude: &[&str], flatten: bool| {
        trees(Wish {
            include: texts(include),
            exclude: texts(exclude),
            flatten,
            ..Wish::default()
        })
    };
    assert!(ends(&of(&[".*/assets/tree.d"], &[], false), "/assets/tree.d"));
    assert!(!ends(&of(&[], &[".*/style.css"], false), "/assets/tree.d"));
    assert!(!ends(&of(&[".*/style.css"], &[], false), "/assets/tree.d"));
    assert_eq!(of(&[], &[], true), [""; 0]);
}

#[test]
fn required_and_optional_divide_what_is_picked() {
    let lib = |required: &[&str], optional: &[&str]| {
        let found = select(Wish {
            targets: texts(&["//lib:lib"]),
            output_groups: texts(&["default"]),
            required: texts(required),
            optional: texts(optional),
            ..Wish::default()
        });
        found.unwrap()
    };
    let found = lib(&[".*/liblib.a"], &[]);
    assert_eq!(names(&found, Class::Required), set(&["liblib.a"]));
    assert_eq!(names(&found, Class::Optional), set(&HEADERS));
    let found = lib(&[], &[r".*\.h"]);
    assert_eq!(names(&found, Class::Required), set(&["liblib.a"]));
    let found = lib(&[".*/part0.h"], &[r".*\.h"]);
    assert_eq!(names(&found, Class::Required), set(&["part0.h"]));
}

#[test]
fn every_pattern_that_picks_nothing_is_an_error_that_names_it() {
    let none = Wish::default;
    for (wish, parts) in [
        (
            Wish {
                targets: texts(&["//lib:lib", "//no:such"]),
                ..none()
            },
            ["TARGET=//no:such", "no such target"],
        ),
        (
            Wish {
                targets: texts(&["//broken:broken"]),
                output_groups: texts(&["default"]),
                ..none()
            },
            ["TARGET=//broken:broken", "only partly: //broken:broken"],
        ),
        (
            Wish {
                targets: texts(&["//assets/...", "//lib:lib"]),
                include: texts(&[".*/liblib.a"]),
                ..none()
            },
            ["TARGET=//assets/...", "other filters"],
        ),
        (
            Wish {
                output_groups: texts(&["default", "nope"]),
                ..none()
            },
            ["--output-group=nope", "lint_report"],
        ),
        (
            Wish {
                include: texts(&[".*", "nope"]),
                ..none()
            },
            ["--include=nope", "inv"],
        ),
        (
            Wish {
                required: texts(&["nope"]),
                ..none()
            },
            ["--required=nope", "inv"],
        ),
        (
            Wish {
                optional: texts(&[".*", "nope"]),
                ..none()
            },
            ["--optional=nope", "inv"],
        ),
        (
            Wish {
                exclude: texts(&[".*"]),
                ..none()
            },
            ["no outputs", "inv"],
        ),
    ] {
        let error = select(wish.clone()).expect_err("matches nothing").to_string();
        for part in parts {
            assert!(error.contains(part), "{wish:?}: {error}");
        }
    }
    for (wish, flag) in [
        (
            Wish {
                targets: texts(&["x"]),
                ..none()
            },
            "TARGET=x",
        ),
        (
            Wish {
                include: texts(&["("]),
                ..none()
            },
            "--include=(",
        ),
        (
            Wish {
                optional: texts(&["("]),
                ..none()
            },
            "--optional=(",
        ),
    ] {
        assert!(Request::new(wish).unwrap_err().to_string().contains(flag));
    }
}

#[test]
fn names_that_collide_are_an_error_that_names_both() {
    let flat = |include: &[&str]| {
        select(Wish {
            include: texts(include),
            flatten: true,
            ..Wish::default()
        })
    };
    let found = flat(&[r".*\.h", ".*/app/app"]).unwrap();
    let places: BTreeSet<_> = found.artifacts.iter().map(|a| a.place.as_str()).collect();
    assert_eq!(places, set(&[&HEADERS[..], &["app"]].concat()));

    let dir = tempfile::tempdir().unwrap();
    let events = build().events().map(|event| {
        // The same name in another directory.
        let text: Vec<u8> = event;
        replace(&text, b"lib/include/part1.h", b"lib/incl.de/part0.h")
    });
    let (_journal, entry) = journalled(dir.path(), events);
    let recorded = Recorded::read(entry.read().unwrap(), None).unwrap();
    let request = Request::new(Wish {
        flatten: true,
        ..Wish::default()
    });
    let error = recorded.select("inv", &request.unwrap()).unwrap_err().to_string();
    assert!(
        error.contains("lib/include/part0.h") && error.contains("lib/incl.de/part0.h"),
        "{error}"
    );
}

#[test]
fn one_name_twice_with_the_same_content_is_no_collision() {
    let flat = |class: Class, contents: [OutputContent; 2]| {
        let named = ["p/LICENSE", "q/LICENSE"].into_iter().zip(contents);
        let artifacts = named.map(|(path, content)| (ExecPath::new(path).unwrap(), artifact(path, content)));
        let mut artifacts: BTreeMap<_, _> = artifacts.collect();
        artifacts.values_mut().next().unwrap().class = class;
        placed(artifacts, true, false).map(|(artifacts, also)| {
            assert_eq!(also.len(), 1);
            artifacts
        })
    };
    let inline = |bytes: &'static [u8]| OutputContent::Inline(Bytes::from_static(bytes));
    for contents in [
        [blob(b"x"), blob(b"x")],
        [blob(b"x"), inline(b"x")],
        [inline(b"x"), blob(b"x")],
        [
            OutputContent::Symlink("t".into()),
            OutputContent::Symlink("t".into()),
        ],
    ] {
        let found = flat(Class::Optional, contents).unwrap();
        let found: Vec<_> = found.iter().map(|a| (a.place.as_str(), a.class)).collect();
        // As much wanted as the one that is wanted more.
        assert_eq!(found, [("LICENSE", Class::Required)]);
    }
    for contents in [
        [blob(b"x"), blob(b"y")],
        [blob(b"x"), inline(b"y")],
        [blob(b"x"), OutputContent::Directory],
        [blob(b"x"), OutputContent::Symlink("x".into())],
    ] {
        assert!(flat(Class::Required, contents).is_err());
    }
}

#[test]
fn of_failed_tests_alone_what_they_wrote_is_picked() {
    use crate::proto::build_event_stream::{
        BuildEventId, Configuration, TestResult, TestStatus, TestSummary,
        build_event_id::{ConfigurationId, Id, TestResultId, TestSummaryId},
    };
    let configuration = || {
        Some(ConfigurationId {
            id: "tests".to_owned(),
        })
    };
    let event = |id, payload| {
        let event = BuildEvent {
            id: Some(BuildEventId { id: Some(id) }),
            payload: Some(payload),
            ..BuildEvent::default()
        };
        event.encode_to_vec()
    };
    let result = |label: &str, attempt, status: TestStatus| {
        let id = TestResultId {
            label: label.to_owned(),
            run: 1,
            attempt,
            configuration: configuration(),
            ..TestResultId::default()
        };
        let result = TestResult {
            status: status.into(),
            test_action_output: vec![pb::File {
                name: "test.log".to_owned(),
                file: Some(file::File::Contents(label.to_owned().into())),
                ..pb::File::default()
            }],
            ..TestResult::default()
        };
        event(Id::TestResult(id), Payload::TestResult(result))
    };
    let summary = |label: &str| {
        let id = TestSummaryId {
            label: label.to_owned(),
            configuration: configuration(),
        };
        event(Id::TestSummary(id), Payload::TestSummary(TestSummary::default()))
    };
    let mnemonic = Configuration {
        mnemonic: "k8".to_owned(),
        ..Configuration::default()
    };
    let with = |more: Vec<Vec<u8>>, targets: &[&str]| {
        let mut events: Vec<Vec<u8>> = build().events().collect();
        let id = Id::Configuration(configuration().unwrap());
        events.push(event(id, Payload::Configuration(mnemonic.clone())));
        events.extend(more);
        let dir = tempfile::tempdir().unwrap();
        let (_journal, entry) = journalled(dir.path(), events.into_iter());
        let recorded = Recorded::read(entry.read().unwrap(), None).unwrap();
        let wish = Wish {
            failed: true,
            targets: texts(targets),
            ..Wish::default()
        };
        recorded.select("inv", &Request::new(wish).unwrap())
    };
    let passed = || {
        vec![
            result("//t:flaky", 1, TestStatus::Failed),
            result("//t:flaky", 2, TestStatus::Passed),
            summary("//t:flaky"),
        ]
    };
    let failed = vec![result("//t:late", 1, TestStatus::Timeout), summary("//t:late")];
    let selection = with([passed(), failed].concat(), &["//t:flaky", "//t:late"]).unwrap();
    let paths: Vec<&str> = selection.artifacts.iter().map(|a| a.exec_path.as_str()).collect();
    assert_eq!(paths, ["bazel-out/k8/testlogs/t/late/test.log"]);
    for targets in [&[][..], &["//t:flaky"]] {
        let error = with(passed(), targets).unwrap_err();
        assert!(matches!(error, StageError::NoneFailed(_)), "{error}");
    }
    let error = with(passed(), &["//t:none"]).unwrap_err().to_string();
    assert!(error.contains("no such target"), "{error}");
}
