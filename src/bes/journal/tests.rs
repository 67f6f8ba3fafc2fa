//! The journal on a real file system.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    path::Path,
    time::Duration,
};

use super::*;
use crate::{
    bes::sink::StreamKey,
    proto::google::devtools::build::v1::{BuildEvent, OrderedBuildEvent, build_event},
};

fn key(invocation: &str) -> StreamKey {
    StreamKey {
        build_id: "b".to_owned(),
        invocation_id: invocation.to_owned(),
    }
}

fn event(sequence_number: i64, text: &str) -> OrderedBuildEvent {
    OrderedBuildEvent {
        stream_id: None,
        sequence_number,
        event: Some(BuildEvent {
            event_time: None,
            event: Some(build_event::Event::BazelEvent(prost_types::Any {
                type_url: String::new(),
                value: text.as_bytes().to_vec(),
            })),
        }),
    }
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
        let journal = Journal::open(&dir.path().join("x"), JournalOptions { durable }).unwrap();
        let name = format!("durable {durable}");
        let (mut writer, recovered) = journal.stream(&key(&name)).unwrap();
        assert_eq!((recovered.highest, recovered.frames.len()), (None, 0));
        append(&mut writer, 1..=3);
        let second = append(&mut writer, 4..=5);
        assert_eq!(numbers(&journal, &name), [1, 2, 3, 4, 5]);
        let records = read_frame(&writer.file(), &writer.path(), second).unwrap();
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
    journal.finish("i").unwrap();
    assert!(journal.unfinished().unwrap().is_empty());
    assert!(journal.find("i").unwrap().settled);
    let (mut writer, recovered) = journal.stream(&key("i")).unwrap();
    assert!(recovered.settled);
    assert_eq!(recovered.highest, Some(1));
    append(&mut writer, [2]);
    assert_eq!(journal.unfinished().unwrap().len(), 1);
    assert_eq!(numbers(&journal, "i"), [1, 2]);
    assert!(matches!(
        journal.finish("none"),
        Err(JournalError::Unknown { .. })
    ));
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
