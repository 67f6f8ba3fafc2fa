//! `ContentAddressableStorage`: batches and trees.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use bazel_remote_apis::build::bazel::remote::execution::v2::{
    self as reapi, BatchReadBlobsRequest, BatchReadBlobsResponse, BatchUpdateBlobsRequest,
    BatchUpdateBlobsResponse, Directory, FindMissingBlobsRequest, FindMissingBlobsResponse,
    GetChunkMappingRequest, GetChunkMappingResponse, GetTreeRequest, GetTreeResponse,
    RegisterChunkMappingRequest, RegisterChunkMappingResponse, SpliceBlobRequest, SpliceBlobResponse,
    SplitBlobRequest, SplitBlobResponse, batch_read_blobs_response, batch_update_blobs_request,
    batch_update_blobs_response, compressor, content_addressable_storage_server::ContentAddressableStorage,
};
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt as _};
use prost::Message as _;
use tonic::{Code, Request, Response, Status, Streaming};

use super::{
    context::{Context, Shared, injected, inner_busy, inner_status},
    direct::Part,
    faults::{BlobFault, Place, packed},
    stats::{Rpc, add},
};
use crate::digest::Digest;

/// Below this, zstd costs more than it saves; Bazel's threshold for its own uploads is the same.
const COMPRESS_FROM: usize = 100;

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

    /// Answered by [`Direct`](super::direct::Direct).
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

fn total_size(digests: &[Digest]) -> u64 {
    digests
        .iter()
        .fold(0, |sum: u64, digest| sum.saturating_add(digest.size()))
}

/// An answer to a batch in the making.
struct Batch {
    packer: Packer,
    parts: Vec<Part>,
    /// What comes behind those.
    last: Vec<Part>,
    /// How long it is held back.
    delay: Duration,
}

/// An answer about a blob that nobody can have asked for: its digest is made from another's.
fn unasked(digest: &Digest) -> Part {
    let bytes = Bytes::from(format!("not {digest}"));
    let other = Digest::of(digest.function(), &bytes);
    let head = batch_read_blobs_response::Response {
        digest: Some(reapi::Digest {
            hash: other.hash_hex(),
            // Small enough.
            size_bytes: i64::try_from(other.size()).unwrap_or(i64::MAX),
        }),
        ..Default::default()
    };
    (head, bytes)
}

/// Compresses the blobs of one answer, with one context for all of them.
struct Packer(Option<zstd::bulk::Compressor<'static>>);

impl Packer {
    fn new(zstd: bool) -> Self {
        // Without memory for a context, the client gets its blobs uncompressed.
        Self(
            zstd.then(|| zstd::bulk::Compressor::new(ZSTD_LEVEL).ok())
                .flatten(),
        )
    }

    /// The compressed bytes, if that makes them fewer.
    fn pack(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        let compressor = self.0.as_mut().filter(|_| bytes.len() >= COMPRESS_FROM)?;
        compressor
            .compress(bytes)
            .ok()
            .filter(|packed| packed.len() < bytes.len())
    }
}

impl Context {
    /// The blobs' answers to a batch.
    pub(super) async fn read_batch(
        self: Arc<Self>,
        request: Request<BatchReadBlobsRequest>,
    ) -> Result<Vec<Part>, Status> {
        self.enter(Rpc::BatchRead, &request).await?;
        let request = request.into_inner();
        self.check_instance(&request.instance_name)?;
        add(&self.counters.batch_read_blobs, request.digests.len() as u64);
        let mut digests = Vec::with_capacity(request.digests.len());
        for wire in &request.digests {
            digests.push(self.digest(Some(wire), request.digest_function)?);
        }
        self.check_batch(total_size(&digests))?;
        let zstd = self.zstd
            && request
                .acceptable_compressors
                .contains(&compressor::Value::Zstd.into());
        let from_files = self.store.directory().is_some();
        let read = move || {
            let mut batch = Batch {
                packer: Packer::new(zstd),
                parts: Vec::with_capacity(digests.len()),
                last: Vec::new(),
                delay: Duration::ZERO,
            };
            for (wire, digest) in request.digests.into_iter().zip(&digests) {
                self.read_for_batch(wire, digest, &mut batch);
            }
            batch
        };
        let mut batch = if from_files {
            tokio::task::spawn_blocking(read)
                .await
                .map_err(|error| Status::internal(format!("reading a batch: {error}")))?
        } else {
            read()
        };
        if !batch.delay.is_zero() {
            tokio::time::sleep(batch.delay).await;
        }
        batch.parts.append(&mut batch.last);
        Ok(batch.parts)
    }

    /// Adds one blob's answer to a batch, or whatever a fault makes of it.
    fn read_for_batch(&self, wire: reapi::Digest, digest: &Digest, batch: &mut Batch) {
        let place = Place {
            batch: true,
            compressed: batch.packer.0.is_some(),
        };
        let fault = self.faults.on_blob(digest, place);
        let failed = |wire, status| {
            let head = batch_read_blobs_response::Response {
                digest: Some(wire),
                status: Some(status),
                ..Default::default()
            };
            (head, Bytes::new())
        };
        match fault {
            Some(BlobFault::DropFromBatch) => return,
            Some(BlobFault::Status(code)) => {
                let status = inner_status(code, injected(code).message());
                return batch.parts.push(failed(wire, status));
            }
            Some(BlobFault::RetryAfter(patience)) => {
                return batch.parts.push(failed(wire, inner_busy(patience)));
            }
            Some(BlobFault::Evict) => {
                self.store.remove(digest);
            }
            Some(BlobFault::Delay(time)) => batch.delay = batch.delay.max(time),
            Some(BlobFault::Unasked) => batch.parts.push(unasked(digest)),
            _ => {}
        }
        let Some(bytes) = self.store.get(digest) else {
            let status = inner_status(Code::NotFound, format!("blob {digest} is not here"));
            return batch.parts.push(failed(wire, status));
        };
        add(&self.counters.bytes_out, bytes.len() as u64);
        let mut data = bytes;
        if let Some(fault) = fault {
            let mut copy = Vec::from(data);
            spoil(&mut copy, fault);
            data = copy.into();
        }
        let mut compressor = compressor::Value::Identity;
        let lie = fault
            .filter(|_| place.compressed)
            .and_then(|fault| packed(&data, fault));
        if let Some(mut packed) = lie.or_else(|| batch.packer.pack(&data)) {
            if fault == Some(BlobFault::GarbleCompression) {
                garble(&mut packed);
            }
            (data, compressor) = (packed.into(), compressor::Value::Zstd);
        }
        add(&self.counters.wire_bytes_out, data.len() as u64);
        let head = batch_read_blobs_response::Response {
            digest: Some(wire),
            data: Vec::new(),
            compressor: compressor.into(),
            status: Some(inner_status(Code::Ok, "")),
        };
        let part = (head, data);
        match fault {
            Some(BlobFault::Twice { wrong_first }) => {
                let mut other = part.clone();
                let mut bytes = Vec::from(other.1);
                spoil(&mut bytes, BlobFault::Corrupt);
                other.1 = bytes.into();
                let pair = if wrong_first { [other, part] } else { [part, other] };
                batch.parts.extend(pair);
            }
            Some(BlobFault::Last) => batch.last.push(part),
            _ => batch.parts.push(part),
        }
    }

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
        self.store
            .try_put(digest, &bytes.into())
            .map_err(|error| Status::resource_exhausted(format!("keeping blob {digest}: {error}")))
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

/// Applies a fault to the bytes of an answer.
pub(super) fn spoil(data: &mut Vec<u8>, fault: BlobFault) {
    match fault {
        BlobFault::Corrupt => {
            if let Some(first) = data.first_mut() {
                *first ^= 0xff;
            }
        }
        BlobFault::CorruptAt(offset) => {
            let last = data.len().saturating_sub(1);
            let at = usize::try_from(offset).unwrap_or(last).min(last);
            if let Some(byte) = data.get_mut(at) {
                *byte ^= 0xff;
            }
        }
        BlobFault::Resize(by) => {
            let by = isize::try_from(by).unwrap_or(isize::MIN);
            let size = data.len().checked_add_signed(by).unwrap_or(0);
            data.resize(size, 0);
        }
        _ => {}
    }
}

/// Makes a zstd frame undecodable, by way of its magic number.
pub(super) fn garble(frame: &mut [u8]) {
    if let Some(first) = frame.first_mut() {
        *first ^= 0xff;
    }
}
