//! Requests as the bytes that came, and a look at the few fields that matter here.
//!
//! What is journalled and forwarded has to be what the build tool sent, byte for byte, with fields that nobody here
//! knows. So the service takes bytes, and [`Received`] and [`Call`] read from them without copying.

use std::marker::PhantomData;

use bytes::{Buf as _, BufMut as _, Bytes};
use prost::Message as _;
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

use super::journal::RecordKind;
use crate::{
    bep::wire::{
        self, Fields, Malformed, Value,
        bes::{
            build_event as event, ordered_build_event as ordered, publish_build_tool_event_stream_request,
            publish_lifecycle_event_request,
        },
        protobuf::any,
    },
    proto::google::devtools::build::v1::{PublishBuildToolEventStreamResponse, StreamId},
};

/// The service and its client, generated in `build.rs`.
#[allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    clippy::all,
    clippy::pedantic,
    reason = "generated"
)]
mod service {
    include!(concat!(
        env!("OUT_DIR"),
        "/google.devtools.build.v1.PublishBuildEvent.rs"
    ));
}

#[cfg(test)]
pub(super) use service::publish_build_event_client::PublishBuildEventClient;
pub(super) use service::publish_build_event_server::{PublishBuildEvent, PublishBuildEventServer};

/// `google.protobuf.Empty`.
pub(super) type Empty = ();

/// What can be on the wire of the service: bytes as they are, or a message.
pub(super) trait Wire: Sized + Send + 'static {
    fn put(self, to: &mut EncodeBuf<'_>) -> Result<(), Status>;
    fn take(from: &mut DecodeBuf<'_>) -> Result<Self, Status>;
}

impl Wire for Bytes {
    fn put(self, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.reserve(self.len());
        to.put(self);
        Ok(())
    }

    fn take(from: &mut DecodeBuf<'_>) -> Result<Self, Status> {
        // Takes them over from the connection's buffer.
        Ok(from.copy_to_bytes(from.remaining()))
    }
}

macro_rules! message_on_the_wire {
    ($($message:ty),*) => {$(
        impl Wire for $message {
            fn put(self, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
                self.encode(to).map_err(|e| Status::internal(e.to_string()))
            }

            fn take(from: &mut DecodeBuf<'_>) -> Result<Self, Status> {
                Self::decode(from).map_err(|e| Status::internal(e.to_string()))
            }
        }
    )*};
}

message_on_the_wire!(Empty, PublishBuildToolEventStreamResponse);

/// A codec that sends `E` and receives `D`.
#[derive(Debug)]
pub(super) struct RawCodec<E, D>(PhantomData<(E, D)>);

impl<E, D> Default for RawCodec<E, D> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<E: Wire, D: Wire> Codec for RawCodec<E, D> {
    type Encode = E;
    type Decode = D;
    type Encoder = Half<E>;
    type Decoder = Half<D>;

    fn encoder(&mut self) -> Half<E> {
        Half(PhantomData)
    }

    fn decoder(&mut self) -> Half<D> {
        Half(PhantomData)
    }
}

/// One direction of a [`RawCodec`].
#[derive(Debug)]
pub(super) struct Half<T>(PhantomData<T>);

impl<E: Wire> Encoder for Half<E> {
    type Item = E;
    type Error = Status;

    fn encode(&mut self, item: E, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        item.put(to)
    }
}

impl<D: Wire> Decoder for Half<D> {
    type Item = D;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<D>, Status> {
        D::take(from).map(Some)
    }
}

/// The fields of `BuildEvent` that are told apart: one of them has its payload.
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
struct Ordered<'a> {
    stream_id: Option<StreamId>,
    sequence: i64,
    /// The field of `BuildEvent` that the payload is in; 0 without one.
    payload: u32,
    /// The value of the payload, if it is Bazel's.
    bazel_event: &'a [u8],
}

impl<'a> Ordered<'a> {
    /// The one in this field of a request, if it is there.
    fn find(request: &'a [u8], number: u32) -> Result<Option<Self>, Malformed> {
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
pub(super) struct Received {
    pub(super) stream_id: Option<StreamId>,
    pub(super) sequence: i64,
    pub(super) kind: RecordKind,
    /// The bytes of the `build_event_stream.BuildEvent` inside, if there is one.
    pub(super) bazel_event: Option<Bytes>,
    /// The whole request.
    pub(super) request: Bytes,
}

impl Received {
    /// `None` if it has no event.
    pub(super) fn read(request: Bytes) -> Result<Option<Self>, Malformed> {
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

/// A lifecycle call.
#[derive(Debug, Clone)]
pub(super) struct Call {
    pub(super) build_id: String,
    pub(super) invocation_id: String,
    /// For the log.
    pub(super) name: &'static str,
    /// Whether it goes before the build's streams.
    pub(super) opening: bool,
}

impl Call {
    pub(super) fn read(request: &[u8]) -> Result<Self, Malformed> {
        let event = Ordered::find(request, publish_lifecycle_event_request::BUILD_EVENT)?.unwrap_or_default();
        let id = event.stream_id.unwrap_or_default();
        let (name, opening) = match event.payload {
            event::BUILD_ENQUEUED => ("build enqueued", true),
            event::INVOCATION_ATTEMPT_STARTED => ("invocation attempt started", true),
            event::INVOCATION_ATTEMPT_FINISHED => ("invocation attempt finished", false),
            event::BUILD_FINISHED => ("build finished", false),
            _ => ("other", true),
        };
        Ok(Self {
            build_id: id.build_id,
            invocation_id: id.invocation_id,
            name,
            opening,
        })
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
    fn the_last_request_and_others_are_told_apart() {
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
