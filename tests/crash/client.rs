//! A build tool that remembers what was acknowledged to it, and comes back with the rest, as Bazel does.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, SystemTime},
};

use outhaul::proto::google::devtools::build::v1::{
    BuildEvent, OrderedBuildEvent, PublishBuildToolEventStreamRequest, StreamId,
    build_event::{BuildComponentStreamFinished, Event, build_component_stream_finished::FinishType},
    publish_build_event_client::PublishBuildEventClient,
    stream_id::BuildComponent,
};
use prost_types::Any;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::build::Build;

/// One stream of events.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    pub(crate) build: Arc<Build>,
    /// The highest number acknowledged.
    acked: Arc<AtomicI64>,
}

impl Client {
    pub(crate) fn new(build: Build) -> Self {
        Self {
            build: Arc::new(build),
            acked: Arc::default(),
        }
    }

    pub(crate) fn acked(&self) -> i64 {
        self.acked.load(Ordering::SeqCst)
    }

    /// Messages in all, the last of which is not an event.
    pub(crate) fn messages(&self) -> i64 {
        self.build.events.len() as i64 + 1
    }

    pub(crate) fn is_done(&self) -> bool {
        self.acked() == self.messages()
    }

    /// Sends what was not acknowledged yet, with a pause here and there, and waits for the acknowledgements.
    pub(crate) async fn send(&self, address: &str, pause: Duration) -> Result<(), String> {
        let mut client = PublishBuildEventClient::new(connect(address).await?);
        let (sender, receiver) = tokio::sync::mpsc::channel(64);
        let this = self.clone();
        let first = self.acked() + 1;
        let sending = tokio::spawn(async move {
            for number in first..=this.messages() {
                if number % 8 == 0 && !pause.is_zero() {
                    tokio::time::sleep(pause).await;
                }
                if sender.send(this.request(number)).await.is_err() {
                    return;
                }
            }
        });
        let result = async {
            let mut answers = client
                .publish_build_tool_event_stream(ReceiverStream::new(receiver))
                .await
                .map_err(|e| e.to_string())?
                .into_inner();
            while let Some(answer) = answers.message().await.map_err(|e| e.to_string())? {
                let before = self.acked.swap(answer.sequence_number, Ordering::SeqCst);
                if answer.sequence_number != before + 1 {
                    return Err(format!("{} acknowledged after {before}", answer.sequence_number));
                }
            }
            Ok(())
        }
        .await;
        sending.abort();
        result?;
        if self.is_done() {
            Ok(())
        } else {
            Err(format!("closed after {} of {}", self.acked(), self.messages()))
        }
    }

    fn request(&self, number: i64) -> PublishBuildToolEventStreamRequest {
        let event = match self.build.events.get(number as usize - 1) {
            Some(value) => Event::BazelEvent(Any {
                type_url: "type.googleapis.com/build_event_stream.BuildEvent".to_owned(),
                value: value.clone(),
            }),
            None => Event::ComponentStreamFinished(BuildComponentStreamFinished {
                r#type: FinishType::Finished.into(),
            }),
        };
        PublishBuildToolEventStreamRequest {
            ordered_build_event: Some(OrderedBuildEvent {
                stream_id: Some(StreamId {
                    build_id: self.build.build_id.clone(),
                    component: BuildComponent::Tool.into(),
                    invocation_id: self.build.invocation_id.clone(),
                }),
                sequence_number: number,
                event: Some(BuildEvent {
                    event_time: Some(SystemTime::now().into()),
                    event: Some(event),
                }),
            }),
            ..PublishBuildToolEventStreamRequest::default()
        }
    }
}

async fn connect(address: &str) -> Result<Channel, String> {
    let uri: Uri = address
        .replacen("grpc://", "http://", 1)
        .parse()
        .map_err(|e| format!("{address}: {e}"))?;
    Endpoint::from(uri)
        .connect()
        .await
        .map_err(|e| format!("{address}: {e}"))
}
