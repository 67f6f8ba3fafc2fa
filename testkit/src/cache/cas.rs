//! `ContentAddressableStorage`: batches and trees.

use std::collections::{HashSet, VecDeque};

use bazel_remote_apis::build::bazel::remote::execution::v2::{
    BatchReadBlobsRequest, BatchReadBlobsResponse, BatchUpdateBlobsRequest, BatchUpdateBlobsResponse,
    Directory, FindMissingBlobsRequest, FindMissingBlobsResponse, GetChunkMappingRequest,
    GetChunkMappingResponse, GetTreeRequest, GetTreeResponse, RegisterChunkMappingRequest,
    RegisterChunkMappingResponse, SpliceBlobRequest, SpliceBlobResponse, SplitBlobRequest, SplitBlobResponse,
    batch_update_blobs_request, batch_update_blobs_response, compressor,
    content_addressable_storage_server::ContentAddressableStorage,
};
use futures::stream::{self, BoxStream, StreamExt as _};
use prost::Message as _;
use tonic::{Code, Request, Response, Status, Streaming};

use super::{
    context::{Context, Shared, inner_status},
    stats::{Rpc, add},
};
use outhaul_digest::Digest;

/// Most directories in one message of `GetTree`, when the client does not say.
const TREE_PAGE: usize = 1000;

/// Largest blob decompressed in one piece where the batch limit is switched off.
const UNLIMITED_BATCH: u64 = 64 << 20;

/// The fastest level; the cache's peers are on the same machine.
pub(super) const ZSTD_LEVEL: i32 = 1;

/// The service.
pub(super) struct CasService(pub(super) Shared);

#[tonic::async_trait]
impl ContentAddressableStorage for CasService {
    async fn find_missing_blobs(
        &self,
        request: Request<FindMissingBlobsRequest>,
    ) -> Result<Response<FindMissingBlobsResponse>, Status> {
        self.0.enter(Rpc::FindMissing, &request).await?;
        let request = request.into_inner();
        self.0.check_instance(&request.instance_name)?;
        add(
            &self.0.counters.find_missing_blobs,
            request.blob_digests.len() as u64,
        );
        let mut missing = Vec::new();
        for wire in request.blob_digests {
            let digest = self.0.digest(Some(&wire), request.digest_function)?;
            if !self.0.store.contains(&digest) {
                missing.push(wire);
            }
        }
        Ok(Response::new(FindMissingBlobsResponse {
            missing_blob_digests: missing,
        }))
    }

    async fn batch_update_blobs(
        &self,
        request: Request<BatchUpdateBlobsRequest>,
    ) -> Result<Response<BatchUpdateBlobsResponse>, Status> {
        self.0.enter(Rpc::BatchUpdate, &request).await?;
        let request = request.into_inner();
        self.0.check_instance(&request.instance_name)?;
        add(&self.0.counters.batch_update_blobs, request.requests.len() as u64);
        let mut digests = Vec::with_capacity(request.requests.len());
        for update in &request.requests {
            digests.push(self.0.digest(update.digest.as_ref(), request.digest_function)?);
        }
        self.0.check_batch(total_size(&digests))?;
        let responses = request
            .requests
            .into_iter()
            .zip(digests)
            .map(|(mut update, digest)| {
                let wire = update.digest.take();
                let status = match self.0.update(&digest, update) {
                    Ok(()) => inner_status(Code::Ok, ""),
                    Err(status) => inner_status(status.code(), status.message()),
                };
                batch_update_blobs_response::Response {
                    digest: wire,
                    status: Some(status),
                }
            })
            .collect();
        Ok(Response::new(BatchUpdateBlobsResponse { responses }))
    }

    /// Answered by [`batch`](super::direct::batch).
    async fn batch_read_blobs(
        &self,
        _: Request<BatchReadBlobsRequest>,
    ) -> Result<Response<BatchReadBlobsResponse>, Status> {
        Err(Status::unimplemented("answered elsewhere"))
    }

    type GetTreeStream = BoxStream<'static, Result<GetTreeResponse, Status>>;

    async fn get_tree(
        &self,
        request: Request<GetTreeRequest>,
    ) -> Result<Response<Self::GetTreeStream>, Status> {
        self.0.enter(Rpc::GetTree, &request).await?;
        let request = request.into_inner();
        self.0.check_instance(&request.instance_name)?;
        let root = self
            .0
            .digest(request.root_digest.as_ref(), request.digest_function)?;
        // The token is the number of directories already sent: the walk is the same every time.
        let skip: usize = match request.page_token.as_str() {
            "" => 0,
            token => token
                .parse()
                .map_err(|_| Status::invalid_argument(format!("unknown page token {token:?}")))?,
        };
        let page = usize::try_from(request.page_size)
            .ok()
            .filter(|&size| size > 0)
            .unwrap_or(TREE_PAGE);
        let directories = self.0.walk(&root, request.digest_function)?;
        let total = directories.len();
        let rest = directories.get(skip..).unwrap_or_default();
        let pages: Vec<_> = rest
            .chunks(page)
            .enumerate()
            .map(|(index, chunk)| {
                let end = skip + index * page + chunk.len();
                Ok(GetTreeResponse {
                    directories: chunk.to_vec(),
                    next_page_token: if end < total {
                        end.to_string()
                    } else {
                        String::new()
                    },
                })
            })
            .collect();
        Ok(Response::new(stream::iter(pages).boxed()))
    }

    async fn split_blob(&self, _: Request<SplitBlobRequest>) -> Result<Response<SplitBlobResponse>, Status> {
        Err(chunking())
    }

    type GetChunkMappingStream = BoxStream<'static, Result<GetChunkMappingResponse, Status>>;

    async fn get_chunk_mapping(
        &self,
        _: Request<GetChunkMappingRequest>,
    ) -> Result<Response<Self::GetChunkMappingStream>, Status> {
        Err(chunking())
    }

    async fn splice_blob(
        &self,
        _: Request<SpliceBlobRequest>,
    ) -> Result<Response<SpliceBlobResponse>, Status> {
        Err(chunking())
    }

    async fn register_chunk_mapping(
        &self,
        _: Request<Streaming<RegisterChunkMappingRequest>>,
    ) -> Result<Response<RegisterChunkMappingResponse>, Status> {
        Err(chunking())
    }
}

fn chunking() -> Status {
    Status::unimplemented("blobs are not chunked here")
}

pub(super) fn total_size(digests: &[Digest]) -> u64 {
    digests
        .iter()
        .fold(0, |sum: u64, digest| sum.saturating_add(digest.size()))
}

impl Context {
    /// Takes one blob of a batch in.
    fn update(&self, digest: &Digest, update: batch_update_blobs_request::Request) -> Result<(), Status> {
        let bytes = match compressor::Value::try_from(update.compressor) {
            Ok(compressor::Value::Identity) => update.data,
            Ok(compressor::Value::Zstd) if self.zstd => {
                let limit = match self.max_batch_bytes {
                    0 => UNLIMITED_BATCH,
                    limit => limit,
                };
                // The declared size is a client's word; it is checked before memory is set aside for it.
                let capacity = usize::try_from(digest.size())
                    .ok()
                    .filter(|_| digest.size() <= limit)
                    .ok_or_else(|| {
                        Status::invalid_argument(format!("blob {digest} is too large for a batch"))
                    })?;
                zstd::bulk::decompress(&update.data, capacity).map_err(|error| {
                    Status::invalid_argument(format!("blob {digest} is not zstd: {error}"))
                })?
            }
            _ => {
                return Err(Status::invalid_argument(format!(
                    "compressor number {} is not offered",
                    update.compressor
                )));
            }
        };
        let actual = Digest::of(digest.function(), &bytes);
        if actual != *digest {
            return Err(Status::invalid_argument(format!(
                "bytes of blob {digest} have the digest {actual}"
            )));
        }
        add(&self.counters.bytes_in, bytes.len() as u64);
        self.store.put_unverified(actual, bytes);
        Ok(())
    }

    /// A directory and all below it, each once, parents first. Missing ones below the root are left out, as the API
    /// says.
    fn walk(&self, root: &Digest, function: i32) -> Result<Vec<Directory>, Status> {
        let mut seen = HashSet::from([root.clone()]);
        let mut queue = VecDeque::from([root.clone()]);
        let mut found = Vec::new();
        while let Some(digest) = queue.pop_front() {
            let Some(bytes) = self.store.get(&digest) else {
                if found.is_empty() {
                    return Err(Status::not_found(format!("directory {digest} is not here")));
                }
                continue;
            };
            let directory = Directory::decode(bytes).map_err(|error| {
                Status::failed_precondition(format!("blob {digest} is not a directory: {error}"))
            })?;
            for child in &directory.directories {
                let child = self.digest(child.digest.as_ref(), function)?;
                if seen.insert(child.clone()) {
                    queue.push_back(child);
                }
            }
            found.push(directory);
        }
        Ok(found)
    }
}
