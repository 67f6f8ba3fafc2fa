//! What connections send to a stream's task.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tonic::{Status, metadata::MetadataMap};

use super::budget::Reserved;
use crate::{
    journal::received::Received, proto::google::devtools::build::v1::PublishBuildToolEventStreamResponse,
};

/// What connections send to a stream. A connection attaches, sends its events, and goes.
pub(super) enum Command {
    Attach(Connection),
    Event(Incoming),
    Gone(u64, Departure),
    /// Answered as soon as the stream has taken up what the journal has of it.
    Opened(oneshot::Sender<()>),
    /// Asks whether a client's first event, with number 1, is another one than this stream began with: then it belongs to a
    /// new attempt under the same ids.
    Begins(Bytes, oneshot::Sender<bool>),
}

/// The way back to a client.
pub(super) struct Connection {
    pub(super) id: u64,
    pub(super) acks: mpsc::UnboundedSender<Result<PublishBuildToolEventStreamResponse, Status>>,
    /// Tells the reader that the stream is done with it.
    pub(super) released: CancellationToken,
    /// The connection's budget of bytes.
    pub(super) room: Arc<Semaphore>,
    /// What the client said in its headers.
    pub(super) headers: MetadataMap,
}

/// An event as it was received.
pub(super) struct Incoming {
    pub(super) connection: u64,
    pub(super) received_ms: u64,
    pub(super) event: Received,
    pub(super) room: Option<Reserved>,
}

/// How a connection's sending side ended.
#[derive(Debug)]
pub(super) enum Departure {
    /// The client has nothing more to send, and may wait for acknowledgements.
    HalfClosed,
    /// The client wants no more of it.
    Cancelled(String),
    /// The connection broke; the client may come back.
    Lost(String),
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Its reader goes as well, even if the stream's task ends with the connection in its queue.
        self.released.cancel();
    }
}
