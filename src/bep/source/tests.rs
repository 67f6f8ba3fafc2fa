use std::{fs as std_fs, future::Future, io::Write as _};

use prost::Message as _;

use super::*;
use crate::{
    bep::event::Event,
    proto::build_event_stream::{self as proto, build_event::Payload},
};

/// An event that can be recognized by its exec root.
fn message(root: &str, last: bool) -> proto::BuildEvent {
    proto::BuildEvent {
        id: Some(proto::BuildEventId {
            id: Some(proto::build_event_id::Id::Workspace(
                proto::build_event_id::Empty {},
            )),
        }),
        last_message: last,
        payload: Some(Payload::WorkspaceInfo(proto::WorkspaceConfig {
            local_exec_root: root.to_owned(),
        })),
        ..Default::default()
    }
}

fn binary(root: &str, last: bool) -> Vec<u8> {
    message(root, last).encode_length_delimited_to_vec()
}

fn json(root: &str, last: bool) -> Vec<u8> {
    format!(
        "{{\"id\":{{\"workspace\":{{}}}},\"workspaceInfo\":{{\"localExecRoot\":\"{root}\"}},\"lastMessage\":{last}}}\n"
    )
    .into_bytes()
}

/// The exec root of the next event.
async fn next(file: &mut EventFile) -> Result<Option<String>, BepError> {
    Ok(file.next().await?.map(|framed| match framed.event {
        Event::ExecRoot(root) => root,
        event => panic!("{event:?}"),
    }))
}

/// A test that waits for a file must not wait for ever.
async fn bounded<T>(future: impl Future<Output = T>) -> T {
    time::timeout(Duration::from_secs(30), future)
        .await
        .expect("nothing happened for half a minute")
}

struct Fixture {
    dir: tempfile::TempDir,
}

impl Fixture {
    fn new(bytes: &[u8]) -> Self {
        let fixture = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        std_fs::write(fixture.path(), bytes).unwrap();
        fixture
    }

    fn fifo() -> Self {
        let fixture = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        rustix::fs::mknodat(
            rustix::fs::CWD,
            fixture.path(),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        fixture
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("events")
    }

    fn append(&self, bytes: &[u8]) {
        let mut file = std_fs::OpenOptions::new().append(true).open(self.path()).unwrap();
        file.write_all(bytes).unwrap();
    }

    async fn open(&self, follow: bool) -> EventFile {
        EventFile::open(self.path(), follow).await.unwrap()
    }
}

#[tokio::test]
async fn both_formats_are_recognised_and_read_to_the_end() {
    for (format, frame) in [
        (Format::Binary, binary as fn(&str, bool) -> Vec<u8>),
        (Format::Json, json),
    ] {
        let (first, second) = (frame("/a", false), frame("/b", true));
        let fixture = Fixture::new(&[&first[..], &second].concat());
        let mut file = fixture.open(false).await;
        assert_eq!(next(&mut file).await.unwrap().as_deref(), Some("/a"));
        assert_eq!(file.format(), Some(format));
        assert_eq!(file.raw().offset, 0);
        assert!(first.ends_with(&file.raw().bytes) || first[..first.len() - 1] == file.raw().bytes);
        assert_eq!(next(&mut file).await.unwrap().as_deref(), Some("/b"));
        assert_eq!(file.raw().offset, first.len() as u64, "{format:?}");
        assert_eq!(next(&mut file).await.unwrap(), None);
        assert_eq!(next(&mut file).await.unwrap(), None);
    }
}

#[tokio::test]
async fn a_first_message_as_long_as_a_braces_code_is_not_json() {
    let padding = "x".repeat(123 - message("", false).encoded_len());
    // The string's own field adds a tag and a length when it is not empty; its message was there already.
    let padding = &padding[2..];
    let bytes = binary(padding, false);
    assert_eq!(bytes[0], b'{');
    let mut file = Fixture::new(&bytes).open(false).await;
    assert_eq!(next(&mut file).await.unwrap().as_deref(), Some(padding));
}

#[tokio::test]
async fn an_event_larger_than_a_read_is_put_together() {
    let long = "x".repeat(3 * CHUNK);
    for frame in [binary, json] {
        let fixture = Fixture::new(&[frame(&long, false), frame("/b", true)].concat());
        let mut file = fixture.open(false).await;
        assert_eq!(next(&mut file).await.unwrap().as_deref(), Some(&long[..]));
        assert_eq!(next(&mut file).await.unwrap().as_deref(), Some("/b"));
    }
}

#[tokio::test]
async fn a_cut_tail_is_reported_after_all_whole_events() {
    for frame in [binary, json] {
        let (first, second) = (frame("/a", false), frame("/b", true));
        let whole = second.len() - usize::from(second[0] == b'{');
        for cut in 1..whole {
            let fixture = Fixture::new(&[&first[..], &second[..cut]].concat());
            let mut file = fixture.open(false).await;
            assert_eq!(next(&mut file).await.unwrap().as_deref(), Some("/a"));
            match file.next().await {
                Err(error @ BepError::Truncated { offset, have, .. }) => {
                    assert_eq!((offset, have), (first.len() as u64, cut as u64));
                    assert!(!error.is_skippable());
                    assert!(error.to_string().contains("events"), "{error}");
                }
                other => panic!("cut at {cut}: {other:?}"),
            }
            assert_eq!(next(&mut file).await.unwrap(), None);
        }
    }
}

#[tokio::test]
async fn a_last_json_line_without_its_end_is_whole() {
    let mut bytes = [&json("/a", false)[..], b"\r\n\n", &json("/b", true)].concat();
    bytes.pop();
    let mut file = Fixture::new(&bytes).open(false).await;
    assert_eq!(next(&mut file).await.unwrap().as_deref(), Some("/a"));
    assert_eq!(next(&mut file).await.unwrap().as_deref(), Some("/b"));
    assert_eq!(next(&mut file).await.unwrap(), None);
}

#[tokio::test]
async fn an_undecodable_event_is_named_by_its_offset_and_passed() {
    for (frame, bad) in [
        // A started event whose uuid is not UTF-8.
        (
            binary as fn(&str, bool) -> Vec<u8>,
            &[5, 0x2a, 0x03, 0x0a, 0x01, 0xff][..],
        ),
        (json, b"{\"started\":{\"uuid\":\"\xff\"}}\n"),
    ] {
        let first = frame("/a", false);
        let fixture = Fixture::new(&[&first[..], bad, &frame("/b", true)].concat());
        let mut file = fixture.open(false).await;
        assert_eq!(next(&mut file).await.unwrap().as_deref(), Some("/a"));
        let error = file.next().await.unwrap_err();
        assert!(error.is_skippable(), "{error}");
        assert!(
            error.to_string().contains(&format!("byte {}", first.len())),
            "{error}"
        );
        assert_eq!(file.raw().offset, first.len() as u64);
        assert_eq!(next(&mut file).await.unwrap().as_deref(), Some("/b"));
    }
}

#[tokio::test]
async fn what_cannot_be_a_length_or_is_too_large_ends_the_file() {
    let first = binary("/a", false);
    for (bytes, part) in [
        (&[0xff; 20][..], "32 bits"),
        (&[0; 20], "zero"),
        (&[0xff, 0xff, 0xff, 0xff, 0x0f, 0], "limit"),
    ] {
        let fixture = Fixture::new(&[&first[..], bytes].concat());
        let mut file = fixture.open(false).await;
        assert_eq!(next(&mut file).await.unwrap().as_deref(), Some("/a"));
        let error = file.next().await.unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains(part) && text.contains(&format!("byte {}", first.len())),
            "{text}"
        );
        assert!(!error.is_skippable());
        assert_eq!(next(&mut file).await.unwrap(), None);
    }
    for frame in [binary, json] {
        let fixture = Fixture::new(&frame(&"x".repeat(1000), true));
        let mut file = fixture.open(false).await.with_limit(1000);
        assert!(matches!(
            file.next().await,
            Err(BepError::TooLarge { limit: 1000, .. })
        ));
    }
}

#[tokio::test]
async fn a_followed_file_is_read_as_it_grows_until_the_last_message() {
    for frame in [binary, json] {
        let fixture = Fixture::new(b"");
        let mut file = fixture.open(true).await;
        let events = [frame("/a", false), frame("/b", true)].concat();
        let (one, rest) = events.split_at(1);
        let (two, three) = rest.split_at(events.len() / 2);
        let write = async {
            for part in [one, two, three, b"garbage that nobody reads"] {
                fixture.append(part);
                time::sleep(POLL * 2).await;
            }
        };
        let read = async {
            assert_eq!(next(&mut file).await.unwrap().as_deref(), Some("/a"));
            assert_eq!(next(&mut file).await.unwrap().as_deref(), Some("/b"));
            assert_eq!(next(&mut file).await.unwrap(), None);
        };
        bounded(async { tokio::join!(write, read) }).await;
    }
}

#[tokio::test]
async fn a_followed_file_that_becomes_another_one_is_an_error() {
    type Change = fn(&Path);
    let changes: [(&str, Change); 3] = [
        ("truncated", |path| std_fs::write(path, b"").unwrap()),
        ("removed", |path| std_fs::remove_file(path).unwrap()),
        ("replaced", |path| {
            let other = path.with_extension("new");
            std_fs::write(&other, binary("/c", true)).unwrap();
            std_fs::rename(other, path).unwrap();
        }),
    ];
    for (expected, change) in changes {
        let fixture = Fixture::new(&binary("/a", false));
        let mut file = fixture.open(true).await;
        assert_eq!(next(&mut file).await.unwrap().as_deref(), Some("/a"));
        change(&fixture.path());
        match bounded(file.next()).await {
            Err(BepError::Changed { how, .. }) => assert_eq!(how, expected),
            other => panic!("{expected}: {other:?}"),
        }
        assert_eq!(next(&mut file).await.unwrap(), None);
    }
}

#[tokio::test]
async fn a_cancelled_read_loses_nothing() {
    let fixture = Fixture::new(&binary("/a", false)[..5]);
    let mut file = fixture.open(true).await;
    assert!(time::timeout(POLL * 3, file.next()).await.is_err());
    fixture.append(&binary("/a", false)[5..]);
    assert_eq!(bounded(next(&mut file)).await.unwrap().as_deref(), Some("/a"));
}

/// Opens for writing, which waits for the reader's end to be open, writes and closes.
async fn write_fifo(path: PathBuf, bytes: Vec<u8>) {
    tokio::task::spawn_blocking(move || std_fs::write(path, bytes).unwrap())
        .await
        .unwrap();
}

#[tokio::test]
async fn a_fifo_is_read_from_its_writers_coming_to_its_going() {
    let fixture = Fixture::fifo();
    let mut file = bounded(fixture.open(false)).await;
    // More than a pipe holds.
    let long = "x".repeat(200_000);
    let bytes = [binary(&long, false), binary("/b", false)].concat();
    let read = async {
        assert_eq!(next(&mut file).await.unwrap().as_deref(), Some(&long[..]));
        assert_eq!(next(&mut file).await.unwrap().as_deref(), Some("/b"));
        assert_eq!(next(&mut file).await.unwrap(), None);
    };
    bounded(async { tokio::join!(write_fifo(fixture.path(), bytes), read) }).await;
}

#[tokio::test]
async fn a_followed_fifo_waits_for_the_next_writer() {
    let fixture = Fixture::fifo();
    let mut file = bounded(fixture.open(true)).await;
    let write = async {
        write_fifo(fixture.path(), binary("/a", false)).await;
        time::sleep(POLL * 2).await;
        write_fifo(fixture.path(), binary("/b", true)).await;
    };
    let read = async {
        assert_eq!(next(&mut file).await.unwrap().as_deref(), Some("/a"));
        assert_eq!(next(&mut file).await.unwrap().as_deref(), Some("/b"));
        assert_eq!(next(&mut file).await.unwrap(), None);
    };
    bounded(async { tokio::join!(write, read) }).await;
}

#[tokio::test]
async fn a_fifo_whose_writer_dies_within_an_event_is_truncated() {
    let fixture = Fixture::fifo();
    let mut file = bounded(fixture.open(true)).await;
    let bytes = binary("/a", false)[..5].to_vec();
    let read = async { file.next().await };
    let ((), result) = bounded(async { tokio::join!(write_fifo(fixture.path(), bytes), read) }).await;
    assert!(
        matches!(result, Err(BepError::Truncated { have: 5, .. })),
        "{result:?}"
    );
}

#[tokio::test]
async fn a_missing_file_is_named() {
    let error = EventFile::open("/nonexistent/events", true).await.unwrap_err();
    assert!(error.to_string().contains("/nonexistent/events"), "{error}");
}

/// `outhaul … <(something)`: no further writer can come, so waiting for one would hang.
#[tokio::test]
async fn a_shells_pipe_that_is_already_over_is_read_to_its_end() {
    use std::os::fd::AsRawFd as _;
    for (bytes, expected) in [(vec![], None), (binary("/a", true), Some("/a"))] {
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(&bytes).unwrap();
        drop(writer);
        let path = format!("/proc/self/fd/{}", reader.as_raw_fd());
        let mut file = bounded(EventFile::open(path, false)).await.unwrap();
        assert_eq!(bounded(next(&mut file)).await.unwrap().as_deref(), expected);
        assert_eq!(bounded(next(&mut file)).await.unwrap(), None);
    }
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config::with_cases(64))]
    #[test]
    fn any_bytes_come_to_an_end_without_a_panic(
        json_first: bool,
        bytes in proptest::collection::vec(proptest::sample::select(&b"{}\n\x00\x01\x0a\x7b\x85\xff\"a"[..]), 0..200),
    ) {
        let first = if json_first { json("/a", false) } else { binary("/a", false) };
        let fixture = Fixture::new(&[first, bytes].concat());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut file = fixture.open(false).await;
            let mut offset = 0;
            while let Ok(Some(_)) | Err(_) = bounded(file.next()).await {
                assert!(file.offset() > offset || file.done);
                offset = file.offset();
            }
        });
    }
}

#[tokio::test]
async fn what_is_no_event_file_says_what_it_is() {
    let lines = [json("/x", false), json("/y", true)];
    let formatted = "{\n  \"id\": {\"workspace\": {}}\n}\n";
    for (bytes, says) in [
        (b"\x1f\x8b\x08\x00".to_vec(), "compressed with gzip"),
        (b"\x28\xb5\x2f\xfd".to_vec(), "compressed with zstd"),
        ([b"[", &lines[0][..], b"]"].concat(), "jq -c '.[]'"),
        (format!("[\n{formatted}]").into_bytes(), "jq -c '.[]'"),
        (formatted.into(), "jq -c ."),
        (formatted.replace('\n', "\r\n").into_bytes(), "jq -c ."),
        (
            [lines[0].trim_ascii_end(), &lines[1]].concat(),
            "trailing characters",
        ),
        (
            [lines[0].trim_ascii_end(), lines[1].trim_ascii_end()].concat(),
            "trailing characters",
        ),
    ] {
        let fixture = Fixture::new(&bytes);
        let mut file = EventFile::open(fixture.path(), false).await.unwrap();
        let error = file.next().await.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    // A mark of the encoding is nothing of the events.
    let fixture = Fixture::new(&[BOM, &lines[0], b"\r\n", &lines[1]].concat());
    let mut file = EventFile::open(fixture.path(), false).await.unwrap();
    assert_eq!(next(&mut file).await.unwrap().as_deref(), Some("/x"));
    assert_eq!(next(&mut file).await.unwrap().as_deref(), Some("/y"));
    assert_eq!(next(&mut file).await.unwrap(), None);
}
