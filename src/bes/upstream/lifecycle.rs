//! A build's lifecycle calls: one by one, before and after its streams.

use std::sync::Arc;

use bytes::Bytes;
use http::uri::PathAndQuery;
use tonic::{Code, Request, Status, client::Grpc, transport::Channel};

use super::{
    backoff, headers,
    order::{LifecycleEvent, Waiting},
    shared::Inner,
};
use crate::bes::raw::RawCodec;

const LIFECYCLE: PathAndQuery =
    PathAndQuery::from_static("/google.devtools.build.v1.PublishBuildEvent/PublishLifecycleEvent");

/// Makes one build's calls while there are any.
pub(super) struct Caller {
    upstream: Arc<Inner>,
    build_id: String,
    channel: Channel,
    /// Whether the log says that upstream takes no such calls.
    reported: bool,
}

impl Caller {
    pub(super) fn new(upstream: Arc<Inner>, build_id: &str) -> Self {
        Self {
            channel: upstream.credentials().open(),
            upstream,
            build_id: build_id.to_owned(),
            reported: false,
        }
    }

    pub(super) async fn run(mut self) {
        while let Some(waiting) = self.upstream.calls.next(&self.build_id) {
            let Waiting { event, mut streams } = waiting;
            for stream in &mut streams {
                // An error: its forwarder is gone, and there is nothing to wait for.
                let _ = stream.wait_for(|status| status.finished).await;
            }
            self.deliver(&event).await;
            if event.opening {
                self.upstream.calls.opened(&self.build_id);
            }
        }
    }

    /// Tries until upstream has it. What cannot get better is given up: a service that does not take these calls is no
    /// reason to keep the streams from it.
    async fn deliver(&mut self, event: &LifecycleEvent) {
        let upstream = Arc::clone(&self.upstream);
        let mut failures = 0_u32;
        loop {
            let status = match self.call(event).await {
                Ok(()) => return upstream.health.works(),
                Err(status) => status,
            };
            let code = status.code();
            if backoff::is_final(code) {
                let (build_id, message) = (&self.build_id, status.message());
                if !std::mem::replace(&mut self.reported, true) {
                    tracing::info!(
                        build_id,
                        ?code,
                        message,
                        "upstream does not accept lifecycle events"
                    );
                }
                return;
            }
            let wait = upstream.delays.after(failures, code, rand::random());
            upstream.health.failed(&self.build_id, &status, wait);
            failures = failures.saturating_add(1);
            tokio::time::sleep(wait).await;
        }
    }

    async fn call(&self, event: &LifecycleEvent) -> Result<(), Status> {
        let options = &self.upstream.options;
        let mut request = Request::new(event.request.clone());
        *request.metadata_mut() = self.upstream.credentials().headers(&event.headers).await?;
        let secrets = headers::secrets(
            request.metadata(),
            self.upstream.options.connect.authority.as_ref(),
        );
        let mut client = Grpc::new(self.channel.clone()).max_encoding_message_size(usize::MAX);
        let call = async {
            client
                .ready()
                .await
                .map_err(|e| Status::unavailable(crate::printable::with_causes(&e)))?;
            client
                .unary(request, LIFECYCLE, RawCodec::<Bytes, ()>::default())
                .await
        };
        match tokio::time::timeout(options.call_timeout, call).await {
            Ok(answer) => answer
                .map(drop)
                .map_err(|status| Status::new(status.code(), secrets.conceal(status.message().to_owned()))),
            Err(_) => Err(Status::new(
                Code::DeadlineExceeded,
                "timed out waiting for an answer to a lifecycle event",
            )),
        }
    }
}
