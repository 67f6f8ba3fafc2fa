//! What a server can do: asked once, remembered for a while.

use std::{sync::Arc, time::Duration};

use bazel_remote_apis::build::bazel::remote::execution::v2::{
    CacheCapabilities, GetCapabilitiesRequest, capabilities_client::CapabilitiesClient, compressor,
};
use moka::future::Cache;
use tonic::Code;

use super::{
    Attribution, Capabilities,
    client::{Client, Failure, MAX_MESSAGE, services},
};
use crate::{digest::DigestFunction, transport::RemoteError};

/// gRPC's default limit for a message. A server that states no limit for batches, or a larger one, still has this.
const MESSAGE_LIMIT: u64 = 4 * 1024 * 1024;

/// What a batch's answer has beside the blobs: up to [`super::batch::MAX_DIGESTS`] hashes, sizes and statuses.
const ANSWER_OVERHEAD: u64 = 512 * 1024;

/// The largest sum of blob sizes in a batch.
pub(super) const MAX_BATCH: u64 = MESSAGE_LIMIT - ANSWER_OVERHEAD;

/// A server may be replaced by another version while the daemon runs.
const KEPT_FOR: Duration = Duration::from_secs(10 * 60);

/// The last answer. Concurrent callers cause one request; all of them get a failure, which is then forgotten.
pub(crate) struct CapabilitiesCache(Cache<(), Capabilities>);

impl CapabilitiesCache {
    pub(crate) fn new() -> Self {
        Self(Cache::builder().max_capacity(1).time_to_live(KEPT_FOR).build())
    }

    pub(crate) async fn get(&self, client: &Client) -> Result<Capabilities, RemoteError> {
        self.0
            .try_get_with((), async {
                let answer = ask(client, true).await.map_err(|failure| failure.error)?;
                client.learned.forget();
                understood(client, answer)
            })
            .await
            .map_err(Arc::unwrap_or_clone)
    }
}

/// The server's capabilities, past the cache and without retries; `None` when it does not know the call.
pub(crate) async fn ask_once(client: &Client) -> Result<Option<Capabilities>, Failure> {
    match ask(client, false).await? {
        None => Ok(None),
        answer => Ok(Some(understood(client, answer)?)),
    }
}

/// The cache's part of the answer; `None` when the server does not know the call.
async fn ask(client: &Client, retry: bool) -> Result<Option<CacheCapabilities>, Failure> {
    let context = client.context("capabilities");
    let message = GetCapabilitiesRequest {
        instance_name: client.instance(),
    };
    let call = |channel, request| async move {
        CapabilitiesClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE)
            .get_capabilities(request)
            .await
    };
    let attribution = Attribution::default();
    let answer = if retry {
        client
            .unary((services::CAPABILITIES, &context), &attribution, &message, call)
            .await
    } else {
        let mut avoid = super::pool::Connections::default();
        client
            .once(
                (services::CAPABILITIES, &context),
                &attribution,
                &mut avoid,
                &message,
                call,
            )
            .await
            .map(|(answer, _)| answer)
    };
    match answer {
        Ok(answer) => Ok(Some(answer.cache_capabilities.unwrap_or_default())),
        Err(failure) if failure.code == Some(Code::Unimplemented) => Ok(None),
        Err(failure) => Err(failure),
    }
}

/// The answer in our terms.
///
/// # Errors
/// [`Rejected`](crate::transport::RemoteErrorKind::Rejected) when the server names its digest functions and ours is not among them.
fn understood(client: &Client, answer: Option<CacheCapabilities>) -> Result<Capabilities, RemoteError> {
    let Some(answer) = answer else {
        tracing::debug!(
            cache = client.place(),
            "the server does not report its capabilities"
        );
        return Ok(Capabilities::plain(MAX_BATCH));
    };
    let wanted = client.options.digest_function;
    if !answer.digest_functions.is_empty() && !answer.digest_functions.contains(&wanted.wire()) {
        let offered: Vec<String> = answer.digest_functions.iter().map(|&f| name(f)).collect();
        return Err(RemoteError::rejected(
            client.context("capabilities"),
            format!(
                "the server does not support the digest function {wanted}; it supports {}",
                offered.join(", ")
            ),
        ));
    }
    let zstd = compressor::Value::Zstd as i32;
    let zstd_streams = answer.supported_compressors.contains(&zstd);
    Ok(Capabilities {
        digest_functions: answer
            .digest_functions
            .iter()
            .filter_map(|&f| DigestFunction::from_wire(f))
            .collect(),
        max_batch_bytes: match u64::try_from(answer.max_batch_total_size_bytes) {
            Ok(0) | Err(_) => MAX_BATCH,
            Ok(stated) => stated.min(MAX_BATCH),
        },
        zstd_streams,
        // There is no capability of its own for reading in batches: a server that compresses streams may compress the
        // blobs of a batch, and one that cannot sends them plain.
        zstd_batches: zstd_streams || answer.supported_batch_update_compressors.contains(&zstd),
    })
}

/// A function's name, also of those that we cannot compute.
fn name(function: i32) -> String {
    use bazel_remote_apis::build::bazel::remote::execution::v2::digest_function::Value;
    Value::try_from(function).map_or_else(
        |_| format!("number {function}"),
        |value| value.as_str_name().to_ascii_lowercase(),
    )
}
