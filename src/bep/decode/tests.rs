mod command_lines;

use super::*;
use crate::proto::build_event_stream::build_event_id as ids;

const HASH: &str = "2c8b08da5ce60398e1f19af0e5dccc744df274b826abe585eaba68c525434806";

fn sha256(size: u64) -> Content {
    Content::Blob(Digest::from_hex(Some(DigestFunction::Sha256), HASH, size).unwrap())
}

fn blake3(size: u64) -> Content {
    Content::Blob(Digest::from_hex(Some(DigestFunction::Blake3), HASH, size).unwrap())
}

fn decode(bytes: &[u8]) -> Result<StreamEvent, BepError> {
    decode_with(&Bytes::copy_from_slice(bytes), None)
}

#[test]
fn large_contents_lie_where_they_came_and_others_keep_no_message() {
    for (contents, beside, stays) in [
        (LARGE, 0, true),
        (LARGE - 1, 0, false),
        (LARGE, LARGE + 1000, false),
        (10, 0, false),
    ] {
        for name in ["", "the generated code reads unknown fields"] {
            let mut message = proto::BuildEvent {
                id: Some(proto::BuildEventId {
                    id: Some(Id::NamedSet(ids::NamedSetOfFilesId { id: "0".to_owned() })),
                }),
                payload: Some(Payload::NamedSetOfFiles(proto::NamedSetOfFiles {
                    files: vec![proto::File {
                        path_prefix: vec!["bazel-out".to_owned()],
                        name: "x".to_owned(),
                        file: Some(proto::file::File::Contents(vec![7; contents].into())),
                        ..Default::default()
                    }],
                    ..Default::default()
                })),
                ..Default::default()
            }
            .encode_to_vec();
            // An unknown field.
            let unknown = [name.as_bytes(), &vec![b' '; beside]].concat();
            if !unknown.is_empty() {
                prost::encoding::bytes::encode(900, &unknown, &mut message);
            }
            let message = Bytes::from(message);
            let Event::NamedSet(set) = decode_with(&message, None).unwrap().event else {
                panic!("another event");
            };
            let Content::Inline(bytes) = &set.files[0].content else {
                panic!("{:?}", set.files[0]);
            };
            assert_eq!(bytes.len(), contents);
            let is_in_it = message.as_ptr_range().contains(&bytes.as_ptr());
            assert_eq!(is_in_it, stays, "{contents} {beside} {name}");
        }
    }
}

fn read(id: Id, payload: Payload) -> Event {
    let message = proto::BuildEvent {
        id: Some(proto::BuildEventId { id: Some(id) }),
        payload: Some(payload),
        ..Default::default()
    };
    decode(&message.encode_to_vec()).unwrap().event
}

fn file(digest: &str, length: i64, uri: Option<&str>) -> proto::File {
    proto::File {
        path_prefix: vec!["bazel-out".into(), "k8".into(), "bin".into()],
        name: "a/b.txt".into(),
        digest: digest.into(),
        length,
        file: uri.map(|uri| Oneof::Uri(uri.replace('H', HASH))),
    }
}

fn content(file: proto::File, default_function: Option<DigestFunction>) -> Content {
    Reader {
        default_function,
        message: 0,
    }
    .file(file)
    .content
}

#[test]
fn a_file_is_named_by_prefix_and_name() {
    let read = Reader {
        default_function: None,
        message: 0,
    };
    let output = read.file(file(HASH, 4, None));
    assert_eq!(&*output.path, "bazel-out/k8/bin/a/b.txt");
    assert_eq!(output.name(), "a/b.txt");
    assert!(output.has_prefix());
    let source = read.file(proto::File {
        path_prefix: vec![],
        ..file(HASH, 4, None)
    });
    assert_eq!((&*source.path, source.name()), ("a/b.txt", "a/b.txt"));
    assert!(!source.has_prefix());
    for (name, below) in [
        ("bazel-out/k8/bin/a/b.txt", "a/b.txt"),
        ("bazel-out/k8/b.txt", "k8/b.txt"),
        ("bazel-out/b.txt", "b.txt"),
    ] {
        let whole = read.file(proto::File {
            path_prefix: vec![],
            name: name.to_owned(),
            ..file(HASH, 4, None)
        });
        assert_eq!((&*whole.path, whole.name()), (name, below));
        assert!(whole.has_prefix());
    }
}

#[test]
fn content_comes_from_the_field_or_else_from_the_uri() {
    for (digest, length, uri, expected) in [
        (HASH, 4, None, sha256(4)),
        (HASH, 4, Some("file:///x"), sha256(4)),
        ("", 0, Some("bytestream://h/i/blobs/H/4"), sha256(4)),
        ("", 0, Some("bytestream://h/blobs/blake3/H/4"), blake3(4)),
        (HASH, 4, Some("bytestream://h/blobs/blake3/H/4"), blake3(4)),
        (HASH, 0, Some("bytestream://h/blobs/H/4"), sha256(4)),
        (HASH, 0, None, sha256(0)),
        ("", 0, Some("file:///x"), Content::Unknown),
        ("", 7, None, Content::Unknown),
        ("", 0, Some("bytestream://h/blobs/H/x"), Content::Unknown),
    ] {
        assert_eq!(
            content(file(digest, length, uri), None),
            expected,
            "{digest} {length} {uri:?}"
        );
    }
    let inline = proto::File {
        file: Some(Oneof::Contents("abc".into())),
        ..file("", 0, None)
    };
    assert_eq!(content(inline, None), Content::Inline("abc".into()));
    let symlink = proto::File {
        file: Some(Oneof::SymlinkTargetPath("../x".into())),
        ..file("", 0, None)
    };
    assert_eq!(content(symlink, None), Content::Symlink("../x".into()));
}

#[test]
fn a_contradictory_digest_is_unknown_content() {
    for (digest, length, uri) in [
        ("00", 0, None),
        (HASH, -1, None),
        ("xyz", 4, Some("bytestream://h/blobs/H/4")),
        (HASH, 5, Some("bytestream://h/blobs/H/4")),
        (
            "900150983cd24fb0d6963f7d28e17f72",
            4,
            Some("bytestream://h/blobs/H/4"),
        ),
    ] {
        assert_eq!(
            content(file(digest, length, uri), None),
            Content::Unknown,
            "{digest} {length} {uri:?}"
        );
    }
}

#[test]
fn the_builds_function_settles_what_the_length_leaves_open() {
    let default = Some(DigestFunction::Blake3);
    assert_eq!(content(file(HASH, 4, None), default), blake3(4));
    assert_eq!(
        content(file("", 0, Some("bytestream://h/blobs/H/4")), default),
        blake3(4)
    );
    assert_eq!(
        content(
            file(HASH, 4, Some("bytestream://h/blobs/blake3/H/4")),
            Some(DigestFunction::Sha256)
        ),
        blake3(4)
    );
    let Content::Blob(md5) = content(file("900150983cd24fb0d6963f7d28e17f72", 4, None), default) else {
        panic!("the default function does not fit and is left aside");
    };
    assert_eq!(md5.function(), DigestFunction::Md5);
}

fn completed(completed: proto::TargetComplete) -> Completed {
    let id = ids::TargetCompletedId {
        label: "//a".into(),
        aspect: "//d.bzl%x".into(),
        configuration: Some(ConfigurationId { id: "c".into() }),
    };
    match read(Id::TargetCompleted(id), Payload::Completed(completed)) {
        Event::Completed(completed) => completed,
        event => panic!("{event:?}"),
    }
}

#[test]
fn completions_keep_aspect_groups_and_directories() {
    let group = proto::OutputGroup {
        name: "extra".into(),
        file_sets: vec![ids::NamedSetOfFilesId { id: "7".into() }],
        incomplete: true,
        inline_files: vec![file(HASH, 4, None)],
    };
    let done = completed(proto::TargetComplete {
        success: true,
        output_group: vec![group],
        important_output: vec![file(HASH, 4, None)],
        directory_output: vec![file("00", 0, None)],
        ..Default::default()
    });
    assert_eq!(done.target.to_string(), "//a (aspect //d.bzl%x)");
    assert_eq!(done.target.configuration, "c");
    let [group] = &done.groups[..] else {
        panic!("important outputs beside groups are the groups' own: {done:?}");
    };
    assert_eq!((group.name.as_str(), group.incomplete), ("extra", true));
    assert_eq!((&group.sets[..], group.files.len()), (&["7".to_owned()][..], 1));
    assert_eq!(done.directories[0].content, Content::Unknown);
}

#[test]
fn important_outputs_without_groups_are_the_default_group() {
    let done = completed(proto::TargetComplete {
        success: true,
        important_output: vec![file(HASH, 4, None)],
        ..Default::default()
    });
    assert_eq!(done.groups[0].name, "default");
    assert_eq!(done.groups[0].files[0].content, sha256(4));
    assert!(completed(proto::TargetComplete::default()).groups.is_empty());
}

#[test]
fn an_aspects_configured_event_does_not_hide_the_targets_kind() {
    let configured = |aspect: &str, kind: &str| {
        read(
            Id::TargetConfigured(ids::TargetConfiguredId {
                label: "//a".into(),
                aspect: aspect.into(),
            }),
            Payload::Configured(proto::TargetConfigured {
                target_kind: kind.into(),
            }),
        )
    };
    assert_eq!(
        configured("", "sh_test rule"),
        Event::Configured {
            label: "//a".into(),
            kind: "sh_test rule".into(),
            completions: Vec::new(),
        }
    );
    assert_eq!(configured("//d.bzl%x", ""), Event::Other);
}

#[test]
fn a_configured_target_names_the_configurations_that_it_is_to_be_completed_in() {
    let completion = |label: &str, aspect: &str, configuration: &str| proto::BuildEventId {
        id: Some(Id::TargetCompleted(ids::TargetCompletedId {
            label: label.into(),
            aspect: aspect.into(),
            configuration: Some(ConfigurationId {
                id: configuration.into(),
            }),
        })),
    };
    let event = proto::BuildEvent {
        id: Some(proto::BuildEventId {
            id: Some(Id::TargetConfigured(ids::TargetConfiguredId {
                label: "//a".into(),
                aspect: String::new(),
            })),
        }),
        children: vec![
            completion("//a", "", "one"),
            completion("//a", "//d.bzl%x", "one"),
            completion("//other", "", "one"),
            completion("//a", "", "two"),
        ],
        payload: Some(Payload::Configured(proto::TargetConfigured::default())),
        ..Default::default()
    };
    let json = r#"{"id": {"targetConfigured": {"label": "//a"}}, "children": [
        {"targetCompleted": {"label": "//a", "configuration": {"id": "one"}}},
        {"targetCompleted": {"label": "//a", "aspect": "//d.bzl%x", "configuration": {"id": "one"}}},
        {"targetCompleted": {"label": "//other", "configuration": {"id": "one"}}},
        {"targetCompleted": {"label": "//a", "configuration": {"id": "two"}}}], "configured": {}}"#;
    for event in [
        decode(&event.encode_to_vec()).unwrap().event,
        json::decode_json(json.replace('\n', " ").as_bytes(), None)
            .unwrap()
            .event,
    ] {
        let Event::Configured { completions, .. } = event else {
            panic!("{event:?}");
        };
        let configurations: Vec<_> = completions.iter().map(|target| &*target.configuration).collect();
        assert_eq!(configurations, ["one", "two"]);
    }
}

#[test]
fn an_aborted_event_names_the_target_and_survives_a_new_reason() {
    let aborted = |id, reason| {
        read(
            id,
            Payload::Aborted(proto::Aborted {
                reason,
                description: "d".into(),
            }),
        )
    };
    let id = ids::TargetCompletedId {
        label: "//a".into(),
        ..Default::default()
    };
    assert_eq!(
        aborted(Id::TargetCompleted(id.clone()), 7),
        Event::Aborted {
            target: Some(target_id(id)),
            reason: "SKIPPED".into(),
            description: "d".into()
        }
    );
    assert_eq!(
        aborted(Id::BuildFinished(ids::Empty {}), 99),
        Event::Aborted {
            target: None,
            reason: "99".into(),
            description: "d".into()
        }
    );
}

#[test]
fn test_results_keep_run_shard_and_attempt() {
    let id = ids::TestResultId {
        label: "//t".into(),
        run: 2,
        shard: 3,
        attempt: -1,
        configuration: Some(ConfigurationId { id: "c".into() }),
    };
    let log = proto::File {
        path_prefix: vec![],
        name: "test.log".into(),
        ..file("", 0, Some("bytestream://h/blobs/H/9"))
    };
    let event = read(
        Id::TestResult(id),
        Payload::TestResult(proto::TestResult {
            test_action_output: vec![log],
            ..Default::default()
        }),
    );
    let Event::TestResult(result) = event else {
        panic!("{event:?}");
    };
    assert_eq!((result.run, result.shard, result.attempt), (2, 3, 0));
    assert_eq!(
        (result.files[0].name(), &result.files[0].content),
        ("test.log", &sha256(9))
    );
}

#[test]
fn an_actions_content_comes_from_its_uri_and_its_path_from_the_id() {
    let event = read(
        Id::ActionCompleted(ids::ActionCompletedId {
            primary_output: "bazel-out/k8/bin/a.o".into(),
            label: "//a".into(),
            configuration: None,
        }),
        Payload::Action(proto::ActionExecuted {
            success: true,
            primary_output: Some(proto::File {
                file: Some(Oneof::Uri(format!("bytestream://h/blobs/{HASH}/9"))),
                ..Default::default()
            }),
            ..Default::default()
        }),
    );
    let Event::Action(action) = event else {
        panic!("{event:?}");
    };
    assert_eq!(action.primary_output, "bazel-out/k8/bin/a.o");
    assert_eq!(action.content, Some(sha256(9)));
}

#[test]
fn deleted_convenience_symlinks_have_no_target_and_unknown_actions_are_left_out() {
    let link = |path: &str, action: i32| proto::ConvenienceSymlink {
        path: path.into(),
        action,
        target: "execroot".into(),
    };
    let event = read(
        Id::ConvenienceSymlinksIdentified(ids::Empty {}),
        Payload::ConvenienceSymlinksIdentified(proto::ConvenienceSymlinksIdentified {
            convenience_symlinks: vec![link("bazel-bin", 1), link("bazel-old", 2), link("x", 9)],
        }),
    );
    let expected = [("bazel-bin", Some("execroot")), ("bazel-old", None)]
        .map(|(path, target)| ConvenienceSymlink {
            path: path.into(),
            target: target.map(str::to_owned),
        })
        .to_vec();
    assert_eq!(event, Event::ConvenienceSymlinks(expected));
}

#[test]
fn what_is_not_read_is_other_and_the_last_message_is_marked() {
    // Field 3, progress, with an empty message; field 20, last_message.
    let framed = decode(&[0x1a, 0x00, 0xa0, 0x01, 0x01]).unwrap();
    assert_eq!((framed.event, framed.last), (Event::Other, true));
    assert_eq!(
        read(
            Id::BuildFinished(ids::Empty {}),
            Payload::Completed(proto::TargetComplete::default())
        ),
        Event::Other
    );
}

#[test]
fn bytes_that_are_no_event_are_a_skippable_error() {
    // Field 5, started, with a uuid that is not UTF-8.
    for bytes in [&[0x2a, 0x03, 0x0a, 0x01, 0xff][..], &[0xff, 0xff], b"{}"] {
        assert!(decode(bytes).unwrap_err().is_skippable());
    }
}

#[test]
fn files_that_the_build_tool_could_not_read_are_reported() {
    let warning = |path: &str| {
        format!("WARNING: Uploading BEP referenced local file {path}: {path} (No such file or directory)\n")
    };
    let output = format!(
        "INFO: x\n{}{}{}WARNING: other\n",
        warning("/ob/a: b"),
        warning("/ob/c"),
        warning("/ob/c")
    );
    let decoded = |stderr: &str| {
        let progress = proto::Progress {
            stderr: stderr.to_owned().into(),
        };
        read(
            Id::Progress(ids::ProgressId::default()),
            Payload::Progress(progress),
        )
    };
    assert_eq!(
        decoded(&output),
        Event::Unreadable(vec!["/ob/a: b".to_owned(), "/ob/c".to_owned()])
    );
    let cut = output.split("(No such").next().unwrap();
    for nothing in [
        "",
        "INFO: all is well\n",
        cut,
        "Uploading BEP referenced local file é (No such file or directory)",
    ] {
        assert_eq!(decoded(nothing), Event::Other, "{nothing}");
    }
}

/// As Bazel 4 reports `genrule(name = "süß", outs = ["straße.txt"])` in a workspace called "Straße".
#[test]
fn names_that_the_build_tool_encoded_twice_are_read_as_they_are_meant() {
    let started = proto::BuildStarted {
        workspace_directory: "/home/x/Stra\u{c3}\u{9f}e".into(),
        ..Default::default()
    };
    match read(
        Id::Started(ids::BuildStartedId::default()),
        Payload::Started(started),
    ) {
        Event::Started(started) => assert_eq!(started.workspace, "/home/x/Straße"),
        event => panic!("{event:?}"),
    }
    let label = "//:s\u{c3}\u{bc}\u{c3}\u{9f}";
    let file = |name: &str| proto::File {
        name: name.into(),
        path_prefix: vec!["bazel-out".into(), "k8-fastbuild".into(), "bin".into()],
        file: Some(Oneof::Contents(Bytes::new())),
        ..Default::default()
    };
    let completed = proto::TargetComplete {
        important_output: vec![file("stra\u{c3}\u{9f}e.txt")],
        directory_output: vec![file("stra\u{c3}\u{9f}e.d")],
        ..Default::default()
    };
    let id = ids::TargetCompletedId {
        label: label.into(),
        ..Default::default()
    };
    match read(Id::TargetCompleted(id), Payload::Completed(completed)) {
        Event::Completed(completed) => {
            assert_eq!(completed.target.label, "//:süß");
            let path = &completed.groups[0].files[0].path;
            assert_eq!(&**path, "bazel-out/k8-fastbuild/bin/straße.txt");
            let path = &completed.directories[0].path;
            assert_eq!(&**path, "bazel-out/k8-fastbuild/bin/straße.d");
        }
        event => panic!("{event:?}"),
    }
    let id = ids::ActionCompletedId {
        primary_output: "bazel-out/k8-fastbuild/bin/stra\u{c3}\u{9f}e.txt".into(),
        label: label.into(),
        ..Default::default()
    };
    match read(Id::ActionCompleted(id), Payload::Action(Default::default())) {
        Event::Action(action) => {
            assert_eq!(action.label, "//:süß");
            assert_eq!(action.primary_output, "bazel-out/k8-fastbuild/bin/straße.txt");
        }
        event => panic!("{event:?}"),
    }
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_decoded_without_a_panic(bytes: Vec<u8>) {
        let _ = decode(&bytes);
    }
}
