//! The control API's doors: the socket, and with a token or certificates also TCP.

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::service::LayerExt as _;

use crate::{
    bes::{self, BesListener, counted::CountedLayer},
    control::{ControlServer, Service},
    doors::{Door, Guard, Incoming, Listening, Protocol, greeted},
    proto::outhaul::v1::control_server::ControlServer as ControlService,
};

/// A TCP port for the control API.
pub struct ControlDoor {
    /// Where it listens.
    pub listener: TcpListener,
    /// Whom it lets in.
    pub door: Door,
}

/// Takes requests as it is told.
fn service(service: Service, most: usize, stop: &CancellationToken) -> ControlService<ControlServer> {
    ControlService::new(ControlServer::new(service, stop.clone())).max_decoding_message_size(most)
}

/// Serves on a unix socket, which the system guards.
pub(super) async fn serve_unix(
    rooms: Service,
    listener: BesListener,
    requests: CountedLayer,
    stop: CancellationToken,
) -> Result<(), String> {
    let (listener, door, file) = listener.into_parts();
    let Listening::Unix(_) = &listener else {
        return Err("the control API is served on unix sockets only".to_owned());
    };
    let served = serve(rooms, listener, door, requests, stop).await;
    drop(file);
    served.map_err(|e| format!("the control socket: {e}"))
}

/// Serves on TCP to those whom the door lets in.
pub(super) async fn serve_tcp(
    rooms: Service,
    door: ControlDoor,
    requests: CountedLayer,
    stop: CancellationToken,
) -> Result<(), String> {
    serve(rooms, Listening::Tcp(door.listener), door.door, requests, stop)
        .await
        .map_err(|e| format!("the control port: {e}"))
}

async fn serve(
    rooms: Service,
    listener: Listening,
    door: Door,
    requests: CountedLayer,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let incoming = greeted(Incoming::new(listener, door.clone(), Protocol::Http2));
    bes::serve::server()
        .layer(Guard(door))
        .add_service(requests.named_layer(service(rooms, requests.most, &stop)))
        .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
        .await
}
