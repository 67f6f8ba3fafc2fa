//! Reading blobs, on the wire: what is asked and what is answered, with bytes left where they were received.
//!
//! The generated types copy every blob out of the received message into an allocation of its own, and every hash of a
//! request into another. These have the same fields. The services' other calls and types are the generated ones.

use bazel_remote_apis::{
    build::bazel::remote::execution::v2::BatchReadBlobsRequest,
    google::{bytestream::ReadRequest, rpc},
};
use bytes::Bytes;
use prost::{
    Message as _,
    encoding::{encode_varint, encoded_len_varint},
};
use tonic::{Request, Response, Status, transport::Channel};

use super::call::{self, Pieces};
use crate::digest::{Digest, DigestFunction};

/// `build.bazel.remote.execution.v2.BatchReadBlobsResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Batch {
    #[prost(message, repeated, tag = "1")]
    pub(super) responses: Vec<BatchPart>,
}

/// `build.bazel.remote.execution.v2.BatchReadBlobsResponse.Response`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct BatchPart {
    #[prost(message, optional, tag = "1")]
    pub(super) digest: Option<RawDigest>,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) data: Bytes,
    #[prost(message, optional, tag = "3")]
    pub(super) status: Option<rpc::Status>,
    /// A `Compressor.Value`.
    #[prost(int32, tag = "4")]
    pub(super) compressor: i32,
}

/// `build.bazel.remote.execution.v2.Digest`, with the hash's digits as they came.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct RawDigest {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) hash: Bytes,
    #[prost(int64, tag = "2")]
    pub(super) size_bytes: i64,
}

impl RawDigest {
    /// Whether it is this one. Digits may be upper or lower case.
    pub(super) fn is(&self, digest: &Digest) -> bool {
        u64::try_from(self.size_bytes) == Ok(digest.size()) && digest.is_hex(&self.hash)
    }

    /// A digest in an answer to a request about digests of `function`; `None` if it is invalid.
    pub(super) fn parse(&self, function: DigestFunction) -> Option<Digest> {
        let hash = std::str::from_utf8(&self.hash).ok()?;
        Digest::from_hex(Some(function), hash, u64::try_from(self.size_bytes).ok()?).ok()
    }
}

/// The body of a `BatchReadBlobsRequest`: its other fields, and these digests.
pub(super) fn batch_request<'d>(
    others: &BatchReadBlobsRequest,
    digests: impl Iterator<Item = &'d Digest>,
) -> Bytes {
    let mut to = call::start();
    // A vector has room for everything.
    let _ = others.encode(&mut to);
    let mut digits = [0; 128];
    for digest in digests {
        let digits = &mut digits[..2 * digest.hash().len()];
        // As many digits as the hash has.
        let _ = hex::encode_to_slice(digest.hash(), digits);
        // 2: digests { 1: hash, 2: size_bytes }. No hash has more than 127 digits but those of SHA-512, and no size
        // here is above i64::MAX.
        let size = digest.size().min(i64::MAX as u64);
        let length = digits.len() as u64;
        let inside = 1 + encoded_len_varint(length) + digits.len() + 1 + encoded_len_varint(size);
        to.push(0x12);
        encode_varint(inside as u64, &mut to);
        to.push(0x0a);
        encode_varint(length, &mut to);
        to.extend_from_slice(digits);
        to.push(0x10);
        encode_varint(size, &mut to);
    }
    call::with_prefix(to)
}

/// `ByteStream.Read`.
pub(super) async fn read(channel: Channel, request: Request<Bytes>) -> Result<Response<Pieces>, Status> {
    let answer = call::send(channel, "/google.bytestream.ByteStream/Read", request).await?;
    Ok(answer.map(Pieces::new))
}

/// The body of a [`ReadRequest`].
pub(super) fn read_request(request: &ReadRequest) -> Bytes {
    let mut to = call::start();
    // A vector has room for everything.
    let _ = request.encode(&mut to);
    call::with_prefix(to)
}

/// `ContentAddressableStorage.BatchReadBlobs`, with an answer of at most this many bytes.
pub(super) async fn batch_read_blobs(
    channel: Channel,
    request: Request<Bytes>,
    most: usize,
) -> Result<Response<Batch>, Status> {
    let path = "/build.bazel.remote.execution.v2.ContentAddressableStorage/BatchReadBlobs";
    let answer = call::send(channel, path, request).await?;
    Ok(Response::new(answer.into_inner().single(most).await?))
}

#[cfg(test)]
mod tests {
    use bazel_remote_apis::build::bazel::remote::execution::v2::{
        self as reapi, BatchReadBlobsResponse, batch_read_blobs_response::Response, compressor,
    };

    use super::*;
    use crate::remote::client::to_wire;

    #[test]
    fn a_batch_is_asked_for_as_the_generated_type_asks() {
        for function in [
            DigestFunction::Sha256,
            DigestFunction::Sha512,
            DigestFunction::Md5,
        ] {
            let digests = [&b"a"[..], &[0; 200]].map(|bytes| Digest::of(function, bytes));
            let mut expected = BatchReadBlobsRequest {
                instance_name: "main".into(),
                digests: Vec::new(),
                acceptable_compressors: vec![0, 1],
                digest_function: function.wire(),
            };
            let body = batch_request(&expected, digests.iter());
            assert_eq!(
                &body[..5],
                [&[0][..], &(body.len() as u32 - 5).to_be_bytes()].concat()
            );
            expected.digests = digests.iter().map(to_wire).collect();
            assert_eq!(BatchReadBlobsRequest::decode(&body[5..]), Ok(expected));
        }
    }

    #[test]
    fn a_digest_is_recognised_by_its_digits_and_size() {
        let digest = Digest::of(DigestFunction::Sha256, b"a");
        let raw = |hash: String, size_bytes| RawDigest {
            hash: hash.into(),
            size_bytes,
        };
        let hex = digest.hash_hex();
        assert!(raw(hex.clone(), 1).is(&digest));
        assert!(raw(hex.to_uppercase(), 1).is(&digest));
        assert_eq!(
            raw(hex.clone(), 1).parse(DigestFunction::Sha256),
            Some(digest.clone())
        );
        for wrong in [
            raw(hex.clone(), 2),
            raw(hex.clone(), -1),
            raw(hex[2..].into(), 1),
            raw("z".repeat(64), 1),
            raw("a".repeat(200), 1),
            raw(String::new(), 1),
        ] {
            assert!(!wrong.is(&digest), "{wrong:?}");
        }
    }

    #[test]
    fn a_batch_answer_is_understood_as_the_generated_type_writes_it() {
        let theirs = BatchReadBlobsResponse {
            responses: vec![
                Response {
                    digest: Some(reapi::Digest {
                        hash: "ab".to_owned(),
                        size_bytes: 2,
                    }),
                    data: vec![7, 8],
                    compressor: compressor::Value::Zstd as i32,
                    status: None,
                },
                Response {
                    status: Some(rpc::Status {
                        code: 5,
                        message: "not found".to_owned(),
                        details: Vec::new(),
                    }),
                    ..Response::default()
                },
            ],
        };
        let encoded = Bytes::from(theirs.encode_to_vec());
        let ours = Batch::decode(encoded.clone()).unwrap();
        assert_eq!(ours.encode_to_vec(), encoded);
        let [first, second] = &*ours.responses else {
            panic!("{ours:?}")
        };
        assert_eq!(
            (&*first.data, first.compressor),
            (&[7, 8][..], compressor::Value::Zstd as i32)
        );
        assert_eq!(second.status, theirs.responses[1].status);
        // A slice of what was received, not a copy.
        assert!(encoded.as_ptr_range().contains(&first.data.as_ptr()));
    }
}
