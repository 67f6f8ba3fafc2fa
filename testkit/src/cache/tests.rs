//! The cache as its clients see it: real channels, over TCP and unix sockets.

use std::time::Duration;

use bazel_remote_apis::{
    build::bazel::remote::execution::v2::{
        self as reapi, ActionResult, BatchReadBlobsRequest, BatchUpdateBlobsRequest, Directory,
        DirectoryNode, FindMissingBlobsRequest, GetActionResultRequest, GetCapabilitiesRequest,
        GetTreeRequest, UpdateActionResultRequest, action_cache_client::ActionCacheClient,
        batch_read_blobs_response, batch_update_blobs_request, capabilities_client::CapabilitiesClient,
        compressor, content_addressable_storage_client::ContentAddressableStorageClient,
    },
    google::bytestream::{
        QueryWriteStatusRequest, ReadRequest, WriteRequest, byte_stream_client::ByteStreamClient,
    },
};
use prost::Message as _;
use tokio::time::timeout;
use tonic::{
    Code, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use super::*;
use crate::PATIENCE;
use outhaul_digest::{Digest, DigestFunction};

mod access;
mod cas;
mod faults;
mod odd;
mod streams;

const BRIEFLY: Duration = Duration::from_millis(150);

/// Bytes that compress to about half.
fn noise(size: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state & 0x0f) as u8
    };
    (0..size).map(|_| next()).collect()
}

async fn channel(cache: &RunningCache) -> Channel {
    let endpoint = cache.endpoint();
    let uri = match endpoint.strip_prefix("grpc://") {
        Some(authority) => format!("http://{authority}"),
        None => endpoint,
    };
    Endpoint::from_shared(uri).unwrap().connect().await.unwrap()
}

fn wire(digest: &Digest) -> reapi::Digest {
    reapi::Digest {
        hash: digest.hash_hex(),
        size_bytes: digest.size() as i64,
    }
}

fn resource(digest: &Digest, zstd: bool) -> String {
    let keyword = if zstd { "compressed-blobs/zstd" } else { "blobs" };
    format!("{keyword}/{digest}")
}

struct Client(Channel);

impl Client {
    async fn of(cache: &RunningCache) -> Self {
        Self(channel(cache).await)
    }

    fn cas(&self) -> ContentAddressableStorageClient<Channel> {
        ContentAddressableStorageClient::new(self.0.clone()).max_decoding_message_size(64 << 20)
    }

    fn stream(&self) -> ByteStreamClient<Channel> {
        ByteStreamClient::new(self.0.clone())
    }

    /// What arrived, and how it ended.
    async fn read_from(&self, name: &str, offset: i64, limit: i64) -> (Vec<u8>, Result<(), Status>) {
        let request = ReadRequest {
            resource_name: name.to_owned(),
            read_offset: offset,
            read_limit: limit,
        };
        let mut data = Vec::new();
        let mut stream = match self.stream().read(request).await {
            Ok(response) => response.into_inner(),
            Err(status) => return (data, Err(status)),
        };
        loop {
            match stream.message().await {
                Ok(Some(message)) => {
                    assert!(
                        message.data.len() < 3 << 20,
                        "message of {} bytes",
                        message.data.len()
                    );
                    data.extend(message.data);
                }
                Ok(None) => return (data, Ok(())),
                Err(status) => return (data, Err(status)),
            }
        }
    }

    async fn read(&self, digest: &Digest, zstd: bool) -> (Vec<u8>, Result<(), Status>) {
        self.read_from(&resource(digest, zstd), 0, 0).await
    }

    async fn batch(
        &self,
        digests: &[&Digest],
        zstd: bool,
    ) -> Result<Vec<batch_read_blobs_response::Response>, Status> {
        let request = BatchReadBlobsRequest {
            digests: digests.iter().map(|d| wire(d)).collect(),
            acceptable_compressors: if zstd {
                vec![compressor::Value::Zstd.into()]
            } else {
                vec![]
            },
            ..Default::default()
        };
        Ok(self.cas().batch_read_blobs(request).await?.into_inner().responses)
    }

    async fn write(&self, messages: Vec<WriteRequest>) -> Result<i64, Status> {
        let response = self.stream().write(futures::stream::iter(messages)).await?;
        Ok(response.into_inner().committed_size)
    }

    async fn committed(&self, name: &str) -> (i64, bool) {
        let request = QueryWriteStatusRequest {
            resource_name: name.to_owned(),
        };
        let answer = self
            .stream()
            .query_write_status(request)
            .await
            .unwrap()
            .into_inner();
        (answer.committed_size, answer.complete)
    }
}

/// Messages of an upload, from an offset on.
fn upload(name: &str, bytes: &[u8], from: usize, finish: bool) -> Vec<WriteRequest> {
    let pieces: Vec<_> = bytes[from..].chunks(300_000).collect();
    let count = pieces.len();
    let mut offset = from;
    let messages = pieces.into_iter().enumerate().map(|(index, piece)| {
        let message = WriteRequest {
            resource_name: if index == 0 {
                name.to_owned()
            } else {
                String::new()
            },
            write_offset: offset as i64,
            finish_write: finish && index + 1 == count,
            data: piece.to_vec(),
        };
        offset += piece.len();
        message
    });
    messages.collect()
}

fn code<T: std::fmt::Debug>(result: Result<T, Status>) -> Code {
    result.unwrap_err().code()
}

async fn start() -> (RunningCache, Client) {
    let cache = EmbeddedCache::builder().start().await.unwrap();
    let client = Client::of(&cache).await;
    (cache, client)
}
