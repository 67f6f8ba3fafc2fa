//! A build's events.

use bytes::Bytes;
use prost::{Message as _, encoding::decode_varint};

use super::{file_of, first, wait_for};
use crate::{
    bep::{
        EventFile,
        decode::{decode_with, from_proto},
        event::{Content, Event, File},
        json::decode_json,
    },
    digest::DigestFunction,
    invocation::{
        build::{Build, Effect},
        policy::{DownloadMode, Policy},
    },
    proto::build_event_stream::BuildEvent,
};

/// The largest event that a file of these runs may have.
const LIMIT: u64 = 1 << 16;

fn function(byte: u8) -> Option<DigestFunction> {
    DigestFunction::ALL.get(usize::from(byte) % 8).copied()
}

/// One event: the decoder for sets of files says what generated code says.
pub fn event(data: &[u8]) {
    let (choice, data) = first(data);
    let function = function(choice);
    let ours = decode_with(&Bytes::copy_from_slice(data), function);
    let theirs = BuildEvent::decode(data).map(|message| from_proto(message, function));
    match (ours, theirs) {
        (Ok(ours), Ok(theirs)) => {
            assert_eq!(ours, theirs);
            look_at(&ours.event);
        }
        (Err(_), Err(_)) => {}
        (ours, theirs) => panic!("{ours:?} is not {theirs:?}"),
    }
}

/// One event as JSON.
pub fn event_json(data: &[u8]) {
    let (choice, data) = first(data);
    if let Ok(framed) = decode_json(data, function(choice)) {
        look_at(&framed.event);
    }
}

/// What every event's files promise.
fn look_at(event: &Event) {
    let check = |file: &File| {
        assert!(file.prefix_len <= file.path.len());
        assert!(file.name().len() <= file.path.len());
        if file.has_prefix() {
            assert_eq!(file.path.as_bytes().get(file.prefix_len), Some(&b'/'));
        }
        assert!(file.uri.is_none() || file.content == Content::Unknown);
    };
    match event {
        Event::NamedSet(set) => set.files.iter().for_each(check),
        Event::TestResult(result) => result.files.iter().for_each(check),
        Event::Completed(completed) => {
            completed.directories.iter().for_each(check);
            completed.groups.iter().flat_map(|g| &g.files).for_each(check);
        }
        _ => {}
    }
}

/// A file of events, binary or JSON: it ends, and every event lies where it says, after the one before.
pub fn event_file(data: &[u8]) {
    let (_file, path) = file_of(data);
    wait_for(async {
        let Ok(events) = EventFile::open(&path, false).await else {
            return;
        };
        let mut events = events.with_limit(LIMIT);
        let mut end = 0;
        let mut errors = 0;
        loop {
            match events.next().await {
                Ok(None) => break,
                Ok(Some(_)) => {
                    let raw = events.raw();
                    assert!(raw.offset >= end, "events overlap");
                    end = raw.offset + raw.bytes.len() as u64;
                    assert!(end <= data.len() as u64);
                    // After a length prefix or at once.
                    let at = usize::try_from(raw.offset).unwrap_or(usize::MAX);
                    let near = data.get(at..).unwrap_or_default();
                    assert!((0..=5).any(|head| near.get(head..).is_some_and(|b| b.starts_with(&raw.bytes))));
                }
                Err(_) => {
                    errors += 1;
                    assert!(errors <= data.len() + 1, "errors without end");
                }
            }
        }
    });
}

/// A whole build of length-delimited events, with numbers of its own choice: whatever it says, it ends, every output
/// lies where outputs may be, and nothing stays open.
pub fn whole_build(data: &[u8]) {
    let (choice, mut data) = first(data);
    let policy = Policy {
        mode: match choice % 3 {
            0 => DownloadMode::Toplevel,
            1 => DownloadMode::All,
            _ => DownloadMode::Minimal,
        },
        // Files are judged again when the tree that they lie in is known.
        regexes: (choice & 0x20 != 0)
            .then(|| "[^.]*".parse().ok())
            .into_iter()
            .flatten()
            .collect(),
        ..Policy::default()
    };
    let mut build = Build::new(policy).holding_sets(choice & 0x80 != 0);
    let mut sequence = 0;
    while let Ok(length) = decode_varint(&mut data) {
        let Some((bytes, rest)) = usize::try_from(length)
            .ok()
            .and_then(|n| data.split_at_checked(n))
        else {
            break;
        };
        data = rest;
        let Ok(framed) = decode_with(&Bytes::copy_from_slice(bytes), None) else {
            continue;
        };
        sequence += 1;
        let effects = build.handle(sequence, framed.event);
        look_at_effects(&effects);
        assert!(build.lowest_open().is_none_or(|open| open <= sequence));
        // A broken stream that goes on.
        if choice & 0x40 != 0 && bytes.len() % 7 == 3 {
            look_at_effects(&build.end());
        }
    }
    look_at_effects(&build.end());
    assert_eq!(build.lowest_open(), None);
}

fn look_at_effects(effects: &[Effect]) {
    for effect in effects {
        if let Effect::Outputs(_, named) = effect {
            for named in named {
                assert!(named.path.starts_with("bazel-out"), "{named:?}");
                assert_ne!(named.path.as_str(), "bazel-out");
            }
        }
    }
}
