//! The control API on gRPC.

use std::pin::Pin;

use futures::Stream;
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::{Request, Response, Status};

use super::service::Service;
use crate::proto::outhaul::v1::{self as pb, control_server::Control};

/// Serves [`Service`] as `outhaul.v1.Control`.
pub struct ControlServer(pub Service);

#[tonic::async_trait]
impl Control for ControlServer {
    async fn list_invocations(
        &self,
        request: Request<pb::ListInvocationsRequest>,
    ) -> Result<Response<pb::ListInvocationsResponse>, Status> {
        let invocations = self.0.invocations(request.into_inner().limit).await;
        Ok(Response::new(pb::ListInvocationsResponse { invocations }))
    }

    async fn get_invocation(
        &self,
        request: Request<pb::GetInvocationRequest>,
    ) -> Result<Response<pb::GetInvocationResponse>, Status> {
        let id = request.into_inner().invocation_id;
        let (invocation, targets) = self
            .0
            .invocation(&id)
            .await
            .ok_or_else(|| Status::not_found(format!("no invocation {id:?} is recorded")))?;
        Ok(Response::new(pb::GetInvocationResponse {
            invocation: Some(invocation),
            targets,
        }))
    }

    async fn stat_outputs(
        &self,
        request: Request<pb::OutputsRequest>,
    ) -> Result<Response<pb::OutputsResponse>, Status> {
        let outputs = self.0.stat(request.into_inner().paths).await;
        Ok(Response::new(pb::OutputsResponse { outputs }))
    }

    async fn materialize(
        &self,
        request: Request<pb::OutputsRequest>,
    ) -> Result<Response<pb::MaterializeResponse>, Status> {
        let results = self.0.materialize(request.into_inner().paths).await;
        Ok(Response::new(pb::MaterializeResponse { results }))
    }

    type ListOutputsStream = Pin<Box<dyn Stream<Item = Result<pb::Output, Status>> + Send>>;

    async fn list_outputs(
        &self,
        request: Request<pb::ListOutputsRequest>,
    ) -> Result<Response<Self::ListOutputsStream>, Status> {
        let request = request.into_inner();
        let outputs = self
            .0
            .outputs(&request.invocation_id, &request.class)
            .await
            .map_err(Status::not_found)?;
        Ok(Response::new(Box::pin(ReceiverStream::new(outputs).map(Ok))))
    }

    async fn stage(&self, request: Request<pb::StageRequest>) -> Result<Response<pb::StageResponse>, Status> {
        self.0.stage(request.into_inner()).await.map(Response::new)
    }

    async fn is_staged(
        &self,
        request: Request<pb::IsStagedRequest>,
    ) -> Result<Response<pb::IsStagedResponse>, Status> {
        super::staging::is_staged(request.into_inner())
            .await
            .map(Response::new)
    }
}
