//! Recorded streams of real Bazels: every file in `tests/bep` is read in both its formats.

#![allow(clippy::unwrap_used)]

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
};

use outhaul::{
    bep::{
        Event, EventFile, NamedSets, StreamEvent,
        event::{Content, File},
        source::Format,
    },
    proto::build_event_stream::{self as proto, build_event::Payload},
};
use prost::Message as _;

/// Every recording's name without its extension.
fn recordings() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bep");
    let mut stems: Vec<PathBuf> = std::fs::read_dir(&dir)
        .expect("the recordings are part of the source tree")
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "bin"))
        .map(|path| path.with_extension(""))
        .collect();
    stems.sort();
    assert!(!stems.is_empty(), "no recordings in {}", dir.display());
    stems
}

/// All events, and those of their raw messages that are binary.
async fn read(path: &Path) -> (Vec<StreamEvent>, Vec<proto::BuildEvent>) {
    let mut file = EventFile::open(path, false).await.unwrap();
    let (mut events, mut messages) = (Vec::new(), Vec::new());
    while let Some(framed) = file.next().await.unwrap() {
        events.push(framed);
        if file.format() == Some(Format::Binary) {
            messages.push(proto::BuildEvent::decode(file.raw().bytes.clone()).unwrap());
        }
    }
    (events, messages)
}

#[tokio::test]
async fn binary_and_json_say_the_same_events() {
    for stem in recordings() {
        let (binary, _) = read(&stem.with_extension("bin")).await;
        let (json, _) = read(&stem.with_extension("json")).await;
        // Bazel hands events of different threads to its transports in varying order.
        let sorted = |events: &[StreamEvent]| {
            let mut events: Vec<String> = events.iter().map(|event| format!("{event:?}")).collect();
            events.sort();
            events
        };
        for (binary, json) in sorted(&binary).iter().zip(&sorted(&json)) {
            assert_eq!(binary, json, "{}", stem.display());
        }
        assert_eq!(binary.len(), json.len(), "{}", stem.display());
    }
}

#[tokio::test]
async fn a_stream_ends_with_its_last_message_and_says_what_a_build_is() {
    for stem in recordings() {
        let (events, _) = read(&stem.with_extension("bin")).await;
        let name = stem.display();
        let last: Vec<usize> = (0..events.len()).filter(|&i| events[i].last).collect();
        assert_eq!(last, [events.len() - 1], "{name}");
        let has = |wanted: fn(&Event) -> bool| events.iter().any(|framed| wanted(&framed.event));
        assert!(
            has(|e| matches!(e, Event::Started(s) if s.started_ms > 0 && s.workspace.starts_with('/'))),
            "{name}"
        );
        assert!(
            has(|e| matches!(e, Event::ExecRoot(root) if root.starts_with('/'))),
            "{name}"
        );
        assert!(
            has(|e| matches!(e, Event::CommandLine(line)
                if line.label == "canonical" && line.last("remote_cache").is_some() && line.last("command").is_some())),
            "{name}"
        );
        assert!(has(|e| matches!(e, Event::Configuration { .. })), "{name}");
        assert!(
            has(|e| matches!(e, Event::Finished { name, .. } if !name.is_empty())),
            "{name}"
        );
    }
}

#[tokio::test]
async fn every_output_has_a_path_below_bazel_out_and_content() {
    for stem in recordings() {
        let (events, _) = read(&stem.with_extension("bin")).await;
        let mut outputs = 0;
        let mut check = |file: &File| {
            if file.has_prefix() {
                outputs += 1;
                assert!(
                    file.path.starts_with("bazel-out/"),
                    "{}: {file:?}",
                    stem.display()
                );
                assert_ne!(file.content, Content::Unknown, "{}: {file:?}", stem.display());
            }
        };
        for framed in &events {
            match &framed.event {
                Event::NamedSet(set) => set.files.iter().for_each(&mut check),
                Event::Completed(done) => done.groups.iter().flat_map(|g| &g.files).for_each(&mut check),
                Event::TestResult(result) => {
                    assert!(!result.files.is_empty(), "{}: {result:?}", stem.display());
                    for file in &result.files {
                        assert!(
                            matches!(file.content, Content::Blob(_)),
                            "{}: {file:?}",
                            stem.display()
                        );
                    }
                }
                _ => {}
            }
        }
        assert!(outputs > 0, "{}", stem.display());
    }
}

#[tokio::test]
async fn no_target_of_a_recorded_stream_waits_for_a_set() {
    for stem in recordings() {
        for extension in ["bin", "json"] {
            let stem = stem.with_extension(extension);
            let (events, _) = read(&stem).await;
            let mut sets = NamedSets::new();
            for StreamEvent { event, .. } in events {
                match event {
                    Event::NamedSet(set) => assert_eq!(sets.insert(set), []),
                    Event::Completed(done) => {
                        let roots = done.groups.iter().flat_map(|group| &group.sets);
                        assert_eq!(sets.park(roots.map(String::as_str)), None, "{}", stem.display());
                    }
                    _ => {}
                }
            }
            assert!(
                !sets.is_empty() && sets.missing().next().is_none(),
                "{}",
                stem.display()
            );
            assert_eq!(sets.repeated, 0);
        }
    }
}

/// What lets the deprecated field be left aside wherever there are output groups.
#[tokio::test]
async fn important_outputs_are_all_in_the_output_groups() {
    let mut seen = 0;
    for stem in recordings() {
        let (_, messages) = read(&stem.with_extension("bin")).await;
        let mut sets: HashMap<String, proto::NamedSetOfFiles> = HashMap::new();
        for message in messages {
            let id = message.id.and_then(|id| id.id);
            match (message.payload, id) {
                (Some(Payload::NamedSetOfFiles(set)), Some(proto::build_event_id::Id::NamedSet(id))) => {
                    sets.insert(id.id, set);
                }
                (Some(Payload::Completed(done)), _) => {
                    let mut names: HashSet<&str> = HashSet::new();
                    let mut todo: Vec<&str> = Vec::new();
                    for group in &done.output_group {
                        names.extend(group.inline_files.iter().map(|file| &*file.name));
                        todo.extend(group.file_sets.iter().map(|set| &*set.id));
                    }
                    while let Some(id) = todo.pop() {
                        let set = &sets[id];
                        names.extend(set.files.iter().map(|file| &*file.name));
                        todo.extend(set.file_sets.iter().map(|set| &*set.id));
                    }
                    for file in &done.important_output {
                        seen += 1;
                        assert!(names.contains(&*file.name), "{}: {}", stem.display(), file.name);
                    }
                }
                _ => {}
            }
        }
    }
    assert!(seen > 0, "no recording has important outputs");
}
