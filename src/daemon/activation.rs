//! Socket activation: listeners that systemd opened before the daemon was started.

use std::{io, net::TcpListener, os::unix::net::UnixListener};

use listenfd::ListenFd;

use crate::bes::BesListener;

/// Listeners that were handed over (`LISTEN_FDS`, systemd's sd_listen_fds(3)). They take build events.
#[derive(Debug, Default)]
pub(crate) struct Inherited(Vec<Socket>);

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Inherited {
    /// Takes what the environment names, and takes it out of the environment, for children. Call it once, before
    /// there are other threads.
    ///
    /// # Errors
    /// When a descriptor is not a stream socket.
    pub(crate) fn take() -> io::Result<Self> {
        let mut fds = ListenFd::from_env();
        let mut sockets = Vec::new();
        for n in 0..fds.len() {
            let socket = match fds.take_tcp_listener(n) {
                Ok(tcp) => tcp.map(Socket::Tcp),
                // Not a TCP socket: the descriptor is still there to be taken as a unix one.
                Err(_) => fds.take_unix_listener(n)?.map(Socket::Unix),
            };
            sockets.extend(socket);
        }
        Ok(Self(sockets))
    }

    /// As listeners of the event service, in the order of the units' sockets. Call it on the runtime that will serve.
    ///
    /// # Errors
    /// When one cannot be made non-blocking.
    pub(crate) fn into_listeners(self) -> io::Result<Vec<BesListener>> {
        self.0
            .into_iter()
            .map(|socket| match socket {
                Socket::Tcp(listener) => BesListener::from_tcp(listener),
                Socket::Unix(listener) => BesListener::from_unix(listener),
            })
            .collect()
    }
}

/// Tells a service manager that asked for it (`NOTIFY_SOCKET`, systemd's sd_notify(3)) that the listeners are open.
pub(crate) fn notify_ready() {
    notify(b"READY=1");
}

/// Tells it that the listeners are closed and the rest is only being tidied up.
pub(crate) fn notify_stopping() {
    notify(b"STOPPING=1");
}

fn notify(state: &[u8]) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let sent = std::os::unix::net::UnixDatagram::unbound().and_then(|socket| {
        use std::os::{
            linux::net::SocketAddrExt as _,
            unix::{ffi::OsStrExt as _, net::SocketAddr},
        };
        // A name that begins with @ is in the abstract namespace.
        let address = match path.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(&path)?,
        };
        socket.send_to_addr(state, &address)
    });
    if let Err(error) = sent {
        tracing::warn!("sd_notify failed: {error}");
    }
}
