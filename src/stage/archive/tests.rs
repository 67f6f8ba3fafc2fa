//! There and back again, secrets, and damage.

use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
};

use bytes::Bytes;
use prost::Message as _;
use prost_types::{DescriptorProto, FileDescriptorSet, field_descriptor_proto::Type};

use super::{
    super::{
        StageError,
        carried::{Carried, What},
        recorded::Recorded,
        tests::{build, journalled},
    },
    export,
    format::bomb,
    import,
    redact::redact,
};
use crate::{
    bep::{
        Event,
        decode::decode_with,
        event::{File, Started},
    },
    builds::StreamKey,
    journal::{Journal, JournalOptions},
    proto::build_event_stream::{
        BuildEvent, ChunkList, CommandLine, CommandLineSection, Option as CommandOption, OptionList,
        Progress, build_event::Payload, command_line_section::SectionType,
    },
    record::{InvocationRow, InvocationState, Record},
    sources::address_of,
};

const SECRET: &str = "s3cr3t";

/// A field with a length.
fn field(number: u32, content: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    prost::encoding::encode_varint(u64::from(number << 3 | 2), &mut out);
    prost::encoding::encode_varint(content.len() as u64, &mut out);
    out.extend_from_slice(content);
    out
}

fn event(payload: Payload) -> Vec<u8> {
    BuildEvent {
        payload: Some(payload),
        ..BuildEvent::default()
    }
    .encode_to_vec()
}

/// Events with a secret in every field that is not read: in all numbers that the protocol has or may come to have, on
/// every level, and in what is read but holds more than is needed.
fn secrets() -> Vec<Vec<u8>> {
    let all = |read: &[u32]| -> Vec<u8> {
        let unread = (1..40).filter(|number| !read.contains(number));
        unread
            .flat_map(|number| field(number, SECRET.as_bytes()))
            .collect()
    };
    let uris = [
        format!("bytestream://me:{SECRET}@host/i/blobs/ab/1"),
        format!("bytestream://host/i/blobs/ab/1?X-Amz-Signature={SECRET}"),
        format!("bytestream://host/i/blobs/ab/1?sig={SECRET}#{SECRET}"),
        format!("https://me:{SECRET}@host/x?token={SECRET}"),
        format!("s3://key:{SECRET}@bucket/x"),
        format!("file:///home/{SECRET}/x"),
        SECRET.to_owned(),
    ];
    let files = |number: u32| -> Vec<u8> {
        let file = |uri: &String| {
            [
                field(1, b"name"),
                field(2, uri.as_bytes()),
                all(&[1, 2, 3, 4, 5, 6, 7]),
            ]
            .concat()
        };
        uris.iter().flat_map(|uri| field(number, &file(uri))).collect()
    };
    let option = |name: &str, value: String| CommandOption {
        combined_form: format!("--{name}={value}"),
        option_name: name.to_owned(),
        option_value: value,
    };
    let unnamed = |combined_form: String| CommandOption {
        combined_form,
        ..CommandOption::default()
    };
    let options = OptionList {
        option: vec![
            option("remote_header", format!("x={SECRET}")),
            option("action_env", format!("K={SECRET}")),
            option("remote_cache", format!("grpc://me:{SECRET}@h:1")),
            option("remote_executor", format!("{SECRET}@h:1")),
            option("remote_cache", "h:1".to_owned()),
            option("remote_instance_name", "main".to_owned()),
            option("digest_function", "sha256".to_owned()),
            option("define", format!("HARMLESS={SECRET}")),
            unnamed(format!("--remote_cache=grpcs://me:{SECRET}@h:1")),
            unnamed(format!("--host_jvm_args={SECRET}")),
        ],
    };
    let line = |section_type| {
        event(Payload::StructuredCommandLine(CommandLine {
            command_line_label: "canonical".to_owned(),
            sections: vec![CommandLineSection {
                section_label: SECRET.to_owned(),
                section_type: Some(section_type),
            }],
        }))
    };
    let chunks = ChunkList {
        chunk: vec![format!("--remote_header=x={SECRET}"), SECRET.to_owned()],
    };
    let missing = "Uploading BEP referenced local file /x/y: /x/y (No such file or directory)";
    let output = format!("{SECRET}\n{SECRET} {missing} {SECRET}\n--remote_header=x={SECRET}");
    vec![
        line(SectionType::OptionList(options)),
        line(SectionType::ChunkList(chunks)),
        event(Payload::Progress(Progress {
            stderr: output.into(),
        })),
        all(&[1, 3, 4, 5, 7, 8, 9, 10, 14, 15, 17, 18, 20, 22, 25]),
        field(1, &all(&[1, 5, 6, 7, 8, 13, 15, 16, 18])),
        field(5, &all(&[1, 2, 3, 5, 7])),
        field(4, &all(&[1])),
        field(7, &[all(&[1, 6]), files(6), files(3), files(4)].concat()),
        field(
            8,
            &[all(&[1, 2, 4, 8]), files(4), files(8), field(2, &files(5))].concat(),
        ),
        field(9, &[all(&[10, 11]), files(3), files(4)].concat()),
        field(10, &[all(&[2]), files(2)].concat()),
        field(14, &all(&[3])),
        field(15, &[all(&[1, 2]), files(1)].concat()),
        field(17, &all(&[1])),
        field(18, &all(&[1])),
        field(23, &files(1)),
        field(25, &all(&[1])),
    ]
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

#[test]
fn nothing_leaves_but_what_is_read() {
    for event in secrets() {
        assert!(contains(&event, SECRET));
        let redacted = redact(&event).unwrap();
        let shown = String::from_utf8_lossy(&redacted).into_owned();
        assert!(!contains(&redacted, SECRET), "{event:?}: {shown}");
        BuildEvent::decode(&*redacted).unwrap();
        assert_eq!(
            redact(&redacted).unwrap(),
            redacted,
            "nothing is left to take out"
        );
    }
    let all: Vec<u8> = secrets()
        .iter()
        .flat_map(|event| redact(event).unwrap())
        .collect();
    for kept in [
        "remote_cache",
        "h:1",
        "main",
        "sha256",
        "bytestream://host/i/blobs/ab/1",
        "/x/y",
        "name",
    ] {
        assert!(contains(&all, kept), "{kept}");
    }
}

/// Messages of this type, each with a secret in one field: in every one that holds no message, whatever its type is, in
/// those that the protocol may come to have, and so on in the messages inside. With the fields' names, `?` for unknown.
fn each_with_a_secret(types: &HashMap<String, DescriptorProto>, name: &str) -> Vec<(String, Vec<u8>)> {
    let fields = &types[name].field;
    let known = |number: &u32| fields.iter().any(|field| field.number() as u32 == *number);
    let unknown = (1..=40).chain([1000]).filter(|number| !known(number));
    let mut messages: Vec<_> = unknown
        .map(|number| ("?".to_owned(), field(number, SECRET.as_bytes())))
        .collect();
    for known in fields {
        let (name, number) = (known.name(), known.number() as u32);
        if known.r#type() == Type::Message {
            for (below, message) in each_with_a_secret(types, known.type_name()) {
                messages.push((format!("{name}.{below}"), field(number, &message)));
            }
        } else {
            messages.push((name.to_owned(), field(number, SECRET.as_bytes())));
        }
    }
    messages
}

/// The messages of a file's or a message's list and those that are declared in them, by their full names.
fn declared(scope: &str, messages: &[DescriptorProto], types: &mut HashMap<String, DescriptorProto>) {
    for message in messages {
        let name = format!("{scope}.{}", message.name());
        declared(&name, &message.nested_type, types);
        types.insert(name, message.clone());
    }
}

#[test]
fn of_all_fields_of_all_events_these_leave() {
    let mut types = HashMap::new();
    for file in FileDescriptorSet::decode(crate::proto::DESCRIPTORS).unwrap().file {
        declared(&format!(".{}", file.package()), &file.message_type, &mut types);
    }
    // So that the event is not about its id alone.
    let payload = field(25, b"");
    let events = each_with_a_secret(&types, ".build_event_stream.BuildEvent");
    assert!(events.len() > 1000, "{}", events.len());
    let left: BTreeSet<String> = events
        .into_iter()
        .filter(|(_, event)| {
            let event = redact(&[event, &*payload].concat()).unwrap();
            contains(&event, SECRET)
        })
        .map(|(name, _)| name)
        .collect();
    let of_files = ["name", "contents", "path_prefix", "digest", "symlink_target_path"];
    let files = [
        "completed.directory_output",
        "completed.important_output",
        "completed.output_group.inline_files",
        "named_set_of_files.files",
        "test_result.test_action_output",
    ];
    let others = [
        "completed.output_group.file_sets.id",
        "completed.output_group.name",
        "configuration.mnemonic",
        "configured.target_kind",
        "id.configuration.id",
        "id.named_set.id",
        "id.structured_command_line.command_line_label",
        "id.target_completed.aspect",
        "id.target_completed.configuration.id",
        "id.target_completed.label",
        "id.target_configured.aspect",
        "id.target_configured.label",
        "id.test_result.configuration.id",
        "id.test_result.label",
        "id.test_summary.configuration.id",
        "id.test_summary.label",
        "named_set_of_files.file_sets.id",
        "started.build_tool_version",
        "started.command",
        "started.workspace_directory",
        "structured_command_line.command_line_label",
        "workspace_info.local_exec_root",
    ];
    let of_files = files
        .iter()
        .flat_map(|file| of_files.iter().map(move |field| format!("{file}.{field}")));
    let expected: BTreeSet<String> = of_files.chain(others.map(str::to_owned)).collect();
    assert_eq!(left, expected);
}

#[test]
fn what_is_read_of_a_real_build_stays() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bep");
    let mut events = 0;
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        if entry
            .path()
            .extension()
            .is_none_or(|extension| extension != "bin")
        {
            continue;
        }
        let bytes = std::fs::read(entry.path()).unwrap();
        let mut rest = &*bytes;
        while !rest.is_empty() {
            let length = prost::encoding::decode_varint(&mut rest).unwrap() as usize;
            let (event, after) = rest.split_at(length);
            rest = after;
            events += 1;
            let read = |event: &[u8]| decode_with(&Bytes::copy_from_slice(event), None).unwrap();
            let (before, after) = (read(event), read(&redact(event).unwrap()));
            match (before.event, after.event) {
                (Event::CommandLine(before), Event::CommandLine(after)) => {
                    assert_eq!(address_of(&before), address_of(&after));
                    for name in ["digest_function", "remote_instance_name"] {
                        assert_eq!(before.last(name), after.last(name));
                    }
                }
                (Event::Aborted { target, .. }, Event::Aborted { target: same, .. }) => {
                    assert_eq!(target, same);
                }
                (Event::Started(before), Event::Started(after)) => {
                    // The file's header has the id, and nobody elsewhere starts in a directory of this machine.
                    let before = Started {
                        invocation_id: String::new(),
                        working_directory: String::new(),
                        ..before
                    };
                    assert_eq!(before, after);
                }
                (
                    Event::Finished { exit_code, .. },
                    Event::Finished {
                        exit_code: same,
                        name,
                        ended_ms: 0,
                    },
                ) => assert_eq!((exit_code, ""), (same, &*name)),
                // What an action made is an output of a target, or not staged.
                (Event::Action(_), after) => assert_eq!(after, Event::Other),
                // Nobody waits any more for what is to be completed.
                (
                    Event::Configured { label, kind, .. },
                    Event::Configured {
                        label: same,
                        kind: alike,
                        ..
                    },
                ) => assert_eq!((label, kind), (same, alike)),
                // Where links lead to here is nothing for elsewhere.
                (Event::ConvenienceSymlinks(_), after) => assert_eq!(after, Event::Other),
                (Event::NamedSet(before), Event::NamedSet(after)) => {
                    assert_eq!(before.children, after.children);
                    assert!(same_files(&before.files, &after.files), "{before:?}\n{after:?}");
                }
                (Event::Completed(before), Event::Completed(after)) => {
                    assert_eq!((before.target, before.success), (after.target, after.success));
                    assert!(same_files(&before.directories, &after.directories));
                    assert_eq!(before.groups.len(), after.groups.len());
                    for (before, after) in before.groups.iter().zip(&after.groups) {
                        assert_eq!((&before.name, &before.sets), (&after.name, &after.sets));
                        assert!(same_files(&before.files, &after.files));
                    }
                }
                (Event::TestResult(before), Event::TestResult(after)) => {
                    assert_eq!((before.label, before.run), (after.label, after.run));
                    assert!(same_files(&before.files, &after.files));
                }
                (before, after) => assert_eq!(before, after),
            }
        }
    }
    assert!(events > 100, "{events}");
}

/// But for where files of the build's own machine were.
fn same_files(before: &[File], after: &[File]) -> bool {
    let seen = |files: &[File]| -> Vec<_> {
        let files = files.iter();
        files
            .map(|file| (file.path.clone(), file.prefix_len, file.content.clone()))
            .collect()
    };
    seen(before) == seen(after)
}

#[test]
fn a_file_holds_no_more_than_its_size_allows_and_what_is_written_can_be_read() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = there.path().join("file");
    let (record, _) = Record::open(there.path()).unwrap();
    let journal = Journal::open(&there.path().join("journal"), JournalOptions::default()).unwrap();
    // Whatever zstd makes of it: very many small events, and a large one of one byte.
    let small = field(14, &field(3, &field(1, b"x")));
    let large = field(15, &field(1, &field(3, &vec![0; 40 << 20])));
    let events = std::iter::repeat_n(small, 200_000).chain([large]);
    let (_journal, entry) = journalled(here.path(), build().events().chain(events));
    let (exported, bytes) = export(&entry, &InvocationRow::default(), &[], Vec::new()).unwrap();
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(import(&path, &journal, &record).unwrap().events, exported.events);

    for raw in [
        // Events of no bytes at all, in one frame and in many; one event; no events, but a huge frame.
        vec![[0, b'e', 0, 0, 0, 0, 0, 0, 0, 0, 0].repeat(25 << 20)],
        vec![[0, b'e', 0, 0, 0, 0, 0, 0, 0, 0, 0].repeat(90_000); 300],
        vec![[&[0x80, 0x80, 0x80, 0x7d, b'e'][..], &vec![0; 262_144_009]].concat()],
        vec![vec![0x80; 290 << 20]],
    ] {
        let bytes = bomb(&raw);
        assert!(bytes.len() < 100_000, "{}", bytes.len());
        std::fs::write(&path, bytes).unwrap();
        let error = import(&path, &journal, &record).unwrap_err().to_string();
        assert!(error.contains("far more than a file of its size can"), "{error}");
    }
    record.close();
}

/// A file of the demo's build with secrets in it.
fn exported(dir: &Path) -> Vec<u8> {
    let (_journal, entry) = journalled(dir, build().events().chain(secrets()));
    let row = InvocationRow {
        remote_cache: "grpc://cache:1".to_owned(),
        remote_instance_name: "main".to_owned(),
        command: "build".to_owned(),
        started_ms: 77,
        finished: true,
        exit_code: 1,
        ..InvocationRow::default()
    };
    let (exported, bytes) = export(&entry, &row, &[], Vec::new()).unwrap();
    assert_eq!(exported.left_out, 0);
    assert_eq!(exported.header.digest_function, "sha256");
    bytes
}

#[test]
fn what_is_exported_can_be_imported_twice_and_selects_the_same() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let bytes = exported(here.path());
    let path = there.path().join("file");
    std::fs::write(&path, &bytes).unwrap();
    let (record, _) = Record::open(there.path()).unwrap();
    let journal = Journal::open(&there.path().join("journal"), JournalOptions::default()).unwrap();
    for known in [false, true] {
        let imported = import(&path, &journal, &record).unwrap();
        assert_eq!(imported.known, known);
        let entries = journal.list().unwrap();
        assert_eq!(entries.len(), 1);
        assert!(entries[0].settled, "nothing is left to do for it");
    }
    let row = record.invocation("inv").unwrap();
    assert_eq!(
        (row.root, row.imported, row.state, row.exit_code),
        (None, true, InvocationState::Settled, 1)
    );
    assert_eq!(
        (&*row.remote_cache, &*row.remote_instance_name),
        ("grpc://cache:1", "main")
    );
    assert_eq!(row.started_ms, 77);
    assert!(
        record
            .targets("inv")
            .iter()
            .any(|t| t.label == "//lib:lib" && t.success)
    );

    let raw: Vec<_> = journal.read("inv").unwrap().map(Result::unwrap).collect();
    assert!(raw.iter().all(|record| !contains(&record.payload, SECRET)));
    assert!(!contains(&zstd_less(&bytes), SECRET));
    let read = |records| Recorded::read(records, None).unwrap().everything("inv").unwrap();
    let original = Journal::view(&here.path().join("journal"));
    assert_eq!(
        read(journal.read("inv").unwrap()).artifacts,
        read(original.read("inv").unwrap()).artifacts
    );
    record.close();
}

#[test]
fn runfiles_travel_with_a_build_and_further() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (_journal, entry) = journalled(here.path(), build().events());
    let runfiles = [
        Carried {
            program: "bazel-out/app".to_owned(),
            name: "_main/x".to_owned(),
            exec_path: "x".to_owned(),
            what: Some(What::Link("y".to_owned())),
        },
        Carried::bytes(Bytes::from_static(b"content")),
    ];
    let (exported, bytes) = export(&entry, &InvocationRow::default(), &runfiles, Vec::new()).unwrap();
    let path = there.path().join("file");
    std::fs::write(&path, &bytes).unwrap();
    let (record, _) = Record::open(there.path()).unwrap();
    let journal = Journal::open(&there.path().join("journal"), JournalOptions::default()).unwrap();
    assert_eq!(import(&path, &journal, &record).unwrap().events, exported.events);
    record.close();
    let entry = journal.find("inv").unwrap();
    let recorded = Recorded::read(entry.read().unwrap(), None).unwrap();
    assert_eq!(recorded.carried, runfiles);
    assert!(recorded.finished && recorded.notes.is_empty());
    let (again, _) = export(&entry, &InvocationRow::default(), &[], Vec::new()).unwrap();
    assert_eq!(again.events, exported.events);
}

#[test]
fn an_import_with_runfiles_replaces_one_without_but_no_build_that_was_made_here() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (_journal, entry) = journalled(here.path(), build().events());
    let runfiles = [Carried::bytes(Bytes::from_static(b"content"))];
    let row = InvocationRow::default();
    let files = [&[][..], &runfiles].map(|carried| {
        let path = there.path().join(format!("file-{}", carried.len()));
        std::fs::write(&path, export(&entry, &row, carried, Vec::new()).unwrap().1).unwrap();
        path
    });
    let [without, with] = &files;
    let (record, _) = Record::open(there.path()).unwrap();
    let journal = Journal::open(&there.path().join("journal"), JournalOptions::default()).unwrap();
    let carried = || {
        let records = journal.read("inv").unwrap();
        Recorded::read(records, None).unwrap().carried
    };
    for (file, known, expected) in [
        (without, false, &[][..]),
        (with, false, &runfiles),
        (with, true, &runfiles),
        (without, true, &runfiles),
    ] {
        assert_eq!(import(file, &journal, &record).unwrap().known, known, "{file:?}");
        assert_eq!(carried(), expected, "{file:?}");
    }
    // As if it had been made here.
    record.remove_invocations(&["inv".to_owned()]);
    std::fs::remove_file(journal.find("inv").unwrap().path).unwrap();
    import(without, &journal, &record).unwrap();
    let row = record.invocation("inv").unwrap();
    record.put_invocation(&InvocationRow {
        imported: false,
        ..row
    });
    assert!(import(with, &journal, &record).unwrap().known);
    assert_eq!(carried(), []);
    record.close();
}

#[test]
fn a_file_with_the_id_of_another_build_that_is_here_is_refused() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = there.path().join("file");
    std::fs::write(&path, exported(here.path())).unwrap();
    let own = StreamKey {
        build_id: "own".to_owned(),
        invocation_id: "inv".to_owned(),
        ..StreamKey::default()
    };
    for in_record in [true, false] {
        let dir = there
            .path()
            .join(if in_record { "record" } else { "journal-only" });
        std::fs::create_dir(&dir).unwrap();
        let (record, _) = Record::open(&dir).unwrap();
        let journal = Journal::open(&dir.join("journal"), JournalOptions::default()).unwrap();
        if in_record {
            record.put_invocation(&InvocationRow {
                invocation_id: own.invocation_id.clone(),
                build_id: own.build_id.clone(),
                ..InvocationRow::default()
            });
        } else {
            // Older than what the file says of itself.
            assert!(journal.inlet(&own, 1).unwrap().settle(false).unwrap());
        }
        let before = journal.list().unwrap();
        let error = import(&path, &journal, &record).unwrap_err();
        assert!(matches!(error, StageError::Taken { .. }), "{error}");
        for part in ["inv", "\"own\"", "\"b\"", "--state-dir"] {
            assert!(error.to_string().contains(part), "{error}");
        }
        assert_eq!(journal.list().unwrap(), before);
        assert_eq!(journal.find("inv").is_ok(), !in_record);
        record.close();
    }
}

/// All that is packed in the file, in one piece.
fn zstd_less(file: &[u8]) -> Vec<u8> {
    let mut rest = &file[15..];
    let mut out = Vec::new();
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let (body, next) = after[8..].split_at(u32::from_le_bytes(*length) as usize);
        out.extend(zstd::decode_all(body).unwrap());
        rest = next;
    }
    assert!(contains(&out, "//lib:lib"), "it is read at all");
    out
}

#[test]
fn a_damaged_file_is_refused_by_name_and_offset_and_nothing_is_taken_in() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let bytes = exported(here.path());
    let path = there.path().join("file");
    let (record, _) = Record::open(there.path()).unwrap();
    let journal = Journal::open(&there.path().join("journal"), JournalOptions::default()).unwrap();
    let refused = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let error = import(&path, &journal, &record).unwrap_err();
        assert!(matches!(error, StageError::Archive { .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.contains(&path.display().to_string()) && text.contains("at byte"),
            "{text}"
        );
        text
    };
    for n in (0..bytes.len()).step_by(bytes.len() / 40) {
        refused(&bytes[..n]);
        let mut flipped = bytes.clone();
        flipped[n] ^= 0x10;
        refused(&flipped);
    }
    assert!(refused(&[&bytes[..], b"x"].concat()).contains("trailing data after its end"));
    let end = bytes.len() - 1;
    assert!(refused(&bytes[..end]).contains("within a frame"));
    // Without the frame in the middle, whose checksum nobody misses.
    let frame = |at: usize| {
        let length = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        at..at + 12 + length
    };
    let second = frame(frame(15).end);
    let without = [&bytes[..second.start], &bytes[second.end..]].concat();
    assert!(refused(&without).contains("events are missing"));
    assert_eq!(journal.list().unwrap(), []);
    assert!(record.invocations(1).is_empty());
    let left: Vec<_> = std::fs::read_dir(journal.dir())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(left, ["lock"]);
    record.close();
}
