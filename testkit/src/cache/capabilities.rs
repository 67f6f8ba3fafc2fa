//! `Capabilities`: what the cache says of itself.

use bazel_remote_apis::build::bazel::{
    remote::execution::v2::{
        ActionCacheUpdateCapabilities, CacheCapabilities, GetCapabilitiesRequest, ServerCapabilities,
        capabilities_server::Capabilities, compressor, symlink_absolute_path_strategy,
    },
    semver::SemVer,
};
use tonic::{Request, Response, Status};

use super::{context::Shared, stats::Rpc};

/// The service.
pub(super) struct CapabilitiesService(pub(super) Shared);

const fn version(minor: i32) -> Option<SemVer> {
    Some(SemVer {
        major: 2,
        minor,
        patch: 0,
        prerelease: String::new(),
    })
}

#[tonic::async_trait]
impl Capabilities for CapabilitiesService {
    async fn get_capabilities(
        &self,
        request: Request<GetCapabilitiesRequest>,
    ) -> Result<Response<ServerCapabilities>, Status> {
        self.0.enter(Rpc::Capabilities, &request).await?;
        self.0.check_instance(&request.get_ref().instance_name)?;
        let pretence = self.0.faults.pretence();
        let compressors: Vec<i32> = pretence
            .zstd
            .unwrap_or(self.0.zstd)
            .then_some(compressor::Value::Zstd.into())
            .into_iter()
            .collect();
        let cache = CacheCapabilities {
            digest_functions: pretence
                .digest_functions
                .unwrap_or_else(|| self.0.functions.iter().map(|f| f.wire()).collect()),
            action_cache_update_capabilities: Some(ActionCacheUpdateCapabilities { update_enabled: true }),
            max_batch_total_size_bytes: pretence
                .max_batch_bytes
                .unwrap_or_else(|| i64::try_from(self.0.max_batch_bytes).unwrap_or(i64::MAX)),
            symlink_absolute_path_strategy: symlink_absolute_path_strategy::Value::Allowed.into(),
            supported_compressors: compressors.clone(),
            supported_batch_update_compressors: compressors,
            ..CacheCapabilities::default()
        };
        Ok(Response::new(ServerCapabilities {
            cache_capabilities: Some(cache),
            // Bazel 4.2.3 takes a server only if its range includes 2.0.
            low_api_version: version(0),
            high_api_version: version(3),
            ..ServerCapabilities::default()
        }))
    }
}
