//! Sends a build's events to a Build Event Service the way Bazel does
//! (Bazel's `BuildEventServiceUploader` and `BuildEventServiceProtoUtil`).

use std::time::{Duration, Instant, SystemTime};

use prost_types::Any;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

use crate::proto::google::devtools::build::v1::{
    BuildEvent, BuildStatus, OrderedBuildEvent, PublishBuildToolEventStreamRequest,
    PublishLifecycleEventRequest, StreamId,
    build_event::{
        BuildComponentStreamFinished, BuildEnqueued, BuildFinished, Event, InvocationAttemptFinished,
        InvocationAttemptStarted, build_component_stream_finished::FinishType,
    },
    build_status::Result as BuildResult,
    publish_build_event_client::PublishBuildEventClient,
    publish_lifecycle_event_request::ServiceLevel,
    stream_id::BuildComponent,
};

/// Type of the packed events.
const TYPE_URL: &str = "type.googleapis.com/build_event_stream.BuildEvent";

/// Messages on their way to the connection. Bazel has no limit; here, memory counts.
const IN_FLIGHT: usize = 256;

/// Bazel's deadline for each lifecycle call.
const LIFECYCLE_DEADLINE: Duration = Duration::from_secs(15);

/// How a stream went. Times count from the stream's opening, after the first lifecycle calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlayReport {
    /// Messages sent, all acknowledged: the events and the one that ends the stream.
    pub messages: u64,
    /// Until everything was sent.
    pub sent_after: Duration,
    /// Until the last acknowledgement: as long as Bazel's command would have waited.
    pub acknowledged_after: Duration,
}

/// Why a stream failed, where Bazel's would have failed as well.
#[derive(Debug, thiserror::Error)]
pub enum PlayError {
    /// No address of a server.
    #[error("{0:?} is not an endpoint; write grpc://HOST:PORT or unix:/PATH")]
    Endpoint(String),
    /// No server answers there.
    #[error("connecting to {endpoint}: {source}")]
    Connect {
        /// The endpoint as given.
        endpoint: String,
        /// The transport's words.
        source: tonic::transport::Error,
    },
    /// A call failed.
    #[error("{call}: {status}")]
    Call {
        /// Name of the failed call.
        call: &'static str,
        /// The server's answer.
        status: Box<Status>,
    },
    /// An acknowledgement is not the next one.
    #[error("acknowledgement of message {actual} where {expected} was due")]
    OutOfOrder {
        /// The number due.
        expected: i64,
        /// The number that came.
        actual: i64,
    },
    /// The server closed the stream before acknowledging everything.
    #[error("stream closed with {acknowledged} of {sent} messages acknowledged")]
    Unacknowledged {
        /// Messages acknowledged.
        acknowledged: i64,
        /// Messages sent.
        sent: i64,
    },
}

fn call(call: &'static str) -> impl FnOnce(Status) -> PlayError {
    move |status| PlayError::Call {
        call,
        status: Box::new(status),
    }
}

/// Sends the events and waits for every acknowledgement, however long the server holds them.
///
/// `endpoint` is `grpc://HOST:PORT`, `HOST:PORT` or `unix:/PATH`.
///
/// # Errors
/// When the server cannot be reached, fails a call, or acknowledges other than in order and in full.
pub async fn play(
    endpoint: &str,
    invocation_id: &str,
    build_id: &str,
    events: impl Iterator<Item = Vec<u8>> + Send,
) -> Result<PlayReport, PlayError> {
    let mut client = PublishBuildEventClient::new(connect(endpoint).await?);
    let stream_id = |component: BuildComponent, invocation_id: &str| StreamId {
        build_id: build_id.to_owned(),
        component: component.into(),
        invocation_id: invocation_id.to_owned(),
    };
    // The build has a lifecycle of its own, in which there is no invocation yet.
    let build = stream_id(BuildComponent::Controller, "");
    let invocation = stream_id(BuildComponent::Controller, invocation_id);

    lifecycle(
        &mut client,
        &build,
        1,
        Event::BuildEnqueued(BuildEnqueued::default()),
    )
    .await?;
    let attempt = InvocationAttemptStarted {
        attempt_number: 1,
        ..Default::default()
    };
    lifecycle(
        &mut client,
        &invocation,
        1,
        Event::InvocationAttemptStarted(attempt),
    )
    .await?;

    let tool = stream_id(BuildComponent::Tool, invocation_id);
    let report = stream(&mut client, &tool, events).await?;

    let status = BuildStatus {
        result: BuildResult::CommandSucceeded.into(),
        final_invocation_id: invocation_id.to_owned(),
        ..Default::default()
    };
    let finished = InvocationAttemptFinished {
        invocation_status: Some(status.clone()),
        ..Default::default()
    };
    lifecycle(
        &mut client,
        &invocation,
        2,
        Event::InvocationAttemptFinished(finished),
    )
    .await?;
    let finished = BuildFinished {
        status: Some(status),
        ..Default::default()
    };
    lifecycle(&mut client, &build, 2, Event::BuildFinished(finished)).await?;
    Ok(report)
}

async fn connect(endpoint: &str) -> Result<Channel, PlayError> {
    let uri = match endpoint.strip_prefix("grpc://") {
        Some(authority) => format!("http://{authority}"),
        None if endpoint.starts_with("unix:") || endpoint.starts_with("http://") => endpoint.to_owned(),
        None if !endpoint.contains("://") => format!("http://{endpoint}"),
        None => return Err(PlayError::Endpoint(endpoint.to_owned())),
    };
    Endpoint::from_shared(uri)
        .map_err(|_| PlayError::Endpoint(endpoint.to_owned()))?
        .connect()
        .await
        .map_err(|source| PlayError::Connect {
            endpoint: endpoint.to_owned(),
            source,
        })
}

fn ordered(stream_id: &StreamId, sequence_number: i64, event: Event) -> OrderedBuildEvent {
    OrderedBuildEvent {
        stream_id: Some(stream_id.clone()),
        sequence_number,
        event: Some(BuildEvent {
            event_time: Some(SystemTime::now().into()),
            event: Some(event),
        }),
    }
}

async fn lifecycle(
    client: &mut PublishBuildEventClient<Channel>,
    stream_id: &StreamId,
    sequence_number: i64,
    event: Event,
) -> Result<(), PlayError> {
    let mut request = tonic::Request::new(PublishLifecycleEventRequest {
        service_level: ServiceLevel::Interactive.into(),
        build_event: Some(ordered(stream_id, sequence_number, event)),
        ..Default::default()
    });
    request.set_timeout(LIFECYCLE_DEADLINE);
    client
        .publish_lifecycle_event(request)
        .await
        .map_err(call("publishing a lifecycle event"))?;
    Ok(())
}

/// The stream itself: sending and the acknowledgements go on side by side.
async fn stream(
    client: &mut PublishBuildEventClient<Channel>,
    stream_id: &StreamId,
    events: impl Iterator<Item = Vec<u8>> + Send,
) -> Result<PlayReport, PlayError> {
    let opened = Instant::now();
    let (sender, receiver) = mpsc::channel(IN_FLIGHT);
    let finished = Event::ComponentStreamFinished(BuildComponentStreamFinished {
        r#type: FinishType::Finished.into(),
    });
    let sending = async move {
        let packed = events.map(|value| {
            Event::BazelEvent(Any {
                type_url: TYPE_URL.to_owned(),
                value,
            })
        });
        let mut sent = 0;
        for event in packed.chain([finished]) {
            let number = sent + 1;
            let keywords = if number == 1 {
                vec!["protocol_name=BEP".to_owned(), "command_name=build".to_owned()]
            } else {
                Vec::new()
            };
            let request = PublishBuildToolEventStreamRequest {
                ordered_build_event: Some(ordered(stream_id, number, event)),
                notification_keywords: keywords,
                ..Default::default()
            };
            if sender.send(request).await.is_err() {
                // The call is over; its own result says why.
                break;
            }
            sent = number;
        }
        // Dropping the sender closes our half of the stream.
        (sent, opened.elapsed())
    };
    let receiving = async {
        let mut acknowledgements = client
            .publish_build_tool_event_stream(ReceiverStream::new(receiver))
            .await
            .map_err(call("opening the event stream"))?
            .into_inner();
        let (mut acknowledged, mut last) = (0, Duration::ZERO);
        while let Some(answer) = acknowledgements
            .message()
            .await
            .map_err(call("sending the event stream"))?
        {
            if answer.sequence_number != acknowledged + 1 {
                return Err(PlayError::OutOfOrder {
                    expected: acknowledged + 1,
                    actual: answer.sequence_number,
                });
            }
            acknowledged += 1;
            last = opened.elapsed();
        }
        Ok((acknowledged, last))
    };
    let ((sent, sent_after), received) = tokio::join!(sending, receiving);
    let (acknowledged, acknowledged_after) = received?;
    if acknowledged != sent {
        return Err(PlayError::Unacknowledged { acknowledged, sent });
    }
    Ok(PlayReport {
        messages: u64::try_from(sent).unwrap_or_default(),
        sent_after,
        acknowledged_after,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use futures::stream::{BoxStream, StreamExt as _};
    use tokio::net::{TcpListener, UnixListener};
    use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
    use tonic::{Request, Response, Streaming, transport::Server};

    use super::*;
    use crate::proto::google::devtools::build::v1::{
        PublishBuildToolEventStreamResponse,
        publish_build_event_server::{PublishBuildEvent, PublishBuildEventServer},
    };

    /// Acknowledges the n-th message with the n-th number made by a function, as long as that makes one.
    #[derive(Clone)]
    struct Acknowledging {
        acknowledge: fn(i64) -> Option<i64>,
        /// Closes the stream after that many.
        limit: usize,
        seen: Arc<Mutex<Vec<OrderedBuildEvent>>>,
    }

    #[tonic::async_trait]
    impl PublishBuildEvent for Acknowledging {
        async fn publish_lifecycle_event(
            &self,
            request: Request<PublishLifecycleEventRequest>,
        ) -> Result<Response<()>, Status> {
            self.seen
                .lock()
                .unwrap()
                .push(request.into_inner().build_event.unwrap());
            Ok(Response::new(()))
        }

        type PublishBuildToolEventStreamStream =
            BoxStream<'static, Result<PublishBuildToolEventStreamResponse, Status>>;

        async fn publish_build_tool_event_stream(
            &self,
            request: Request<Streaming<PublishBuildToolEventStreamRequest>>,
        ) -> Result<Response<Self::PublishBuildToolEventStreamStream>, Status> {
            let this = self.clone();
            let limit = self.limit;
            let answers = request.into_inner().filter_map(move |message| {
                let event = message.unwrap().ordered_build_event.unwrap();
                let number = (this.acknowledge)(event.sequence_number);
                this.seen.lock().unwrap().push(event);
                std::future::ready(number.map(|sequence_number| {
                    Ok(PublishBuildToolEventStreamResponse {
                        sequence_number,
                        ..Default::default()
                    })
                }))
            });
            Ok(Response::new(answers.take(limit).boxed()))
        }
    }

    fn server(acknowledge: fn(i64) -> Option<i64>) -> Acknowledging {
        Acknowledging {
            acknowledge,
            limit: usize::MAX,
            seen: Arc::default(),
        }
    }

    async fn listen(server: &Acknowledging) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("grpc://{}", listener.local_addr().unwrap());
        let router = Server::builder().add_service(PublishBuildEventServer::new(server.clone()));
        tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
        endpoint
    }

    fn events() -> impl Iterator<Item = Vec<u8>> + Send {
        (0..1000_u32).map(|n| n.to_le_bytes().to_vec())
    }

    #[tokio::test]
    async fn the_server_sees_what_bazel_would_send() {
        let server = server(Some);
        let endpoint = listen(&server).await;
        let report = play(&endpoint, "invocation", "build", events()).await.unwrap();
        assert_eq!(report.messages, 1001);
        assert!(report.sent_after <= report.acknowledged_after);
        let seen = server.seen.lock().unwrap();
        assert_eq!(seen.len(), 1005);
        let kind = |index: usize| seen[index].event.as_ref().unwrap().event.as_ref().unwrap();
        assert!(matches!(kind(0), Event::BuildEnqueued(_)));
        assert!(matches!(kind(1), Event::InvocationAttemptStarted(_)));
        for (index, value) in events().enumerate() {
            let event = &seen[index + 2];
            assert_eq!(event.sequence_number, index as i64 + 1);
            let id = event.stream_id.as_ref().unwrap();
            assert_eq!(
                (id.invocation_id.as_str(), id.build_id.as_str()),
                ("invocation", "build")
            );
            assert_eq!(id.component(), BuildComponent::Tool);
            let Event::BazelEvent(any) = kind(index + 2) else {
                panic!("{event:?}");
            };
            assert_eq!((any.type_url.as_str(), &any.value), (TYPE_URL, &value));
        }
        assert!(matches!(kind(1002), Event::ComponentStreamFinished(_)));
        assert!(matches!(kind(1003), Event::InvocationAttemptFinished(_)));
        assert!(matches!(kind(1004), Event::BuildFinished(_)));
    }

    #[tokio::test]
    async fn unix_sockets_are_played_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bes.sock");
        let router = Server::builder().add_service(PublishBuildEventServer::new(server(Some)));
        let incoming = UnixListenerStream::new(UnixListener::bind(&path).unwrap());
        tokio::spawn(router.serve_with_incoming(incoming));
        let endpoint = format!("unix:{}", path.display());
        assert_eq!(play(&endpoint, "i", "b", events()).await.unwrap().messages, 1001);
    }

    #[tokio::test]
    async fn acknowledgements_out_of_order_or_missing_fail_the_stream() {
        let skipping = listen(&server(|n| Some(if n < 500 { n } else { n + 1 }))).await;
        let error = play(&skipping, "i", "b", events()).await.unwrap_err();
        assert!(
            matches!(
                error,
                PlayError::OutOfOrder {
                    expected: 500,
                    actual: 501
                }
            ),
            "{error}"
        );
        let forgetful = listen(&server(|n| (n < 1001).then_some(n))).await;
        let error = play(&forgetful, "i", "b", events()).await.unwrap_err();
        assert!(
            matches!(
                error,
                PlayError::Unacknowledged {
                    acknowledged: 1000,
                    sent: 1001
                }
            ),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_server_that_closes_early_ends_the_playing() {
        let server = Acknowledging {
            limit: 10,
            ..server(Some)
        };
        let endpoint = listen(&server).await;
        let endless = std::iter::repeat_n(vec![7; 1000], 1_000_000_000);
        let played = play(&endpoint, "i", "b", endless);
        let error = tokio::time::timeout(Duration::from_secs(10), played)
            .await
            .unwrap()
            .unwrap_err();
        assert!(
            matches!(error, PlayError::Unacknowledged { acknowledged: 10, .. }),
            "{error}"
        );
    }

    #[tokio::test]
    async fn bad_endpoints_are_named() {
        for endpoint in ["ftp://x", "grpc://", "unix:/nowhere/at/all.sock"] {
            let error = play(endpoint, "i", "b", events()).await.unwrap_err().to_string();
            assert!(error.contains(endpoint), "{error}");
        }
    }
}
