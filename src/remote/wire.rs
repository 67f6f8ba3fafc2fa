//! The two answers that carry blobs, with their bytes left where they were received.
//!
//! The generated types copy every blob out of the received message into an allocation of its own. These have the same
//! fields, and their bytes are slices of the message. The services' other calls and types are the generated ones.

use bazel_remote_apis::{
    build::bazel::remote::execution::v2::{BatchReadBlobsRequest, Digest},
    google::{bytestream::ReadRequest, rpc},
};
use bytes::Bytes;
use http::uri::PathAndQuery;
use tonic::{Request, Response, Status, Streaming, client::Grpc, transport::Channel};
use tonic_prost::ProstCodec;

use super::client::MAX_MESSAGE;

/// `google.bytestream.ReadResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Piece {
    #[prost(bytes = "bytes", tag = "10")]
    pub(super) data: Bytes,
}

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
    pub(super) digest: Option<Digest>,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) data: Bytes,
    #[prost(message, optional, tag = "3")]
    pub(super) status: Option<rpc::Status>,
    /// A `Compressor.Value`.
    #[prost(int32, tag = "4")]
    pub(super) compressor: i32,
}

/// `ByteStream.Read`.
pub(super) async fn read(
    channel: Channel,
    request: Request<ReadRequest>,
) -> Result<Response<Streaming<Piece>>, Status> {
    let mut client = ready(channel).await?;
    let path = PathAndQuery::from_static("/google.bytestream.ByteStream/Read");
    client
        .server_streaming(request, path, ProstCodec::default())
        .await
}

/// `ContentAddressableStorage.BatchReadBlobs`.
pub(super) async fn batch_read_blobs(
    channel: Channel,
    request: Request<BatchReadBlobsRequest>,
) -> Result<Response<Batch>, Status> {
    let mut client = ready(channel).await?;
    let path = PathAndQuery::from_static(
        "/build.bazel.remote.execution.v2.ContentAddressableStorage/BatchReadBlobs",
    );
    client.unary(request, path, ProstCodec::default()).await
}

/// As the generated clients do before every call.
async fn ready(channel: Channel) -> Result<Grpc<Channel>, Status> {
    let mut client = Grpc::new(channel).max_decoding_message_size(MAX_MESSAGE);
    client
        .ready()
        .await
        .map_err(|e| Status::unknown(format!("Service was not ready: {e}")))?;
    Ok(client)
}

#[cfg(test)]
mod tests {
    use bazel_remote_apis::{
        build::bazel::remote::execution::v2::{
            BatchReadBlobsResponse, batch_read_blobs_response::Response, compressor,
        },
        google::bytestream::ReadResponse,
    };
    use prost::Message as _;

    use super::*;

    #[test]
    fn a_read_answer_is_understood_as_the_generated_type_writes_it() {
        let theirs = ReadResponse { data: vec![1, 2, 3] };
        let ours = Piece::decode(&*theirs.encode_to_vec()).unwrap();
        assert_eq!(ours.data, theirs.data);
        assert_eq!(ours.encode_to_vec(), theirs.encode_to_vec());
    }

    #[test]
    fn a_batch_answer_is_understood_as_the_generated_type_writes_it() {
        let theirs = BatchReadBlobsResponse {
            responses: vec![
                Response {
                    digest: Some(Digest {
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
