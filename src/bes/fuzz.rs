//! What the fuzz targets run of this room: see [`crate::fuzzing`].

use std::path::{Path, PathBuf};

use bytes::Bytes;
use prost::Message as _;

use super::{lifecycle::Call, upstream};
use crate::{
    bep::uri::BytestreamUri,
    journal::{self, RecordKind, received::Received},
    proto::{
        build_event_stream::{BuildEvent, File, build_event::Payload, file::File as Content},
        google::devtools::build::v1::{PublishBuildToolEventStreamRequest, build_event::Event},
    },
};

/// A request: the few fields that are read are those that the whole message has.
pub(crate) fn request(data: &[u8]) {
    let bytes = Bytes::copy_from_slice(data);
    let _ = Call::read(data);
    let _ = upstream::fuzz_kind(data);
    let ours = Received::read(bytes);
    let Ok(theirs) = PublishBuildToolEventStreamRequest::decode(data) else {
        return;
    };
    let Some(theirs) = theirs.ordered_build_event else {
        assert!(matches!(ours, Ok(None)));
        return;
    };
    let ours = ours.ok().flatten();
    assert!(ours.is_some(), "it has an event");
    let Some(ours) = ours else { return };
    assert_eq!(
        (ours.sequence, ours.stream_id),
        (theirs.sequence_number, theirs.stream_id)
    );
    assert_eq!(ours.request, data);
    // Of several payloads the last one counts; those that do not matter here are not distinguished.
    match theirs.event.and_then(|event| event.event) {
        Some(Event::BazelEvent(any)) => assert_eq!(ours.bazel_event.as_deref(), Some(&any.value[..])),
        Some(Event::ComponentStreamFinished(_)) => assert_eq!(ours.kind, RecordKind::Finished),
        _ => {}
    }
}

/// A request whose files are all on disk: their URIs are other ones, and nothing else is.
pub(crate) fn rewrite(data: &[u8]) {
    let blobs = upstream::fuzz_blobs(data);
    assert_eq!(upstream::fuzz_rewritten(data, &vec![None; blobs]), None);
    let path = PathBuf::from("/exec root/\u{1}%");
    let new = upstream::fuzz_rewritten(data, &vec![Some(path.clone()); blobs]);
    assert_eq!(new.is_some(), blobs > 0);
    let Some(new) = new else { return };
    assert_eq!(upstream::fuzz_blobs(&new), 0, "all were replaced");
    let (Some(before), Some(after)) = (event(data), event(&new)) else {
        assert_eq!(event(data).is_some(), event(&new).is_some());
        return;
    };
    assert_eq!(on_disk(before, &path), after);
}

fn event(request: &[u8]) -> Option<BuildEvent> {
    let request = PublishBuildToolEventStreamRequest::decode(request).ok()?;
    match request.ordered_build_event?.event?.event? {
        Event::BazelEvent(any) => BuildEvent::decode(&any.value[..]).ok(),
        _ => None,
    }
}

/// The event with every blob called by a path.
fn on_disk(mut event: BuildEvent, path: &Path) -> BuildEvent {
    let mut replace = |file: &mut File| {
        if let Some(Content::Uri(uri)) = &mut file.file
            && BytestreamUri::parse_with(uri, None).is_ok()
        {
            *uri = upstream::fuzz_file_uri(path);
        }
    };
    match &mut event.payload {
        Some(Payload::NamedSetOfFiles(m)) => m.files.iter_mut().for_each(replace),
        Some(Payload::Completed(m)) => {
            m.important_output.iter_mut().for_each(&mut replace);
            m.directory_output.iter_mut().for_each(&mut replace);
            m.output_group
                .iter_mut()
                .flat_map(|g| &mut g.inline_files)
                .for_each(replace);
        }
        Some(Payload::TestResult(m)) => m.test_action_output.iter_mut().for_each(replace),
        Some(Payload::TestSummary(m)) => m.passed.iter_mut().chain(&mut m.failed).for_each(replace),
        Some(Payload::Action(m)) => {
            let files = [&mut m.stdout, &mut m.stderr, &mut m.primary_output];
            files
                .into_iter()
                .flatten()
                .chain(&mut m.action_metadata_logs)
                .for_each(replace);
        }
        Some(Payload::BuildToolLogs(m)) => m.log.iter_mut().for_each(replace),
        _ => {}
    }
    event
}

/// A client's headers: what is read of them reads back.
pub(crate) fn headers(data: &[u8]) {
    let read = journal::headers::decode(Bytes::copy_from_slice(data));
    let again = journal::headers::decode(journal::headers::encode(&read));
    assert_eq!(again.into_headers(), read.into_headers());
}

/// A journal.
pub(crate) fn journal(data: &[u8]) {
    journal::fuzz::file(data);
}
