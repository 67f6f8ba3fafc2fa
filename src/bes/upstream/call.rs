//! One call of the stream RPC.

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use http::uri::PathAndQuery;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    CancellationHandle, Request, Status, Streaming, client::Grpc, metadata::MetadataMap, transport::Channel,
};

use crate::{bes::raw::RawCodec, proto::google::devtools::build::v1::PublishBuildToolEventStreamResponse};

const STREAM: PathAndQuery =
    PathAndQuery::from_static("/google.devtools.build.v1.PublishBuildEvent/PublishBuildToolEventStream");

/// Requests between us and the connection. They are in the window as well: this bounds nothing but their number.
const SENDING: usize = 64;

/// What upstream answers.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It acknowledges the event of this number.
    Ack(i64),
    /// It is done, with OK.
    Closed,
}

/// An open call. Dropped, it is cancelled, which does nothing to one that both sides have closed.
pub(super) struct Call {
    requests: Option<mpsc::Sender<Bytes>>,
    answers: Answers,
    /// `None` once it is cancelled.
    cancel: Option<CancellationHandle>,
}

enum Answers {
    /// Many services begin to answer with their first acknowledgement.
    Awaited(BoxFuture<'static, Result<Streaming<PublishBuildToolEventStreamResponse>, Status>>),
    Coming(Box<Streaming<PublishBuildToolEventStreamResponse>>),
}

impl Call {
    /// Opens a call. Failures to connect are in its first answer.
    pub(super) fn open(channel: Channel, headers: MetadataMap) -> Self {
        let (requests, outbound) = mpsc::channel(SENDING);
        let mut request = Request::new(ReceiverStream::new(outbound));
        *request.metadata_mut() = headers;
        let cancel = request.cancellation_handle();
        let opening = async move {
            let mut client = Grpc::new(channel).max_encoding_message_size(usize::MAX);
            client
                .ready()
                .await
                .map_err(|e| Status::unavailable(crate::printable::with_causes(&e)))?;
            let answer = client.streaming(request, STREAM, RawCodec::default()).await?;
            Ok(answer.into_inner())
        };
        Self {
            requests: Some(requests),
            answers: Answers::Awaited(opening.boxed()),
            cancel: Some(cancel),
        }
    }

    /// Sends a request, if the connection takes one now.
    pub(super) fn try_send(&self, request: &Bytes) -> bool {
        let permit = self.requests.as_ref().and_then(|r| r.try_reserve().ok());
        permit.map(|permit| permit.send(request.clone())).is_some()
    }

    /// Whether something may still be sent.
    pub(super) fn is_sending(&self) -> bool {
        self.requests.as_ref().is_some_and(|r| !r.is_closed())
    }

    /// Says that nothing more will be sent.
    pub(super) fn half_close(&mut self) {
        self.requests = None;
    }

    pub(super) const fn is_half_closed(&self) -> bool {
        self.requests.is_none()
    }

    /// Waits until something can be sent (`None`), if that is wanted, or for the next answer. Cancel-safe.
    pub(super) async fn ready_or_answer(&mut self, sends: bool) -> Option<Result<Answer, Status>> {
        let Self {
            requests, answers, ..
        } = self;
        let ready = async {
            match requests.as_ref().filter(|_| sends) {
                // If the connection takes nothing any more, an answer says why.
                Some(requests) if requests.reserve().await.is_ok() => {}
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = ready => None,
            answer = answers.next() => Some(answer),
        }
    }

    /// The next answer, if it is there already.
    pub(super) fn answer_now(&mut self) -> Option<Result<Answer, Status>> {
        self.answers.next().now_or_never()
    }
}

impl Answers {
    async fn next(&mut self) -> Result<Answer, Status> {
        loop {
            match self {
                Self::Awaited(opening) => *self = Self::Coming(Box::new(opening.await?)),
                Self::Coming(answers) => {
                    let ack = answers.message().await?;
                    return Ok(ack.map_or(Answer::Closed, |ack| Answer::Ack(ack.sequence_number)));
                }
            }
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        // Without this, dropping the requests' sender would say that all is sent.
        if let Some(cancel) = self.cancel.take() {
            cancel.cancel();
        }
    }
}
