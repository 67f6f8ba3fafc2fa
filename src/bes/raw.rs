//! Requests as the bytes that came.
//!
//! What is journaled and forwarded has to be what the build tool sent, byte for byte, with fields that no code here
//! knows. So the service takes bytes, and `Received` and `Call` read from them without copying.

use std::marker::PhantomData;

use bytes::{Buf as _, BufMut as _, Bytes};
use prost::Message as _;
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

use crate::proto::google::devtools::build::v1::PublishBuildToolEventStreamResponse;

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
