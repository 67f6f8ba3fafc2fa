//! The control API on gRPC.

use std::{pin::Pin, time::Duration};

use futures::Stream;
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::{
    finding::Query,
    service::{Service, show},
    wait::Judge,
};
use crate::{
    proto::outhaul::v1::{self as pb, control_server::Control},
    record::Which,
};

/// Serves [`Service`] as `outhaul.v1.Control`.
#[derive(Clone)]
pub(crate) struct ControlServer {
    service: Service,
    /// Once the daemon ends, calls that wait are let go.
    ending: CancellationToken,
    /// Whether builds may still begin.
    may_come: bool,
}

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl ControlServer {
    /// Serves until the token is cancelled; calls that wait then end as unavailable.
    pub(crate) fn new(service: Service, ending: CancellationToken) -> Self {
        Self {
            service,
            ending,
            may_come: true,
        }
    }

    /// Of a process that no build reports to.
    pub(crate) fn alone(self) -> Self {
        Self {
            may_come: false,
            ..self
        }
    }
}

/// Messages of a stream that are packed into frames together.
const PACKED: usize = 256;

/// Outputs on their way that are named.
const PENDING: usize = 8;

/// Outputs that are found at a time unless asked otherwise, and at most.
const FOUND: u32 = 100;
const MOST_FOUND: u32 = 1000;

/// Paths of one request, and target patterns.
const PATHS: usize = 100_000;
const PATTERNS: usize = 10_000;

/// Refuses a request that asks for too much at once.
fn within<T>(what: &str, asked: &[T], most: usize) -> Result<(), Status> {
    if asked.len() <= most {
        return Ok(());
    }
    Err(Status::invalid_argument(format!(
        "{what}: the request has {}, which exceeds the limit of {most}",
        asked.len()
    )))
}

fn ended() -> Status {
    Status::unavailable("the daemon is shutting down")
}

#[tonic::async_trait]
impl Control for ControlServer {
    async fn list_invocations(
        &self,
        request: Request<pb::ListInvocationsRequest>,
    ) -> Result<Response<pb::ListInvocationsResponse>, Status> {
        let invocations = self.service.invocations(request.into_inner().limit).await;
        Ok(Response::new(pb::ListInvocationsResponse { invocations }))
    }

    async fn get_invocation(
        &self,
        request: Request<pb::GetInvocationRequest>,
    ) -> Result<Response<pb::GetInvocationResponse>, Status> {
        let id = request.into_inner().invocation_id;
        let (invocation, targets) = self
            .service
            .invocation(&id)
            .await
            .ok_or_else(|| Status::not_found(Which::of(&id).not_recorded()))?;
        let waiting = self.service.waiting(&invocation.invocation_id, PENDING).await;
        Ok(Response::new(pb::GetInvocationResponse {
            invocation: Some(invocation),
            targets,
            waiting: waiting.map(show::waiting),
        }))
    }

    type WatchInvocationStream = Streamed<pb::WatchInvocationResponse>;

    async fn watch_invocation(
        &self,
        request: Request<pb::WatchInvocationRequest>,
    ) -> Result<Response<Self::WatchInvocationStream>, Status> {
        let choice = request.into_inner().invocation.unwrap_or_default();
        let mut heard = self.service.watch(choice, self.may_come);
        let ending = self.ending.clone();
        // What waits here is sent in one frame: to some clients, very many small frames are an attack.
        let (answer, answers) = tokio::sync::mpsc::channel(PACKED);
        tokio::spawn(async move {
            loop {
                let next = tokio::select! {
                    next = heard.recv() => next,
                    () = ending.cancelled() => Some(Err(ended())),
                    () = answer.closed() => return,
                };
                let Some(next) = next else { return };
                let next = next.map(|news| pb::WatchInvocationResponse {
                    event: Some(news.into_event()),
                });
                let last = next.is_err();
                // A caller that takes nothing must not keep the daemon from ending.
                let sent = tokio::select! {
                    sent = answer.send(next) => sent.is_ok(),
                    () = ending.cancelled(), if !last => false,
                };
                if last || !sent {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn wait(&self, request: Request<pb::WaitRequest>) -> Result<Response<pb::WaitResponse>, Status> {
        let request = request.into_inner();
        within("targets", &request.targets, PATTERNS)?;
        let mut judge =
            Judge::new(&request.targets).map_err(|e| Status::invalid_argument(format!("targets: {e}")))?;
        let mut heard = self
            .service
            .watch(request.invocation.unwrap_or_default(), self.may_come);
        let timeout = async {
            match request.timeout_ms {
                0 => std::future::pending().await,
                ms => tokio::time::sleep(Duration::from_millis(ms)).await,
            }
        };
        tokio::pin!(timeout);
        loop {
            let next = tokio::select! {
                next = heard.recv() => next.unwrap_or_else(|| Err(ended())),
                () = &mut timeout => return Ok(Response::new(judge.timed_out())),
                () = self.ending.cancelled() => Err(ended()),
            };
            if let Some(answer) = judge.hear(&next?) {
                return Ok(Response::new(answer));
            }
        }
    }

    async fn cancel(
        &self,
        request: Request<pb::CancelRequest>,
    ) -> Result<Response<pb::CancelResponse>, Status> {
        let id = request.into_inner().invocation_id;
        let cancelled = self.service.cancel(&id).await?;
        Ok(Response::new(pb::CancelResponse { cancelled }))
    }

    async fn batch_stat(
        &self,
        request: Request<pb::BatchStatRequest>,
    ) -> Result<Response<pb::BatchStatResponse>, Status> {
        let request = request.into_inner();
        within("paths", &request.paths, PATHS)?;
        let outputs = self.service.stat(request.paths, &request.invocation_id).await?;
        Ok(Response::new(pb::BatchStatResponse { outputs }))
    }

    async fn stat_outputs(
        &self,
        request: Request<pb::OutputsRequest>,
    ) -> Result<Response<pb::OutputsResponse>, Status> {
        let paths = request.into_inner().paths;
        within("paths", &paths, PATHS)?;
        let outputs = self.service.stat(paths, "").await?;
        Ok(Response::new(pb::OutputsResponse { outputs }))
    }

    async fn why(&self, request: Request<pb::WhyRequest>) -> Result<Response<pb::WhyResponse>, Status> {
        let paths = request.into_inner().paths;
        within("paths", &paths, PATHS)?;
        let answers = self.service.why(paths).await;
        Ok(Response::new(pb::WhyResponse { answers }))
    }

    async fn materialize(
        &self,
        request: Request<pb::OutputsRequest>,
    ) -> Result<Response<pb::MaterializeResponse>, Status> {
        let pb::OutputsRequest { paths, progress_id } = request.into_inner();
        within("paths", &paths, PATHS)?;
        let call = self.service.counted_call(&progress_id);
        let results = self.service.materialize_counted(paths, &call.counted).await;
        Ok(Response::new(pb::MaterializeResponse { results }))
    }

    async fn get_progress(
        &self,
        request: Request<pb::GetProgressRequest>,
    ) -> Result<Response<pb::GetProgressResponse>, Status> {
        let name = request.into_inner().progress_id;
        let progress = self.service.progress(&name);
        let progress = progress.ok_or_else(|| Status::not_found(format!("no call {name:?} is under way")))?;
        Ok(Response::new(show::progress(progress)))
    }

    type ListOutputsStream = Streamed<pb::Output>;

    async fn list_outputs(
        &self,
        request: Request<pb::ListOutputsRequest>,
    ) -> Result<Response<Self::ListOutputsStream>, Status> {
        let request = request.into_inner();
        let outputs = self
            .service
            .outputs(&request.invocation_id, request.class())
            .await?;
        Ok(Response::new(Box::pin(ReceiverStream::new(outputs).map(Ok))))
    }

    async fn find_outputs(
        &self,
        request: Request<pb::FindOutputsRequest>,
    ) -> Result<Response<pb::FindOutputsResponse>, Status> {
        let request = request.into_inner();
        let missing = Which::of(&request.invocation_id).not_recorded();
        let most = match request.limit {
            0 => FOUND,
            limit => limit.min(MOST_FOUND),
        };
        let query = Query {
            invocation: request.invocation_id,
            text: request.text,
            most: most as usize,
            ..Query::default()
        };
        let page = self.service.find_outputs(query).await;
        let page = page.ok_or_else(|| Status::not_found(missing))?;
        Ok(Response::new(pb::FindOutputsResponse {
            outputs: page.outputs,
            more: page.next.is_some(),
        }))
    }

    async fn list_caches(
        &self,
        _request: Request<pb::ListCachesRequest>,
    ) -> Result<Response<pb::ListCachesResponse>, Status> {
        let caches = self.service.caches().into_iter().map(show::cache).collect();
        Ok(Response::new(pb::ListCachesResponse { caches }))
    }

    async fn report(
        &self,
        request: Request<pb::ReportRequest>,
    ) -> Result<Response<pb::ReportResponse>, Status> {
        let report = self.service.report(request.into_inner()).await?;
        Ok(Response::new(report))
    }

    async fn disk_usage(
        &self,
        request: Request<pb::DiskUsageRequest>,
    ) -> Result<Response<pb::DiskUsageResponse>, Status> {
        self.service
            .disk_usage(request.into_inner())
            .await
            .map(Response::new)
    }

    type EvictStream = Streamed<pb::EvictResponse>;

    async fn evict(&self, request: Request<pb::EvictRequest>) -> Result<Response<Self::EvictStream>, Status> {
        let removed = self.service.evict(request.into_inner());
        Ok(Response::new(Box::pin(ReceiverStream::new(removed))))
    }

    async fn pause(&self, request: Request<pb::PauseRequest>) -> Result<Response<pb::PauseResponse>, Status> {
        let pause = Some(self.service.pause(&request.into_inner()));
        Ok(Response::new(pb::PauseResponse { pause }))
    }

    async fn resume(
        &self,
        _request: Request<pb::ResumeRequest>,
    ) -> Result<Response<pb::ResumeResponse>, Status> {
        let ended = self.service.resume();
        Ok(Response::new(pb::ResumeResponse { ended }))
    }

    async fn get_pause(
        &self,
        _request: Request<pb::GetPauseRequest>,
    ) -> Result<Response<pb::GetPauseResponse>, Status> {
        let pause = self.service.paused();
        Ok(Response::new(pb::GetPauseResponse { pause }))
    }

    async fn stage(&self, request: Request<pb::StageRequest>) -> Result<Response<pb::StageResponse>, Status> {
        self.service.stage(request.into_inner()).await.map(Response::new)
    }

    async fn is_staged(
        &self,
        request: Request<pb::IsStagedRequest>,
    ) -> Result<Response<pb::IsStagedResponse>, Status> {
        self.service
            .is_staged(request.into_inner())
            .await
            .map(Response::new)
    }
}
