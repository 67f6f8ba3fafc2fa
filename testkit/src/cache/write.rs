//! `ByteStream`: the service, and writing.

use bazel_remote_apis::google::bytestream::{
    QueryWriteStatusRequest, QueryWriteStatusResponse, ReadRequest, ReadResponse, WriteRequest,
    WriteResponse, byte_stream_server::ByteStream,
};
use futures::stream::BoxStream;
use tonic::{Request, Response, Status, Streaming};

use super::{
    context::{Context, Shared},
    resource::Resource,
    stats::{Rpc, add},
    upload::{Resumable, Upload, UploadError},
};
use outhaul_digest::Digest;

/// The service.
pub(super) struct ByteStreamService(pub(super) Shared);

#[tonic::async_trait]
impl ByteStream for ByteStreamService {
    type ReadStream = BoxStream<'static, Result<ReadResponse, Status>>;

    /// Answered by [`read`](super::direct::read).
    async fn read(&self, _: Request<ReadRequest>) -> Result<Response<Self::ReadStream>, Status> {
        Err(Status::unimplemented("answered elsewhere"))
    }

    async fn write(
        &self,
        request: Request<Streaming<WriteRequest>>,
    ) -> Result<Response<WriteResponse>, Status> {
        self.0.enter(Rpc::StreamWrite, &request).await?;
        let mut stream = request.into_inner();
        let Some(mut message) = stream.message().await? else {
            return Err(Status::invalid_argument("write without a message"));
        };
        let name = std::mem::take(&mut message.resource_name);
        let resource = Resource::for_write(&name)?;
        let compressed = resource.compressed;
        let digest = self.0.resource(&resource)?;
        if self.0.store.contains(&digest) {
            return Ok(Response::new(WriteResponse {
                committed_size: present(&digest, compressed),
            }));
        }
        // A client that starts at 0 again has forgotten what it sent; so do we.
        let resumed = self.0.uploads.take(&name).filter(|_| message.write_offset > 0);
        let upload = match resumed {
            Some(upload) => upload,
            None => Upload::new(digest.clone(), compressed).map_err(|error| refused(&digest, &error))?,
        };
        let mut resumable = Resumable::new(name, upload, &self.0.uploads);
        loop {
            let finish = message.finish_write;
            let received = self.0.append(&mut resumable, &message)?;
            if finish {
                if let Some(upload) = resumable.take() {
                    upload
                        .finish(&self.0.store)
                        .map_err(|error| refused(&digest, &error))?;
                }
                add(&self.0.counters.bytes_in, digest.size());
                return Ok(Response::new(WriteResponse {
                    committed_size: received,
                }));
            }
            message = match stream.message().await? {
                Some(message) => message,
                // The client stops for now; what it sent waits for the rest.
                None => {
                    return Ok(Response::new(WriteResponse {
                        committed_size: received,
                    }));
                }
            };
        }
    }

    async fn query_write_status(
        &self,
        request: Request<QueryWriteStatusRequest>,
    ) -> Result<Response<QueryWriteStatusResponse>, Status> {
        self.0.enter(Rpc::QueryWrite, &request).await?;
        let name = &request.get_ref().resource_name;
        let resource = Resource::for_write(name)?;
        let digest = self.0.resource(&resource)?;
        let answer = if self.0.store.contains(&digest) {
            QueryWriteStatusResponse {
                committed_size: present(&digest, resource.compressed),
                complete: true,
            }
        } else {
            let received = self.0.uploads.received(name).unwrap_or(0);
            QueryWriteStatusResponse {
                committed_size: size(received),
                complete: false,
            }
        };
        Ok(Response::new(answer))
    }
}

impl Context {
    /// Takes one message of an upload. How many bytes there are now, as they were sent.
    fn append(&self, resumable: &mut Resumable, message: &WriteRequest) -> Result<i64, Status> {
        if !message.resource_name.is_empty() && message.resource_name != resumable.name() {
            return Err(Status::invalid_argument(format!(
                "resource name changed from {:?} to {:?}",
                resumable.name(),
                message.resource_name
            )));
        }
        let Some(upload) = resumable.get() else {
            return Err(Status::internal("upload is gone"));
        };
        if message.write_offset != size(upload.received()) {
            return Err(Status::invalid_argument(format!(
                "write offset {} of blob {}, of which {} bytes are here",
                message.write_offset,
                upload.digest(),
                upload.received()
            )));
        }
        match upload.append(&message.data) {
            Ok(()) => Ok(size(upload.received())),
            Err(error) => {
                let status = refused(upload.digest(), &error);
                // Bytes that are wrong already do not become right.
                drop(resumable.take());
                Err(status)
            }
        }
    }
}

/// What the API wants to hear of a blob that is there already: its size, or -1 where the client counts in compressed
/// bytes.
fn present(digest: &Digest, compressed: bool) -> i64 {
    if compressed { -1 } else { size(digest.size()) }
}

fn size(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

fn refused(digest: &Digest, error: &UploadError) -> Status {
    Status::invalid_argument(format!("blob {digest}: {error}"))
}
