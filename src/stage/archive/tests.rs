//! There and back again, secrets, and damage.

use std::{borrow::Cow, path::Path};

use prost::Message as _;

use super::{
    super::{
        StageError,
        recorded::Recorded,
        tests::{build, journalled},
    },
    export, import,
    redact::Secrets,
};
use crate::{
    bes::{Journal, JournalOptions, StreamKey},
    proto::build_event_stream::{
        BuildEvent, ChunkList, CommandLine, CommandLineSection, Option as CommandOption, OptionList,
        Progress, build_event::Payload, command_line_section::SectionType,
    },
    record::{InvocationRow, InvocationState, Record},
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

/// Events with a secret in every place that is known to have them, in the forms in which options are written.
fn secrets() -> Vec<Vec<u8>> {
    let arguments = [
        format!("--remote_header=x-token={SECRET}"),
        format!("--bes_header=authorization=Bearer {SECRET}"),
        format!("--remote_cache_header={SECRET}"),
        format!("--client_env=HOME={SECRET}"),
        format!("--action_env=K={SECRET}"),
        format!("--test_env=K={SECRET}"),
        format!("--host_action_env=K={SECRET}"),
        format!("--repo_env=K={SECRET}"),
        format!("--remote_cache=grpcs://me:{SECRET}@host:1"),
        format!("--//my:token={SECRET}"),
        format!("--define=PASSWORD={SECRET}"),
        "--remote_header".to_owned(),
        format!("x={SECRET}"),
        format!("--test_env K={SECRET}"),
        // Of these, only the names are known: the values are the environment's.
        "--action_env=INHERITED".to_owned(),
        "--action_env=HARMLESS=x".to_owned(),
        format!("export API_TOKEN={SECRET}; HARMLESS='{SECRET} {SECRET}' ./t"),
        format!("K={SECRET} {SECRET}"),
        "--jobs=8".to_owned(),
    ];
    let list = |number: u32| -> Vec<u8> {
        arguments
            .iter()
            .flat_map(|a| field(number, a.as_bytes()))
            .collect()
    };
    let option = |name: &str, value: String| CommandOption {
        combined_form: format!("--{name}={value}"),
        option_name: name.to_owned(),
        option_value: value,
    };
    let section = |section_type| CommandLineSection {
        section_label: "command options".to_owned(),
        section_type: Some(section_type),
    };
    let line = |label: &str, section_type| {
        event(Payload::StructuredCommandLine(CommandLine {
            command_line_label: label.to_owned(),
            sections: vec![section(section_type)],
        }))
    };
    let options = OptionList {
        option: vec![
            option("remote_header", format!("x={SECRET}")),
            option("action_env", format!("K={SECRET}")),
            option("remote_cache", format!("grpc://me:{SECRET}@h:1")),
            option("jobs", "8".to_owned()),
        ],
    };
    let pair = |key: &str, value: &str| [field(1, key.as_bytes()), field(2, value.as_bytes())].concat();
    let texts = format!(
        "Inherited 'build' options: --remote_header=x={SECRET} --jobs=8\nAuthorization: Bearer {SECRET}\n\
         git clone https://me:{SECRET}@host/x\n\
         (cd /x && \\\n  exec env - \\\n    API_TOKEN={SECRET} \\\n    INHERITED='a {SECRET}' \\\n    \
         HARMLESS={SECRET} \\\n  K={SECRET} PATH=/bin ./t)"
    );
    vec![
        line("original", SectionType::OptionList(options.clone())),
        line("canonical", SectionType::OptionList(options)),
        line(
            "original",
            SectionType::ChunkList(ChunkList {
                chunk: arguments.to_vec(),
            }),
        ),
        event(Payload::Progress(Progress {
            stderr: texts.clone().into(),
        })),
        field(12, &list(1)),
        field(
            13,
            &[list(1), list(2), list(3), list(4), field(5, SECRET.as_bytes())].concat(),
        ),
        field(5, &field(4, texts.as_bytes())),
        field(4, &field(2, texts.as_bytes())),
        field(7, &list(9)),
        field(
            16,
            &field(1, &pair("BUILD_SCM_URL", &format!("https://u:{SECRET}@host/x"))),
        ),
        field(17, &field(4, &pair("MY_PASSWORD", SECRET))),
        field(26, &field(1, &pair("api_key", SECRET))),
        field(26, &field(1, &pair("INHERITED", SECRET))),
        field(
            7,
            &[
                field(9, b"bash"),
                field(9, b"-c"),
                field(9, format!("API_TOKEN={SECRET} ./t").as_bytes()),
                field(
                    9,
                    format!("./t; INHERITED={SECRET} HARMLESS={SECRET} ./t").as_bytes(),
                ),
            ]
            .concat(),
        ),
        field(29, &[list(2), field(3, &pair("HOME", SECRET))].concat()),
        field(
            1,
            &field(17, &field(1, format!("https://u:{SECRET}@h/f.zip").as_bytes())),
        ),
        field(
            2,
            &field(17, &field(1, format!("https://u:{SECRET}@h/f.zip").as_bytes())),
        ),
    ]
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

#[test]
fn no_secret_leaves_and_all_else_stays_byte_for_byte() {
    let learned = Secrets::learn(secrets().into_iter().map(Cow::Owned));
    for event in secrets() {
        assert!(contains(&event, SECRET));
        // A field that nobody knows, with something in it.
        let event = [event, field(900, b"unknown")].concat();
        let redacted = learned.redact(&event).unwrap();
        let shown = String::from_utf8_lossy(&redacted).into_owned();
        assert!(!contains(&redacted, SECRET), "{shown}");
        assert!(contains(&redacted, "unknown"), "{shown}");
        BuildEvent::decode(&*redacted).unwrap();
        // All of the field with a build's beginning (5) goes that has its options.
        let stays = contains(&event, "--jobs=8") && event[0] != 5 << 3 | 2;
        assert!(!stays || contains(&redacted, "--jobs=8"), "{shown}");
    }
    for event in build().events() {
        assert_eq!(learned.redact(&event).unwrap(), event, "nothing secret in it");
    }
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
    let (exported, bytes) = export(&entry, &row, Vec::new()).unwrap();
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
            assert!(journal.inlet(&own, 1).unwrap().settle().unwrap());
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
    assert!(refused(&[&bytes[..], b"x"].concat()).contains("more behind its end"));
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
