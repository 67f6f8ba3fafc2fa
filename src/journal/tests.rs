//! The journal on a real file system.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    path::Path,
    time::{Duration, SystemTime},
};

use prost::Message as _;

use super::{received::Received, *};
use crate::{
    builds::StreamKey,
    proto::google::devtools::build::v1::{
        BuildEvent, OrderedBuildEvent, PublishBuildToolEventStreamRequest, build_event,
    },
};

mod any_damage;

fn key(invocation: &str) -> StreamKey {
    StreamKey {
        build_id: "b".to_owned(),
        invocation_id: invocation.to_owned(),
        ..StreamKey::default()
    }
}

fn event(sequence_number: i64, text: &str) -> Received {
    let request = PublishBuildToolEventStreamRequest {
        ordered_build_event: Some(OrderedBuildEvent {
            stream_id: None,
            sequence_number,
            event: Some(BuildEvent {
                event_time: None,
                event: Some(build_event::Event::BazelEvent(prost_types::Any {
                    type_url: String::new(),
                    value: text.as_bytes().to_vec(),
                })),
            }),
        }),
        ..PublishBuildToolEventStreamRequest::default()
    };
    Received::read(request.encode_to_vec().into()).unwrap().unwrap()
}

fn append(writer: &mut Writer, sequences: impl IntoIterator<Item = i64>) -> FrameAt {
    let mut batch = Batch::default();
    for n in sequences {
        batch.push(7, &event(n, &format!("event {n}")));
    }
    writer.append(&batch).unwrap()
}

fn open(dir: &Path) -> Journal {
    Journal::open(dir, JournalOptions::default()).unwrap()
}

fn numbers(journal: &Journal, invocation: &str) -> Vec<i64> {
    let records = journal.read(invocation).unwrap();
    records.map(|r| r.unwrap().sequence).collect()
}

#[test]
fn what_is_appended_reads_back_and_frames_can_be_read_alone() {
    let dir = tempfile::tempdir().unwrap();
    for durable in [false, true] {
        let journal = Journal::open(
            &dir.path().join("x"),
            JournalOptions {
                durable,
                ..JournalOptions::default()
            },
        )
        .unwrap();
        let name = format!("durable {durable}");
        let (mut writer, recovered) = journal.stream(&key(&name)).unwrap();
        assert_eq!((recovered.highest, recovered.frames.len()), (None, 0));
        append(&mut writer, 1..=3);
        let second = append(&mut writer, 4..=5);
        assert_eq!(numbers(&journal, &name), [1, 2, 3, 4, 5]);
        let records = writer.place(second).unwrap().read().unwrap();
        assert_eq!(records.len(), 2);
        assert_eq!((records[0].received_ms, records[0].kind), (7, RecordKind::Event));
        assert_eq!(records[1].build_event().unwrap(), "event 5");
    }
}

#[test]
fn a_file_cut_at_any_byte_gives_its_whole_frames_and_can_be_continued() {
    let dir = tempfile::tempdir().unwrap();
    let (bytes, ends, name) = {
        let journal = open(&dir.path().join("made"));
        let (mut writer, _) = journal.stream(&key("i")).unwrap();
        let head = fs::metadata(writer.path()).unwrap().len();
        let mut ends = vec![(head, 0)];
        for n in [1, 3, 4] {
            let at = append(&mut writer, n..=n);
            ends.push((at.offset + at.len, n));
        }
        let name = writer.path().file_name().unwrap().to_owned();
        (fs::read(writer.path()).unwrap(), ends, name)
    };
    let head = ends[0].0;
    let torn = dir.path().join("torn");
    let journal = open(&torn);
    for len in 0..=bytes.len() {
        fs::write(torn.join(&name), &bytes[..len]).unwrap();
        let whole: Vec<i64> = ends[1..]
            .iter()
            .filter(|e| e.0 <= len as u64)
            .map(|e| e.1)
            .collect();
        if len as u64 >= head {
            assert_eq!(numbers(&journal, "i"), whole, "cut at {len}");
        } else {
            assert!(journal.list().unwrap().is_empty());
        }
        let (mut writer, recovered) = journal.stream(&key("i")).unwrap();
        assert_eq!(recovered.highest, whole.last().copied(), "cut at {len}");
        append(&mut writer, [9]);
        drop(writer);
        let mut expected = whole;
        expected.push(9);
        assert_eq!(numbers(&journal, "i"), expected, "continued after a cut at {len}");
    }
}

#[test]
fn a_flipped_byte_loses_its_frame_and_what_follows_but_invents_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    let (mut writer, _) = journal.stream(&key("i")).unwrap();
    let first = append(&mut writer, [1, 2]);
    let second = append(&mut writer, [3]);
    let path = writer.path();
    drop(writer);
    let bytes = fs::read(&path).unwrap();
    for at in first.offset..second.offset + second.len {
        let mut bad = bytes.clone();
        bad[at as usize] ^= 0x10;
        fs::write(&path, bad).unwrap();
        let expected: &[i64] = if at < second.offset { &[] } else { &[1, 2] };
        assert_eq!(numbers(&journal, "i"), expected, "byte {at}");
    }
}

#[test]
fn a_zero_filled_tail_is_cut() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    let (mut writer, _) = journal.stream(&key("i")).unwrap();
    append(&mut writer, [1]);
    let path = writer.path();
    drop(writer);
    let len = fs::metadata(&path).unwrap().len();
    fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(len + 4096)
        .unwrap();
    let (_, recovered) = journal.stream(&key("i")).unwrap();
    assert_eq!(recovered.highest, Some(1));
    assert_eq!(fs::metadata(&path).unwrap().len(), len);
}

#[test]
fn files_and_directory_are_private_whatever_the_ids() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(&dir.path().join("a/b"));
    let mut paths = Vec::new();
    for id in [
        "../../etc/passwd",
        "/",
        "",
        ".",
        "..",
        "a\0b",
        "ü",
        &"x".repeat(5000),
        "x_",
        "x/",
    ] {
        let (mut writer, _) = journal.stream(&key(id)).unwrap();
        append(&mut writer, [1]);
        assert_eq!(writer.path().parent(), Some(journal.dir()));
        let mode = fs::metadata(writer.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{id:?}");
        paths.push(writer.path());
        assert_eq!(numbers(&journal, id), [1], "{id:?}");
    }
    paths.sort();
    paths.dedup();
    assert_eq!(paths.len(), 10);
    let mode = fs::metadata(journal.dir()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}

#[test]
fn settled_is_remembered_until_something_is_appended() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    let (mut writer, _) = journal.stream(&key("i")).unwrap();
    append(&mut writer, [1]);
    assert_eq!(journal.unfinished().unwrap().len(), 1);
    drop(writer);
    journal.stream(&key("i")).unwrap().0.settle().unwrap();
    assert!(journal.unfinished().unwrap().is_empty());
    assert!(journal.find("i").unwrap().settled);
    let (mut writer, recovered) = journal.stream(&key("i")).unwrap();
    assert!(recovered.settled);
    assert_eq!(recovered.highest, Some(1));
    append(&mut writer, [2]);
    assert_eq!(journal.unfinished().unwrap().len(), 1);
    assert_eq!(numbers(&journal, "i"), [1, 2]);
}

#[test]
fn one_process_writes_and_others_may_look() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    let again = Journal::open(dir.path(), JournalOptions::default());
    assert!(matches!(again, Err(JournalError::InUse { .. })));
    let (mut writer, _) = journal.stream(&key("i")).unwrap();
    append(&mut writer, [1]);
    let view = Journal::view(dir.path());
    assert_eq!(numbers(&view, "i"), [1]);
    assert!(matches!(
        view.stream(&key("i")),
        Err(JournalError::ReadOnly { .. })
    ));
}

#[test]
fn a_file_of_another_version_is_moved_aside() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    let (writer, _) = journal.stream(&key("i")).unwrap();
    let path = writer.path();
    drop(writer);
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    // The version follows magic, size and name.
    file.write_all_at(&[99], 8 + 15).unwrap();
    let (mut writer, recovered) = journal.stream(&key("i")).unwrap();
    assert_eq!(recovered.highest, None);
    append(&mut writer, [1]);
    assert_eq!(numbers(&journal, "i"), [1]);
    assert!(path.with_extension("damaged").exists());
}

#[test]
fn retention_spares_open_files() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    let (mut writer, _) = journal.stream(&key("open")).unwrap();
    append(&mut writer, [1]);
    writer.settle().unwrap();
    let (mut other, _) = journal.stream(&key("closed")).unwrap();
    append(&mut other, [1]);
    other.settle().unwrap();
    drop(other);
    assert!(
        journal
            .plan(Some(Duration::from_secs(60)), None)
            .unwrap()
            .delete
            .is_empty()
    );
    let plan = journal.plan(None, Some(0)).unwrap();
    assert_eq!(plan.delete.len(), 1);
    let executed = journal.execute(&plan);
    assert_eq!((executed.files, executed.skipped), (1, 0));
    assert_eq!(journal.list().unwrap().len(), 1);
    // What was planned while it was closed is spared if it is open now.
    drop(writer);
    let plan = journal.plan(None, Some(0)).unwrap();
    let _writer = journal.stream(&key("open")).unwrap();
    assert_eq!(journal.execute(&plan).skipped, 1);
}

#[test]
fn the_file_is_plain_zstd() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    let (mut writer, _) = journal.stream(&key("i")).unwrap();
    append(&mut writer, 1..=3);
    append(&mut writer, 4..=4);
    let file = fs::File::open(writer.path()).unwrap();
    let mut raw = Vec::new();
    raw.write_all(&zstd::stream::decode_all(file).unwrap()).unwrap();
    assert_eq!(format::records(raw.into()).unwrap().len(), 4);
}

#[test]
fn headers_are_kept_before_their_events_and_count_as_none() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    let (mut writer, _) = journal.stream(&key("i")).unwrap();
    let mut headers = tonic::metadata::MetadataMap::new();
    headers.insert("x-api-key", "secret".parse().unwrap());
    let mut batch = Batch::default();
    batch.push_headers(1, 5, &headers::encode(&headers));
    batch.push(1, &event(5, "five"));
    writer.append(&batch).unwrap();
    let records: Vec<_> = journal.read("i").unwrap().map(Result::unwrap).collect();
    assert_eq!(records.len(), 2);
    assert_eq!(records[0].headers().unwrap().get("x-api-key").unwrap(), "secret");
    assert_eq!(records[0].build_event(), None);
    assert_eq!(records[1].headers().map(|_| ()), None);
    assert_eq!(records[1].payload, event(5, "five").request);
    drop(writer);
    assert_eq!(journal.stream(&key("i")).unwrap().1.highest, Some(5));
}

#[test]
fn lifecycle_calls_that_an_earlier_version_kept_are_ignored_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let calls = dir.path().join("lifecycle");
    fs::create_dir(&calls).unwrap();
    fs::write(calls.join("x.journal"), "call").unwrap();
    let journal = open(dir.path());
    assert!(!calls.exists() && journal.list().unwrap().is_empty());
}

#[test]
fn a_cursor_goes_with_its_journal_and_not_before() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    for name in ["stays", "goes"] {
        let (mut writer, _) = journal.stream(&key(name)).unwrap();
        append(&mut writer, [1]);
        journal.cursor(&key(name)).save(1);
        if name == "goes" {
            writer.settle().unwrap();
        }
    }
    // Upstream still has to get it: no limit of size touches it.
    let plan = journal.plan(None, Some(0)).unwrap();
    assert_eq!(journal.execute(&plan).files, 1);
    assert_eq!(journal.cursor(&key("stays")).load(), 1);
    assert_eq!(journal.cursor(&key("goes")).load(), 0);
    let names = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name());
    assert_eq!(names.count(), 3, "lock, journal and cursor");
}

#[test]
fn what_was_used_lately_outlives_what_is_younger() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    let mut bytes = 0;
    for (name, age) in [("first", 10), ("second", 100)] {
        let (mut writer, _) = journal.stream(&key(name)).unwrap();
        append(&mut writer, [1]);
        writer.settle().unwrap();
        let file = fs::File::options().write(true).open(writer.path()).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(age))
            .unwrap();
        bytes = fs::metadata(writer.path()).unwrap().len();
    }
    let plan = journal.plan(None, Some(bytes)).unwrap();
    let gone: Vec<_> = plan.delete.iter().map(|e| e.key.invocation_id.as_str()).collect();
    assert_eq!(gone, ["second"]);
}

#[test]
fn large_events_are_not_copied_into_their_frame_and_read_back_among_small_ones() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    let (mut writer, _) = journal.stream(&key("large")).unwrap();
    let mut batch = Batch::default();
    let events: Vec<Received> = [10, 300_000, 400_000, 5, 1 << 20]
        .iter()
        .zip(1..)
        .map(|(length, n)| event(n, &n.to_string().repeat(*length)))
        .collect();
    for event in &events {
        batch.push(7, event);
    }
    let sum: usize = events.iter().map(|event| event.request.len()).sum();
    assert!(batch.len() > sum && batch.len() < sum + 100);
    assert_eq!(batch.pieces().map(<[u8]>::len).sum::<usize>(), batch.len());
    assert!(
        batch
            .pieces()
            .any(|piece| piece.as_ptr() == events[1].request.as_ptr())
    );
    writer.append(&batch).unwrap();
    batch.clear();
    assert!(batch.is_empty() && batch.pieces().all(<[u8]>::is_empty));
    let read: Vec<_> = journal
        .read("large")
        .unwrap()
        .map(|record| record.unwrap().payload)
        .collect();
    assert_eq!(read, events.iter().map(|e| e.request.clone()).collect::<Vec<_>>());
}
