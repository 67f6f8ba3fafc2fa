//! The control API's listeners: the socket, and with a token or certificates also TCP.

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::service::LayerExt as _;
use tower::util::MapResponseLayer;

use super::DaemonError;
use crate::{
    access::{Guard, Incoming, ListenerRules, Listening, Protocol, dated, expect_preface, places},
    bes::{self, BesListener, counted::CountedLayer},
    control::{ControlServer, Service},
    proto::outhaul::v1::control_server::ControlServer as ControlService,
    stage::Reach,
};

/// Connections of each of the two listeners that are open at a time: at most this part of the files that may be, so that those
/// that builds need are left.
const FILES_SHARE: usize = 16;
const CONNECTIONS: usize = 1024;

/// A TCP port for the control API.
pub(crate) struct ControlListener {
    /// Where it listens.
    pub listener: TcpListener,
    /// Whom it lets in.
    pub access: ListenerRules,
    /// What its callers may have something staged into.
    pub reach: Reach,
}

/// Takes requests of up to this many bytes.
fn service(
    service: &Service,
    reach: Reach,
    most: usize,
    stop: &CancellationToken,
) -> ControlService<ControlServer> {
    let service = ControlServer::new(service.for_listener(reach), stop.clone());
    ControlService::new(service).max_decoding_message_size(most)
}

/// Serves on a unix socket, which the system guards.
pub(super) async fn serve_unix(
    services: Service,
    listener: BesListener,
    requests: CountedLayer,
    stop: CancellationToken,
) -> Result<(), DaemonError> {
    let (listener, access, file) = listener.into_parts();
    let Listening::Unix(_) = &listener else {
        return Err(DaemonError::NotASocket);
    };
    let served = serve(services, listener, access, Reach::Anywhere, requests, stop).await;
    drop(file);
    served.map_err(|e| DaemonError::Control("socket", e))
}

/// Serves on TCP to those whom the listener lets in.
pub(super) async fn serve_tcp(
    services: Service,
    control: ControlListener,
    requests: CountedLayer,
    stop: CancellationToken,
) -> Result<(), DaemonError> {
    let listening = Listening::Tcp(control.listener);
    serve(services, listening, control.access, control.reach, requests, stop)
        .await
        .map_err(|e| DaemonError::Control("port", e))
}

async fn serve(
    services: Service,
    listener: Listening,
    access: ListenerRules,
    reach: Reach,
    requests: CountedLayer,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let places = places(FILES_SHARE, CONNECTIONS);
    let incoming = expect_preface(Incoming::new(listener, access.clone(), Protocol::Http2, places));
    bes::serve::server()
        .layer(MapResponseLayer::new(dated))
        .layer(Guard(access))
        .add_service(requests.named_layer(service(&services, reach, requests.most, &stop)))
        .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
        .await
}
