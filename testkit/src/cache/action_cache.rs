//! `ActionCache`: results by action digest, served as they were put in.

use bazel_remote_apis::build::bazel::remote::execution::v2::{
    ActionResult, GetActionResultRequest, UpdateActionResultRequest, action_cache_server::ActionCache,
};
use tonic::{Request, Response, Status};

use super::{
    context::Shared,
    stats::{Rpc, add},
};

/// The service.
pub(super) struct ActionCacheService(pub(super) Shared);

#[tonic::async_trait]
impl ActionCache for ActionCacheService {
    async fn get_action_result(
        &self,
        request: Request<GetActionResultRequest>,
    ) -> Result<Response<ActionResult>, Status> {
        self.0.enter(Rpc::GetAction, &request).await?;
        let request = request.into_inner();
        self.0.check_instance(&request.instance_name)?;
        let action = self
            .0
            .digest(request.action_digest.as_ref(), request.digest_function)?;
        let Some(result) = self.0.store.action(&action) else {
            return Err(Status::not_found(format!("no result of action {action}")));
        };
        add(&self.0.counters.action_hits, 1);
        Ok(Response::new(result))
    }

    async fn update_action_result(
        &self,
        request: Request<UpdateActionResultRequest>,
    ) -> Result<Response<ActionResult>, Status> {
        self.0.enter(Rpc::UpdateAction, &request).await?;
        let request = request.into_inner();
        self.0.check_instance(&request.instance_name)?;
        let action = self
            .0
            .digest(request.action_digest.as_ref(), request.digest_function)?;
        let Some(result) = request.action_result else {
            return Err(Status::invalid_argument("action result is missing"));
        };
        self.0.store.put_action(action, result.clone());
        Ok(Response::new(result))
    }
}
