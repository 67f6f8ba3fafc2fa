//! The server: blobs in memory, and faults on demand.

use std::{
    collections::{HashMap, VecDeque},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
};

use bazel_remote_apis::{
    build::bazel::remote::execution::v2::{
        self as reapi, action_cache_server, batch_read_blobs_response, capabilities_server, compressor,
        content_addressable_storage_server as cas, digest_function,
    },
    google::{
        bytestream::{self, byte_stream_server},
        rpc,
    },
};
use futures::{Stream, StreamExt as _};
use tonic::{Code, Request, Response, Status, transport::server::TcpIncoming};

use crate::digest::{Digest, DigestFunction};

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What a stream does after this many bytes.
#[derive(Clone, Copy)]
pub(crate) enum Cut {
    /// Breaks.
    Error(u64),
    /// Ends as if that were all.
    End(u64),
    /// Sends nothing more and does not end.
    Hang(u64),
}

/// Changes a batch's answers before they are sent.
pub(crate) type Tamper = fn(&mut Vec<batch_read_blobs_response::Response>);

#[derive(Default)]
pub(crate) struct Script {
    pub(crate) blobs: HashMap<String, Vec<u8>>,
    pub(crate) actions: HashMap<String, reapi::ActionResult>,
    /// Errors for the next calls, whichever they are; calls after that succeed.
    pub(crate) errors: VecDeque<Status>,
    /// Errors for the next calls of capabilities.
    pub(crate) capability_errors: VecDeque<Status>,
    pub(crate) cuts: VecDeque<Cut>,
    pub(crate) tamper: VecDeque<Tamper>,
    pub(crate) zstd: bool,
    pub(crate) refuses_compressed_names: bool,
    pub(crate) max_batch: i64,
    pub(crate) functions: Vec<i32>,
    pub(crate) no_batches: bool,
    /// Hashes for which whatever call has them is refused as invalid.
    pub(crate) detested: Vec<String>,
    pub(crate) no_get_tree: bool,
    /// Appended to every stream.
    pub(crate) excess: Vec<u8>,
    /// Requires this `authorization`.
    pub(crate) token: Option<String>,
    /// What was asked, in order: the call and its most telling field.
    pub(crate) log: Vec<String>,
    /// Peers' addresses, one a call of batches.
    pub(crate) peers: Vec<std::net::SocketAddr>,
    pub(crate) last_metadata: Option<tonic::metadata::MetadataMap>,
}

#[derive(Clone, Default)]
pub(crate) struct Fake(Arc<Mutex<Script>>);

impl Fake {
    pub(crate) fn new() -> Self {
        let fake = Self::default();
        fake.script().functions = vec![digest_function::Value::Sha256 as i32];
        fake
    }

    pub(crate) fn script(&self) -> MutexGuard<'_, Script> {
        self.0.lock().unwrap()
    }

    pub(crate) fn put(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(DigestFunction::Sha256, bytes);
        self.script().blobs.insert(digest.hash_hex(), bytes.to_vec());
        digest
    }

    /// How many calls began so.
    pub(crate) fn count(&self, start: &str) -> usize {
        self.script().log.iter().filter(|l| l.starts_with(start)).count()
    }

    pub(crate) fn router(&self) -> tonic::transport::server::Router {
        self.router_on(tonic::transport::Server::builder())
    }

    pub(crate) fn router_on(&self, mut server: tonic::transport::Server) -> tonic::transport::server::Router {
        server
            .add_service(cas::ContentAddressableStorageServer::new(self.clone()))
            .add_service(byte_stream_server::ByteStreamServer::new(self.clone()))
            .add_service(action_cache_server::ActionCacheServer::new(self.clone()))
            .add_service(capabilities_server::CapabilitiesServer::new(self.clone()))
    }

    /// Serves on a free port until the runtime ends; the endpoint.
    pub(crate) async fn start(&self) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(self.router().serve_with_incoming(TcpIncoming::from(listener)));
        format!("grpc://{address}")
    }

    /// Writes the call down; the next error, if one is scripted.
    fn enter<T>(&self, line: String, request: &Request<T>) -> Result<(), Status> {
        let mut script = self.script();
        script.log.push(line);
        script.last_metadata = Some(request.metadata().clone());
        if let Some(token) = &script.token
            && request
                .metadata()
                .get("authorization")
                .and_then(|v| v.to_str().ok())
                != Some(token)
        {
            return Err(Status::unauthenticated("who are you?"));
        }
        script.errors.pop_front().map_or(Ok(()), Err)
    }
}

#[tonic::async_trait]
impl capabilities_server::Capabilities for Fake {
    async fn get_capabilities(
        &self,
        request: Request<reapi::GetCapabilitiesRequest>,
    ) -> Result<Response<reapi::ServerCapabilities>, Status> {
        let mut script = self.script();
        script
            .log
            .push(format!("capabilities {}", request.get_ref().instance_name));
        if let Some(error) = script.capability_errors.pop_front() {
            return Err(error);
        }
        Ok(Response::new(reapi::ServerCapabilities {
            cache_capabilities: Some(reapi::CacheCapabilities {
                digest_functions: script.functions.clone(),
                max_batch_total_size_bytes: script.max_batch,
                supported_compressors: if script.zstd {
                    vec![compressor::Value::Zstd as i32]
                } else {
                    vec![]
                },
                ..Default::default()
            }),
            ..Default::default()
        }))
    }
}

#[tonic::async_trait]
impl byte_stream_server::ByteStream for Fake {
    type ReadStream = Streamed<bytestream::ReadResponse>;

    async fn read(
        &self,
        request: Request<bytestream::ReadRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let message = request.get_ref();
        self.enter(
            format!("read {} {}", message.read_offset, message.resource_name),
            &request,
        )?;
        let mut script = self.script();
        let message = request.get_ref();
        let parts: Vec<&str> = message.resource_name.split('/').collect();
        let compressed = parts.contains(&"compressed-blobs");
        if compressed && (script.refuses_compressed_names || !script.zstd) {
            return Err(Status::invalid_argument("Invalid instance name"));
        }
        let hash = parts[parts.len() - 2];
        if script.detested.iter().any(|detested| detested == hash) {
            return Err(Status::invalid_argument("no such digest can be"));
        }
        let blob = script
            .blobs
            .get(hash)
            .ok_or_else(|| Status::not_found("no such blob"))?;
        let offset = usize::try_from(message.read_offset).unwrap();
        let mut rest = blob[offset..].to_vec();
        rest.extend_from_slice(&script.excess);
        let cut = script.cuts.pop_front();
        if let Some(Cut::Error(n) | Cut::End(n) | Cut::Hang(n)) = cut {
            rest.truncate(usize::try_from(n).unwrap());
        }
        if compressed {
            rest = zstd::encode_all(rest.as_slice(), 3).unwrap();
        }
        let messages: Vec<_> = rest
            .chunks(16 * 1024)
            .map(|data| Ok(bytestream::ReadResponse { data: data.to_vec() }))
            .collect();
        let messages = futures::stream::iter(messages);
        let stream: Self::ReadStream = match cut {
            Some(Cut::Error(_)) => {
                Box::pin(messages.chain(futures::stream::iter([Err(Status::unavailable("cut"))])))
            }
            Some(Cut::Hang(_)) => Box::pin(messages.chain(futures::stream::pending())),
            Some(Cut::End(_)) | None => Box::pin(messages),
        };
        Ok(Response::new(stream))
    }

    async fn write(
        &self,
        _: Request<tonic::Streaming<bytestream::WriteRequest>>,
    ) -> Result<Response<bytestream::WriteResponse>, Status> {
        Err(Status::unimplemented("read only"))
    }

    async fn query_write_status(
        &self,
        _: Request<bytestream::QueryWriteStatusRequest>,
    ) -> Result<Response<bytestream::QueryWriteStatusResponse>, Status> {
        Err(Status::unimplemented("read only"))
    }
}

#[tonic::async_trait]
impl action_cache_server::ActionCache for Fake {
    async fn get_action_result(
        &self,
        request: Request<reapi::GetActionResultRequest>,
    ) -> Result<Response<reapi::ActionResult>, Status> {
        self.enter("action".into(), &request)?;
        let hash = request.into_inner().action_digest.unwrap().hash;
        let result = self.script().actions.get(&hash).cloned();
        result
            .map(Response::new)
            .ok_or_else(|| Status::not_found("no such action"))
    }

    async fn update_action_result(
        &self,
        _: Request<reapi::UpdateActionResultRequest>,
    ) -> Result<Response<reapi::ActionResult>, Status> {
        Err(Status::unimplemented("read only"))
    }
}

#[tonic::async_trait]
impl cas::ContentAddressableStorage for Fake {
    type GetTreeStream = Streamed<reapi::GetTreeResponse>;
    type GetChunkMappingStream = Streamed<reapi::GetChunkMappingResponse>;

    async fn find_missing_blobs(
        &self,
        request: Request<reapi::FindMissingBlobsRequest>,
    ) -> Result<Response<reapi::FindMissingBlobsResponse>, Status> {
        self.enter(format!("find {}", request.get_ref().blob_digests.len()), &request)?;
        let script = self.script();
        let missing = request.into_inner().blob_digests.into_iter();
        Ok(Response::new(reapi::FindMissingBlobsResponse {
            missing_blob_digests: missing.filter(|d| !script.blobs.contains_key(&d.hash)).collect(),
        }))
    }

    async fn batch_read_blobs(
        &self,
        request: Request<reapi::BatchReadBlobsRequest>,
    ) -> Result<Response<reapi::BatchReadBlobsResponse>, Status> {
        if let Some(peer) = request.remote_addr() {
            self.script().peers.push(peer);
        }
        self.enter(format!("batch {}", request.get_ref().digests.len()), &request)?;
        let mut script = self.script();
        if script.no_batches {
            return Err(Status::unimplemented("no batches"));
        }
        let request = request.into_inner();
        if request.digests.iter().any(|d| script.detested.contains(&d.hash)) {
            return Err(Status::invalid_argument("no such digest can be"));
        }
        let zstd = script.zstd
            && request
                .acceptable_compressors
                .contains(&(compressor::Value::Zstd as i32));
        let mut responses: Vec<_> = request
            .digests
            .into_iter()
            .map(|digest| match script.blobs.get(&digest.hash) {
                None => batch_read_blobs_response::Response {
                    digest: Some(digest),
                    status: Some(status(Code::NotFound, "no such blob")),
                    ..Default::default()
                },
                Some(data) if zstd => batch_read_blobs_response::Response {
                    digest: Some(digest),
                    data: zstd::encode_all(data.as_slice(), 3).unwrap(),
                    compressor: compressor::Value::Zstd as i32,
                    status: None,
                },
                Some(data) => batch_read_blobs_response::Response {
                    digest: Some(digest),
                    data: data.clone(),
                    ..Default::default()
                },
            })
            .collect();
        if let Some(tamper) = script.tamper.pop_front() {
            tamper(&mut responses);
        }
        Ok(Response::new(reapi::BatchReadBlobsResponse { responses }))
    }

    /// One directory a page, and two pages a stream, and only what is there: the rest is for the client to find.
    async fn get_tree(
        &self,
        request: Request<reapi::GetTreeRequest>,
    ) -> Result<Response<Self::GetTreeStream>, Status> {
        use prost::Message as _;
        self.enter("tree".into(), &request)?;
        let script = self.script();
        if script.no_get_tree {
            return Err(Status::unimplemented("no trees"));
        }
        let request = request.into_inner();
        let mut queue = VecDeque::from([request.root_digest.unwrap().hash]);
        let mut found = Vec::new();
        while let Some(hash) = queue.pop_front() {
            if let Some(bytes) = script.blobs.get(&hash) {
                let directory = reapi::Directory::decode(bytes.as_slice()).unwrap();
                queue.extend(
                    directory
                        .directories
                        .iter()
                        .map(|d| d.digest.clone().unwrap().hash),
                );
                found.push(directory);
            }
        }
        let start: usize = request.page_token.parse().unwrap_or(0);
        let pages: Vec<_> = (start..found.len())
            .take(2)
            .map(|i| {
                Ok(reapi::GetTreeResponse {
                    directories: vec![found[i].clone()],
                    next_page_token: if i + 1 < found.len() {
                        (i + 1).to_string()
                    } else {
                        String::new()
                    },
                })
            })
            .collect();
        Ok(Response::new(Box::pin(futures::stream::iter(pages))))
    }

    async fn batch_update_blobs(
        &self,
        _: Request<reapi::BatchUpdateBlobsRequest>,
    ) -> Result<Response<reapi::BatchUpdateBlobsResponse>, Status> {
        Err(Status::unimplemented("read only"))
    }

    async fn split_blob(
        &self,
        _: Request<reapi::SplitBlobRequest>,
    ) -> Result<Response<reapi::SplitBlobResponse>, Status> {
        Err(Status::unimplemented("read only"))
    }

    async fn splice_blob(
        &self,
        _: Request<reapi::SpliceBlobRequest>,
    ) -> Result<Response<reapi::SpliceBlobResponse>, Status> {
        Err(Status::unimplemented("read only"))
    }

    async fn get_chunk_mapping(
        &self,
        _: Request<reapi::GetChunkMappingRequest>,
    ) -> Result<Response<Self::GetChunkMappingStream>, Status> {
        Err(Status::unimplemented("read only"))
    }

    async fn register_chunk_mapping(
        &self,
        _: Request<tonic::Streaming<reapi::RegisterChunkMappingRequest>>,
    ) -> Result<Response<reapi::RegisterChunkMappingResponse>, Status> {
        Err(Status::unimplemented("read only"))
    }
}

pub(crate) fn status(code: Code, message: &str) -> rpc::Status {
    rpc::Status {
        code: code as i32,
        message: message.into(),
        details: vec![],
    }
}
