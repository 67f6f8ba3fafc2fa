//! Connections to upstream.

use tonic::transport::Channel;

use super::options::{UpstreamError, UpstreamOptions};
use crate::remote::{RemoteOptions, channel::Connector};

/// Makes connections: one for each stream, as if each build tool had its own. So one that is not read from holds no
/// other one back, and a service behind a balancer gets them spread.
pub(super) struct Channels {
    connector: Connector,
}

impl Channels {
    pub(super) fn new(options: &UpstreamOptions) -> Result<Self, UpstreamError> {
        let mut remote = RemoteOptions::new(options.endpoint.clone());
        remote.tls_certificate.clone_from(&options.tls_certificate);
        remote
            .tls_client_certificate
            .clone_from(&options.tls_client_certificate);
        remote.tls_client_key.clone_from(&options.tls_client_key);
        remote.connect_timeout = options.connect_timeout;
        remote.validate()?;
        let connector = Connector::new(&remote)?.keep_alive(options.keepalive, options.keepalive / 3);
        Ok(Self { connector })
    }

    /// A connection that is made when it is first used, and again when it broke. Must be called within the runtime.
    pub(super) fn open(&self) -> Channel {
        self.connector.channel()
    }
}
