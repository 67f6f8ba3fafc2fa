//! What is picked, what is refused, and what is left of earlier stages.

mod bringing;
mod markers;
mod runfiles;
mod selecting;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    path::Path,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use bytes::Bytes;
use prost::Message as _;

use super::{
    StageError, Wish,
    check::is_staged,
    destination::Reach,
    gather::Gather,
    marker::{self, Marker},
    recorded::Recorded,
    request::Request,
    select::{Artifact, Selection, placed},
    together::Directories,
};
use crate::{
    builds::StreamKey,
    demo::{GeneratedBuild, Setting},
    digest::{Digest, DigestFunction},
    exec_path::ExecPath,
    journal::{Entry, Journal, JournalOptions, RecordKind},
    output::{Class, OutputContent, Stamp},
    proto::build_event_stream::{self as pb, BuildEvent, build_event::Payload, file},
    record::Which,
    remote::{
        Attribution, BatchAnswer, BlobStore, Capabilities, Copy, LocalFirst, Nowhere, Sink, looks_right,
    },
    transport::{RemoteError, RemoteErrorKind},
};

pub(super) fn build() -> GeneratedBuild {
    let setting = Setting {
        workspace: "/w".to_owned(),
        exec_root: "/o/execroot/_main".to_owned(),
        remote_cache: "grpc://127.0.0.1:1".to_owned(),
        instance_name: "main".to_owned(),
    };
    GeneratedBuild::new(|bytes| Digest::of(DigestFunction::Sha256, &bytes), setting, 7)
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
    assert!(inlet.settle(false).unwrap());
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
