//! The two calls that blobs are read with, answered past the generated services: those copy every blob twice on its way
//! into a message, and here the cache's own bytes go to the connection.

use bazel_remote_apis::{
    build::bazel::remote::execution::v2::batch_read_blobs_response, google::bytestream::ReadRequest,
};
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt as _};
use http_body::Frame;
use http_body_util::StreamBody;
use prost::{
    Message,
    encoding::{encode_varint, encoded_len_varint},
};
use tonic::{Extensions, Request, Status, Streaming, body::Body, codec::Codec as _, metadata::MetadataMap};
use tonic_prost::ProstCodec;

use super::{
    context::Shared,
    read::{self, Ending},
};

pub(super) const READ: &str = "/google.bytestream.ByteStream/Read";
pub(super) const BATCH: &str = "/build.bazel.remote.execution.v2.ContentAddressableStorage/BatchReadBlobs";

/// Largest request taken: 4 MiB, gRPC's default.
const MAX_REQUEST: usize = 4 << 20;
/// What a message that is broken off has promised.
const PROMISED: usize = 1000;
/// A flag, and the message's length.
const PREFIX: usize = 5;
/// Blobs from this size on are sent as they lie in memory; smaller ones are put together, a few bytes' copy being less
/// than a frame of their own.
const OWN_FRAME: usize = 32 << 10;

/// Frames of an answer, the last of them its status. An error resets it.
pub(super) type Frames = BoxStream<'static, Result<Frame<Bytes>, Status>>;

pub(super) fn answer(frames: Result<Frames, Status>) -> http::Response<Body> {
    match frames {
        Ok(frames) => {
            let mut response = Status::ok("").into_http::<Body>();
            // It comes at the end.
            response.headers_mut().remove(Status::GRPC_STATUS);
            *response.body_mut() = Body::new(StreamBody::new(frames));
            response
        }
        Err(status) => status.into_http(),
    }
}

/// The only message of a request.
async fn message<M: Message + Default + 'static>(request: http::Request<Body>) -> Result<Request<M>, Status> {
    let (parts, body) = request.into_parts();
    let decoder = ProstCodec::<(), M>::default().decoder();
    let message = Streaming::new_request(decoder, body, None, Some(MAX_REQUEST))
        .message()
        .await?
        .ok_or_else(|| Status::internal("Missing request message."))?;
    let metadata = MetadataMap::from_headers(parts.headers);
    Ok(Request::from_parts(metadata, Extensions::default(), message))
}

fn trailers(status: &Status) -> Frame<Bytes> {
    let mut headers = http::HeaderMap::new();
    // Only a message that no header can hold fails, and none here is such.
    let _ = status.add_header(&mut headers);
    Frame::trailers(headers)
}

/// What is to be sent next.
enum Next {
    Message,
    Data(Bytes),
    Trailers(Status),
    Nothing,
}

pub(super) async fn read(context: Shared, request: http::Request<Body>) -> Result<Frames, Status> {
    let request: Request<ReadRequest> = message(request).await?;
    let pieces = read::read(&context, request).await?;
    let frames = stream::unfold((pieces, Next::Message), async |(mut pieces, next)| {
        let (frame, next) = match next {
            Next::Nothing => return None,
            Next::Trailers(status) => (trailers(&status), Next::Nothing),
            Next::Data(data) => (Frame::data(data), Next::Message),
            Next::Message => match pieces.next().await {
                Some(Ok(data)) => {
                    // ReadResponse { 10: data }
                    let length = 1 + encoded_len_varint(data.len() as u64) + data.len();
                    let mut head = prefix(length);
                    put_data(0x52, data.len(), &mut head);
                    (Frame::data(head.into()), Next::Data(data))
                }
                Some(Err(Ending::Status(status))) => (trailers(&status), Next::Nothing),
                Some(Err(Ending::Within(data, status))) => {
                    let mut head = prefix(PROMISED + 1 + encoded_len_varint(PROMISED as u64));
                    put_data(0x52, PROMISED, &mut head);
                    head.extend_from_slice(&data);
                    (Frame::data(head.into()), Next::Trailers(status))
                }
                Some(Err(Ending::Reset)) => {
                    let reset = Status::internal("injected fault: reset");
                    return Some((Err(reset), (pieces, Next::Nothing)));
                }
                Some(Err(Ending::Nothing)) => return None,
                None => (trailers(&Status::ok("")), Next::Nothing),
            },
        };
        Some((Ok(frame), (pieces, next)))
    });
    Ok(frames.boxed())
}

pub(super) async fn batch(context: Shared, request: http::Request<Body>) -> Result<Frames, Status> {
    let parts = context.read_batch(message(request).await?).await?;
    let frames = encoded(parts).into_iter().map(Frame::data);
    let all: Vec<_> = frames.chain([trailers(&Status::ok(""))]).map(Ok).collect();
    Ok(stream::iter(all).boxed())
}

/// One blob's answer in a batch: everything but its data, and that.
pub(super) type Part = (batch_read_blobs_response::Response, Bytes);

/// A `BatchReadBlobsResponse` in pieces.
fn encoded(parts: Vec<Part>) -> Vec<Bytes> {
    let data_len = |data: &Bytes| match data.len() {
        0 => 0,
        length => 1 + encoded_len_varint(length as u64) + length,
    };
    let lengths: Vec<usize> = parts
        .iter()
        .map(|(head, data)| head.encoded_len() + data_len(data))
        .collect();
    let total = lengths
        .iter()
        .map(|&length| 1 + encoded_len_varint(length as u64) + length)
        .sum();
    let mut pieces = Vec::new();
    let mut small = prefix(total);
    let copied = parts
        .iter()
        .map(|(_, data)| data.len())
        .filter(|&l| l < OWN_FRAME);
    small.reserve(copied.sum::<usize>() + 100 * parts.len());
    for ((head, data), length) in parts.into_iter().zip(lengths) {
        put_data(0x0a, length, &mut small);
        // A vector has room for everything.
        let _ = head.encode(&mut small);
        if data.is_empty() {
            continue;
        }
        put_data(0x12, data.len(), &mut small);
        if data.len() < OWN_FRAME {
            small.extend_from_slice(&data);
        } else {
            pieces.push(std::mem::take(&mut small).into());
            pieces.push(data);
        }
    }
    if !small.is_empty() {
        pieces.push(small.into());
    }
    pieces
}

/// The start of a message of this many bytes.
fn prefix(length: usize) -> Vec<u8> {
    let mut head = Vec::with_capacity(PREFIX + 16);
    head.push(0);
    // Batches are limited, and streams go in pieces.
    head.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    head
}

/// A field's key and length.
fn put_data(key: u8, length: usize, to: &mut Vec<u8>) {
    to.push(key);
    encode_varint(length as u64, to);
}

#[cfg(test)]
mod tests {
    use bazel_remote_apis::build::bazel::remote::execution::v2::{
        BatchReadBlobsResponse, Digest, batch_read_blobs_response::Response,
    };

    use super::*;

    #[test]
    fn a_batch_is_written_as_the_generated_type_is() {
        let sizes = [3, 0, OWN_FRAME - 1, OWN_FRAME, 100_000];
        let whole: Vec<Response> = sizes
            .iter()
            .map(|&size| Response {
                digest: Some(Digest {
                    hash: "ab".into(),
                    size_bytes: size as i64,
                }),
                data: vec![7; size],
                compressor: 1,
                status: None,
            })
            .collect();
        let parts = whole
            .iter()
            .cloned()
            .map(|mut response| {
                let data = std::mem::take(&mut response.data);
                (response, data.into())
            })
            .collect();
        let pieces = encoded(parts).concat();
        assert_eq!(
            &pieces[..5],
            [&[0][..], &(pieces.len() as u32 - 5).to_be_bytes()].concat()
        );
        let expected = BatchReadBlobsResponse { responses: whole };
        assert_eq!(BatchReadBlobsResponse::decode(&pieces[5..]), Ok(expected));
        assert_eq!(encoded(Vec::new()).concat(), [0; 5]);
    }
}
