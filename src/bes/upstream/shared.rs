//! What all of upstream's tasks share.

use std::sync::{Arc, PoisonError, RwLock};

use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::Status;

use super::{
    backoff::RetryDelays,
    channel::Channels,
    health::Health,
    options::{UpstreamError, UpstreamOptions},
    order::BuildCalls,
};
use crate::{
    bes::{counters::Counters, hold::HoldPolicy},
    builds::Builds,
    remote::{RemoteOptions, auth::Auth},
    transport::Header,
};

/// What all streams share.
pub(super) struct Inner {
    pub(super) options: UpstreamOptions,
    /// The headers and the certificates of the options, or newer ones.
    pub(super) credentials: RwLock<Arc<Credentials>>,
    pub(super) delays: RetryDelays,
    pub(super) health: Health,
    pub(super) calls: BuildCalls,
}

/// How upstream is told who we are.
pub(super) struct Credentials {
    pub(super) channels: Channels,
    pub(super) auth: Auth,
}

impl Credentials {
    pub(super) fn new(options: &UpstreamOptions) -> Result<Self, UpstreamError> {
        let mut remote = RemoteOptions::new(options.endpoint.clone());
        remote.headers.clone_from(&options.headers);
        remote.credential_helpers.clone_from(&options.credential_helpers);
        remote.google.clone_from(&options.google);
        remote.workspace = std::env::current_dir().ok();
        Ok(Self {
            channels: Channels::new(options)?,
            auth: Auth::new(&remote)?,
        })
    }

    /// The user's headers, and those of a credential helper or Google's credentials.
    pub(super) async fn headers(&self) -> Result<Vec<Header>, Status> {
        match self.auth.headers().await {
            Ok((headers, _)) => Ok(headers),
            Err(error) => Err(Status::unauthenticated(error.to_string())),
        }
    }
}

impl Inner {
    pub(super) fn credentials(&self) -> Arc<Credentials> {
        self.credentials
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// What is around a stream's tasks.
pub(in crate::bes) struct Surroundings {
    pub(in crate::bes) builds: Arc<dyn Builds>,
    pub(in crate::bes) hold: HoldPolicy,
    pub(in crate::bes) counters: Arc<Counters>,
    pub(in crate::bes) shutdown: CancellationToken,
    pub(in crate::bes) forwards: TaskTracker,
    pub(in crate::bes) halt: CancellationToken,
}
