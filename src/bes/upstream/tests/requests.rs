//! Requests as a build tool sends them.

use bytes::Bytes;
use prost::Message as _;

use crate::{
    bep::wire::{event_in, put},
    proto::{
        build_event_stream::BuildEvent,
        google::devtools::build::v1::{
            self as bes, OrderedBuildEvent, PublishBuildToolEventStreamRequest, StreamId, build_event,
            stream_id::BuildComponent,
        },
    },
};

pub(crate) fn envelope(sequence: i64, event: build_event::Event) -> PublishBuildToolEventStreamRequest {
    PublishBuildToolEventStreamRequest {
        ordered_build_event: Some(OrderedBuildEvent {
            stream_id: Some(StreamId {
                build_id: "build".to_owned(),
                component: BuildComponent::Tool.into(),
                invocation_id: "invocation".to_owned(),
            }),
            sequence_number: sequence,
            event: Some(bes::BuildEvent {
                event_time: None,
                event: Some(event),
            }),
        }),
        ..PublishBuildToolEventStreamRequest::default()
    }
}

/// With these bytes as the event, and an unknown field.
pub(crate) fn with_event(sequence: i64, value: Vec<u8>) -> Bytes {
    let any = prost_types::Any {
        type_url: "type.googleapis.com/build_event_stream.BuildEvent".to_owned(),
        value,
    };
    let mut request = envelope(sequence, build_event::Event::BazelEvent(any)).encode_to_vec();
    put(777, format!("unknown {sequence}").as_bytes(), &mut request);
    request.into()
}

/// An event whose id is this field of `BuildEventId`'s oneof.
pub(crate) fn with_id(sequence: i64, id: u32) -> Bytes {
    let (mut ids, mut event) = (Vec::new(), Vec::new());
    put(id, b"", &mut ids);
    put(1, &ids, &mut event);
    put(888, b"unknown", &mut event);
    with_event(sequence, event)
}

/// The one that says that the build tool is done.
pub(crate) fn last(sequence: i64) -> Bytes {
    let finished = bes::build_event::BuildComponentStreamFinished { r#type: 1 };
    let event = build_event::Event::ComponentStreamFinished(finished);
    envelope(sequence, event).encode_to_vec().into()
}

/// The event in a request.
pub(crate) fn event(request: &[u8]) -> Option<BuildEvent> {
    BuildEvent::decode(event_in(request)?).ok()
}

/// A request's number in its stream.
pub(crate) fn sequence(request: &[u8]) -> i64 {
    PublishBuildToolEventStreamRequest::decode(request)
        .unwrap()
        .ordered_build_event
        .unwrap()
        .sequence_number
}
