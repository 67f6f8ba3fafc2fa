//! What is picked, and what is refused.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    path::Path,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use prost::Message as _;

use super::{
    StageError, Wish,
    check::is_staged,
    marker::{self, Marker},
    recorded::Recorded,
    request::Request,
    select::{Artifact, Selection, placed},
    together::Directories,
};
#[cfg(feature = "archives")]
use super::{destination::Reach, gather::Gather};
#[cfg(feature = "archives")]
use crate::remote::Nowhere;
use crate::{
    builds::StreamKey,
    demo::{GeneratedBuild, Setting},
    digest::{Digest, DigestFunction},
    embedded_cache::Store,
    exec_path::ExecPath,
    journal::{Entry, Journal, JournalOptions, RecordKind},
    output::{Class, OutputContent, Stamp},
    proto::build_event_stream::{self as pb, BuildEvent, build_event::Payload, file},
    record::Which,
    remote::{Attribution, BatchAnswer, BlobStore, Capabilities, Copy, LocalFirst, Sink, looks_right},
    transport::{RemoteError, RemoteErrorKind},
};

pub(super) fn build() -> GeneratedBuild {
    let setting = Setting {
        workspace: "/w".to_owned(),
        exec_root: "/o/execroot/_main".to_owned(),
        remote_cache: "grpc://127.0.0.1:1".to_owned(),
        instance_name: "main".to_owned(),
    };
    GeneratedBuild::new(&Store::in_memory(DigestFunction::Sha256), setting, 7)
}

/// A journal with these events.
pub(super) fn journalled(dir: &Path, events: impl Iterator<Item = Vec<u8>>) -> (Journal, Entry) {
    let journal = Journal::open(&dir.join("journal"), JournalOptions::default()).unwrap();
    let key = StreamKey {
        build_id: "b".to_owned(),
        invocation_id: "inv".to_owned(),
        ..StreamKey::default()
    };
    let mut inlet = journal.inlet(&key, 1).unwrap();
    let mut number = 0;
    for event in events {
        number += 1;
        inlet.push(RecordKind::Event, number, 5, event.into()).unwrap();
    }
    inlet
        .push(RecordKind::Finished, number + 1, 5, Bytes::new())
        .unwrap();
    assert!(inlet.settle().unwrap());
    let entry = journal.find("inv").unwrap();
    (journal, entry)
}

fn recorded() -> Recorded {
    let dir = tempfile::tempdir().unwrap();
    let (_journal, entry) = journalled(dir.path(), build().events());
    Recorded::read(entry.read().unwrap(), None).unwrap()
}

fn select(wish: Wish) -> Result<Selection, StageError> {
    recorded().select("inv", &Request::new(wish).unwrap())
}

fn texts(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}

fn names(selection: &Selection, class: Class) -> BTreeSet<&str> {
    let of_class = selection.artifacts.iter().filter(|a| a.class == class);
    of_class.map(|a| a.exec_path.file_name()).collect()
}

fn set<'a>(names: &[&'a str]) -> BTreeSet<&'a str> {
    names.iter().copied().collect()
}

const HEADERS: [&str; 4] = ["part0.h", "part1.h", "part2.h", "part3.h"];

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
fn of_two_contents_for_one_path_in_one_event_the_first_is_picked_and_the_other_told() {
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
        placed(artifacts, true, false)
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

/// With one text for another of the same length.
pub(super) fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut bytes = bytes.to_vec();
    let mut at = 0;
    while at + from.len() <= bytes.len() {
        if bytes[at..].starts_with(from) {
            bytes[at..at + to.len()].copy_from_slice(to);
        }
        at += 1;
    }
    bytes
}

fn artifact(place: &str, content: OutputContent) -> Artifact {
    Artifact {
        label: "//a:b".into(),
        aspect: "".into(),
        group: "default".into(),
        exec_path: ExecPath::new(place).unwrap(),
        place: ExecPath::new(place).unwrap(),
        content,
        class: Class::Required,
    }
}

fn blob(bytes: &[u8]) -> OutputContent {
    OutputContent::Blob(Digest::of(DigestFunction::Sha256, bytes))
}

/// Leaves a marker of these files, which are written too.
fn leave(dir: &Path, invocation: &str, files: &[(&str, &[u8])]) {
    leave_for(dir, invocation, &Wish::default(), files);
}

/// The same for another request; what is in `t` is a whole tree. Answers what stays though it should not.
fn leave_for(dir: &Path, invocation: &str, wish: &Wish, files: &[(&str, &[u8])]) -> Vec<String> {
    let mut marker = Marker::new(invocation, "/w", wish);
    if files.iter().any(|(name, _)| name.starts_with("t/")) {
        marker.trees.push("t".to_owned());
    }
    for (name, bytes) in files {
        std::fs::create_dir_all(dir.join(name).parent().unwrap()).unwrap();
        std::fs::write(dir.join(name), bytes).unwrap();
        marker
            .files
            .push(marker::File::new(&artifact(name, blob(bytes)), None));
    }
    write(&marker, dir)
}

/// Writes a marker whose outputs have all come to their end, and answers what stays though it should not.
fn write(marker: &Marker, dir: &Path) -> Vec<String> {
    marker
        .write(dir, &HashSet::new(), &mut Vec::new(), HashSet::new())
        .unwrap()
}

#[test]
fn what_was_staged_is_believed_as_far_as_the_files_bear_it_out() {
    let dir = tempfile::tempdir().unwrap();
    let any = Which::default();
    let problems = |which: &Which| is_staged(dir.path(), which, &[], None).unwrap().problems;
    assert!(problems(&any)[0].contains("nothing was staged"));
    leave(dir.path(), "one", &[("x", b"1"), ("y", b"2")]);
    assert_eq!(problems(&any), Vec::<String>::new());
    std::fs::write(dir.path().join("x"), "3").unwrap();
    std::fs::remove_file(dir.path().join("y")).unwrap();
    assert_eq!(problems(&any), ["x: changed since it was staged", "y: missing"]);

    // A request that stages something else at one place takes the older one's marker away, another does not.
    let wish_of = |target: &str| Wish {
        targets: texts(&[target]),
        ..Wish::default()
    };
    leave_for(dir.path(), "two", &wish_of("//two"), &[("z", b"5")]);
    leave_for(dir.path(), "three", &wish_of("//three"), &[("x", b"4")]);
    assert_eq!(problems(&any), Vec::<String>::new());
    assert_eq!(problems(&Which::of("two")), Vec::<String>::new());
    assert!(problems(&Which::of("one"))[0].contains("nothing of that request"));
    let answer = is_staged(dir.path(), &any, &[], None).unwrap();
    assert_eq!((answer.files, answer.invocations), (2, texts(&["three", "two"])));

    let other = Wish {
        flatten: true,
        ..Wish::default()
    };
    assert!(
        !is_staged(dir.path(), &any, &[], Some(&other))
            .unwrap()
            .is_staged()
    );
    assert!(
        is_staged(dir.path(), &Which::of("two"), &[], Some(&wish_of("//two")))
            .unwrap()
            .is_staged()
    );
}

#[test]
fn what_an_earlier_stage_put_there_and_this_one_does_not_name_goes() {
    let dir = tempfile::tempdir().unwrap();
    let here = |name: &str| dir.path().join(name).symlink_metadata().is_ok();
    let problems = || {
        is_staged(dir.path(), &Which::default(), &[], None)
            .unwrap()
            .problems
    };
    let other = Wish {
        targets: texts(&["//other"]),
        ..Wish::default()
    };
    leave_for(dir.path(), "o", &other, &[("t2/shared", b"s"), ("x", b"x")]);
    let files: [(&str, &[u8]); 6] = [
        ("t/a", b"a"),
        ("t/b", b"b"),
        ("t/deep/er/c", b"c"),
        ("t/changed", b"d"),
        ("t2/shared", b"s"),
        ("t2/own", b"o"),
    ];
    leave(dir.path(), "one", &files);
    std::fs::write(dir.path().join("t/mine"), "mine").unwrap();
    std::fs::write(dir.path().join("t/changed"), "e").unwrap();
    let notes = leave_for(dir.path(), "two", &Wish::default(), &[("t/a", b"a")]);
    assert_eq!(
        notes,
        ["kept t/changed from an earlier stage: it has changed since"]
    );
    for (name, stays) in [
        ("t/a", true),
        ("t/b", false),
        ("t/deep", false),
        // Changed, somebody else's, and another request's.
        ("t/changed", true),
        ("t/mine", true),
        ("t2/shared", true),
        ("t2/own", false),
    ] {
        assert_eq!(here(name), stays, "{name}");
    }
    assert_eq!(
        problems(),
        [
            "t/changed: not part of the staged tree",
            "t/mine: not part of the staged tree"
        ]
    );
    std::fs::remove_file(dir.path().join("t/changed")).unwrap();
    std::fs::remove_file(dir.path().join("t/mine")).unwrap();
    assert_eq!(problems(), [""; 0]);

    // Another request for the whole tree of a later build, too.
    leave_for(dir.path(), "three", &other, &[("t/z", b"z")]);
    assert!(here("t/z") && !here("t/a") && !here("x"));
    assert_eq!(problems(), [""; 0]);
    // Of one build, requests for different parts stay side by side.
    leave(dir.path(), "three", &[("y", b"y")]);
    assert!(here("t/z") && here("y"));
    // No way leads out, and no link is taken for the file that was staged.
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("z"), "z").unwrap();
    std::fs::remove_dir_all(dir.path().join("t")).unwrap();
    std::os::unix::fs::symlink(outside.path(), dir.path().join("t")).unwrap();
    assert!(problems()[0].starts_with("t/z: "));
    let notes = leave_for(dir.path(), "four", &other, &[("n", b"n")]);
    assert!(outside.path().join("z").exists() && here("t"), "{notes:?}");
}

#[test]
fn what_is_still_on_its_way_is_decided_when_it_has_ended() {
    let dir = tempfile::tempdir().unwrap();
    leave(dir.path(), "one", &[("x", b"1"), ("later", b"2"), ("old", b"3")]);
    let mut marker = Marker::new("two", "/w", &Wish::default());
    marker
        .files
        .push(marker::File::new(&artifact("x", blob(b"1")), None));
    let (open, mut stale) = (HashSet::from(["later".to_owned()]), Vec::new());
    marker
        .write(dir.path(), &open, &mut stale, HashSet::new())
        .unwrap();
    assert!(dir.path().join("later").exists() && !dir.path().join("old").exists());
    // It could not be had: an older build's is not taken for it.
    marker
        .write(dir.path(), &HashSet::new(), &mut stale, HashSet::new())
        .unwrap();
    assert!(dir.path().join("x").exists() && !dir.path().join("later").exists());
}

#[test]
fn what_another_stage_names_meanwhile_stays() {
    let dir = tempfile::tempdir().unwrap();
    leave(dir.path(), "one", &[("shared", b"1"), ("old", b"2")]);
    let together = Directories::default();
    let names = |list: &[&str]| Arc::new(texts(list).into_iter().collect::<HashSet<_>>());
    let (own, other, gone) = (names(&["old"]), names(&["shared"]), names(&["old"]));
    let here = together.at(dir.path());
    for names in [&own, &other, &gone] {
        together.at(dir.path()).join(names);
    }
    drop(gone);
    together.at("/elsewhere".as_ref()).join(&names(&["old"]));
    let marker = Marker::new("two", "/w", &Wish::default());
    here.without_others(&own, |others| {
        assert_eq!(others, *other);
        marker.write(dir.path(), &HashSet::new(), &mut Vec::new(), others)
    })
    .unwrap();
    assert!(dir.path().join("shared").exists() && !dir.path().join("old").exists());
}

#[test]
fn a_file_in_the_place_of_a_tree_has_its_way_made() {
    let dir = tempfile::tempdir().unwrap();
    leave(dir.path(), "one", &[("d/e/x", b"1"), ("d/y", b"2"), ("z", b"3")]);
    marker::make_way(dir.path(), &HashSet::from(["d".to_owned()]), &HashSet::new()).unwrap();
    assert!(!dir.path().join("d").exists() && dir.path().join("z").exists());
}

#[test]
fn an_empty_directory_in_the_place_of_a_file_has_its_way_made() {
    let dir = tempfile::tempdir().unwrap();
    leave(dir.path(), "one", &[("a", b"1"), ("b", b"2"), ("c", b"3")]);
    let directories = texts(&["a", "b/empty", "d"]).into_iter().collect();
    marker::make_way(dir.path(), &HashSet::new(), &directories).unwrap();
    for (name, is_there) in [("a", false), ("b", false), ("c", true)] {
        assert_eq!(dir.path().join(name).exists(), is_there, "{name}");
    }
}

#[test]
fn markers_are_read_only_where_something_is_in_the_way() {
    let dir = tempfile::tempdir().unwrap();
    // No markers can be read there.
    std::fs::write(dir.path().join(marker::DIRECTORY), "x").unwrap();
    std::fs::create_dir_all(dir.path().join("d/e")).unwrap();
    std::fs::write(dir.path().join("d/f"), "x").unwrap();
    std::os::unix::fs::symlink("d", dir.path().join("l")).unwrap();
    for (file, is_free) in [
        ("new", true),
        ("new/x/y", true),
        ("d/f", true),
        ("d/new", true),
        ("l", true),
        ("d/e", false),
        ("d/f/x", false),
        ("l/x", false),
    ] {
        let set = HashSet::from([file.to_owned()]);
        let made = marker::make_way(dir.path(), &set, &HashSet::new());
        assert_eq!(made.is_ok(), is_free, "{file}: {made:?}");
    }
    for (directory, is_free) in [("d/e", true), ("new", true), ("d/f", false), ("l", false)] {
        let set = HashSet::from([directory.to_owned()]);
        let made = marker::make_way(dir.path(), &HashSet::new(), &set);
        assert_eq!(made.is_ok(), is_free, "{directory}: {made:?}");
    }
}

#[cfg(feature = "archives")]
#[tokio::test]
async fn what_keeps_all_optional_archives_away_is_told_of_each() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("to");
    let destination = Reach::Anywhere.open(&to, None, true).unwrap().unwrap();
    let optional = |name| Artifact {
        class: Class::Optional,
        ..artifact(name, blob(b"1"))
    };
    let store: Arc<dyn BlobStore> = Arc::new(Nowhere("there is no cache".to_owned()));
    let mut gather = Gather::default();
    gather.take_archives(&mut vec![optional("a.tar"), optional("b.tar")], &store);
    // Nothing can be written: another directory is in its place.
    std::fs::rename(&to, dir.path().join("moved")).unwrap();
    std::fs::create_dir(&to).unwrap();
    let together = Directories::default().at(&to);
    let brought = gather.bring(Class::Optional, &destination, &together).await;
    assert!(brought.is_err() && !gather.is_open());
    let (mut marker, mut open) = (Marker::new("inv", "/w", &Wish::default()), HashSet::new());
    gather.note(&mut marker, &mut open);
    let missing: Vec<_> = marker.missing.iter().map(|one| one.path.as_str()).collect();
    assert_eq!((missing, open.len()), (vec!["a.tar", "b.tar"], 0));
    for one in marker.missing {
        assert!(
            one.error.contains("replaced by another directory"),
            "{}",
            one.error
        );
    }
}

#[test]
fn of_a_workspace_within_another_the_others_markers_do_not_count() {
    let dir = tempfile::tempdir().unwrap();
    for (workspace, name) in [("/w", "outer"), ("/w/inner", "inner")] {
        let mut marker = Marker::new(name, workspace, &Wish::default());
        std::fs::write(dir.path().join(name), name).unwrap();
        let artifact = artifact(name, blob(name.as_bytes()));
        marker.files.push(marker::File::new(&artifact, None));
        write(&marker, dir.path());
    }
    for (asked, expected) in [("/w/inner/sub", "inner"), ("/w/sub", "outer")] {
        let which = Which {
            workspace: asked.to_owned(),
            ..Which::default()
        };
        let answer = is_staged(dir.path(), &which, &[], None).unwrap();
        assert_eq!(
            (answer.is_staged(), answer.invocations),
            (true, texts(&[expected]))
        );
    }
}

#[test]
fn a_marker_that_cannot_be_read_or_leads_outside_is_told() {
    let dir = tempfile::tempdir().unwrap();
    leave(dir.path(), "one", &[("x", b"1")]);
    let (path, _) = marker::read_all(dir.path()).unwrap().remove(0);
    let text = std::fs::read_to_string(&path).unwrap();
    for (damaged, part) in [
        (text.replace("\"x\"", "\"../x\""), "\"..\""),
        (text.replace("\"version\": 1", "\"version\": 2"), "version 2"),
        (text[..text.len() / 2].to_owned(), "not a marker"),
        (text.replace("sha256/", "crc/"), "crc"),
    ] {
        assert_ne!(damaged, text);
        std::fs::write(&path, damaged).unwrap();
        let problems = is_staged(dir.path(), &Which::default(), &[], None)
            .unwrap()
            .problems;
        assert!(problems.iter().any(|p| p.contains(part)), "{problems:?}");
    }
    // A link in the place of our own directory is not followed.
    let other = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(dir.path(), other.path().join(".outhaul")).unwrap();
    assert!(marker::touch(other.path()).is_err());
    assert!(marker::read_all(other.path()).is_err());
    // Nor is one within it: neither read nor touched.
    let outside = dir.path().join("outside");
    std::fs::write(&outside, &text).unwrap();
    let before = std::fs::metadata(&outside).unwrap().modified().unwrap();
    let timestamp = dir.path().join(".outhaul/staged.timestamp");
    std::os::unix::fs::symlink(&outside, &timestamp).unwrap();
    assert!(marker::touch(dir.path()).is_err());
    assert_eq!(std::fs::metadata(&outside).unwrap().modified().unwrap(), before);
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink(&outside, &path).unwrap();
    assert!(marker::read_all(dir.path()).unwrap()[0].1.is_err());
}

/// A cache that has one blob, and notes what it was asked for.
#[derive(Default)]
struct Cache {
    blobs: HashMap<Digest, Bytes>,
    asked: Mutex<Vec<Digest>>,
}

impl BlobStore for Cache {
    fn capabilities(&self) -> BoxFuture<'_, Result<Capabilities, RemoteError>> {
        async { Err(RemoteError::new(RemoteErrorKind::Config, "", "")) }.boxed()
    }

    fn read_batch<'a>(
        &'a self,
        digests: &'a [Digest],
        _: &'a Attribution,
        _: bool,
    ) -> BoxFuture<'a, Vec<BatchAnswer>> {
        self.asked.lock().unwrap().extend_from_slice(digests);
        let missing = || RemoteError::new(RemoteErrorKind::NotFound, "", "");
        let answers = digests
            .iter()
            .map(|d| (d.clone(), self.blobs.get(d).cloned().ok_or_else(missing)));
        futures::future::ready(answers.collect()).boxed()
    }

    fn read_stream<'a>(
        &'a self,
        digest: &'a Digest,
        offset: u64,
        _: &'a Attribution,
        _: bool,
        sink: &'a mut dyn Sink,
    ) -> BoxFuture<'a, Result<(), RemoteError>> {
        async move {
            self.asked.lock().unwrap().push(digest.clone());
            sink.write(self.blobs[digest].slice(offset as usize..))
                .await
                .unwrap();
            Ok(())
        }
        .boxed()
    }

    fn find_missing<'a>(
        &'a self,
        _: &'a [Digest],
        _: &'a Attribution,
    ) -> BoxFuture<'a, Result<Vec<Digest>, RemoteError>> {
        futures::future::ready(Ok(Vec::new())).boxed()
    }

    fn describe(&self) -> String {
        String::new()
    }
}

#[derive(Default)]
struct Gathered(Vec<u8>);

impl Sink for Gathered {
    fn write(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), String>> {
        self.0.extend_from_slice(&bytes);
        futures::future::ready(Ok(())).boxed()
    }
}

#[tokio::test]
async fn the_output_trees_copy_is_read_unless_there_is_any_doubt() {
    use std::os::unix::fs::MetadataExt as _;
    let dir = tempfile::tempdir().unwrap();
    let bytes = vec![7; 3 << 20];
    let digest = Digest::of(DigestFunction::Sha256, &bytes);
    std::fs::write(dir.path().join("f"), &bytes).unwrap();
    let stamp = || {
        let seen = std::fs::metadata(dir.path().join("f")).unwrap();
        Stamp {
            size: seen.len(),
            mtime_ns: seen.mtime() * 1_000_000_000 + seen.mtime_nsec(),
            inode: seen.ino(),
            device: seen.dev(),
            ..Stamp::default()
        }
    };
    let cache = Arc::new(Cache {
        blobs: HashMap::from([(digest.clone(), Bytes::from(bytes.clone()))]),
        ..Cache::default()
    });
    let nobody = Attribution::default();
    let copy = Copy {
        root: dir.path().into(),
        path: ExecPath::new("f").unwrap(),
        stamp: stamp(),
    };
    let store = LocalFirst::new(HashMap::from([(digest.clone(), copy.clone())]), cache.clone());
    let list = [digest.clone()];
    // Both ways; then with doubts; then when the file has changed.
    let local = [(false, true), (true, false), (false, false)];
    for (n, (avoid, served)) in local.into_iter().enumerate() {
        if n == 2 {
            std::fs::write(dir.path().join("f"), &bytes[1..]).unwrap();
            assert!(!looks_right(&copy, digest.size()));
        }
        cache.asked.lock().unwrap().clear();
        let answers = store.read_batch(&list, &nobody, avoid).await;
        assert_eq!(answers[0].1.as_ref().unwrap().len(), bytes.len());
        assert_eq!(store.served(&digest), served, "batch {n}");
        let mut sink = Gathered::default();
        store
            .read_stream(&digest, 0, &nobody, avoid, &mut sink)
            .await
            .unwrap();
        assert!(sink.0 == bytes);
        assert_eq!(store.served(&digest), served, "stream {n}");
        assert_eq!(cache.asked.lock().unwrap().is_empty(), served, "cache {n}");
    }
}
