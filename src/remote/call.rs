//! gRPC answers that carry blobs, read off the connection without a copy.
//!
//! tonic's own client puts every message together in one buffer before it is decoded: a copy of all bytes, and a whole
//! message's wait before the first can be used. What is left out here is what is never requested from a cache: streams of
//! requests, and compression of whole messages.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use bytes::{Buf as _, Bytes};
use http::{HeaderMap, HeaderValue, Method, Uri, Version, header};
use http_body_util::{BodyExt as _, Full};
use prost::{
    Message,
    encoding::{WireType, decode_key, decode_varint},
};
use tonic::{Code, Request, Response, Status, body::Body, transport::Channel};
use tower::{Service as _, ServiceExt as _};

use super::rope::Rope;

/// A flag, and the message's length.
const PREFIX: usize = 5;
/// The most that a field's key and length take.
const FIELD_HEAD: usize = 20;
/// The most that a stream has between two pieces of its data: heads, unknown fields, empty messages.
const BESIDE: usize = 64 << 10;
/// `google.bytestream.ReadResponse.data`
const DATA: u32 = 10;

/// The start of a call's body, to which the message is to be appended.
pub(super) fn start() -> Vec<u8> {
    vec![0; PREFIX]
}

/// The whole body, from [`start`] and a message.
pub(super) fn with_prefix(mut message: Vec<u8>) -> Bytes {
    // Requests are far below 4 GiB.
    let length = u32::try_from(message.len() - PREFIX).unwrap_or(u32::MAX);
    message[1..PREFIX].copy_from_slice(&length.to_be_bytes());
    message.into()
}

/// How many bytes of an answer have come so far, for its caller, who has it as a whole only at its end. It is handed to
/// [`send`] among the request's extensions.
#[derive(Debug, Clone, Default)]
pub(super) struct Received(Arc<AtomicUsize>);

impl Received {
    pub(super) fn bytes(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn add(&self, bytes: usize) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// An answer that is being received.
#[derive(Debug)]
pub(super) struct Incoming {
    body: Body,
    received: Rope,
    count: Received,
    ended: bool,
}

/// Sends a body and waits for the answer's head.
pub(super) async fn send(
    mut channel: Channel,
    path: &'static str,
    request: Request<Bytes>,
) -> Result<Response<Incoming>, Status> {
    let (metadata, extensions, body) = request.into_parts();
    let count = extensions.get::<Received>().cloned().unwrap_or_default();
    let mut request = http::Request::new(Body::new(Full::new(body)));
    *request.method_mut() = Method::POST;
    *request.version_mut() = Version::HTTP_2;
    *request.uri_mut() = Uri::from_static(path);
    *request.headers_mut() = metadata.into_headers();
    *request.extensions_mut() = extensions;
    let headers = request.headers_mut();
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    let failed = |e: tonic::transport::Error| Status::from_error(Box::new(e));
    let ready = channel
        .ready()
        .await
        .map_err(|e| Status::unknown(format!("Service was not ready: {e}")))?;
    let answer = ready.call(request).await.map_err(failed)?;
    let (parts, body) = answer.into_parts();
    // An answer without a message has its status here, and says more than HTTP's.
    let ended = match Status::from_header_map(&parts.headers) {
        Some(status) if status.code() != Code::Ok => return Err(status),
        _ if !parts.status.is_success() => return Err(of_http(parts.status)),
        Some(_) => true,
        None if !is_grpc(&parts.headers) => {
            return Err(Status::unknown("the server is not a gRPC service"));
        }
        None => false,
    };
    Ok(Response::new(Incoming {
        body,
        received: Rope::default(),
        count,
        ended,
    }))
}

impl Incoming {
    /// Waits for more bytes; `false` at the end, if that is a good one. May be dropped and called again.
    async fn more(&mut self) -> Result<bool, Status> {
        if self.ended {
            return Ok(false);
        }
        let Some(frame) = self.body.frame().await else {
            self.ended = true;
            return Err(Status::unknown("the stream ended without a status"));
        };
        match frame?.into_data() {
            Ok(data) => {
                self.count.add(data.len());
                self.received.push(data);
                Ok(true)
            }
            Err(frame) => {
                self.ended = true;
                let trailers = frame.into_trailers().unwrap_or_default();
                of_trailers(&trailers).map(|()| false)
            }
        }
    }

    /// Waits until this many bytes are there; `false` when the end comes first.
    async fn gather(&mut self, count: usize) -> Result<bool, Status> {
        while self.received.remaining() < count {
            if !self.more().await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads a prefix: the message's length.
    fn prefix(&mut self) -> Result<usize, Status> {
        if self.received.get_u8() != 0 {
            return Err(Status::internal(
                "the server sent a compressed message, which was not requested",
            ));
        }
        Ok(self.received.get_u32() as usize)
    }

    /// The only message, of at most this many bytes, decoded; its bytes are slices of what was received where that is
    /// in one piece.
    pub(super) async fn single<M: Message + Default>(mut self, most: usize) -> Result<M, Status> {
        let absent = || Status::internal("the response has no message");
        if !self.gather(PREFIX).await? {
            return Err(absent());
        }
        let length = self.prefix()?;
        if length > most {
            return Err(Status::data_loss(format!(
                "the response of {length} bytes exceeds the expected maximum of {most}"
            )));
        }
        if !self.gather(length).await? {
            return Err(absent());
        }
        let mut message = Rope::default();
        let mut left = length;
        while left > 0 {
            let piece = self.received.front(left);
            left -= piece.len();
            message.push(piece);
        }
        // An error may still follow, and takes the message back.
        loop {
            if self.received.has_remaining() {
                return Err(Status::internal("trailing data after the response"));
            }
            if !self.more().await? {
                break;
            }
        }
        M::decode(message).map_err(|e| Status::internal(format!("failed to decode the response: {e}")))
    }
}

/// The data of a stream of [`ReadResponse`](bazel_remote_apis::google::bytestream::ReadResponse)s, as it comes.
#[derive(Debug)]
pub(super) struct Pieces {
    incoming: Incoming,
    /// What is left of the message, and of a field's content in it.
    message: usize,
    field: usize,
    /// Whether the field is the data.
    data: bool,
    /// What came since the last data, in bytes.
    beside: usize,
}

impl Pieces {
    pub(super) const fn new(incoming: Incoming) -> Self {
        Self {
            incoming,
            message: 0,
            field: 0,
            data: false,
            beside: 0,
        }
    }

    /// The next bytes, never none; `None` at a good end. May be dropped and called again.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Status> {
        loop {
            if let Some(piece) = self.parse()? {
                return Ok(Some(piece));
            }
            if !self.incoming.more().await? {
                let clean = self.message == 0 && !self.incoming.received.has_remaining();
                return if clean {
                    Ok(None)
                } else {
                    Err(Status::internal("the stream ended within a message"))
                };
            }
        }
    }

    /// The next bytes of what was received; `None` when more must come first.
    fn parse(&mut self) -> Result<Option<Bytes>, Status> {
        loop {
            if self.beside > BESIDE {
                return Err(Status::data_loss("unterminated group in the stream"));
            }
            let received = &mut self.incoming.received;
            if self.field > 0 {
                let piece = received.front(self.field);
                if piece.is_empty() {
                    return Ok(None);
                }
                self.field -= piece.len();
                self.message -= piece.len();
                if self.data {
                    self.beside = 0;
                    return Ok(Some(piece));
                }
                self.beside += piece.len();
            } else if self.message > 0 {
                // A head that is cut cannot be distinguished from a bad one.
                if received.remaining() < self.message.min(FIELD_HEAD) {
                    return Ok(None);
                }
                self.head()?;
            } else {
                if received.remaining() < PREFIX {
                    return Ok(None);
                }
                self.message = self.incoming.prefix()?;
                self.beside += PREFIX;
            }
        }
    }

    /// Reads a field's head.
    fn head(&mut self) -> Result<(), Status> {
        let malformed = || Status::internal("malformed message in the stream");
        let received = &mut self.incoming.received;
        let before = received.remaining();
        let (field, wire_type) = decode_key(received).map_err(|_| malformed())?;
        let length = match wire_type {
            WireType::LengthDelimited => decode_varint(received).map_err(|_| malformed())?,
            WireType::Varint => {
                decode_varint(received).map_err(|_| malformed())?;
                0
            }
            WireType::ThirtyTwoBit => 4,
            WireType::SixtyFourBit => 8,
            WireType::StartGroup | WireType::EndGroup => return Err(malformed()),
        };
        let head = before - received.remaining();
        self.beside += head;
        self.message = self.message.checked_sub(head).ok_or_else(malformed)?;
        self.field = usize::try_from(length)
            .ok()
            .filter(|length| *length <= self.message)
            .ok_or_else(malformed)?;
        self.data = field == DATA && wire_type == WireType::LengthDelimited;
        Ok(())
    }
}

fn is_grpc(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

fn of_trailers(trailers: &HeaderMap) -> Result<(), Status> {
    match Status::from_header_map(trailers) {
        Some(status) if status.code() == Code::Ok => Ok(()),
        Some(status) => Err(status),
        None => Err(Status::unknown("the stream ended without a status")),
    }
}

/// What is between us and the server answered instead of it (gRPC's "HTTP to gRPC Status Code Mapping").
fn of_http(status: http::StatusCode) -> Status {
    let code = match status.as_u16() {
        400 => Code::Internal,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 => Code::Unimplemented,
        429 | 502..=504 => Code::Unavailable,
        _ => Code::Unknown,
    };
    Status::new(
        code,
        format!(
            "grpc-status header missing, mapped from HTTP status code {}",
            status.as_u16()
        ),
    )
}

/// An answer of these bytes, in pieces of this size, and this status.
#[cfg(any(test, fuzzing))]
fn incoming(bytes: &[u8], chunk: usize, status: Option<&'static str>) -> Incoming {
    let trailers = status.map(|code| {
        let mut map = HeaderMap::new();
        map.insert("grpc-status", HeaderValue::from_static(code));
        http_body::Frame::trailers(map)
    });
    let frames: Vec<_> = bytes
        .chunks(chunk)
        .map(|c| http_body::Frame::data(Bytes::copy_from_slice(c)))
        .chain(trailers)
        .map(Ok::<_, Status>)
        .collect();
    Incoming {
        body: Body::new(http_body_util::StreamBody::new(futures::stream::iter(frames))),
        received: Rope::default(),
        count: Received::default(),
        ended: false,
    }
}

/// For [`super::fuzz`]: all data of such an answer.
#[cfg(any(test, fuzzing))]
pub(super) async fn fuzz_pieces(
    bytes: &[u8],
    chunk: usize,
    status: Option<&'static str>,
) -> Result<Vec<u8>, Status> {
    let mut pieces = Pieces::new(incoming(bytes, chunk, status));
    let mut all = Vec::new();
    while let Some(piece) = pieces.next().await? {
        all.extend(piece);
    }
    Ok(all)
}

/// For [`super::fuzz`]: the message of such an answer.
#[cfg(any(test, fuzzing))]
pub(super) async fn fuzz_single<M: Message + Default>(
    bytes: &[u8],
    chunk: usize,
    status: Option<&'static str>,
) -> Result<M, Status> {
    incoming(bytes, chunk, status).single(usize::MAX).await
}

#[cfg(test)]
mod tests {
    use bazel_remote_apis::google::bytestream::ReadResponse;

    use super::*;

    async fn all(incoming: Incoming) -> Result<Vec<u8>, Status> {
        let mut pieces = Pieces::new(incoming);
        let mut bytes = Vec::new();
        while let Some(piece) = pieces.next().await? {
            assert!(!piece.is_empty());
            bytes.extend(piece);
        }
        Ok(bytes)
    }

    /// Three messages: with data, empty, and with unknown fields around the data.
    fn stream_of_messages() -> Vec<u8> {
        let data = |data: &[u8]| ReadResponse { data: data.to_vec() }.encode_to_vec();
        let unknown = [
            &[0x08, 0x96, 0x01][..],
            &[0x12, 2, 9, 9],
            &[0x1d, 1, 2, 3, 4],
            &[0x21, 1, 2, 3, 4, 5, 6, 7, 8],
        ]
        .concat();
        let odd = [&*unknown, &data(b"third"), &unknown].concat();
        [data(&[7; 300]), data(b""), odd]
            .into_iter()
            .flat_map(|message| with_prefix([vec![0; PREFIX], message].concat()))
            .collect()
    }

    #[tokio::test]
    async fn data_is_found_however_the_stream_is_cut() {
        let bytes = stream_of_messages();
        for chunk in [1, 2, 5, 64, 1000] {
            let read = all(incoming(&bytes, chunk, Some("0"))).await.unwrap();
            assert_eq!(read, [&[7; 300][..], b"third"].concat(), "{chunk}");
        }
    }

    #[tokio::test]
    async fn only_a_status_ends_a_stream_well() {
        let bytes = stream_of_messages();
        assert_eq!(
            all(incoming(&bytes, 9, Some("5"))).await.unwrap_err().code(),
            Code::NotFound
        );
        assert_eq!(
            all(incoming(&bytes, 9, None)).await.unwrap_err().code(),
            Code::Unknown
        );
        let cut = &bytes[..bytes.len() - 1];
        assert_eq!(
            all(incoming(cut, 9, Some("0"))).await.unwrap_err().code(),
            Code::Internal
        );
    }

    #[tokio::test]
    async fn what_is_no_message_is_an_error() {
        for message in [
            &[0x52, 9, 1][..],
            &[0x52, 0xff, 0xff, 0xff, 0xff, 0xff],
            &[0x0b],
            &[0x07],
        ] {
            let bytes = with_prefix([&[0; PREFIX], message].concat());
            let read = all(incoming(&bytes, 100, Some("0"))).await;
            assert_eq!(read.unwrap_err().code(), Code::Internal, "{message:?}");
        }
        assert!(all(incoming(&[1, 0, 0, 0, 0], 100, Some("0"))).await.is_err());
    }

    #[tokio::test]
    async fn a_stream_without_data_has_an_end() {
        let empty = [0; PREFIX];
        // An unknown field of 100 KiB.
        let unknown = [&[0x12, 0x80, 0xa0, 0x06][..], &[9; 100 << 10]].concat();
        let unknown = with_prefix([&[0; PREFIX][..], &unknown].concat());
        for bytes in [empty.repeat(20_000), unknown.to_vec()] {
            let read = all(incoming(&bytes, 1000, Some("0"))).await;
            assert_eq!(read.unwrap_err().code(), Code::DataLoss);
        }
        assert!(
            all(incoming(&empty.repeat(10_000), 1000, Some("0")))
                .await
                .unwrap()
                .is_empty()
        );
    }

    #[tokio::test]
    async fn a_single_message_needs_a_good_end_too() {
        let message = ReadResponse { data: vec![7; 300] };
        let bytes = with_prefix([vec![0; PREFIX], message.encode_to_vec()].concat());
        for chunk in [1, 7, 1000] {
            let read = incoming(&bytes, chunk, Some("0"))
                .single::<ReadResponse>(1000)
                .await;
            assert_eq!(read.unwrap(), message);
        }
        let more = [&*bytes, &[0; 9]].concat();
        for (bytes, status, code) in [
            (&more[..], Some("0"), Code::Internal),
            (&bytes[..], Some("14"), Code::Unavailable),
            (&bytes[..200], Some("0"), Code::Internal),
            (&[], Some("0"), Code::Internal),
            (&[0, 0, 0, 3, 0xe9], Some("0"), Code::DataLoss),
            (&[0, 0xff, 0, 0, 0], Some("0"), Code::DataLoss),
            (&[0, 0, 0, 0, 1, 0xff], Some("0"), Code::Internal),
        ] {
            let read = incoming(bytes, 100, status).single::<ReadResponse>(1000).await;
            assert_eq!(read.unwrap_err().code(), code);
        }
    }
}
