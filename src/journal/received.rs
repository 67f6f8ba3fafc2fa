//! Requests of a stream: the few fields that matter here are read from the bytes that came, without copying.

use bytes::Bytes;
use prost::Message as _;

use super::RecordKind;
use crate::{
    bep::wire::{
        self, Fields, Malformed, Value,
        bes::{
            build_event as event, ordered_build_event as ordered, publish_build_tool_event_stream_request,
        },
        protobuf::any,
    },
    proto::google::devtools::build::v1::StreamId,
};

/// The fields of `BuildEvent` that are distinguished: one of them has its payload.
const PAYLOADS: [u32; 6] = [
    event::INVOCATION_ATTEMPT_STARTED,
    event::INVOCATION_ATTEMPT_FINISHED,
    event::BUILD_ENQUEUED,
    event::BUILD_FINISHED,
    event::COMPONENT_STREAM_FINISHED,
    event::BAZEL_EVENT,
];

/// An `OrderedBuildEvent`, as far as it is read. What comes twice is merged, as by generated code.
#[derive(Default)]
pub(crate) struct Ordered<'a> {
    pub(crate) stream_id: Option<StreamId>,
    sequence: i64,
    /// The field of `BuildEvent` that the payload is in; 0 without one.
    pub(crate) payload: u32,
    /// The value of the payload, if it is Bazel's.
    bazel_event: &'a [u8],
}

impl<'a> Ordered<'a> {
    /// The one in this field of a request, if it is there.
    pub(crate) fn find(request: &'a [u8], number: u32) -> Result<Option<Self>, Malformed> {
        let mut found: Option<Self> = None;
        for field in Fields::of(request) {
            let field = field?;
            if field.number == number {
                let ordered = field.inside().ok_or(Malformed)?;
                found.get_or_insert_default().read(ordered)?;
            }
        }
        Ok(found)
    }

    fn read(&mut self, message: &'a [u8]) -> Result<(), Malformed> {
        for field in Fields::of(message) {
            let field = field?;
            match (field.number, field.value) {
                (ordered::STREAM_ID, Value::Bytes(id)) => self.stream_id.get_or_insert_default().merge(id)?,
                (ordered::SEQUENCE_NUMBER, Value::Number(number)) => self.sequence = number.cast_signed(),
                (ordered::EVENT, Value::Bytes(event)) => self.read_event(event)?,
                (ordered::STREAM_ID | ordered::SEQUENCE_NUMBER | ordered::EVENT, _) => return Err(Malformed),
                _ => {}
            }
        }
        Ok(())
    }

    fn read_event(&mut self, event: &'a [u8]) -> Result<(), Malformed> {
        for field in Fields::of(event) {
            let field = field?;
            if !PAYLOADS.contains(&field.number) {
                continue;
            }
            let inside = field.inside().ok_or(Malformed)?;
            if std::mem::replace(&mut self.payload, field.number) != field.number {
                self.bazel_event = &[];
            }
            if field.number == event::BAZEL_EVENT {
                self.bazel_event = wire::inside(inside, any::VALUE)?.unwrap_or(self.bazel_event);
            }
        }
        Ok(())
    }
}

/// A request of a stream.
#[derive(Debug, Clone)]
pub(crate) struct Received {
    pub(crate) stream_id: Option<StreamId>,
    pub(crate) sequence: i64,
    pub(crate) kind: RecordKind,
    /// The bytes of the `build_event_stream.BuildEvent` inside, if there is one.
    pub(crate) bazel_event: Option<Bytes>,
    /// The whole request.
    pub(crate) request: Bytes,
}

impl Received {
    /// `None` if it has no event.
    pub(crate) fn read(request: Bytes) -> Result<Option<Self>, Malformed> {
        let number = publish_build_tool_event_stream_request::ORDERED_BUILD_EVENT;
        let Some(ordered) = Ordered::find(&request, number)? else {
            return Ok(None);
        };
        let (kind, bazel_event) = match ordered.payload {
            event::BAZEL_EVENT => (RecordKind::Event, Some(request.slice_ref(ordered.bazel_event))),
            event::COMPONENT_STREAM_FINISHED => (RecordKind::Finished, None),
            _ => (RecordKind::Other, None),
        };
        Ok(Some(Self {
            stream_id: ordered.stream_id,
            sequence: ordered.sequence,
            kind,
            bazel_event,
            request,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::google::devtools::build::v1::{
        BuildEvent, OrderedBuildEvent, PublishBuildToolEventStreamRequest, build_event::Event,
    };

    fn request(event: Option<Event>) -> Bytes {
        let request = PublishBuildToolEventStreamRequest {
            ordered_build_event: Some(OrderedBuildEvent {
                stream_id: Some(StreamId {
                    build_id: "b".to_owned(),
                    invocation_id: "i".to_owned(),
                    component: 3,
                }),
                sequence_number: 7,
                event: Some(BuildEvent {
                    event_time: None,
                    event,
                }),
            }),
            notification_keywords: vec!["k".to_owned()],
            ..PublishBuildToolEventStreamRequest::default()
        };
        request.encode_to_vec().into()
    }

    #[test]
    fn the_fields_that_matter_are_read_and_the_rest_is_kept() {
        let any = prost_types::Any {
            type_url: "t".to_owned(),
            value: b"event".to_vec(),
        };
        let bytes = request(Some(Event::BazelEvent(any)));
        let got = Received::read(bytes.clone()).unwrap().unwrap();
        assert_eq!((got.sequence, got.kind), (7, RecordKind::Event));
        assert_eq!(got.bazel_event.as_deref(), Some(&b"event"[..]));
        assert_eq!(got.stream_id.unwrap().invocation_id, "i");
        assert_eq!(got.request, bytes);
        // No copy: the event lies within the request.
        let inside = bytes.as_ptr_range();
        assert!(inside.contains(&got.bazel_event.unwrap().as_ptr()));
    }

    #[test]
    fn the_last_request_and_others_are_distinguished() {
        let kind = |event| Received::read(request(event)).unwrap().unwrap().kind;
        let finished = Event::ComponentStreamFinished(Default::default());
        assert_eq!(kind(Some(finished)), RecordKind::Finished);
        let enqueued = Event::BuildEnqueued(Default::default());
        assert_eq!(kind(Some(enqueued)), RecordKind::Other);
        assert_eq!(kind(None), RecordKind::Other);
        assert!(Received::read(Bytes::new()).unwrap().is_none());
        assert!(Received::read(Bytes::from_static(b"\x22\x7f")).is_err());
    }
}
