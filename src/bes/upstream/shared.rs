//! What all of upstream's tasks share.

use std::sync::Arc;

use parking_lot::RwLock;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Status, metadata::MetadataMap, transport::Channel};

use super::{backoff::RetryDelays, headers, health::Health, options::UpstreamOptions, order::BuildCalls};
use crate::{
    bes::{counters::Counters, hold::HoldPolicy},
    builds::Builds,
    transport::{Auth, Connector, RemoteError},
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

/// How we identify ourselves to upstream.
pub(super) struct Credentials {
    pub(super) connector: Connector,
    pub(super) auth: Auth,
    /// Whether the client's own `authorization` is not for this service.
    is_authorized_here: bool,
}

/// The gRPC service that takes build events.
const SERVICE: &str = "google.devtools.build.v1.PublishBuildEvent";

impl Credentials {
    pub(super) fn new(options: &UpstreamOptions) -> Result<Self, RemoteError> {
        let connect = &options.connect;
        connect.tls.validate(&connect.endpoint)?;
        Ok(Self {
            connector: Connector::new(connect)?,
            auth: Auth::new(connect)?,
            is_authorized_here: options.is_authorized_here,
        })
    }

    /// A connection of its own for each stream, as if each build tool had one: one that is not read from holds no other
    /// one back, and a service behind a balancer gets them spread.
    pub(super) fn open(&self) -> Channel {
        self.connector.channel()
    }

    /// What a call says: what the client says, with the user's headers, and those of a credential helper or Google's
    /// credentials.
    pub(super) async fn headers(&self, client: &MetadataMap) -> Result<MetadataMap, Status> {
        let own = self.auth.headers(SERVICE).await;
        let (own, _) = own.map_err(|error| Status::unauthenticated(error.to_string()))?;
        let mut client = client.clone();
        if self.is_authorized_here {
            client.remove(http::header::AUTHORIZATION.as_str());
        }
        Ok(headers::upstream(&client, &own))
    }
}

impl Inner {
    pub(super) fn credentials(&self) -> Arc<Credentials> {
        self.credentials.read().clone()
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
