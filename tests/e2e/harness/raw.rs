//! gRPC with messages as bytes: what nobody has decoded, nobody has changed.

use bytes::{Buf as _, BufMut as _, Bytes};
use outhaul::proto::google::devtools::build::v1::PublishBuildToolEventStreamResponse;
use prost::Message as _;
use tokio::runtime::Runtime;
use tonic::{
    Request, Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::{Channel, Endpoint},
};

/// A codec that leaves messages as they are.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(message);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}

/// A build tool that sends what it is given.
pub(crate) struct RawClient {
    runtime: Runtime,
    channel: Channel,
}

impl RawClient {
    /// Connects to where a `--bes_backend` flag points.
    pub(crate) fn connect(flag: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let address = flag.trim_start_matches("--bes_backend=grpc://");
        let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
        let channel = runtime.block_on(endpoint.connect()).unwrap();
        Self { runtime, channel }
    }

    /// Opens a stream of events with these requests, half-closes, and gives the numbers that were acknowledged.
    pub(crate) fn send(&self, requests: Vec<Bytes>) -> Vec<i64> {
        const PATH: &str = "/google.devtools.build.v1.PublishBuildEvent/PublishBuildToolEventStream";
        self.runtime.block_on(async {
            let mut client = tonic::client::Grpc::new(self.channel.clone());
            client.ready().await.unwrap();
            let requests = Request::new(tokio_stream::iter(requests));
            let path = http::uri::PathAndQuery::from_static(PATH);
            let mut acks = client.streaming(requests, path, Raw).await.unwrap().into_inner();
            let mut numbers = Vec::new();
            while let Some(ack) = acks.message().await.unwrap() {
                let ack = PublishBuildToolEventStreamResponse::decode(ack).unwrap();
                numbers.push(ack.sequence_number);
            }
            numbers
        })
    }
}
