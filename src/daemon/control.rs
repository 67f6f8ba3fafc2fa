//! The control API's doors: the socket, and with TLS and a token also TCP.

use tokio::net::TcpListener;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{service::interceptor::InterceptedService, transport::ServerTlsConfig};

use crate::{
    bes::{self, BesListener},
    control::{ControlServer, Service, Token, TokenCheck},
    proto::outhaul::v1::control_server::ControlServer as ControlService,
};

/// Requests may name very many paths.
const MAX_REQUEST: usize = 64 << 20;

/// A TCP port for the control API.
pub struct ControlDoor {
    /// Where it listens.
    pub listener: TcpListener,
    /// Certificate and key; without, the port must not be reachable from elsewhere.
    pub tls: Option<ServerTlsConfig>,
    /// What callers must show.
    pub token: Token,
}

fn service(service: Service, stop: &CancellationToken) -> ControlService<ControlServer> {
    ControlService::new(ControlServer::new(service, stop.clone())).max_decoding_message_size(MAX_REQUEST)
}

/// Serves on a unix socket, which the system guards.
pub(super) async fn serve_unix(
    rooms: Service,
    listener: BesListener,
    stop: CancellationToken,
) -> Result<(), String> {
    let Some((listener, _file)) = listener.into_unix() else {
        return Err("the control API is served on unix sockets only".to_owned());
    };
    bes::serve::server()
        .add_service(service(rooms, &stop))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.cancelled_owned())
        .await
        .map_err(|e| format!("the control socket: {e}"))
}

/// Serves on TCP to those who have the token.
pub(super) async fn serve_tcp(
    rooms: Service,
    door: ControlDoor,
    stop: CancellationToken,
) -> Result<(), String> {
    let failed = |e| format!("the control port: {e}");
    let mut server = bes::serve::server();
    if let Some(tls) = door.tls {
        server = server.tls_config(tls).map_err(failed)?;
    }
    let guarded = InterceptedService::new(service(rooms, &stop), TokenCheck(door.token));
    server
        .add_service(guarded)
        .serve_with_incoming_shutdown(TcpListenerStream::new(door.listener), stop.cancelled_owned())
        .await
        .map_err(failed)
}
