//! Takes connections at a door.

use std::{
    future::Future as _,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
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

use super::{Door, Protocol, Rules, peer, tls::Shown};

/// How long it may take until a connection is agreed on, which is mostly TLS.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How many may be at it at once. More wait in the system's queue.
const AGREEING: usize = 128;
/// How long a connection that is dismissed is still heard: what it was answered is to arrive.
const PARTING: Duration = Duration::from_millis(200);
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
    /// A process of this machine that came over the loopback interface, and nobody says whose.
    Unknown,
    /// Somebody over the network, or one who is treated so because it can't be told here who it is.
    Remote,
}

/// What is known of a connection's other end.
#[derive(Debug, Clone)]
pub struct Origin {
    pub(super) caller: Caller,
    /// On TCP.
    shown: Shown,
    /// Nothing more is heard from it soon.
    dismissed: Arc<AtomicBool>,
}

impl Origin {
    fn new(caller: Caller, shown: Shown) -> Self {
        Self {
            caller,
            shown,
            dismissed: Arc::default(),
        }
    }

    /// Whether a connection that has shown no more could be made by these rules.
    pub(super) fn suffices(&self, rules: &Rules) -> bool {
        matches!(self.caller, Caller::Process { unix: true, .. })
            || self.shown.suffices(&Shown::by(rules.tls.as_ref()))
    }

    /// Ends the connection, in a moment, as if its client had: then calls come on a new one.
    pub(super) fn dismiss(&self) {
        self.dismissed.store(true, Ordering::Relaxed);
    }
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
    origin: Origin,
    /// Until when it is still heard, if it is dismissed.
    parting: Option<Pin<Box<Sleep>>>,
}

impl Connection {
    fn new(stream: AnyStream, origin: Origin) -> Self {
        Self {
            stream,
            origin,
            parting: None,
        }
    }
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
                Ok(AnyStream::Unix(stream)) => match stream.peer_cred() {
                    Ok(peer) => {
                        let uid = peer.uid();
                        let caller = Caller::Process { uid, unix: true };
                        let origin = Origin::new(caller, Shown::default());
                        return Poll::Ready(Connection::new(AnyStream::Unix(stream), origin));
                    }
                    Err(error) => self
                        .door
                        .tell(format_args!("a connection was not taken: whose it is: {error}")),
                },
                Ok(AnyStream::Tls(_)) => {}
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
            door.tell("a connection was not taken: not agreed on within 10 s");
            None
        }
    }
}

/// Finds out who has connected over TCP, and agrees on TLS.
async fn agree(stream: TcpStream, door: &Door, protocol: Protocol) -> io::Result<Connection> {
    // Acknowledgements are small, and each is waited for.
    stream.set_nodelay(true)?;
    let rules = door.rules();
    let caller = match protocol {
        Protocol::Http2 => caller(&stream).await?,
        // Everybody is judged alike there.
        Protocol::Http1 => Caller::Remote,
    };
    // Before a word is said: who asks whether there is an event service for them shall not take this for a yes, and who
    // could not be told gets another try by connecting again.
    rules
        .receive(caller)
        .map_err(|refused| io::Error::new(io::ErrorKind::PermissionDenied, refused.to_string()))?;
    let stream = match &rules.tls {
        None => AnyStream::Tcp(stream),
        Some(tls) => {
            let acceptor = TlsAcceptor::from(tls.config(protocol));
            AnyStream::Tls(Box::new(acceptor.accept(stream).await?))
        }
    };
    let origin = Origin::new(caller, Shown::by(rules.tls.as_ref()));
    Ok(Connection::new(stream, origin))
}

/// Looked up whatever the rules are: others may hold while the connection is open.
async fn caller(stream: &TcpStream) -> io::Result<Caller> {
    let (local, remote) = (stream.local_addr()?, stream.peer_addr()?);
    if !local.ip().to_canonical().is_loopback() {
        return Ok(Caller::Remote);
    }
    Ok(match peer::owner(local, remote).await {
        Ok(peer::Owner::User(uid)) => Caller::Process { uid, unix: false },
        Ok(peer::Owner::Unknown) => Caller::Unknown,
        Ok(peer::Owner::Untold(why)) => {
            // A connection that its client has reset is in no table either, and may still hold what it has sent.
            stream.peer_addr()?;
            // No build shall suffer where the system has no such tables.
            tracing::debug!("whose a connection is can't be told here: {why}");
            Caller::Remote
        }
        Err(error) => {
            tracing::debug!("whose a connection is could not be read: {error}");
            Caller::Unknown
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
    type ConnectInfo = Origin;

    fn connect_info(&self) -> Origin {
        self.origin.clone()
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
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.origin.dismissed.load(Ordering::Relaxed) {
            let parting = self
                .parting
                .get_or_insert_with(|| Box::pin(tokio::time::sleep(PARTING)));
            if parting.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
        }
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

#[cfg(test)]
mod tests {
    use super::super::Token;
    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (client, listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn whose_a_connection_is_is_known_whatever_its_door_asks_for() {
        let uid = rustix::process::geteuid().as_raw();
        for token in [None, Some(Token::new("0123456789abcdef").unwrap())] {
            let door = Door::new(Rules {
                token,
                ..Rules::default()
            });
            let (_client, accepted) = pair().await;
            let connection = agree(accepted, &door, Protocol::Http2).await.unwrap();
            assert_eq!(connection.origin.caller, Caller::Process { uid, unix: false });
        }
    }

    #[tokio::test]
    async fn what_a_client_that_has_gone_left_behind_is_not_taken() {
        use tokio::io::AsyncWriteExt as _;
        for resets in [false, true] {
            let (mut client, accepted) = pair().await;
            client.write_all(b"PRI * HTTP/2.0").await.unwrap();
            if resets {
                client.set_zero_linger().unwrap();
            }
            drop(client);
            let taken = agree(accepted, &Door::default(), Protocol::Http2).await;
            assert!(taken.is_err(), "{resets}");
        }
    }

    #[tokio::test]
    async fn a_connection_that_is_dismissed_ends() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let (mut client, accepted) = pair().await;
        let mut connection = agree(accepted, &Door::default(), Protocol::Http2).await.unwrap();
        client.write_all(b"a").await.unwrap();
        assert_eq!(connection.read_u8().await.unwrap(), b'a');
        connection.connect_info().dismiss();
        assert!(connection.read_u8().await.is_err());
        connection.write_all(b"b").await.unwrap();
        assert_eq!(client.read_u8().await.unwrap(), b'b');
    }
}
