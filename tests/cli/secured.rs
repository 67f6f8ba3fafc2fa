//! Callers with a token and a certificate.

use std::os::unix::fs::PermissionsExt as _;

use outhaul::{
    demo::GeneratedBuild,
    proto::google::devtools::build::v1::publish_build_event_client::PublishBuildEventClient,
};
use outhaul_testkit::in_time;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tonic::{
    Request, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use crate::support::{World, requests};

pub const TOKEN: &str = "a-token-that-nobody-guesses";

/// An authority, and what it has signed for `localhost` and for a caller, as files and as text.
pub struct Pki {
    pub ca: String,
    pub ca_pem: String,
    pub certificate: String,
    pub key: String,
    pub client: (String, String),
    pub client_pem: (String, String),
    pub token: String,
}

impl Pki {
    pub fn new(world: &World) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let issued = |name: &str| {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
            (params.signed_by(&key, &ca).unwrap().pem(), key.serialize_pem())
        };
        let write = |name: &str, text: &str| {
            let path = world.path(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            path
        };
        let (server, client) = (issued("localhost"), issued("client"));
        Self {
            ca: write("ca.pem", &ca.pem()),
            ca_pem: ca.pem(),
            certificate: write("server.pem", &server.0),
            key: write("server.key", &server.1),
            client: (write("client.pem", &client.0), write("client.key", &client.1)),
            client_pem: client,
            token: write("token", &format!("{TOKEN}\n")),
        }
    }

    pub fn listen(&self) -> [String; 2] {
        [
            format!("--listen-tls-certificate={}", self.certificate),
            format!("--listen-tls-key={}", self.key),
        ]
    }

    /// What a caller who trusts the authority says, with the client's certificate or without.
    pub fn trusting(&self, with_certificate: bool) -> ClientTlsConfig {
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&self.ca_pem))
            .domain_name("localhost");
        if with_certificate {
            tls.identity(Identity::from_pem(&self.client_pem.0, &self.client_pem.1))
        } else {
            tls
        }
    }
}

pub async fn channel(
    address: &str,
    tls: Option<ClientTlsConfig>,
) -> Result<Channel, tonic::transport::Error> {
    let scheme = if tls.is_some() { "https://" } else { "http://" };
    let mut endpoint = Endpoint::from_shared(address.replace("grpc://", scheme))?;
    if let Some(tls) = tls {
        endpoint = endpoint.tls_config(tls)?;
    }
    endpoint.connect().await
}

/// Sends a build's events with headers.
pub async fn publish(
    channel: Channel,
    build: &GeneratedBuild,
    headers: &[(&'static str, &str)],
) -> Result<(), Status> {
    publish_events(channel, build, build.events(), headers).await
}

/// The same with other events.
pub async fn publish_events(
    channel: Channel,
    build: &GeneratedBuild,
    events: impl Iterator<Item = Vec<u8>>,
    headers: &[(&'static str, &str)],
) -> Result<(), Status> {
    let requests = requests(&build.build_id(), &build.invocation_id(), events, true);
    let count = requests.len();
    let mut request = Request::new(tokio_stream::iter(requests));
    for (name, value) in headers {
        request.metadata_mut().append(*name, value.parse().unwrap());
    }
    let call = async {
        let mut answers = PublishBuildEventClient::new(channel)
            .publish_build_tool_event_stream(request)
            .await?
            .into_inner();
        let mut acked = 0;
        while answers.message().await?.is_some() {
            acked += 1;
        }
        assert_eq!(acked, count);
        Ok(())
    };
    in_time(call).await
}
