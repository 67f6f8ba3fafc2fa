//! Takes connections at a door.

use std::{
    future::Future as _,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::{FutureExt as _, Stream, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    time::Sleep,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::transport::server::Connected;

use super::{Door, Protocol, peer};

/// How long a caller may take to agree on TLS.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How many may be at it at once. More wait in the system's queue.
const AGREEING: usize = 128;
/// How long nothing is accepted when the system has no room for another connection.
const NO_ROOM: Duration = Duration::from_millis(100);

/// Who has connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    /// A process of this machine.
    Process {
        /// Its user.
        uid: u32,
        /// Whether it came by a unix socket.
        unix: bool,
    },
    /// A process of this machine, and nobody says whose.
    Unknown,
    /// Somebody over the network, or who has been let in otherwise.
    Remote,
}

/// What connections come from.
#[derive(Debug)]
pub enum Listening {
    /// A TCP port.
    Tcp(TcpListener),
    /// A unix socket.
    Unix(UnixListener),
}

/// A connection, through TLS if the door has that.
pub struct Connection {
    stream: AnyStream,
    caller: Caller,
}

enum AnyStream {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    Unix(UnixStream),
}

/// The connections of a listener, each agreed on as the door's rules say. Dropped, it closes the listener.
pub struct Incoming {
    listener: Listening,
    door: Door,
    protocol: Protocol,
    /// Connections that are not agreed on yet.
    agreeing: FuturesUnordered<BoxFuture<'static, Option<Connection>>>,
    /// Until when nothing is accepted.
    pause: Option<Pin<Box<Sleep>>>,
}

impl Incoming {
    /// Takes connections from now on.
    #[must_use]
    pub fn new(listener: Listening, door: Door, protocol: Protocol) -> Self {
        Self {
            listener,
            door,
            protocol,
            agreeing: FuturesUnordered::new(),
            pause: None,
        }
    }

    fn poll_connection(&mut self, cx: &mut Context<'_>) -> Poll<Connection> {
        loop {
            match self.agreeing.poll_next_unpin(cx) {
                Poll::Ready(Some(Some(connection))) => return Poll::Ready(connection),
                Poll::Ready(Some(None)) => continue,
                // Looked at again when one of them gets on.
                Poll::Ready(None) | Poll::Pending => {}
            }
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(cx));
                self.pause = None;
            }
            if self.agreeing.len() >= AGREEING {
                return Poll::Pending;
            }
            match ready!(self.listener.poll_accept(cx)) {
                Ok(AnyStream::Tcp(stream)) => {
                    self.agreeing
                        .push(take(stream, self.door.clone(), self.protocol).boxed());
                }
                Ok(stream) => {
                    let caller = unix_caller(&stream);
                    return Poll::Ready(Connection { stream, caller });
                }
                Err(error) => {
                    // Of one connection, which is gone already; or of all, and then it helps to wait.
                    if !matches!(
                        error.kind(),
                        io::ErrorKind::ConnectionAborted
                            | io::ErrorKind::ConnectionReset
                            | io::ErrorKind::ConnectionRefused
                            | io::ErrorKind::Interrupted
                    ) {
                        tracing::error!("a connection can't be accepted: {error}");
                        self.pause = Some(Box::pin(tokio::time::sleep(NO_ROOM)));
                    }
                }
            }
        }
    }
}

impl Listening {
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<AnyStream>> {
        match self {
            Self::Tcp(listener) => listener
                .poll_accept(cx)
                .map_ok(|(stream, _)| AnyStream::Tcp(stream)),
            Self::Unix(listener) => listener
                .poll_accept(cx)
                .map_ok(|(stream, _)| AnyStream::Unix(stream)),
        }
    }
}

async fn take(stream: TcpStream, door: Door, protocol: Protocol) -> Option<Connection> {
    match tokio::time::timeout(HANDSHAKE, agree(stream, &door, protocol)).await {
        Ok(Ok(connection)) => Some(connection),
        Ok(Err(error)) => {
            door.tell(format_args!("a connection was not taken: {error}"));
            None
        }
        Err(_) => {
            door.tell("a connection was not taken: no agreement on TLS within 10 s");
            None
        }
    }
}

fn unix_caller(stream: &AnyStream) -> Caller {
    match stream {
        AnyStream::Unix(stream) => stream
            .peer_cred()
            .map_or(Caller::Unknown, |peer| Caller::Process {
                uid: peer.uid(),
                unix: true,
            }),
        AnyStream::Tcp(_) | AnyStream::Tls(_) => Caller::Remote,
    }
}

/// Finds out who has connected over TCP, and agrees on TLS.
async fn agree(stream: TcpStream, door: &Door, protocol: Protocol) -> io::Result<Connection> {
    // Acknowledgements are small, and each is waited for.
    stream.set_nodelay(true)?;
    let rules = door.rules();
    let certified = rules.tls.as_ref().is_some_and(|tls| tls.wants_certificates);
    let caller = if certified || rules.strangers || rules.token.is_some() {
        Caller::Remote
    } else {
        caller(&stream).await?
    };
    let stream = match &rules.tls {
        None => AnyStream::Tcp(stream),
        Some(tls) => {
            let acceptor = TlsAcceptor::from(tls.config(protocol));
            AnyStream::Tls(Box::new(acceptor.accept(stream).await?))
        }
    };
    Ok(Connection { stream, caller })
}

async fn caller(stream: &TcpStream) -> io::Result<Caller> {
    let (local, remote) = (stream.local_addr()?, stream.peer_addr()?);
    if !local.ip().to_canonical().is_loopback() {
        return Ok(Caller::Remote);
    }
    Ok(match peer::owner(local, remote).await {
        Ok(Some(uid)) => Caller::Process { uid, unix: false },
        Ok(None) => Caller::Unknown,
        Err(error) => {
            // No build shall suffer where the system has no such tables.
            tracing::debug!("whose a connection is can't be told here: {error}");
            Caller::Remote
        }
    })
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_connection(cx).map(|connection| Some(Ok(connection)))
    }
}

impl axum::serve::Listener for Incoming {
    type Io = Connection;
    type Addr = ();

    async fn accept(&mut self) -> (Connection, ()) {
        (std::future::poll_fn(|cx| self.poll_connection(cx)).await, ())
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller
    }
}

/// The same for whichever stream it is.
macro_rules! any {
    ($self:expr, $stream:ident => $call:expr) => {
        match &mut $self.get_mut().stream {
            AnyStream::Tcp($stream) => $call,
            AnyStream::Tls($stream) => $call,
            AnyStream::Unix($stream) => $call,
        }
    };
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        any!(self, stream => Pin::new(stream).poll_read(cx, buf))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        any!(self, stream => Pin::new(stream).poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        any!(self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        any!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        any!(self, stream => Pin::new(stream).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            AnyStream::Tcp(stream) => stream.is_write_vectored(),
            AnyStream::Tls(stream) => stream.is_write_vectored(),
            AnyStream::Unix(stream) => stream.is_write_vectored(),
        }
    }
}
